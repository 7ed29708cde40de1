"""The benchmarks run, check before they time, and write what they print."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import time
import types

import pytest
import torch
from PIL import Image
from script import script

import fastddpm
from fastddpm import reference


@pytest.fixture
def benchmark():
    with script("ops") as module:
        yield module


@pytest.fixture
def throughput():
    with script("throughput") as module:
        yield module


QUICK = ("--quick", "--peers", "eager", "--repeats", "2")


def test_ops(benchmark, tmp_path, capsys):
    assert benchmark.main([*QUICK, "--json", str(tmp_path / "ops.json")]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "ops.json").read_text(encoding="utf-8"))
    assert report["environment"]["torch"] == torch.__version__
    assert report["environment"]["isa"] in printed
    rows = report["rows"]
    norms = ("", ", bias and residual", ", two sources")
    names = [f"group_norm_silu{what}" for what in norms]
    for op in ("noise", "posterior_step", *names, "attention_block"):
        assert {row["dtype"] for row in rows if row["op"] == op} == {"float32", "bfloat16"}
    for row in rows:
        assert float(row["GB/s"]) > 0 or row["GB/s"] == "0.00"
        assert float(row["x eager"]) > 0
        assert row["ms"] in printed


@pytest.mark.parametrize("who", ["fastddpm", "eager"])
def test_nothing_is_timed_that_computes_something_else(benchmark, monkeypatch, capsys, who):
    def wrong(x, *_, **__):
        return reference.group_norm_silu(x, 4, None, None)

    if who == "fastddpm":
        monkeypatch.setattr(fastddpm.ops, "group_norm_silu", wrong)
    else:
        monkeypatch.setattr(torch.nn.functional, "group_norm", wrong)
    assert benchmark.main([*QUICK, "--only", "group_norm_silu"]) == 1
    captured = capsys.readouterr()
    assert f"{who} is off by" in captured.err
    assert "ms" not in captured.out


def test_without_a_gpu_one_line_says_so(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main(["--device", "cuda"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "there is nothing to time: --device cuda: torch finds no CUDA device here"
    ]


def test_events_time_the_calls_and_not_the_writes_between(benchmark):
    """Queued on a device of one counter: a write takes 100 ms, a call what it says."""
    queue, now = [], [0.0]

    class Event:
        def record(self):
            queue.append(lambda: setattr(self, "at", now[0]))

        def elapsed_time(self, other):
            return other.at - self.at

    def takes(ms):
        return lambda: queue.append(lambda: now.__setitem__(0, now[0] + ms))

    def wait():
        while queue:
            queue.pop(0)()

    clock = benchmark.EventClock(Event, takes(100.0), wait)
    seconds = benchmark.timed({"slow": takes(4.0), "fast": takes(2.0)}, 3, 0.02, clock)
    assert seconds == {"slow": pytest.approx([4e-3] * 3), "fast": pytest.approx([2e-3] * 3)}
    assert now[0] > 100 * 3 * (5 + 10)  # as many calls as fill 20 ms, each after a write


def test_sizes_on_a_gpu_exceed_its_cache(benchmark):
    """The largest tensors of each op are past 50 MB, an H100's L2 cache."""
    largest = {}
    for make in benchmark.cases(False, torch.device("cuda")):
        function, (shape, dtype, *_) = make.func.__name__, make.args
        size = torch.Size(shape).numel() * dtype.itemsize
        largest[function, dtype] = max(size, largest.get((function, dtype), 0))
    everyone = {name for name in vars(sys.modules["op_cases"]) if name.endswith("_case")}
    assert {function for function, _ in largest} == everyone
    assert min(largest.values()) >= 50e6


def test_unknown_peers(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--peers", "jax"])
    assert "must be of eager, compile; got jax" in capsys.readouterr().err


# ---- throughput ----------------------------------------------------------------------------------

RACE = ("--quick", "--repeats=2", "--least=0.001", "--threads=1", "--precisions=fp32")


@pytest.fixture
def processes(throughput):
    return sys.modules["processes"]


@pytest.fixture
def in_process(throughput, processes, monkeypatch):
    """Contestants in this process, for tests that replace one."""

    class Local(processes.Runner):
        def __init__(self, job, patience):
            super().__init__(job)

        def close(self):
            pass

    monkeypatch.setattr(throughput.sampling_race, "Remote", Local)
    monkeypatch.setattr(throughput.contestants, "needs_preparing", lambda job: False)
    return throughput


def test_throughput(throughput, tmp_path, capsys):
    pytest.importorskip("diffusers")
    files = (f"--json={tmp_path / 'x.json'}", f"--plot={tmp_path / 'x.png'}")
    only = "--only=fastddpm,diffusers NCHW"
    assert throughput.main([*RACE, *files, only, "--batches=3"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    names = [row["name"] for row in report["rows"]]
    assert {"fastddpm eager", "diffusers NCHW"} <= set(names)
    assert len(names) == len(set(names))
    for row in report["rows"]:
        assert (row["precision"], row["batch"]) == ("fp32", 3)
        assert 0 < row["error"] < throughput.sampling_race.ALLOWED["fp32"]
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0
        assert row["ms"] == pytest.approx(1e3 * sum(row["seconds"]) / 2)
        assert row["images/s"] * row["ms"] == pytest.approx(1.0)  # at 1000 steps
        assert row["TFLOP/s"] * row["ms"] == pytest.approx(report["GFLOP an image-step"])
        assert row["peak bytes"] > 10e6
        # Equality comes first.
        said = f"{row['name']} fp32, batch 3: error {row['error']:.1e}"
        assert printed.index(said) < printed.index("ms an image-step")
        assert ("x best peer" in row) == (row["name"] in throughput.contestants.OURS)
    assert report["environment"]["torch"] == torch.__version__
    with Image.open(tmp_path / "x.png") as image:
        assert image.width > image.height > 100


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, t: torch.zeros_like(x),
        lambda x, t: torch.full_like(x, torch.nan),
        lambda x, t: x + t[:, None, None, None] / 1000,
    ],
    ids=["zero", "nan", "another"],
)
def test_a_contestant_that_computes_something_else_is_not_timed(
    in_process, monkeypatch, capsys, wrong
):
    peer = in_process.contestants.Peer(lambda job: wrong, needs=())
    monkeypatch.setitem(in_process.contestants.PEERS, "diffusers NCHW", peer)
    only = "--only=fastddpm eager,diffusers NCHW"
    assert in_process.main([*RACE, only, "--batches=2"]) == 1
    captured = capsys.readouterr()
    assert "diffusers NCHW fp32, batch 2 is off by" in captured.err
    table = captured.out[captured.out.index("ms an image-step") :]
    assert "fastddpm eager" in table
    assert "diffusers" not in table


def test_torchs_switches_of_a_gpu_are_named(throughput):
    """As they are while a float32 model runs: convolutions follow what products are told."""
    settings, gpu = throughput.contestants.settings, torch.device("cuda")
    assert settings(torch.device("cpu")) == {}
    assert settings(gpu) == {"TF32": "nowhere", "cudnn.benchmark": "off"}
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
    try:
        said = {"TF32": "in products, convolutions", "cudnn.benchmark": "on"}
        assert settings(gpu) == said
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = False


def test_who_is_missing_is_named_with_the_reason(in_process, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "openvino" else found(name)
    )
    assert in_process.main([*RACE, "--only=fastddpm eager,OpenVINO", "--batches=1"]) == 0
    assert "not here: OpenVINO fp32: openvino not installed" in capsys.readouterr().out


def test_a_contestant_that_fails_is_left_out_with_the_reason(
    in_process, processes, monkeypatch, capsys
):
    def failing(x, t):
        raise processes.Failed("no compiler was found")

    peer = in_process.contestants.Peer(lambda job: failing, needs=())
    monkeypatch.setitem(in_process.contestants.PEERS, "diffusers NCHW", peer)
    only = "--only=fastddpm eager,diffusers NCHW"
    assert in_process.main([*RACE, only, "--batches=1"]) == 0
    printed = capsys.readouterr().out
    assert "not here: diffusers NCHW fp32, batch 1: no compiler was found" in printed
    assert "fastddpm eager" in printed[printed.index("ms an image-step") :]


def test_a_contestant_that_does_not_start_says_why(throughput, processes, tmp_path):
    job = throughput.Job("fastddpm eager", "fp32", "nowhere", 1, "cpu", 1, (3, 8, 8), str(tmp_path))
    with pytest.raises(processes.Failed, match="FileNotFoundError: model 'nowhere'"):
        processes.Remote(job, 60.0)


def test_a_contestant_that_keeps_silent_is_ended(throughput, processes, monkeypatch, tmp_path):
    started = []
    start = processes.Remote._start

    def remember(self, role, job):
        started.append(start(self, role, job))
        return started[-1]

    monkeypatch.setattr(processes.Remote, "_start", remember)
    job = throughput.Job("fastddpm eager", "fp32", "nowhere", 1, "cpu", 1, (3, 8, 8), str(tmp_path))
    for preparing in (False, True):
        monkeypatch.setattr(
            sys.modules["contestants"], "needs_preparing", lambda job, answer=preparing: answer
        )
        with pytest.raises(processes.Failed, match=r"no answer within 0\.01 s"):
            processes.Remote(job, 0.01)
    assert [process.poll() for process in started] == [-9, -9]


def eps_of(job):
    net = job.unet().eval()
    return lambda x, t: net(x, t)


def test_a_slow_contestant_takes_fewer_turns(in_process, monkeypatch, tmp_path):
    def slow(job):
        eps = eps_of(job)
        return lambda x, t: (time.sleep(0.1), eps(x, t))[1]

    monkeypatch.setitem(
        in_process.contestants.PEERS, "diffusers NCHW", in_process.contestants.Peer(slow, needs=())
    )
    file = tmp_path / "x.json"
    only = ("--only=fastddpm eager,diffusers NCHW", "--batches=1", f"--json={file}")
    assert in_process.main([*RACE, *only, "--repeats=6", "--limit=0.3"]) == 0
    rows = {row["name"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    assert 1 <= len(rows["diffusers NCHW"]["seconds"]) <= 2
    assert len(rows["fastddpm eager"]["seconds"]) == 6


def test_a_contestant_that_fails_in_its_turn_is_left_out_with_the_reason(
    in_process, processes, monkeypatch, capsys
):
    def failing(job):
        eps, calls = eps_of(job), []

        def call(x, t):
            calls.append(t)
            if len(calls) > 4:  # two checks, a step to warm up, a turn
                raise processes.Failed("no memory was left")
            return eps(x, t)

        return call

    peer = in_process.contestants.Peer(failing, needs=())
    monkeypatch.setitem(in_process.contestants.PEERS, "diffusers NCHW", peer)
    only = "--only=fastddpm eager,diffusers NCHW"
    assert in_process.main([*RACE, only, "--batches=1", "--least=0.000001"]) == 0
    printed = capsys.readouterr().out
    assert "not here: diffusers NCHW fp32, batch 1: no memory was left" in printed
    assert "diffusers" not in printed[printed.index("ms an image-step") : printed.index("not here")]


def test_bf16_is_measured_by_torchs_own(in_process, monkeypatch, tmp_path, capsys):
    """In bf16 a contestant may err twice as much as PyTorch's network in bfloat16."""

    def off(job):
        eps = eps_of(job)
        return lambda x, t: eps(x, t) * 1.1

    peers = {"diffusers NCHW": off, "diffusers channels_last": eps_of}
    for name, build in peers.items():
        peer = in_process.contestants.Peer(build, needs=())
        monkeypatch.setitem(in_process.contestants.PEERS, name, peer)
    file = tmp_path / "x.json"
    only = ("--only=fastddpm eager,diffusers", "--batches=1", f"--json={file}")
    assert in_process.main([*RACE, *only, "--precisions=bf16"]) == 1
    rows = {r["name"]: r for r in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    assert {name for name, row in rows.items() if "seconds" in row} == {
        "fastddpm eager", "diffusers channels_last",
    }  # fmt: skip
    for row in rows.values():
        assert 2e-3 < row["allowed"] < 0.1
    ours = rows["fastddpm eager"]
    assert ours["error"] > 1e-4
    assert ours["of PyTorch's error"] == pytest.approx(2 * ours["error"] / ours["allowed"])
    assert "diffusers NCHW bf16, batch 1 is off by 0.1" in capsys.readouterr().err


def test_every_engine_of_a_gpu_takes_part_there(throughput):
    """The plan too, which runs U-Nets only."""
    engines = [name for name in throughput.contestants.OURS if name != "fastddpm cpu_plan"]
    missing = throughput.contestants.missing
    for precision in ("fp32", "bf16"):
        assert {name: missing(name, precision, "cuda") for name in engines} == dict.fromkeys(
            engines
        )


def test_openvino_that_runs_in_another_precision_does_not_take_part(
    throughput, monkeypatch, tmp_path
):
    class Fake:
        def compile_model(self, *_):
            return self

        def get_property(self, name):
            return {"INFERENCE_PRECISION_HINT": self}[name]

        def get_type_name(self):
            return "f32"

        def create_infer_request(self):
            return self

    fake = types.ModuleType("openvino")
    fake.Core = Fake
    monkeypatch.setitem(sys.modules, "openvino", fake)
    job = throughput.Job("OpenVINO", "fp32", "", 1, "cpu", 1, (3, 8, 8), str(tmp_path))
    assert callable(throughput.contestants.openvino_cpu(job))
    with pytest.raises(ValueError, match="OpenVINO runs in f32 in place of bf16"):
        throughput.contestants.openvino_cpu(dataclasses.replace(job, precision="bf16"))


@pytest.mark.parametrize("kind", ["bundled", "folder"])
def test_a_saved_model_takes_part(in_process, tmp_path, kind):
    name, file = "fashion-mnist", tmp_path / "x.json"
    if kind == "folder":
        name = str(tmp_path / "model")
        fastddpm.UNet(channels=32, channel_mult=(1, 1), image_size=8).save_pretrained(name)
    only = ("--only=fastddpm", "--batches=1", f"--model={name}", f"--json={file}")
    assert in_process.main([*RACE, *only]) == 0
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["model"] == name
    work = in_process.flop(fastddpm.UNet.from_pretrained(name))
    assert report["GFLOP an image-step"] == pytest.approx(work / 1e9)
    assert {"fastddpm eager", "fastddpm cpu_plan"} <= {row["name"] for row in report["rows"]}


def test_a_model_that_is_not_there(throughput, capsys):
    with pytest.raises(SystemExit):
        throughput.main(["--model=nowhere"])
    assert "--model: model 'nowhere'" in capsys.readouterr().err


def test_an_engine_that_another_stands_in_for_does_not_take_part(in_process, monkeypatch, tmp_path):
    contestants = in_process.contestants
    fastddpm.UNet(channels=32, channel_mult=(1, 1), image_size=8).save_pretrained(tmp_path)
    monkeypatch.setitem(contestants.OURS, "fastddpm other", "other")
    monkeypatch.setattr(
        contestants,
        "make_engine",
        lambda name, *a, **k: fastddpm.engine.make_engine("eager", *a, **k),
    )
    job = in_process.Job("fastddpm other", "fp32", str(tmp_path), 1, "cpu", 1, (3, 8, 8), "")
    with pytest.raises(ValueError, match="can't run here: eager fp32 runs in its place"):
        contestants.build(job)


def test_the_work_of_the_cifar10_network(throughput):
    """12.108 GFLOP an image-step, and its parts by hand for one of a single block a level."""
    assert throughput.flop(fastddpm.UNet.cifar10()) == pytest.approx(12.108e9, rel=1e-4)
    small = fastddpm.UNet(
        channels=4, channel_mult=(1,), num_res_blocks=1, attention_levels=(), num_groups=1,
        image_size=2,
    )  # fmt: skip
    dense = 4 * 16 + 16 * 16 + 5 * 16 * 4  # of the time embedding, and into the 5 blocks
    convs = 3 * 4 * 9 + 3 * 2 * 4 * 4 * 9 + 2 * (8 * 4 + 4 * 4) * 9 + 2 * 8 * 4 + 4 * 3 * 9
    attention = 4 * 4 * 4
    assert throughput.flop(small) == 2 * (dense + 4 * (convs + attention))


def test_unknown_contestants(throughput, capsys):
    with pytest.raises(SystemExit):
        throughput.main(["--only=jax"])
    assert "--only must name some of: fastddpm" in capsys.readouterr().err


# ---- drop_in -------------------------------------------------------------------------------------


@pytest.fixture
def drop_in():
    with script("drop_in") as module:
        yield module


SMALL = ("--width=32", "--repeats=1", "--least=0.001", "--only=w86")


def test_drop_in(drop_in, tmp_path, capsys):
    file = tmp_path / "x.json"
    asked = ("--sampling=1", "--training=2", "--scheduler=", f"--json={file}")
    assert drop_in.main([*SMALL, *asked]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["what"] for row in rows] == ["sampling", "training"]
    for row in rows:
        assert row["line"] == "fastddpm.accelerate(model)"
        assert row["seconds"].keys() == {"theirs", "theirs, channels_last", "with our line"}
        assert 0 < row["error"] <= 1e-4
        assert f"{row['x best of theirs']:.2f}" in printed
    assert drop_in.main(["--only=none", *asked[2:], "--add"]) == 0
    assert json.loads(file.read_text(encoding="utf-8"))["rows"] == rows


def test_drop_in_times_nothing_that_computes_something_else(drop_in, monkeypatch, capsys):
    def wrong(model):
        model.register_forward_hook(lambda module, given, output: 1.01 * output)
        return model

    monkeypatch.setattr(fastddpm, "accelerate", wrong)
    assert drop_in.main([*SMALL, "--sampling=1", "--training=", "--scheduler="]) == 1
    said = capsys.readouterr()
    assert "with our line fp32, batch 1 is off by" in said.err
    assert "x theirs" not in said.out
