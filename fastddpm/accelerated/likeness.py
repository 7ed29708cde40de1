"""Which classes of others are a GroupNorm or a SiLU: by what their forward is seen to compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["norm", "silu"]
_NAMES = frozenset(("silu", "swish", "nonlinearity"))  # of classes, in small letters

# By class: what its forward computes, or why it is not what it looks like.
_seen: dict[type, tuple[Kind | None, str | None]] = {
    nn.GroupNorm: ("norm", None),
    nn.SiLU: ("silu", None),
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


def _look(layer: Any) -> tuple[Kind | None, str | None]:
    kind = type(layer)
    if kind not in _seen:
        _seen[kind] = _tried(layer) if isinstance(layer, nn.Module) else (None, None)
    return _seen[kind]


def _tried(layer: nn.Module) -> tuple[Kind | None, str | None]:
    """Of a class met for the first time. A norm is a subclass of GroupNorm that gives GroupNorm's
    numbers, in eval mode and in training, for a mean far from 0 too; one that computes in float32
    whatever it is given does."""
    name = type(layer).__name__
    if isinstance(layer, nn.GroupNorm):
        why = _odd(layer) or _difference(layer, _group_norm, layer.num_channels, "GroupNorm")
        return (None, why) if why else ("norm", None)
    if name.lower() in _NAMES and not list(layer.parameters()):
        why = _odd(layer) or _difference(layer, lambda _, x: F.silu(x), 8, "SiLU")
        return (None, why) if why else ("silu", None)
    if "groupnorm" in name.lower():
        return None, "only looks like a GroupNorm: its class is none of torch's"
    return None, None


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
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=random, dtype=torch.float32))
        for k, training in enumerate((False, True, False)):
            layer.train(training)
            x = torch.randn(2, channels, 4, 2 + k, generator=random, dtype=torch.float32)
            x = x * 10.0 ** (k - 1) + k
            expected, found = formula(layer, x), layer(x)
            same = isinstance(found, Tensor) and found.dtype == x.dtype
            if not same or not torch.allclose(found, expected, rtol=1e-5, atol=1e-5):
                return f"only looks like a {name}: its forward computes something else"
    except Exception as error:  # what a forward of any kind raises
        return f"only looks like a {name}: its forward raises {type(error).__name__}"
    return None
