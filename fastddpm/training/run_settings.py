"""What a run must be to go on where it was stopped, as JSON, and what differs. No tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastddpm import _native
from fastddpm.ops import dispatch
from fastddpm.unet import UNet

LATER = {
    "num_heads": None,
    "num_classes": None,
    "scale_shift_norm": False,
    "resblock_updown": False,
}


def architecture(network: torch.nn.Module) -> Any:
    """What a network computes beside its weights, JSON-ready: a UNet's options; the lines of any
    other's print-out, which has the layers with their epsilons, groups, paddings and rates.
    """
    if isinstance(network, UNet):
        return network.config
    return re.sub(r" at 0x[0-9a-f]+", "", repr(network)).splitlines()


def with_later_options(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run that may be older than some of a UNet's options: these were off."""
    model = settings.get("model")
    return {**settings, "model": {**LATER, **model}} if isinstance(model, dict) else settings


def machine(way: int, device: torch.device, ranks: int, accumulate: int) -> dict[str, Any]:
    """What may change the last bits of a step, JSON-ready.

    way: of taking steps, trainer.py's;  ranks, accumulate: what a batch is divided into"""
    facts: dict[str, Any] = {
        "device": device.type,
        "torch": torch.__version__,
        "backend": dispatch.forced(),
        "way of taking steps": way,
        "ranks": ranks,
        "accumulate": accumulate,
    }
    if device.type == "cpu":
        facts |= {"threads": torch.get_num_threads(), "instruction set": _native.isa()}
    else:
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def read_settings(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        settings = json.loads(metadata["trainer"])
    except (KeyError, ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict) or metadata.keys() != {"trainer"}:
        raise ValueError(f"{path} is not a trainer's state")
    return settings


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    return [k for k in (*here, *(there.keys() - here.keys())) if there.get(k) != here.get(k)]


def compare(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """ValueError names the first value that differs, at whatever depth; a process whole."""
    here = json.loads(json.dumps(here))  # tuples are lists there
    if not (names := differing(there, here)):
        return
    name, a, b = names[0], there.get(names[0]), here.get(names[0])
    while name != "diffusion" and isinstance(a, dict) and isinstance(b, dict):
        inner = differing(a, b)[0]
        name, a, b = f"{name}: {inner}", a.get(inner), b.get(inner)
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        k = next(k for k in range(len(a)) if a[k] != b[k])
        a, b = (a[k], b[k]) if isinstance(a[k], str) else (a, b)
    raise ValueError(f"{path}: {name} is {a!r} there and {b!r} here")
