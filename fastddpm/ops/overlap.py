"""Whether tensors share memory: what an op writes may be an operand itself, but no part of one.

Exact for any strides: two elements share a byte where a bounded sum of strides meets the distance
between the tensors. Strided as tensors are, each level of the search leaves one or two choices.
"""

from __future__ import annotations

from torch import Tensor

WORK = 10_000  # steps of the search; what is not decided by then counts as shared


def check_written(name: str, out: Tensor, **operands: Tensor | None) -> None:
    """ValueError if elements of `out` share memory, or if it shares some with an operand that is
    not the same elements in the same places.
    """
    if out.numel() == 0:
        return
    if overlaps_itself(out):
        raise ValueError(
            f"{name} must have a place of its own for each element; got strides {out.stride()} "
            f"for shape {tuple(out.shape)}: some share memory"
        )
    storage = out.untyped_storage()
    first = storage.data_ptr()
    last = first + storage.nbytes()
    for other, x in operands.items():
        if x is None or x is out:
            continue
        begin = x.data_ptr()
        if begin >= last or (begin < first and _end(x) <= first):
            continue
        if not _same(out, x) and share_memory(out, x):
            raise ValueError(
                f"{name} must be {other} itself or share no memory with it; they overlap in part"
            )


def overlaps_itself(x: Tensor) -> bool:
    """Whether two elements of x lie in one place."""
    if x.is_contiguous() or x.numel() == 0:
        return False
    axes = sorted(
        (stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1
    )
    reach = 0  # of the axes with smaller strides
    for i, (stride, size) in enumerate(axes):
        if stride <= reach:
            # Two places along this axis that differ by 1 or more, met by differences in the others.
            inner = [(s, 2 * n - 2) for s, n in axes[:i]]
            shift = sum(s * (n - 1) for s, n in axes[:i])
            if _reachable([(stride, size - 2), *inner], shift - stride):
                return True
        reach += stride * (size - 1)
    return False


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether a byte of an element of a is one of b's."""
    if a.numel() == 0 or b.numel() == 0:
        return False
    # a's byte a0 + sum i s = b's byte b0 + sum j r; each j counted down from its end.
    terms = [(1, a.element_size() - 1), (1, b.element_size() - 1)]
    distance = b.data_ptr() - a.data_ptr() + b.element_size() - 1
    for x in (a, b):
        for size, stride in zip(x.shape, x.stride(), strict=True):
            terms.append((stride * x.element_size(), size - 1))
            distance += terms[-1][0] * (size - 1) if x is b else 0
    return _reachable(terms, distance)


def _reachable(terms: list[tuple[int, int]], target: int) -> bool:
    """Whether target = sum of k_i c_i for terms (c_i, n_i) and integers k_i in 0 .. n_i."""
    counts: dict[int, int] = {}
    for c, n in terms:
        if c and n:
            counts[c] = counts.get(c, 0) + n
    steps = sorted(counts.items(), reverse=True)
    reach = [0]  # of the terms that are left
    for c, n in reversed(steps):
        reach.append(reach[-1] + c * n)
    left = [(0, target)]
    for _ in range(WORK):
        if not left:
            return False
        i, rest = left.pop()
        if rest == 0:
            return True
        if i == len(steps):
            continue
        c, n = steps[i]
        rests = reach[len(steps) - i - 1]
        low, high = max(0, -((rests - rest) // c)), min(n, rest // c)
        if high - low > WORK:
            return True
        left.extend((i + 1, rest - k * c) for k in range(low, high + 1))
    return bool(left)


def _end(x: Tensor) -> int:
    """The end of the memory that x is a part of."""
    storage = x.untyped_storage()
    return storage.data_ptr() + storage.nbytes()


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether their elements are the same, each in the same place."""
    if a.data_ptr() != b.data_ptr() or a.dtype != b.dtype or a.shape != b.shape:
        return False
    axes = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(s == r for size, s, r in axes if size > 1)
