"""Tensors and JSON on disk, read with everything checked and written atomically; nothing of any
model.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from fastddpm import digest


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Any]:
    """A binary file that takes the name `path` only when it was written whole and is on the disk.

    Whatever happens before that, a file that was there stays as it was.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _fsync_folder(path.parent)


def _fsync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_tensors(
    path: str | os.PathLike,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a safetensors file atomically, with the digest of all that is in it in its header."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {**(metadata or {}), digest.KEY: digest.of_tensors(contiguous, metadata or {})}
    with atomic_write(path) as file:
        file.write(safetensors_bytes(contiguous, metadata))


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; ValueError names a file that is missing, cut, not
    one, or not what was written: a file that names a digest, as all of `write_tensors` do, is
    checked against it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    said = metadata.pop(digest.KEY, None)
    if said is not None and said != digest.of_tensors(tensors, metadata):
        raise ValueError(
            f"{path} is damaged: its tensors and metadata are not those that were written "
            "(their digest is not the one in its header)"
        )
    return tensors, metadata


def read_weights(path: str | os.PathLike, *, allow_pickle: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or with allow_pickle=True of a pickled state dict.

    Pickles are read by torch's weights-only unpickler, which makes nothing but tensors and plain
    containers. A training checkpoint of several state dicts gives the last one, the EMA's where it
    has one. Raises ValueError naming the file and what is wrong with it.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if not allow_pickle:
        raise ValueError(
            f"{path} is a pickle, which is not loaded unasked: pass allow_pickle=True if you trust "
            "it, or give a .safetensors file"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises nearly anything on damaged files
        why = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} can't be read as a state dict: {why}") from None
    states = content if isinstance(content, (list, tuple)) else [content]
    states = [state for state in states if _is_state_dict(state)]
    if not states:
        raise ValueError(f"{path} holds no state dict of tensors")
    return dict(states[-1])


def _is_state_dict(content: object) -> bool:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items())
    )


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """A JSON object; ValueError names the file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable JSON file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(content).__name__}")
    return content


def write_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write a JSON object atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def load_weights(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], source: str | os.PathLike
) -> None:
    """Copy `weights` into `model`; ValueError names the first key that is missing, unknown or of
    another shape.
    """
    own = model.state_dict()
    if missing := sorted(own.keys() - weights.keys()):
        raise ValueError(
            f"{source} lacks {len(missing)} of {len(own)} keys, the first: {missing[0]}"
        )
    if unknown := sorted(weights.keys() - own.keys()):
        raise ValueError(f"{source} has {len(unknown)} unknown keys, the first: {unknown[0]}")
    for name, tensor in own.items():
        if weights[name].shape != tensor.shape:
            got, expected = tuple(weights[name].shape), tuple(tensor.shape)
            raise ValueError(f"{source}: {name} has shape {got}; this model's is {expected}")
    model.load_state_dict(weights)


def __getattr__(name: str) -> Any:
    """What stood here before `fastddpm.pretrained` did."""
    if name in ("BUNDLED", "CONFIG", "WEIGHTS", "build_model", "bundled_models", "load_model",
                "save_config", "save_model"):  # fmt: skip
        from fastddpm import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
