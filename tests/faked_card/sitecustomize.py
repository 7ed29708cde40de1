"""A machine with one CUDA card, as far as torch says: in a Python that finds this folder on its
path, and in that one's children. Nobody can compute on it, so that what goes there fails.

CUDA_VISIBLE_DEVICES hides it like any other."""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from types import ModuleType, SimpleNamespace

NAME, CAPABILITY, FREE, TOTAL = "A faked card", (9, 0), 60 << 30, 80 << 30


def device_count() -> int:
    return int(os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1"))


def put_into(cuda: ModuleType) -> None:
    """Make torch.cuda say that the card is there."""
    cuda.device_count = device_count
    cuda.is_available = lambda: device_count() > 0
    cuda.get_device_name = lambda device=None: NAME
    cuda.get_device_capability = lambda device=None: CAPABILITY
    cuda.mem_get_info = lambda device=None: (FREE, TOTAL)
    cuda.get_device_properties = lambda device=None: SimpleNamespace(
        name=NAME, major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=TOTAL
    )


class Finder(importlib.abc.MetaPathFinder):
    """Finds torch.cuda as the others do, and puts the card into it once it is loaded: torch itself
    is imported by those that need it only."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch.cuda":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            put_into(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
