"""Whether a U-Net computes what its own parts say and nothing besides, so that it may be computed
in another way. Nothing is computed here."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module

from fastddpm.unet.parts import (
    AttentionBlock,
    Downsample,
    GroupNorm,
    Level,
    Middle,
    ResnetBlock,
    TimeEmbedding,
    Upsample,
    changed,
)

# What each part consists of: name -> its classes, or in brackets those of a list's members. The
# norm of an attention is read and not called; what begins with "?" may be missing.
_NORM, _CONV, _LINEAR = (GroupNorm,), (nn.Conv2d,), (nn.Linear,)
_UNET: dict[str, Any] = {
    "temb": (TimeEmbedding,), "?label_emb": (nn.Embedding,), "conv_in": _CONV, "down": [Level],
    "mid": (Middle,), "up": [Level], "norm_out": _NORM, "conv_out": _CONV,
}  # fmt: skip
_PARTS: dict[type, dict[str, Any]] = {
    TimeEmbedding: {"dense": [nn.Linear]},
    Level: {
        "block": [ResnetBlock], "attn": [AttentionBlock],
        "?downsample": (Downsample, ResnetBlock), "?upsample": (Upsample, ResnetBlock),
    },
    Middle: {"block_1": (ResnetBlock,), "attn_1": (AttentionBlock,), "block_2": (ResnetBlock,)},
    ResnetBlock: {
        "norm1": _NORM, "conv1": _CONV, "temb_proj": _LINEAR, "norm2": _NORM,
        "dropout": (nn.Dropout,), "conv2": _CONV, "?nin_shortcut": _CONV,
    },
    AttentionBlock: {"norm": (nn.GroupNorm, GroupNorm), "qkv": _LINEAR, "proj_out": _LINEAR},
    Downsample: {"conv": _CONV},
    Upsample: {"conv": _CONV},
}  # fmt: skip
_RESAMPLE = {"?downsample": "down", "?upsample": "up"}  # a residual block's, by its place
_WEIGHTED = frozenset((nn.Conv2d, nn.Linear, nn.Embedding))
_SETTINGS = frozenset((bool, int, float, str, tuple))
_HELD: dict[type, tuple[str, ...]] = {  # of those types, by the parts of a plain one
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    **dict.fromkeys((nn.GroupNorm, GroupNorm), ("num_groups", "eps")),
    AttentionBlock: ("num_heads",),
    nn.Dropout: ("p",),
    ResnetBlock: ("scale_shift", "resample"),
    **dict.fromkeys((nn.Linear, nn.ModuleList, Level), ()),
}
_CONVOLUTION: dict[str, tuple] = {  # what one of the paper's may have
    "kernel_size": ((3, 3),), "stride": ((1, 1),), "padding": ((1, 1),),
    "dilation": ((1, 1),), "groups": (1,), "padding_mode": ("zeros",),
}  # fmt: skip
_HALVING = _CONVOLUTION | {"stride": ((2, 2),), "padding": ((0, 0), (1, 1))}
_WEIGHTS = frozenset((torch.Tensor, nn.Parameter, FakeTensor))  # no quantised or sharded ones

# As they are when nobody has replaced them for all of their class.
_METHODS = tuple(
    (kind, name, getattr(kind, name))
    for kind, name in (
        *((kind, "forward") for kind in _PARTS if kind is not Level),
        *((kind, "forward") for kind in (GroupNorm, nn.Conv2d, nn.Linear, nn.Dropout)),
        *((Level, "run"), (nn.Conv2d, "_conv_forward"), (nn.Module, "__call__")),
        *((Level, "moved"), (nn.Embedding, "forward")),
    )
)


def foreign(model: nn.Module) -> str | None:
    """What in the U-Net is not its own, the part named; None for a plain one.

    Its own are the exact classes of parts.py and torch's in them, each in its place, without
    hooks or replaced forwards, with plain tensors as weights and 1x1 convolutions as shortcuts.
    `model` itself may be of any class: what it does around the parts is not asked."""
    found = _find(model)
    if found is None:
        return None
    part, what = found
    name = next((name for name, module in model.named_modules() if module is part), "")
    return f"{name or 'the model'} ({type(part).__name__}) {what}"


def unusual(model: Any) -> str | None:
    """What makes a convolution of a plain U-Net (`foreign`) another than the paper's, the layer
    named: 3x3 with zeros around, of stride 1, or in a Downsample of stride 2 with zeros around or
    after the end only. None where all are as they should; shortcuts are asked by `foreign`."""
    levels = (*model.down, *model.up)
    blocks = [m for m in model.modules() if type(m) is ResnetBlock]
    convs = [c for block in blocks for c in (block.conv1, block.conv2)]
    convs += [level.upsample.conv for level in levels if type(level.upsample) is Upsample]
    halving = [level.downsample.conv for level in levels if type(level.downsample) is Downsample]
    for conv in (model.conv_in, *convs, model.conv_out, *halving):
        is_halving = any(conv is other for other in halving)
        for name, allowed in (_HALVING if is_halving else _CONVOLUTION).items():
            if (value := getattr(conv, name)) not in allowed:
                where = next(name for name, module in model.named_modules() if module is conv)
                return f"{where} (Conv2d) has {name} {value!r}, not {allowed[0]!r}"
    return None


def settings(model: nn.Module) -> tuple[Any, ...]:
    """What a U-Net computes by beside tensors: the classes of its parts, whether they are changed,
    and the numbers and names that they and its config hold now (epsilons, groups, heads, paddings,
    rates of dropout, ...), modes aside."""
    found: list[Any] = [repr(getattr(model, "config", None))]
    for module in model.modules():
        kind, have = type(module), module.__dict__
        found += (kind, changed(module))
        if (names := _HELD.get(kind)) is not None:
            found += [have[name] for name in names]
        else:
            values = ((k, v) for k, v in have.items() if k != "training")
            found += [item for item in values if type(item[1]) in _SETTINGS]
    return tuple(found)


def _find(model: nn.Module) -> tuple[nn.Module, str] | None:
    """The first part that is not plain, and why."""
    if torch_module._has_any_global_hook():
        return model, "has hooks that are every module's"
    for kind, name, method in _METHODS:
        if getattr(kind, name) is not method:
            return model, f"has parts whose {kind.__name__}.{name} was replaced"
    waiting: list[tuple[nn.Module, dict[str, Any]]] = [(model, _UNET)]
    while waiting:
        module, names = waiting.pop()
        have = module._modules
        for name, kinds in names.items():
            part = have.get(name.lstrip("?"))
            if part is None:
                if name[0] == "?":
                    continue
                return module, f"has no part {name!r}"
            several = type(kinds) is list
            if several:
                if type(part) is not nn.ModuleList:
                    return part, "is not a part that a plan knows"
                members: Any = part._modules.values()
            else:
                members = (part,)
            for member in members:
                kind = type(member)
                if kind not in kinds:
                    return member, "is not a part that a plan knows"
                if what := changed(member):
                    return member, what
                if kind is ResnetBlock and (what := _odd_block(member, _RESAMPLE.get(name))):
                    return member, what
                if inner := _PARTS.get(kind):
                    waiting.append((member, inner))
                elif kind in _WEIGHTED and type(member._parameters.get("weight")) not in _WEIGHTS:
                    return member, "has a weight that is no plain tensor"
            if name == "?nin_shortcut" and not _is_pointwise(part):
                return part, "is not a 1x1 convolution"
            if name == "?label_emb" and (part.max_norm is not None or part.scale_grad_by_freq):
                return part, "does more than look up its rows"
    return None


def _odd_block(block: Any, resample: str | None) -> str | None:
    """What a residual block in a place where it resamples so has that no walk computes."""
    if block.resample != resample:
        return f"has resample {block.resample!r}, not {resample!r}"
    if resample is not None and "nin_shortcut" in block._modules:
        return "resamples and has a shortcut"
    return None


def _is_pointwise(conv: Any) -> bool:
    pads = set(conv.padding)
    return (
        conv.kernel_size == conv.stride == conv.dilation == (1, 1)
        and conv.groups == 1
        and (pads == {0} or conv.padding == "valid")
    )
