"""A folder of an evaluation's results: which parts are there, of which model, data and options.
What is there is kept, and never written over by another's. Nothing is computed here."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastddpm
from fastddpm import _native, digest, folder_lock
from fastddpm.checkpoint import read_json, remove_abandoned, write_json
from fastddpm.evaluation.plots import PLOTS
from fastddpm.options import shown

FILE = "evaluation.json"
FORMAT = "fastddpm evaluation"

Facts = Mapping[str, Any]


class Results:
    """The parts of an evaluation by name: the facts that each is a function of, what computed it,
    and its JSON-ready content, None while it is missing. With a folder each is on the disk as soon
    as it is kept.

    about: facts that all parts share (model, seed, chain)

    Raises ValueError for a folder whose results were made from other facts, naming the first, and
    for an evaluation.json, or a plot, that is another program's or not as it was written."""

    def __init__(self, folder: Path | None, about: Facts):
        self.folder, self.about = folder, dict(about)
        self.parts: dict[str, dict[str, Any]] = {}
        self._read()

    @property
    def facts(self) -> dict[str, Facts]:
        return {name: part["facts"] for name, part in self.parts.items()}

    def content(self, name: str) -> Any:
        """Of a part that is done; None of any other."""
        return self.parts.get(name, {}).get("content")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """A block in which this process alone writes into the folder, which is made if need be;
        what killed ones left half-written is removed."""
        if self.folder is None:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with folder_lock.locked(self.folder, "evaluation"):
            remove_abandoned(self.folder, {FILE, *PLOTS}.__contains__)
            self._read()  # what another has done since it was looked at
            yield

    def check(self, facts: Mapping[str, Facts]) -> None:
        """ValueError where a part of these facts is there, or was begun, and has others."""
        for name in filter(self.parts.__contains__, facts):
            self._compare(f"{name}: ", self.parts[name]["facts"], facts[name])

    def plan(self, facts: Mapping[str, Facts]) -> None:
        """Take up parts that are to be computed, before any is: those that go on have the same
        facts."""
        self.check(facts)
        new = {name: _part(facts[name]) for name in facts if name not in self.parts}
        if new:
            self.parts.update(new)
            self.write({})

    def keep(self, name: str, ran: Mapping[str, Any], content: Any) -> None:
        """A part that is done. ran: what computed it, for who reads it"""
        self.parts[name] |= {"ran": dict(ran), "content": content}
        self.write({})

    def write(self, summary: Mapping[str, Any]) -> None:
        """evaluation.json, atomically. summary: what is computed from the parts, all of which are
        done then."""
        if self.folder is not None:
            write_json(self.folder / FILE, self._file(summary))

    def is_written(self, summary: Mapping[str, Any]) -> bool:
        """Whether the folder has all of this, and its plots."""
        if self.folder is None:
            return True
        if not all((self.folder / name).is_file() for name in (FILE, *PLOTS)):
            return False
        return read_json(self.folder / FILE)[digest.KEY] == self._file(summary)[digest.KEY]

    def _file(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        content = {"format": FORMAT, "about": self.about, **summary, "parts": self.parts}
        return {**content, digest.KEY: digest.of_json(content)}

    def _read(self) -> None:
        if self.folder is None:
            return
        path = self.folder / FILE
        if not os.path.lexists(path):
            if there := [name for name in PLOTS if os.path.lexists(self.folder / name)]:
                raise ValueError(
                    f"{self.folder} has a {there[0]} and no {FILE}: give another folder, it would "
                    "be written over"
                )
            return
        content = read_json(path)
        if content.get("format") != FORMAT:
            raise ValueError(f"{path} is not an evaluation's: give another folder")
        if content.get(digest.KEY) != digest.of_json(content):
            raise ValueError(
                f"{path} is not as it was written (its digest is another): remove it to evaluate "
                "anew, or give another folder"
            )
        self._compare("", content["about"], self.about)
        self.parts = content["parts"]

    def _compare(self, name: str, there: Facts, here: Facts) -> None:
        for key in sorted({*there, *here}):
            if there.get(key) != here.get(key):
                raise ValueError(
                    f"{self.folder} has the results of another evaluation: {name}{key} is "
                    f"{shown(there.get(key))} there and {shown(here.get(key))} here; give another "
                    "folder"
                )


def _part(facts: Facts) -> dict[str, Any]:
    return {"facts": dict(facts), "ran": {}, "content": None}


def versions() -> dict[str, str | None]:
    """Of what computes."""
    return {
        "fastddpm": fastddpm.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "isa": _native.isa() if _native.C is not None else "reference",
    }
