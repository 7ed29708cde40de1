"""Gradients of convolutions' weights on the CPU: the native kernels against sums in float64."""

from __future__ import annotations

import pytest
from sanitized import FLAGS, Compiler, needs_compiler, run_checks

from fastddpm import _native


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return Compiler(tmp_path_factory.mktemp("objects"))


STRONGEST = [isa for isa in FLAGS if isa in _native.isas_available()][-1:]


@needs_compiler
@pytest.mark.parametrize("isa", sorted({"plain", *STRONGEST}))
def test_sums_bits_and_memory(isa, compiled, tmp_path):
    """All algorithms and shapes, equal bits for every number of threads and division into calls,
    under AddressSanitizer and UndefinedBehaviorSanitizer in memory full of NaN."""
    stems = ("weight_gradient_check", "layers/weight_gradient")
    objects = [compiled(stem, *FLAGS[isa]) for stem in stems]
    printed = run_checks(tmp_path, objects, "direct", "winograd_2", "winograd_4")
    assert "0 of the gradients are wrong" in printed
