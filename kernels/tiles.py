"""Tiles of images for the elementwise kernels: how a call is cut into programs.

An image is (A, B, D), outermost first: what is left of (C, H, W) once dimensions that every tensor
of the call can walk with one stride are merged. NCHW gives (1, 1, C H W), NHWC (C, 1, H W), a slice
(C, H, W). The order of elements is that of a contiguous (C, H, W) image in all three. A tensor is
the tuple (pointer, strides of n, a, b, d); a program handles BN BA rows (n, a) of BP pixels (b, d),
how many of each being a matter of a sample's shape alone; BN is 1 but for the interpreter. Kernels
leave N unspecialised, so that one program serves every batch: a compiler may fuse a product with a
sum in one place and not in another.
"""

import torch
import triton
import triton.language as tl

from fastddpm.kernels.storage import INTERPRETED

BLOCK = 1024  # elements of a program
MAX_PIXELS = 2**31 - 2**16  # pixels are counted in int32


class Tiles:
    """The shape, the tensors and the grid of one call. tensors: (N, C, H, W), the written one last;
    None for one that is not given. whole_rows: keep W apart, for a kernel that mirrors it;  block:
    elements of a program, a power of two.
    """

    def __init__(self, tensors, *, whole_rows=False, block=BLOCK):
        given = [x for x in tensors if x is not None]
        self.n, *sizes = given[-1].shape
        strides = [[between_samples(x) for x in given]]
        strides += [[x.stride(k) for x in given] for k in (1, 2, 3)]
        dims = merged(sizes, strides[1:], whole_rows)
        one = (1, [0] * len(given))
        dims = [one] * (2 - len(dims)) + dims
        dims = dims if len(dims) == 3 else [dims[0], one, dims[1]]
        self.shape = tuple(size for size, _ in dims)
        steps = [strides[0], *(step for _, step in dims)]
        tuples = iter([(x, *(step[k] for step in steps)) for k, x in enumerate(given)])
        self.views = [None if x is None else next(tuples) for x in tensors]

        a, b, d = self.shape
        if INTERPRETED.value:  # it takes its time by the program, not by the element
            block = max(4 * block, power_of_two(self.n * a * b * d) // 8)
        pixels, out = b * d, self.views[-1]
        if a > 1 and out[2] < out[4]:  # channels lie closer than pixels
            self.ba = min(power_of_two(a), 64)
            self.bp = min(max(power_of_two(pixels), 4), max(block // self.ba, 4))
        else:
            self.bp = min(max(power_of_two(pixels), 4), block)
            self.ba = min(power_of_two(a), block // self.bp)
        self.bn = max(block // (self.ba * self.bp), 1) if INTERPRETED.value else 1
        self.grid = (
            triton.cdiv(self.n, self.bn) * triton.cdiv(a, self.ba) * triton.cdiv(pixels, self.bp),
        )

    def arguments(self):
        """What `tile` takes, by name."""
        a, b, d = self.shape
        return {
            "N": self.n, "A": a, "B": b, "D": d,
            "BN": self.bn, "BA": self.ba, "BP": self.bp, "FLAT": b == 1,
        }  # fmt: skip


def merged(sizes, strides, whole_rows):
    """[(size, one stride for each tensor)]: as few dimensions as walk the same elements in order.

    strides[k][i]: of dimension k of tensor i;  whole_rows: the last dimension stays apart
    """
    dims = [(sizes[0], strides[0])]
    for k, (size, step) in enumerate(zip(sizes[1:], strides[1:], strict=True)):
        outer, above = dims[-1]
        apart = whole_rows and k == len(sizes) - 2
        if size == 1 and not apart:
            continue
        fits = all(a == size * b for a, b in zip(above, step, strict=True))
        if (fits or outer == 1) and not apart:
            dims[-1] = (outer * size, step)
        else:
            dims.append((size, step))
    return dims


def between_samples(x):
    """The stride of samples. That of a single one may be anything, yet the compiler would make use
    of what divides it: it is what it would be in a batch.
    """
    if x.shape[0] != 1:
        return x.stride(0)
    extent = max(size * step for size, step in zip(x.shape[1:], x.stride()[1:], strict=True))
    return max(x.stride(0), extent)


def power_of_two(n):
    """The smallest one that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def registers(warps):
    """Registers that a thread of such a program can have; with no bound, ptxas may spill a few to
    fit more threads.
    """
    return min(65536 // (32 * warps), 255)


def per_sample(x):
    """(pointer, stride) of an (N,) tensor."""
    return (x, x.stride(0))


def like(x, dtype=None):
    """An output for x: its shape and memory format."""
    return torch.empty_like(x, dtype=dtype)


@triton.jit
def tile(N, A, B, D, BN: tl.constexpr, BA: tl.constexpr, BP: tl.constexpr):
    """(n, a, p, inside) of this program: (R,), (R,), (BP,) and (R, BP) with R = BN BA."""
    program = tl.program_id(0)
    tiles_p, tiles_a = tl.cdiv(B * D, BP), tl.cdiv(A, BA)
    rows = tl.arange(0, BN * BA)
    p = program % tiles_p * BP + tl.arange(0, BP)
    a = program // tiles_p % tiles_a * BA + rows % BA
    n = program // tiles_p // tiles_a * BN + rows // BA
    return n, a, p, ((n < N) & (a < A))[:, None] & (p < B * D)[None, :]


@triton.jit
def rows_of(x, n, a):
    """(R, 1) pointers at the rows (n, a) of a tensor."""
    return (x[0] + n.to(tl.int64) * x[1] + a.to(tl.int64) * x[2])[:, None]


@triton.jit
def at(x, n, a, p, D, FLAT: tl.constexpr):
    """(R, BP) pointers at the pixels p of the rows (n, a) of a tensor."""
    p = p.to(tl.int64)
    pixel = p * x[4] if FLAT else p // D * x[3] + p % D * x[4]
    return rows_of(x, n, a) + pixel[None, :]


@triton.jit
def timestep(t, n, N, steps):
    """t of the samples n, the nearest that the table has; t: (pointer, stride)."""
    value = tl.load(t[0] + n.to(tl.int64) * t[1], mask=n < N, other=0)
    return tl.minimum(tl.maximum(value, 0), steps - 1)


@triton.jit
def coefficient(table, row, COLUMN: tl.constexpr):
    """(R, 1) column of these rows of the [T, 8] table."""
    return tl.load(table + row * 8 + COLUMN)[:, None]
