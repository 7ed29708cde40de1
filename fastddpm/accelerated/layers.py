"""What stands for the `forward` of layers in a network of any kind: of a convolution, and of a
chain of GroupNorm, SiLU and convolution. Each call looks at the layers as they are then; what ours
can't take, or not as fast, is the layers' own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastddpm import ops
from fastddpm.accelerated import rules
from fastddpm.accelerated.likeness import is_norm, is_silu, unlike_convolution
from fastddpm.accelerated.state import StandIn, altered, code, same_code, settings

# As they are when nobody has replaced them for all convolutions.
_FORWARD = nn.Conv2d.forward, nn.Conv2d._conv_forward
_IDLE = {kind: kind.forward for kind in (nn.Dropout, nn.Identity)}


class Convolution(StandIn):
    """A 3x3 convolution of stride 1."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or self.steps_aside():
            return self.own(*args, **kwargs)
        conv: Any = self.module
        weight, bias = conv._parameters.get("weight"), conv._parameters.get("bias")
        large = rules.large(args[0], weight) and is_convolution(conv)
        if not large or not rules.faster(args[0], weight, bias):
            return self.own(*args, **kwargs)
        return ops.convolution(args[0], weight, bias)


class Alike(StandIn):
    """A 3x3 convolution of stride 1 of another class, which was tried; one out of a copy or a
    pickle is tried again."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.was: Any = settings(module)
        self._code: Any = code([module])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_code": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or self.steps_aside():
            return self.own(*args, **kwargs)
        have = self.module._parameters
        weight, bias = have.get("weight"), have.get("bias")
        large = rules.large(args[0], weight) and self._is_one()
        if weight is None or not large or not rules.faster(args[0], weight, bias):
            return self.own(*args, **kwargs)
        return ops.convolution(args[0], weight, bias)

    def _is_one(self) -> bool:
        """Whether the layer is what it was when it was tried."""
        layer: Any = self.module
        if self._code is None:
            self._code = code([layer])
            if unlike_convolution(layer) is not None:
                self.was = None
        same = "weight" in layer._parameters and settings(layer) == self.was
        return same and same_code(self._code, code([layer]))


class Layers(StandIn):
    """A Sequential with chains in it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or self.steps_aside():
            return self.own(*args, **kwargs)
        return run(tuple(self.module._modules.values()), args[0])


def run(layers: Sequence[Any], x: Any) -> Any:
    """The layers, one after the other, and each chain as one op."""
    i = 0
    while i < len(layers):
        norm, length = layers[i], chain(layers[i:])
        conv = layers[i + length - 1]
        if (
            length
            and rules.large(x, conv.weight)
            and not any(map(_at_work, layers[i : i + length]))
            and rules.faster(x, conv.weight, conv.bias, norm.weight, norm.bias)
        ):
            x = ops.convolution(
                x, conv.weight, conv.bias, num_groups=norm.num_groups, norm_weight=norm.weight,
                norm_bias=norm.bias, eps=norm.eps, silu=True,
            )  # fmt: skip
            i += length
        else:
            x = norm(x)
            i += 1
    return x


def _at_work(layer: Any) -> bool:
    """Whether a layer of a chain does more than the chain's op: by a hook, or as a dropout."""
    if type(layer) is nn.Dropout and layer.training and layer.p > 0:
        return True
    return altered(layer) is not None


def chain(layers: Sequence[Any]) -> int:
    """How many layers from the first on are one op: norm, SiLU, dropouts, convolution; or 0."""
    if len(layers) < 3 or not (is_norm(layers[0]) and is_silu(layers[1])):
        return 0
    at = 2
    while at < len(layers) and _IDLE.get(type(layers[at])) is type(layers[at]).forward:
        at += 1
    there = at < len(layers) and is_convolution(layers[at])
    return at + 1 if there and layers[at].in_channels == layers[0].num_channels else 0


def chains(layers: Sequence[Any]) -> bool:
    """Whether there is one in them."""
    return any(chain(layers[i:]) for i in range(len(layers)))


def is_convolution(layer: Any) -> bool:
    """Whether it is a 3x3 convolution of stride 1, as ops.convolution is."""
    own = type(layer) is nn.Conv2d and (nn.Conv2d.forward, nn.Conv2d._conv_forward) == _FORWARD
    return own and not_ours(layer) is None


def not_ours(conv: Any) -> str | None:
    """What makes a convolution another than those that ours is faster for."""
    ones = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    for name, wanted in {"kernel_size": (3, 3), **ones, "padding_mode": "zeros"}.items():
        if (value := getattr(conv, name)) != wanted:
            return f"{name} {value!r}: faster is a 3x3 one with stride 1, zeros around, one group"
    return None
