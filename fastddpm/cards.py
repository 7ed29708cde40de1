"""The CUDA cards of this machine, for the doctor: what each is, whether our kernels were built for
it, and how torch is set to multiply on it. Nothing is computed on them."""

from __future__ import annotations

from typing import Any

import torch

from fastddpm import _native
from fastddpm.diffusion import Model
from fastddpm.engine import choose
from fastddpm.ops import dispatch
from fastddpm.presence import first_line

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
        (f"{card} attention", _attention(card)),
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


def _attention(card: torch.device) -> str:
    """The way of attention_block, whose backend is chosen by the case."""
    backends = dispatch.matrix()["attention_block"]
    used = next((name for name, entry in backends.items() if entry["cuda"]), "reference")
    return f"{ATTENTION.get(used, used)} (backend {used})"


def _products() -> str:
    """How torch is set to multiply float32."""
    convolutions = torch.backends.cudnn
    switches = {
        "matrix products": torch.backends.cuda.matmul,
        "convolutions": getattr(convolutions, "conv", convolutions),
    }
    said = (f"{'TF32' if _tf32(switch) else 'float32'} in {k}" for k, switch in switches.items())
    return ", ".join(said) + ", by torch's settings"


def _tf32(switch: Any) -> bool:
    """Since torch 2.9 fp32_precision says so, which the older allow_tf32 writes as well."""
    asked = getattr(switch, "fp32_precision", None)
    return bool(switch.allow_tf32) if asked is None else asked == "tf32"
