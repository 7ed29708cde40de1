"""The variational bound in bits/dim (DDPM Eq. 5, 13), term by term. No rate-distortion, no FID."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastddpm import arguments
from fastddpm.batching import Batches, batch_size_for
from fastddpm.chain import named_arguments
from fastddpm.diffusion import Diffusion, Model
from fastddpm.engine import make_engine, runnable
from fastddpm.engine.eager import Eager
from fastddpm.engine.terms import Step, Terms
from fastddpm.evaluation.strata import Strata, check_terms, pilot_images, pilot_terms, weights
from fastddpm.given import Given
from fastddpm.host import own_state
from fastddpm.networks import check_call
from fastddpm.options import check_flag
from fastddpm.precision import float32_kept
from fastddpm.progress import tqdm
from fastddpm.schedule import check_count
from fastddpm.spacing import Spacing
from fastddpm.unet import UNet

LARGEST_BATCH = 64  # on a CPU


@dataclass(frozen=True)
class BitsPerDim:
    """The bound of each image and its parts; float32 on the model's device, or on that of the
    images for a callable that has none.

    total (N,) = prior (N,) + terms.sum(1);  terms (N, T): column 0 the decoder L_0, column t the KL
    L_t; mse (N, T): mean squared error of the x0 prediction at t, for images in [-1, 1]. All but
    mse are bits/dim.

    With terms=K both have unbiased estimates, 0 where a step was not drawn, and `error` (N,) is the
    standard error of each total over the draw of its steps; else it is None."""

    total: torch.Tensor
    prior: torch.Tensor
    terms: torch.Tensor
    mse: torch.Tensor
    error: torch.Tensor | None = None


@own_state()
def bits_per_dim(
    model: Model,
    x0: torch.Tensor,
    *,
    diffusion: Diffusion | None = None,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int | None = None,
    steps: int | str | Sequence[int] | None = None,
    spacing: Spacing = "strided",
    terms: int | None = None,
    clip: bool = True,
    model_kwargs: dict[str, Any] | None = None,
    precision: str = "fp32",
    engine: str = "auto",
    progress: bool = True,
) -> BitsPerDim:
    """An upper bound on -log2 p(x0) / D for each image: L_T + sum of L_t + L_0   (DDPM Eq. 5).

    x0:    (N, C, H, W) uint8; image k's x_t takes the noise randn(step=t) of sample first_index +
           k, one draw a step, so the number is a function of (model, x0, seed)
    steps, spacing: the bound of a shorter chain (None: all T), see Schedule.respace
    terms: K in 3 .. T: an unbiased estimate of the number that all T terms would give, from K of
           them for each image, one network pass each. L_0 is always among them. A pilot of up to 8
           of the images, at 32 steps evenly spaced in log(t + 1), says w_t = sqrt(E L_t^2), between
           its steps by interpolation. C, of which even shares of w ask once or more, is computed
           for every image; of the others R, k = K - |C| are drawn, one in each of k strata:

               total = L_T + sum of L_t over C + 1/k sum over j of L_{t_j} / p_{t_j},
               t_j = F^-1((j + U_j) / k), U_j uniform in (0, 1), F the distribution of
               p_t = 0.9 w_t / sum of w over R + 0.1 / |R|

           t_j is a function of (seed, sample number, w). `error` is what differs between strata
    clip:  clip the x0 prediction to [-1, 1], as sampling does; without, it is the bound of
           sample(clip=False)
    model_kwargs: what the model gets beside x_t and t, {"y": labels} say: a tensor of as many rows
           as there are images is cut into batches with them, anything else is passed as it is
    precision, engine: as sample's

    Raises ValueError for anything but uint8 images, FloatingPointError when the bound is not
    finite: it names the first such image and step. The prior term is exact, in float64.
    """
    if not isinstance(x0, torch.Tensor):
        raise ValueError(f"x0 must be a tensor (N, C, H, W); got {type(x0).__name__}")
    if x0.dtype != torch.uint8 or x0.dim() != 4 or len(x0) == 0:
        raise ValueError(f"x0 must be (N, C, H, W) uint8, N >= 1; got {tuple(x0.shape)} {x0.dtype}")
    arguments.check_pixels("x0", x0)
    index = arguments.sample_indices(len(x0), first_index)
    likelihood = Likelihood(
        model, len(x0), tuple(x0.shape[1:]), x0.device, diffusion=diffusion, seed=seed,
        first_index=first_index, steps=steps, spacing=spacing, terms=terms, clip=clip,
        model_kwargs=model_kwargs, precision=precision, engine=engine,
    )  # fmt: skip
    batches = likelihood.batches(batch_size)
    x0 = x0.to(likelihood.device)
    with Passes(progress) as passes:
        strata = likelihood.strata(lambda part: x0[torch.from_numpy(part).to(x0.device)], passes)
        passes.expect(len(x0) * likelihood.passes)
        parts = batches.draw(
            lambda part: likelihood.of(x0[part - first_index], part, strata, passes), index, passes
        )
    fields = ("total", "prior", "terms", "mse")
    whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in fields}
    errors = [part.error for part in parts if part.error is not None]
    return BitsPerDim(**whole, error=torch.cat(errors) if errors else None)


class Likelihood:
    """A model's chain on its engine, ready to say the bound of images of one shape: what
    bits_per_dim and bound have in common. Raises ValueError for what does not fit.

    n: images of the whole set, whose first has the sample number first_index
    """

    def __init__(
        self,
        model: Model,
        n: int,
        shape: tuple[int, ...],
        device: torch.device,
        *,
        diffusion: Diffusion | None = None,
        seed: int = 0,
        first_index: int = 0,
        steps: int | str | Sequence[int] | None = None,
        spacing: Spacing = "strided",
        terms: int | None = None,
        clip: bool = True,
        model_kwargs: dict[str, Any] | None = None,
        precision: str = "fp32",
        engine: str = "auto",
    ):
        self.whole = Diffusion.of(model, diffusion)
        self.process = self.whole.respace(steps, spacing=spacing)
        self.K = check_terms(terms, self.process.T)
        self.clip, self.seed = check_flag("clip", clip), arguments.seed(seed)
        self.device = arguments.device_of(model, None, device)
        self.n, self.shape, self.first_index = n, tuple(shape), first_index
        named = named_arguments(model_kwargs)
        check_call(model, named)
        self.given = Given(n, first_index, shape, self.process.T, self.device, model_kwargs=named)
        self.engine: Eager = make_engine(
            self._engine(engine, model), model, self.process, device=self.device,
            precision=precision, clip=self.clip, model_kwargs=named,
        )  # fmt: skip
        if isinstance(network := runnable(model), UNet):
            network.check_labels(named.get("y"), n, wait=True)
            _check_finite(network)
        self._terms = Terms(self.engine, self.seed)

    def _engine(self, name: str, model: Model) -> str:
        """The engine to ask for: a plan of a GPU runs all images of a batch at one step."""
        if self.K is None or self.device.type != "cuda":
            return name
        if name == "cuda_plan":
            raise ValueError(
                "engine 'cuda_plan' runs all images of a batch at one step, and with terms each "
                "has its own: 'cuda_graph' and 'eager' do that"
            )
        return "cuda_graph" if name == "auto" and isinstance(runnable(model), UNet) else name

    @property
    def passes(self) -> int:
        """Network passes for each image."""
        return self.process.T if self.K is None else self.K

    def batches(self, batch_size: int | None) -> Batches:
        if batch_size is not None:
            return Batches(check_count("batch_size", batch_size))
        most = batch_size_for(self.engine.model, self.shape, self.engine.precision, self.device)
        return Batches(most if self.device.type == "cuda" else min(LARGEST_BATCH, most))

    def strata(self, images: Callable[[np.ndarray], torch.Tensor], passes: Passes) -> Strata | None:
        """Which terms the images get, by a pilot of some of them; None: all.

        images: the images of these places in the set, uint8
        """
        if self.K is None:
            return None
        return Strata.of(self.pilot(images, passes), self.K)

    def pilot(self, images: Callable[[np.ndarray], torch.Tensor], passes: Passes) -> np.ndarray:
        """The weight of each step, (T,)."""
        places, grid = pilot_images(self.n), pilot_terms(self.process.T)
        passes.expect(len(places) * len(grid))

        def terms(part: torch.Tensor) -> torch.Tensor:
            x0 = images(part.numpy()).to(self.device)
            one = lambda: passes.update(1)  # noqa: E731
            return self._run(x0, part + self.first_index, grid.tolist(), one)[0]

        # One by one: their places do not follow one another, as what model_kwargs cut does.
        seen = [terms(torch.from_numpy(places[k : k + 1])) for k in range(len(places))]
        passes.end()
        return weights(grid, torch.cat(seen).cpu().numpy(), self.process.T)

    def of(
        self,
        x0: torch.Tensor,
        index: torch.Tensor,
        strata: Strata | None,
        passes: Passes | None = None,
    ) -> BitsPerDim:
        """The bound of the images x0, uint8, of the sample numbers `index`, (n,) on the CPU, one
        after the other; all of them at a time."""
        x0 = x0.to(self.device)

        def on_step() -> None:
            if passes is not None:
                passes.update(len(x0))

        prior = self.process.prior_kl(x0)
        if strata is None:
            terms, mse = self._run(x0, index, range(self.process.T), on_step)
            return BitsPerDim(prior + terms.sum(dim=1), prior, terms, mse)
        drawn = strata.drawn(self.seed, index.to(self.device))
        columns: list[Step] = [*strata.certain.tolist(), *drawn.unbind(1)]
        parts = self._run(x0, index, columns, on_step)
        fixed = len(strata.certain)
        terms, mse = (strata.estimate(x[:, :fixed], x[:, fixed:], drawn) for x in parts)
        error = strata.error(parts[0][:, fixed:], drawn)
        total = prior.double() + terms.sum(dim=1)
        return BitsPerDim(total.float(), prior, terms.float(), mse.float(), error.float())

    def _run(
        self,
        x0: torch.Tensor,
        index: torch.Tensor,
        columns: Sequence[Step],
        on_step: Callable[[], object],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kwargs: Mapping[str, Any] = self.given.kwargs(self.given.rows(index))
        with float32_kept(self.engine.precision, self.device):
            return self._terms(x0, index.to(self.device), columns, kwargs, on_step)


def _check_finite(model: UNet) -> None:
    """FloatingPointError names a parameter that is not: no image's bound would be, either."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise FloatingPointError(f"the model's {name} holds a NaN or an infinity")


class Passes:
    """A bar over the network passes of all images; batching's Progress."""

    def __init__(self, progress: bool):
        self._bar = tqdm(unit="pass", desc="bits/dim", unit_scale=True, disable=not progress)
        self._done = 0

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def expect(self, passes: int) -> None:
        """So many more."""
        self._bar.total = (self._bar.total or 0) + passes
        self._bar.refresh()

    def update(self, images: int) -> None:
        self._bar.update(images)

    def begin(self, batches: int) -> None:
        self._bar.n = self._done

    def end(self) -> None:
        self._done = self._bar.n
