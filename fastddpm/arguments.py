"""What callers of the samplers pass, checked and made plain: Python's numbers for NumPy's, or the
ValueError that names the argument, what it was and what is allowed."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from fastddpm.ops import checks
from fastddpm.schedule import check_count
from fastddpm.unet import UNet
from fastddpm.wrapped import parts, unwrap

SEEDS = 2**64
INDICES = 2**63
CPU = torch.device("cpu")


def integer(name: str, value: Any, low: int, high: int, allowed: str) -> int:
    """`value` as an int, if it is an integer in low .. high, NumPy's or a tensor's among them;
    `allowed` says which."""
    whole = not isinstance(value, (bool, np.bool_)) and hasattr(value, "__index__")
    if isinstance(value, (torch.Tensor, np.ndarray)):
        whole = value.ndim == 0 and "int" in str(value.dtype)
    if not whole:
        raise ValueError(f"{name} must be an integer, {allowed}; got {value!r}")
    if not low <= operator.index(value) <= high:
        raise ValueError(f"{name} must be {allowed}; got {value!r}")
    return operator.index(value)


def seed(value: Any) -> int:
    return integer("seed", value, 0, SEEDS - 1, "in 0 .. 2^64 - 1")


def indices(n: Any, first_index: Any) -> tuple[int, int]:
    """How many samples, and the number of the first: (n, first_index)."""
    n = check_count("n", n)
    if n >= INDICES:
        raise ValueError(f"n must be below 2^63; got {n}")
    last = INDICES - 1 - n
    return n, integer("first_index", first_index, 0, last, "in 0 .. 2^63 - 1 - n")


def sample_indices(n: Any, first_index: Any) -> torch.Tensor:
    """The numbers of n samples, (n,) int64 on the CPU."""
    n, first = indices(n, first_index)
    return torch.arange(first, first + n, device="cpu")


def several(t: Any) -> bool:
    """True for a sequence of numbers, False for one."""
    return isinstance(t, Iterable) and not isinstance(t, str) and getattr(t, "ndim", 1) > 0


def levels(t: Any, lowest: int, largest: int) -> list[int]:
    """One step or several as a list, if all lie in lowest .. largest."""
    try:
        steps = [integer("t", k, lowest, largest, "") for k in (t if several(t) else [t])]
    except ValueError:
        steps = []
    if not steps:
        raise ValueError(f"t must be steps in {lowest} .. {largest}; got {t!r}")
    return steps


def image_shape(model: Any, shape: Any) -> tuple[int, int, int]:
    """(C, H, W) of one image: what was given, or what `model` says by in_channels and image_size,
    (H, W) or an integer."""
    if shape is None:
        name, shape = f"{type(model).__name__}'s (in_channels, image_size)", _shape_of(model)
        if shape is None:
            raise ValueError(
                "shape=(C, H, W) is needed for a model that does not say its in_channels and "
                "image_size"
            )
    else:
        name = "shape"
    try:
        if isinstance(shape, str) or len(shape) != 3:
            raise ValueError
        c, h, w = (integer(name, size, 1, INDICES - 1, "") for size in shape)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be (C, H, W), three positive integers; got {shape!r}"
        ) from None
    return c, h, w


def _shape_of(model: Any) -> tuple | None:
    channels, size = (getattr(model, name, None) for name in ("in_channels", "image_size"))
    if channels is None or size is None:
        return None
    several = isinstance(size, Iterable) and not isinstance(size, str)
    return (channels, *size) if several else (channels, size, size)


def device_of(model: Any, device: Any, otherwise: torch.device = CPU) -> torch.device:
    """Where samples are drawn: `device` if given, else where the model is, or what a callable
    calls, else `otherwise`.

    ValueError where the model is on another device, and for a UNet on two."""
    own = _own_device(model)
    place = _callees_device(model) if own is None and device is None else own
    if place is not None and place.type == "meta":
        raise ValueError("the model is on the device 'meta', where weights have no values")
    if device is None:
        return otherwise if place is None else place
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be one of torch's; got {device!r}") from None
    if own is not None and not _is_same(wanted, own):
        raise ValueError(f"the model is on {own} and device is {wanted}: move the model first")
    try:
        probe = torch.zeros(1, dtype=torch.float32, device=own or wanted)
        probe.item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:  # torch's ways to say no
        why = str(error).strip().splitlines()[0]
        raise ValueError(
            f"device must be one that can be used here; got {device!r}: {why}"
        ) from None
    return probe.device  # "cuda" by its number


def _own_device(model: Any) -> torch.device | None:
    """A module's, by its first parameter. One on several devices may know what it does, which a
    UNet does not."""
    if not isinstance(model, torch.nn.Module):
        return None
    if isinstance(network := unwrap(model), UNet):
        check_one_device(network)
    first = next(model.parameters(), None)
    return None if first is None else first.device


def check_one_device(model: torch.nn.Module) -> None:
    """ValueError, with an example of each, unless all parameters and buffers are on one device."""
    examples: dict[torch.device, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        examples.setdefault(tensor.device, name)
    if len(examples) > 1:
        places = ", ".join(f"{name} on {place}" for place, name in examples.items())
        raise ValueError(f"the model is on several devices ({places}): move it to one")


def _callees_device(model: Any) -> torch.device | None:
    """Of all modules that a callable refers to, where they have one in common."""
    modules = (part for part in parts(model) if isinstance(part, torch.nn.Module))
    devices = {tensor.device for module in modules for tensor in module.parameters(recurse=False)}
    return devices.pop() if len(devices) == 1 else None


def _is_same(wanted: torch.device, own: torch.device) -> bool:
    """Whether a name of a device means this one: "cuda" means any."""
    return wanted.type == own.type and wanted.index in (None, own.index or 0)


def check_pixels(name: str, x: torch.Tensor) -> None:
    """ValueError unless x is a dense tensor with values, of uint8 or of a float type that computes
    (not one of 8 bits)."""
    if x.layout is not torch.strided or x.is_quantized or x.is_meta:
        kind = "on the device 'meta'" if x.is_meta else x.layout
        raise ValueError(f"{name} must be a dense tensor with values; got one {kind}")
    if x.is_floating_point() and x.dtype not in checks.FLOATS:
        allowed = ", ".join(map(str, (torch.uint8, *checks.FLOATS)))
        raise ValueError(f"{name} must be one of {allowed}; got {x.dtype}")


def image_pair(a: Any, b: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images (C, H, W), uint8 or float in [-1, 1], of one shape and dtype."""
    for name, image in (("a", a), ("b", b)):
        if not isinstance(image, torch.Tensor):
            raise ValueError(f"{name} must be a tensor (C, H, W); got {type(image).__name__}")
        check_pixels(name, image)
    if a.shape != b.shape or a.dim() != 3:
        raise ValueError(
            f"a and b must be (C, H, W) alike; got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if a.dtype != b.dtype or not (a.dtype == torch.uint8 or a.is_floating_point()):
        raise ValueError(f"a and b must be uint8 or float alike; got {a.dtype} and {b.dtype}")
    for name, image in (("a", a), ("b", b)):
        check_range(name, image)
    return a, b


def check_range(name: str, image: torch.Tensor) -> None:
    """ValueError unless the pixels are uint8, or float in [-1, 1]."""
    if image.dtype == torch.uint8:
        return
    if not image.is_floating_point():
        raise ValueError(f"{name} must be uint8, or float in [-1, 1]; got {image.dtype}")
    if not bool((image.abs() <= 1.001).all()):  # NaN is not
        low, high = (float(value) for value in torch.aminmax(image))
        raise ValueError(
            f"{name} must be uint8, or float in [-1, 1]; got floats in {low:g} .. {high:g}"
        )
