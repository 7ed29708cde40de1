"""What torch.compile launches on a GPU that is not there: Inductor's own code for it, run with its
Triton kernels written down in place of being launched. No model of time here.

The code is what Inductor generates for an H100 (absent_gpu.py). What it calls in libraries (cuDNN,
cuBLAS, flash attention) passes the same Counter as eager torch does. A generated kernel's bytes are
those of its arguments: each tensor once, or less where its loads can't reach all of it. Inductor
times alternatives on the device only for products and convolutions (max-autotune); here the library
stands for them, whose rate the model gives to everybody."""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch._inductor.config as config
from gpu_count import Counter, size
from gpu_model import Kernel
from torch import Tensor


class Generated:
    """A Triton kernel of Inductor's: its name, and the names of its parameters in the source."""

    def __init__(self, counter: Counter, name: str, source: str):
        self.counter, self.name, self.source = counter, name, source
        found = re.search(rf"def {re.escape(name)}\(([^)]*)\)", source)
        assert found is not None
        self.parameters = [p.split(":")[0].strip() for p in found[1].split(",")]

    def run(self, *args: Any, stream: Any = None, **_: Any) -> None:
        elements = 1
        for name, value in zip(self.parameters, args, strict=False):
            if name.endswith("numel"):
                elements *= int(value)
        read = written = 0
        for name, x in zip(self.parameters, args, strict=False):
            if not isinstance(x, Tensor):
                continue
            loads = len(re.findall(rf"tl\.load\({name} ", self.source))
            stores = len(re.findall(rf"tl\.(?:store|atomic_add)\({name} ", self.source))
            if loads:
                read += min(size(x), loads * elements * x.itemsize)
            if stores:
                written += min(size(x), stores * elements * x.itemsize)
        if not self.counter.paused:
            more = self._product()
            self.counter.kernels.append(Kernel(self.name, kind(self.name), read, written, **more))

    def _product(self) -> dict[str, Any]:
        """Of a template: M, N and K stand in its source."""
        if not self.name.startswith("triton_tem"):
            return {}
        sizes = (re.search(rf"^    {name} = (\d+)$", self.source, re.M) for name in "MNK")
        m, n, k = (int(found[1]) for found in sizes if found is not None)
        return {"operations": 2.0 * m * n * k, "product": (m, n, k)}


def kind(name: str) -> str:
    if name.startswith("triton_tem"):
        return "product"
    return "norm" if "group_norm" in name else "fused"


class Compile:
    """async_compile of the generated code."""

    def __init__(self, counter: Counter):
        self.counter = counter

    def triton(self, name: str, source: str, **_: Any) -> Generated:
        return Generated(self.counter, name, source)

    def wait(self, _: Any) -> None:
        pass


@contextlib.contextmanager
def counted(counter: Counter, *, best: bool = False) -> Iterator[list[str]]:
    """A block in which what Inductor generates is run as text on tensors without values, its
    launches written down; the generated modules.

    best: products, those of 1x1 convolutions among them, are Inductor's own templates, as
    max-autotune has them where they win, with all that it fuses into them."""
    from torch._inductor.graph import GraphLowering

    options: dict[str, Any] = {}
    if best:  # one configuration of one kind each: nothing is left to be timed
        options = {
            "max_autotune_gemm": True,
            "max_autotune_gemm_backends": "TRITON",
            "max_autotune_conv_backends": "ATEN",
            "test_configs.max_mm_configs": 1,
            "epilogue_fusion": True,
        }

    codes: list[str] = []

    def compile_to_module(graph: GraphLowering) -> Any:
        codes.append(graph.codegen()[0].value)
        run = load(codes[-1], counter)

        def call(args: list) -> Any:
            with counter:
                return run(args)

        return types.SimpleNamespace(call=call)

    torch._dynamo.reset()
    patched = mock.patch.object(GraphLowering, "compile_to_module", compile_to_module)
    with patched, config.patch(options):
        yield codes


def load(code: str, counter: Counter) -> Callable[[list], Any]:
    """`call` of a generated module, with what it takes from torch's core in terms of torch."""
    stand_ins: dict[str, Any] = {
        "async_compile": Compile(counter),
        "empty_strided_cuda": lambda s, t, dtype: torch.empty_strided(
            s, t, dtype=dtype, device="cuda"
        ),
        "reinterpret_tensor": lambda x, s, t, offset=0: x.as_strided(
            s, t, x.storage_offset() + offset
        ),
        "assert_size_stride": lambda *_: None,
        "assert_alignment": lambda *_: None,
        "copy_if_misaligned": lambda x: x,
        "get_raw_stream": lambda _: 0,
    }
    for name in stand_ins:
        code = re.sub(rf"^{name} = .*$", "", code, flags=re.M)
        code = re.sub(rf"^from .* import .*\b{name}$", "", code, flags=re.M)
    scope: dict[str, Any] = {"__name__": "generated", "__file__": __file__, **stand_ins}
    exec(compile(code, "generated", "exec"), scope)
    return scope["call"]
