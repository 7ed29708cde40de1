"""A machine with one CUDA card, as far as torch says, and a fastddpm that was built for it: in a
Python that finds this folder on its path, and in that one's children. Nobody can compute on it, so
that what goes there fails.

CUDA_VISIBLE_DEVICES hides it like any other."""

from __future__ import annotations

import importlib.abc
import os
import sys
from types import ModuleType, SimpleNamespace

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


def no_kernel(*arguments: object) -> None:
    raise RuntimeError("nothing can be computed on a faked card")


def as_built_for_it(native: ModuleType) -> None:
    """The native module as one with CUDA kernels."""
    if native.C is not None and not hasattr(native.C, "cuda"):
        names = (name for name in dir(native.C.cpu) if not name.startswith("_"))
        native.C.cuda = SimpleNamespace(**dict.fromkeys(names, no_kernel))
        about = {**native.C.build_info(), "cuda": "13.0", "cuda_architectures": "90-real"}
        native.C.build_info = lambda: about


CHANGES = {
    "torch.cuda": lambda cuda: vars(cuda).update(SAYS),
    "fastddpm._native": as_built_for_it,
}


class Finder(importlib.abc.MetaPathFinder):
    """Finds these modules as the others do and changes them once they are loaded, by those that
    need them."""

    def find_spec(self, name, path=None, target=None):
        if name not in CHANGES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next(spec for spec in found if spec is not None)
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            CHANGES[name](module)

        spec.loader.exec_module = exec_module
        return spec


if __name__ == "sitecustomize":  # and not a test that wants to know what it says
    sys.meta_path.insert(0, Finder())
