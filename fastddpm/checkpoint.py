"""Models on disk: safetensors and JSON, read with every key checked and written atomically. No
training state.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from fastddpm import digest
from fastddpm.diffusion import Diffusion
from fastddpm.unet import UNet

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]
_BINARY = getattr(os, "O_BINARY", 0)  # Windows

CONFIG, WEIGHTS = "config.json", "model.safetensors"
BUNDLED = Path(__file__).parent / "checkpoints"


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Any]:
    """A binary file that takes the name `path` only when it was written whole and is on the disk.

    Whatever happens before that, a file that was there stays as it was.
    """
    path = Path(path)
    handle, temporary = _locked_temporary(path)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # before it is closed: until then it is locked
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _fsync_folder(path.parent)


def _locked_temporary(path: Path) -> tuple[int, Path]:
    """A new file beside `path`, open and locked for as long as this process has it open."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            # Not tempfile's, whose permissions are not those of the umask; and to ask for the umask
            # is to change it, for all threads.
            handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
        except FileExistsError:
            continue
        if _lock(handle, wait=True) is None or os.fstat(handle).st_nlink:
            return handle, temporary
        os.close(handle)  # removed as abandoned before it was locked


def _lock(handle: int, *, wait: bool) -> bool | None:
    """Take the lock of an open file, which ends with its process; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # some network's file systems
        return None
    return True


def remove_abandoned(folder: str | os.PathLike, ours: Callable[[str], bool]) -> None:
    """Remove what `atomic_write` left in `folder` when its process was killed, of files for whose
    names `ours` is true. What a living process still writes is locked, and stays; so does all
    where there are no locks."""
    for temporary in Path(folder).glob(".*.*"):
        name = re.fullmatch(r"\.(.+)\.[^.]{8}", temporary.name)
        if name is None or not ours(name[1]) or temporary.is_symlink() or not temporary.is_file():
            continue
        with contextlib.suppress(OSError), temporary.open("r+b") as file:
            if _lock(file.fileno(), wait=False):
                temporary.unlink()


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


def save_model(
    model: UNet, folder: str | os.PathLike, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the model's config.json and model.safetensors (or `weights` in its place) into
    `folder`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, model.state_dict() if weights is None else weights)
    save_config(model, folder)


def save_config(model: UNet, folder: str | os.PathLike) -> None:
    """Write the model's config.json alone."""
    write_json(
        Path(folder) / CONFIG,
        {"format": "fastddpm", "unet": model.config, "diffusion": model.diffusion.to_config()},
    )


def build_model(config: dict[str, Any], source: str | os.PathLike) -> UNet:
    """The UNet of a config.json's content, with fresh weights."""
    for name in ("unet", "diffusion"):
        if not isinstance(config.get(name), dict):
            raise ValueError(f"{source}: the object {name!r} is missing")
    try:
        return UNet(**config["unet"], diffusion=Diffusion.from_config(config["diffusion"]))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from None


def bundled_models() -> list[str]:
    """The names that come with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG}"))


def load_model(source: str | os.PathLike, **options: Any) -> UNet:
    """A UNet in eval mode from a bundled name, a folder of `save_model`, a diffusers folder, or a
    weights file of the PyTorch port of the paper's code.

    options go to the loaders of `fastddpm.integrations`; our own folders take none. Raises
    FileNotFoundError or ValueError, naming what is wrong.
    """
    if str(source) in bundled_models():
        source = BUNDLED / source
    path = Path(source)
    if path.is_file():
        from fastddpm.integrations.port import load_file

        return load_file(path, **options).eval()
    if (path / "model_index.json").is_file() and (path / "unet" / CONFIG).is_file():
        path = path / "unet"  # a pipeline of diffusers
    if not (path / CONFIG).is_file():
        what = f"no {CONFIG} in it" if path.is_dir() else "no such file or folder"
        raise FileNotFoundError(
            f"model {str(source)!r}: {what}; give a folder with {CONFIG} and {WEIGHTS}, or one of "
            f"the bundled names: {', '.join(bundled_models()) or 'none'}"
        )
    config = read_json(path / CONFIG)
    if config.get("format") != "fastddpm":
        from fastddpm.integrations.diffusers import load_folder

        return load_folder(path, config, **options).eval()
    if options:
        raise ValueError(f"a fastddpm folder takes no options; got {', '.join(sorted(options))}")
    model = build_model(config, path / CONFIG)
    load_weights(model, read_tensors(path / WEIGHTS)[0], path / WEIGHTS)
    return model.eval()
