"""The network as the coder runs it: in an arithmetic whose bits an encoder and a decoder share, and
a name for that arithmetic.

precision "fp32" is the native plan of the CPU: an image's bits depend on neither the batch nor the
number of threads, but on the instruction set. A file names the arithmetic that it was written in,
and another one is refused."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch

from fastddpm import arguments, ops
from fastddpm.diffusion import Diffusion, Model
from fastddpm.engine import make_engine, runnable
from fastddpm.engine.cpu_plan import CpuPlan, unsupported
from fastddpm.options import check_choice
from fastddpm.unet import UNet

Precision = Literal["fp32"]
CPU = torch.device("cpu")
SHARED = {"avx512_bf16": "avx512", "amx_bf16": "avx512"}  # sets with the same float32 kernels
WORDS = {
    "precision": "precision",
    "isa": "instruction set",
    "plan": "native plan",
    "time": "time embedding",
    "probe": "bits of the network's output",
}


def coded_unet(model: Model) -> UNet:
    """The U-Net that a model is, if the coder can run it; else the ValueError that says why not."""
    device = arguments.device_of(model, None)
    if device.type != "cpu":
        raise ValueError(
            f"the codec runs the network on the CPU, where its bits are known, and the model is on "
            f"{device}: move it with model.cpu()"
        )
    network = runnable(model)
    if reason := unsupported(network, device):
        raise ValueError(f"the codec runs a fastddpm.UNet as a native plan: {reason}")
    unet = cast(UNet, network)
    if unet.label_emb is not None:
        raise ValueError(
            f"the model has {unet.config['num_classes']} classes, and the codec stores none: give "
            "a model without classes"
        )
    return unet


class Network:
    """(x_t, chain index) -> the model's output, for images of one shape.

    facts: what its bits depend on: the precision; the instruction set; digests of the plan's
           layers and algorithms, of what torch computed of the time, and of the output for fixed
           inputs at the first, the middle and the last step
    """

    def __init__(
        self,
        model: UNet,
        diffusion: Diffusion,
        shape: Sequence[int],
        precision: str = "fp32",
    ):
        check_choice("precision", precision, get_args(Precision))
        engine = make_engine("cpu_plan", model, diffusion, device=CPU, precision=precision)
        assert isinstance(engine, CpuPlan)
        self._engine = engine
        probe = ops.randn((1, *shape), seed=0, step=0)
        isa, layers, time = engine.described(probe)
        outputs = [self(probe, i) for i in sorted({0, diffusion.T // 2, diffusion.T - 1})]
        checksum = 0
        for output in outputs:
            checksum = zlib.crc32(output.contiguous().numpy().tobytes(), checksum)
        self.facts: dict[str, Any] = {
            "precision": precision,
            "isa": SHARED.get(isa, isa),
            "plan": _short(repr(layers).encode()),
            "time": _short(time.numpy().tobytes()),
            "probe": f"{checksum:08x}",
        }

    def __call__(self, xt: torch.Tensor, i: int) -> torch.Tensor:
        t = torch.full((len(xt),), i, dtype=torch.int64, device="cpu")
        return self._engine.output(xt, i, t)

    @classmethod
    def of(
        cls,
        facts: dict[str, Any],
        torch_version: str,
        model: UNet,
        diffusion: Diffusion,
        shape: Sequence[int],
    ) -> Network:
        """The network in the arithmetic that a file names; ValueError where this machine has
        another, naming what differs."""
        precision = str(facts.get("precision"))
        if precision not in get_args(Precision):
            known = ", ".join(map(repr, get_args(Precision)))
            raise ValueError(f"it was coded in the arithmetic {precision!r}; known is {known}")
        network = cls(model, diffusion, shape, precision)
        for name, mine in network.facts.items():
            if (theirs := facts.get(name)) != mine:
                how = f"with FASTDDPM_ISA={theirs}" if name == "isa" else "with its versions"
                raise ValueError(
                    f"it was coded in another arithmetic: its {WORDS[name]} is {theirs!r} (torch "
                    f"{torch_version}), and here {mine!r} (torch {torch.__version__}): decode it "
                    f"where it was coded, or {how}"
                )
        return network


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]
