"""How long calls take on the device that they run on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

Clock = Callable[[Callable, int], float]


class WallClock:
    """Seconds of some calls in a row, which leave the caches warm."""

    what = "wall clock, warm"

    def __call__(self, function: Callable, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return time.perf_counter() - start


class EventClock:
    """Seconds that the device takes for some calls, each after a write past its cache. That takes
    longer than the host needs to queue a call, so that the device does not wait for it.

    event: makes an event with record() and elapsed_time(other) in ms;  flush: queues the write;
    wait: until the device has done all that is queued"""

    what = "events on the device, its L2 cache cold"
    FLUSH = 1 << 29  # bytes: ten times an H100's L2 cache, some 0.2 ms

    def __init__(
        self, event: Callable[[], Any], flush: Callable[[], object], wait: Callable[[], object]
    ):
        self.event, self.flush, self.wait = event, flush, wait

    @classmethod
    def on(cls, device: torch.device) -> EventClock:
        scratch = torch.empty(cls.FLUSH, dtype=torch.uint8, device=device)
        return cls(
            lambda: torch.cuda.Event(enable_timing=True),
            scratch.zero_,
            lambda: torch.cuda.synchronize(device),
        )

    def __call__(self, function: Callable, calls: int) -> float:
        pairs = []
        for _ in range(calls):
            begin, end = self.event(), self.event()
            self.flush()
            begin.record()
            function()
            end.record()
            pairs.append((begin, end))
        self.wait()
        return sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3


Clock = Callable[[Callable, int], float]
