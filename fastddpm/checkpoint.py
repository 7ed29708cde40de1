"""Tensors and JSON on disk, read with everything checked and written atomically; nothing of any
model.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from fastddpm import digest
from fastddpm.memory import check_fits

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]
_BINARY = getattr(os, "O_BINARY", 0)  # Windows

FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
_DTYPES = FLOATS | {  # and of what may stand beside weights, counters above all
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
LONGEST_HEADER, LONGEST_JSON = 2**24, 2**25  # bytes: some 100,000 tensors, a million betas
MOST_TENSORS = 20_000
LARGEST_SIDE = 2**31  # of a tensor of weights


def named(path: str | os.PathLike) -> Path:
    """A path to write to; ValueError for "", which Path takes for the current folder."""
    if not os.fspath(path):
        raise ValueError("output '': give a name; '' would be the current folder")
    return Path(path)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Any]:
    """A binary file that takes the name `path` only when it was written whole and is on the disk.

    Whatever happens before that, a file that was there stays as it was. An OSError of the writing,
    such as a full disk's, names `path`.
    """
    path = Path(path)
    handle, temporary = locked_temporary(path)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # before it is closed: until then it is locked
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    _fsync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """An empty folder to fill, which takes the name `folder` when it is whole and on the disk; one
    that fails leaves nothing. FileExistsError where there is anything of that name."""
    folder = named(folder)
    check_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())
            else:
                _fsync_folder(file)
        _fsync_folder(temporary)
        check_free(folder)
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _fsync_folder(folder.parent)


def check_free(path: str | os.PathLike) -> None:
    """FileExistsError where there is anything of that name, a link to nothing too."""
    if os.path.lexists(path):
        raise FileExistsError(
            f"{path} is there already, and nothing is written over it: give another name"
        )


def check_place(folder: str | os.PathLike) -> None:
    """NotADirectoryError or PermissionError where no folder of that name can be made."""
    above = Path(os.path.abspath(folder)).parent
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        raise NotADirectoryError(f"{folder} can't be made: {above} is no folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} can't be made: {above} is not writable")


def locked_temporary(path: Path) -> tuple[int, Path]:
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
    """Write a safetensors file atomically, with the digest of all that is in it in its header.

    Tensors that share memory are each written whole.
    """
    contiguous: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if (storage := value.untyped_storage().data_ptr()) in storages:
            value = value.clone()
        storages.add(storage)
        contiguous[name] = value
    metadata = {**(metadata or {}), digest.KEY: digest.of_tensors(contiguous, metadata or {})}
    with atomic_write(path) as file:
        file.write(safetensors_bytes(contiguous, metadata))


def read_tensors(
    path: str | os.PathLike, *, ours: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; ValueError names a file that is missing, cut, not
    one, or not what was written: a file that names a digest, as all of `write_tensors` do, is
    checked against it. One that is replaced while it is read is read again: safetensors opens it
    twice, and a running training writes a new one every so often.

    ours: of `write_tensors`, so that one without a digest was changed since
    """
    while True:
        before = _stamp(path)
        try:
            return _read_tensors(path, ours)
        except ValueError:
            if _stamp(path) == before:
                raise


def _stamp(path: str | os.PathLike) -> tuple[int, ...] | None:
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    return None


def _read_tensors(
    path: str | os.PathLike, ours: bool
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    said = metadata.pop(digest.KEY, None)
    if ours and said is None:
        raise ValueError(f"{path} is not as it was written: the digest in its header is missing")
    if said is not None and said != digest.of_tensors(tensors, metadata):
        raise ValueError(
            f"{path} is damaged: its tensors and metadata are not those that were written "
            "(their digest is not the one in its header)"
        )
    return tensors, metadata


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The metadata of a safetensors file; nothing else of it is read or checked."""
    with _opened(path) as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Any]:
    """A safetensors file whose header was read; whatever is wrong with it is a ValueError."""
    _header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            yield opened
    except MemoryError as error:
        raise ValueError(f"{path} is larger than this process may map: {error}") from None
    except (SafetensorError, OSError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def check_not_empty(path: str | os.PathLike) -> None:
    """ValueError for a file of 0 bytes, as those of the system say to have that are made up while
    they are read, and may be waited for (/proc/kmsg)."""
    if os.path.getsize(path) == 0:
        raise ValueError("it is empty")


def _header(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON header of a safetensors file, nothing else of which is read or mapped."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such file: {path}")
    size = os.path.getsize(path)
    check_fits(f"{path}", size)
    try:
        check_not_empty(path)
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise ValueError(
                    "it is a pointer to a file in Git LFS: fetch that with `git lfs pull`"
                )
            if length > size - 8:
                raise ValueError(f"its header of {length} bytes is longer than the file")
            if length > LONGEST_HEADER:
                raise ValueError(f"its header of {length} bytes is longer than {LONGEST_HEADER}")
            header = json.loads(file.read(length).decode("utf-8"))
        if not isinstance(header, dict):
            raise ValueError(f"its header is no JSON object but a {type(header).__name__}")
        if len(header) > MOST_TENSORS:
            raise ValueError(f"it holds {len(header)} tensors; {MOST_TENSORS} are the most")
        ends = [_end(each) for name, each in header.items() if name != "__metadata__"]
        if (whole := 8 + length + max(ends, default=0)) != size:
            raise ValueError(f"it has {size} bytes, of the {whole} that its header speaks of")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    return header


def _end(entry: Any) -> int:
    """Of a tensor in the bytes that follow the header."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or [type(at) for at in offsets] != [int, int]:
        raise ValueError("a tensor in it has no place")
    return offsets[1]


def last_state_dict(content: Any) -> dict[str, torch.Tensor]:
    """Of a list of several, or the one that there is; {} for none."""
    states = content if isinstance(content, (list, tuple)) else [content]
    return next((dict(state) for state in reversed(states) if is_state_dict(state)), {})


def read_weights(
    path: str | os.PathLike,
    *,
    allow_pickle: bool = False,
    shapes_only: bool = False,
    counters: bool = False,
    pick: Callable[[Any], dict[str, torch.Tensor]] = last_state_dict,
) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or with allow_pickle=True of a pickled state dict.

    shapes_only: on the meta device, from the file's header; no value is read. Pickles are read by
    torch's weights-only unpickler, which makes nothing but tensors and plain containers.
    counters: int64 is allowed too, which batch norms count their batches in
    pick: from what a file holds to the weights that are meant; of a list of several state dicts the
          last by default, the EMA's where it has one

    Raises ValueError naming the file and what is wrong with it, tensors of another type than
    float64, float32, float16 and bfloat16 among that."""
    if Path(path).suffix == ".safetensors":
        content: Any = _shapes(path) if shapes_only else read_tensors(path)[0]
    else:
        content = _unpickled(path, allow_pickle, shapes_only)
    weights = pick(content)
    if not weights:
        raise ValueError(f"{path} holds no state dict of tensors")
    allowed = {*FLOATS.values(), *([torch.int64] if counters else [])}
    for name, tensor in weights.items():
        if tensor.layout != torch.strided or tensor.dtype not in allowed:
            raise _other_type(path, name, f"{tensor.dtype}, {tensor.layout}")
        if tensor.is_meta and not shapes_only:
            raise ValueError(f"{path}: {name} has no values: it was saved from the meta device")
        _check_shape(path, name, tensor.shape)
    return weights


def _unpickled(path: str | os.PathLike, allow_pickle: bool, shapes_only: bool) -> Any:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such file: {path}")
    if not allow_pickle:
        raise ValueError(
            f"{path} is a pickle, which is not loaded unasked: pass allow_pickle=True, or "
            "--allow-pickle, if you trust it, or give a .safetensors file"
        )
    check_fits(f"{path}", os.path.getsize(path))
    try:
        check_not_empty(path)
        if not shapes_only and zipfile.is_zipfile(path):
            _check_zip(path)
        device = "meta" if shapes_only else "cpu"
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # the unpickler raises nearly anything on damaged files
        raise ValueError(f"{path} can't be read as a state dict: {_why(error)}") from None


def _why(error: Exception) -> str:
    """In one line, what kept torch from unpickling a file."""
    said = str(error)
    if refused := re.search(r"GLOBAL ([\w.]+) (?:was not an allowed|whose module)", said):
        return (
            f"it holds a {refused[1]} beside tensors and plain containers, and no other objects "
            "are made from a file; save the state dicts alone"
        )
    if unpickler := re.search(r"WeightsUnpickler error:\s*(.+)", said):
        return f"it is no file of torch.save, or is damaged: {unpickler[1]}"
    return said.strip().split("\n")[0]


def _shapes(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors that a safetensors file's header announces, on the meta device."""
    shapes = {}
    for name, each in _header(path).items():
        if name == "__metadata__":
            continue
        dtype, shape = (each.get("dtype"), each.get("shape")) if isinstance(each, dict) else (0, 0)
        if not isinstance(shape, list) or not all(type(side) is int for side in shape):
            raise ValueError(f"{path} is not a whole safetensors file: {name} has no shape")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise _other_type(path, name, f"{dtype}")
        _check_shape(path, name, shape)
        if math.prod(shape) > os.path.getsize(path):  # and maybe more than an int64 counts
            raise ValueError(f"{path} is not a whole safetensors file: {name} is not in it")
        shapes[name] = torch.empty(shape, dtype=_DTYPES[dtype], device="meta")
    return shapes


def _other_type(path: str | os.PathLike, name: str, dtype: str) -> ValueError:
    return ValueError(
        f"{path}: {name} has the type {dtype}; weights are {', '.join(map(str, FLOATS.values()))}"
    )


def _check_shape(path: str | os.PathLike, name: str, shape: Sequence[int]) -> None:
    if len(shape) > 8 or not all(0 < side < LARGEST_SIDE for side in shape):
        raise ValueError(f"{path}: {name} has no possible shape of weights, {tuple(shape)!r:.80}")


def _check_zip(path: str | os.PathLike) -> None:
    """Check the checksums of an archive of torch.save, which torch itself does not.

    Its records are stored as they are; compressed ones could be of any size."""
    with zipfile.ZipFile(path) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise ValueError("its records are compressed, which torch.save does not do")
        if (record := archive.testzip()) is not None:
            raise ValueError(f"{record} in it is damaged: its checksum is another")


def is_state_dict(content: object) -> bool:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items())
    )


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """A JSON object; ValueError names the file."""
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise FileNotFoundError("no such file")
        check_not_empty(path)
        with open(path, "rb") as file:
            text = file.read(LONGEST_JSON + 1)
        if len(text) > LONGEST_JSON:
            raise ValueError(f"it is longer than {LONGEST_JSON} bytes")
        content = json.loads(text.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is not a readable JSON file: it is nested too deep") from None
    except (OSError, ValueError) as error:  # JSON's, UTF-8's, and integers of too many digits
        raise ValueError(f"{path} is not a readable JSON file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(content).__name__}")
    return content


def write_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write a JSON object atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def check_weights(
    own: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], source: str | os.PathLike
) -> None:
    """ValueError names the first key of a model's `own` state dict that is missing from `weights`,
    unknown or of another shape. On the meta device too.
    """
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


def load_weights(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], source: str | os.PathLike
) -> None:
    """Copy `weights` into `model`, as `check_weights` allows it."""
    check_weights(model.state_dict(), weights, source)
    model.load_state_dict(weights)


def __getattr__(name: str) -> Any:
    """What stood here before `fastddpm.pretrained` did."""
    if name in ("BUNDLED", "CONFIG", "WEIGHTS", "build_model", "bundled_models", "load_model",
                "save_config", "save_model"):  # fmt: skip
        from fastddpm import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
