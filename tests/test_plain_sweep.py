"""adam and grad_norm by one native call: the bits of the ops, or nothing is done."""

from __future__ import annotations

import border_calls
import pytest
import torch
from test_adam import Lists
from test_training import Small, batches, trainer
from torch.overrides import TorchFunctionMode

from fastddpm import _native, ops
from fastddpm.ops import plain_sweep

pytestmark = pytest.mark.skipif(_native.C is None, reason=str(_native.reason))

OPTIONS = {
    "lr": 2e-3, "betas": (0.9, 0.99), "eps": 1e-8, "share": 0.01, "clip": 1.0, "grad_scale": 2.0,
}  # fmt: skip


def step(lists, grads, **options):
    return plain_sweep.adam(
        lists.params, grads, lists.exp_avgs, lists.exp_avg_sqs, lists.steps, lists.averages,
        **{**OPTIONS, "norm": torch.tensor(3.0), "refused": torch.tensor(0.0), **options},
    )  # fmt: skip


def made(layout=None):
    torch.manual_seed(0)
    lists = Lists(layout=layout)
    return lists, [torch.randn_like(p) for p in lists.params]


def assert_same(lists, others):
    for a, b in zip(lists.all(), others.all(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", [None, "nhwc"])
def test_the_bits_of_the_op(layout):
    (lists, grads), (others, _) = made(layout), made(layout)
    for refused in (0.0, 1.0, 0.0):
        versions = [x._version for x in lists.params]
        norm, refused = plain_sweep.grad_norm(grads), torch.tensor(refused)
        assert torch.equal(norm, ops.grad_norm(grads))
        assert step(lists, grads, norm=norm, refused=refused)
        others.copies = None
        others.step(grads, norm=norm, refused=refused, **OPTIONS)
        lists.copies = others.copies = ()
        assert_same(lists, others)
        assert [x._version for x in lists.params] == [v + 1 for v in versions]
    assert [x.item() for x in lists.steps] == [2] * len(lists.steps)


class Sub(torch.Tensor):
    pass


def inference(x):
    with torch.inference_mode():
        return x.clone()


LISTS = ("params", "exp_avgs", "exp_avg_sqs", "averages")
STRANGE = {
    "double": torch.Tensor.double,
    "half": torch.Tensor.half,
    "of another shape": lambda x: x.flatten(),
    "of another order": lambda x: x.contiguous(memory_format=torch.channels_last),
    "expanded": lambda x: x[:1, :1, :1, :1].expand(x.shape),
    "a slice": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "shorter memory": lambda x: border_calls.resized(x, 4 * x.numel() - 1),
    "no memory": lambda x: border_calls.resized(x, 0),
    "negated": border_calls.negated,
    "a lazy zero": lambda x: torch._efficientzerotensor(x.shape),
    "on another device": lambda x: x.to("meta"),
    "a subclass": lambda x: x.as_subclass(Sub),
    "a sparse one": torch.Tensor.to_sparse,
    "no tensor": lambda x: None,
}


@pytest.mark.parametrize("name", [*LISTS, "grads"])
@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_not_plain_is_left_alone(name, kind):
    (lists, grads), (others, _) = made(), made()
    at = grads if name == "grads" else getattr(lists, name)
    (position,) = [i for i, x in enumerate(at) if x.dim() == 4]
    before, at[position] = at[position], STRANGE[kind](at[position])
    assert not step(lists, grads)
    if name != "grads":
        at[position] = before
    assert_same(lists, others)


@pytest.mark.parametrize("name", [*LISTS, "steps"])
def test_inference_tensors_are_not_written(name):
    lists, grads = made()
    getattr(lists, name)[3] = inference(getattr(lists, name)[3])
    assert not step(lists, grads)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": float("nan")}, {"lr": torch.tensor(0.1)}, {"share": float("inf")}, {"eps": -1.0},
        {"eps": "1"}, {"betas": (1.0, 0.9)}, {"betas": (0.9, float("nan"))}, {"clip": 0.0},
        {"grad_scale": 0.0}, {"grad_scale": float("inf")}, {"norm": None}, {"refused": None},
        {"norm": torch.zeros(1)}, {"refused": torch.zeros((), dtype=torch.float64)},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_that_adam_refuses(options):
    (lists, grads), (others, _) = made(), made()
    assert not step(lists, grads, **options)
    assert_same(lists, others)


def test_what_is_written_lies_apart():
    """By an element, by all of them, a step with a weight, a gradient with an average."""
    memory = torch.randn(4099 + 7)
    for change in (
        lambda lists, grads: setattr(lists, "averages", lists.params),
        lambda lists, grads: lists.steps.__setitem__(0, lists.steps[1]),
        lambda lists, grads: lists.steps.__setitem__(0, lists.params[-1][5]),
        lambda lists, grads: grads.__setitem__(-1, lists.averages[-1]),
        lambda lists, grads: (
            lists.params.__setitem__(-1, memory[6:-1]), lists.exp_avgs.__setitem__(2, memory[:7])
        ),
    ):  # fmt: skip
        lists, grads = made()
        change(lists, grads)
        before = [x.clone() for x in lists.all()]
        assert not step(lists, grads)
        assert all(map(torch.equal, lists.all(), before))
    lists, grads = made()  # neighbours, and a gradient that two share
    lists.params[-1], lists.exp_avgs[2] = memory[7:], memory[:7]
    grads[1] = grads[0].reshape(())
    assert step(lists, grads)


def test_unequal_lists():
    lists, grads = made()
    assert not step(lists, grads[:-1])
    lists.steps.append(torch.zeros(()))
    assert not step(lists, grads)


def test_another_backend_and_who_watches_torch():
    lists, grads = made()
    with ops.use_backend("reference"):
        assert not step(lists, grads)
        assert plain_sweep.grad_norm(grads) is None

    class Watching(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            return function(*arguments, **(options or {}))

    with Watching():
        assert not step(lists, grads)
    assert step(lists, grads)


def test_norms_of_what_is_not_plain():
    assert plain_sweep.grad_norm([]) is None
    x = torch.randn(2, 3, 4, 5)
    for make in STRANGE.values():
        norm = plain_sweep.grad_norm([x, make(x)])
        if norm is not None:
            assert torch.equal(norm, ops.grad_norm([x, make(x)]))


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_a_state_that_lost_its_memory_between_steps(key):
    run, data = trainer(Small()), batches(3)
    run.step(data[0])
    run.step(data[1])
    state = run.optimizer.state[run.network.two.weight]
    state[key].untyped_storage().resize_(4)
    before = run.network.one.weight.detach().clone()
    with pytest.raises((ValueError, RuntimeError)):
        run.step(data[2])
    assert torch.equal(run.network.one.weight, before)


def test_weights_that_are_replaced_between_steps():
    """Other memory of the same parameters, other moments: each step sees what is there."""
    runs, data = [trainer(Small()) for _ in range(2)], batches(4)
    for k, x0 in enumerate(data):
        for run in runs:
            run.step(x0)
        for p in runs[0].network.parameters():
            p.data = p.data.clone() if k % 2 else p.data.contiguous(
                memory_format=torch.channels_last if p.dim() == 4 else torch.contiguous_format
            )  # fmt: skip
            state = runs[0].optimizer.state[p]
            state["exp_avg"] = state["exp_avg"].clone()
    for p, q in zip(*(run.network.parameters() for run in runs), strict=True):
        torch.testing.assert_close(p, q)
