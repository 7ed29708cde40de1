"""Weights as the C++ convolution reads them, kept from call to call while their tensor lives."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastddpm import _native

_kept = WeakTensorKeyDictionary()
_turn = threading.Lock()


def packed_weights(weight: Tensor) -> Any:
    """What _C keeps of this tensor's values: it sees for itself when they have changed."""
    with _turn:
        kept = _kept.get(weight)
        if kept is None:
            kept = _kept[weight] = _native.C.cpu.packed_weights()  # type: ignore[union-attr]
        return kept
