"""The gradient of attention of bfloat16 operands: the native kernel against sums in float64."""

from __future__ import annotations

import pytest
from sanitized import EMULATED, FLAGS, Compiler, needs_compiler, run_checks

from fastddpm import _native

STRONGEST = [isa for isa in FLAGS if isa in _native.isas_available()][-1:]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return Compiler(tmp_path_factory.mktemp("objects"))


@needs_compiler
@pytest.mark.parametrize("isa", [*STRONGEST, *EMULATED])
def test_sums_bits_and_memory(isa, compiled, tmp_path):
    """On this processor and with the bfloat16 instructions of others: equal bits for every number
    of threads, under AddressSanitizer and UndefinedBehaviorSanitizer in memory full of NaN."""
    flags = FLAGS.get(isa) or EMULATED[isa]
    objects = [
        compiled("attention_gradient_check"),
        compiled("layers/attention_gradient_bf16", *flags),
    ]
    assert "0 of the gradients are wrong" in run_checks(tmp_path, objects)
