"""The engine of a U-Net on a GPU: its prepared network and the posterior step recorded once, at the
least bytes and launches a step. The network is gpu_network.py's, recording cuda_graph.py's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastddpm.diffusion import Diffusion, Model
from fastddpm.engine import cuda_graph
from fastddpm.engine.cuda_graph import CudaGraph, Step
from fastddpm.engine.eager import Eager
from fastddpm.engine.gpu_network import Network
from fastddpm.engine.plannable import unplannable
from fastddpm.ops.checks import FLOATS
from fastddpm.unet import UNet
from fastddpm.unet.plain import settings


def unsupported(model: Model, device: torch.device) -> str | None:
    """Why this plan can't run this model, the part named, or None if it can."""
    return cuda_graph.unsupported(device) or _unsuited(model)


def _unsuited(model: Model) -> str | None:
    if reason := unplannable(model):
        return reason
    assert isinstance(model, UNet)
    dtype = model.conv_in.weight.dtype
    if dtype not in FLOATS:
        return f"conv_in.weight is {dtype}, which is no float that the ops take"
    for name, p in model.named_parameters():
        if p.dtype != dtype:
            return f"{name} is {p.dtype}, not {dtype} like conv_in.weight"
    return None


class CudaPlan(CudaGraph):
    """Algorithm 2 with the U-Net as a plan: one graph launch a step, of the network's fewest passes
    over memory; x_{t-1} takes the place of x_t.

    precision "bf16": products in bfloat16, whose weights are rounded once, and images in between;
    sums, statistics, biases, the time embedding and x_t are float32. "fp32": in the model's own
    dtype. The weights are copied when a run begins, so that the model may change between runs; one
    that is no longer what a plan can run goes on in eager, which a warning says."""

    name = "cuda_plan"
    records_xt = False

    def __init__(self, model: Model, diffusion: Diffusion, *, device: torch.device, **options: Any):
        if reason := _unsuited(model):
            raise ValueError(f"engine 'cuda_plan' can't run here: {reason}")
        super().__init__(model, diffusion, device=device, **options)
        self.network: Network | None = None
        self._built: list[Any] = []

    def _running(self) -> Model:
        return self._given  # whose weights the network copies

    def follow(self) -> None:
        if self._refused:
            super().follow()
            return
        if reason := _unsuited(self._given):
            self._refuse(reason)
            return
        assert isinstance(self._given, UNet)
        built = [settings(self._given), *_structure(self._given)]
        if self.network is not None and self._built == built:
            self.network.refresh()
            return
        self._recorded, self._built = {}, built
        steps = torch.arange(self.diffusion.T, device=self.device)
        own = self._given.conv_in.weight.dtype
        dtype = torch.bfloat16 if self.precision == "bf16" else own
        self.network = Network(self._given, self.diffusion.model_time(steps), dtype)

    def _reads(self) -> list[Any]:
        return []  # the network's copies alone, which `follow` keeps up to date

    def output(
        self, xt: torch.Tensor, i: int | torch.Tensor, t: torch.Tensor, /, **model_kwargs: Any
    ) -> torch.Tensor:
        """As Eager's, at the step that all of t are."""
        if self.network is None:
            return super().output(xt, i, t, **model_kwargs)
        with self._context():
            output = self.network(xt, t[:1], **model_kwargs)
        return output.float() if output.dtype == torch.float64 else output

    def advance(self, step: Step) -> torch.Tensor:
        output = self.output(step.x, -1, step.t, **step.model_kwargs)
        self.diffusion.p_step(
            step.x, output, step.t, seed=step.seed, sample_index=step.sample_index, out=step.x,
            **self.step_options,
        )  # fmt: skip
        return output

    def _refuse(self, why: str) -> None:
        self.network, self._recorded = None, {}
        self.model = Eager._running(self)
        super()._refuse(why)


def _structure(model: nn.Module) -> Any:
    """What a network was built of: its modules and the shapes of their parameters."""
    for module in model.modules():
        own = module.named_parameters(recurse=False)
        yield module, [(name, p.shape, p.dtype) for name, p in own]
