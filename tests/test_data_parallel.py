"""Several processes train one model: the steps, states and errors of one process, whatever the
number of ranks and of pieces that a batch is computed in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from on_ranks import FIT, RECIPE, WAYS, batch, few_images, gradients, one, steps, weights_of
from test_ranks import by_torchrun, free_port, kind  # noqa: F401
from test_training import assert_same, start, steps_done
from test_training import command as resume_command
from toy import images, tiny_unet

from fastddpm.checkpoint import read_tensors
from fastddpm.pretrained import WEIGHTS
from fastddpm.training.run import STATE, Trainer, fit


@pytest.fixture(scope="module")
def trained(tmp_path_factory, kind) -> SimpleNamespace:  # noqa: F811
    """What each of two ranks saw in on_ranks.py, and the folder of their run."""
    out = tmp_path_factory.mktemp("trained")
    by_torchrun(2, "train", out, kind)
    seen = [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return SimpleNamespace(seen=seen, out=out)


def test_a_step_of_a_wrapped_model_is_that_of_the_mean_of_the_ranks_gradients(trained):
    """Of a DistributedDataParallel that the caller made."""
    alone = [Trainer(tiny_unet(), **RECIPE) for _ in trained.seen]
    losses = []
    for rank, trainer in enumerate(alone):
        trainer.example_count = 4 * rank  # the examples of the step are numbered through
        losses.append(trainer.step(batch(rank)))
    for seen in trained.seen:
        mean = torch.stack(losses).mean()
        torch.testing.assert_close(seen["loss"], mean, atol=1e-5, rtol=1e-5)
    for name, first in trained.seen[0]["gradients"].items():
        mean = torch.stack([gradients(trainer)[name] for trainer in alone]).mean(dim=0)
        atol = 1e-4 * max(mean.abs().max().item(), 1e-3)
        torch.testing.assert_close(first, mean, atol=atol, rtol=0, msg=name)
    for name, first in trained.seen[0]["weights"].items():
        assert torch.equal(trained.seen[1]["weights"][name], first), name


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        # The gradient of a key's bias is nothing but rounding, of which Adam makes whole steps.
        if "qkv.bias" not in name:
            torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=name)


@pytest.mark.parametrize("way", WAYS)
def test_steps_of_two_ranks_are_those_of_one(trained, way):
    """Loss, gradient and average of all the examples, be their shares equal, odd or empty, and
    computed whole or in pieces."""
    first, second = trained.seen
    alone = one()
    losses = steps(alone, way, len(first[way]))
    assert first[way] == second[way]
    assert max(abs(a - b) for a, b in zip(first[way], losses, strict=True)) < 1e-6
    close(first[f"weights {way}"], weights_of(alone), 2e-5)
    for name, value in first[f"weights {way}"].items():
        assert torch.equal(value, second[f"weights {way}"][name]), name


def test_ranks_that_take_no_step_together_are_told_and_nothing_moves(trained):
    for seen in trained.seen:
        for name in ("overlap", "sum", "sizes"):
            assert seen[name].startswith("ValueError: the ranks did not take one step together"), (
                seen[name]
            )
        assert seen["range"].startswith("ValueError: images of floats must lie in [-1, 1]; got 0.5")
        assert "0.5 .. 7" in seen["range"]
        assert seen["after errors"][:2] == [3, 3]
    assert trained.seen[0]["after errors"] == trained.seen[1]["after errors"]
    alone = one(3)
    steps(alone, "empty", 3)
    assert abs(steps(alone, "even", 1)[0] - trained.seen[0]["after errors"][2]) < 1e-6


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(trained):
    for seen in trained.seen:
        assert seen["skipped"] == [9, 9]
        assert seen["tenth"].startswith("FloatingPointError: step 9: loss nan, gradient norm nan")


def test_a_run_of_ranks_on_less_than_a_batch_is_that_of_one_and_resumes_as_one(trained, tmp_path):
    dataset = few_images()
    alone = one()
    fit(alone, dataset, tmp_path / "run", steps=4, **FIT)
    for seen in trained.seen:
        close(seen["fit"], weights_of(alone), 2e-5)
    resumed = one(2)
    with pytest.warns(UserWarning, match=r"not bit for bit .*ranks was 2 and is 1"):
        fit(resumed, dataset, trained.out / "run", steps=6, resume=True, **FIT)
    fit(alone, dataset, tmp_path / "run", steps=6, resume=True, **FIT)
    close(weights_of(resumed), weights_of(alone), 2e-5)
    assert (resumed.step_count, resumed.example_count) == (6, 42)


def test_what_ends_one_rank_ends_all(trained):
    zero, one = trained.seen
    assert zero["full"] == "OSError: [Errno 28] No space left on device"
    assert one["full"] == "RankError: rank 0 failed: OSError: [Errno 28] No space left on device"
    assert zero["gone"] == "RankError: rank 1 failed: OSError: the disk is gone"
    assert one["gone"] == "OSError: the disk is gone"
    for seen in trained.seen:
        assert seen["recipes"] == "RankError: all ranks must train alike; flip differs: True, False"
    assert read_tensors(trained.out / "run" / STATE)  # whole, as it was before


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pieces_of_a_step_make_the_step(dropout, precision, tmp_path):
    options = {"precision": precision, "grad_clip": 1e9, "lr": 1e-3, "warmup": 0}
    runs = [Trainer(tiny_unet(dropout=dropout), accumulate=k, **options) for k in (1, 3, 50)]
    x0 = images(7, 1, 8, 8)
    losses = torch.stack([run.step(x0) for run in runs])
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    torch.testing.assert_close(losses, losses[:1].expand(3), rtol=tolerance, atol=0)
    for run in runs[1:]:
        for name, g in gradients(run).items():
            expected = gradients(runs[0])[name]
            atol = tolerance * max(expected.abs().max().item(), 1e-3)
            torch.testing.assert_close(g, expected, atol=atol, rtol=0, msg=name)
    runs[1].save(tmp_path)
    with pytest.warns(UserWarning, match=r"not bit for bit .*accumulate was 3 and is 1"):
        runs[0].load(tmp_path)
    with pytest.raises(ValueError, match="accumulate must be at least 1; got 0"):
        Trainer(tiny_unet(), accumulate=0)


def test_pieces_of_half_precision_weights_are_added_up_in_float32():
    """64 gradients of 2^-8 of a sum: in bfloat16 the small ones would be lost."""
    sums = []
    for k in (1, 64):
        run = Trainer(tiny_unet().bfloat16(), accumulate=k, precision="fp32", grad_clip=1e9)
        run.step(images(64, 1, 8, 8))
        sums.append(run.weights.masters["conv_out.bias"].grad.clone())
    exact = Trainer(tiny_unet(), precision="fp32", grad_clip=1e9)
    exact.step(images(64, 1, 8, 8))
    off = [(s - exact.weights.masters["conv_out.bias"].grad).abs().max() for s in sums]
    assert off[1] < 2 * off[0] + 1e-6


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ((0, 2, 4), r"one process takes a step whole: part \(0, 2, 4\) is not all of it"),
        ((0, 3, 3), r"part \(0, 3, 3\) is of 3 images; got 2"),
        ((1, 0, 2), "part must be start <= stop <= total"),
        ((0, 0, 0), "part must be start <= stop <= total"),
        ((0, 2), r"part must be \(start, stop, total\); got \(0, 2\)"),
        ("abc", "part must be"),
    ],
)
def test_a_part_that_is_none_is_named(part, message):
    run = Trainer(tiny_unet(), **RECIPE)
    with pytest.raises(ValueError, match=message):
        run.step(images(2, 1, 8, 8), part=part)
    assert run.step_count == 0


def test_one_process_may_say_that_its_part_is_all():
    x0, runs = images(2, 1, 8, 8), [Trainer(tiny_unet(), **RECIPE) for _ in range(2)]
    assert torch.equal(runs[0].step(x0, part=(0, 2, 2)), runs[1].step(x0))


# ---- processes that are stopped and killed -------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    np.savez(tmp_path / "data.npz", images=images(30, 1, 8, 8).numpy())
    for name in "ab":
        start(tmp_path / name)
    yield tmp_path
    for process in running:  # of a test that failed
        process.kill()
        process.communicate()
    running.clear()


running: list[subprocess.Popen] = []


def started(folder: Path, run: str, world: int, *arguments: str, only: int | None = None):
    """The ranks of a run of the command line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
                   "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # fmt: skip
    if world > 1:
        environment |= {"WORLD_SIZE": str(world), "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "fastddpm", *resume_command(folder / "data.npz", folder / run),
             "--timeout=10", *arguments],
            cwd=folder, env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (range(world) if only is None else (only,))
    ]  # fmt: skip
    running.extend(processes)
    return processes


def ended(processes: list[subprocess.Popen], code: int = 0) -> list[str]:
    """What each said on stderr when it ended as it should."""
    said = [process.communicate(timeout=900)[1] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), said
    return said


def until(condition, processes: list[subprocess.Popen], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert all(process.poll() is None for process in processes), ended(processes)
        assert time.monotonic() < deadline
        time.sleep(0.005)


def states(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [read_tensors(folder / run / STATE)[0] for run in "ab"]


def no_farther_apart(folder: Path, atol: float) -> None:
    """The averages of both runs."""
    a, b = (read_tensors(folder / run / WEIGHTS)[0] for run in "ab")
    for name in a:
        if "qkv.bias" not in name:  # see `close`
            torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=name)


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_ranks_and_pieces(folder):
    """Batches of 7 images, on 2 ranks, on 1, in 2 pieces, on 3: the run of one process."""
    slower = ("--lr=1e-3", "--batch-size=7", "--save-every=4")
    for run in "ab":
        Trainer(tiny_unet(dropout=0.1), lr=1e-3, warmup=10, ema_decay=0.9, precision="fp32").save(
            folder / run
        )
    ended(started(folder, "a", 1, *slower, "--steps=24"))
    for world, pieces, stop in ((2, 1, 8), (1, 1, 12), (2, 2, 18), (3, 1, 24)):
        said = ended(started(folder, "b", world, *slower, f"--steps={stop}",
                             f"--accumulate={pieces}"))  # fmt: skip
        assert steps_done(folder / "b") == stop
        assert stop == 8 or "not bit for bit" in said[0]
        assert all("warning" not in other for other in said[1:])  # rank 0 says it for all
    no_farther_apart(folder, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_killed_or_stopped_ends_the_run_and_nothing_is_lost(folder, rank, sent):
    """A stopped one is given up after a minute, the least that a collective is waited for."""
    ended(started(folder, "a", 2, "--steps=40"))
    processes = started(folder, "b", 2, "--steps=100000")
    until(lambda: steps_done(folder / "b") >= 10, processes)
    os.kill(processes[rank].pid, sent)
    try:
        said = ended([processes[1 - rank]], 2)[0]
    finally:
        processes[rank].kill()
        processes[rank].communicate()
    assert said.splitlines()[-1].startswith("fastddpm: error: "), said  # torch's store has its say
    assert "Traceback" not in said
    done = steps_done(folder / "b")
    ended(started(folder, "b", 2, f"--steps={max(done, 40)}"))
    if done <= 40:
        assert_same(*states(folder))


@pytest.mark.slow
@pytest.mark.parametrize("only", [0, 1])
def test_a_rank_whose_partner_never_starts_ends(folder, only):
    said = ended(started(folder, "b", 2, only=only), 2)[0]
    assert "Traceback" not in said
    assert ("is rank 0 there" if only else "rank 1 gave no sign of life for 10 s") in said
    assert steps_done(folder / "b") == 0


@pytest.mark.slow
def test_ranks_that_are_killed_twenty_times_are_the_uninterrupted_run(folder):
    """Both or one, at random moments: while they start, read, compute, wait for one another, and
    write."""
    options = ("--steps=250", "--save-every=1")
    ended(started(folder, "a", 2, *options))
    random = np.random.default_rng(1)
    for kill in range(20):
        processes = started(folder, "b", 2, *options)
        before = steps_done(folder / "b")
        until(lambda before=before: steps_done(folder / "b") > before, processes)
        time.sleep(float(random.random()) * 0.3)
        for process in (processes, processes[:1], processes[1:])[kill % 3]:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            _, said = process.communicate(timeout=120)
            assert process.returncode in (-signal.SIGKILL, 2), said
            assert "Traceback" not in said
        assert steps_done(folder / "b") < 250, "too few steps for so many kills"
    ended(started(folder, "b", 2, *options))
    assert_same(*states(folder))
    assert not list((folder / "b").rglob(".*"))
