"""What a recording may hold and what becomes of it: every op, weights that change, and errors in
the middle. On a CPU it is played from a tape, see test_cuda_graph.py."""

from __future__ import annotations

import contextlib

import pytest
import torch
from test_cuda_graph import CPU, Tape, engines, start
from toy import SCHEDULE, generator, tiny_unet, wave

from fastddpm import Diffusion, ops
from fastddpm.batching import is_out_of_memory
from fastddpm.engine.cuda_graph import CudaGraph

# ---- every op -----------------------------------------------------------------------------------


def image(k, c=4):
    return torch.randn(2, c, 3, 5, generator=generator(k))


def per_sample(k, end):
    return torch.randint(0, end, (2,), generator=generator(k))


TABLE = SCHEDULE.table()
# op -> (a function of tensors, those tensors for the k-th time)
RECORDED = {
    "randn": (
        lambda index, step: ops.randn((2, 4, 3, 5), seed=3, step=step, sample_index=index),
        lambda k: (per_sample(k, 99), per_sample(k + 9, 12)),
    ),
    "noise": (
        lambda x, t, table, index: ops.noise(x, t, table, seed=3, sample_index=index)[0],
        lambda k: (image(k), per_sample(k, 12), TABLE, per_sample(k + 9, 99)),
    ),
    "posterior_step": (
        lambda x, y, t, table, index: ops.posterior_step(
            x, y, t, table, seed=3, sample_index=index
        ),
        lambda k: (image(k), image(k + 5), per_sample(k, 12), TABLE, per_sample(k + 9, 99)),
    ),
    "posterior_step, of a seed on the device": (
        lambda x, t, table, index, seed: ops.posterior_step(
            x, x, t, table, seed=seed, sample_index=index
        ),
        lambda k: (
            *(image(k), per_sample(k, 12), TABLE, per_sample(k + 9, 99)),
            torch.tensor([(-1) ** k * (k + 2**40)]),
        ),
    ),
    "group_norm_silu": (
        lambda x, w, b: ops.group_norm_silu(x, 2, w, b),
        lambda k: (image(k), image(k + 1)[0, :, 0, 0], image(k + 2)[0, :, 0, 0]),
    ),
    "group_norm_silu, of a sum": (
        lambda x, r, b: torch.cat(
            ops.group_norm_silu(x, 2, None, None, residual=r, before=b)
        ),
        lambda k: (image(k), image(k + 1), image(k + 2)[:, :, 0, 0]),
    ),
    "group_norm_silu, of two sources, with dropout": (
        lambda x, x2, index, step: ops.group_norm_silu(
            x, 2, None, None, x2=x2, dropout=0.5, seed=3, step=step, sample_index=index
        ),
        lambda k: (image(k), image(k + 1, 2), per_sample(k, 99), per_sample(k, 12)),
    ),
    "residual_sum": (ops.residual_sum, lambda k: (image(k), image(k + 1), image(k)[0, :, 0, 0])),
    "attention_block": (
        lambda x, qkv, proj: ops.attention_block(x, 2, None, None, qkv, None, proj, None),
        lambda k: (image(k), image(k, 24)[0, :12, 0, :4], image(k + 1)[0, :, 0, :4]),
    ),
    "discretized_log_likelihood": (
        ops.discretized_log_likelihood,
        lambda k: (image(k).sign(), image(k + 1) * 0.1, image(k + 2) - 2),
    ),
    "vlb_term": (
        lambda *tensors: ops.vlb_term(*tensors)[0],
        lambda k: (
            image(k).sign(), image(k + 1), image(k + 2), per_sample(k, 12), TABLE,
            torch.from_numpy(SCHEDULE.log_variance_ratio()).float(),
        ),
    ),
    "squared_error": (ops.squared_error, lambda k: (image(k), image(k + 1))),
}  # fmt: skip


def recorded(step, device):
    """The work of a step, as a function that does it again on the same tensors."""
    if device.type != "cuda":
        tape = Tape()
        with tape:
            step()
        return tape
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles, and chooses its kernels
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@pytest.mark.parametrize("name", RECORDED)
def test_an_op_is_recorded_and_replayed_on_other_values(backend, device, name):
    function, make = RECORDED[name]
    first, second = ([x.to(device).contiguous() for x in make(k)] for k in (0, 1))
    with torch.no_grad():
        try:
            expected = [function(*values) for values in (first, second)]
        except ValueError as refused:
            if "can't run on the backend" not in str(refused):
                raise
            pytest.skip(str(refused))
        static = [x.clone() for x in first]
        result = torch.empty_like(expected[0])
        replay = recorded(lambda: result.copy_(function(*static)), device)
        for values, y in zip((second, first), reversed(expected), strict=True):
            for x, value in zip(static, values, strict=True):
                x.copy_(value)
            replay()
            torch.testing.assert_close(result, y, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)


# ---- weights that change ------------------------------------------------------------------------


def write(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)


def assign(model):
    state = {name: value * 0.9 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def replace_data(model):
    model.conv_out.weight.data = model.conv_out.weight.data * 0.5


def replace_a_layer(model):
    model.temb = tiny_unet(seed=1).temb


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: lambda x, t: m(x, t)], ids=["", "lambda"])
@pytest.mark.parametrize(
    ("change", "tapes"), [(write, 1), (assign, 2), (replace_data, 2), (replace_a_layer, 2)]
)
def test_weights_that_changed_are_those_of_the_next_run(change, tapes, wrap):
    """A graph reads memory: what is written there is seen, what is replaced leaves it to anyone."""
    model = tiny_unet()
    graph, eager, record = engines(wrap(model), model.diffusion)
    x, stream = start(shape=(1, 8, 8))
    before = graph.run(x, **stream)
    change(model)
    got = graph.run(x, **stream)
    torch.testing.assert_close(got, eager.run(x, **stream), atol=1e-5, rtol=0)
    assert not torch.allclose(got, before, atol=1e-3)
    assert torch.equal(graph.run(x, **stream), got)
    assert record.tapes == tapes


# ---- a recording that fails ----------------------------------------------------------------------


class Streams:
    """torch.cuda's streams and graphs as far as a recording knows them. As with torch's own, the
    end of a recording that has failed raises in its turn, and leaves the recording's stream."""

    def __init__(self, monkeypatch):
        self.current = "the host's"
        for name in (
            *("device", "Stream", "stream", "current_stream", "set_stream", "CUDAGraph", "graph"),
        ):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    @staticmethod
    def device(device):
        return contextlib.nullcontext()

    @staticmethod
    def Stream():
        return Stream("another")

    CUDAGraph = Stream

    def current_stream(self, device=None):
        return Stream(self.current)

    def set_stream(self, stream):
        self.current = stream.name

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph, **options):
        before, self.current = self.current, RECORDING
        try:
            yield
        except Exception:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
        self.current = before


RECORDING = "the recording's"


class Stream:
    def __init__(self, name):
        self.name = name

    def wait_stream(self, stream):
        pass

    def replay(self):
        pass


def failing_once(streams, error):
    """A graph on the CPU of a model that fails while it is recorded, and what it ran on."""
    seen = []

    def model(x, t):
        seen.append(streams.current)
        if streams.current == RECORDING:
            raise error
        return wave(x, t)

    options = {"device": CPU, "precision": "fp32"}
    return CudaGraph(model, Diffusion(SCHEDULE), **options), seen


def test_an_error_while_recording_is_told_by_its_cause_and_eager_runs_on_the_hosts_stream(
    monkeypatch,
):
    monkeypatch.delenv("FASTDDPM_STRICT", raising=False)
    streams = Streams(monkeypatch)
    graph, seen = failing_once(streams, RuntimeError("operation not permitted"))
    x, stream = start()
    with pytest.warns(RuntimeWarning, match="not 'cuda_graph': operation not permitted"):
        drawn = graph.run(x, **stream)
    assert RECORDING in seen
    assert seen[-SCHEDULE.T :] == ["the host's"] * SCHEDULE.T
    assert streams.current == "the host's"
    assert torch.equal(drawn, engines(wave)[1].run(x, **stream))


def test_memory_that_ends_while_recording_is_an_error_of_memory(monkeypatch):
    """So that the batch is made smaller, and the model is not given up."""
    streams = Streams(monkeypatch)
    graph, _ = failing_once(streams, torch.OutOfMemoryError("CUDA out of memory."))
    x, stream = start()
    for _ in range(2):
        with pytest.raises(RuntimeError) as info:
            graph.run(x, **stream)
        assert is_out_of_memory(info.value)
        assert streams.current == "the host's"


def test_an_error_of_a_recording_is_not_memorys_by_itself():
    end = RuntimeError("operation failed due to a previous error during capture")
    assert not is_out_of_memory(end)
    end.__context__ = RuntimeError("operation not permitted when stream is capturing")
    assert not is_out_of_memory(end)
    end.__context__ = torch.OutOfMemoryError("CUDA out of memory.")
    assert is_out_of_memory(end)
    other = RuntimeError("a shape does not fit")
    other.__context__ = end.__context__
    assert not is_out_of_memory(other), "the caller's own, whom it made try something smaller"
