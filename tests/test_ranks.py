"""Several processes draw one set: the same images as one process, and nobody waits for a rank that
failed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from on_ranks import draw, given, measured

import fastddpm
from fastddpm import ranks
from fastddpm.presence import Presence, RankError, Sign

HERE = Path(__file__).parent


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def by_torchrun(ranks: int, *arguments: object) -> None:
    """on_ranks.py in so many processes; a card each, or on the CPU."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc-per-node={ranks}", str(HERE / "on_ranks.py"), *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=DEVICES)
def kind(request) -> str:
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("there are not two cards, one for each rank")
    return request.param


@pytest.fixture(scope="module")
def seen(tmp_path_factory, kind) -> list[dict]:
    """What each of two ranks saw in on_ranks.py."""
    out = tmp_path_factory.mktemp("ranks")
    by_torchrun(2, "sample", out, kind)
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture
def drawn(kind):
    """What one process draws there."""
    return lambda *arguments, **options: draw(*arguments, device=kind, **options).cpu()


def test_two_ranks_draw_the_set_of_one_and_both_have_it(seen, drawn):
    expected = drawn(5, first_index=2)
    for rank in seen:
        assert rank["world"] == 2
        assert torch.equal(rank["images"], expected)
        assert torch.equal(rank["one image"], drawn(1))
        assert rank["closed"]


def test_each_rank_draws_its_own_range(seen):
    """2 and 3 of 5 images, in batches of 2, 12 steps each."""
    assert [rank["sizes"] for rank in seen] == [[2] * 12, [2] * 12 + [1] * 12]


def test_what_is_given_for_each_image_is_cut_with_the_ranks(seen, kind):
    expected = given(torch.device(kind))
    for rank in seen:
        assert torch.equal(rank["given"], expected)


def test_ranks_draw_the_noise_of_a_generator_as_one_process_does(seen, drawn):
    one = torch.Generator().manual_seed(5)
    each = [torch.Generator().manual_seed(k) for k in range(5)]
    expected = {
        "generator": drawn(5, generator=one),
        "none to draw": drawn(1, generator=one),
        "generators": drawn(5, generator=each),
    }
    for rank in seen:
        for name, images in expected.items():
            assert torch.equal(rank[name], images)
        assert torch.equal(rank["state"], one.get_state())
        for mine, theirs in zip(rank["states"], each, strict=True):
            assert torch.equal(mine, theirs.get_state())


def test_ranks_that_are_given_other_things_are_told(seen):
    for name, fact in {"x_T": "x_T", "generator state": "generator"}.items():
        for rank in seen:
            assert rank[name].startswith(f"RankError: all ranks must draw the same set; {fact} ")
    assert seen[1]["on_step"] == "ZeroDivisionError: enough was seen"
    assert seen[0]["on_step"] == "RankError: rank 1 failed: ZeroDivisionError: enough was seen"


def test_ranks_share_a_bound_and_its_folder(seen, kind):
    """The same numbers as one process finds, to the bit where the engine's are."""
    for rank in seen:
        assert rank["bound of others"].endswith("images differs: 40, 39")
        assert rank["bound again"] == rank["bound"] == seen[0]["bound"]
        for name, options in {"bound": {}, "bound of some terms": {"terms": 6}}.items():
            if kind == "cpu":
                assert rank[name] == measured(**options)
            else:
                total = json.loads(rank[name])["total"]
                assert total == pytest.approx(json.loads(measured(**options))["total"], abs=1e-4)


def test_a_rank_can_draw_alone(seen, drawn):
    for count, rank in enumerate(seen, start=1):
        assert torch.equal(rank["alone"], drawn(count))


def test_a_rank_that_fails_stops_all_and_the_group_lives_on(seen, drawn):
    assert (
        seen[0]["failing"] == "RankError: rank 1 failed: ZeroDivisionError: rank 1 has had enough"
    )
    assert seen[1]["failing"] == "ZeroDivisionError: rank 1 has had enough"
    assert seen[0]["bad"].startswith("RankError: rank 1 failed: ValueError: steps must be")
    assert seen[1]["bad"].startswith("ValueError: steps must be")
    for rank in seen:
        assert torch.equal(rank["still there"], drawn(3))


def test_ranks_that_disagree_are_told(seen):
    message = "RankError: all ranks must draw the same set; seed differs: 0, 1"
    assert [rank["seeds"] for rank in seen] == [message, message]


@pytest.mark.parametrize(("n", "world"), [(0, 3), (1, 3), (7, 3), (50_000, 7)])
def test_shares_cover_all_once_and_evenly(n, world):
    shares = [ranks.share(n, rank, world) for rank in range(world)]
    assert [i for start, stop in shares for i in range(start, stop)] == list(range(n))
    sizes = [stop - start for start, stop in shares]
    assert max(sizes) - min(sizes) <= 1


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with ranks.launched(torch.device("cpu")) as device:
        assert device == torch.device("cpu")
        assert ranks.place() == (0, 1)
        ranks.agree(seed=1)
        assert ranks.from_first("x") == "x"
    with pytest.raises(ZeroDivisionError), ranks.together():
        raise ZeroDivisionError


# ---- who is there, and who is not ----------------------------------------------------------------

STARTED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
           "FASTDDPM_TIMEOUT", "TORCHELASTIC_USE_AGENT_STORE")  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    for name in STARTED:
        monkeypatch.delenv(name, raising=False)

    def set_all(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_all


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": 2}, "WORLD_SIZE is 2 in the environment, but not RANK, MASTER_ADDR, MAS"),
        ({"WORLD_SIZE": 4, "RANK": 0}, "but not MASTER_ADDR, MASTER_PORT: start the ranks with to"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many' in the environment; it must be an integer"),
        ({"WORLD_SIZE": 0}, "WORLD_SIZE is '0' in the environment; it must be"),
        ({"WORLD_SIZE": -2}, "WORLD_SIZE is '-2' in the environment; it must be"),
        ({"WORLD_SIZE": 2, "RANK": 2, "MASTER_ADDR": "x", "MASTER_PORT": 1}, "RANK is 2 in the e"),
        ({"WORLD_SIZE": 2, "RANK": "a", "MASTER_ADDR": "x", "MASTER_PORT": 1}, "RANK is 'a' in t"),
        ({"FASTDDPM_TIMEOUT": "soon"}, "FASTDDPM_TIMEOUT must be seconds, above 0"),
        ({"FASTDDPM_TIMEOUT": 0}, "FASTDDPM_TIMEOUT must be seconds, above 0"),
        ({"FASTDDPM_TIMEOUT": "inf"}, "FASTDDPM_TIMEOUT must be seconds, above 0"),
    ],
)  # fmt: skip
def test_a_stray_variable_is_an_error_at_once(environment, variables, message):
    environment(**variables)
    with pytest.raises(ValueError, match=message), ranks.launched(torch.device("cpu")):
        raise AssertionError("it was launched")


def test_a_stray_variable_is_nothing_to_the_library(environment):
    environment(WORLD_SIZE=2)
    assert torch.equal(draw(3), draw(3, distributed=False))


def test_the_timeout_that_is_given_is_the_one(environment):
    environment(FASTDDPM_TIMEOUT=7)
    assert ranks._seconds(None) == 7
    assert ranks._seconds(3.5) == 3.5
    with pytest.raises(ValueError, match=r"^timeout must be seconds"):
        ranks._seconds(-1)
    environment(FASTDDPM_TIMEOUT="")
    assert ranks._seconds(None) == ranks.TIMEOUT


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def place(environment):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())


def together(*ranks_of_run) -> list:
    """What each function of a Presence returns or raises, each in a thread as if in a process."""
    results: list = [None] * len(ranks_of_run)

    def run(rank, work):
        try:
            results[rank] = work(Presence(rank, len(ranks_of_run), 1.5))
        except Exception as error:
            results[rank] = error

    threads = [
        threading.Thread(target=run, args=(rank, work))
        for rank, work in enumerate(ranks_of_run)
        if work is not None
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def meets(before: float, *, times: int = 2):
    def work(presence):
        with presence:
            for _ in range(times):
                time.sleep(before)
                presence.meet()
        return "done"

    return work


def test_long_work_is_no_silence(place):
    """More than the timeout between two meetings."""
    assert together(meets(0), meets(2.0), meets(0.1)) == ["done"] * 3


@pytest.mark.parametrize("absent", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_never_comes_is_named(place, absent):
    works = [None if rank == absent else meets(0) for rank in range(3)]
    for error in filter(None, together(*works)):
        assert isinstance(error, RankError)
        said = "is rank 0 there" if absent == 0 else "rank 1 gave no sign of life for 1.5 s"
        assert said in str(error)


def test_a_rank_that_falls_silent_is_named(place):
    over = threading.Event()

    def silent(presence):
        with presence:
            presence._own = SimpleNamespace(set=lambda *_: over.wait(60), check=lambda _: False)
            over.wait(60)

    def waits(presence):
        try:
            return meets(0)(presence)
        finally:
            over.set()

    assert "rank 1 gave no sign of life for 1.5 s" in str(together(waits, silent)[0])


def test_a_rank_that_leaves_early_is_named_at_once(place):
    def leaves(presence):
        with presence:
            raise KeyboardInterrupt

    def caught(presence):
        with contextlib.suppress(KeyboardInterrupt):
            leaves(presence)

    started = time.monotonic()
    results = together(meets(0), caught)
    assert "rank 1 ended without what the others wait for" in str(results[0])
    assert time.monotonic() - started < 0.9 + 2


def test_who_was_stopped_itself_blames_nobody(place, monkeypatch):
    """A clock that jumps, as over SIGSTOP and SIGCONT of all ranks."""
    clock = time.monotonic

    def stopped(presence):
        with presence:
            monkeypatch.setattr(time, "monotonic", lambda: clock() + 1000)
            presence.meet()
        return "done"

    assert together(stopped, meets(0.4, times=1)) == ["done", "done"]


def test_signs_are_read_as_they_are_written():
    assert Sign(*map(int, b"7 2 0".split())) == Sign(7, 2, 0)


# ---- processes that are stopped and killed -------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("sent", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_is_stopped_or_killed_ends_the_other(tmp_path, rank, sent):
    processes = _two_ranks(tmp_path, "-n24", "--batch-size=2", "--steps=50")
    while not list((tmp_path / "set").glob("*.npz")):
        time.sleep(0.01)
        assert all(p.poll() is None for p in processes)
    os.kill(processes[rank].pid, sent)
    other = processes[1 - rank]
    try:
        _, err = other.communicate(timeout=240)
    finally:
        processes[rank].kill()
        processes[rank].communicate()
    assert other.returncode == 2
    assert "fastddpm: error: " in err
    assert "Traceback" not in err
    named = f"rank {rank} gave no sign of life for 10 s"
    assert named in err or (rank == 0 and "the meeting place of the ranks" in err)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_partner_never_starts_ends(tmp_path, rank):
    process = _two_ranks(tmp_path, only=rank)[0]
    _, err = process.communicate(timeout=240)
    assert process.returncode == 2
    assert "Traceback" not in err
    assert ("is rank 0 there" if rank else "rank 1 gave no sign of life for 10 s") in err


@pytest.mark.slow
def test_two_ranks_without_torchrun_draw_a_set(tmp_path):
    for process in _two_ranks(tmp_path, "-n8", "--steps=5"):
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    assert len(list((tmp_path / "set").glob("*.npz"))) == 4


def _two_ranks(tmp_path: Path, *arguments: str, only: int | None = None) -> list[subprocess.Popen]:
    fastddpm.UNet(channels=32, image_size=16).save_pretrained(tmp_path / "model")
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-m", "fastddpm.cli", "sample", "--model", tmp_path / "model",
             "--out", tmp_path / "set", "--shard-size=2", "--quiet", "--timeout=10", *arguments],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in ((0, 1) if only is None else (only,))
    ]  # fmt: skip
