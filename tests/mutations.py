"""Mutated model files, each loaded under a limit of time and memory: a process of its own, as what
goes wrong may not be an exception. `python mutations.py FOLDER COUNT SEED` prints the failures.

FOLDER holds the whole ones: ours/, theirs/ (diffusers', sharded/ too) and port.safetensors."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fastddpm import UNet

SECONDS, BYTES = 5, 2**31
STEM = "diffusion_pytorch_model"
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 5, 16, 1.0, 1.5, -0.5, 1e-300, 1e300, float("nan"),
    float("inf"), 10**6, 10**9, 2**31, 2**63, 10**300, "", "1", "eps", "x" * 1000, [], {}, [1],
    [1, 2], [2, 1, 1], [0], [1.5], ["1"], [None], [[]], [8, 16], [10**6, 10**6], {"a": 1},
    list(range(3000)), [1] * 12, ["DownBlock2D"], ["AttnDownBlock2D"] * 2, "UNet2DModel", 4, 8, 64,
]  # fmt: skip
TYPES = [torch.bool, torch.uint8, torch.int64, torch.complex64, torch.float8_e4m3fn,
         torch.float64, torch.float16, torch.bfloat16]  # fmt: skip


class TooLong(BaseException):
    pass


def places(tree: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON tree."""
    for key in list(tree) if isinstance(tree, dict) else range(min(len(tree), 4)):
        found.append((tree, key))
        if isinstance(tree[key], (dict, list)):
            places(tree[key], found)
    return found


def mutate_json(path: Path, draw: random.Random) -> str:
    """One change of a value, a key or the text; the digest is gone in half of ours."""
    content = json.loads(path.read_text())
    if draw.random() < 0.5:
        content.pop("digest", None)
    tree, key = draw.choice(places(content, []))
    kind = draw.choice(["value"] * 6 + ["drop", "rename", "scale", "cut", "byte", "deep", "huge"])
    what = f"{path.name}: {kind} {key!r}"
    if kind == "value":
        value = draw.choice(VALUES)
        tree[key], what = value, f"{what} = {value!r:.40}"
    elif kind == "drop":
        tree.pop(key)
    elif kind == "rename" and isinstance(tree, dict):
        tree[f"{key}_"] = tree.pop(key)
    elif kind == "scale" and isinstance(tree[key], (int, float)):
        tree[key] = tree[key] * draw.choice([-1, 2, 3, 1000])
        what += f" = {tree[key]!r}"
    text = json.dumps(content)
    if kind == "cut":
        text = text[: draw.randrange(len(text))]
    elif kind == "deep":
        text = text[:-1] + ', "a": ' + draw.choice(['{"a":', "["]) * 100_000
    elif kind == "huge":
        text = text.replace("1", "9" * draw.choice([400, 5000]), 1)
    data = bytearray(text.encode())
    if kind == "byte":
        data[draw.randrange(len(data))] = draw.randrange(256)
    path.write_bytes(data)
    return what


def mutate_tensors(path: Path, draw: random.Random) -> str:
    """One change of a name, a shape, a type or the bytes of a file of weights."""
    kind = draw.choice(["rename", "shape", "type", "drop", "add", "header", "length", "byte", "cut",
                        "sparse"])  # fmt: skip
    if kind in ("rename", "shape", "type", "drop", "add"):
        tensors = load_file(path)
        name = draw.choice(sorted(tensors))
        what = f"{path.name}: {kind} {name}"
        if kind == "rename":
            new = name.replace(draw.choice("0123"), draw.choice(["7", "99999999999", "01", "-1"]))
            new = draw.choice([new, f"module.{name}", name.replace("q", "k"), name[::-1], ""])
            tensors[new] = tensors.pop(name)
            what += f" -> {new}"
        elif kind == "shape":
            x = tensors[name]
            shapes = [(-1,), (1, *x.shape), (*x.shape, 1, 1), tuple(reversed(x.shape)), (2, -1)]
            shape = draw.choice(shapes)
            tensors[name] = x.reshape(shape) if x.numel() % 2 == 0 else x.flatten()
            if draw.random() < 0.3:
                tensors[name] = torch.zeros(draw.choice([(0,), (3, 0), (1,), (), (7, 5, 3, 3)]))
            what += f" {tuple(tensors[name].shape)}"
        elif kind == "type":
            dtype = draw.choice(TYPES)
            tensors[name] = tensors[name].to(dtype)
            what += f" {dtype}"
        elif kind == "drop":
            tensors.pop(name)
        else:
            tensors[draw.choice(["down.9.block.0.conv1.weight", "x", f"{name}.0"])] = tensors[
                name
            ].clone()
        save_file(tensors, path)
        return what
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    if kind == "header":
        header = json.loads(data[8 : 8 + length])
        tree, key = draw.choice(places(header, []))
        value = draw.choice([*VALUES, "F8_E8M0", "F4", "BOOL", "F64", -1, [2**62, 4]])
        tree[key] = value
        text = json.dumps(header).encode()
        data[: 8 + length] = len(text).to_bytes(8, "little") + text
        what = f"header {key!r} = {value!r:.40}"
    elif kind == "length":
        value = draw.choice([0, 1, length - 1, length + 1, 2**25, 2**40, 2**64 - 1])
        data[:8] = value.to_bytes(8, "little")
        what = f"length {value}"
    elif kind == "byte":
        places_ = draw.choice([range(8, 8 + length), range(8 + length, len(data))])
        data[(where := draw.choice(places_))] ^= 1 << draw.randrange(8)
        what = f"bit of byte {where}"
    elif kind == "cut":
        data = data[: draw.randrange(len(data))]
        what = f"cut at {len(data)}"
    else:
        return sparse(path, data, length, draw)
    path.write_bytes(data)
    return f"{path.name}: {what}"


def sparse(path: Path, data: bytearray, length: int, draw: random.Random) -> str:
    """The last tensor grown by a hole of zeros, the header in accord with it."""
    header = json.loads(data[8 : 8 + length])
    tensors = {name: each for name, each in header.items() if name != "__metadata__"}
    name = max(tensors, key=lambda name: tensors[name]["data_offsets"][1])
    start, _ = tensors[name]["data_offsets"]
    count = draw.choice([2**20, 2**30, 2**38])
    shape = draw.choice([[count], [count // 8, 8], [count // 64, 8, 8, 1]])
    header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, start + 4 * count]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + data[8 + length :])
        file.truncate(8 + len(text) + start + 4 * count)
    return f"{path.name}: {name} is sparse, {shape}"


def work(model: UNet) -> torch.Tensor:
    """The output of a loaded model; an error if it has none."""
    side = max(8, 2 ** (len(model.config["channel_mult"]) - 1))
    x = torch.linspace(-1, 1, model.in_channels * side * side).view(1, -1, side, side)
    with torch.no_grad():
        return model(x, torch.tensor([3]))


def check(path: Path, expected: torch.Tensor | None, options: dict[str, Any]) -> str | None:
    """What is wrong with how this file is taken, or None: ValueError or FileNotFoundError, or a
    model that works, which is the `expected` one where the file has a digest.
    """
    started = time.perf_counter()
    try:
        signal.alarm(SECONDS)
        output = work(UNet.from_pretrained(path, **options))
        signal.alarm(0)
    except (ValueError, FileNotFoundError) as error:
        signal.alarm(0)
        problem = None if str(error).strip() else "an error without words"
    except BaseException:
        signal.alarm(0)
        problem = traceback.format_exc(limit=-4)
    else:
        problem = None
        if expected is not None and not torch.equal(output, expected):
            problem = "another model, silently"
    seconds = time.perf_counter() - started
    return problem or (f"took {seconds:.1f} s" if seconds > SECONDS else None)


def run(folder: Path, count: int, seed: int) -> list[str]:
    """The failures among `count` mutated inputs, a line or a traceback each."""
    draw, failures = random.Random(seed), []
    expected = work(UNet.from_pretrained(folder / "ours"))
    scratch = folder / "mutated"
    targets: list[tuple[str, str, Callable[[Path, random.Random], str]]] = [
        ("ours", "config.json", mutate_json),
        ("ours", "model.safetensors", mutate_tensors),
        ("theirs", "config.json", mutate_json),
        ("theirs", "scheduler_config.json", mutate_json),
        ("theirs", f"{STEM}.safetensors", mutate_tensors),
        ("sharded", f"{STEM}.safetensors.index.json", mutate_json),
        ("port.safetensors", "", mutate_tensors),
        ("port.safetensors", "", mutate_tensors),
    ]
    for i in range(count):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        source, name, mutate = targets[i % len(targets)]
        whole = folder / source
        path = scratch / source
        shutil.copytree(whole, path) if whole.is_dir() else shutil.copy(whole, path)
        what = mutate(path / name if name else path, draw)
        options = {"num_groups": 4} if source == "port.safetensors" else {}
        # A digest holds what a mutation of bits can do; save_file writes none, and is a stranger's.
        with (path / name if name else path).open("rb") as file:
            signed = source == "ours" and b'"digest"' in file.read(4096)
        if problem := check(path, expected if signed else None, options):
            failures.append(f"{i}: {source}/{what}: {problem}")
    shutil.rmtree(scratch, ignore_errors=True)
    return failures


def too_long(*_: Any) -> None:
    raise TooLong(f"more than {SECONDS} s")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, too_long)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    found = run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    print("\n".join(found))
    sys.exit(len(found) > 0)
