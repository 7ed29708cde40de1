"""Gradients of convolutions' weights on the CPU: the native kernels against sums in float64."""

from __future__ import annotations

import pytest
from sanitized import EMULATED, FLAGS, Compiler, needs_compiler, run_checks

from fastddpm import _native


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return Compiler(tmp_path_factory.mktemp("objects"))


COMMON, BF16 = ("weight_gradient_check", "layers/weight_gradient"), "layers/weight_gradient_bf16"
STRONGEST = [isa for isa in FLAGS if isa in _native.isas_available()][-1:]


@needs_compiler
@pytest.mark.parametrize("isa", sorted({"plain", *STRONGEST}))
def test_sums_bits_and_memory(isa, compiled, tmp_path):
    """All algorithms and shapes, equal bits for every number of threads and division into calls,
    under AddressSanitizer and UndefinedBehaviorSanitizer in memory full of NaN."""
    objects = [compiled(stem, *FLAGS[isa]) for stem in (*COMMON, BF16)]
    printed = run_checks(tmp_path, objects, "direct", "winograd_2", "winograd_4", "bf16")
    assert "0 of the gradients are wrong" in printed


@needs_compiler
@pytest.mark.parametrize("isa", EMULATED)
def test_bf16_instructions(isa, compiled, tmp_path):
    """The same for kernels of bfloat16 instructions, which run on any processor here."""
    objects = [compiled(stem) for stem in COMMON] + [compiled(BF16, *EMULATED[isa])]
    assert "0 of the gradients are wrong" in run_checks(tmp_path, objects, "bf16")
