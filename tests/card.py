"""The CUDA card of the machine that runs the tests: there for those that need one, and hidden from
all others and their children, which mean the CPU.

A test needs it by its marker `gpu`. Those of a backend whose tensors go to the card have the marker
wherever there is one, so that `pytest -m gpu` is all that a card is for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

HIDES = "CUDA_VISIBLE_DEVICES"
VISIBLE = torch.cuda.is_available()  # asked now: what is hidden later is so in Python alone


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """No card, to this package and to the children that are started."""
    before = os.environ.get(HIDES)
    os.environ[HIDES] = ""
    try:
        with mock.patch.multiple(torch.cuda, is_available=lambda: False, device_count=lambda: 0):
            yield
    finally:
        if before is None:
            del os.environ[HIDES]
        else:
            os.environ[HIDES] = before


def mark(items: list[pytest.Item], takes_card) -> None:
    """Before pytest selects by marker: takes_card(item) says whose tensors go to a card."""
    for item in items:
        if VISIBLE and takes_card(item):
            item.add_marker("gpu")
        elif not VISIBLE and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """With the fixtures of whole modules, which are made in the first test that takes them."""
    needed = not VISIBLE or item.get_closest_marker("gpu")
    with contextlib.nullcontext() if needed else hidden():
        return (yield)
