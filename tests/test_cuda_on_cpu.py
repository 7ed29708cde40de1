"""The emulator finds what is wrong, and the CUDA kernels pass once more under its checking builds.

That they are right is in the tests of the ops, where the backend "cuda" is the plain build.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import cuda_on_cpu
import pytest
from conftest import REQUIRED

HERE = Path(__file__).parent
# Without what only repeats the same kernels on more or larger cases.
MATRIX = "cuda and not compile and not million and not sum_to_one and not every_step and not 257"

# kernel -> what finds its mistake, in which builds
WRONG = {
    "past_the_end": {"address": "heap-buffer-overflow"},
    "past_shared": {"address": "out of bounds|global-buffer-overflow"},
    "past_dynamic_shared": {"address": "heap-buffer-overflow"},
    "misaligned": {"address": "misaligned address"},
    "reverse": {"races": "a race in shared memory"},
    "exchange": {"races": "a race in shared memory"},
    "between_blocks": {"races": "a race in global memory"},
    **{
        name: dict.fromkeys(cuda_on_cpu.BUILDS, message)
        for name, message in {
            "half_a_warp": "deadlock",
            "two_masks": "mask names a lane that is not there",
            "barrier_in_a_branch": "wait at different __syncthreads",
            "shared_limit": "no device takes this launch",
        }.items()
    },
}
CASES = [(name, build) for name, builds in WRONG.items() for build in builds]


def sanitized(**options: str) -> dict[str, str]:
    """The environment in which a sanitizer's error ends the process; leaks are Python's affair."""
    return {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", **options}


def available(make):
    """make(), or a skip with the reason: a failure where CUDA's kernels have to run."""
    try:
        return make()
    except cuda_on_cpu.Unavailable as reason:
        return (pytest.fail if "cuda" in REQUIRED else pytest.skip)(str(reason))


@pytest.mark.parametrize(("name", "build"), CASES)
def test_every_mistake_is_found(name, build):
    program = available(lambda: cuda_on_cpu.wrong_kernels(build))
    runs = [
        subprocess.run(
            [program, kernel], env=sanitized(), capture_output=True, text=True, timeout=60
        )
        for kernel in (name, f"{name}_wrong")
    ]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[1].returncode != 0
    assert re.search(WRONG[name][build], runs[1].stderr), runs[1].stderr


@pytest.mark.slow
@pytest.mark.parametrize("build", ["address", "races"])
def test_the_ops_pass_in_a_checking_build(build):
    available(lambda: cuda_on_cpu.library(build))
    options = {"FASTDDPM_CUDA_ON_CPU": build, "FASTDDPM_REQUIRE_BACKENDS": "cuda"}
    if build == "address":
        options["LD_PRELOAD"] = cuda_on_cpu.sanitizer_libraries()
    files = [
        str(HERE / f"test_{op}.py")
        for op in (
            *("randn", "noise", "posterior_step"),
            *("group_norm_silu", "discretized_log_likelihood"),
        )
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", MATRIX, *files],
        env=sanitized(**options), cwd=HERE.parent, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert re.search(r"\d+ passed", done.stdout)
    assert "skipped" not in done.stdout.splitlines()[-1]
