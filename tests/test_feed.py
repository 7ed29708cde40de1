"""What feeds a run's steps: the right images, in order, read ahead, and the wait for them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from toy import images

from fastddpm.data import batch_indices
from fastddpm.data.arrays import ArrayDataset
from fastddpm.training.feed import AHEAD, Feed

CPU = torch.device("cpu")


def dataset(n: int = 11) -> ArrayDataset:
    return ArrayDataset(Path("x.npz"), "npz", images(n, 1, 4, 4).numpy())


def feed(data: ArrayDataset, batch_size: int, steps: range, **options) -> Feed:
    return Feed(data, batch_size, steps, seed=3, device=CPU, **options)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 5, 12, 30])
def test_the_ranks_parts_make_up_the_batches(world, batch_size):
    """Also of batches that no number of ranks divides, and of more images than there are."""
    data, steps = dataset(), range(2, 6)
    feeds = [feed(data, batch_size, steps, place=(rank, world)) for rank in range(world)]
    for step, parts in zip(steps, zip(*feeds, strict=True), strict=True):
        whole = data.images(batch_indices(11, batch_size, step, seed=3))
        stop = 0
        for part, of in zip(parts, feeds, strict=True):
            assert of.part[0] == stop
            stop, empty = of.part[1], of.part[0] == of.part[1]
            expected = whole[:1] if empty else whole[slice(*of.part[:2])]
            assert torch.equal(part, expected)
        assert stop == of.part[2] == batch_size


@pytest.mark.parametrize("steps", [range(0), range(1), range(5, 7), range(20)])
def test_each_step_is_fed_once(steps):
    data = dataset()
    got = list(feed(data, 2, steps))
    assert len(got) == len(steps)
    for step, x in zip(steps, got, strict=True):
        assert torch.equal(x, data.images(batch_indices(11, 2, step, seed=3)))


class Watched(ArrayDataset):
    """Lets `allowed` reads through, and says how many have begun."""

    def __init__(self):
        super().__init__(Path("x.npz"), "npz", images(11, 1, 4, 4).numpy())
        self.allowed, self.begun = threading.Semaphore(0), threading.Semaphore(0)

    def images(self, indices):
        self.begun.release()
        assert self.allowed.acquire(timeout=60)
        return super().images(indices)


def test_it_reads_so_far_ahead_and_no_farther():
    data = Watched()
    batches = iter(feed(data, 2, range(20)))
    for _ in range(1 + AHEAD):
        data.allowed.release()
    next(batches)  # asks for one more
    for _ in range(1 + AHEAD):
        assert data.begun.acquire(timeout=60)
    assert not data.begun.acquire(timeout=0.1)
    for _ in range(20):
        data.allowed.release()
    batches.close()  # what is not read yet is not read any more
    begun = AHEAD + 1
    while data.begun.acquire(timeout=0.1):
        begun += 1
    assert begun <= AHEAD + 2


def test_who_stops_early_leaves_no_thread():
    before = threading.active_count()
    batches = iter(feed(dataset(), 2, range(20)))
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before


def test_the_wait_is_that_of_the_steps():
    class Slow(ArrayDataset):
        def images(self, indices):
            time.sleep(0.03)
            return super().images(indices)

    slow = Slow(Path("x.npz"), "npz", images(11, 1, 4, 4).numpy())
    starved, fed = feed(slow, 2, range(10)), feed(dataset(), 2, range(10))
    began = time.perf_counter()
    assert len(list(starved)) == 10
    seconds = time.perf_counter() - began
    assert 0.29 < starved.waited <= seconds
    began = time.perf_counter()
    for _ in fed:
        time.sleep(0.03)
    assert fed.waited < 0.2 * (time.perf_counter() - began)


def test_what_reading_raises_is_raised():
    data = dataset()
    data.images = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(feed(data, 2, range(5)))
