"""`fastddpm convert`: its options, one call of the library, and its report."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, get_args

from tabulate import tabulate

from fastddpm import console
from fastddpm.cli.arguments import alone, path, size
from fastddpm.convert import Format, convert
from fastddpm.diffusion import Prediction
from fastddpm.integrations.containers import Weights
from fastddpm.integrations.files import SCHEDULES, process_said
from fastddpm.schedule import Variance

# Options of `UNet.from_pretrained`, which get None where they are not given.
OPTIONS = (
    "weights", "allow_pickle", "variant", "image_size", "dropout", "num_heads", "head_dim",
    "num_groups", "new_attention_order", "timesteps", "schedule", "prediction", "variance",
    "rescale_timesteps",
)  # fmt: skip


def run(a: argparse.Namespace) -> None:
    alone("a conversion")
    options = {name: value for name in OPTIONS if (value := getattr(a, name)) is not None}
    model, origin = convert(a.source, a.folder, to=a.to, **options)
    parameters = sum(p.numel() for p in model.parameters())
    height, width = model.image_size
    rows = {
        "read": f"{origin} of {a.source}",
        "network": f"{parameters:,} parameters, {model.in_channels}x{height}x{width}",
        "process": process_said(model.diffusion),
        "not said": origin.assumed(),
        "wrote": f"{a.folder} ({a.to})",
    }
    console.say(tabulate([row for row in rows.items() if row[1]], tablefmt="plain"))


def add_options(p: argparse.ArgumentParser) -> None:
    add: Callable[..., Any] = p.add_argument
    add("source", type=path, metavar="A", help="a checkpoint, a folder, or a bundled model's name")
    add("folder", type=path, metavar="B", help="the folder to write, which must not be there")
    add("--to", default="fastddpm", choices=get_args(Format), help="(default: fastddpm)")
    add("--weights", choices=get_args(Weights), help="of a training checkpoint (default: ema)")
    _flag(add, "--allow-pickle", "read a .pt or .ckpt, tensors and plain containers alone")
    add("--variant", help="of a diffusers folder: fp16, ...")
    told = p.add_argument_group(
        "what weights do not say", "By default as in the project that wrote them; it is printed."
    ).add_argument
    told("--image-size", type=size, help="64, or height x width as 64x48")
    told("--dropout", type=float)
    told("--num-heads", type=int, help="attention heads of OpenAI's UNetModel")
    told("--head-dim", type=int, help="channels a head, its num_head_channels")
    told("--num-groups", type=int, help="groups of every norm")
    _flag(told, "--new-attention-order", "OpenAI's use_new_attention_order")
    told("--timesteps", type=int, help="steps of the process")
    told("--schedule", choices=SCHEDULES)
    told("--prediction", choices=get_args(Prediction))
    told("--variance", choices=get_args(Variance))
    _flag(told, "--rescale-timesteps", "the network gets t * 1000 / T", no=True)


def _flag(add: Callable[..., Any], name: str, help: str, *, no: bool = False) -> None:
    """True where it is given, None where it is not."""
    action = argparse.BooleanOptionalAction if no else "store_true"
    add(name, action=action, default=None, help=help)
