"""Models on disk: what is written comes back, and whatever is wrong with a file is named."""

from __future__ import annotations

import errno
import json
import os
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import SCHEDULE, tiny_unet

from fastddpm import Diffusion, Schedule, UNet, checkpoint
from fastddpm.checkpoint import (
    atomic_write,
    read_weights,
    remove_abandoned,
    write_json,
    write_tensors,
)
from fastddpm.pretrained import BUNDLED


def output(model: UNet) -> torch.Tensor:
    x = torch.linspace(-1, 1, 2 * model.in_channels * 64).view(2, -1, 8, 8)
    with torch.no_grad():
        return model(x, torch.tensor([1, 9]))


def damage(folder, change) -> None:
    """Rewrite model.safetensors with `change` made to its tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path):
    tiny_unet().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# ---- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_size": (8, 16), "in_channels": 3, "dropout": 0.1, "head_dim": 4},
        {"diffusion": Diffusion(Schedule.cosine(50), "x0", "fixed_small", "vlb")},
        {"diffusion": Diffusion(Schedule.quadratic(20), "mean", "learned", "vlb")},
        {"diffusion": Diffusion(Schedule([0.1, 0.2, 0.5]))},
    ],
    ids=str,
)
def test_a_saved_model_comes_back(tmp_path, options):
    model = tiny_unet(**options)
    model.train().save_pretrained(tmp_path / "deep" / "folder")
    loaded = UNet.from_pretrained(tmp_path / "deep" / "folder")
    assert not loaded.training
    assert loaded.config == model.config
    assert loaded.diffusion.to_config() == model.diffusion.to_config()
    assert loaded.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(output(loaded), output(model.eval()))


def test_a_path_may_be_a_string(folder):
    assert torch.equal(output(UNet.from_pretrained(str(folder))), output(tiny_unet()))


def test_the_files_are_json_and_safetensors(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["format"] == "fastddpm"
    assert config["diffusion"]["schedule"]["kind"] == "custom" or SCHEDULE.recipe is not None
    assert load_file(folder / "model.safetensors").keys() == tiny_unet().state_dict().keys()


def test_saving_again_replaces(folder):
    tiny_unet(seed=1).save_pretrained(folder)
    assert torch.equal(output(UNet.from_pretrained(folder)), output(tiny_unet(seed=1)))


# ---- what is wrong is named ----------------------------------------------------------------------


def test_a_missing_key(folder):
    damage(folder, lambda tensors: tensors.pop("mid.attn_1.qkv.bias"))
    with pytest.raises(ValueError, match=r"lacks 1 of \d+ keys, the first: mid\.attn_1\.qkv\.bias"):
        UNet.from_pretrained(folder)


def test_an_unknown_key(folder):
    damage(folder, lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(ValueError, match="has 1 unknown keys, the first: extra"):
        UNet.from_pretrained(folder)


def test_another_shape(folder):
    damage(folder, lambda tensors: tensors.update({"conv_in.bias": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"conv_in\.bias has shape \(3,\); this model's is \(8,\)"):
        UNet.from_pretrained(folder)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file(folder, size):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        UNet.from_pretrained(folder)


def test_missing_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no such file: .*model\.safetensors"):
        UNet.from_pretrained(folder)


def config(unet: str) -> str:
    process = '"diffusion": {"schedule": {"kind": "linear"}}'
    return f'{{"format": "fastddpm", "unet": {unet}, {process}}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a readable JSON file"),
        ("[1]", "must hold a JSON object; got list"),
        ('{"format": "fastddpm"}', "the object 'unet' is missing"),
        ('{"format": "fastddpm", "unet": {}}', "the object 'diffusion' is missing"),
        ('{"format": "fastddpm", "unet": {}, "diffusion": {}}', "'schedule' is missing"),
        (config('{"width": 3}'), "unexpected keyword argument 'width'"),
        (config('{"channels": 7}'), "num_groups must divide every width"),
        (
            '{"format": "fastddpm", "unet": {}, "diffusion": {"schedule": {"kind": "line"}}}',
            "schedule kind must be one of 'linear'",
        ),
    ],
)
def test_a_bad_config(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        UNet.from_pretrained(folder)
    assert "config.json" in str(caught.value)


def test_no_model_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder; give a folder with"):
        UNet.from_pretrained(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no config\.json in it"):
        UNet.from_pretrained(tmp_path)


def test_our_folders_take_no_options(folder):
    with pytest.raises(ValueError, match="takes no options; got allow_pickle"):
        UNet.from_pretrained(folder, allow_pickle=True)


# ---- what a file may ask for ---------------------------------------------------------------------


def test_a_folder_named_like_a_bundled_model_is_itself(tmp_path, monkeypatch):
    """It was shadowed: the bundled model came back in place of the one just saved."""
    monkeypatch.chdir(tmp_path)
    model = tiny_unet()
    assert UNet.from_pretrained("fashion-mnist").config["channels"] == 16
    model.save_pretrained("fashion-mnist")
    with pytest.warns(UserWarning, match=r"'fashion-mnist' is .* here; the bundled model of that"):
        loaded = UNet.from_pretrained("fashion-mnist")
    assert loaded.config == model.config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert UNet.from_pretrained("./fashion-mnist").config == model.config
        assert UNet.from_pretrained(Path("fashion-mnist")).config == model.config
        assert UNet.from_pretrained(BUNDLED / "fashion-mnist").config["channels"] == 16
    (tmp_path / "fashion-mnist" / "config.json").unlink()
    with (
        pytest.warns(UserWarning, match="is .* here"),
        pytest.raises(
            FileNotFoundError, match=r"no config\.json in it; .*bundled names: .*fashion-mn"
        ),
    ):
        UNet.from_pretrained("fashion-mnist")


def test_a_link_to_nowhere_named_like_a_bundled_model_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fashion-mnist").symlink_to(tmp_path / "a disk that is not mounted")
    with pytest.raises(FileNotFoundError, match=r"model 'fashion-mnist': no such file or folder"):
        UNet.from_pretrained("fashion-mnist")


@pytest.mark.parametrize("name", ["norm_eps", "dropout", "head_dim", "num_groups", "freq_shift"])
def test_a_config_that_was_edited_is_refused_unless_it_says_so(folder, name):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["unet"][name] = {"norm_eps": 1e-5, "dropout": 0.5, "head_dim": 4, "num_groups": 2,
                             "freq_shift": 0}[name]  # fmt: skip
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.json is not what was written .*its digest"):
        UNet.from_pretrained(folder)
    del content["digest"]
    path.write_text(json.dumps(content))
    assert UNet.from_pretrained(folder).config == content["unet"]


def test_spaces_in_a_config_are_nobodys_edit(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    UNet.from_pretrained(folder)


def test_files_of_two_models_are_told_apart(folder, tmp_path):
    tiny_unet(norm_eps=1e-3).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").replace(folder / "config.json")
    with pytest.raises(ValueError, match=r"was written with another config\.json than the one"):
        UNet.from_pretrained(folder)


def test_a_process_that_cannot_be_saved_leaves_the_files(folder):
    before = (folder / "model.safetensors").read_bytes()
    short = tiny_unet(seed=3, diffusion=Diffusion(SCHEDULE).respace(4))
    with pytest.raises(ValueError, match="a respaced schedule is not saved"):
        short.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_files_without_digests_are_read(folder):
    content = json.loads((folder / "config.json").read_text())
    del content["digest"]
    (folder / "config.json").write_text(json.dumps(content))
    damage(folder, lambda tensors: None)
    assert torch.equal(output(UNet.from_pretrained(folder)), output(tiny_unet()))


def test_loading_draws_no_random_numbers_and_takes_no_mode_of_the_caller(folder):
    before = torch.random.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            model = UNet.from_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.is_inference() for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(output(model), output(tiny_unet()))


def test_a_network_larger_than_its_weights_is_not_made(folder, monkeypatch):
    """channels = 1024 beside a small file took 3 GB before the first key was looked at."""
    content = json.loads((folder / "config.json").read_text())
    content["unet"]["channels"] = 4096
    (folder / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("memory taken"))
    with pytest.raises(ValueError, match="digest"):
        UNet.from_pretrained(folder)
    del content["digest"]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"has shape \(32, 8\); this model's is \(16384, 4096\)"):
        UNet.from_pretrained(folder)


def test_a_sparse_file_larger_than_memory_is_not_read(tmp_path):
    size = 2**40
    header = json.dumps({"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}})
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + size)
    for read in (read_weights, checkpoint.read_tensors, UNet.from_pretrained):
        with pytest.raises(ValueError, match=r"x\.safetensors takes .* GiB; this machine has"):
            read(path)


def test_headers_and_json_are_bounded(tmp_path):
    path = tmp_path / "x.safetensors"
    header = b"{" + b" " * 2**24 + b"}"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="its header of 16777218 bytes is longer than"):
        read_weights(path, shapes_only=True)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="pointer to a file in Git LFS: fetch that with"):
        read_weights(path)
    many = {f"{i}": torch.zeros(1) for i in range(checkpoint.MOST_TENSORS + 1)}
    save_file(many, path)
    with pytest.raises(ValueError, match="it holds 20001 tensors; 20000 are the most"):
        read_weights(path, shapes_only=True)
    save_file({"x": torch.zeros(3, 0)}, path)
    with pytest.raises(ValueError, match=r"x has no possible shape of weights, \(3, 0\)"):
        read_weights(path, shapes_only=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a":' * 100_000, "nested too deep"),
        ("[" * 100_000, "nested too deep"),
        ("{" + " " * 2**25 + "}", "it is longer than 33554432 bytes"),
        ('{"a": ' + "9" * 5000 + "}", "is not a readable JSON file"),
        ("\ufeff{}", "is not a readable JSON file"),
    ],
    ids=["objects", "lists", "long", "digits", "mark"],
)
def test_json_that_asks_for_too_much(folder, text, message):
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        UNet.from_pretrained(folder)
    assert "config.json" in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_no_file(folder, tmp_path):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    os.mkfifo(tmp_path / "x.safetensors")
    for path in (folder, tmp_path / "x.safetensors"):
        with pytest.raises(FileNotFoundError):
            UNet.from_pretrained(path)
    with pytest.raises(ValueError, match="no such file"):
        checkpoint.read_json(folder / "config.json")


# ---- pickles -------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_pickles_are_loaded_when_asked_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2)}, "good.pt")
    torch.save({"a": Evil()}, "evil.pt")
    with pytest.raises(ValueError, match="is a pickle, which is not loaded unasked"):
        read_weights("good.pt")
    assert read_weights("good.pt", allow_pickle=True)["a"].tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"evil\.pt can't be read as a state dict"):
        read_weights("evil.pt", allow_pickle=True)
    assert not (tmp_path / "evil").exists()


def test_the_last_state_dict_of_a_training_checkpoint_is_taken(tmp_path):
    states = [{"a": torch.zeros(1)}, {"state": {}, "param_groups": []}, 7, {"a": torch.ones(1)}]
    torch.save(states, tmp_path / "x.ckpt")
    assert read_weights(tmp_path / "x.ckpt", allow_pickle=True)["a"].item() == 1


@pytest.mark.parametrize("content", [7, [], {}, {"a": 1}, [{"b": "c"}]], ids=str)
def test_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds no state dict of tensors"):
        read_weights(tmp_path / "x.pt", allow_pickle=True)


def test_a_damaged_pickle(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match=r"x\.pt can't be read as a state dict"):
        read_weights(tmp_path / "x.pt", allow_pickle=True)


def test_a_flipped_bit_in_a_pickle_is_found(tmp_path):
    """torch.load itself leaves the archive's checksums unread."""
    torch.save({"a": torch.arange(1000.0)}, tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    content[content.index(torch.arange(500.0, 510.0).numpy().tobytes())] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its checksum is another"):
        read_weights(tmp_path / "x.pt", allow_pickle=True)


def test_a_compressed_pickle_is_refused(tmp_path):
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as stored,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as deflated,
    ):
        for name in stored.namelist():
            deflated.writestr(name, stored.read(name))
    with pytest.raises(ValueError, match="its records are compressed"):
        read_weights(tmp_path / "y.pt", allow_pickle=True)


@pytest.mark.parametrize("zipped", [True, False])
def test_shapes_alone_are_read_without_values(tmp_path, zipped):
    torch.save({"a": torch.zeros(2, 3)}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    shapes = read_weights(tmp_path / "x.pt", allow_pickle=True, shapes_only=True)
    assert shapes["a"].is_meta
    assert shapes["a"].shape == (2, 3)


# ---- writing -------------------------------------------------------------------------------------


def fail(file) -> None:
    file.write(b"half of the new")
    raise ZeroDivisionError


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        fail(file)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_is_full_names_the_file(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(OSError, match="No space left on device") as error, atomic_write(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(path) in str(error.value)


def test_what_a_killed_write_left_is_removed_and_what_is_being_written_is_not(tmp_path):
    for name in (".a.png.0123abcd", ".b.png.0123abcd", ".hidden.txt", ".a.png.long-suffix"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".c.png.0123abcd").symlink_to(tmp_path / ".hidden.txt")
    os.mkfifo(tmp_path / ".d.png.0123abcd")
    with atomic_write(tmp_path / "a.png") as file:
        file.write(b"whole")
        remove_abandoned(tmp_path, lambda name: name != "b.png")
    assert (tmp_path / "a.png").read_bytes() == b"whole"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".a.png.long-suffix", ".b.png.0123abcd", ".c.png.0123abcd", ".d.png.0123abcd",
        ".hidden.txt", "a.png",
    ]  # fmt: skip


def test_files_have_the_permissions_of_the_umask_which_is_left_alone(tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", None)  # it is the whole process's
        with atomic_write(tmp_path / "a") as file:
            file.write(b"x")
    finally:
        monkeypatch.undo()
        assert os.umask(before) == 0o027
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_write_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    events = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), real_fsync(fd))[1])
    monkeypatch.setattr(
        checkpoint.os, "replace", lambda a, b: (events.append("replace"), real_replace(a, b))[1]
    )
    write_json(tmp_path / "x.json", {"a": 1})
    assert events == ["fsync", "replace", "fsync"]  # the file, its name, the folder
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_files_have_the_usual_permissions(tmp_path):
    old = os.umask(0o022)
    try:
        write_json(tmp_path / "x.json", {})
        assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(old)


def test_channels_last_tensors_are_written_in_their_order(tmp_path):
    x = torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    write_tensors(tmp_path / "x.safetensors", {"x": x})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], x)
