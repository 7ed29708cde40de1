"""Features that were computed before, on disk, in files that anyone may delete. No networks."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

from fastddpm.checkpoint import named, read_tensors, remove_abandoned, write_tensors
from fastddpm.data.identity import Fingerprint
from fastddpm.evaluation.extractors import Extractor
from fastddpm.host import callers_level

FEATURES = "features"


class FeatureCache:
    """Features by the images that they are of, whatever set those come from.

    folder/EXTRACTOR-FINGERPRINT/DIGEST.safetensors    of some images that follow each other: DIGEST
                                                       is of their pixels, as data.identity has it

    A file that is damaged, or not what its name says, is warned of and replaced; a folder that
    can't be written to is warned of once."""

    def __init__(self, folder: str | os.PathLike, extractor: Extractor):
        self._folder = named(folder) / f"{extractor.name}-{extractor.fingerprint}"
        self._extractor = extractor
        self._writes = True

    def read(self, images: torch.Tensor) -> torch.Tensor | None:
        """(N, width) float32 of (N, C, H, W) uint8; None where they are not there."""
        path = self._path(images)
        if not os.path.lexists(path):
            return None
        try:
            tensors, said = read_tensors(path, ours=True)
            found = tensors.get(FEATURES)
            wrong = None
            if said.get("images") != path.stem or found is None:
                wrong = f"{path} holds no features of these images"
            elif found.dtype != torch.float32 or found.shape != (
                len(images),
                self._extractor.width,
            ):
                wrong = f"{path} holds features of {tuple(found.shape)}, {found.dtype}"
        except (ValueError, OSError) as error:
            found, wrong = None, str(error)
        if wrong is not None:
            self._warn(f"{wrong}: they are computed again")
            return None
        return found

    def write(self, images: torch.Tensor, features: torch.Tensor) -> None:
        if not self._writes:
            return
        path = self._path(images)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(path.parent, lambda name: name == path.name)
            write_tensors(path, {FEATURES: features}, {"images": path.stem})
        except OSError as error:
            self._writes = False
            self._warn(f"features are not kept for the next time: {error}")

    def _path(self, images: torch.Tensor) -> Path:
        fingerprint = Fingerprint()
        fingerprint.add(images.cpu().numpy())
        return self._folder / f"{fingerprint.hexdigest()}.safetensors"

    def _warn(self, text: str) -> None:
        warnings.warn(" ".join(text.split()), RuntimeWarning, stacklevel=callers_level())


def user_cache() -> Path:
    """The folder of this user's caches: FASTDDPM_CACHE of the environment, else fastddpm/ where the
    system keeps such."""
    if given := os.environ.get("FASTDDPM_CACHE"):
        return Path(given)
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "fastddpm"
