"""What a caller gives for the images of a set: where each begins, what the network is told of it,
whose noise it takes. Checked before any work begins, and handed out batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastddpm import arguments, digest
from fastddpm.ops import checks
from fastddpm.schedule import check_count
from fastddpm.torch_noise import Draw, TorchNoise

# Options of `sample` that not every way of sampling takes.
BATCHES = ("batch_size", "distributed")
BEGINNING = ("x_T", "init", "start", "generator", "on_step")
CONTAINERS = (dict, list, tuple)
HOOKS = ("denoised_fn", "cond_fn", "self_condition")


def count(n: Any, default: int, **images: Any) -> Any:
    """n, or where it is None as many as there are `images`, else `default`."""
    if n is not None:
        return n
    lengths = [len(x) for x in images.values() if isinstance(x, torch.Tensor) and x.dim()]
    return lengths[0] if lengths else default


def own_shape(shape: Any, **images: Any) -> Any:
    """`shape`, or where it is None that of the `images`, if there are any."""
    shapes = [x.shape[1:] for x in images.values() if isinstance(x, torch.Tensor) and x.dim() == 4]
    return tuple(shapes[0]) if shape is None and shapes else shape


def own_noise(generator: Any, seed: int, first_index: int) -> bool:
    """Whether generators draw the noise; ValueError where the seed is said as well."""
    if generator is None:
        return False
    for name, value in {"seed": seed, "first_index": first_index}.items():
        if value:
            raise ValueError(
                f"generator and {name} both say whose noise is drawn: give one of them; got "
                f"{name} = {value}"
            )
    return True


def refuse(function: str, options: dict[str, Any], names: Sequence[str]) -> None:
    """ValueError for an option of `sample` that a function has no use for; one left at its default
    is taken out."""
    for name in names:
        value = options.pop(name, None)
        if value is not None and value is not False:
            raise ValueError(f"{function} takes no {name}: fastddpm.sample does")


class Given:
    """What is given for the n images first ... of a set.

    x_T:          (n, C, H, W) float, where the chain begins: at x_T, or at x_t with `start`
    init:         (n, C, H, W) uint8 or float in [-1, 1], noised to x_t, t = `start`
    start:        steps of the chain that are left at its beginning, 1 .. T; None: all T
    model_kwargs: tensors whose first dimension is n, in dicts, lists and tuples too, are cut with
                  the batches and moved to the device; all else is passed as it is
    generator:    see TorchNoise

    ValueError names what does not fit."""

    def __init__(
        self,
        n: int,
        first: int,
        shape: Sequence[int],
        T: int,
        device: torch.device,
        *,
        x_T: Any = None,
        init: Any = None,
        start: Any = None,
        model_kwargs: Mapping[str, Any] | None = None,
        generator: Any = None,
    ):
        self.n, self.first, self._device = n, first, device
        if x_T is not None and init is not None:
            raise ValueError("x_T and init both say where the chain begins: give one of them")
        self.start = T if start is None else check_count("start", start, T)
        if init is not None and start is None:
            raise ValueError(
                f"init needs start, the step of 1 .. {T} to which the images are noised: the "
                "larger, the less is left of them"
            )
        if self.start < T and x_T is None and init is None:
            raise ValueError(
                f"start = {start} of {T} steps begins at an x_t: give it as x_T, or images as init"
            )
        self.x_T = None if x_T is None else _latents(x_T, (n, *shape))
        self.init = None if init is None else _images(init, (n, *shape))
        self._kwargs = dict(model_kwargs or {})
        for name, value in _leaves("model_kwargs", self._kwargs):
            if isinstance(value, np.ndarray) and value.shape[:1] == (n,):
                raise ValueError(
                    f"{name} is an array of {n}, one for each image, which must be a tensor to be "
                    "cut with the batches: pass torch.from_numpy of it"
                )
        self.noise = None if generator is None else TorchNoise(generator, n, shape, device)

    def rows(self, index: torch.Tensor) -> slice:
        """Which of the n images the sample numbers `index`, one after the other, are."""
        start = int(index[0]) - self.first
        return slice(start, start + len(index))

    def stream(self, rows: slice) -> Draw | None:
        return None if self.noise is None else self.noise.stream(rows)

    def kwargs(self, rows: slice) -> dict[str, Any]:
        self.check_batches({rows.stop - rows.start})
        return {name: self._cut(value, rows) for name, value in self._kwargs.items()}

    def check_batches(self, sizes: set[int]) -> None:
        """ValueError for a tensor that is as long as a batch of these sizes, and not as the set."""
        for name, value in _leaves("model_kwargs", self._kwargs):
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                continue
            if len(value) != self.n and len(value) > 1 and len(value) in sizes:
                raise ValueError(
                    f"{name} has the length {len(value)} of a batch, and not of all {self.n} "
                    "images: give one for each, or shared ones with a first dimension of 1"
                )

    def _cut(self, value: Any, rows: slice) -> Any:
        """What of a value is of these images; the value itself, if none of it is cut."""
        if isinstance(value, torch.Tensor):
            per_image = value.dim() > 0 and len(value) == self.n
            return value[rows].to(self._device) if per_image else value
        if not isinstance(value, CONTAINERS):
            return value
        parts = [self._cut(part, rows) for _, part in _parts("", value)]
        if all(part is whole for part, (_, whole) in zip(parts, _parts("", value), strict=True)):
            return value
        if isinstance(value, dict):
            return dict(zip(value, parts, strict=True))
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)

    def begin(self, rows: slice) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(x_T, init) of these images on the device, where they are given. x_T is a copy, for a
        network may write into what it gets.
        """
        x_T = None
        if self.x_T is not None:
            x_T = self.x_T[rows].to(self._device, torch.float32, copy=True)
        init = None if self.init is None else self.init[rows].to(self._device)
        if init is not None and init.dtype != torch.uint8:
            init = init.float()
        return x_T, init

    def facts(self) -> dict[str, Any]:
        """What ranks that draw one set must have in common."""
        kwargs = self._kwargs
        leaves = list(_leaves("model_kwargs", kwargs))
        tensors = {k: v for k, v in leaves if torch.is_tensor(v)}
        plain = {k: v for k, v in leaves if isinstance(v, (bool, int, float, str))}
        tensors |= {} if self.x_T is None else {"x_T": self.x_T}
        tensors |= {} if self.init is None else {"init": self.init}
        said = {name: digest.of_tensors({name: tensor}, {}) for name, tensor in tensors.items()}
        state = None if self.noise is None else self.noise.states()
        return {
            "start": self.start,
            "x_T": said.get("x_T"),
            "init": said.get("init"),
            "model_kwargs": [sorted(kwargs), plain, sorted(said.items())],
            "generator": None if state is None else digest.of_tensors({"": state}, {}),
        }


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What a dict, list or tuple holds, each with its own name."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return ((f"{name}[{key!r}]", part) for key, part in pairs)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Everything in it that is no dict, list or tuple."""
    for inner, part in _parts(name, value):
        if isinstance(part, CONTAINERS):
            yield from _leaves(inner, part)
        else:
            yield inner, part


def _latents(x: Any, shape: tuple[int, ...]) -> torch.Tensor:
    _check_tensor("x_T", x, shape)
    if x.dtype not in checks.FLOATS:
        allowed = ", ".join(map(str, checks.FLOATS))
        raise ValueError(f"x_T must be one of {allowed}; got {x.dtype}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x_T must be finite; got NaN or inf")
    return x.detach()


def _images(x: Any, shape: tuple[int, ...]) -> torch.Tensor:
    _check_tensor("init", x, shape)
    arguments.check_range("init", x)
    return x.detach()


def _check_tensor(name: str, x: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name} must be a tensor {shape}; got {type(x).__name__}")
    arguments.check_pixels(name, x)
    if x.shape != shape:
        raise ValueError(
            f"{name} must be (n, C, H, W) of the n images, {shape} here; got {tuple(x.shape)}"
        )
