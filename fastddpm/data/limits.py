"""What reading may take: the memory of one thing and of all threads together. No reading."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator

import torch

from fastddpm.batching import free_bytes


def check_memory(needed: int) -> None:
    """ValueError when `needed` bytes are more than this process may still take."""
    free = free_bytes(torch.device("cpu"))
    if free is not None and needed > free:
        raise ValueError(f"it takes {needed:,} bytes of memory, and {free:,} are free")


_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc


class Budget:
    """Bytes that the threads of a process may hold together; who asks for more waits.

    One that asks for more than all there is gets it when nobody else holds any. What was much goes
    back to the system, since the allocator would keep some of it for each thread.
    """

    def __init__(self, total: int):
        self.total = total
        self._renew()
        if hasattr(os, "register_at_fork"):  # the child has none of the threads that hold some
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._held, self._given_back = 0, threading.Condition()

    @contextlib.contextmanager
    def take(self, size: int) -> Iterator[None]:
        """Hold `size` bytes meanwhile; ValueError when the machine has not so many."""
        if much := size > self.total // 16:  # /proc is not read for each small image
            check_memory(size)
        with self._given_back:
            self._given_back.wait_for(lambda: not self._held or self._held + size <= self.total)
            self._held += size
        try:
            yield
        finally:
            if much and _trim is not None:
                _trim(0)
            with self._given_back:
                self._held -= size
                self._given_back.notify_all()
