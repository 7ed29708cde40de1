"""No bad pointer passes the native border: each kind by name, then thousands of mutated calls."""

from __future__ import annotations

import subprocess
import sys
import threading

import border_calls
import pytest
import torch
from compare import table

from fastddpm import _native, ops

pytestmark = pytest.mark.skipif(_native.C is None, reason="the border is the native module's")

X = torch.randn(2, 4, 3, 5)
T = torch.tensor([0, 999])
BATCH = 250  # calls of one process


def wrong_calls(seed: int, count: int) -> list[str]:
    """Of `count` mutated calls those that crash, hang or raise another kind of error."""
    wrong, first = [], 0
    while first < count:
        command = (sys.executable, border_calls.__file__, seed, first, min(BATCH, count - first))
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        lines = done.stdout.splitlines()
        wrong += [line for line in lines if line.startswith("wrong")]
        if lines and lines[-1] == "done":
            first += BATCH
            continue
        calls = [line for line in lines if line.startswith("call")]
        assert calls, done.stderr
        wrong.append(f"{calls[-1]} ended the process: {done.returncode} {done.stderr[-300:]}")
        first = int(calls[-1].split()[1]) + 1
    return wrong


def test_mutated_calls():
    assert wrong_calls(0, 200) == []


@pytest.mark.slow
def test_many_mutated_calls():
    assert wrong_calls(1, 4000) == []


def group_norm(x=X, y=None, weight=None, threads=1, groups=2, eps=1e-6):
    y = torch.empty(2, 4, 3, 5) if y is None else y
    _native.C.cpu.group_norm_silu(
        *(x, y, groups, weight, None, eps, None, None, True, None, None, None, None),
        *(0.0, None, None, None, None, None, None, threads),
    )
    return y


def resized(size: int) -> torch.Tensor:
    return border_calls.resized(X, size)


NO_MEMORY = "x is not a plain tensor in memory"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.empty_like(X, device="meta"), "x must be on the CPU"),
        (lambda: torch.empty(2, 4, 4, 5, device="meta")[:, :, 1:], "x must be on the CPU"),
        (lambda: torch._efficientzerotensor(X.shape), NO_MEMORY),
        (lambda: torch._efficientzerotensor((2, 4, 4, 5))[:, :, 1:], NO_MEMORY),
        (lambda: resized(0), NO_MEMORY),
        (lambda: resized(X.numel() * 4 - 1), "x reaches outside its storage of 479 bytes"),
        (lambda: torch.complex(X, X).conj().imag, "x is a lazily negated view: call its resolve_n"),
        (lambda: X.to_sparse(), NO_MEMORY),
        (lambda: X.to_mkldnn(), "x is not a plain tensor in memory|x must be on the CPU"),
        (border_calls.leaked, NO_MEMORY),
        (lambda: border_calls.fake(X), "x must be on the CPU|x is not a plain"),
        (lambda: torch.nested.nested_tensor(list(X)), NO_MEMORY),
        (lambda: X[:1, :1, :1, :1].expand(2**16, 2**16, 2**16, 5), "x is too large"),
        (lambda: X.double(), "x must be float32, bfloat16 or float16; got torch.float64"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_no_memory_to_read(make, message):
    with pytest.raises(ValueError, match=message):
        group_norm(make())


@pytest.mark.parametrize("x", [None, 3, X.tolist(), X.numpy()], ids=lambda x: type(x).__name__)
def test_no_tensor(x):
    for call in (lambda: group_norm(x), lambda: group_norm(y=x if x is not None else 0)):
        with pytest.raises(TypeError, match=r"^[xy] must be a tensor; got "):
            call()


def test_a_subclass_is_asked_by_its_base_class():
    """Whatever its own data_ptr, shape and __torch_function__ say."""
    assert torch.equal(group_norm(X.as_subclass(border_calls.Liar)), group_norm())
    with pytest.raises(ValueError, match=r"y must have shape \(2, 4, 3, 5\); got \(2, 4, 3, 4\)"):
        group_norm(y=torch.zeros(2, 4, 3, 4).as_subclass(border_calls.Liar))


@pytest.mark.parametrize("threads", [2**32, 3 * 2**32, 2**31, 2**63 - 1, 20_000])
def test_too_many_threads_are_as_many_as_there_can_be(threads):
    assert torch.equal(group_norm(threads=threads), group_norm())


@pytest.mark.parametrize("threads", [0, -1, -(2**32), -(2**63)])
def test_no_threads(threads):
    with pytest.raises(ValueError, match=f"threads must be at least 1; got {threads}"):
        group_norm(threads=threads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": float("nan")}, "eps must be a number of at least 0; got nan"),
        ({"eps": -1.0}, "eps must be a number of at least 0; got -1"),
        ({"groups": 0}, "num_groups must divide the channels; got 0 and 4"),
        ({"groups": 2**62}, f"num_groups must divide the channels; got {2**62} and 4"),
        ({"y": torch.zeros(2, 1, 3, 5).expand(2, 4, 3, 5)}, "y must not be an expanded tensor"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        group_norm(**options)


def test_randn_writes_contiguous_memory_only():
    wide = torch.zeros(2, 4, 3, 10)
    with pytest.raises(ValueError, match="out must be contiguous"):
        _native.C.cpu.randn(wide[..., ::2], 0, T, T, 1)
    assert not wide.any()


def test_a_table_without_rows():
    """CUDA's kernels take the nearest row for a t outside of it."""
    x, index = torch.zeros(2, 4, 3, 5), torch.arange(2)
    arguments = (x, x, x, None, x.clone(), None, None, None, index, table()[:0])
    with pytest.raises(ValueError, match=r"^table must have shape \(T, K\), T >= 1; got \(0, 8\)$"):
        _native.C.cpu.posterior_step(*arguments, "eps", True, False, 1)


def test_an_empty_output_may_have_any_strides():
    x = torch.zeros(2, 4, 0, 1).expand(2, 4, 0, 5)
    y = torch.empty_like(x)
    assert y.stride() == x.stride()
    group_norm(x, y)


# ---- plans ---------------------------------------------------------------------------------------


def plan(**options):
    made = _native.C.cpu.Plan(6, 6, 4)
    weight = torch.eye(4)
    return made, made.convolution("layer", [0], weight, [0.0] * 4, 1, **options)


def forward(made, x=None, time=None, out=None, threads=1):
    x = torch.randn(2, 4, 6, 6) if x is None else x
    out = torch.empty(2, 4, 6, 6) if out is None else out
    made.forward(x, time, out, threads)
    return x, out


@pytest.mark.parametrize("time_offset", [2**63 - 1, 2**63 - 4, 2**40, -2])
def test_plan_time_offset(time_offset):
    with pytest.raises(ValueError, match="layer: time_offset must be -1 or lie in 0"):
        plan(time_offset=time_offset)


@pytest.mark.parametrize("eps", [float("nan"), -1.0])
def test_plan_eps(eps):
    with pytest.raises(ValueError, match="layer: eps must be a number of at least 0"):
        plan(norm=(2, eps, [1.0] * 4, [0.0] * 4, True))


@pytest.mark.parametrize("norm", [(2, 1e-6), "norm", (2, 1e-6, [1.0], None, True), 5])
def test_plan_norm_of_another_kind(norm):
    with pytest.raises(TypeError):
        plan(norm=norm)


@pytest.mark.parametrize("heads", [0, -1, 2**62, 2**63 - 1])
def test_plan_heads(heads):
    made = _native.C.cpu.Plan(6, 6, 12)
    with pytest.raises(ValueError, match="attention: num_heads must divide the channels"):
        made.attention("attention", 0, heads)


@pytest.mark.parametrize("size", [(2**30, 2**30, 1), (1, 2**50, 1), (6, 6, 2**40), (2**62, 4, 4)])
def test_plan_of_an_image_that_is_too_large(size):
    with pytest.raises(ValueError, match=r"input: an image of .* is too large"):
        _native.C.cpu.Plan(*size)


def test_plan_in_another_order():
    made, y = plan()
    x = torch.randn(2, 4, 6, 6)
    with pytest.raises(ValueError, match="the plan is not finished"):
        forward(made)
    with pytest.raises(ValueError, match="the plan is not finished"):
        made.not_finite(x, None, 1)
    with pytest.raises(ValueError, match="there is no activation 7"):
        made.finish(7)
    with pytest.raises(ValueError, match="the plan has no layers"):
        _native.C.cpu.Plan(6, 6, 4).finish(0)
    made.finish(y)
    with pytest.raises(ValueError, match="the plan is finished: no layer can follow"):
        made.convolution("late", [0], torch.eye(4), [0.0] * 4, 1)
    with pytest.raises(ValueError, match="the plan is finished"):
        made.finish(y)
    x, out = forward(made)
    assert torch.equal(out, x)  # the weight is the identity


def test_plan_of_no_images():
    made = _native.C.cpu.Plan(6, 6, 12)
    made.finish(made.attention("attention", 0, 2))
    x, out = torch.empty(0, 12, 6, 6), torch.empty(0, 4, 6, 6)
    assert made.forward(x, None, out, 1)
    assert made.profile(x, None, out, 1) == []
    assert made.not_finite(x, None, 1) == ""


def test_threads_take_turns_with_a_plan():
    made, y = plan()
    made.finish(y)
    xs = [torch.randn(n, 4, 6, 6) for n in (1, 3, 40, 7)]
    outs = [torch.empty_like(x) for x in xs]

    def run(x, out):
        for _ in range(50):
            made.forward(x, None, out, 1)

    team = [threading.Thread(target=run, args=pair) for pair in zip(xs, outs, strict=True)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert all(torch.equal(x, out) for x, out in zip(xs, outs, strict=True))


def test_a_name_that_is_none():
    with pytest.raises(TypeError):
        _native.C.use_isa(None)
    with pytest.raises(TypeError):
        _native.C.cpu.peak_flops(1, 0.0, None)


def test_public_ops_of_a_leaked_wrapper():
    with pytest.raises((ValueError, RuntimeError)):
        ops.noise(border_calls.leaked()[0], T, table(), eps=X)


def test_a_plan_that_was_never_initialised():
    kind = _native.C.cpu.Plan
    plan, x = kind.__new__(kind), torch.zeros(1, 1, 1, 1)
    run = (x, torch.zeros(0), x, 1)
    for call in (
        lambda: plan.convolution("a", [0], torch.zeros(4, 36), [0.0] * 4, 3),
        lambda: plan.attention("a", 0, 1),
        lambda: plan.channels(0),
        lambda: plan.finish(0),
        lambda: plan.forward(*run),
        lambda: plan.profile(*run),
        lambda: plan.not_finite(x, torch.zeros(0), 1),
        plan.layers,
        plan.segments,
        lambda: plan.weight_bytes,
        lambda: plan.image_bytes,
        lambda: plan.peak_bytes,
        lambda: plan.isa,
    ):
        with pytest.raises(ValueError, match="the plan was never initialised"):
            call()


def test_wrong_arguments_are_refused_without_a_look_at_the_others():
    """A tensor without memory ends the process that prints it."""
    gone = resized(0)
    plan = _native.C.cpu.Plan(6, 6, 4)
    for call in (
        lambda: group_norm(gone, threads=-1e300),
        lambda: _native.C.cpu.randn(gone),
        lambda: plan.forward(gone, gone, gone, "one"),
        lambda: plan.finish(gone),
        lambda: _native.C.use_isa(gone),
    ):
        with pytest.raises(TypeError, match=r"^\w+\(\): arguments of another type or number than"):
            call()
