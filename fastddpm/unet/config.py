"""The options of a UNet: each has a type and a range, and becomes plain Python, fit for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from fastddpm.schedule import check_number

# Beyond these lies a slip or a damaged file; each leaves much room above any network of the kind.
MAX_CHANNELS = 2**16
MAX_IMAGE_SIZE = 2**14
MAX_LEVELS = 10
MAX_RES_BLOCKS = 32
MAX_VALUES = 64  # of a sequence
MAX_CLASSES = 2**24
_LARGEST = {
    "in_channels": MAX_CHANNELS,
    "out_channels": MAX_CHANNELS,
    "channels": MAX_CHANNELS,
    "num_groups": MAX_CHANNELS,
    "head_dim": MAX_CHANNELS,
    "num_heads": MAX_CHANNELS,
    "num_classes": MAX_CLASSES,
    "channel_mult": MAX_CHANNELS,
    "image_size": MAX_IMAGE_SIZE,
    "num_res_blocks": MAX_RES_BLOCKS,
}
MIN_EPS = 1e-12  # of a norm: far below, float32 takes a constant channel to 0 / 0


def check_config(config: dict[str, Any], *, outputs: int) -> dict[str, Any]:
    """The options of a UNet by name, checked; NumPy's numbers and any sequences as Python's.

    out_channels of None means in_channels times `outputs`. Raises the ValueError that names the
    first option that cannot be, and what is allowed.
    """
    c = dict(config)
    for name in ("in_channels", "out_channels", "channels", "num_res_blocks", "num_groups"):
        if name == "out_channels" and c[name] is None:
            c[name] = c["in_channels"] * outputs
        c[name] = _positive(name, c[name])
    c["channel_mult"] = _all_positive("channel_mult", c["channel_mult"])
    size = c["image_size"]
    c["image_size"] = _all_positive("image_size", [size, size] if _is_integer(size) else size)
    for name in ("head_dim", "num_heads", "num_classes"):
        if c[name] is not None:
            c[name] = _positive(name, c[name])
    mult, size = c["channel_mult"], c["image_size"]
    if len(mult) > MAX_LEVELS:
        raise ValueError(f"channel_mult must have at most {MAX_LEVELS} levels; got {len(mult)}")
    if len(size) != 2:
        raise ValueError(f"image_size must be an integer or (H, W); got {size!r}")
    if any(s % 2 ** (len(mult) - 1) for s in size):
        raise ValueError(
            f"image_size must be a multiple of {2 ** (len(mult) - 1)} "
            f"for {len(mult)} levels; got {size!r}"
        )
    levels = _sequence("attention_levels", c["attention_levels"])
    if not all(_is_integer(level) and 0 <= level < len(mult) for level in levels):
        raise ValueError(f"attention_levels must lie in 0 .. {len(mult) - 1}; got {levels!r}")
    c["attention_levels"] = sorted({int(level) for level in levels})
    _check_widths(c)
    c["norm_eps"] = check_number("norm_eps", c["norm_eps"], MIN_EPS, 1)
    dropout = c["dropout"]
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1); got {dropout!r}")
    c["dropout"] = float(dropout)
    if not _is_integer(c["downsample_padding"]) or c["downsample_padding"] not in (0, 1):
        raise ValueError(f"downsample_padding must be 0 or 1; got {c['downsample_padding']!r}")
    c["downsample_padding"] = int(c["downsample_padding"])
    for name in ("flip_sin_to_cos", "scale_shift_norm", "resblock_updown"):
        if not isinstance(c[name], (bool, np.bool_)):
            raise ValueError(f"{name} must be true or false; got {c[name]!r}")
        c[name] = bool(c[name])
    c["freq_shift"] = check_freq_shift(c["freq_shift"], c["channels"])
    return c


def check_freq_shift(freq_shift: float, dim: int) -> float:
    """`freq_shift` as a plain number, if the frequencies of `dim` sinusoids exist: the exponents
    are i / (dim/2 - freq_shift), i < dim/2.
    """
    if not _is_number(freq_shift):
        raise ValueError(f"freq_shift must be a number; got {freq_shift!r}")
    if not freq_shift < dim // 2:
        raise ValueError(
            f"freq_shift must be below {dim // 2}, half of {dim} channels; got {freq_shift!r} "
            f"(channels must be at least {2 * max(1, math.floor(freq_shift) + 1)} for it)"
        )
    return int(freq_shift) if _is_integer(freq_shift) else float(freq_shift)


def fewest_parameters(config: dict[str, Any]) -> int:
    """A count that the UNet of a checked config is sure to exceed: its second convolutions, its
    ends and its embeddings.
    """
    c = config["channels"]
    widths = [c * m for m in config["channel_mult"]]
    blocks = 2 * config["num_res_blocks"] + 1
    ends = 9 * c * (config["in_channels"] + config["out_channels"])
    labels = 4 * c * (config["num_classes"] or 0)
    convs = 9 * (blocks * sum(w * w for w in widths) + 2 * widths[-1] ** 2)
    return convs + ends + 20 * c * c + labels


def _check_widths(c: dict[str, Any]) -> None:
    widths = [c["channels"] * m for m in c["channel_mult"]]
    if max(widths) > MAX_CHANNELS:
        raise ValueError(
            f"channels times channel_mult must be at most {MAX_CHANNELS}; got {max(widths)}"
        )
    if bad := [w for w in {c["channels"], *widths} if w % c["num_groups"]]:
        raise ValueError(
            f"num_groups must divide every width; {c['num_groups']} does not divide {bad[0]}"
        )
    if c["head_dim"] and c["num_heads"]:
        raise ValueError(
            f"head_dim and num_heads are two ways to say the same: give one of them; got "
            f"{c['head_dim']} and {c['num_heads']}"
        )
    attended = {widths[-1], *(widths[level] for level in c["attention_levels"])}
    for name in ("head_dim", "num_heads"):
        if c[name] and (bad := [w for w in attended if w % c[name]]):
            raise ValueError(
                f"{name} must divide every attention width; {c[name]} does not divide {bad[0]}"
            )


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if not _is_integer(value) and not isinstance(value, (float, np.floating)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _positive(name: str, value: Any, *, several: bool = False) -> int:
    what = "positive integers" if several else "a positive integer"
    if not _is_integer(value) or value < 1:
        raise ValueError(f"{name} must be {what}; got {value!r}")
    if value > _LARGEST[name]:
        raise ValueError(f"{name} must be at most {_LARGEST[name]}; got {value!r}")
    return int(value)


def _sequence(name: str, values: Any) -> list[Any]:
    several = isinstance(values, Iterable) and getattr(values, "ndim", 1) > 0
    if isinstance(values, (str, bytes, dict)) or not several:
        raise ValueError(f"{name} must be a sequence of integers; got {values!r}")
    values = list(values)
    if len(values) > MAX_VALUES:
        raise ValueError(f"{name} must be at most {MAX_VALUES} integers; got {len(values)}")
    return values


def _all_positive(name: str, values: Any) -> list[int]:
    values = _sequence(name, values)
    if not values:
        raise ValueError(f"{name} must be positive integers; got {values!r}")
    return [_positive(name, value, several=True) for value in values]
