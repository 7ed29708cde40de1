"""t and mirroring of a batch: words of the random number contract, the same on every backend."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from fastddpm import ops, reference

INDEX = torch.tensor([0, 1, 7, 2**32 - 1, 2**32, 2**62, 2**63 - 1])
STREAM = {"seed": 2**63 + 11, "step": 2**32 - 1}


def by_hand(index, levels, *, seed, step):
    """The formula in Python's integers, over Random123's Philox."""
    t, flip = [], []
    for n in index.tolist():
        counter = torch.tensor([[0, step, n & (2**32 - 1), n >> 32]])
        word = reference.philox4x32(counter, seed)[0].tolist()
        t.append(word[0] * levels >> 32)
        flip.append(word[1] % 2 == 1)
    return torch.tensor(t), torch.tensor(flip)


@pytest.mark.parametrize("levels", [1, 2, 3, 1000, 2**31 - 1])
def test_every_word_of_the_stream_counts(device, levels):
    for changed in ({}, {"seed": 2**63 + 12}, {"seed": 11}, {"step": 5}):
        stream = {**STREAM, **changed}
        t, flip = ops.choices(INDEX.to(device), levels=levels, **stream)
        assert (t.dtype, flip.dtype) == (torch.int64, torch.bool)
        expected = by_hand(INDEX, levels, **stream)
        assert torch.equal(t.cpu(), expected[0])
        assert torch.equal(flip.cpu(), expected[1])
    assert torch.equal(INDEX, torch.tensor([0, 1, 7, 2**32 - 1, 2**32, 2**62, 2**63 - 1]))


@pytest.mark.parametrize("n", [0, 1, 257, 1000])
def test_a_batch_of_any_size_and_stride(device, n):
    index = torch.arange(5, 5 + 2 * n).to(device)
    whole = ops.choices(index, seed=1, step=2, levels=50)
    for got, one in zip(ops.choices(index[::2], seed=1, step=2, levels=50), whole, strict=True):
        assert torch.equal(got, one[::2])
    for got, one in zip(ops.choices(index[:1].expand(n), seed=1, step=2, levels=50), whole,
                        strict=True):  # fmt: skip
        assert torch.equal(got, one[:1].expand(n))
    if n == 1000:
        assert abs(whole[1].double().mean() - 0.5) < 4 * (0.25 / 2000) ** 0.5
        assert sorted(whole[0].unique().tolist()) == list(range(50))


def test_as_torch_sees_it(device):
    opcheck(torch.ops.fastddpm.choices, (INDEX.to(device), 3, 4, 10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 0}, "levels must be at least 1; got 0"),
        ({"levels": 2**31}, r"levels must be in 0 .. 2\^31 - 1; got 2147483648"),
        ({"step": 2**32}, "step must be in"),
        ({"step": -1}, "step must be in"),
        ({"seed": 2**64}, "seed must be in"),
        ({"sample_index": torch.tensor([-1])}, "sample_index must be in"),
        ({"sample_index": torch.zeros(2, 2, dtype=torch.int64)}, "sample_index must have shape"),
    ],
)
def test_what_is_out_of_range_is_named(options, message):
    arguments = {"sample_index": INDEX, "seed": 0, "step": 0, "levels": 10, **options}
    with pytest.raises(ValueError, match=message):
        ops.choices(arguments.pop("sample_index"), **arguments)


def test_other_types_are_named():
    with pytest.raises(TypeError, match="sample_index must be int64"):
        ops.choices(INDEX.float(), seed=0, step=0, levels=10)
    for name in ("seed", "step", "levels"):
        for value in (1.5, None, INDEX, torch.tensor(0.5), torch.zeros(2, 2).numpy()):
            arguments = {"seed": 0, "step": 0, "levels": 10, name: value}
            with pytest.raises(TypeError, match=f"^{name} must be an integer; got .*$"):
                ops.choices(INDEX, **arguments)
