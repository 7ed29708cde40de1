"""Lists of tensors as adam and grad_norm take them: what they must be, and which of them a kernel
can walk as they lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastddpm.ops import checks
from fastddpm.ops.checks import is_lazy
from fastddpm.ops.overlap import overlaps_itself, share_memory


def floats(name: str, tensors: Any, device: torch.device | None = None) -> list[Tensor]:
    """A list of float tensors, all on `device`, or where the first of them is."""
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(f"{name} must be a list of tensors; got {type(tensors).__name__}")
    for i, x in enumerate(tensors):
        if not isinstance(x, Tensor) or x.layout is not checks.STRIDED:
            checks.tensor(f"{name}[{i}]", x)
        if x.dtype not in checks.FLOATS:
            checks.floating(f"{name}[{i}]", x)
        device = device or x.device
        if x.device != device:
            checks.on_device(f"{name}[{i}]", x, device)
    return list(tensors)


def count(name: str, tensors: Any, expected: int) -> None:
    """As many as there are params."""
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(f"{name} must be a list of tensors; got {type(tensors).__name__}")
    if len(tensors) != expected:
        raise ValueError(f"{name} must be one for each of {expected} params; got {len(tensors)}")


def like(
    name: str,
    tensors: Any,
    params: Sequence[Tensor],
    dtypes: Literal["the same", "float64 alike", "any"],
) -> list[Tensor]:
    """A list of float tensors of the shapes of params, and of dtypes that go with theirs."""
    count(name, tensors, len(params))
    tensors = floats(name, tensors, params[0].device if params else None)
    for i, (x, p) in enumerate(zip(tensors, params, strict=True)):
        if x.shape != p.shape:
            raise ValueError(
                f"{name}[{i}] must have the shape of params[{i}], {tuple(p.shape)}; got "
                f"{tuple(x.shape)}"
            )
        if x.dtype == p.dtype or dtypes == "any":
            continue
        if dtypes == "the same":
            raise TypeError(f"{name}[{i}] must be {p.dtype} like params[{i}]; got {x.dtype}")
        if torch.float64 in (x.dtype, p.dtype):
            raise TypeError(
                f"{name}[{i}] and params[{i}] must both be float64 or neither; got {x.dtype} and "
                f"{p.dtype}"
            )
    return tensors


def number(name: str, x: Any, device: torch.device) -> Tensor:
    """A float tensor without dimensions."""
    checks.floating(name, x)
    if x.dim():
        raise ValueError(f"{name} must have no dimensions; got {tuple(x.shape)}")
    checks.on_device(name, x, device)
    return x


def written(x: Tensor, name: str) -> None:
    """What an op may write: plain memory, a place for each element."""
    if is_lazy(x):
        raise ValueError(f"{name} must be plain memory: it is a lazily negated view or a lazy zero")
    if x.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name} is an inference tensor: only torch.inference_mode() may write it")
    if overlaps_itself(x):
        raise ValueError(f"{name} must have a place of its own for each element; some share memory")


def apart(writes: dict[str, Sequence[Tensor]], reads: dict[str, Sequence[Tensor]]) -> None:
    """ValueError if a tensor that is written shares memory with any other."""
    spans = []
    for is_written, lists in ((True, writes), (False, reads)):
        for name, tensors in lists.items():
            for i, x in enumerate(tensors):
                if is_written:
                    written(x, f"{name}[{i}]")
                if elements := x.numel():
                    if not x.is_contiguous():
                        steps = zip(x.shape, x.stride(), strict=True)
                        elements = 1 + sum((size - 1) * step for size, step in steps)
                    begin = x.data_ptr()
                    spans.append((begin, begin + elements * x.itemsize, is_written, name, i, x))
    spans.sort(key=lambda span: span[:2])
    open_spans: list[tuple] = []  # that reach beyond where the next one begins
    for span in spans:
        open_spans = [other for other in open_spans if other[1] > span[0]]
        for other in open_spans:
            if (span[2] or other[2]) and share_memory(span[5], other[5]):
                pair = " and ".join(f"{name}[{i}]" for _, _, _, name, i, _ in (other, span))
                raise ValueError(f"{pair} share memory: what is written must lie apart")
        open_spans.append(span)


def lie_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether an op may write all of these at once."""
    try:
        apart({"tensors": tensors}, {})
    except ValueError:
        return False
    return True


def unwalkable(*lists: Sequence[Tensor], floats: Sequence[Sequence[Tensor]] = ()) -> str | None:
    """Why no kernel walks these lists' tensors side by side as they lie in memory, or None.

    The i-th tensors of all lists have one shape; those of `floats` have to be float32, the others
    may be half precision.
    """
    for tensors in (*lists, *floats):
        for x in tensors:
            if x.dtype == torch.float64:
                return "float64 is not supported"
            if is_lazy(x):
                return "a tensor is a lazily negated view or a lazy zero"
    for tensors in floats:
        if any(x.dtype != torch.float32 for x in tensors):
            return "parameters and what is kept of them must be float32"
    first, *others = (*floats, *lists)
    for i, x in enumerate(first):
        if not x.is_contiguous() and not is_dense(x):
            return "a tensor is not dense"
        for tensors in others:
            if i < len(tensors) and not in_order_of(tensors[i], x):
                return "the tensors of a parameter lie in different orders"
    return None


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill one run of memory, in some order of the dimensions."""
    end = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size == 1:
            continue
        if stride != end:
            return x.numel() == 0
        end *= size
    return True


def in_order_of(x: Tensor, like: Tensor) -> bool:
    """Whether elements of the same place have the same offset in both, which have one shape."""
    if x.stride() == like.stride():
        return True
    steps = zip(x.shape, x.stride(), like.stride(), strict=True)
    return all(a == b or size <= 1 for size, a, b in steps) or x.numel() == 0
