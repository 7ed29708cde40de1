"""Refuses what an op can't take, before any backend sees it: one line that names the argument,
what it was and what is allowed.

Shapes, dtypes and devices are checked on every call, traced ones too; values (`values_in`) where
reading them costs no synchronisation: on the host. FASTDDPM_STRICT=1 pays for it on a GPU too.
"""

from __future__ import annotations

import operator
import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastddpm.options import check_number, shown
from fastddpm.schedule import K

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STRIDED = torch.strided
INDEX_END = 1 << 63  # of sample indices
ELEMENTS_END = 1 << 48  # of a tensor
STEP_END = 1 << 32  # of the step word of the RNG contract


def _name(dtype: torch.dtype | torch.layout) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def tensor(name: str, x: Any) -> None:
    """A dense tensor: one that has strides."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if x.layout is not STRIDED:
        raise TypeError(f"{name} must be a dense tensor; got {_name(x.layout)}")


def is_lazy(x: Tensor) -> bool:
    """Whether x is a negated view or a zero whose memory does not hold its values."""
    return x.is_neg() or x._is_zerotensor()


def floating(name: str, x: Any, dims: tuple[int, ...] = (), layout: str = "") -> None:
    """A tensor of a float dtype, with one of the numbers of dimensions in `dims` if given."""
    if not isinstance(x, Tensor) or x.layout is not STRIDED:
        tensor(name, x)
    if x.dtype not in FLOATS:
        allowed = ", ".join(map(_name, FLOATS))
        raise TypeError(f"{name} must be one of {allowed}; got {_name(x.dtype)}")
    if dims and x.dim() not in dims:
        raise ValueError(f"{name} must be {layout}; got {_shape(x)}")


def images(name: str, x: Any, *, bytes_too: bool = False) -> None:
    """(N, C, H, W) of a float dtype, or uint8."""
    if not (bytes_too and isinstance(x, Tensor) and x.dtype == torch.uint8):
        floating(name, x)
    if x.dim() != 4:
        raise ValueError(f"{name} must be (N, C, H, W); got {_shape(x)}")


def on_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors; got {x.device}")


def usable_device(device: Any) -> torch.device:
    """A device of torch's that is here; ValueError for another."""
    try:
        place = torch.device(device)
        if place.type != "cpu":
            torch.empty(0, dtype=torch.uint8, device=place)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        why = str(error).strip().split("\n")[0]
        raise ValueError(
            f"device must be one that can be used here; got {shown(device)}: {why}"
        ) from None
    return place


def operand(name: str, x: Any, like_name: str, like: Tensor) -> None:
    """A float tensor of the shape and device of `like`, float64 exactly where that is.

    Other float dtypes mix: they are storage types, arithmetic is float32.
    """
    floating(name, x)
    if x.shape != like.shape:
        raise ValueError(
            f"{name} must have the shape of {like_name}, {_shape(like)}; got {_shape(x)}"
        )
    on_device(name, x, like.device)
    _both_double(name, x, like_name, like)


def operand_dtype(name: str, x: Any, like_name: str, like: Tensor) -> None:
    """A float tensor, float64 exactly where `like` is."""
    floating(name, x)
    _both_double(name, x, like_name, like)


def _both_double(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.dtype != like.dtype and torch.float64 in (x.dtype, like.dtype) and like.dtype in FLOATS:
        raise TypeError(
            f"{name} and {like_name} must both be float64 or neither; "
            f"got {_name(x.dtype)} and {_name(like.dtype)}"
        )


def output(out: Any, like_name: str, like: Tensor) -> None:
    """A tensor to write the result into: like `like`, each element in its own place."""
    operand("out", out, like_name, like)
    if out.dtype != like.dtype:
        raise TypeError(f"out must be {_name(like.dtype)} like {like_name}; got {_name(out.dtype)}")
    sizes = zip(out.shape, out.stride(), strict=True)
    if 0 in out.stride() and any(size > 1 and step == 0 for size, step in sizes):
        raise ValueError("out must not be an expanded tensor: its elements share memory")
    if torch.compiler.is_compiling():
        return  # a traced program has neither of these
    if is_lazy(out):
        raise ValueError("out must be plain memory: it is a lazily negated view or a lazy zero")
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError("out is an inference tensor: only torch.inference_mode() may write it")


def no_gradient(**tensors: Any) -> None:
    """out= overwrites what a gradient would need, and has no derivative in either mode."""
    enabled, dual = torch.is_grad_enabled(), forward_ad._current_level >= 0
    for name, x in tensors.items():
        if x is None:
            continue
        if enabled and x.requires_grad:
            raise ValueError(
                f"out can't be given where {name} requires grad, as in torch's own ops"
            )
        if dual and forward_ad.unpack_dual(x).tangent is not None:
            raise ValueError(f"out can't be given where {name} has a tangent (forward-mode AD)")


def per_sample(
    name: str, x: Any, n: int, device: torch.device, dtype: torch.dtype = torch.int64
) -> None:
    """(N,) of `dtype` on `device`."""
    tensor(name, x)
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {_name(dtype)}; got {_name(x.dtype)}")
    if x.dim() != 1 or x.shape[0] != n:
        raise ValueError(f"{name} must have shape ({n},); got {_shape(x)}")
    on_device(name, x, device)


def schedule_table(table: Any, device: torch.device) -> None:
    """[T, K] float32 or float64, as Schedule.table() makes it."""
    tensor("table", table)
    if table.dtype != torch.float32 and table.dtype != torch.float64:
        raise TypeError(f"table must be float32 or float64; got {_name(table.dtype)}")
    if table.dim() != 2 or table.shape[1] != K or table.shape[0] == 0:
        raise ValueError(
            f"table must be (T, {K}) with T >= 1, as Schedule.table() is; got {_shape(table)}"
        )
    on_device("table", table, device)


def parameter(name: str, x: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """None, or a float tensor of this shape on `device`."""
    if x is None:
        return
    floating(name, x)
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}; got {_shape(x)}")
    on_device(name, x, device)


def per_channel(name: str, x: Any, n: int, channels: int, device: torch.device) -> None:
    """None, or what is added to the channels of N samples: (C,) or (N, C)."""
    if x is None:
        return
    floating(name, x)
    if x.shape != (channels,) and x.shape != (n, channels):
        raise ValueError(
            f"{name} must have shape ({channels},) or ({n}, {channels}); got {_shape(x)}"
        )
    on_device(name, x, device)


def second_source(x2: Any, x: Tensor) -> int:
    """The channels of x2, (N, C2, ...) beside x (N, C1, ...)."""
    floating("x2", x2)
    if x2.dim() != x.dim() or x2.shape[0] != x.shape[0] or x2.shape[2:] != x.shape[2:]:
        raise ValueError(
            f"x2 must have the shape of x, {_shape(x)}, but for the channels; got {_shape(x2)}"
        )
    if x2.shape[1] == 0:
        raise ValueError(f"x2 must have at least 1 channel; got {_shape(x2)}")
    on_device("x2", x2, x.device)
    if (x2.dtype == torch.float64) != (x.dtype == torch.float64):
        raise TypeError(
            f"x2 and x must both be float64 or neither; got {_name(x2.dtype)} and {_name(x.dtype)}"
        )
    return x2.shape[1]


def dropout_stream(
    p: Any, seed: Any, step: Any, sample_index: Any, n: int, device: torch.device
) -> tuple[float, int | None, Tensor | None, Tensor | None]:
    """(p, seed, step, sample_index) of a dropout; without one, (0, None, None, None)."""
    p = check_number("dropout", p, lambda number: 0 <= number < 1, "a number in [0, 1)")
    given = {"seed": seed, "step": step, "sample_index": sample_index}
    if p == 0:
        return 0.0, None, None, None
    for name, value in given.items():
        if value is None:
            raise ValueError(f"dropout needs seed, step and sample_index; got no {name}")
    per_sample("sample_index", sample_index, n, device)
    return p, seed_word(seed), step_word(step, n, device), sample_index


def device_seed(seed: Any, device: torch.device) -> Tensor | None:
    """A seed that is (1,) int64 on `device`; None for any other."""
    if not isinstance(seed, Tensor):
        return None
    tensor("seed", seed)
    if seed.dtype != torch.int64 or seed.shape != (1,):
        raise ValueError(
            f"a seed on a device must be (1,) int64; got {_shape(seed)} {_name(seed.dtype)}"
        )
    on_device("seed", seed, device)
    return seed


def broadcastable(**tensors: Tensor) -> None:
    try:
        torch.broadcast_shapes(*(x.shape for x in tensors.values()))
    except RuntimeError:
        shapes = ", ".join(map(_shape, tensors.values()))
        raise ValueError(
            f"{', '.join(tensors)} must have shapes that broadcast; got {shapes}"
        ) from None


def whole(value: Any) -> Any:
    """An integer, NumPy's or a tensor's, as Python's; all else as it is."""
    if isinstance(value, (int, torch.SymInt)):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value


def divisor(name: str, value: Any, channels: int) -> int:
    """An integer, of NumPy's too, that divides the channels."""
    number = whole(value)
    if number is True or not isinstance(number, int) or number < 1 or channels % number:
        raise ValueError(f"{name} must divide the {channels} channels; got {shown(value)}")
    return number


def groups(num_groups: Any, x: Tensor, eps: Any, channels: int) -> tuple[int, float]:
    """(num_groups, eps) as Python's numbers: num_groups divides the channels, of which x has some;
    eps is a number of at least 0.
    """
    if x.shape[1] == 0:
        raise ValueError(f"x must have at least 1 channel; got {_shape(x)}")
    num_groups = divisor("num_groups", num_groups, channels)
    if type(eps) is not float or not eps >= 0:
        eps = check_number("eps", eps, lambda number: number >= 0, "a number of at least 0")
    return num_groups, eps


def integer(name: str, value: Any, end: int, text: str) -> int:
    """An integer in 0 .. end - 1; `text` says what `end` is."""
    if type(value) is not int and not isinstance(value, torch.SymInt):
        number = whole(value)
        if isinstance(value, bool) or not isinstance(number, int):
            raise TypeError(f"{name} must be an integer; got {shown(value)}")
        value = number
    if not 0 <= value < end:
        raise ValueError(f"{name} must be in 0 .. {text} - 1; got {value}")
    return value


def seed_word(seed: Any) -> int:
    """A seed in [0, 2^64) as the int64 of the same bits, which is what an op's schema can hold."""
    seed = integer("seed", seed, 1 << 64, "2^64")
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def step_word(step: Any, n: int, device: torch.device) -> Tensor:
    """The step word of the RNG contract for N samples, (N,) int64, from such a tensor or an int."""
    if isinstance(step, Tensor):
        per_sample("step", step, n, device)
        return step
    step = integer("step", step, STEP_END, "2^32")
    return torch.full((n,), step, dtype=torch.int64, device=device)


def draw(
    name: str, given: Any, seed: Any, sample_index: Any, step: Any, t: Tensor
) -> tuple[int, Tensor, Tensor] | None:
    """(seed, step, sample_index) to draw the noise `name` from; None if it is given itself."""
    if given is not None:
        if seed is not None or sample_index is not None or step is not None:
            raise ValueError(f"give {name}, or seed, sample_index and step; got both")
        return None
    if seed is None or sample_index is None:
        missing = "seed" if seed is None else "sample_index"
        raise ValueError(f"give {name}, or both seed and sample_index; got no {missing}")
    n, device = t.shape[0], t.device
    per_sample("sample_index", sample_index, n, device)
    step = t if step is None else step_word(step, n, device)
    return seed_word(seed), step, sample_index


def strict() -> bool:
    """FASTDDPM_STRICT=1: an error for what would pass with a warning or unseen."""
    return os.environ.get("FASTDDPM_STRICT") == "1"


def _may_synchronise(x: Tensor) -> bool:
    return x.device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def values_in(name: str, x: Tensor, end: int, text: str) -> None:
    """All values are in 0 .. end - 1, where they can be read; `text` says what `end` is."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):  # all samples of a vmap
        x = torch._C._functorch.get_unwrapped(x)
    if x.numel() == 0 or not (x.device.type == "cpu" or (strict() and _may_synchronise(x))):
        return
    if x.numel() <= 64 and x.device.type == "cpu":  # a list of a few costs less than one kernel
        values = x.flatten().tolist()
        low, high = min(values), max(values)
    else:
        low, high = (value.item() for value in torch.aminmax(x))
    if low < 0 or high >= end:
        raise ValueError(f"{name} must be in 0 .. {text}; got {low if low < 0 else high}")
