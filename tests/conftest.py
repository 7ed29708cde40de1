"""Fixtures of every test: one backend after the other, and the device its tensors live on."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `compare`: importlib mode adds no folder

if os.environ.get("FASTDDPM_CUDA_ON_CPU"):  # a build of the emulator: no card is meant
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import card

if not card.VISIBLE:  # Triton reads it when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

import cuda_on_cpu  # noqa: E402
import matrix  # noqa: E402

from fastddpm.ops import dispatch  # noqa: E402

torch.set_num_threads(1)  # the tensors are small; tests of threads set their own number
hypothesis.settings.register_profile(
    "fastddpm", deadline=None, derandomize=True, database=None, max_examples=40
)
hypothesis.settings.load_profile("fastddpm")


def _patch_once():
    """Halve the interpreter's time: a kernel that runs has patched the language already, and each
    call of a device function in it does so once more.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if not (hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope")):
        return  # another Triton, as slow as it is
    patch = interpreter._patch_lang

    def once(function):
        modules = [x for x in function.__globals__.values() if x is tl or x is tl.core]
        done = not any(tl.core.is_builtin(module.load) for module in modules)
        return interpreter._LangPatchScope() if done else patch(function)

    interpreter._patch_lang = once


if INTERPRETED and importlib.util.find_spec("triton"):
    _patch_once()

REQUIRED = [name for name in os.environ.get("FASTDDPM_REQUIRE_BACKENDS", "").split(",") if name]


@pytest.fixture(params=dispatch.BACKENDS)
def backend(request) -> str:
    """The name of a backend, forced while the test runs.

    One that can't run here skips the test with its reason, or fails it if
    FASTDDPM_REQUIRE_BACKENDS names it.
    """
    with contextlib.ExitStack() as stack:
        reason = dispatch.load(request.param).missing
        if request.param == "cuda" and not card.VISIBLE:
            try:
                stack.enter_context(cuda_on_cpu.as_cuda_backend())
                reason = None
            except cuda_on_cpu.Unavailable as unavailable:
                reason = f"{reason}; {unavailable}"
        if reason is not None:
            outcome = pytest.fail if request.param in REQUIRED else pytest.skip
            outcome(f"{request.param}: {reason}")
        stack.enter_context(dispatch.use_backend(request.param))
        yield request.param


@pytest.fixture
def device(backend) -> torch.device:
    """Where the tensors of a test go for its backend to take them: without a GPU to the CPU, where
    the CUDA kernels are emulated and the Triton ones interpreted.
    """
    return torch.device("cuda" if backend in ON_CARD else "cpu")


def available(make):
    """make(), of the emulator, or a skip with the reason: a failure where CUDA's kernels have to
    run.
    """
    try:
        return make()
    except cuda_on_cpu.Unavailable as reason:
        return (pytest.fail if "cuda" in REQUIRED else pytest.skip)(str(reason))


@pytest.fixture
def emulated(request):
    """Forces the emulated backend, in the build that the test names."""
    build = getattr(request, "param", None)
    available(lambda: cuda_on_cpu.module(build))
    with cuda_on_cpu.as_cuda_backend(build) as module, dispatch.use_backend("cuda"):
        yield module
        module.set_device(227 << 10, 132)


# The backends that a card is for.
ON_CARD = ("cuda", *(() if INTERPRETED else ("triton",))) if card.VISIBLE else ()


def _takes_card(item) -> bool:
    """By its backend, or by the fixture that is the module of one."""
    spec = getattr(item, "callspec", None)
    given = spec.params.get("backend") if spec else None
    return given in ON_CARD or ("triton" in ON_CARD and "triton" in item.fixturenames)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(config, items):
    """Of a product of three parameters or more, Triton's interpreter gets some: the diagonals,
    in which every pair of values is met. A GPU gets all. A test of some backends' promise, marked
    `backends`, is not for the others.
    """
    left_out = [
        item
        for item in items
        if (INTERPRETED and _is_off_the_diagonals(item)) or _is_of_another_backend(item)
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    card.mark(items, _takes_card)


def _is_of_another_backend(item) -> bool:
    marker, spec = item.get_closest_marker("backends"), getattr(item, "callspec", None)
    if marker is None or spec is None or "backend" not in spec.params:
        return False
    return spec.params["backend"] not in marker.args


def _is_off_the_diagonals(item) -> bool:
    spec = getattr(item, "callspec", None)
    if spec is None or spec.params.get("backend") != "triton":
        return False
    # Not spec.indices: those count the cases of a product, not the values of its parameters.
    others = [
        next(k for k, value in enumerate(mark.args[1]) if value is spec.params[mark.args[0]])
        for mark in item.iter_markers("parametrize")
        if mark.args and mark.args[0] in spec.params
    ]
    # attention_block and its gradient are fourteen launches, the other ops one or two.
    apart = 5 if item.path.stem == "test_attention_block" else 3
    return len(others) >= 3 and sum(others) % apart != 0


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_configure(config):
    for plugin in (card, matrix):
        config.pluginmanager.register(plugin)
    if card.VISIBLE:
        for name in dispatch.BACKENDS:  # what they say is kept: not while the card is hidden
            dispatch.load(name)
    unknown = set(REQUIRED) - set(dispatch.BACKENDS)
    if unknown:
        raise pytest.UsageError(
            f"FASTDDPM_REQUIRE_BACKENDS: {sorted(unknown)} are not among {dispatch.BACKENDS}"
        )


def pytest_terminal_summary(terminalreporter):
    """What came of the backend "cuda" here: on a card there are no such lines."""
    for build in cuda_on_cpu.BUILDS:
        calls = {name: n for (made, name), n in cuda_on_cpu.CALLS.items() if made == build}
        if calls:
            counts = ", ".join(f"{name} {n}" for name, n in sorted(calls.items()))
            terminalreporter.write_line(f"calls of CUDA on the CPU, build {build}: {counts}")
