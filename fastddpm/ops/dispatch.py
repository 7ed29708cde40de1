"""Which backend runs an op: the one that was forced, or the fastest that can."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import Any

import torch

from fastddpm.ops.checks import strict
from fastddpm.schedule import check_choice

OPS = (
    "randn",
    "choices",
    "noise",
    "posterior_step",
    "group_norm_silu",
    "group_norm_silu_backward",
    "residual_sum",
    "attention_block",
    "attention_block_backward",
    "convolution",
    "convolution_backward",
    "discretized_log_likelihood",
    "vlb_term",
    "squared_error",
    "squared_error_backward",
    "adam",
    "grad_norm",
)
MODULES = {
    "reference": "fastddpm.reference",
    "cpu": "fastddpm.ops.cpu",
    "cuda": "fastddpm.ops.cuda",
    "triton": "fastddpm.ops.triton",
}
BACKENDS = tuple(MODULES)
CHOICES = ("auto", *BACKENDS)

# Fastest first, by the type of the device that the tensors are on. Where Triton's interpreter runs
# its kernels on CPU tensors it is there to be forced, for tests: nothing is slower.
_PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


class BackendError(RuntimeError):
    """A backend that was forced is missing, or FASTDDPM_STRICT=1 refuses a slower one."""


class Backend:
    """A module with the functions of fastddpm.reference, all of them or some.

    missing: None, or why none of them can run here
    """

    def __init__(self, name: str):
        self.name = name
        self.module: ModuleType | None = None
        self.missing: str | None = None
        try:
            self.module = importlib.import_module(MODULES[name])
        except Exception as error:  # whatever a missing driver or compiler makes of an import
            self.missing = f"{MODULES[name]} does not import ({error})"
            return
        self._unsupported = getattr(self.module, "unsupported", None)
        if self._unsupported is not None:
            self.missing = self._unsupported("randn")
        if self.missing is None and name == "cuda" and not torch.cuda.is_available():
            self.missing = "torch finds no CUDA device"

    def unsupported(self, op: str, *tensors: torch.Tensor | None, **options: Any) -> str | None:
        """Why this backend can't run `op` on these tensors, or None if it can."""
        if self.missing is not None:
            return self.missing
        if not hasattr(self.module, op):
            return f"{op} has no {self.name} version"
        return self._unsupported and self._unsupported(op, *tensors, **options)


@functools.cache
def load(name: str) -> Backend:
    """The backend of this name, imported when it is first asked for."""
    return Backend(name)


def choose(
    op: str, *tensors: torch.Tensor | None, order: tuple[str, ...] | None = None, **options: Any
) -> Any:
    """The backend module that runs `op` on `tensors`, the first of which is given.

    order: backends to try, where this case has an order of its own, fastest first
    options: what else the op was told that a backend may not be able to do, such as dtype

    Raises RuntimeError if the forced backend is missing, ValueError if it can't do this case.
    """
    if _forced != "auto":
        check_forced()
        return _require(_forced, op, *tensors, **options).module
    device = tensors[0].device.type  # type: ignore[union-attr]
    for name in order or _PREFERENCE.get(device, ()):
        backend = load(name)
        if backend.unsupported(op, *tensors, **options) is None:
            return backend.module
    _report_fallback(device)
    return load("reference").module


def forced() -> str:
    """The name of the backend that was forced, or "auto"."""
    check_forced()
    return _forced


def check_forced() -> None:
    """ValueError, with the choices, if FASTDDPM_BACKEND names no backend. Importing is no error: a
    report can say so, and use_backend() mend it.
    """
    check_choice("FASTDDPM_BACKEND", _forced, CHOICES)


def problem() -> str | None:
    """What check_forced() raises, for reports; None if nothing is wrong."""
    try:
        check_forced()
    except ValueError as error:
        return str(error)
    return None


def _require(name: str, op: str, *tensors: torch.Tensor | None, **options: Any) -> Backend:
    backend = load(name)
    if backend.missing is not None:
        raise BackendError(f"backend {name!r} can't run here: {backend.missing}")
    reason = backend.unsupported(op, *tensors, **options)
    if reason is not None:
        able = [f"'{other}'" for other in BACKENDS if load(other).unsupported(op) is None]
        raise ValueError(
            f"{op} can't run on the backend {name!r}, which was forced: {reason}; "
            f"backends that have {op} here: {', '.join(able)}"
        )
    return backend


@functools.cache
def _report_fallback(device: str) -> None:
    """Say once that tensors on this device run on `reference` for want of anything faster.

    A case that an installed backend leaves to the reference, float64 say, is no surprise.
    """
    backends = [load(name) for name in _PREFERENCE.get(device, ())]
    if not backends or any(backend.missing is None for backend in backends):
        return
    reasons = "; ".join(f"{backend.name}: {backend.missing}" for backend in backends)
    report_slower(f"fastddpm runs its slow reference ops on {device} ({reasons})")


def report_slower(message: str) -> None:
    """Warn of what runs slower than was to be expected; FASTDDPM_STRICT=1 makes it an error."""
    if strict():
        raise BackendError(f"{message}; FASTDDPM_STRICT=1 makes this an error")
    warnings.warn(message, RuntimeWarning, stacklevel=4)


class use_backend:  # a function to its users
    """Force a backend for every op of the process: "reference", "cpu", "cuda", "triton"; or "auto".

    As a plain call it holds from there on; as a context manager, until the block ends. All threads
    see it, those of autograd among them. Raises ValueError for an unknown name and RuntimeError,
    with the reason, for a backend that can't run here.
    """

    def __init__(self, name: str):
        global _forced
        check_choice("backend", name, CHOICES)
        if name != "auto" and load(name).missing is not None:
            raise BackendError(f"backend {name!r} can't run here: {load(name).missing}")
        self._previous, _forced = _forced, name

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        global _forced
        _forced = self._previous


def matrix() -> dict[str, dict[str, dict[str, Any]]]:
    """For each op and each backend: what `fastddpm doctor` prints.

    available: it can run here;  reason: None, or why not
    cpu, cuda: it is what float32 tensors on that device will use
    """
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for op in OPS:
        reasons = {name: load(name).unsupported(op) for name in BACKENDS}
        table[op] = {
            name: {"available": reason is None, "cpu": False, "cuda": False, "reason": reason}
            for name, reason in reasons.items()
        }
        for device in devices:
            order = (*_PREFERENCE[device], "reference")
            if _forced != "auto":
                probe = torch.empty(0, dtype=torch.float32, device=device)
                able = _forced in BACKENDS and load(_forced).unsupported(op, probe) is None
                order = (_forced,) if able else ()
            used = next((n for n in order if reasons[n] is None and _takes(n, device)), None)
            if used is not None:
                table[op][used][device] = True
    return table


def _takes(name: str, device: str) -> bool:
    """Triton's interpreter, where it is asked for, is on the CPU alone."""
    return name != "triton" or getattr(load(name).module, "DEVICE", device) == device


_forced = os.environ.get("FASTDDPM_BACKEND") or "auto"
