"""Several processes draw one set: the same images as one process, and nobody waits for a rank that
failed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from on_ranks import draw

from fastddpm import ranks

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    """What each of two ranks saw in on_ranks.py."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    out = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(HERE / "on_ranks.py"), str(out)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_ranks_draw_the_set_of_one_and_both_have_it(seen):
    expected = draw(5, first_index=2)
    for rank in seen:
        assert rank["world"] == 2
        assert torch.equal(rank["images"], expected)
        assert torch.equal(rank["one image"], draw(1))
        assert rank["closed"]


def test_each_rank_draws_its_own_range(seen):
    """2 and 3 of 5 images, in batches of 2, 12 steps each."""
    assert [rank["sizes"] for rank in seen] == [[2] * 12, [2] * 12 + [1] * 12]


def test_a_rank_can_draw_alone(seen):
    for count, rank in enumerate(seen, start=1):
        assert torch.equal(rank["alone"], draw(count))


def test_a_rank_that_fails_stops_all_and_the_group_lives_on(seen):
    assert (
        seen[0]["failing"] == "RankError: rank 1 failed: ZeroDivisionError: rank 1 has had enough"
    )
    assert seen[1]["failing"] == "ZeroDivisionError: rank 1 has had enough"
    assert seen[0]["bad"].startswith("RankError: rank 1 failed: ValueError: steps must be")
    assert seen[1]["bad"].startswith("ValueError: steps must be")
    for rank in seen:
        assert torch.equal(rank["still there"], draw(3))


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
