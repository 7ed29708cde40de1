"""Which ranks of a run are alive: beside its work each gives signs of life at a place where all can
look. Nothing of what they do."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

POLL = 0.25  # seconds between two looks at the others, at most
WORDS = "words"  # the store's key of them
LAST_WORDS = 2.0  # seconds that these may take, where a rank ends or is missed


class RankError(RuntimeError):
    """Another rank failed, is gone, or was called with something else."""


class Sign(NamedTuple):
    """What a rank says of itself."""

    number: int = 0  # of this sign: a living rank's grows
    met: int = 0  # meetings that it has come to
    left: int = 0  # 1 after its last word


class Presence:
    """This rank among `world`: a context in which the others see that it lives, and can be met.

    The ranks look for one another at MASTER_ADDR and MASTER_PORT of the environment: at a store of
    torch's that torchrun holds, or else rank 0. timeout: seconds that a rank may be silent; one
    that works gives signs all the same, so its work may take any time. RankError names who is gone.
    """

    def __init__(self, rank: int, world: int, timeout: float):
        self.rank, self.world, self.timeout = rank, world, timeout
        self._where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self._changed = threading.Condition()  # guards what follows
        self._met, self._waiting, self._leaving = 0, False, False
        self._signs: dict[int, Sign] = {}
        self._rounds = 0  # of looks at the others: it grows while the store answers
        self._failure = ""
        self._words, self._heard = "", ""  # to be said; the first that a rank said

    def __enter__(self) -> Presence:
        self._own = self.store(first=True)
        # A store that hangs, since who holds it was stopped, holds up this thread and not the rank.
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()
        try:
            self.meet()
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None:
                self.meet()  # so that rank 0, which may hold the store, is not the first to go
        except RankError:
            pass  # all there was to do is done
        finally:
            with self._changed:
                self._leaving = True
                self._changed.notify_all()
            self._thread.join(2)

    def store(self, *, first: bool = False) -> Any:
        """A new connection to the meeting place."""
        by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        host, port = self._where.rsplit(":", 1)
        try:
            store = dist.TCPStore(
                host,
                int(port),
                is_master=first and self.rank == 0 and not by_torchrun,
                wait_for_workers=False,
                timeout=timedelta(seconds=self.timeout),
            )
        except (RuntimeError, ValueError) as error:
            raise RankError(
                f"rank {self.rank} finds no meeting place of the ranks at {self._where} "
                f"({first_line(error)}): is rank 0 there?"
            ) from None
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"fastddpm/{attempt}", store)

    def meet(self) -> None:
        """Return once all ranks have called this as often as this one has."""
        with self._changed:
            self._met, self._waiting = self._met + 1, True
            self._changed.notify_all()
            try:
                self._wait()
            finally:
                self._waiting = False

    def say(self, words: str) -> None:
        """What ends this rank, for those who will miss it."""
        with self._changed:
            self._words = f"rank {self.rank} failed: {words}"
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._failure or not self._words, LAST_WORDS)

    def last_words(self) -> str:
        """What the first rank that ended said of itself; "" where none said anything."""
        with self._changed:
            self._waiting = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._failure or self._heard, LAST_WORDS)
            self._waiting = False
            return self._heard

    def _wait(self) -> None:
        absent = [rank for rank in range(self.world) if rank != self.rank]
        silent, unanswered = dict.fromkeys(absent, 0.0), 0.0
        before, rounds, signs = time.monotonic(), self._rounds, dict(self._signs)
        while True:
            absent = [r for r in absent if self._signs.get(r, Sign()).met < self._met]
            if not absent:
                return
            if self._failure:
                raise RankError(f"the meeting place of the ranks is gone ({self._failure})")
            if left := [rank for rank in absent if self._signs.get(rank, Sign()).left]:
                raise RankError(
                    self._heard or f"{_named(left)} ended without what the others wait for"
                )
            self._changed.wait(POLL)
            # A time in which this process was stopped itself does not count.
            now = time.monotonic()
            passed, before = min(now - before, 2 * POLL), now
            unanswered = unanswered + passed if self._rounds == rounds else 0.0
            for rank in absent:
                same = self._signs.get(rank) == signs.get(rank)
                silent[rank] = silent[rank] + passed if same else 0.0
            rounds, signs = self._rounds, dict(self._signs)
            if unanswered > self.timeout:
                raise RankError(
                    f"the meeting place of the ranks at {self._where} has not answered for "
                    f"{self.timeout:g} s: who holds it (torchrun, or rank 0) is stopped or cut off"
                )
            if gone := [rank for rank in absent if silent[rank] > self.timeout]:
                raise RankError(
                    f"{_named(gone)} gave no sign of life for {self.timeout:g} s: stopped, gone, "
                    "or never started; FASTDDPM_TIMEOUT, or --timeout, is how many seconds to wait"
                )

    def _live(self) -> None:
        """The thread: give a sign, and while this rank waits look at the others', until it
        leaves."""
        sign, pause = Sign(), POLL
        while not sign.left:
            with self._changed:
                came = self._met > sign.met
                sign = Sign(sign.number + 1, self._met, int(self._leaving))
                look, words = self._waiting, self._words
            signs: dict[int, Sign] = {}
            heard = ""
            try:
                if words:  # before the sign that it left
                    self._own.compare_set(WORDS, "", words)
                self._own.set(f"rank/{self.rank}", " ".join(map(str, sign)))
                if look:
                    signs = self._look()
                    heard = self._own.get(WORDS).decode() if self._own.check([WORDS]) else ""
            except (RuntimeError, ValueError) as error:
                with self._changed:
                    self._failure = first_line(error)
                    self._changed.notify_all()
                return
            with self._changed:
                self._signs.update(signs)
                self._heard = self._heard or heard
                if words:
                    self._words = ""
                self._rounds += 1
                self._changed.notify_all()
                if self._waiting:
                    pause = 0.005 if came else min(1.5 * pause, POLL)
                else:
                    pause = min(1.0, self.timeout / 10)
                if self._met == sign.met and not self._leaving and not self._words:
                    self._changed.wait(min(pause, self.timeout / 10))

    def _look(self) -> dict[int, Sign]:
        keys = {rank: f"rank/{rank}" for rank in range(self.world) if rank != self.rank}
        return {
            rank: Sign(*map(int, self._own.get(key).split()))
            for rank, key in keys.items()
            if self._own.check([key])
        }


def _named(ranks: Iterable[int]) -> str:
    several = list(map(str, ranks))
    return f"rank{'s' * (len(several) > 1)} {', '.join(several)}"


def first_line(error: BaseException) -> str:
    """What an error says in its first line, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
