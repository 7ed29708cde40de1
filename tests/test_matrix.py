"""The matrix of the ops has to be full in a run of everything, and in no other."""

from __future__ import annotations

from types import SimpleNamespace

import matrix
import pytest


@pytest.mark.parametrize(
    ("marker", "keyword", "named", "whole"),
    [
        ("not slow", "", False, True),  # the default, by addopts
        ("", "", False, True),
        ("not slow", "cuda", False, False),
        ("not slow", "", True, False),
        ("slow", "", False, False),
        ("gpu", "", False, False),
    ],
)
def test_a_run_of_everything(pytestconfig, marker, keyword, named, whole):
    sources = pytestconfig.ArgsSource
    config = SimpleNamespace(
        option=SimpleNamespace(markexpr=marker, keyword=keyword),
        args_source=sources.ARGS if named else sources.TESTPATHS,
        ArgsSource=sources,
    )
    assert matrix.is_whole(config) == whole


def test_the_default_is_among_them(pytestconfig):
    assert "not slow" in pytestconfig.getini("addopts")
