"""`fastddpm convert`: any model that is read, as a folder of ours or of diffusers; whole or not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from peers import W86, OpenAI, Tqch, randomised
from toy import SCHEDULE, generator, tiny_unet

from fastddpm import Diffusion, UNet, checkpoint, cli
from fastddpm.checkpoint import read_metadata
from fastddpm.convert import convert


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run `convert` in tmp_path; returns its exit code, and what it said."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str]:
        code = cli.main(["convert", *map(str, arguments)])
        out, err = capsys.readouterr()
        if code:
            assert out == ""
            assert err.startswith("fastddpm: error: ")
            assert err.count("\n") == 1, err
        return code, out + err

    return run


def left(folder: Path, *names: str) -> bool:
    """Whether nothing but these is in the folder, half-written ones among that."""
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


def output(model, *labels) -> torch.Tensor:
    x = torch.randn(2, 3, 16, 16, generator=generator(1))
    with torch.no_grad():
        y = model(x, torch.tensor([3, 40]), *labels)
    return getattr(y, "sample", y)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


def test_a_training_checkpoint_becomes_a_folder(tmp_path, call):
    raw, ema = randomised(W86(), 1), randomised(W86(), 2)
    content = {"net_model": raw.state_dict(), "ema_model": ema.state_dict(), "step": 3}
    torch.save(content, "ckpt.pt")
    code, said = call("ckpt.pt", "ema", "--allow-pickle")
    assert code == 0, said
    lines = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in said.splitlines()}
    assert lines["read"] == "w86763777/pytorch-ddpm, EMA weights (ema_model) of ckpt.pt"
    assert lines["process"] == "linear schedule of 50 steps, eps, fixed_large"
    assert lines["not said"].startswith("image_size=32, dropout=0.1, diffusion=linear schedule")
    assert lines["wrote"] == "ema (fastddpm)"
    assert close(output(UNet.from_pretrained("ema")), output(ema))
    metadata = read_metadata("ema/model.safetensors")
    assert metadata["origin"] == "w86763777/pytorch-ddpm, EMA weights (ema_model)"
    code, said = call("ckpt.pt", "raw", "--allow-pickle", "--weights", "raw", "--image-size", "16",
                      "--dropout", "0.2", "--variance", "fixed_small")  # fmt: skip
    assert code == 0, said
    assert "not said" not in said
    model = UNet.from_pretrained("raw")
    assert close(output(model), output(raw))
    assert (model.image_size, model.config["dropout"]) == ((16, 16), 0.2)
    assert model.diffusion.variance == "fixed_small"
    assert left(tmp_path, "ckpt.pt", "ema", "raw")


def test_flags_reach_the_reader(call):
    theirs = randomised(OpenAI(num_heads=2, use_new_attention_order=True, out_channels=6))
    torch.save(theirs.state_dict(), "x.pt")
    code, said = call("x.pt", "b", "--allow-pickle", "--num-heads", 2, "--new-attention-order",
                      "--timesteps", 400, "--schedule", "cosine",
                      "--no-rescale-timesteps")  # fmt: skip
    assert code == 0, said
    model = UNet.from_pretrained("b")
    assert close(output(model), output(theirs))
    assert model.diffusion.schedule.recipe["kind"] == "cosine"
    assert not model.diffusion.rescale_timesteps


@pytest.mark.parametrize("make", [Tqch, OpenAI])
def test_a_folder_of_diffusers(tmp_path, call, make):
    diffusers = pytest.importorskip("diffusers")
    theirs = randomised(make())
    torch.save({"ema": {"shadow": theirs.state_dict()}}, "x.pt")
    code, said = call("x.pt", "b", "--allow-pickle", "--to", "diffusers")
    assert code == 0, said
    assert close(output(diffusers.UNet2DModel.from_pretrained("b").eval()), output(theirs))
    assert close(output(UNet.from_pretrained("b")), output(theirs))
    pipeline = diffusers.DDPMPipeline.from_pretrained("b")
    assert pipeline.scheduler.config.variance_type == "fixed_large"
    assert close(output(pipeline.unet.eval()), output(theirs))
    assert call("b", "back")[0] == 0
    assert close(output(UNet.from_pretrained("back")), output(theirs))
    assert left(tmp_path, "x.pt", "b", "back")


def test_classes_and_learned_variances_are_diffusers_too(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    theirs = randomised(OpenAI(num_classes=4, out_channels=6))
    torch.save(theirs.state_dict(), tmp_path / "x.pt")
    convert(tmp_path / "x.pt", tmp_path / "b", to="diffusers", allow_pickle=True)
    y = torch.tensor([3, 1])
    written = diffusers.UNet2DModel.from_pretrained(tmp_path / "b").eval()
    assert close(output(written, y), output(theirs, y))
    assert UNet.from_pretrained(tmp_path / "b").diffusion.variance == "learned_range"
    assert not (tmp_path / "b" / "model_index.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resblock_updown": True}, "resblock_updown"),
        ({"num_heads": 2, "attention_levels": (0,)}, r"num_heads=2 are heads of \[4, 8\] channels"),
        ({"diffusion": Diffusion(SCHEDULE, rescale_timesteps=True)}, "rescaled timesteps"),
        ({"diffusion": Diffusion(SCHEDULE, "mean")}, "no scheduler for prediction 'mean'"),
    ],
    ids=str,
)
def test_what_diffusers_does_not_have_is_named_and_nothing_written(tmp_path, options, message):
    pytest.importorskip("diffusers")
    tiny_unet(**options).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "a", tmp_path / "b", to="diffusers")
    assert left(tmp_path, "a")


def test_nothing_is_written_over(tmp_path, call):
    tiny_unet().save_pretrained("a")
    for name in ("there", "empty"):
        Path(name).mkdir()
    Path("there/mine").write_text("mine")
    Path("file").write_text("mine")
    Path("link").symlink_to("nowhere")
    for name in ("a", "there", "empty", "file", "link", ".", "a/.."):
        code, said = call("a", name)
        assert code == 2
        assert f"{Path(name)} is there already, and nothing is written over it" in said
    assert Path("there/mine").read_text() == Path("file").read_text() == "mine"
    assert left(tmp_path, "a", "there", "empty", "file", "link")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "b"), "no such file or folder"),
        (("x.pt", "b"), "pass allow_pickle=True, or --allow-pickle, if you trust it"),
        (("x.pt", "b", "--allow-pickle", "--num-heads", "5"), "num_heads must divide"),
        (("x.pt", "b", "--allow-pickle", "--new-attention-order"), "is no option of tqch/ddpm-tor"),
        (("a", "b", "--weights", "ema"), "a fastddpm folder takes no options; got weights"),
        (("d", "b", "--dropout", "0.1"), "dropout is no option of a diffusers folder"),
        (("nan.pt", "b", "--allow-pickle"), "values that are NaN or infinite"),
        (("cut.pt", "b", "--allow-pickle"), "can't be read as a state dict"),
        (("nowhere", "file/b"), "file/b can't be made: "),  # before anything is read
        (("x.pt", "b" * 300, "--allow-pickle"), "name too long"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, call, arguments, message):
    net = Tqch()
    torch.save(net.state_dict(), "x.pt")
    Path("cut.pt").write_bytes(Path("x.pt").read_bytes()[:-999])
    with torch.no_grad():
        net.in_conv.bias[0] = torch.nan
    torch.save(net.state_dict(), "nan.pt")
    tiny_unet().save_pretrained("a")
    Path("d").mkdir()
    Path("d/config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    Path("file").touch()
    before = sorted(path.name for path in tmp_path.iterdir())
    code, said = call(*arguments)
    assert code == 2
    assert message.lower() in said.lower()
    assert left(tmp_path, *before)


def test_a_conversion_that_fails_while_it_writes_leaves_nothing(tmp_path, monkeypatch):
    tiny_unet().save_pretrained(tmp_path / "a")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastddpm.pretrained.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        convert(tmp_path / "a", tmp_path / "b")
    assert left(tmp_path, "a")


def test_a_folder_that_appears_meanwhile_is_left_alone(tmp_path):
    def fill() -> None:
        with checkpoint.atomic_folder(tmp_path / "b") as temporary:
            (temporary / "ours").touch()
            (tmp_path / "b").mkdir()

    with pytest.raises(FileExistsError, match="is there already"):
        fill()
    assert left(tmp_path, "b")
    assert os.listdir(tmp_path / "b") == []
