"""Batches: as large as memory allows, and the same images when it does not."""

from __future__ import annotations

import errno
import warnings
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdRef
from toy import SCHEDULE, images, tiny_unet, wave

import fastddpm
from fastddpm import Diffusion, UNet, batching
from fastddpm.batching import MOST, Batches, batch_size_for, step_bytes

CPU = torch.device("cpu")


def draw(n, model=wave, **options) -> torch.Tensor:
    defaults = {"shape": (2, 3, 5), "diffusion": Diffusion(SCHEDULE), "progress": False}
    return fastddpm.sample(model, n, **{**defaults, **options})


class Small:
    """A model for which memory runs out above `most` images, in the middle of the chain."""

    def __init__(self, most: int, error: Exception):
        self.most, self.error, self.sizes = most, error, []

    def __call__(self, x, t):
        self.sizes.append(len(x))
        if len(x) > self.most and int(t[0]) == SCHEDULE.T // 2:
            raise self.error
        return wave(x, t)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    RuntimeError("could not create a primitive"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:81] data. DefaultCPUAllocator: not enough memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't "
                 "allocate memory: you tried to allocate 9 bytes."),
    MemoryError("no more"),
    MemoryError(),
]  # fmt: skip


@pytest.mark.parametrize(("n", "sizes"), [(16, [16]), (17, [9, 8]), (40, [14, 13, 13])])
def test_batches_that_memory_sizes_are_alike(n, sizes, monkeypatch):
    monkeypatch.setitem(MOST, "cpu", 16)
    model = Small(16, MemoryError())
    x = draw(n, model)
    assert model.sizes[:: SCHEDULE.T] == sizes
    assert torch.equal(x, draw(n, batch_size=16))


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_batch_that_does_not_fit_is_halved_and_said_so_once(error):
    model = Small(2, error)
    with pytest.warns(RuntimeWarning, match="batches of 7 images") as told:
        x = draw(16, model, batch_size=7)
    assert len(told) == 1
    assert torch.equal(x, draw(16))
    half = SCHEDULE.T // 2
    assert model.sizes == [7] * half + [4] * half + [2] * SCHEDULE.T * 8  # and no larger one again


def test_what_a_batch_took_is_given_back_before_the_next_one_begins(monkeypatch):
    alive = []

    class Scratch:
        pass

    def model(x, t):
        scratch = Scratch()
        alive.append(weakref.ref(scratch))
        if len(x) > 2:
            raise MemoryError
        return wave(x, t)

    emptied = []

    def empty(*_):
        emptied.append([ref() for ref in alive])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty)
    with pytest.warns(RuntimeWarning, match="batches of 8 images"):
        draw(8, model, batch_size=8, device="cpu")
    assert emptied == [[None], [None, None]]


def test_progressive_batches_are_halved_and_no_frame_is_kept_of_those_that_failed():
    options = {"shape": (2, 3, 5), "diffusion": Diffusion(SCHEDULE), "progress": False}
    with pytest.warns(RuntimeWarning, match="batches of 7 images"):
        got = fastddpm.sample_progressive(Small(2, ERRORS[1]), 7, frames=5, **options)
    expected = fastddpm.sample_progressive(wave, 7, frames=5, **options)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert got[2] == expected[2]


def test_the_bounds_batches_are_halved_too():
    x0 = images(7, 2, 3, 5)
    options = {"diffusion": Diffusion(SCHEDULE), "progress": False}
    with pytest.warns(RuntimeWarning, match="batches of 7 images"):
        bits = fastddpm.bits_per_dim(Small(2, MemoryError("no more")), x0, **options)
    expected = fastddpm.bits_per_dim(wave, x0, **options)
    for name in ("total", "prior", "terms", "mse"):
        assert torch.equal(getattr(bits, name), getattr(expected, name))


@pytest.mark.filterwarnings("ignore:memory is too small")
def test_what_does_not_fit_at_all_is_an_error():
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        draw(4, Small(0, ERRORS[0]))


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a real mistake"), OSError(errno.ENOSPC, "a real mistake"),
     ValueError("a real mistake: out of memory")],
    ids=repr,
)  # fmt: skip
def test_other_errors_are_not_memorys(error):
    model = Small(2, error)
    with warnings.catch_warnings(record=True) as told, pytest.raises(type(error), match="a real"):
        draw(4, model)
    assert not told
    assert set(model.sizes) == {4}


@pytest.mark.filterwarnings("ignore:memory is too small")
def test_the_progress_bar_ends_at_its_total_all_the_same(capsys):
    draw(16, Small(2, ERRORS[0]), batch_size=7, progress=True)
    assert f"{8 * SCHEDULE.T}/{8 * SCHEDULE.T}" in capsys.readouterr().err


def test_halving_goes_on_in_later_calls():
    class Silent:
        def begin(self, batches):
            left.append(batches)

        def end(self):
            pass

    left: list[int] = []

    def most_3(part):
        if len(part) > 3:
            raise MemoryError("no more")
        return part

    batches = Batches(4)
    with pytest.warns(RuntimeWarning, match="batches of 4"):
        first = batches.draw(most_3, torch.arange(4), Silent(), later=5)
    second = batches.draw(most_3, torch.arange(4, 9), Silent())
    assert torch.cat(first + second).tolist() == list(range(9))
    assert [len(part) for part in second] == [2, 2, 1]
    assert left == [1 + 2, 2 + 3, 1 + 3, 3, 2, 1]


# ---- the estimate --------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """The most bytes that tensors made within it held at a time."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.alive.setdefault(storage._cdata, (WeakIdRef(storage), storage.nbytes()))
        self.alive = {k: v for k, v in self.alive.items() if v[0]() is not None}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 32, "channels": 32, "channel_mult": (1, 2, 2, 2), "num_res_blocks": 2},
        {"image_size": 32, "channels": 32, "channel_mult": (1, 1, 2, 2, 4, 4)},
        {"image_size": 16, "channels": 32, "channel_mult": (1,), "attention_levels": ()},
        {"image_size": 16, "channels": 32, "channel_mult": (2, 1), "attention_levels": (0, 1)},
    ],
    ids=str,
)
def test_the_estimate_is_above_what_the_network_holds_and_not_far(options):
    model = tiny_unet(**{"num_groups": 4, **options})
    x = torch.randn(1, 1, *model.image_size)
    with torch.no_grad(), Live() as live:
        model(x, torch.zeros(1, dtype=torch.int64))
    weights = max(p.nbytes for p in model.parameters())
    estimate = step_bytes(model, (1, *model.image_size), "fp32")
    assert live.peak - 2 * weights < estimate < 4 * live.peak


def test_batches_fill_half_of_the_free_memory(monkeypatch):
    model, shape = UNet(channels=32), (3, 32, 32)
    need = step_bytes(model, shape, "fp32")
    assert step_bytes(model, shape, "bf16") == need // 2
    for free, expected in ((need * 21, 10), (need, 1), (0, 1), (need * 10**6, MOST["cpu"])):
        monkeypatch.setattr(batching, "free_bytes", lambda device, free=free: free)
        assert batch_size_for(model, shape, "fp32", CPU) == expected
        assert batch_size_for(wave, shape, "fp32", CPU) == MOST["cpu"]
    monkeypatch.setattr(batching, "free_bytes", lambda device: need * 4)
    sizes = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    fastddpm.sample(model, 3, steps=1, precision="fp32", engine="eager", progress=False)
    assert sizes == [2, 1]


GB = 2**30


def write_group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"memory.{name}").write_text(f"{content}\n")


def stat(inactive, active, prefix=""):
    return f"anon 5\nfile {inactive + active}\nactive_file 1\n" * bool(prefix) + (
        f"{prefix}inactive_file {inactive}\n{prefix}active_file {active}\n{prefix}shmem 77"
    )


def test_cached_files_are_free_memory(tmp_path):
    """8 GiB, of which 0.5 are used and 7.3 cache."""
    cache, root, own = int(7.3 * GB), tmp_path / "2", tmp_path / "cgroup"
    own.write_text("0::/\n")
    write_group(root, max=8 * GB, current=GB // 2 + cache, high="max", stat=stat(cache - GB, GB))
    assert batching._free_of_group(root, own) == 8 * GB - GB // 2

    root = tmp_path / "1"
    own.write_text("4:cpu,memory:/\n3:devices:/other\n")
    write_group(
        root / "memory",
        limit_in_bytes=8 * GB, usage_in_bytes=GB // 2 + cache, stat=stat(cache, 0, "total_"),
    )  # fmt: skip
    assert batching._free_of_group(root, own) == 8 * GB - GB // 2
    write_group(root / "memory", limit_in_bytes=GB // 4)  # lowered below what is used
    assert batching._free_of_group(root, own) == 0


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_limit_along_the_path_holds(tmp_path, version):
    own = tmp_path / "cgroup"
    base = tmp_path if version == 2 else tmp_path / "memory"
    limit, used = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
    own.write_text("0::/a/b c/d\n" if version == 2 else "12:memory:/a/b c/d\n0::/elsewhere\n")
    none = "max" if version == 2 else 2**63 - 4096
    base.mkdir(exist_ok=True)  # the machine's own group has no limit
    write_group(base / "a", **{limit: 6 * GB, used: 5 * GB})
    write_group(base / "a" / "b c", **{limit: none, used: 2 * GB})
    write_group(base / "a" / "b c" / "d", **{limit: 4 * GB, used: GB})
    write_group(base / "a" / "other", **{limit: 1, used: 0})
    assert batching._free_of_group(tmp_path, own) == GB
    write_group(base / "a", **{limit: 16 * GB})
    assert batching._free_of_group(tmp_path, own) == 3 * GB
    if version == 2:
        write_group(base / "a" / "b c", high=5 * GB // 2)  # reclaimed and held up from there on
        assert batching._free_of_group(tmp_path, own) == GB // 2
    # In a container without a view of its own the path is the machine's, and the root its group.
    own.write_text(own.read_text().replace("/a", "/docker/x"))
    write_group(base, **{limit: 2 * GB, used: GB})
    assert batching._free_of_group(tmp_path, own) == GB
    own.write_text(own.read_text().replace("/docker", "/../.."))
    assert batching._free_of_group(tmp_path, own) == GB


@pytest.mark.parametrize(
    "lines", ["", "nonsense", "0::", "a:b", "::::", "0::/\0", "4:memory", "\udcff"]
)
def test_what_the_system_says_otherwise_is_no_error(tmp_path, lines):
    own = tmp_path / "cgroup"
    own.write_text(lines, errors="surrogateescape")
    write_group(tmp_path, max="soon", current="", stat="a\n\nb c d")
    assert batching._free_of_group(tmp_path, own) is None
    write_group(tmp_path, max=100, current=40)
    assert batching._free_of_group(tmp_path, own) == 60
    assert batching._free_of_group(tmp_path / "gone", tmp_path / "gone") is None


def test_free_memory_is_what_the_system_and_the_group_leave(monkeypatch, tmp_path):
    system = batching._free_of_system()
    assert system is None or system > 2**20
    assert batching._free_of_group(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert batching._free_of_group(tmp_path) is None
    (tmp_path / "memory.max").write_text("12\n")
    assert batching._free_of_group(tmp_path) == 7
    monkeypatch.setattr(batching, "_free_of_system", lambda: 100)
    monkeypatch.setattr(batching, "_free_of_group", lambda: 60)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert batching.free_bytes(CPU) == 60
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert batching.free_bytes(CPU) == 20
    monkeypatch.setattr(batching, "_free_of_system", lambda: None)
    monkeypatch.setattr(batching, "_free_of_group", lambda: None)
    assert batching.free_bytes(CPU) is None
