"""A CUDA graph's stand-in without a GPU: a tape of the operations and their very tensors, played
again with no Python of the step in between."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastddpm.engine import cuda_graph


class Tape(TorchDispatchMode):
    """Records operations with their tensors; a call repeats them, into the same tensors.

    What a capture forbids is an error: reading a value on the host."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, out))
        return out

    def __call__(self) -> None:
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            if func._schema.is_mutable:
                continue
            for old, new in zip(_tensors(out), _tensors(again), strict=True):
                if old.untyped_storage()._cdata != new.untyped_storage()._cdata:  # not a view
                    old.copy_(new)


def _tensors(out) -> list[torch.Tensor]:
    items = out if isinstance(out, (tuple, list)) else [out]
    return [x for x in items if isinstance(x, torch.Tensor)]


class Recorder:
    """`cuda_graph.record` by tapes; counts them and their replays."""

    def __init__(self):
        self.tapes, self.replays = 0, 0

    def __call__(self, step, device):
        for _ in range(cuda_graph.WARM_UP):
            step()
        tape = Tape()
        with tape:
            step()
        self.tapes += 1

        def replay():
            self.replays += 1
            tape()

        return replay
