"""Tensors and models on two devices, and on one that is too small: the right answer or the reason.

Tensors of cards that are not there are torch's FakeTensors: they have a device and no values."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from test_cuda_graph import Recorder
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from toy import SCHEDULE, images, tiny_unet, wave

import fastddpm
from fastddpm import Diffusion, _native, arguments, bits_per_dim, chain, cli, ops, ranks
from fastddpm.engine.cuda_graph import CudaGraph
from fastddpm.ops import cuda
from fastddpm.training import Trainer

N, C = 2, 4
IMAGE = (N, C, 3, 5)
FIRST, OTHERS = "cuda:0", ("cuda:1", "cpu")


def fake(shape, device, dtype=torch.float32):
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device=device)


# op -> {argument: shape, or the value of one that is no tensor}
OPERANDS = {
    "randn": {"shape": list(IMAGE), "seed": 1, "sample_index": (N,), "step": (N,)},
    "noise": {"x0": IMAGE, "t": (N,), "table": (1000, 8), "eps": IMAGE, "flip": (N,)},
    "noise, drawn": {
        "x0": IMAGE, "t": (N,), "table": (1000, 8), "seed": 1, "sample_index": (N,), "step": (N,),
    },
    "posterior_step": {
        "xt": IMAGE, "model_output": IMAGE, "t": (N,), "table": (1000, 8), "z": IMAGE,
        "log_variance": IMAGE, "out": IMAGE,
    },
    "posterior_step, drawn": {
        "xt": IMAGE, "model_output": IMAGE, "t": (N,), "table": (1000, 8), "seed": (1,),
        "sample_index": (N,), "step": (N,),
    },
    "group_norm_silu": {
        "x": IMAGE, "num_groups": 2, "weight": (2 * C,), "bias": (2 * C,), "scale": (N, 2 * C),
        "shift": (N, 2 * C), "before": (C,), "residual": IMAGE, "x2": IMAGE, "dropout": 0.5,
        "seed": 1, "sample_index": (N,), "step": (N,),
    },
    "residual_sum": {"x": IMAGE, "residual": IMAGE, "before": (N, C)},
    "attention_block": {
        "x": IMAGE, "num_groups": 2, "norm_weight": (C,), "norm_bias": (C,),
        "qkv_weight": (3 * C, C), "qkv_bias": (3 * C,), "proj_weight": (C, C), "proj_bias": (C,),
    },
    "convolution": {
        "x": IMAGE, "weight": (C, 2 * C, 3, 3), "bias": (C,), "x2": IMAGE, "num_groups": 2,
        "norm_weight": (2 * C,), "norm_bias": (2 * C,), "shift": (N, C), "residual": IMAGE,
        "dropout": 0.5, "seed": 1, "sample_index": (N,), "step": (N,),
    },
    "discretized_log_likelihood": {"x": IMAGE, "mean": IMAGE, "log_scale": IMAGE},
    "squared_error": {"prediction": IMAGE, "target": IMAGE},
    "vlb_term": {
        "x0": IMAGE, "xt": IMAGE, "model_output": IMAGE, "t": (N,), "table": (1000, 8),
        "log_ratio": (1000,), "log_variance": IMAGE,
    },
    "vlb_term, drawn": {
        "x0": IMAGE, "xt": None, "model_output": IMAGE, "t": (N,), "table": (1000, 8),
        "log_ratio": (1000,), "seed": 1, "sample_index": (N,), "step": (N,),
    },
}  # fmt: skip
DTYPES = {"flip": torch.bool, **dict.fromkeys(("t", "step", "seed", "sample_index"), torch.int64)}
LEADS = ("x", "x0", "xt", "prediction")  # what the others have to follow
CASES = [
    (op, name)
    for op, operands in OPERANDS.items()
    for name, value in operands.items()
    if isinstance(value, tuple) and name not in (*LEADS, "sample_index" * (op == "randn"))
]


@pytest.mark.parametrize("device", OTHERS)
@pytest.mark.parametrize(("op", "name"), CASES)
def test_an_operand_of_an_op_on_another_device(op, name, device):
    arguments = {
        k: fake(v, device if k == name else FIRST, DTYPES.get(k, torch.float32))
        if isinstance(v, tuple)
        else v
        for k, v in OPERANDS[op].items()
    }
    with pytest.raises(ValueError, match=f"^{name} must be on {FIRST} .*; got {device}$"):
        getattr(ops, op.split(",")[0])(**arguments)


def test_every_operand_of_every_op_is_among_them():
    for op in ops.__all__:
        if op in ("use_backend", "adam", "grad_norm"):  # lists: test_adam.py
            continue
        covered = {name for case, name in CASES if case.split(",")[0] == op}
        hints = getattr(ops, op).__annotations__
        tensors = {name for name, hint in hints.items() if "Tensor" in hint and name != "return"}
        missing = tensors - covered - set(LEADS) - {"sample_index"}
        assert not missing, f"{op}: {missing}"


# ---- models --------------------------------------------------------------------------------------


def divided():
    """A U-Net with its last convolution elsewhere."""
    model = tiny_unet()
    model.conv_out.to("meta")
    return model


class Elsewhere(nn.Module):
    """A model on a card that is not there."""

    def __init__(self, device="cuda:1"):
        super().__init__()
        self.weight = nn.Parameter(fake((2,), device))


X0, STEPS = images(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
IMAGE_OF_ONE = torch.zeros(1, 8, 8)
ENTRIES = {
    "sample": lambda model: fastddpm.sample(model, 1, progress=False),
    "progressive": lambda model: fastddpm.sample_progressive(model, 1, progress=False),
    "shared": lambda model: fastddpm.sample_shared_latent(model, 1, t=3, progress=False),
    "interpolate": lambda model: fastddpm.interpolate(
        model, IMAGE_OF_ONE, IMAGE_OF_ONE, t=3, progress=False
    ),
    "bits_per_dim": lambda model: bits_per_dim(model, X0, progress=False),
    "Trainer": Trainer,
}


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel], ids=["", "DataParallel"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_unet_on_two_devices(entry, wrap):
    message = r"on several devices \(temb.dense.0.weight on cpu, conv_out.weight on meta\): move it"
    with pytest.raises(ValueError, match=message):
        ENTRIES[entry](wrap(divided()))


def test_a_folder_of_a_unet_on_two_devices(tmp_path):
    with pytest.raises(ValueError, match="on several devices"):
        fastddpm.sample_to_folder(divided(), tmp_path / "out", 1, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["cuda:0", "cuda:2", "cpu", torch.device("cuda", 0)])
def test_a_model_on_another_card_than_was_asked_for(device):
    with pytest.raises(ValueError, match=f"the model is on cuda:1 and device is {device}: move"):
        fastddpm.sample(Elsewhere(), 1, shape=(1, 8, 8), device=device, progress=False)


@pytest.mark.parametrize("device", [None, "cuda", "cuda:1"])
def test_a_card_by_any_of_its_names(monkeypatch, device):
    probed = []
    monkeypatch.setattr(
        torch, "zeros", lambda *_, device, **__: probed.append(device) or torch.ones(())
    )
    place = arguments.device_of(Elsewhere(), device)
    assert (place, probed) in (
        (torch.device("cuda:1"), []),
        (torch.device("cpu"), [torch.device("cuda:1")]),  # of the probe
    )


def test_a_callable_is_where_the_model_is_that_it_calls():
    place = torch.device("cuda", 1)
    model, other = Elsewhere(), Elsewhere("cuda:0")
    assert arguments.device_of(lambda x, t: model(x, t), None) == place
    assert arguments.device_of(lambda x, t: model(other(x, t), t), None) == torch.device("cpu")
    assert arguments.device_of(wave, None) == torch.device("cpu")
    assert arguments.device_of(wave, None, place) == place
    away = Elsewhere("meta")
    with pytest.raises(ValueError, match="on the device 'meta'"):
        arguments.device_of(lambda x, t: away(x, t), None)


@pytest.mark.parametrize("name", ["x", "t"])
def test_the_unet_names_an_input_on_another_device(name):
    inputs = {"x": torch.zeros(2, 1, 8, 8), "t": torch.zeros(2, dtype=torch.int64)}
    inputs[name] = inputs[name].to("meta")
    with pytest.raises(ValueError, match=f"^{name} must be on cpu like the model; got meta"):
        tiny_unet()(**inputs)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: fastddpm.sample(model, 1, shape=(1, 8, 8), progress=False),
        lambda model: bits_per_dim(model, X0, progress=False),
        lambda model: Diffusion().loss(model, X0, t=STEPS, eps=torch.zeros(X0.shape)),
    ],
    ids=["sample", "bits_per_dim", "loss"],
)
def test_a_model_whose_output_is_elsewhere(use):
    with pytest.raises(ValueError, match="must return a tensor on cpu, where x_t is; got one on m"):
        use(lambda x, t: x.to("meta"))


def test_a_trainer_takes_the_images_to_its_model_and_names_a_model_that_left():
    trainer = Trainer(tiny_unet(), precision="fp32")
    with pytest.raises(ValueError, match="on the device 'meta'"):
        trainer.step(X0.to("meta"))
    trainer.network.conv_out.to("meta")
    with pytest.raises(ValueError, match=r"conv_out.* is not the parameter that it was"):
        trainer.step(X0)


@pytest.mark.parametrize(("capability", "runs"), [((9, 0), True), ((8, 6), True), ((7, 5), False)])
def test_a_card_that_the_kernels_were_not_built_for(monkeypatch, capability, runs):
    """Is left to Triton, and not found out by the first launch."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    info = {"cuda_architectures": "80-real,90-real,90-virtual"}
    monkeypatch.setattr(_native, "build_info", lambda: info)
    cuda._without_kernels.cache_clear()
    backend = cuda._Cuda(SimpleNamespace(randn=None), "cuda", "")
    said = backend.unsupported("randn", fake((N,), FIRST, torch.int64))
    cuda._without_kernels.cache_clear()
    why = "its kernels were built for 80-real,90-real,90-virtual, the card has capability 7.5"
    assert said == (None if runs else why)
    assert backend.unsupported("randn") is None


# ---- ranks and cards -----------------------------------------------------------------------------


def test_more_ranks_than_cards(monkeypatch):
    for name, value in {"WORLD_SIZE": 3, "RANK": 2, "LOCAL_RANK": 2, "MASTER_ADDR": "localhost",
                        "MASTER_PORT": 1}.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = "LOCAL_RANK is 2 .*this machine has 2: start as many ranks, or choose the CPU"
    with pytest.raises(ValueError, match=message), ranks.launched(torch.device("cuda")):
        raise AssertionError("it was launched")


def test_the_command_names_a_card_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit):
        cli.main(["sample", "--device=cuda:2"])
    assert "'cuda:2': this machine has 2, numbered from 0" in capsys.readouterr().err


# ---- too little memory ---------------------------------------------------------------------------


class Small:
    """What a card of little memory makes of a batch of more than `most`."""

    def __init__(self, most):
        self.most = most

    def __call__(self, x, t):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return wave(x, t)


@pytest.fixture
def on_tapes(monkeypatch):
    """The samplers take cuda_graph, recorded on tapes; returns the recorder."""
    record = Recorder()

    def make(name, model, diffusion, guided, model_kwargs, **options):
        assert not [*guided, *model_kwargs]
        return CudaGraph(model, diffusion, record=record, **options)

    monkeypatch.setattr(chain, "make_engine", make)
    return record


def test_a_graph_that_does_not_fit_is_recorded_for_half_the_batch_and_it_is_said_once(on_tapes):
    options = {"shape": (2, 3, 5), "diffusion": Diffusion(SCHEDULE), "progress": False}
    with pytest.warns(RuntimeWarning, match="batches of 12 images .*half as many") as told:
        x = fastddpm.sample(Small(3), 13, batch_size=12, precision="fp32", **options)
    assert len(told) == 1
    assert on_tapes.tapes == 2  # of 3 images and the last one
    with warnings.catch_warnings(action="error"):
        assert torch.equal(x, fastddpm.sample(wave, 13, precision="fp32", **options))


def test_an_image_that_does_not_fit_is_torchs_error(on_tapes):
    options = {"shape": (2, 3, 5), "diffusion": Diffusion(SCHEDULE), "progress": False}
    with pytest.raises(torch.OutOfMemoryError), warnings.catch_warnings(action="ignore"):
        fastddpm.sample(Small(0), 3, precision="fp32", **options)


def test_a_training_step_that_does_not_fit_changes_nothing():
    """Neither weights nor moments nor counters: a smaller batch goes on from there."""
    model, same = tiny_unet(), tiny_unet()
    runs = [Trainer(m, precision="fp32", warmup=0) for m in (model, same)]
    forward = type(model).forward

    def full(x, t):
        forward(model, x, t).sum().backward()  # it ran out in the backward
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model.forward = full
    with pytest.raises(torch.OutOfMemoryError):
        runs[0].step(X0)
    del model.forward
    for run in runs:
        run.step(X0)
    for a, b in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    assert runs[0].example_count == len(X0)
