"""The terms of the variational bound on an engine: noising, network and term a step, recorded as a
graph where the engine records. What they add up to is evaluation's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastddpm import ops
from fastddpm.engine.cuda_graph import CudaGraph
from fastddpm.engine.eager import Eager
from fastddpm.host import evaluating
from fastddpm.unet import UNet

Step = int | torch.Tensor  # a chain index, or one for each image, (N,) int64


class Terms:
    """`__call__`: terms of Eq. 5 of a batch of images, with the noise of one seed."""

    def __init__(self, engine: Eager, seed: int):
        self.engine, self._seed = engine, seed
        self._recorded: dict[tuple[Any, ...], _Recorded] = {}

    @torch.no_grad()
    def __call__(
        self,
        x0: torch.Tensor,
        index: torch.Tensor,
        steps: Sequence[Step],
        model_kwargs: Mapping[str, Any],
        on_step: Callable[[], object] = lambda: None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(terms, mse), (N, len(steps)) float32 each, one network pass a step: bits/dim, column by
        column, see Diffusion.bound_term.

        x0: (N, C, H, W) uint8;  index: (N,) int64, the images' sample numbers, whose noise they get

        FloatingPointError names the first image and the model's step at which a term is not finite.
        """
        engine, device = self.engine, x0.device
        n, kwargs = len(x0), dict(model_kwargs)
        engine.check_arguments(kwargs, n)
        engine.follow()
        terms = torch.empty(n, len(steps), dtype=torch.float32, device=device)
        mse = torch.empty_like(terms)
        with evaluating(engine.model):
            recorded = self._recording(x0, kwargs)
            if recorded is not None:
                recorded.begin(x0, index, kwargs)
            for k, step in enumerate(steps):
                t = step
                if not isinstance(t, torch.Tensor):
                    t = torch.full((n,), t, dtype=torch.int64, device=device)
                if recorded is not None:
                    terms[:, k], mse[:, k] = recorded(t)
                else:
                    terms[:, k], mse[:, k] = self._step(x0, index, step, t, kwargs)
                if device.type == "cpu":
                    self._check(terms[:, k : k + 1], index, [step])
                on_step()
        self._check(terms, index, steps)
        return terms, mse

    def _step(
        self,
        x0: torch.Tensor,
        index: torch.Tensor,
        step: Step,
        t: torch.Tensor,
        kwargs: Mapping[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        xt = self._noised(x0, index, t)
        try:
            output = self.engine.output(xt, step, t, **kwargs)
        except FloatingPointError as error:
            raise self._named(error, xt, index, t, kwargs) from None
        return self._term(x0, xt, output, t)

    def _noised(self, x0: torch.Tensor, index: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        process = self.engine.diffusion
        return ops.noise(
            x0, t, process.table(x0.device), seed=self._seed, sample_index=index,
            step=process.model_t(t), keep_eps=False,
        )[0]  # fmt: skip

    def _term(
        self, x0: torch.Tensor, xt: torch.Tensor, output: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        engine = self.engine
        clip = bool(engine.step_options["clip"])
        return engine.diffusion.bound_term(x0, xt, output, t, clip=clip)

    def _named(
        self,
        error: FloatingPointError,
        xt: torch.Tensor,
        index: torch.Tensor,
        t: torch.Tensor,
        kwargs: Mapping[str, Any],
    ) -> FloatingPointError:
        """The engine's error with the number of the first image that raises it by itself, too."""
        n = len(xt)
        for k in range(n):
            row = slice(k, k + 1)
            own = {
                name: x[row] if isinstance(x, torch.Tensor) and x.shape[:1] == (n,) else x
                for name, x in kwargs.items()
            }
            try:
                self.engine.output(xt[row], int(t[k]), t[row], **own)
            except FloatingPointError as its:
                return FloatingPointError(f"image {int(index[k])}: {its}")
        return error

    def _check(self, terms: torch.Tensor, index: torch.Tensor, steps: Sequence[Step]) -> None:
        bad = ~torch.isfinite(terms)
        if not bool(bad.any()):
            return
        k = int(bad.any(dim=0).nonzero()[0, 0])  # the first step of the loop
        image = int(bad[:, k].nonzero()[0, 0])
        t = torch.as_tensor(steps[k], device=terms.device).expand(len(terms))[image]
        own = int(self.engine.diffusion.schedule.timesteps[int(t)])
        raise FloatingPointError(
            f"the bound of image {int(index[image])} is not finite at step t = {own}: the model "
            "returned NaN or inf"
        )

    # ---- on a GPU -------------------------------------------------------------------------------

    def _recording(self, x0: torch.Tensor, kwargs: dict[str, Any]) -> _Recorded | None:
        """Of a batch of this shape; None where the engine records nothing."""
        engine = self.engine
        if not isinstance(engine, CudaGraph):
            return None
        given = tuple((k, x.shape[1:], x.dtype) for k, x in kwargs.items())
        for ((n, *size), kinds), kept in self._recorded.items():
            fits = n == len(x0) or (n > len(x0) and isinstance(engine.model, UNet))
            if fits and tuple(size) == x0.shape[1:] and kinds == given:
                return kept
        self._recorded = {}  # the memory of one is given back before the next is made
        recorded = _Recorded(self, engine, x0, kwargs)
        if not recorded.made:
            return None
        self._recorded[tuple(x0.shape), given] = recorded
        return recorded


class _Recorded:
    """A recording: t, and what it reads beside, -> the terms, on tensors of its own; of at most as
    many images as x0 has."""

    def __init__(self, terms: Terms, engine: CudaGraph, x0: torch.Tensor, kwargs: dict[str, Any]):
        device = engine.device
        self.x0 = x0.clone()
        self.index = torch.zeros(len(x0), dtype=torch.int64, device=device)
        self.t = torch.zeros_like(self.index)
        self.kwargs = {name: x.to(device, copy=True) for name, x in kwargs.items()}
        self.results: tuple[torch.Tensor, torch.Tensor] = (self.t, self.t)  # once it is made

        def step() -> None:
            xt = terms._noised(self.x0, self.index, self.t)
            output = engine.output(xt, -1, self.t, **self.kwargs)
            self.results = terms._term(self.x0, xt, output, self.t)

        self._replay = engine.recording(step)

    @property
    def made(self) -> bool:
        """Whether the step could be recorded."""
        return self._replay is not None

    def begin(self, x0: torch.Tensor, index: torch.Tensor, kwargs: Mapping[str, Any]) -> None:
        """Fewer images than there is room for are repeated."""
        row = torch.arange(len(self.x0), device=x0.device) % len(x0)
        self._count = len(x0)
        self.x0.copy_(x0[row])
        self.index.copy_(index[row])
        for name, x in kwargs.items():
            self.kwargs[name].copy_(x[row.to(x.device)])

    def __call__(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        row = torch.arange(len(self.t), device=t.device) % len(t)
        self.t.copy_(t[row])
        assert self._replay is not None
        self._replay()
        term, mse = self.results
        return term[: self._count], mse[: self._count]
