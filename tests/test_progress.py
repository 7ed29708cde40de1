"""Progress bars: what becomes of stderr stops no run."""

from __future__ import annotations

import errno
import io
import sys

import pytest
import torch
from toy import SCHEDULE, images, tiny_unet, wave

import fastddpm
from fastddpm import Diffusion
from fastddpm.progress import tqdm


class Failing(io.StringIO):
    """Fails at write number `at`, as a full disk or a pipe without a reader does."""

    def __init__(self, error: Exception, at: int):
        super().__init__()
        self.error, self.left = error, at

    def write(self, text):
        self.left -= 1
        if self.left <= 0:
            raise self.error
        return super().write(text)


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS = {
    "none": lambda: None,
    "closed": closed,
    "full": lambda: Failing(OSError(errno.ENOSPC, "No space left on device"), 1),
    "full later": lambda: Failing(OSError(errno.ENOSPC, "No space left on device"), 3),
    "broken pipe": lambda: Failing(BrokenPipeError(errno.EPIPE, "Broken pipe"), 2),
    "terminal gone": lambda: Failing(OSError(errno.EIO, "Input/output error"), 2),
    "other signs": lambda: Failing(UnicodeEncodeError("ascii", "█", 0, 1, "not in range"), 1),
}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_a_stderr_that_fails_stops_nothing(stream, monkeypatch):
    model, x0 = tiny_unet(), images(2, 1, 8, 8)
    options = {"diffusion": Diffusion(SCHEDULE), "shape": (1, 8, 8)}
    expected = fastddpm.sample(wave, 2, progress=False, **options)
    bits = fastddpm.bits_per_dim(model, x0, steps=2, progress=False).total
    monkeypatch.setattr(sys, "stderr", stream())
    assert torch.equal(fastddpm.sample(wave, 2, **options), expected)
    assert torch.equal(fastddpm.bits_per_dim(model, x0, steps=2).total, bits)
    assert sum(tqdm(range(5), mininterval=0)) == 10


def test_a_bar_is_shown_where_it_can_be(monkeypatch):
    stream = Failing(OSError("never"), 10**9)
    monkeypatch.setattr(sys, "stderr", stream)
    assert len(list(tqdm(range(3), desc="three"))) == 3
    assert "three: 100%" in stream.getvalue()
    assert "3/3" in stream.getvalue()
