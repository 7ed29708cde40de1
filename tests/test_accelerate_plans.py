"""accelerate: a known network's calls without gradients are run by a plan of its weights as they
are in that very call, however they were changed before it, and by none where that would be another
function."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import threading

import pytest
import torch
from peers import W86, OpenAI, Tqch, randomised
from test_accelerate import NETWORKS, accelerated, batch, call
from torch import Tensor, nn
from toy import generator

from fastddpm import _native
from fastddpm.accelerated import plans, rules


@pytest.fixture
def planned(monkeypatch) -> list[int]:
    """Filled with the number of images of each run of a plan."""
    seen: list[int] = []
    own = plans.UNetPlan.__call__

    def run(self, x: Tensor, *rest):
        seen.append(len(x))
        return own(self, x, *rest)

    monkeypatch.setattr(plans.UNetPlan, "__call__", run)
    return seen


def network(kind=W86) -> nn.Module:
    torch.manual_seed(0)
    return accelerated(randomised(kind()))


def own(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """The network's own result."""
    labels = (torch.tensor([1, 2]),) if hasattr(model, "label_emb") else ()
    out = type(model).forward(model, x, t, *labels)
    return getattr(out, "sample", out)


def assert_own(model: nn.Module, found: Tensor, x: Tensor, t: Tensor) -> None:
    expected = own(model, x, t)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert found.is_contiguous()


@pytest.mark.parametrize("name", NETWORKS)
def test_calls_without_gradients(planned, name):
    model = network(NETWORKS[name])
    x, t = batch()
    with torch.no_grad():
        for steps in (t, t.flip(0)):  # of each image its own
            assert_own(model, call(model, x, steps), x, steps)
        assert planned == [2, 2]
        if name == "diffusers":
            assert torch.equal(model(x, 3).sample, call(model, x, torch.tensor([3, 3])))
            assert_own(model, call(model, x, torch.tensor(3)), x, torch.tensor(3))
        elif name != "w86763777":  # a table of whole steps
            assert_own(model, call(model, x, t + 0.5), x, t + 0.5)
        assert len(planned) > 2 or name == "w86763777"
        both = call(model, x.to(memory_format=torch.channels_last), t)
        assert torch.equal(both, call(model, x, t))
        if not hasattr(model, "label_emb"):
            assert torch.equal(call(model, x[1:], t[1:]), both[1:])
    with torch.inference_mode():
        assert torch.equal(call(model, x, t), both)


def write_elsewhere(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(3)


def in_another_process(model: nn.Module, p: nn.Parameter) -> None:
    writer = multiprocessing.get_context("fork").Process(target=write_elsewhere, args=(p.data,))
    writer.start()
    writer.join(30)
    assert writer.exitcode == 0


def by_a_dict(assign: bool):
    def change(model: nn.Module, p: nn.Parameter) -> None:
        name = next(name for name, each in model.named_parameters() if each is p)
        state = {**model.state_dict(), name: 3 * p.detach()}
        model.load_state_dict(state, assign=assign)

    return change


def by_another(model: nn.Module, p: nn.Parameter) -> None:
    owner = next(m for m in model.modules() if any(p is each for each in m._parameters.values()))
    name = next(name for name, each in owner._parameters.items() if each is p)
    setattr(owner, name, nn.Parameter(3 * p.detach()))


WAYS = {
    "in place": lambda model, p: p.mul_(3),
    "by its data": lambda model, p: p.data.mul_(3),
    "by numpy": lambda model, p: p.detach().numpy().__imul__(3),
    "other data": lambda model, p: setattr(p, "data", 3 * p.data),
    "another parameter": by_another,
    "a dict": by_a_dict(False),
    "an assigned dict": by_a_dict(True),
    "another process": in_another_process,
    "another order": lambda model, p: setattr(p, "data", p.data.flip(0).contiguous()),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_change_of_weights_is_missed(planned, way):
    model = network()
    for p in model.parameters():
        p.data = p.data.share_memory_() if way == "another process" else p.data
    x, t = batch()
    conv = "middleblocks.0.block1.2.weight"
    with torch.no_grad():
        before = model(x, t)
        for name in (conv, "time_embedding.timembedding.3.bias", "tail.0.weight"):
            WAYS[way](model, model.get_parameter(name))
            for _ in range(2):
                found = model(x, t)
                assert not torch.allclose(found, before, rtol=1e-3, atol=1e-4)
                assert_own(model, found, x, t)
            before = found


def test_a_weight_in_another_layout_is_read_by_it(planned):
    """The same bytes in another order are other values."""
    model = network()
    p = model.middleblocks[0].block1[2].weight
    x, t = batch()
    with torch.no_grad():
        before = model(x, t)
        p.data = p.data.transpose(0, 1)  # square: of the same shape
        found = model(x, t)
        assert not torch.allclose(found, before, rtol=1e-3, atol=1e-4)
        assert_own(model, found, x, t)


def test_every_value_is_in_the_digest():
    digest = _native.C.cpu.digest
    tensors = [torch.randn(n, generator=generator(n)) for n in (1, 3, 64, 65, 300_000, 0)]
    seen = {digest(tensors, 1)}
    assert digest(tensors, 2) in seen
    changes = 0
    for tensor in tensors[:-1]:
        for at in {0, len(tensor) // 2, len(tensor) - 1}:
            kept = tensor[at].clone()
            for value in (-kept, torch.nextafter(kept, torch.tensor(9.0))):
                tensor[at] = value
                seen.add(digest(tensors, 2))
                changes += 1
            tensor[at] = kept
    assert len(seen) == changes + 1
    assert digest(tensors[::-1], 2) not in seen
    for wrong in (torch.zeros(4).bfloat16(), torch.zeros(4).double(), torch.zeros(4, 4)[:, ::2]):
        with pytest.raises(ValueError, match="each tensor must be "):
            digest([wrong], 1)
    with pytest.raises(TypeError):
        digest([None], 1)


def test_weights_in_training_are_not_packed_for_a_few_images(planned, monkeypatch):
    monkeypatch.setattr(rules, "WHOLE_PIXELS", 1)
    model = network()
    x, t = batch()
    with torch.no_grad():
        model(x, t)
    assert planned == [2]
    assert model.forward.plan is not None
    model(x, t).sum().backward()
    assert model.forward.plan is None
    made: list[int] = []
    own = plans._plan_of
    monkeypatch.setattr(plans, "_plan_of", lambda *given: made.append(1) or own(*given))
    with torch.no_grad():
        for _ in range(plans.CALLS - 1):
            model(x, t)
        assert planned == [2]
        assert not made
        for other in (model, copy.deepcopy(model)):
            assert_own(other, other(x, t), x, t)
        assert len(planned) == 2
        assert len(made) == 1
        model.head.weight.mul_(2)
        model(x, t)
        assert model.forward.plan is None
        for _ in range(plans.CALLS - 1):
            model(x, t)
        assert len(made) == 2
        small = x[:, :, :8, :8]  # another size is another plan's
        assert_own(model, model(small, t), small, t)
        assert len(made) == 2


def test_what_a_plan_does_not_compute_is_computed_otherwise(planned):
    model = network().train()
    x, t = batch()
    with torch.no_grad():
        torch.manual_seed(1)
        a, b = model(x, t), model(x, t)
        assert not torch.equal(a, b)  # a dropout is at work
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model.eval()(x, t).dtype == torch.bfloat16
            assert model(x, t).dtype == torch.bfloat16
    assert model(x, t).requires_grad
    assert not planned
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    model = accelerated(model)
    with torch.no_grad():
        assert_own(model, model.train()(x, t), x, t)
        assert planned == [2]
        model.downblocks[0].block2[2].p = 0.5
        torch.manual_seed(1)
        assert not torch.equal(model(x, t), model(x, t))
        model.downblocks[0].block2[2].p = 0.0
    assert planned == [2]
    model.requires_grad_(False)
    assert not model(x, t).requires_grad
    leaf = x.clone().requires_grad_()
    model(leaf, t).sum().backward()
    assert leaf.grad.abs().max() > 0


def test_frozen_networks_are_planned_where_gradients_are_on(planned, monkeypatch):
    monkeypatch.setattr(rules, "WHOLE_PIXELS", 1)
    model = network().requires_grad_(False)
    x, t = batch()
    for _ in range(2):
        assert_own(model, model(x, t), x, t)
        leaf = x.clone().requires_grad_()
        assert model(leaf, t).requires_grad
    assert planned == [2, 2]
    assert model.forward.plan is not None


def test_values_that_are_not_finite_are_the_networks(planned):
    model = network(OpenAI)
    x, t = batch()
    x[0, 0, 0, 0] = float("nan")
    with torch.no_grad():
        found, expected = model(x, t), own(model, x, t)
    assert planned == [2]
    assert torch.equal(found[0].isnan(), expected[0].isnan())
    assert torch.allclose(found[1], expected[1], atol=1e-4 * float(expected[1].abs().max()))


@pytest.mark.parametrize("name", ["middleblocks.0.block1.2.weight", "head.bias"])
def test_weights_that_are_not_finite_are_the_networks(planned, name):
    model = network()
    x, t = batch()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = float("inf")
        for _ in range(2):
            assert torch.equal(model(x, t).isfinite(), own(model, x, t).isfinite())
    assert not planned


def test_its_memory_is_said_and_freed():
    model = network()
    x, t = batch()
    assert "plans: 0 MiB" in str(model.report())
    assert "packed copies" in model.report().replaced[""]
    with torch.no_grad():
        model(x, t)
    stands = model.forward
    weights = sum(4 * p.numel() for p in model.parameters())
    assert model.report().plan_bytes == stands.plan.bytes > weights
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.forward.plan is None
        assert other.report().plan_bytes == 0
    assert stands.plan is not None
    assert len(pickle.dumps(model)) < 2 * weights
    model.undo()
    assert stands.plan is None


def test_threads_share_a_plan(planned):
    model = network(Tqch)
    x, t = batch()
    found: list[Tensor] = []

    def run() -> None:
        with torch.no_grad():
            found.extend(model(x, t) for _ in range(3))

    workers = [threading.Thread(target=run) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == len(planned) == 9
    assert all(torch.equal(each, found[0]) for each in found)
    assert_own(model, found[0], x, t)


def test_the_first_call_may_be_in_inference_mode(planned):
    model = network().requires_grad_(False)
    x, t = batch()
    with torch.inference_mode():
        first = model(x, t)
    assert torch.equal(model(x, t), first)
    assert planned == [2, 2]


def test_parts_that_are_gone_are_the_networks_own(planned):
    model = network()
    x, t = batch()
    model.tail = model.tail[2]
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            assert torch.equal(model(x, t), own(model, x, t))
    assert not planned
