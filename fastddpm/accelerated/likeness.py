"""Which classes of others are a GroupNorm, a SiLU or a 3x3 convolution: by what their forward is
seen to compute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["norm", "silu"]
_NAMES = frozenset(("silu", "swish", "nonlinearity"))  # of classes, in small letters

# By class and forward: what that computes, or why it is not what it looks like.
_seen: dict[tuple[type, Any], tuple[Kind | None, str | None]] = {
    (nn.GroupNorm, nn.GroupNorm.forward): ("norm", None),
    (nn.SiLU, nn.SiLU.forward): ("silu", None),
}


def is_norm(layer: Any) -> bool:
    """Whether it computes what a GroupNorm of its num_groups, weight, bias and eps does."""
    return _look(layer)[0] == "norm" and _odd(layer) is None


def is_silu(layer: Any) -> bool:
    return _look(layer)[0] == "silu" and _odd(layer) is None


def unlike(layer: nn.Module) -> str | None:
    """Why a layer that looks like a GroupNorm or a SiLU is not taken for one, or None."""
    kind, why = _look(layer)
    return why or (_odd(layer) if kind else None)


def looks_like_convolution(layer: nn.Module) -> bool:
    """Whether it is of a class of its own that has a 3x3 convolution's tensors and name."""
    weight = layer._parameters.get("weight")
    return (
        type(layer) is not nn.Conv2d
        and "conv" in type(layer).__name__.lower()
        and weight is not None
        and weight.dim() == 4
        and weight.shape[2:] == (3, 3)
    )


def unlike_convolution(layer: nn.Module) -> str | None:
    """Why what looks like a convolution is not one of stride 1 with zeros around, or None."""
    held = {name for name, buffer in layer._buffers.items() if buffer is not None}
    if more := sorted({*layer._parameters, *layer._modules, *held} - {"weight", "bias"}):
        return f"has {more[0]}, which a convolution has not"
    channels = cast(Tensor, layer.weight).shape[1]
    return _difference(layer, _convolution, channels, "3x3 convolution with stride 1, zeros around")


def _convolution(layer: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, getattr(layer, "bias", None), padding=1)


def _look(layer: Any) -> tuple[Kind | None, str | None]:
    if not isinstance(layer, nn.Module):
        return None, None
    key = type(layer), type(layer).forward
    if key not in _seen:
        seen, of_all = _tried(layer)
        if not of_all:
            return seen
        _seen[key] = seen
    return _seen[key]


def _tried(layer: nn.Module) -> tuple[tuple[Kind | None, str | None], bool]:
    """Of a class met for the first time, and whether that is true of all of it. A norm is a
    subclass of GroupNorm that gives GroupNorm's numbers, in eval mode and in training, for a mean
    far from 0 too; one that computes in float32 whatever it is given does."""
    name = type(layer).__name__
    norm = isinstance(layer, nn.GroupNorm)
    if norm or (name.lower() in _NAMES and not list(layer.parameters())):
        if why := _odd(layer):
            return (None, why), False
        if norm:
            channels = cast(nn.GroupNorm, layer).num_channels
            why = _difference(layer, _group_norm, channels, "GroupNorm")
        else:
            why = _difference(layer, lambda _, x: F.silu(x), 8, "SiLU")
        return ((None, why) if why else ("norm" if norm else "silu", None)), True
    if "groupnorm" in name.lower():
        return (None, "only looks like a GroupNorm: its class is none of torch's"), True
    return (None, None), True


def _odd(layer: nn.Module) -> str | None:
    """What the layer holds beside what its kind holds."""
    own = _PLAIN_NORM if isinstance(layer, nn.GroupNorm) else _PLAIN_SILU
    if type(layer) in (nn.GroupNorm, nn.SiLU):
        return None
    more = layer.__dict__.keys() - own.__dict__.keys() - {"inplace"}
    more |= layer._parameters.keys() - own._parameters.keys()
    more |= {*layer._buffers, *layer._modules}
    return f"has {min(more)}, which {type(own).__name__} has not" if more else None


_PLAIN_NORM, _PLAIN_SILU = nn.GroupNorm(1, 1), nn.SiLU()


def _group_norm(layer: Any, x: Tensor) -> Tensor:
    return F.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)


@torch.no_grad()
def _difference(
    layer: nn.Module, formula: Callable[[Any, Tensor], Tensor], channels: int, name: str
) -> str | None:
    """What a copy of the layer on the CPU computes otherwise than the formula."""
    random = torch.Generator().manual_seed(0)
    try:
        layer = copy.deepcopy(layer).to("cpu", torch.float32)
        layer.__dict__.pop("forward", None)  # what stands for it
        for p in layer.parameters():
            p.copy_(_randn(random, p.shape))
        for k, training in enumerate((False, True, False)):
            layer.train(training)
            x = _randn(random, (2, channels, 4, 2 + k)) * 10.0 ** (k - 1) + k
            expected = formula(layer, x)
            with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
                found = layer(x)
            same = type(found) is Tensor and found.dtype == x.dtype
            small = 1e-5 * float(expected.abs().max())
            if not same or found.shape != expected.shape:
                return f"only looks like a {name}: its result has another shape or dtype"
            if not torch.allclose(found, expected, rtol=1e-5, atol=small):
                return f"only looks like a {name}: its forward computes something else"
    except Exception as error:  # what a forward of any kind raises
        return f"only looks like a {name}: its forward raises {type(error).__name__}"
    return None


def _randn(random: torch.Generator, shape: Sequence[int]) -> Tensor:
    return torch.randn(shape, generator=random, dtype=torch.float32, device="cpu")
