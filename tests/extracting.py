"""A small extractor, and what tests of others need: their packages, or a skip that says why."""

from __future__ import annotations

import pytest
import torch

from fastddpm.evaluation import extractors
from fastddpm.evaluation.extractors import Extractor


def means(x: torch.Tensor) -> torch.Tensor:
    """Of each quarter of a channel, in [0, 1]: 12 features of a colour image."""
    return torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, 2).flatten(1)


def toy(network=means, *, name="toy", suffix="-toy", width=12, classifier=None) -> Extractor:
    return Extractor(name, suffix, width, "0" * 16, network, classifier)


def needed(*packages: str, extra: str = "test") -> None:
    if why := extractors._missing(extra, *packages):
        pytest.skip(why)


def torch_fidelity():
    """The package, where it can be imported."""
    needed("torch_fidelity", extra="fid")  # not in "test": its torchvision is for one torch alone
    try:
        return extractors._torch_fidelity()
    except ImportError as error:
        pytest.skip(str(error))
