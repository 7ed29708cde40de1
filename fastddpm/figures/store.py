"""The files of a gallery: each says what drew it, is kept while that is asked for, and is never
written over by another's. No drawing.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL.PngImagePlugin import PngInfo

from fastddpm import folder_lock, kept
from fastddpm.checkpoint import atomic_write, read_tensors, remove_abandoned, write_tensors
from fastddpm.figures.job import Progression
from fastddpm.figures.page import is_ours
from fastddpm.figures.paper import FIGURES, Picture
from fastddpm.kept import KEY

INDEX, CHAIN = "index.html", "samples.safetensors"


class Shown(NamedTuple):
    """A picture of the gallery. seconds: that it took; None: it was there"""

    name: str
    path: Path
    size: tuple[int, int]
    caption: str
    alt: str
    seconds: float | None = None

    @property
    def title(self) -> str:
        return FIGURES[self.name].title

    @property
    def numbers(self) -> str:
        return FIGURES[self.name].numbers


class Store:
    """The files of a gallery.

    base:  what all of its pictures are of;  facts: what is known beside it, by the names of
           Figure.depends
    drawn: the samples that were there, whole, when it was last read, or kept since; or None
    """

    def __init__(self, path: Path, base: dict[str, Any], facts: dict[str, Any]):
        self.path, self.base, self.facts = path, base, facts
        self.drawn: Progression | None = None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The folder, which is made, for this process alone; what killed ones left half-written is
        removed."""
        self.path.mkdir(parents=True, exist_ok=True)
        with folder_lock.locked(self.path, "gallery"):
            names = {INDEX, CHAIN, *(f"{name}.png" for name in FIGURES)}
            remove_abandoned(self.path, names.__contains__)
            yield

    def about(self, name: str) -> dict[str, Any]:
        depends = FIGURES[name].depends
        return self.base | {x: self.facts[x] for x in depends if x in self.facts}

    def read(self) -> dict[str, Shown]:
        """The whole pictures; ValueError for a file of another gallery or of none."""
        self._check_index()
        found = {}
        for name in FIGURES:
            path = self.path / f"{name}.png"
            if os.path.lexists(path) and (said := _read(path)) is not None:
                self._check_same(path, said.get("about"), self.about(name))
                found[name] = Shown(
                    name, path, tuple(said["size"]), str(said["caption"]), str(said["alt"])
                )
        self.drawn = self.progression() if os.path.lexists(self.path / CHAIN) else None
        return found

    def write(self, name: str, picture: Picture, seconds: float) -> Shown:
        path = self.path / f"{name}.png"
        said = {"about": self.about(name), "size": list(picture.image.size),
                "caption": picture.caption, "alt": picture.alt}  # fmt: skip
        text = PngInfo()
        text.add_text(KEY, json.dumps(said))
        with atomic_write(path) as file:
            picture.image.save(file, format="PNG", pnginfo=text, optimize=True)
        return Shown(name, path, picture.image.size, picture.caption, picture.alt, seconds)

    def keep(self, drawn: Progression) -> None:
        """The samples, so that a gallery that is stopped does not have to draw them again."""
        if self.drawn is drawn:
            return
        said = {"about": self._of_chain(), "times": drawn.times, "rmse": drawn.rmse}
        tensors = {"images": drawn.images, "predictions": drawn.predictions}
        write_tensors(self.path / CHAIN, tensors, {KEY: json.dumps(said)})
        self.drawn = drawn

    def progression(self) -> Progression | None:
        """The samples that are there; None where they are not, or not whole."""
        path = self.path / CHAIN
        kept.check_regular(path)
        try:
            tensors, metadata = read_tensors(path)
            said = json.loads(metadata.get(KEY, "{}"))
        except (ValueError, OSError):
            return None
        self._check_same(path, said.get("about"), self._of_chain())
        return Progression(tensors["images"], tensors["predictions"], said["times"], said["rmse"])

    def write_page(self, content: str) -> None:
        with atomic_write(self.path / INDEX) as file:
            file.write(content.encode())

    def _of_chain(self) -> dict[str, Any]:
        return self.base | {x: self.facts[x] for x in ("n", "rows", "frames")}

    def _check_index(self) -> None:
        path = self.path / INDEX
        if not os.path.lexists(path):
            return
        kept.check_regular(path)
        with contextlib.suppress(UnicodeDecodeError):
            if is_ours(path.read_text(encoding="utf-8")):
                return
        raise ValueError(f"{path} was not written by a gallery: give another folder")

    def _check_same(self, path: Path, theirs: Any, ours: dict[str, Any]) -> None:
        if not isinstance(theirs, dict):
            raise ValueError(f"{path} does not say what drew it: give another folder")
        kept.check_same(path, "of another gallery", theirs, ours)


def _read(path: Path) -> dict[str, Any] | None:
    """What a whole picture says of itself, {} if nothing; None if it is damaged."""
    kept.check_regular(path)

    def content() -> dict[str, Any]:
        said = json.loads(kept.png_text(path))
        whole = isinstance(said, dict) and {"about", "size", "caption", "alt"} <= {*said}
        return said if whole else {}

    return kept.if_whole(content)
