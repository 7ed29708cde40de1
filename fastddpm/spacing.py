"""Which steps a shorter chain visits: ours, diffusers' and OpenAI's rules, by their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch

from fastddpm.options import check_choice, check_count, shown

Spacing = Literal["strided", "leading", "trailing", "linspace"]
DDIM = "ddim"


def chosen_steps(T: int, steps: int | str | Sequence[int], spacing: Spacing) -> np.ndarray:
    """(K,) int64, the steps of 0 .. T - 1 that `steps` and `spacing` speak of, rising; see
    Schedule.respace. ValueError names what is no such choice.
    """
    check_choice("spacing", spacing, get_args(Spacing))
    if isinstance(steps, (int, np.integer)) or not _several(steps):
        return spaced(T, check_count("steps", steps, T), spacing)  # type: ignore[arg-type]
    if spacing != "strided":
        raise ValueError(
            f"spacing={spacing!r} says how a number of steps is spread; got steps {shown(steps)}"
        )
    return _of_words(T, steps) if isinstance(steps, str) else _listed(T, steps)


def _several(steps: Any) -> bool:
    if isinstance(steps, (np.ndarray, torch.Tensor)):
        return steps.ndim > 0
    return isinstance(steps, (str, Sequence)) and not isinstance(steps, bytes)


def spaced(T: int, steps: int, spacing: Spacing) -> np.ndarray:
    """(steps,) int64, so many of 0 .. T - 1 by a rule of spacing, rising. Those of "trailing" are
    rounded as diffusers counts them off, T / steps at a time in floating point, but for the step
    -1 that it ends with for some numbers."""
    if spacing == "leading":
        return np.arange(steps) * (T // steps)
    if spacing == "trailing":
        return (np.round(np.arange(T, 0, -T / steps)[:steps]).astype(np.int64) - 1)[::-1]
    if spacing == "linspace":
        return np.round(np.linspace(0, T - 1, steps)).astype(np.int64)
    # A single step has to be the last: only there is x_t pure noise.
    return np.round(np.linspace(T - 1, 0, steps)).astype(np.int64)[::-1]


def _of_words(T: int, words: str) -> np.ndarray:
    """improved-diffusion's space_timesteps: "ddimN", or a number for each of equal sections."""
    parts = words.removeprefix(DDIM).split(",")
    if not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise ValueError(
            "steps as a word must be 'ddimN' or numbers for sections of the chain like '10,15,20'; "
            f"got {shown(words)}"
        )
    counts = [int(part) for part in parts]
    if words.startswith(DDIM):
        return _of_integer_stride(T, counts, words)
    kept: list[int] = []
    size, extra = divmod(T, len(counts))
    start = 0
    for i, count in enumerate(counts):
        length = size + (i < extra)
        if not 0 <= count <= length:
            raise ValueError(
                f"steps {shown(words)}: section {i + 1} is of {length} of the {T} steps, so that "
                f"its number must lie in 0 .. {length}; got {count}"
            )
        stride, at = (length - 1) / max(count - 1, 1), 0.0
        for _ in range(count):  # summed as theirs is, whose halves it must round alike
            kept.append(start + round(at))
            at += stride
        start += length
    if not kept:
        raise ValueError(f"steps {shown(words)}: at least one section must have a step")
    return np.array(kept, dtype=np.int64)


def _of_integer_stride(T: int, counts: list[int], words: str) -> np.ndarray:
    """0, s, 2s, ... for the smallest stride s that gives the number of `words`."""
    if len(counts) == 1 and 2 <= counts[0] <= T:  # a stride of all steps is none
        kept = np.arange(0, T, -(-T // counts[0]))
        if len(kept) == counts[0]:
            return kept
    raise ValueError(f"no integer stride through {T} steps gives those of {shown(words)}")


def _listed(T: int, steps: Any) -> np.ndarray:
    """A sequence of steps, rising or falling, as they rise."""
    if isinstance(steps, torch.Tensor):
        steps = steps.detach().cpu().numpy()
    try:
        listed = np.asarray(steps)
    except (TypeError, ValueError) as error:  # ragged
        raise ValueError(f"steps must be a 1-D sequence of integers: {error}") from None
    if listed.dtype.kind not in "iu" or listed.ndim != 1:
        raise ValueError(f"steps must be a 1-D sequence of integers; got {shown(steps)}")
    rising = listed[::-1] if len(listed) > 1 and listed[1] < listed[0] else listed
    inside = len(rising) and rising[0] >= 0 and rising[-1] < T
    if not inside or np.any(rising[1:] <= rising[:-1]):
        raise ValueError(
            f"steps must rise or fall within 0 .. {T - 1}, each given once; got {shown(steps)}"
        )
    return rising.astype(np.int64)
