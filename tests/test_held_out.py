"""Held-out images: the number that a run is judged by, the best model by it, and what is none; the
log and TensorBoard's files, which have that number too."""

from __future__ import annotations

import gzip
import math
import sys

import numpy as np
import pytest
import torch
from image_files import idx
from killing import Killed, killed_after
from test_cli import call, model, refused, row  # noqa: F401
from test_runs import save_pictures, snapshot
from test_training import SHORT, assert_same, trainer
from toy import images, tiny_unet

from fastddpm import UNet, bits_per_dim
from fastddpm.checkpoint import read_json, read_tensors
from fastddpm.data import open_dataset
from fastddpm.training import fit, run_log
from fastddpm.training import run as training
from fastddpm.training.held_out import HeldOut, read_best
from fastddpm.training.run_log import COLUMNS, Log, Row, read_log

pytestmark = pytest.mark.filterwarnings("ignore:.*arrays keep their size")
RUN = (
    "train", "--data=data.npz", "--preset=fashion-mnist", "--model-channels=8", "--num-groups=4",
    "--channel-mult=1,2", "--attention-levels=none", "--batch-size=2", "--precision=fp32", "--T=12",
    "--beta-end=0.35", "--sample-every=0", "--quiet", "--threads=1",
)  # fmt: skip


@pytest.fixture
def data(tmp_path):
    np.savez(tmp_path / "data.npz", images=images(20, 1, 8, 8).numpy())
    np.savez(tmp_path / "held.npz", images=images(9, 1, 8, 8, seed=1).numpy())
    return open_dataset(tmp_path / "data.npz")


@pytest.fixture
def quick(monkeypatch):
    """No pictures, and a row of the log every two steps."""
    monkeypatch.setattr(run_log, "loss_plot", lambda *_: None)
    monkeypatch.setattr(training, "LOG_EVERY", 2)


def held(tmp_path, **options) -> HeldOut:
    return HeldOut(open_dataset(tmp_path / "held.npz"), **{"every": 3, "steps": 5, **options})


def numbers(out) -> dict[int, float]:
    return {r.step: r.bits_per_dim for r in read_log(out / "log.csv") if r.bits_per_dim is not None}


# ---- the number and the best model ---------------------------------------------------------------


def test_the_number_is_the_bound_of_the_averaged_model_on_images_evenly_spaced(tmp_path, data):
    run = trainer(tiny_unet())
    run.step(data.images(range(4)))
    x = images(9, 1, 8, 8, seed=1)
    for count, taken, steps in (
        (4, [0, 2, 4, 6], 5), (9, range(9), 12), (100, range(9), 1000), (1, [0], 1),
    ):  # fmt: skip
        got = held(tmp_path, images=count, steps=steps).measure(run)
        own = bits_per_dim(run.ema_model(), x[list(taken)], steps=min(steps, 12), progress=False)
        assert got == own.total.double().mean().item()


def test_the_best_model_is_the_one_with_the_fewest_bits(tmp_path, data, quick, monkeypatch):
    given, seen = iter((5.0, 3.0, math.inf, 4.0, 3.0)), {}

    def measured(self, run):
        seen[run.step_count] = {k: v.clone() for k, v in run.ema_weights().items()}
        return next(given)

    monkeypatch.setattr(HeldOut, "measure", measured)
    out = tmp_path / "run"
    fit(trainer(tiny_unet()), data, out, held_out=held(tmp_path), **SHORT, steps=13)
    assert numbers(out) == {3: 5, 6: 3, 9: math.inf, 12: 4, 13: 3}
    best = read_json(out / "best" / "best.json")
    assert (best["step"], best["bits_per_dim"]) == (6, 3)
    assert best == read_best(out)
    assert_same(UNet.from_pretrained(out / "best").state_dict(), seen[6])
    assert_same(UNet.from_pretrained(out).state_dict(), seen[13])


def test_a_run_is_judged_and_the_best_gives_the_number_again(tmp_path, data, quick):
    out = tmp_path / "run"
    fit(trainer(tiny_unet()), data, out, held_out=held(tmp_path), **SHORT, steps=4)
    assert [row.step for row in read_log(out / "log.csv")] == [2, 3, 4]
    assert list(numbers(out)) == [3, 4]
    best = read_best(out)
    x = open_dataset(tmp_path / "held.npz").images(range(9))
    own = bits_per_dim(UNet.from_pretrained(out / "best"), x, steps=5, progress=False).total
    assert best["bits_per_dim"] == own.double().mean().item() == min(best["bits_per_dim"], 1e9)
    assert numbers(out)[best["step"]] == pytest.approx(best["bits_per_dim"], abs=1e-6)


def test_without_held_out_images_nothing_of_it_runs(tmp_path, data, quick, monkeypatch):
    def measured(*_):
        raise AssertionError("it was judged")

    monkeypatch.setattr(HeldOut, "measure", measured)
    fit(trainer(tiny_unet()), data, tmp_path / "run", **SHORT, steps=4)
    assert "bits_per_dim" not in (tmp_path / "run" / "log.csv").read_text()
    assert not (tmp_path / "run" / "best").exists()


def test_a_model_of_nan_is_judged_by_inf_and_never_the_best(tmp_path, data):
    run = trainer(tiny_unet())
    with torch.no_grad():
        for average in run.weights.average.values():
            average.fill_(math.nan)
    judge = held(tmp_path)
    assert judge.measure(run) == math.inf
    judge.keep(run, tmp_path, math.inf)
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize("survived", [1, 2, 4, 7, 9, 11])
def test_whichever_write_is_the_last_the_run_goes_on_and_its_best_is_whole(
    tmp_path, data, quick, monkeypatch, survived
):
    options = {**SHORT, "steps": 4, "save_every": 2}
    judged = {"every": 2, "images": 2, "steps": 2}
    fit(trainer(tiny_unet()), data, tmp_path / "a", **options, held_out=held(tmp_path, **judged))
    out = tmp_path / "b"
    with killed_after(survived, monkeypatch) as renamed:
        try:
            fit(trainer(tiny_unet()), data, out, **options, held_out=held(tmp_path, **judged))
        except Killed:
            assert len(renamed) == survived
    if (out / "best" / "model.safetensors").exists():
        UNet.from_pretrained(out / "best")
        assert read_best(out)["step"] in (2, 4)
    resume = (out / "trainer.safetensors").exists()
    resumed = trainer(tiny_unet(seed=1))
    if not resume:
        resumed = trainer(tiny_unet())
    fit(resumed, data, out, **options, held_out=held(tmp_path, **judged), resume=resume)
    assert_same(read_tensors(out / "trainer.safetensors")[0],
                read_tensors(tmp_path / "a" / "trainer.safetensors")[0])  # fmt: skip
    assert numbers(out) == numbers(tmp_path / "a")
    assert read_best(out) == read_best(tmp_path / "a")
    assert_same(read_tensors(out / "best" / "model.safetensors")[0],
                read_tensors(tmp_path / "a" / "best" / "model.safetensors")[0])  # fmt: skip


def test_a_run_is_judged_by_the_same_numbers_to_its_end(tmp_path, data, quick):
    out = tmp_path / "run"
    fit(trainer(tiny_unet()), data, out, held_out=held(tmp_path), **SHORT, steps=3)
    before, options = snapshot(out), {**SHORT, "steps": 6, "resume": True}
    for other in ({"images": 4}, {"steps": 6}):
        with pytest.raises(ValueError, match=r"best was chosen by other numbers: .* there and"):
            fit(trainer(tiny_unet()), data, out, held_out=held(tmp_path, **other), **options)
        assert snapshot(out) == before
    # To go on without is to keep what there is.
    fit(trainer(tiny_unet()), data, out, **options)
    assert list(numbers(out)) == [3]
    assert (
        snapshot(out / "best").items()
        <= {name.removeprefix("best/"): content for name, content in before.items()}.items()
    )


# ---- which images --------------------------------------------------------------------------------


def test_what_is_trained_on_is_not_held_out(tmp_path, data, refused):  # noqa: F811
    def line(*words: str) -> str:
        return refused(*RUN[:-2], "--threads=1", "--steps=1", "--out=run", *words)

    np.savez(tmp_path / "again.npz", x=images(20, 1, 8, 8).numpy())
    assert "has the images that are trained on" in line("--held-out=again.npz")
    assert "has the images that are trained on" in line("--held-out=data.npz")
    np.savez(tmp_path / "wide.npz", x=images(5, 1, 8, 16).numpy())
    assert "shape (1, 8, 16); those of data.npz" in line("--held-out=wide.npz")
    assert "nowhere does not exist" in line("--held-out=nowhere")
    assert "data.npz (npz) has no splits" in line("--held-out=test")
    assert "evaluate_every must be at least 1" in line("--held-out=held.npz", "--evaluate-every=0")
    assert "--evaluate-every is of held-out images" in line("--evaluate-every=5")
    (tmp_path / "own.toml").write_text("[run]\nevaluate_steps = 5\n")
    assert "own.toml: [run] evaluate_steps is of held-out" in line("--recipe=own.toml")
    save_pictures(tmp_path / "all", images(4, 1, 8, 8))
    save_pictures(tmp_path / "all" / "held", images(4, 1, 8, 8, seed=3))
    for one, other in (("all", "all/held"), ("all/held", "all")):
        assert "give two folders that lie apart" in line(f"--data={one}", f"--held-out={other}")
    assert "must be apart" in line("--held-out=all", "--out=all/run")
    assert not (tmp_path / "run").exists()


def test_a_split_and_a_path_are_held_out(tmp_path, data, call):  # noqa: F811
    folder = tmp_path / "mnist"
    folder.mkdir()
    for name, n in (("train", 20), ("t10k", 5)):
        content = gzip.compress(idx(images(n, 8, 8, seed=n).numpy()))
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(content)
    words = (*RUN, "--steps=2", "--evaluate-steps=3", "--evaluate-images=4")
    report = call(*words, "--data=mnist", "--held-out=test", "--out=a")
    assert row(report, "test").startswith("4 of 5 held-out images, a chain of 3 steps")
    assert row(report, "best").endswith("step 2)")
    assert float(row(report, "bits/dim").split()[0]) == pytest.approx(
        numbers(tmp_path / "a")[2], abs=1e-4
    )
    written = read_json(tmp_path / "a" / "recipe.json")
    assert written["data"]["held_out"] == "test"
    # The same from the recipe, and on and on.
    call("train", "--recipe=a/recipe.json", "--out=b", "--quiet", "--threads=1")
    assert read_best(tmp_path / "a") == read_best(tmp_path / "b")
    call("train", "--resume", "--out=b", "--quiet", "--threads=1", "--steps=3")
    assert list(numbers(tmp_path / "b")) == [2, 3]
    call(*words, "--held-out=held.npz", "--out=c")
    assert read_json(tmp_path / "c" / "recipe.json")["data"]["held_out"] == str(
        tmp_path / "held.npz"
    )


def test_a_folder_with_anothers_best_is_not_written_over(tmp_path, data, refused):  # noqa: F811
    tiny_unet().save_pretrained(tmp_path / "run" / "best")
    before = snapshot(tmp_path)
    assert "holds a model (best/model.safetensors)" in refused(*RUN[:-2], "--steps=1", "--out=run")
    assert snapshot(tmp_path) == before


# ---- the log -------------------------------------------------------------------------------------


def test_a_log_has_the_columns_that_its_rows_have(tmp_path):
    log = Log(tmp_path, 0, "simple")
    log.add(Row(2, 0.5, 100.0))
    log.write()
    text = (tmp_path / "log.csv").read_text()
    assert text.splitlines() == ["step,loss,images_per_second", "2,0.500000,100.0"]
    again = Log(tmp_path, 2, "simple")
    again.add(Row(4, 0.25, 50.0, 0.5, 1, 3.5))
    again.add(Row(6, 0.25, 50.0, 0.5, 1))
    again.write()
    rows = read_log(tmp_path / "log.csv")
    assert rows == [Row(2, 0.5, 100.0), Row(4, 0.25, 50.0, 0.5, 1, 3.5), Row(6, 0.25, 50.0, 0.5, 1)]
    assert (tmp_path / "log.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    assert [row.step for row in Log(tmp_path, 4, "simple").rows] == [2, 4]
    header = "step,loss,images_per_second"
    for text in (f"{header},mood\n", f"{header},skipped,waiting\n", f"{header},skipped\n1,1,1,x\n",
                 f"{header},skipped\n1,1,1\n", "loss,step,images_per_second\n"):  # fmt: skip
        (tmp_path / "log.csv").write_text(text)
        with pytest.raises(ValueError, match=r"log.csv can't be read near line \d"):
            read_log(tmp_path / "log.csv")


# ---- TensorBoard ---------------------------------------------------------------------------------


def board(out):
    package = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="needs the package tensorboard",
    )
    events = package.EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    return events


def test_tensorboard_has_the_log_and_the_grids(tmp_path, data, quick):
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    out, options = tmp_path / "run", {**SHORT, "sample_every": 3, "tensorboard": True}
    run = trainer(tiny_unet())

    def stop_at(step):
        own = run.step

        def stopped(x0):
            if run.step_count == step:
                raise Killed
            return own(x0)

        run.step = stopped

    stop_at(5)  # after a checkpoint at 3, and a row at 4 that the run will add again
    with pytest.raises(Killed):
        fit(run, data, out, held_out=held(tmp_path), **options, steps=8)
    again = trainer(tiny_unet())
    fit(again, data, out, held_out=held(tmp_path), **options, steps=8, resume=True)
    events, rows = board(out), read_log(out / "log.csv")
    assert [row.step for row in rows] == [2, 3, 4, 6, 8]
    for name in ("loss", "images_per_second", "waiting", "skipped", "bits_per_dim"):
        got = [(e.step, e.value) for e in events.Scalars(name)]
        own = [(r.step, getattr(r, name)) for r in rows if getattr(r, name) is not None]
        assert [step for step, _ in got] == [step for step, _ in own]
        np.testing.assert_allclose([v for _, v in got], [v for _, v in own], rtol=1e-3, atol=0.06)
    assert {e.step for e in events.Scalars("lr")} == {2, 3, 4, 6, 8}
    assert [e.step for e in events.Images("samples")] == [3, 6, 8]
    assert events.Images("samples")[0].width == 496


def test_tensorboard_that_is_missing_is_one_line(tmp_path, data, refused, monkeypatch):  # noqa: F811
    for name in [n for n in sys.modules if n.split(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    line = refused(*RUN[:-2], "--steps=1", "--out=run", "--tensorboard")
    assert "pip install 'fastddpm[tensorboard]'" in line
    assert not (tmp_path / "run").exists()
