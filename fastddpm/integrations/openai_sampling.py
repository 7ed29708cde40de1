"""The reverse chains of improved- and guided-diffusion's GaussianDiffusion: a fused step each."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastddpm import arguments, ops
from fastddpm.integrations.images import as_images, compute_dtype, laid_out_as
from fastddpm.integrations.openai_process import Process
from fastddpm.options import check_count, shown
from fastddpm.progress import tqdm

Hook = Callable[..., Tensor] | None
Step = Callable[[Tensor, Tensor], dict[str, Tensor]]

# What a fused step stands for: where a subclass has its own, the step is made of its parts.
PARTS = (
    "p_mean_variance",
    "q_posterior_mean_variance",
    "_predict_xstart_from_eps",
    "_predict_xstart_from_xprev",
)


class Sampling(Process):
    """Their p_ and ddim_ methods. Noise is torch's, drawn where theirs draws it: at every step, the
    last one and those of eta = 0 too. The same seed gives the same images.

    model: any callable (x, t, **model_kwargs);  clip_denoised, denoised_fn: see p_mean_variance;
    cond_fn: see condition_mean and condition_score
    """

    def p_sample(
        self,
        model: Callable[..., Any],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        cond_fn: Hook = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """x_{t-1} ~ p(x_{t-1} | x_t): "sample", and the x0 it was made from, "pred_xstart"."""
        if denoised_fn is None and cond_fn is None and self._is_whole():
            t = self._t(t, x)
            output, word = self._output(model, x, t, model_kwargs)
            sample = self._step(
                x, output, t, torch.randn_like(x), self._step_table(x),
                clip=clip_denoised, prediction=self._prediction, word=word,
            )  # fmt: skip
            return {"sample": sample, "pred_xstart": self._predicted(output, x, t, clip_denoised)}
        out = self.p_mean_variance(
            model,
            x,
            t,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            model_kwargs=model_kwargs,
        )
        noise = torch.randn_like(x)
        mean = out["mean"]
        if cond_fn is not None:
            mean = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        t = self._t(t, x)
        noisy = t.ne(0).reshape(-1, *[1] * (x.dim() - 1))
        sample = torch.where(noisy, mean + torch.exp(0.5 * out["log_variance"]) * noise, mean)
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self,
        model: Callable[..., Any],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        cond_fn: Hook = None,
        model_kwargs: Mapping[str, Any] | None = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """DDIM's step (Song et al. 2021, Eq. 12), eta in 0 .. 1 times the noise of beta-tilde."""
        table = self._step_table(x, "ddim", eta)
        fused = denoised_fn is None and cond_fn is None and self._is_whole()
        if fused and self._prediction != "mean":
            t = self._t(t, x)
            output, _ = self._output(model, x, t, model_kwargs)
            x0, kind, clip = output, self._prediction, clip_denoised
            out = {"pred_xstart": self._predicted(output, x, t, clip_denoised)}
        else:
            out = self.p_mean_variance(
                model,
                x,
                t,
                clip_denoised=clip_denoised,
                denoised_fn=denoised_fn,
                model_kwargs=model_kwargs,
            )
            if cond_fn is not None:
                out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
            x0, kind, clip, t = out["pred_xstart"], "x0", False, self._t(t, x)
        noise = torch.randn_like(x)
        sample = self._step(x, x0, t, noise, table, clip=clip, prediction=kind)
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample(
        self,
        model: Callable[..., Any],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        model_kwargs: Mapping[str, Any] | None = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """x_{t+1} by DDIM's ODE, backwards; eta must be 0."""
        if eta != 0.0:
            raise ValueError(f"eta must be 0: the reversed ODE has no noise; got {shown(eta)}")
        out = self.p_mean_variance(
            model,
            x,
            t,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            model_kwargs=model_kwargs,
        )
        x0 = out["pred_xstart"]
        sample = self._mixture("reverse", x0, x, self._t(t, x), ("x0", "x"))
        return {"sample": sample, "pred_xstart": x0}

    # ---- chains ----------------------------------------------------------------------------------

    def p_sample_loop(
        self,
        model: Callable[..., Any],
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        cond_fn: Hook = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Tensor:
        """x_0 by Algorithm 2: (N, C, ...) = shape.

        noise: x_T, by default torch.randn of the shape;  device: the model's unless given
        """
        return _last(
            self.p_sample_loop_progressive(
                model, shape, noise=noise, clip_denoised=clip_denoised, denoised_fn=denoised_fn,
                cond_fn=cond_fn, model_kwargs=model_kwargs, device=device, progress=progress,
            )
        )  # fmt: skip

    def p_sample_loop_progressive(
        self,
        model: Callable[..., Any],
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        cond_fn: Hook = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        """What p_sample returns, step after step."""

        def step(x: Tensor, t: Tensor) -> dict[str, Tensor]:
            return self.p_sample(
                model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn,
                cond_fn=cond_fn, model_kwargs=model_kwargs,
            )  # fmt: skip

        return self._chain(step, model, shape, noise, device, progress)

    def ddim_sample_loop(
        self,
        model: Callable[..., Any],
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        cond_fn: Hook = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Tensor:
        """x_0 by DDIM, as p_sample_loop."""
        return _last(
            self.ddim_sample_loop_progressive(
                model, shape, noise=noise, clip_denoised=clip_denoised, denoised_fn=denoised_fn,
                cond_fn=cond_fn, model_kwargs=model_kwargs, device=device, progress=progress,
                eta=eta,
            )
        )  # fmt: skip

    def ddim_sample_loop_progressive(
        self,
        model: Callable[..., Any],
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Hook = None,
        cond_fn: Hook = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[dict[str, Tensor]]:
        """What ddim_sample returns, step after step."""

        def step(x: Tensor, t: Tensor) -> dict[str, Tensor]:
            return self.ddim_sample(
                model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn,
                cond_fn=cond_fn, model_kwargs=model_kwargs, eta=eta,
            )  # fmt: skip

        return self._chain(step, model, shape, noise, device, progress)

    def _chain(
        self,
        step: Step,
        model: Callable[..., Any],
        shape: Sequence[int],
        noise: Tensor | None,
        device: torch.device | str | None,
        progress: bool,
    ) -> Iterator[dict[str, Tensor]]:
        """step's results from x_T to x_0. Gradients are off in steps alone, not where the caller
        looks at a result.
        """
        if not isinstance(shape, (tuple, list)) or len(shape) < 2:
            raise ValueError(f"shape must be a tuple (N, C, ...); got {shown(shape)}")
        shape = tuple(check_count("a dimension of shape", size) for size in shape)
        place = arguments.device_of(model, device)
        if noise is None:
            x = torch.randn(shape, device=place, dtype=torch.float32)
        elif not isinstance(noise, Tensor) or noise.shape != shape or noise.device != place:
            got = f"{tuple(noise.shape)} on {noise.device}" if isinstance(noise, Tensor) else noise
            raise ValueError(f"noise must be a tensor of shape {shape} on {place}; got {got}")
        else:
            x = noise
        for i in tqdm(range(self.num_timesteps - 1, -1, -1), disable=not progress):
            t = torch.full(shape[:1], i, dtype=torch.int64, device=place)
            with torch.no_grad():
                out = step(x, t)
            x = out["sample"]
            yield out

    # ---- helpers ---------------------------------------------------------------------------------

    def _is_whole(self) -> bool:
        """Whether a step is what this class says, and no part of it someone else's."""
        return all(
            getattr(getattr(self, name), "__func__", None) is getattr(Sampling, name)
            for name in PARTS
        )

    def _step(
        self,
        x: Tensor,
        output: Tensor,
        t: Tensor,
        noise: Tensor,
        table: Tensor,
        *,
        clip: bool,
        prediction: Any,
        word: Tensor | None = None,
    ) -> Tensor:
        """ops.posterior_step, of float32 or float64 images of any number of dimensions."""
        dtype = compute_dtype(x, output)
        images, said, z = (as_images(tensor.to(dtype)) for tensor in (x, output, noise))
        sample = ops.posterior_step(
            images, said, t, table, z=z, clip=bool(clip), prediction=prediction,
            log_variance=None if word is None else as_images(word.to(dtype)),
            learned_range=word is not None and self._variance == "learned_range",
        ).reshape(x.shape)  # fmt: skip
        # Their mean begins with what the model says of x0 or x_{t-1}, or with x_t for eps; noise is
        # drawn like what comes of it.
        return laid_out_as(sample, x if prediction == "eps" else output)


def _last(chain: Iterator[dict[str, Tensor]]) -> Tensor:
    out: dict[str, Tensor] = collections.deque(chain, maxlen=1).pop()
    return out["sample"]
