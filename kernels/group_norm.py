"""Groups of channels as tiles: what group_norm_silu and its gradient share.

A tile is (pixels, columns); a column is a channel of a sample, and the columns are whole groups,
each padded to a power of two. Where channels lie side by side a tile is as many groups wide as make
whole vectors. A slab (the columns' pixels) that fits one tile is read once; a longer one is cut in
chunks, each a program's, whose statistics are merged by those who need them. The cut is a function
of a sample's shape, dtype and memory format alone, and sums have a fixed order: a sample's result
does not depend on its batch.

Statistics are float32 around a value close to the mean: (about, mean - about, rstd), where `about`
is the float nearest to the mean of some pixels, so that neither a large mean nor its own rounding
shows.
"""

import torch
import triton
import triton.language as tl

from fastddpm.kernels.storage import INTERPRETED, load, rounded, store, widened
from fastddpm.kernels.tiles import between_samples, merged, power_of_two, registers

SLAB = 16384  # elements that a program holds at once, at most
TILE = 8192  # of a slab that is longer, of all images that are kept
LEAST = 8192 if INTERPRETED.value else 2048  # elements of a program, where there are as many
SEGMENT = 64  # bytes of a pixel that a tile takes where channels lie side by side
CHUNKS = 64  # of a slab, at most
EACH = 16  # elements of a thread, of all images that are kept, while WARPS are enough
WARPS = 16


class Cut:
    """How images are cut into programs.

    sources: one or two images, the channels of the norm's input; others: of the same pixels. None
    for one that is not given; the first source says the layout.  kept: images whose tile a program
    holds all the time
    """

    def __init__(self, num_groups, sources, others=(), kept=1):
        x, images = sources[0], [*sources, *others]
        given = [source for source in sources if source is not None]
        channels = sum(source.shape[1] for source in given)
        self.n, self.groups, self.per_group = x.shape[0], num_groups, channels // num_groups
        self.first, self.bg = x.shape[1], power_of_two(self.per_group)
        self.sizes, self.views = pixels(images)
        self.wide = any(reach(image) >= 2**31 for image in images if image is not None)
        same = len({source.dtype for source in given}) == 1

        self.bp = power_of_two(self.sizes[0] * self.sizes[1])
        most = power_of_two(num_groups)
        near = x.stride(1) < x.stride(-1)  # channels lie closer than pixels

        def groups(segment):
            """As many as put so many bytes side by side."""
            size = self.per_group * x.element_size()
            return min(power_of_two(triton.cdiv(segment, size)), most) if near else 1

        # Vectors that are short, or of two sources at once, take registers for more addresses.
        padded = self.per_group != self.bg
        apart = len(given) == 1 or (same and self.first % (groups(SEGMENT) * self.per_group) == 0)
        if kept == 1:
            wanted = limit = SLAB // 2 if padded and self.per_group % 4 else SLAB
        else:
            wanted = SLAB // 2
            limit = SLAB if apart and not padded and x.element_size() == 2 else wanted
        self.gb, least = groups(SEGMENT), 1 if padded else groups(SEGMENT // 4)
        while self.bp * self.gb * self.bg > wanted and self.gb > least:
            self.gb //= 2
        self.once = self.bp * self.gb * self.bg <= limit
        if not self.once:
            self.gb = min(groups(2 * SEGMENT), max(TILE // kept // self.bg, 1))
            self.bp = min(max(TILE // kept // (self.gb * self.bg), 1), self.bp)
        while self.bp * self.gb * self.bg < LEAST and self.gb < most:
            self.gb *= 2
        tile = self.bp * self.gb * self.bg
        # A compiler's sums may differ in a last bit from place to place in a program: on a GPU each
        # sample has the same one. The interpreter takes its time by the program.
        self.bn = max(LEAST // tile, 1) if INTERPRETED.value and self.gb == most else 1
        tiles = triton.cdiv(self.sizes[0] * self.sizes[1], self.bp)
        self.per = 1 if self.once else max(triton.cdiv(tiles, CHUNKS), 2)
        self.chunks = triton.cdiv(tiles, self.per)
        self.warps = power_of_two(min(max(tile * self.bn * kept // (32 * EACH), 4), WARPS))
        blocks = triton.cdiv(self.n, self.bn) * triton.cdiv(num_groups, self.gb)
        self.grid = (blocks * self.chunks,)
        # Whether the columns of each block are of one source, of two.
        self.split = len(given) == 2 and same and self.first % (self.gb * self.per_group) == 0
        # Whether vectors may be short, or loaded for two sources at once.
        self.mixed = padded or (len(given) == 2 and not self.split)

    @property
    def quads(self):
        """Whether columns are whole blocks of four elements, the channels of a pixel in a row."""
        alone = self.per_group == self.bg and self.gb * self.bg % 4 == 0
        return self.per_group % 4 == 0 or (alone and self.groups * self.per_group % 4 == 0)

    def buffer(self, like, quantities, width):
        """Float32 results of every chunk, (N, K, quantities, width)."""
        shape = self.n, self.chunks, quantities, width
        return torch.empty(shape, dtype=torch.float32, device=like.device)

    def arguments(self):
        return {
            "N": self.n, "K": self.chunks, "B": self.sizes[0], "D": self.sizes[1],
            "G": self.groups, "CG": self.per_group, "C1": self.first, "PER": self.per,
            "BP": self.bp, "BN": self.bn, "GB": self.gb, "BG": self.bg, "FLAT": self.sizes[0] == 1,
            "WIDE": self.wide, "SPLIT": self.split, "num_warps": self.warps,
        }  # fmt: skip


def pixels(images):
    """((B, D), tuples): the pixels as B rows of D, and (x, strides of n, c, b, d) of each image."""
    given = [x for x in images if x is not None]
    sizes = [*given[0].shape[2:], 1, 1][: max(given[0].dim() - 2, 2)]
    strides = [[[*x.stride()[2:], 0, 0][k] for x in given] for k in range(len(sizes))]
    *outer, inner = merged(sizes, strides, False)
    row = outer[-1] if outer else (1, [0] * len(given))
    made = iter(
        [(x, between_samples(x), x.stride(1), row[1][k], inner[1][k]) for k, x in enumerate(given)]
    )
    return (row[0], inner[0]), [None if x is None else next(made) for x in images]


def reach(x):
    """From the first element of a sample to the last."""
    return sum((size - 1) * step for size, step in zip(x.shape[1:], x.stride()[1:], strict=True))


def of_channels(x):
    """(pointer, stride of n, stride of c) of a (C,) or (N, C) parameter; None as it is."""
    if x is None:
        return None
    return (x, 0, x.stride(0)) if x.dim() == 1 else (x, x.stride(0), x.stride(1))


# ---- a tile ------------------------------------------------------------------------------------


@triton.jit
def columns(
    block, k, N, G: tl.constexpr, CG: tl.constexpr,
    BN: tl.constexpr, GB: tl.constexpr, BG: tl.constexpr, WIDE: tl.constexpr = False,
):  # fmt: skip
    """(n, c, live) of the columns k of a block of samples and groups: n, of 64 bits, a number where
    it is one for all, else like k.
    """
    BLOCKS: tl.constexpr = (G + GB - 1) // GB
    first = block % BLOCKS * GB
    if CG == BG:
        c = first * CG + k % (GB * BG)
        live = c < G * CG
    else:
        g = first + k // BG % GB
        c = g * CG + k % BG
        live = (g < G) & (k % BG < CG)
    if BN == 1:
        n = (block // BLOCKS).to(tl.int64)
    else:
        n = (block // BLOCKS * BN + k // (GB * BG)).to(tl.int64)
        live = live & (n < N)
    return n, c.to(tl.int64) if WIDE else c, live


@triton.jit
def places(start, BP: tl.constexpr, WIDE: tl.constexpr):
    """The pixels of a tile, (BP,)."""
    p = start + tl.arange(0, BP)
    return p.to(tl.int64) if WIDE else p


@triton.jit
def of_first(inside, c, C: tl.constexpr, C1: tl.constexpr):
    """Where a tile is of the first source."""
    return inside if C1 == C else inside & (c < C1)[None, :]


@triton.jit
def pixels_of(x, n, c, p, D, FLAT: tl.constexpr):
    """(BP, BC) pointers. Offsets in a sample have the bits of c and p."""
    pixel = p * x[4] if FLAT else p // D * x[3] + p % D * x[4]
    return x[0] + n * x[1] + ((c * x[2])[None, :] + pixel[:, None])


@triton.jit
def parameter(x, n, c, inside):
    """(BC,) values of a parameter over channels."""
    return load(x[0] + n * x[1] + c.to(tl.int64) * x[2], inside)


@triton.jit
def of_second(block, G: tl.constexpr, CG: tl.constexpr, C1: tl.constexpr, GB: tl.constexpr):
    """Whether a block whose columns are of one source has the second one's."""
    return block % ((G + GB - 1) // GB) * (GB * CG) >= C1


@triton.jit
def one_of(x, x2, second, n, c, p, D, C1: tl.constexpr, FLAT: tl.constexpr):
    """(BP, BC) pointers at x2 where `second`, a number, says so, else at x; of one dtype."""
    y = (
        tl.where(second, x2[0], x[0]), tl.where(second, x2[1], x[1]),
        tl.where(second, x2[2], x[2]), tl.where(second, x2[3], x[3]),
        tl.where(second, x2[4], x[4]),
    )  # fmt: skip
    return pixels_of(y, n, c - tl.where(second, C1, 0), p, D, FLAT)


@triton.jit
def source(
    x, residual, u, before, x2, second, n, c, p, inside, D, C: tl.constexpr, C1: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """(BP, BC) of cat(x + before + residual, x2) over channels, 0 outside. before: (BC,) or None;
    second: as of_second() says, or None where a block's columns may be of both sources.

    With a residual the sum is rounded, written to u, and goes on as it is stored.
    """
    of_x = of_first(inside, c, C, C1)
    if second is None:
        h = load(pixels_of(x, n, c, p, D, FLAT), of_x)
    else:
        h = load(one_of(x, x2, second, n, c, p, D, C1, FLAT), inside)
    if before is not None:
        h = tl.where(inside, h + before[None, :], 0.0)
    if residual is not None:
        h += load(pixels_of(residual, n, c, p, D, FLAT), of_x)
    if u is not None:
        stored = rounded(h, u[0].dtype.element_ty)
        tl.store(pixels_of(u, n, c, p, D, FLAT), stored, mask=of_x)
        h = widened(stored)
    if x2 is not None and second is None:
        h += load(pixels_of(x2, n, c - C1, p, D, FLAT), inside & (c >= C1)[None, :])
    return h


@triton.jit
def store_sources(
    x, x2, second, value, n, c, p, inside, D, C: tl.constexpr, C1: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """Write what belongs to cat(x, x2)."""
    if second is None:
        store(pixels_of(x, n, c, p, D, FLAT), value, of_first(inside, c, C, C1))
        if x2 is not None:
            store(pixels_of(x2, n, c - C1, p, D, FLAT), value, inside & (c >= C1)[None, :])
    else:
        store(one_of(x, x2, second, n, c, p, D, C1, FLAT), value, inside)


@triton.jit
def gain_and_offset(weight, bias, scale, shift, n, c, live):
    """v = gain xhat + offset is what the SiLU gets, (BC,)."""
    gain = live.to(tl.float32)
    offset = gain * 0.0
    if weight is not None:
        gain = parameter(weight, n, c, live)
    if bias is not None:
        offset = parameter(bias, n, c, live)
    if scale is not None:
        factor = 1.0 + parameter(scale, n, c, live)
        gain, offset = gain * factor, offset * factor
    if shift is not None:
        offset += parameter(shift, n, c, live)
    return gain, offset


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


# ---- sums and statistics -----------------------------------------------------------------------


@triton.jit
def over_pixels(x):
    """(BC,) sums."""
    if INTERPRETED and x.shape[0] > 16:  # it adds one by one along this axis, a GPU in a tree
        x = tl.sum(tl.reshape(x, (x.shape[0] // 16, 16, x.shape[1])), 0)
    return tl.sum(x, 0)


@triton.jit
def of_groups(x, BG: tl.constexpr):
    """(BC,) from (groups,): each column has its group's value."""
    if BG > 1:
        x = tl.reshape(tl.broadcast_to(x[:, None], (x.shape[0], BG)), (x.shape[0] * BG,))
    return x


@triton.jit
def over_groups(x, BG: tl.constexpr):
    """(BC,) sums over the columns of each one's group."""
    if BG > 1:
        x = of_groups(tl.sum(tl.reshape(x, (x.shape[0] // BG, BG)), 1), BG)
    return x


@triton.jit
def moments(x, inside, count, BG: tl.constexpr):
    """(about, mean - about, sum of squares around the mean) of each column's group; `count`
    elements of it are in the tile x, which is 0 outside.
    """
    about = over_groups(over_pixels(x), BG) / count
    d = tl.where(inside, x - about[None, :], 0.0)
    mean = over_groups(over_pixels(d), BG) / count
    d = tl.where(inside, d - mean[None, :], 0.0)
    return about, mean, over_groups(over_pixels(d * d), BG)


@triton.jit
def statistics_once(x, inside, count, eps, BG: tl.constexpr):
    """(about, mean - about, rstd) of slabs that are one tile."""
    about, mean, squares = moments(x, inside, count, BG)
    return about, mean, 1.0 / tl.sqrt_rn(squares / count + eps)


@triton.jit
def merged_statistics(
    partial, block, N, K, P, eps, G: tl.constexpr, CG: tl.constexpr, PER: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, GB: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """(about, mean - about, rstd) of each column's group, by what all chunks have found."""
    n, g, live = columns(block, tl.arange(0, BN * GB), N, G, 1, BN, GB, 1)
    at = partial + n * K * (3 * G) + g
    about = tl.load(at, mask=live, other=0.0)
    chunk = tl.arange(0, BK)[:, None]
    at, live = at[None, :] + chunk * (3 * G), live[None, :] & (chunk < K)
    count = tl.minimum(tl.maximum(P - chunk * (PER * BP), 0), PER * BP) * 1.0 * CG
    mean = tl.load(at, mask=live, other=0.0) - about[None, :]
    mean = tl.where(live, mean + tl.load(at + G, mask=live, other=0.0), 0.0)
    squares = tl.load(at + 2 * G, mask=live, other=0.0)
    total = P * 1.0 * CG
    whole = tl.sum(mean * count, 0) / total
    d = mean - whole[None, :]
    squares = tl.sum(tl.where(live, squares + count * d * d, 0.0), 0)
    rstd = 1.0 / tl.sqrt_rn(squares / total + eps)
    return of_groups(about, BG), of_groups(whole, BG), of_groups(rstd, BG)


@triton.jit(do_not_specialize=["N"])
def _partial_statistics_kernel(
    x, residual, u, x2, before, partial, N, K, B, D,
    G: tl.constexpr, CG: tl.constexpr, C1: tl.constexpr, PER: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, GB: tl.constexpr, BG: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """(about, mean - about, squares) of a chunk, (N, K, 3, G): tiles by Chan's formula."""
    block, chunk, P = tl.program_id(0) // K, tl.program_id(0) % K, B * D
    k = tl.arange(0, BN * GB * BG)
    n, c, live = columns(block, k, N, G, CG, BN, GB, BG, WIDE)
    second = of_second(block, G, CG, C1, GB) if SPLIT else None
    added = None if before is None else parameter(before, n, c, live & (c < C1))
    about = live.to(tl.float32) * 0.0
    count, mean, squares = 0.0, about, about
    first = chunk * (PER * BP)
    for start in range(first, tl.minimum(first + PER * BP, P), BP):
        p = places(start, BP, WIDE)
        inside = live[None, :] & (p < P)[:, None]
        h = source(x, residual, u, added, x2, second, n, c, p, inside, D, G * CG, C1, FLAT)
        some = tl.minimum(P - start, BP) * 1.0 * CG
        tile_about, tile_mean, tile_squares = moments(h, inside, some, BG)
        about = tl.where(count == 0.0, tile_about, about)
        delta, total = tile_about - about + tile_mean - mean, count + some
        squares += tile_squares + delta * delta * (count * some / total)
        mean += delta * (some / total)
        count = total
    at = partial + (n * K + chunk) * (3 * G) + c // CG
    first_of_group = live & (k % BG == 0)
    tl.store(at, about, mask=first_of_group)
    tl.store(at + G, mean, mask=first_of_group)
    tl.store(at + 2 * G, squares, mask=first_of_group)


def partial_statistics(cut, x, x2=None, *, residual=None, u=None, before=None):
    """(N, chunks, 3, groups) of cat(x + before + residual, x2); tuples."""
    partial = cut.buffer(x[0], 3, cut.groups)
    _partial_statistics_kernel[cut.grid](
        x, residual, u, x2, before, partial, maxnreg=registers(cut.warps), **cut.arguments()
    )
    return partial
