"""Which storage type a model runs in, what the machine multiplies natively, and whether a GPU may
round float32 operands to TF32. Nothing else.

float32 on a GPU is float32. torch has two switches that say otherwise, one for matrix products, off
unless the user sets it, and one for cuDNN's convolutions, on by default, which is no wish of
anybody. So the first one asks for both: with

    torch.set_float32_matmul_precision("high")     # or torch.backends.cuda.matmul.fp32_precision =
                                                   # "tf32", or .allow_tf32 = True

a float32 model takes TF32 in matrix products, attention and convolutions alike, and without it in
none. A convolution stays float32 also where the second switch was turned off.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch

from fastddpm.schedule import check_choice

Precision = Literal["auto", "fp32", "bf16"]


def has_fast_bf16(device: torch.device) -> bool:
    """True where bfloat16 products have instructions of their own: elsewhere they are slower than
    float32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and any(
        getattr(torch.cpu, probe, lambda: False)()
        for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "auto" as "bf16" or "fp32"; the others as they are. ValueError lists the choices."""
    check_choice("precision", precision, get_args(Precision))
    if precision == "auto":
        return "bf16" if has_fast_bf16(device) else "fp32"
    return precision


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Matrix products in `precision`, weights and reductions in float32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


# ---- TF32 ----------------------------------------------------------------------------------------


def tf32_asked() -> bool:
    """Whether torch's settings ask a GPU to round the operands of float32 products to TF32.

    Since torch 2.9 fp32_precision says so, which the older switches write as well, and which stands
    alone where reading allow_tf32 raises because a setting of the one kind has followed one of the
    other.
    """
    matmul = torch.backends.cuda.matmul
    asked = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32) if asked is None else asked == "tf32"


def convolutions_take_tf32() -> bool:
    """Whether cuDNN may round the operands of float32 convolutions to TF32 as torch is set now."""
    convolutions = getattr(torch.backends.cudnn, "conv", None)
    asked = getattr(convolutions, "fp32_precision", None)
    return bool(torch.backends.cudnn.allow_tf32) if asked is None else asked == "tf32"


_kept = threading.RLock()
_keeping = 0  # blocks that are open, in all threads: torch's switches are the process's
_put_back: Callable[[], None] = lambda: None  # noqa: E731


@contextlib.contextmanager
def float32_kept(precision: str, device: torch.device) -> Iterator[None]:
    """A block in which a model of precision "fp32" convolves in float32 on a GPU, unless
    `tf32_asked`; afterwards torch's switches are as they were. Any other precision or device: no
    change. Blocks may be nested, and open in several threads: the last one to end puts back.
    """
    global _keeping, _put_back
    if precision != "fp32" or device.type != "cuda":
        yield
        return
    with _kept:
        if not _keeping:
            _put_back = _forbid_tf32() if not tf32_asked() else lambda: None
        _keeping += 1
    try:
        yield
    finally:
        with _kept:
            _keeping -= 1
            if not _keeping:
                _put_back()


def _forbid_tf32() -> Callable[[], None]:
    """No TF32 in convolutions from here on; returns what takes that back.

    By the older switch where it can be read, so that it can be read afterwards too, and by the
    newer one where that alone leaves TF32 on, or where the two contradict each other already.
    """
    if not convolutions_take_tf32():
        return lambda: None
    cudnn: Any = torch.backends.cudnn
    try:
        older = bool(cudnn.allow_tf32)
    except RuntimeError:
        older = False

    def set_both(older_value: bool, newer_value: str) -> None:
        with torch.backends.__allow_nonbracketed_mutation():  # disable_global_flags() is for users
            if older:
                cudnn.allow_tf32 = older_value
            if convolutions_take_tf32() != older_value:
                # The older one is for both, and can be read only while they agree.
                for operator in (cudnn.conv, cudnn.rnn) if older else (cudnn.conv,):
                    operator.fp32_precision = newer_value

    set_both(False, "ieee")
    return lambda: set_both(True, "tf32")
