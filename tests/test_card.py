"""The suite on a machine with a card, without one: torch is made to say that there is one, on which
nothing can be computed, so that a test that takes it by mistake fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import card
import pytest
import torch

HERE = Path(__file__).parent
FAKED = HERE / "faked_card"
CHOOSE = (
    "batching", "bits", "cli", "codec", "cuda_graph", "cuda_plan", "devices", "dispatch",
    "evaluate", "gallery", "host", "ranks", "sampling", "training", "training_step",
)  # fmt: skip


def on_faked_card(*arguments: object, **variables: str) -> str:
    """What pytest says there; no test may fail."""
    paths = str(FAKED), os.environ.get("PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if k not in (card.HIDES, "TRITON_INTERPRET")}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), **variables}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, arguments)],
        cwd=HERE.parent, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def visible() -> tuple[bool, int, str]:
    """Here, and in a child."""
    code = "import torch; print(torch.cuda.is_available())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return torch.cuda.is_available(), torch.cuda.device_count(), child.stdout.strip()


@pytest.fixture(scope="module")
def early():
    return visible()


def test_a_test_of_the_cpu_sees_none(early):
    assert early == visible() == (False, 0, "False")


@pytest.mark.gpu
def test_a_test_that_needs_it_sees_it():
    available, count, child = visible()
    assert (available, child) == (True, "True")
    assert count > 0


def test_tests_of_the_cpu_pass_beside_a_card():
    """Those that look for themselves; the command by itself and as a program; the doctor."""
    said = on_faked_card(
        "-m", "not slow", "-k", "sees or as_a_program or cuda_without_a_device or doctor",
        *(HERE / f"test_{name}.py" for name in ("card", "cli", "doctor")),
    )  # fmt: skip
    assert re.search(r"^\d+ passed, \d+ deselected", said, re.MULTILINE), said  # and none skipped


@pytest.mark.slow
def test_what_is_for_a_card_is_selected_by_its_marker():
    files = [HERE / f"test_{name}.py" for name in ("gpu", "ranks", "randn", "triton")]
    collected = on_faked_card("--collect-only", "-m", "gpu", *files)
    names = re.findall(r"^tests/test_(\w+)\.py::(.+)$", collected, re.MULTILINE)
    assert {file for file, _ in names} == {"gpu", "ranks", "randn", "triton"}
    for file, name in names:
        if file == "randn":
            assert re.search(r"\[(cuda|triton)\b", name), name
        assert "[cpu" not in name
    others = on_faked_card("--collect-only", "-m", "not gpu", *files)
    assert not re.search(r"\[(cuda|triton)\b", others)


@pytest.mark.slow
def test_the_emulated_kernels_run_beside_a_card():
    said = on_faked_card(
        "-m", "not slow", "-k", "cuda", HERE / "test_randn.py", FASTDDPM_CUDA_ON_CPU="plain",
        FASTDDPM_REQUIRE_BACKENDS="cuda",
    )  # fmt: skip
    assert re.search(r"^calls of CUDA on the CPU, build plain:.* randn \d\d+", said, re.MULTILINE)


@pytest.mark.slow
def test_what_chooses_a_device_passes_beside_a_card():
    """The tests of all that takes a device by itself, or asks torch for one."""
    said = on_faked_card(
        "-m", "not slow and not gpu",
        *(HERE / f"test_{name}.py" for name in CHOOSE),
    )  # fmt: skip
    assert re.search(r"\d{3,} passed", said)
