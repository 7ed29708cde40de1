"""What is written is what is read: digests in our files, and none asked of others'."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastddpm import digest
from fastddpm.checkpoint import read_tensors, write_tensors

TENSORS = {
    "a": torch.linspace(-1, 1, 60).view(3, 4, 5),
    "b": torch.arange(6, dtype=torch.int64),
    "step": torch.tensor(7.0),
    "empty": torch.zeros(0, 3),
    "half": torch.linspace(-1, 1, 8).to(torch.bfloat16),
}
METADATA = {"trainer": '{"step_count": 7}', "other": "ü"}


def test_a_digest_is_of_the_content_alone():
    said = digest.of_tensors(TENSORS, METADATA)
    strided = {name: TENSORS[name] for name in reversed(TENSORS)}
    strided["a"] = TENSORS["a"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided["a"].is_contiguous()
    assert digest.of_tensors(strided, {**dict(reversed(METADATA.items())), "digest": "x"}) == said
    assert said.startswith("sha256:")
    assert len(said) == len("sha256:") + 64


@pytest.mark.parametrize(
    "change",
    [
        {"a": TENSORS["a"].flip(0)},
        {"a": TENSORS["a"].reshape(4, 3, 5)},
        {"half": TENSORS["half"].view(torch.float16)},
        {"empty": torch.zeros(3, 0)},
        {"c": TENSORS["b"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_part_of_a_tensor_counts(change):
    assert digest.of_tensors({**TENSORS, **change}, {}) != digest.of_tensors(TENSORS, {})


def test_json_counts_by_content():
    content = {"unet": {"a": 1, "b": [1e-6, None]}, "digest": "anything"}
    again = {"unet": {"b": [1e-6, None], "a": 1}}
    assert digest.of_json(content) == digest.of_json(again)
    assert digest.of_json(content) != digest.of_json({"unet": {"a": 1, "b": [1e-5, None]}})


def test_a_flipped_bit_is_never_read_as_other_content(tmp_path):
    """Every trial is an error, or the very same tensors and metadata (the flip hit spaces of the
    header, or the digest's own name)."""
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, METADATA)
    whole = path.read_bytes()
    draw, refused = random.Random(0), 0
    for _ in range(400):
        content = bytearray(whole)
        content[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            tensors, metadata = read_tensors(path)
        except ValueError:
            refused += 1
            continue
        assert {k: v for k, v in metadata.items() if k in METADATA} == METADATA
        assert tensors.keys() == TENSORS.keys()
        assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert refused > 380


def test_tensor_bytes_that_differ_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged: its tensors and metadata"):
        read_tensors(path)


def test_foreign_files_say_no_digest_and_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, METADATA)
    tensors, metadata = read_tensors(path)
    assert metadata == METADATA
    assert torch.equal(tensors["a"], TENSORS["a"])
    write_tensors(path, TENSORS, METADATA)
    assert read_tensors(path)[1] == METADATA, "the digest is the file's, not the caller's"
    assert torch.equal(load_file(path)["a"], TENSORS["a"]), "others read our files"
