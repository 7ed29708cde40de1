"""How the kernels touch memory and multiply tiles: any storage type outside, float32 inside.

Triton's interpreter (TRITON_INTERPRET=1) cuts bfloat16 off where the compiler rounds, and
multiplies its bits as integers. What it needs instead stands here and nowhere else.
"""

import os

import triton
import triton.language as tl


def interpreted():
    """Whether triton.jit hands its functions to the interpreter; triton 3.3 has no knobs."""
    if hasattr(triton, "knobs"):
        return bool(triton.knobs.runtime.interpret)
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def load(pointers, mask):
    """float32 values, 0 where masked off."""
    x = tl.load(pointers, mask=mask, other=0)
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def store(pointers, x, mask):
    """Write float32 x in the storage type of `pointers`."""
    tl.store(pointers, rounded(x, pointers.dtype.element_ty), mask=mask)


@triton.jit
def widened(x):
    """x in float32, exactly."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def operand(pointers, mask, dtype: tl.constexpr):
    """A tile for `dot`, rounded to `dtype` if it is stored in another one."""
    if pointers.dtype.element_ty == dtype:
        return tl.load(pointers, mask=mask, other=0.0)
    return rounded(load(pointers, mask), dtype)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b for tiles of one storage type; products and sums are float32."""
    if INTERPRETED:
        a, b = widened(a), widened(b)
    return tl.dot(a, b, total, input_precision=PRECISION)
