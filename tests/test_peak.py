"""The ceilings of the benchmarks: multiply-adds from registers, bfloat16 products from a cache."""

from __future__ import annotations

import pytest

from fastddpm import _native

if _native.C is None:
    pytest.skip(_native.reason, allow_module_level=True)

LANES = {"plain": 4, "avx2": 8}  # others: 16


def peak_flops(*arguments):
    return _native.C.cpu.peak_flops(*arguments)


@pytest.mark.parametrize("isa", _native.isas_available())
def test_the_rate_is_one_that_a_core_can_have(isa):
    """At most 4 multiply-adds a cycle at 7 GHz: a loop that the compiler shortened is faster. At
    least one in 3 cycles at 1 GHz: sums that wait for each other are slower."""
    before = _native.isa()
    _native.use_isa(isa)
    try:
        rate = max(peak_flops(1, 0.02) for _ in range(3))
    finally:
        _native.use_isa(before)
    assert LANES.get(isa, 16) * 2 * 1e9 / 3 < rate < LANES.get(isa, 16) * 2 * 4 * 7e9


@pytest.mark.parametrize("isa", _native.isas_available())
def test_the_rate_in_bfloat16(isa):
    """AMX: a product of two tiles, 16384 operations, in 16 cycles at most at 7 GHz."""
    before = _native.isa()
    _native.use_isa(isa)
    try:
        assert 1e8 < peak_flops(1, 0.02, "bf16") < 1024 * 7e9
    finally:
        _native.use_isa(before)


def test_threads_add_up():
    """Work that a thread skipped would make two of them look faster than they can be."""
    one = max(peak_flops(1, 0.02) for _ in range(3))
    assert peak_flops(2, 0.02) < 2.5 * one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "threads must be at least 1"),
        ((1, -1.0), r"seconds must lie in 0 \.\. 3"),
        ((1, 5.0), r"seconds must lie in 0 \.\. 3"),
        ((1, float("nan")), r"seconds must lie in 0 \.\. 3"),
        ((1, 0.1, "fp16"), "precision must be .* got 'fp16'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        peak_flops(*arguments)
