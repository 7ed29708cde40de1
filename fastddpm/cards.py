"""The CUDA cards of this machine, for the doctor: what each is, whether our kernels were built for
it, and how torch is set to multiply on it. Nothing is computed on them."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastddpm import _native
from fastddpm.diffusion import Model
from fastddpm.engine import choose
from fastddpm.ops import attention, dispatch
from fastddpm.precision import convolutions_take_tf32, tf32_asked
from fastddpm.presence import first_line

BLOCK = (256, 256, 16, 16), (768, 256)  # x and its qkv_weight
ATTENTION = {
    "cuda": "our norm, cuBLAS and torch's fused attention",
    "triton": "one block of Triton kernels",
    "reference": "torch's own operations",
}


def rows(model: Model) -> list[tuple[str, str]]:
    """What `fastddpm doctor` says of the cards, and of this U-Net on them; without a card, why."""
    if not torch.cuda.is_available():
        without = "torch was built without CUDA" if torch.version.cuda is None else "no device"
        return [("cuda", without)]
    found = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    table = [row for card in found for row in _about(card, model)]
    return [*table, ("float32 on a GPU", _products())]


def _about(card: torch.device, model: Model) -> list[tuple[str, str]]:
    try:
        major, minor = torch.cuda.get_device_capability(card)
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(card))
        about = (
            f"{torch.cuda.get_device_name(card)}, capability {major}.{minor}, "
            f"{free:.1f} of {total:.1f} GiB free"
        )
        engine, precision = choose("auto", model, card, "auto")
    except RuntimeError as error:  # taken by another process alone, out of order
        return [(str(card), f"can't be used: {first_line(error)}")]
    return [
        (str(card), about),
        (f"{card} kernels", kernels((major, minor))),
        (
            f"{card} engine 'auto'",
            f"{engine.name} in {precision} for a UNet, eager for others",
        ),
        (f"{card} attention", _attention(card, precision)),
    ]


def kernels(capability: tuple[int, int]) -> str:
    """Those of `_C` that a card of this capability runs, or why it runs none."""
    if _native.C is None:
        return "none: fastddpm._C is missing"
    info = _native.build_info()
    if info["cuda"] is None:
        return "none: fastddpm._C was built without CUDA; install it where nvcc is on the PATH"
    built = info["cuda_architectures"]
    name = "{}.{}".format(*capability)
    return (
        _native.runs_on(built, capability)
        or f"none for capability {name}: they were built for {built}"
    )


def _attention(card: torch.device, precision: str) -> str:
    """The way of attention_block, for a block of the paper's U-Nets of 32x32 images."""
    with FakeTensorMode():  # a shape, a type and a device, and no memory of the card
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        x, weight = (torch.empty(shape, dtype=dtype, device=card) for shape in BLOCK)
    preferred = attention.order(x, weight, 1, gradient=False)
    order = preferred if dispatch.forced() == "auto" else (dispatch.forced(),)
    able = (n for n in order if dispatch.load(n).unsupported("attention_block", x, weight) is None)
    used = next(able, "reference")
    return f"{ATTENTION.get(used, used)} (backend {used})"


def _products() -> str:
    """How a model of precision "fp32" multiplies: see fastddpm.precision."""
    if tf32_asked():
        return "TF32, as torch is set to (torch.backends.cuda.matmul)"
    switched = ", whatever cuDNN's own switch allows" if convolutions_take_tf32() else ""
    return f"float32 in matrix products, attention and convolutions{switched}"
