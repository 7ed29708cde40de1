"""The random number contract: frozen values, independence of everything but its three words."""

from __future__ import annotations

import math

import pytest
import torch
from compare import LAYOUTS, assert_same_for_any_thread_count, in_layout, table, timesteps
from scipy import stats
from torch.library import opcheck

from fastddpm import ops, reference

# (seed, step, sample index) and the sample's first six normals. Frozen: files of the codec and
# published samples depend on them.
GOLDEN = (
    (
        (0, 0, 0),
        (0.99113782, -0.92466241, -0.61760896, -0.48206864, -0.15363818, 0.18082582),
    ),
    (
        (2**64 - 1, 1000, 2**40 + 7),
        (-0.24295357, 0.07939903, -0.31213878, -0.06618179, 0.34419364, 0.18541614),
    ),
    (
        (1234, 999, 255),
        (1.58068507, -0.33634539, -0.91869498, -0.16837483, -1.12382261, 0.05507254),
    ),
)


def draw(device, shape=(3, 2, 5, 3), *, seed=5, step=7, **options):
    options.setdefault("sample_index", torch.arange(shape[0]).to(device))
    return ops.randn(shape, seed=seed, step=step, **options)


@pytest.mark.parametrize(("stream", "values"), GOLDEN)
def test_golden_values(device, stream, values):
    seed, step, index = stream
    z = draw(device, (1, 6), seed=seed, step=step, sample_index=torch.tensor([index]).to(device))
    torch.testing.assert_close(z[0].cpu(), torch.tensor(values), rtol=1e-6, atol=1e-6)


# 1 and 3: no whole block of four;  1023 .. 1026: around the buffers of the native backends.
@pytest.mark.parametrize("numel", [1, 3, 4, 7, 1023, 1024, 1026, 5000])
def test_is_the_reference_to_a_few_ulp(device, numel):
    step, index = timesteps(5), torch.tensor([0, 1, 2**32 - 1, 2**32, 2**62])
    seed = 2**63 + 11
    z = draw(device, (5, numel), seed=seed, step=step.to(device), sample_index=index.to(device))
    truth = reference.randn(
        (5, numel), seed=seed, step=step, sample_index=index, dtype=torch.float64
    )
    # Ten ulp of the radius, which is at most 6.8: close to a zero of cos or sin nothing is better.
    torch.testing.assert_close(z.cpu().double(), truth, rtol=2e-6, atol=2e-6)


def test_bits_do_not_depend_on_the_batch(device):
    step, index = timesteps(257).to(device), torch.randint(0, 2**40, (257,)).to(device)
    shape = (3, 7, 5)
    whole = draw(device, (257, *shape), step=step, sample_index=index)
    for part in (slice(0, 1), slice(5, 8), slice(256, 257)):
        one = draw(device, (len(index[part]), *shape), step=step[part], sample_index=index[part])
        assert torch.equal(one, whole[part])


def test_bits_do_not_depend_on_the_thread_count(device):
    def function():
        return draw(device, (33, 3, 32, 32))

    assert_same_for_any_thread_count(function)


def test_a_longer_sample_begins_with_the_shorter_one(device):
    assert torch.equal(draw(device, (3, 1000))[:, :37], draw(device, (3, 37)))


def test_ways_to_say_the_same(device):
    z = draw(device, (4, 6), step=3, sample_index=torch.arange(10, 14).to(device))
    step = torch.full((4,), 3).to(device)
    assert torch.equal(
        z, draw(device, (4, 6), step=step, sample_index=torch.arange(10, 14).to(device))
    )
    assert torch.equal(z, ops.randn((4, 6), seed=5, step=3, first_index=10, device=device))
    strided = torch.arange(20, 28).to(device)[::2] // 2
    assert torch.equal(z, draw(device, (4, 6), step=step[:1].expand(4), sample_index=strided))


def test_low_precision_is_the_rounded_float32(device):
    z = draw(device, (3, 1001))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(draw(device, (3, 1001), dtype=dtype), z.to(dtype))


def test_every_word_of_the_stream_matters(device):
    base = draw(device, (1, 64), seed=1, step=2)
    others = [
        draw(device, (1, 64), seed=2, step=2),
        draw(device, (1, 64), seed=1 + 2**32, step=2),
        draw(device, (1, 64), seed=1, step=3),
        draw(device, (1, 64), seed=1, step=2, sample_index=torch.tensor([1]).to(device)),
        draw(device, (1, 64), seed=1, step=2, sample_index=torch.tensor([2**32]).to(device)),
    ]
    for other in others:
        assert (other == base).sum() <= 1


def test_a_million_draws_are_standard_normal(device):
    z = draw(device, (1000, 1000), seed=2024).cpu().double().flatten()
    n = z.numel()
    assert z.isfinite().all()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        deviation = (z**power).mean().item() - moment
        assert abs(deviation) < 4 * math.sqrt(variance / n), f"moment {power}"
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    pairs = z.reshape(-1, 1000)
    for lag in (1, 2, 4):  # within a Box-Muller pair, a block, and between blocks
        correlation = (pairs[:, lag:] * pairs[:, :-lag]).mean().item()
        assert abs(correlation) < 4 / math.sqrt(n), f"lag {lag}"
    assert abs((pairs[1:] * pairs[:-1]).mean().item()) < 4 / math.sqrt(n), "between samples"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (2, 65, 3, 3), (2, 5, 33, 17)])
def test_what_the_ops_draw_does_not_depend_on_the_layout(device, shape, layout):
    """Element order is that of a contiguous sample in whatever order memory is walked."""
    n = shape[0]
    x, t = in_layout(torch.randn(shape).to(device), layout), timesteps(n).to(device)
    stream = {"seed": 3, "sample_index": torch.arange(n).to(device), "step": 11}
    z = ops.randn(shape, **stream)
    tab = table(device=device)
    assert torch.equal(ops.noise(x, t, tab, **stream)[1], z)
    drawn = ops.posterior_step(x, x, t, tab, **stream)
    assert torch.equal(drawn, ops.posterior_step(x, x, t, tab, z=in_layout(z, layout)))


def test_empty(device):
    assert draw(device, (0, 3, 4)).shape == (0, 3, 4)
    assert draw(device, (2, 0)).shape == (2, 0)


def test_defaults():
    z = ops.randn((2, 3), seed=0, step=0)
    assert z.dtype == torch.float32
    assert z.device.type == "cpu"


def test_float64_goes_to_the_reference():
    z = ops.randn((2, 5), seed=1, step=2, dtype=torch.float64)
    index = torch.arange(2)
    expected = reference.randn((2, 5), seed=1, step=2, sample_index=index, dtype=torch.float64)
    assert torch.equal(z, expected)


INDEX = torch.arange(2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed must be in 0 .. 2^64 - 1; got -1"),
        ({"seed": 2**64}, ValueError, "seed must be in 0"),
        ({"seed": 0.5}, TypeError, "seed must be an integer; got 0.5"),
        ({"seed": True}, TypeError, "seed must be an integer; got True"),
        ({"step": -1}, ValueError, r"step must be in 0 .. 2\^32 - 1; got -1"),
        ({"step": 2**32}, ValueError, "step must be in 0"),
        ({"step": torch.tensor([0, -3])}, ValueError, r"step must be in 0 .. 2\^32 - 1; got -3"),
        ({"step": torch.zeros(3, dtype=torch.int64)}, ValueError, r"step must have shape \(2,\)"),
        ({"step": torch.zeros(2)}, TypeError, "step must be int64; got float32"),
        ({"first_index": -1}, ValueError, "first_index must be in 0"),
        ({"first_index": 2**63 - 1}, ValueError, "first_index must be in 0"),
        (
            {"sample_index": torch.tensor([0, -1])},
            ValueError,
            "sample_index must be in 0 .* got -1",
        ),
        ({"sample_index": [0, 1]}, TypeError, "sample_index must be a tensor; got list"),
        ({"sample_index": INDEX.int()}, TypeError, "sample_index must be int64; got int32"),
        (
            {"sample_index": INDEX[:1]},
            ValueError,
            r"sample_index must have shape \(2,\); got \(1,\)",
        ),
        ({"sample_index": INDEX, "first_index": 1}, ValueError, "got both"),
        ({"dtype": torch.int64}, TypeError, "dtype must be a float dtype; got torch.int64"),
        ({"shape": ()}, ValueError, r"shape must be \(N, ...\)"),
        ({"shape": (2, -1)}, ValueError, "shape must be"),
        ({"shape": (2, 1.5)}, ValueError, "shape must be"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message.replace("2^64", r"2\^64")):
        ops.randn(**{"shape": (2, 3), "seed": 0, "step": 0, **options})


def test_registered_op():
    t, index = timesteps(3), torch.arange(3)
    opcheck(torch.ops.fastddpm.randn.default, ([3, 5], -7, t, index, torch.float32))


def test_compiles_without_breaks(device):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(step, seed):
        return ops.randn((3, 5), seed=seed, step=step, first_index=2, device=device)

    for seed in (5, 2**64 - 1):
        expected = ops.randn((3, 5), seed=seed, step=4, first_index=2, device=device)
        assert torch.equal(compiled(torch.full((3,), 4).to(device), seed), expected)
