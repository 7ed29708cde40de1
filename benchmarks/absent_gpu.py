"""A GPU that is not there: torch as it would be beside an H100, with tensors that have shapes and
no values, so that what a step launches can be counted without one.

`pretend()` must run before torch is imported, in a process that does nothing else. It builds a
small library that tells torch's core of a CUDA device whose guard and streams do nothing
(FakeTensorMode brings its own only to builds with CUDA), and answers what Python asks of
torch.cuda. Autograd, the dispatcher, torch.compile's tracing and Inductor's code generation then
take the ways that they take on such a GPU; nothing can be computed. No counting here.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

GUARD = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using at::Device; using at::DeviceIndex; using c10::Stream;
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  Device getDevice() const override { return Device(c10::DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream) const noexcept override { return getStream(getDevice()); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
struct Hooks final : at::CUDAHooksInterface {
  Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
};
}
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
namespace at { using ::Hooks; C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks) }
"""

H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 << 30, warp_size=32,
    multi_processor_count=132, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    regs_per_multiprocessor=65536, shared_memory_per_block=48 << 10, L2_cache_size=50 << 20,
    shared_memory_per_block_optin=227 << 10, shared_memory_per_multiprocessor=228 << 10,
    gcnArchName="", is_integrated=0, is_multi_gpu_board=0,
)  # fmt: skip


class Unavailable(Exception):
    """Why nothing can be pretended here."""


def pretend() -> None:
    """Give this process the GPU. Unavailable where torch is imported already, is built for CUDA, or
    no compiler builds the guard."""
    if "torch" in sys.modules:
        raise Unavailable("torch is imported already")
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise Unavailable("torch is not installed")
    home = Path(spec.origin).parent
    if (home / "lib" / "libtorch_cuda.so").exists():
        raise Unavailable("this torch is built for CUDA: measure there, or install the CPU's torch")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(GUARD, encoding="utf-8")
        command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", str(source), "-o", str(library)]
        command += [f"-I{home}/include", f"-L{home}/lib", "-ltorch_cpu", "-lc10"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            raise Unavailable("there is no g++") from None
        if done.returncode:
            raise Unavailable(f"g++: {done.stderr.strip().splitlines()[-1]}")
        for name in ("libtorch_global_deps.so", "libtorch_cpu.so"):
            ctypes.CDLL(str(home / "lib" / name), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))  # torch asks for its hooks once, at its import
    _answer()


def _answer() -> None:
    """What Python code asks of torch.cuda and Triton."""
    import torch
    import torch._dynamo
    import torch._inductor.compile_fx
    import torch._inductor.config as config
    import torch.utils._triton
    from torch._inductor.fx_passes import joint_graph

    joint_graph.lazy_init(torch.device("cpu"))  # traces its patterns on real tensors
    joint_graph.lazy_init = lambda *_: None  # type: ignore[assignment]
    config.shape_padding = False  # decided by timing; the shapes here need none
    config.joint_graph_constant_folding = False  # makes its constants on the device
    config.fx_graph_cache, config.compile_threads = False, 1

    state = torch.zeros(16, dtype=torch.uint8)
    answers: dict[str, Any] = {
        "is_available": lambda: True, "is_initialized": lambda: True, "init": lambda: None,
        "_is_compiled": lambda: True, "_lazy_init": lambda: None, "device_count": lambda: 1,
        "current_device": lambda: 0, "set_device": lambda _: None,
        "_exchange_device": lambda _: 0, "_maybe_exchange_device": lambda _: 0,
        "get_device_properties": lambda _=None: H100,
        "_get_device_properties": lambda _=None: H100,
        "get_device_capability": lambda _=None: (H100.major, H100.minor),
        "get_device_name": lambda _=None: H100.name, "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda _=None: None, "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda *_: state, "set_rng_state": lambda *_: None,
        "mem_get_info": lambda _=None: (H100.total_memory, H100.total_memory),
        "memory_allocated": lambda _=None: 0, "default_generators": (torch.Generator(),),
    }  # fmt: skip
    import torch.cuda.random

    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
        if hasattr(torch.cuda.random, name):
            setattr(torch.cuda.random, name, answer)
    for name, value in {
        "_cuda_getDevice": 0, "_cuda_setDevice": None, "_cuda_exchangeDevice": 0,
        "_cuda_maybeExchangeDevice": 0, "_cuda_getDeviceCount": 1, "_cuda_getCurrentRawStream": 0,
    }.items():  # fmt: skip
        setattr(torch._C, name, lambda *_, value=value: value)
    torch.version.cuda = "13.0"

    # As cuDNN says: channels_last where one of the two is.
    def memory_format(x: torch.Tensor, weight: torch.Tensor, _: Any) -> torch.memory_format:
        nhwc = torch.channels_last
        either = any(y.dim() == 4 and _is_nhwc(y) for y in (x, weight))
        return nhwc if either else torch.contiguous_format

    torch._C._conv_determine_backend_memory_format = memory_format

    # Asks for plain tensors, which those without values are not.
    torch.nn.utils.clip_grad._has_foreach_support = lambda *_: True  # type: ignore[attr-defined]
    cuda = torch.backends.cuda
    cuda.can_use_flash_attention = lambda p, *_: is_flash(p.query)  # type: ignore[assignment]
    cuda.can_use_efficient_attention = lambda p, *_: p.query.dtype != torch.float64  # type: ignore

    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 10 * H100.major + H100.minor, H100.warp_size)

        def get_current_device(self) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def get_current_stream(self, _: int) -> int:
            return 0

    triton.runtime.driver.set_active(Driver())
    torch.utils._triton.triton_hash_with_backend = lambda: "absent"


def _is_nhwc(x: Any) -> bool:
    """As torch's suggest_memory_format: the strides of channels_last, and not of the default."""
    import torch

    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def is_flash(q: Any) -> bool:
    """Whether torch's flash attention takes queries like these."""
    import torch

    return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256


def flash_or_efficient(q: Any, k: Any, v: Any, *_: Any, **options: Any) -> Any:
    """scaled_dot_product_attention by the kernel that torch takes on this GPU without a mask: flash
    in half precision up to 256 columns a head, else the memory-efficient one."""
    import torch

    dropout, scale = options.get("dropout_p", 0.0), options.get("scale")
    if is_flash(q):
        return torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, dropout, False, False, scale=scale
        )[0]
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, q.requires_grad, dropout, False, scale=scale
    )[0]


@contextlib.contextmanager
def mode() -> Iterator[Any]:
    """A block whose new tensors have no values, on "cuda" as on the CPU."""
    import torch
    from torch._subclasses import FakeTensorMode

    functional = torch.nn.functional
    with (
        mock.patch.object(functional, "scaled_dot_product_attention", flash_or_efficient),
        mock.patch.object(FakeTensorMode, "avoid_device_init", True),  # though it is "available"
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
    ):
        yield fake


@contextlib.contextmanager
def shapes() -> Iterator[None]:
    """A block, inside `mode` too, in which modules are made as shapes, for `on_gpu`."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.device("meta"):
        yield


def on_gpu(model: Any) -> Any:
    """A module made under `shapes`, in place, with its parameters on the GPU; inside `mode`."""
    import torch

    with torch.no_grad():
        for module in model.modules():
            for kind in (module._parameters, module._buffers):
                for name, x in kind.items():
                    if x is not None:
                        y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
                        kind[name] = y
                        if isinstance(x, torch.nn.Parameter):
                            kind[name] = torch.nn.Parameter(y, requires_grad=x.requires_grad)
    return model
