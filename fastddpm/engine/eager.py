"""The engine that runs any model: one Python call of the model and one fused posterior step a
step.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch

from fastddpm.diffusion import Diffusion, Model
from fastddpm.engine.guided import Guide
from fastddpm.host import evaluating
from fastddpm.precision import autocast, float32_kept, resolve_precision
from fastddpm.schedule import Sampler
from fastddpm.unet import UNet
from fastddpm.unet.plain import settings

OnStep = Callable[[int, torch.Tensor, Callable[[], torch.Tensor]], None]


class Eager:
    """Algorithm 2 around any callable (x_t, t) -> output.

    takes:  the keyword arguments of a model that the engine can pass on; None: all of them
    guided: whether it can hand a step's output to a Guide, as one that records both can't

    precision "bf16": a UNet runs as a bfloat16 copy, any other module under autocast; "auto" is
    bf16 for a UNet where the hardware multiplies it, float32 for everything else. x_t and the
    update stay float32. On a GPU "fp32" is float32, in convolutions too, unless torch is told to
    take TF32 in matrix products (fastddpm.precision). Weights are those that the model has when a
    run begins."""

    name = "eager"
    takes: ClassVar[tuple[str, ...] | None] = None
    guided: ClassVar[bool] = True

    def __init__(
        self,
        model: Model,
        diffusion: Diffusion,
        *,
        device: torch.device,
        precision: str = "auto",
        sampler: Sampler = "ddpm",
        eta: float = 0.0,
        clip: bool = True,
    ):
        if precision == "auto" and not isinstance(model, UNet):
            precision = "fp32"
        self.precision = resolve_precision(precision, device)
        self.diffusion, self.device = diffusion, device
        self.step_options: dict[str, Any] = {"sampler": sampler, "eta": eta, "clip": clip}
        self._given = self.model = model
        self._context: Callable[[], contextlib.AbstractContextManager] = functools.partial(
            float32_kept, self.precision, device
        )
        if isinstance(model, UNet):
            self.model = self._running()
        elif self.precision == "bf16":
            self._context = lambda: autocast("bf16", device)

    def _running(self) -> Model:
        """What stands for the given U-Net in steps."""
        if self.precision == "bf16":
            return copy.deepcopy(cast(UNet, self._given)).to(self.device, torch.bfloat16).eval()
        return self._given

    def follow(self) -> None:
        """Take over the weights that the model has now, where steps run a copy of it."""
        if self.model is self._given:
            return
        ours, theirs = (
            [*m.parameters(), *m.buffers()]
            for m in (cast(UNet, self.model), cast(UNet, self._given))
        )
        same = settings(cast(UNet, self.model)) == settings(cast(UNet, self._given))
        if not same or [x.shape for x in ours] != [x.shape for x in theirs]:
            self.model = self._running()
            return
        for mine, given in zip(ours, theirs, strict=True):
            mine.copy_(given)

    def check_arguments(self, model_kwargs: Mapping[str, Any], n: int) -> None:
        """ValueError for what the model or the engine does not take for n images."""
        for name in model_kwargs:
            if self.takes is not None and name not in self.takes:
                raise ValueError(
                    f"engine {self.name!r} takes no {name!r} for the model, only "
                    f"{', '.join(map(repr, self.takes))}; engine='eager' does"
                )
        if isinstance(self._given, UNet):
            if more := ", ".join(map(repr, model_kwargs.keys() - {"y"})):
                raise ValueError(f"a fastddpm.UNet takes x, t and y; got {more}, too")
            self._given.check_labels(model_kwargs.get("y"), n, wait=True)

    def output(
        self, xt: torch.Tensor, i: int | torch.Tensor, t: torch.Tensor, /, **model_kwargs: Any
    ) -> torch.Tensor:
        """What the model says of x_t at chain index i, or at those of a tensor (N,); t: the same as
        a tensor."""
        with self._context():
            return self.diffusion.model_output(self.model, xt, t, **model_kwargs)

    def output_after(
        self, xt: torch.Tensor, t: torch.Tensor, x0: torch.Tensor, /, **model_kwargs: Any
    ) -> torch.Tensor:
        """What a model (x_t, t, x0) says that sees the x0 predicted one step before."""
        with self._context():
            model = lambda x, t, /, **kw: cast(Any, self.model)(x, t, x0, **kw)  # noqa: E731
            return self.diffusion.model_output(model, xt, t, **model_kwargs)

    def step(
        self,
        xt: torch.Tensor,
        i: int,
        t: torch.Tensor,
        seed: int,
        sample_index: torch.Tensor,
        /,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x_{t-1}, what the model said of x_t) at chain index i; t: the same as a tensor (N,)."""
        output = self.output(xt, i, t, **model_kwargs)
        x = self.diffusion.p_step(
            xt, output, t, seed=seed, sample_index=sample_index, **self.step_options
        )
        return x, output

    @torch.no_grad()
    def run(
        self,
        xt: torch.Tensor,
        *,
        seed: int,
        sample_index: torch.Tensor,
        start: int | None = None,
        stop: int = 0,
        on_step: OnStep | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        guide: Guide | None = None,
    ) -> torch.Tensor:
        """Take x from chain index `start` (None: T) down to `stop` (DDPM Algorithm 2, lines 2 to
        5).

        xt: (N, C, H, W) float32, left as it is;  sample_index: (N,) int64, whose noise each sample
            takes.
        on_step(i, x, x0): after the step at chain index i, with its result and a function for the
        x0 prediction.
        model_kwargs: what the model takes beside x_t and t, of these images: {"y": classes};
            guide: of this run, between the model and the step."""
        diffusion, clip = self.diffusion, bool(self.step_options["clip"])
        model_kwargs = dict(model_kwargs or {})
        self.check_arguments(model_kwargs, len(xt))
        self.follow()
        with evaluating(self.model):
            for i in reversed(range(stop, diffusion.T if start is None else start)):
                t = torch.full((xt.shape[0],), i, dtype=torch.int64, device=self.device)
                x0: Callable[[], torch.Tensor]
                if guide is None:
                    x, output = self.step(xt, i, t, seed, sample_index, **model_kwargs)
                    x0 = functools.partial(diffusion.predict_x0, xt, output, t, clip=clip)
                else:
                    x, x0 = guide.step(self, xt, i, t, seed, sample_index, model_kwargs)
                if on_step is not None:
                    on_step(i, x, x0)
                xt = x
        return xt
