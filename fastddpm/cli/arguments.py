"""What the commands' arguments have in common: their types, and the options of all that compute."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch

from fastddpm import ranks


def machine() -> argparse.ArgumentParser:
    """Options of every command that computes."""
    p = argparse.ArgumentParser(add_help=False)
    p.add_argument(
        "--device", type=device, default=device(None), help="cpu or cuda (default: cuda if there)"
    )
    p.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    return p


def timeout(add: Callable[..., Any]) -> None:
    """The option of commands that torchrun may start."""
    add(
        "--timeout",
        type=float,
        help="seconds after which a rank that gives no sign of life is given up "
        f"(default: FASTDDPM_TIMEOUT, or {ranks.TIMEOUT:g})",
    )


def device(text: str | None) -> torch.device:
    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; give cpu or cuda")
    cards = torch.cuda.device_count()
    if found.type == "cuda" and not cards:
        raise argparse.ArgumentTypeError("no CUDA device can be used here; give cpu")
    if found.type == "cuda" and (found.index or 0) >= cards:
        raise argparse.ArgumentTypeError(f"{text!r}: this machine has {cards}, numbered from 0")
    return found


def path(text: str) -> str:
    """Not "", which Path takes for the current folder."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path")
    return text


def size(text: str) -> int | tuple[int, int]:
    """64, or (H, W) of 64x48 or 64,48."""
    try:
        sizes = [int(part) for part in text.lower().replace("x", ",").split(",")]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 2):
        raise argparse.ArgumentTypeError(
            f"{text!r}: give an integer, or height x width as 64x48 or 64,48"
        )
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])


def integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give an integer, or several with commas"
        ) from None


def visited(text: str) -> int | str:
    """A number of steps, or a word for some, which the schedule reads."""
    try:
        return int(text)
    except ValueError:
        return text


def alone(what: str) -> None:
    """ValueError where several ranks were launched of what is one process."""
    if (world := os.environ.get("WORLD_SIZE") or "1") != "1":
        raise ValueError(
            f"{what} is one process, and WORLD_SIZE is {world}: start it without torchrun, or "
            "unset WORLD_SIZE"
        )
