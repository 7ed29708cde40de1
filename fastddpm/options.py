"""Options as numbers of Python's: NumPy's are converted once, and nonsense is an error by name."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import numpy as np

INTEGER_END = 2**63


def shown(value: Any) -> str:
    """repr(value) for a message: one line, and not long."""
    line = " ".join(repr(value).split())
    return line if len(line) <= 200 else line[:197] + "..."


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise the ValueError that lists what `name` may be."""
    if not isinstance(value, str) or value not in choices:  # an array may be equal to one
        allowed = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {allowed}; got {shown(value)}")


def check_count(name: str, value: int, largest: int | None = None) -> int:
    """`value` as an int, if it is an integer in 1 .. largest; else the ValueError that says so."""
    integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not integer or value < 1 or (largest is not None and value > largest):
        allowed = "of at least 1" if largest is None else f"in 1 .. {largest}"
        raise ValueError(f"{name} must be an integer {allowed}; got {shown(value)}")
    return int(value)


def check_number(name: str, value: Any, ok: Callable[[float], bool], allowed: str) -> float:
    """A float of Python's or NumPy's number; ValueError for all else, NaN and True too."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        if number and ok(float(value)):
            return float(value)
    except OverflowError:
        pass
    raise ValueError(f"{name} must be {allowed}; got {shown(value)}")


def check_integer(name: str, value: Any, least: int) -> int:
    """An int of Python's or NumPy's integer in least .. 2^63 - 1; else the ValueError that says
    so.
    """
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer; got {shown(value)}")
    if not least <= value < INTEGER_END:
        allowed = f"at least {least}" if value < least else f"in {least} .. 2^63 - 1"
        raise ValueError(f"{name} must be {allowed}; got {shown(value)}")
    return int(value)


def check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False; got {shown(value)}")
    return bool(value)
