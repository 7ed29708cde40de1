"""A machine with one CUDA card, as far as torch says: in a Python that finds this folder on its
path, and in that one's children. Nobody can compute on it, so that what goes there fails.

CUDA_VISIBLE_DEVICES hides it like any other."""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from types import ModuleType

NAME, CAPABILITY, FREE, TOTAL = "A faked card", (9, 0), 60 << 30, 80 << 30


def device_count() -> int:
    return int(os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1"))


# What torch.cuda then says.
SAYS = {
    "device_count": device_count,
    "is_available": lambda: device_count() > 0,
    "get_device_name": lambda device=None: NAME,
    "get_device_capability": lambda device=None: CAPABILITY,
    "mem_get_info": lambda device=None: (FREE, TOTAL),
}


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
            vars(module).update(SAYS)

        spec.loader.exec_module = exec_module
        return spec


if __name__ == "sitecustomize":  # and not a test that wants to know what it says
    sys.meta_path.insert(0, Finder())
