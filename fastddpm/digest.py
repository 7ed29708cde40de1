"""Digests of what is on disk: a file that names its own is checked against it when it is read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

KEY = "digest"  # of a safetensors file's metadata, and of a JSON object


def of_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """ "sha256:..." of every tensor's name, dtype, shape and bytes and of the metadata but KEY.

    A function of the content alone: not of strides, device, order or the number of threads. The
    tensors are hashed one by one, several at once (hashlib leaves the interpreter alone meanwhile).
    """
    names = sorted(tensors)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(_of_tensor, (tensors[name] for name in names)))
    rest = {key: value for key, value in metadata.items() if key != KEY}
    return _of_text([list(zip(names, hashes, strict=True)), rest])


def of_json(content: Mapping[str, Any]) -> str:
    """ "sha256:..." of a JSON object but its KEY, however it is indented and ordered."""
    return _of_text({key: value for key, value in content.items() if key != KEY})


def _of_tensor(tensor: torch.Tensor) -> tuple[str, list[int], str]:
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    content = tensor.reshape(-1).view(torch.uint8).numpy().data
    return str(tensor.dtype), list(tensor.shape), hashlib.sha256(content).hexdigest()


def _of_text(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
