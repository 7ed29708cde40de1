"""benchmarks/ablation.py: its rows, that they are on one budget, and that a run goes on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from script import script
from toy import images

from fastddpm.evaluation import extractors
from fastddpm.evaluation.extractors import Extractor


def pooled(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, 2).flatten(1)


@pytest.fixture
def ablation(monkeypatch):
    with script("ablation") as module:
        monkeypatch.setattr(extractors, "_known", dict(extractors._known))
        extractors.register(
            module.EXTRACTOR,
            lambda weights, device: Extractor(module.EXTRACTOR, "-EffLite0", 12, "0" * 16, pooled),
        )
        threads = torch.get_num_threads()
        yield module
        torch.set_num_threads(threads)


def test_rows_differ_in_nothing_but_what_is_compared(ablation):
    class Data:
        shape = (1, 8, 8)

    class Options:
        seed, channels, T = 0, 8, 25

    made = {row: ablation.network(row, Data, Options) for row in ablation.ROWS}
    assert len(made) == 9
    one = made["eps-simple-fixed"].state_dict()
    for row, network in made.items():
        process = network.diffusion
        assert (process.prediction, process.objective, process.variance) == ablation.ROWS[row]
        assert process.T == 25
        for name, tensor in network.state_dict().items():
            if not name.startswith("conv_out") or process.variance != "learned":
                assert torch.equal(tensor, one[name]), (row, name)


def test_a_run_prints_its_rows_and_goes_on(ablation, tmp_path, capsys, monkeypatch):
    for k, name in enumerate(("train", "test")):
        np.savez(tmp_path / name, images=images(20, 1, 8, 8, seed=k).numpy())
    words = [
        f"--data={tmp_path / 'train.npz'}", f"--test={tmp_path / 'test.npz'}", "--steps=2",
        f"--out={tmp_path / 'out'}", "--batch-size=2", "--T=25", "--channels=8", "-n=4",
        "--images=3", "--pool=1", f"--json={tmp_path / 'x.json'}", f"--plot={tmp_path / 'x.png'}",
    ]  # fmt: skip
    assert ablation.main([*words, "--rows=eps-vlb-learned"]) == 0
    capsys.readouterr()

    def never(*_, **__):
        raise AssertionError("it was trained again")

    with monkeypatch.context() as patch:
        patch.setattr(ablation.Trainer, "step", never)
        assert ablation.main([*words, "--rows=eps-vlb-learned"]) == 0
    assert ablation.main([*words, "--rows=eps-simple-fixed,eps-vlb-learned"]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["rows"]
    assert [row["row"] for row in rows] == ["eps-vlb-learned", "eps-simple-fixed"]
    for row in rows:
        assert (row["images"], row["samples"], row["test images"]) == (3, 4, 20)
        assert np.isfinite([row["bits/dim"], row["standard error"], row["FD-EffLite0"]]).all()
        assert f"{row['bits/dim']:.3f} +- {row['standard error']:.3f}" in printed
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (960, 600)
    with pytest.raises(SystemExit):
        ablation.main([w.replace("--T=25", "--T=30") for w in words])
    assert "T is 25 there and 30 here; give another --out" in capsys.readouterr().err


def test_a_row_that_diverges_is_said_to(ablation, tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "x.npz", images=images(20, 1, 8, 8).numpy())

    def diverges(*_, **__):
        raise FloatingPointError("step 3: the loss is nan")

    monkeypatch.setattr(ablation, "train", diverges)
    assert ablation.main([
        f"--data={tmp_path / 'x.npz'}", f"--test={tmp_path / 'x.npz'}", f"--out={tmp_path / 'o'}",
        "--rows=mean-simple-fixed", "--pool=1", f"--plot={tmp_path / 'x.png'}",
    ]) == 0  # fmt: skip
    assert "step 3: the loss is nan" in capsys.readouterr().out
    assert not (tmp_path / "x.png").exists()
