"""Who takes part in benchmarks/throughput.py: how each implementation is found and built, at the
fairest setting that its users know. No clock and no table.

A contestant is an engine of fastddpm, or a peer: an eps(x, t) that fastddpm's eager engine drives
with its own fused posterior step, so that networks are all that a peer differs in."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fastddpm import UNet
from fastddpm.engine import EngineName, choose, make_engine
from fastddpm.engine.eager import Eager
from fastddpm.integrations.diffusers import to_diffusers
from fastddpm.precision import convolutions_take_tf32, float32_kept, tf32_asked

Eps = Callable[[Tensor, Tensor], Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Job:
    """One contestant at one batch size, JSON-ready.

    model: a folder or a bundled name;  shape: (C, H, W);  folder: where it keeps what it prepared
    """

    name: str
    precision: str
    model: str
    batch: int
    device: str
    threads: int
    shape: tuple[int, int, int]
    folder: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def file(self, suffix: str) -> Path:
        return Path(self.folder) / f"{self.batch}{suffix}"

    def unet(self) -> UNet:
        return UNet.from_pretrained(self.model).to(self.device)

    def example(self) -> tuple[Tensor, Tensor]:
        x = torch.zeros(self.batch, *self.shape, device=self.device)
        return x, torch.zeros(self.batch, dtype=torch.int64, device=self.device)


class Plain(nn.Module):
    """diffusers' model as eps(x, t) in one dtype and memory format, float32 outside."""

    def __init__(self, job: Job, memory_format: torch.memory_format):
        super().__init__()
        self.dtype, self.memory_format = job.dtype, memory_format
        self.net = to_diffusers(job.unet()).to(job.dtype, memory_format=memory_format).eval()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x.to(self.dtype, memory_format=self.memory_format)
        return self.net(x, t, return_dict=False)[0].float()


# ---- the peers -----------------------------------------------------------------------------------


def eager_nchw(job: Job) -> Eps:
    return Plain(job, torch.contiguous_format)


def eager_nhwc(job: Job) -> Eps:
    return Plain(job, torch.channels_last)


def compiled(job: Job) -> Eps:
    return torch.compile(eager_nhwc(job), dynamic=False)


def compiled_freezing(job: Job) -> Eps:
    import torch._inductor.config

    torch._inductor.config.freezing = True  # of this process, which runs nothing else
    return compiled(job)


def compiled_autotuned(job: Job) -> Eps:
    return torch.compile(eager_nhwc(job), dynamic=False, mode="max-autotune")


def prepare_openvino(job: Job) -> None:
    import openvino

    network = Plain(job, torch.contiguous_format)
    example = job.example()
    model = openvino.convert_model(network, example_input=example)
    for port, x in zip(model.inputs, example, strict=True):
        port.get_node().set_partial_shape(openvino.PartialShape(list(x.shape)))
    model.validate_nodes_and_infer_types()
    openvino.save_model(model, job.file(".xml"), compress_to_fp16=False)


def openvino_cpu(job: Job) -> Eps:
    import openvino

    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[job.precision],
        "INFERENCE_NUM_THREADS": job.threads,
    }
    model = openvino.Core().compile_model(job.file(".xml"), "CPU", hints)
    wanted, used = hints["INFERENCE_PRECISION_HINT"], model.get_property("INFERENCE_PRECISION_HINT")
    if used.get_type_name() != wanted:
        raise ValueError(f"OpenVINO runs in {used.get_type_name()} in place of {wanted}")
    request = model.create_infer_request()

    def eps(x: Tensor, t: Tensor) -> Tensor:
        inputs = [x.contiguous().numpy(), t.numpy()]
        out = request.infer(inputs, share_inputs=True, share_outputs=True)[0]
        return torch.from_numpy(out)

    return eps


def prepare_onnxruntime(job: Job) -> None:
    network = Plain(job, torch.contiguous_format)
    torch.onnx.export(
        network, job.example(), job.file(".onnx"),
        input_names=["x", "t"], output_names=["eps"], dynamo=True, external_data=False,
    )  # fmt: skip


def onnxruntime_cpu(job: Job) -> Eps:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    session = onnxruntime.InferenceSession(
        job.file(".onnx"), options, providers=["CPUExecutionProvider"]
    )

    def eps(x: Tensor, t: Tensor) -> Tensor:
        inputs = {"x": x.contiguous().numpy(), "t": t.numpy()}
        return torch.from_numpy(session.run(None, inputs)[0])

    return eps


@dataclass(frozen=True)
class Peer:
    """build: makes its eps;  prepare: writes what it builds from, in a process of its own;
    needs: packages;  precisions, devices: what it has;  same: whether its network is ours
    """

    build: Callable[[Job], Eps]
    prepare: Callable[[Job], None] | None = None
    needs: tuple[str, ...] = ("diffusers",)
    precisions: tuple[str, ...] = ("fp32", "bf16")
    devices: tuple[str, ...] = ("cpu", "cuda")
    same: bool = True

    def missing(self, precision: str, device: str) -> str | None:
        """Why it can't take part, or None."""
        if absent := [name for name in self.needs if importlib.util.find_spec(name) is None]:
            return f"{', '.join(absent)} not installed"
        if precision not in self.precisions:
            return f"it has no {precision} on this device"
        return None if device in self.devices else f"set up here for {self.devices[0]} only"


PEERS = {
    "diffusers NCHW": Peer(eager_nchw),
    "diffusers channels_last": Peer(eager_nhwc),
    "torch.compile": Peer(compiled),
    "torch.compile freezing": Peer(compiled_freezing),
    "torch.compile max-autotune": Peer(compiled_autotuned, devices=("cuda",)),
    "OpenVINO": Peer(
        openvino_cpu, prepare_openvino, needs=("diffusers", "openvino"), devices=("cpu",)
    ),
    "ONNX Runtime": Peer(
        onnxruntime_cpu,
        prepare_onnxruntime,
        needs=("diffusers", "onnxruntime", "onnx", "onnxscript"),
        precisions=("fp32",),
        devices=("cpu",),
    ),
}
OURS = {f"fastddpm {name}": name for name in get_args(EngineName) if name != "auto"}


# ---- what throughput.py calls --------------------------------------------------------------------


def missing(name: str, precision: str, device: str) -> str | None:
    """Why `name` can't take part, as far as can be said before it is built; or None."""
    if name in PEERS:
        return PEERS[name].missing(precision, device)
    any_unet = UNet(channels=32, channel_mult=(1,), attention_levels=(), image_size=8)
    try:
        choose(OURS[name], any_unet, torch.device(device), precision)
    except ValueError as error:
        return str(error)
    return None


def versions() -> dict[str, str]:
    """Of the peers' packages that are installed."""
    return installed(package for peer in PEERS.values() for package in peer.needs)


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    packages = dict.fromkeys(packages)
    return {
        package: importlib.metadata.version(package)
        for package in packages
        if importlib.util.find_spec(package) is not None
    }


def settings(device: torch.device) -> dict[str, str]:
    """What torch is told of a GPU while a float32 contestant runs: nobody sets it here, so it is
    what `fastddpm.sample` runs with. All of them are called inside `float32_kept`.
    """
    if device.type != "cuda":
        return {}
    with float32_kept("fp32", device):
        taken = {"products": tf32_asked(), "convolutions": convolutions_take_tf32()}
    where = [name for name, there in taken.items() if there]
    return {
        "TF32": f"in {', '.join(where)}" if where else "nowhere",
        "cudnn.benchmark": "on" if torch.backends.cudnn.benchmark else "off",
    }


def needs_preparing(job: Job) -> bool:
    return job.name in PEERS and PEERS[job.name].prepare is not None


def prepare(job: Job) -> None:
    """Write what the contestant builds from; to be called in a process that then ends, so that
    the exporter's memory is not the contestant's."""
    write = PEERS[job.name].prepare
    assert write is not None
    with torch.inference_mode():
        write(job)


def build(job: Job) -> Any:
    """The contestant as an engine: `run(xt, seed=, sample_index=, start=, stop=, on_step=)`.

    Raises whatever its library does, ValueError if an engine of ours is not what was asked for.
    """
    options: dict[str, Any] = {"device": torch.device(job.device), "clip": False}
    model = job.unet()
    if job.name in OURS:
        asked = (OURS[job.name], job.precision)
        engine = make_engine(asked[0], model, model.diffusion, precision=asked[1], **options)
        if (got := (engine.name, engine.precision)) != asked:
            raise ValueError(f"it can't run here: {' '.join(got)} runs in its place")
        return engine
    diffusion = model.diffusion
    del model  # the peer has its own copy
    network = PEERS[job.name].build(job)

    def eps(x: Tensor, t: Tensor) -> Tensor:
        with torch.inference_mode():
            return network(x, t)

    return Eager(eps, diffusion, precision="fp32", **options)
