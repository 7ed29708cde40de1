"""Training recipes by name: Appendix B's, one a data set, and one for small machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastddpm.schedule import Variance


@dataclass(frozen=True)
class Preset:
    """A training recipe: the model's options, its variance and the trainer's."""

    model: dict[str, Any]
    variance: Variance = "fixed_large"
    batch_size: int = 128
    lr: float = 2e-4
    warmup: int = 5000
    ema_decay: float = 0.9999
    ema_warmup: bool = False
    grad_clip: float = 1.0
    flip: bool = True
    steps: int = 800_000


def _256(steps: int, *, flip: bool, **model: Any) -> Preset:
    """256x256: batches of 64, lr 2e-5, and sigma^2 = beta-tilde as the authors' scripts have it."""
    options = {"image_size": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "attention_levels": (4,)}
    return Preset(
        {**options, **model}, "fixed_small", batch_size=64, lr=2e-5, flip=flip, steps=steps
    )


PRESETS = {
    "cifar10": Preset({"image_size": 32, "dropout": 0.1}),
    "celebahq256": _256(500_000, flip=True),
    # "random horizontal flips during training for all datasets except LSUN Bedroom"
    "lsun-bedroom": _256(2_400_000, flip=False),
    "lsun-bedroom-large": _256(1_150_000, flip=False, channels=192),
    "lsun-cat": _256(1_800_000, flip=True),
    "lsun-church": _256(1_200_000, flip=True),
    # Models small enough for two CPU cores. No flips of clothes: shoes and sleeves have a side.
    "fashion-mnist": Preset(
        {
            "image_size": 28,
            "in_channels": 1,
            "channels": 16,
            "channel_mult": (1, 2, 3),
            "num_res_blocks": 1,
            "attention_levels": (2,),
            "num_groups": 8,
        },
        lr=1e-3,
        warmup=500,
        ema_decay=0.9995,
        ema_warmup=True,
        flip=False,
        steps=25_000,
    ),
    "emoji": Preset(
        {
            "image_size": 32,
            "channels": 32,
            "channel_mult": (1, 2, 2),
            "num_res_blocks": 1,
            "attention_levels": (2,),
            "num_groups": 8,
            "dropout": 0.1,
        },
        batch_size=64,
        lr=8e-4,
        warmup=500,
        ema_decay=0.9995,
        ema_warmup=True,
        steps=20_000,
    ),
}

# What was one recipe for several data sets, which the paper trained in different ways.
DIVIDED = {
    "lsun256": ("lsun-bedroom", "lsun-church", "lsun-cat"),
    "lsun256-large": ("lsun-bedroom-large",),
}


def preset(name: str) -> Preset:
    """The recipe `name`; ValueError lists the names, and says what an older one became."""
    if name in DIVIDED:
        raise ValueError(
            f"preset {name!r} is now one a data set: give {' or '.join(DIVIDED[name])}"
        )
    if name not in PRESETS:
        raise ValueError(
            f"preset must be one of {', '.join(map(repr, sorted(PRESETS)))}; got {name!r}"
        )
    return PRESETS[name]
