"""What this machine can hold: asked before anything is read or made that a file alone asks for."""

from __future__ import annotations

import os


def machine_bytes() -> int | None:
    """The machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not POSIX
        return None


def check_fits(what: str, size: int) -> None:
    """ValueError if `what`, of `size` bytes, is larger than all memory of this machine."""
    memory = machine_bytes()
    if memory is not None and size > memory:
        raise ValueError(
            f"{what} takes {size / 2**30:,.1f} GiB; this machine has {memory / 2**30:,.1f} GiB"
        )
