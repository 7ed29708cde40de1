"""Native check programs of one instruction set, compiled with sanitizers in them and run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FLAGS = {  # those of CMakeLists.txt
    "plain": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512cd"),
        *("-mavx512dq", "-mavx512vl"),
    ),
}
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
EMULATED = {  # bfloat16 instructions on any processor
    isa: ("-include", str(TESTS / "bf16_emulator.h"), "-Wno-psabi", f"-D{macro}")
    for isa, macro in {"avx512_bf16": "__AVX512BF16__", "amx_bf16": "__AMX_BF16__"}.items()
}
# What the table of an instruction set's kernels names, and those of them that multiply bfloat16.
KERNELS = (
    *("layers/way", "layers/attention", "layers/convolve", "layers/digest", "layers/images"),
    *("layers/input", "layers/pack", "layers/weight_gradient"),
    *("ops/group_norm_silu_backward", "ops/posterior_step"),
)
BF16 = (
    *("layers/attention_bf16", "layers/attention_gradient_bf16", "layers/convolve_bf16"),
    "layers/weight_gradient_bf16",
)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


class Compiler:
    """compiler(stem, *flags): the object file of tests/ or csrc/cpu/'s stem.cpp, made once."""

    def __init__(self, folder: Path):
        self.folder, self.made = folder, {}

    def __call__(self, stem: str, *flags: str) -> Path:
        made, key = self.made, (stem, flags)
        if key not in made:
            source = TESTS / f"{stem}.cpp"
            if not source.exists():
                source = TESTS.parent / f"csrc/cpu/{stem}.cpp"
            made[key] = self.folder / f"{len(made)}.o"
            subprocess.run(
                [
                    *("g++", "-std=c++17", "-O1", "-pthread", "-DFASTDDPM_ISA=plain", *SANITIZED),
                    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", *flags),
                    *("-c", source, "-o", made[key]),
                ],
                check=True, timeout=600,
            )  # fmt: skip
        return made[key]


def run_checks(folder: Path, objects: list[Path], *arguments: str) -> str:
    """What the program prints; it has to end with exit code 0."""
    subprocess.run(
        ["g++", "-pthread", *SANITIZED, *objects, "-o", folder / "check"], check=True, timeout=600
    )
    run = subprocess.run(
        [folder / "check", *arguments], capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout
