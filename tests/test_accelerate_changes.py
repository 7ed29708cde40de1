"""accelerate: a network that is changed after it was accelerated, in any of the ways that its
forward may read, computes what it computes itself from then on."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from peers import W86, OpenAI, OpenAIBlock, Tqch, TqchBlock, randomised
from test_accelerate import Port, accelerated, assert_close, batch, count, results
from torch import Tensor, nn

import fastddpm
from fastddpm.accelerate import undo
from fastddpm.accelerated import rules
from fastddpm.accelerated.state import StandIn
from fastddpm.accelerated.whole import WholeNetwork


@pytest.fixture(autouse=True)
def small_steps_too(monkeypatch):
    monkeypatch.setattr(rules, "WHOLE_PIXELS", 1)
    monkeypatch.setattr(rules, "WHOLE_PIXELS_AUTOCAST", 1)


class InTwo(OpenAIBlock):
    """Its forward behind another method, as OpenAI's own have it for checkpoints."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return OpenAIBlock.forward(self, x, emb)


class WithFunction(TqchBlock):
    act = staticmethod(F.silu)

    def forward(self, x: Tensor, t_emb: Tensor) -> Tensor:
        h = self.conv1(self.act(self.norm1(x))) + self.fc(F.silu(t_emb))[:, :, None, None]
        return self.conv2(self.act(self.norm2(h))) + self.skip(x)


class Gains(W86):
    """What a forward may read beside parameters, all of it doing nothing at first."""

    def __init__(self):
        super().__init__()
        self.gains, self._gain, self.plain = [1.0], 1.0, torch.ones(1)
        self.register_buffer("buffer", torch.ones(1), persistent=False)
        self.register_buffer("later", None)
        self.register_parameter("shift", None)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = super().forward(x, t) * self.gains[0] * self._gain * self.plain * self.buffer
        y = y if self.later is None else y * self.later
        return y if self.shift is None else y + self.shift


def of_class(model: nn.Module, own: type, other: type) -> nn.Module:
    for module in model.modules():
        if type(module) is own:
            module.__class__ = other
    return model


def in_two() -> nn.Module:
    return of_class(OpenAI(), OpenAIBlock, InTwo)


def with_function() -> nn.Module:
    return of_class(Tqch(), TqchBlock, WithFunction)


def twice(self, x: Tensor, emb: Tensor) -> Tensor:
    return 2 * OpenAIBlock.forward(self, x, emb)


def three() -> Tensor:
    return torch.full((1,), 3.0)


CHANGES = {
    "a method of one": (in_two, lambda m: setattr(m.middle_block[0], "_forward", lambda x, e: x)),
    "a function of one": (with_function, lambda m: setattr(m.middle[0], "act", F.relu)),
    "a function of all": (
        with_function,
        lambda m: setattr(WithFunction, "act", staticmethod(F.relu)),
    ),
    "a method of all": (in_two, lambda m: setattr(InTwo, "_forward", twice)),
    "a list": (Gains, lambda m: m.gains.__setitem__(0, 3.0)),
    "a private number": (Gains, lambda m: setattr(m, "_gain", 3.0)),
    "a tensor": (Gains, lambda m: m.plain.fill_(3)),
    "a buffer": (Gains, lambda m: m.buffer.fill_(3)),
    "a buffer in place of none": (Gains, lambda m: setattr(m, "later", three())),
    "a parameter in place of none": (Gains, lambda m: setattr(m, "shift", nn.Parameter(three()))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(monkeypatch, change):
    make, how = CHANGES[change]
    monkeypatch.setattr(InTwo, "_forward", InTwo._forward)  # as they were, in the end
    monkeypatch.setattr(WithFunction, "act", staticmethod(F.silu))
    torch.manual_seed(0)
    model = accelerated(randomised(make()))
    assert list(model.report().replaced) == [""]
    x, t = batch()
    with torch.no_grad():
        for other in (copy.deepcopy(model), model):
            assert torch.equal(other(x, t), model(x, t))
            assert other.forward._unet is not None
            how(other)
            assert torch.equal(other(x, t), type(other).forward(other, x, t))


class OfOneSize(Port):
    """As the port's own forward, which asserts its resolution."""

    image_size = 16

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert x.shape[2] == x.shape[3] == self.image_size
        return super().forward(x, t)


def test_a_size_that_a_network_refuses_is_refused():
    torch.manual_seed(0)
    model = accelerated(randomised(OfOneSize()))
    x, t = batch()
    with torch.no_grad():
        model(x, t)
        assert model.forward._unet is not None
        with pytest.raises(AssertionError):
            model(x[:, :, :8, :8], t)
        with pytest.raises(AssertionError):
            copy.deepcopy(model)(x[:, :, :8, :8], t)


class Floats(W86):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t).float()


def test_the_type_of_a_result_under_autocast_is_the_networks():
    torch.manual_seed(0)
    x, t = batch()
    for make, dtype in ((Floats, torch.float32), (W86, torch.bfloat16)):
        model = accelerated(randomised(make()))
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            for other in (model, model, copy.deepcopy(model)):
                assert other(x, t).dtype == dtype
            assert model.forward._unet is not None


class Met(WholeNetwork):
    """Another thread puts its UNet where one just did."""

    @property
    def _unet(self):
        return self.__dict__.get("kept")

    @_unet.setter
    def _unet(self, value):
        self.__dict__["kept"] = value if value is None else (-1, "another's")


def test_threads_that_meet_compute_by_their_own():
    torch.manual_seed(0)
    model = accelerated(randomised(W86()))
    x, t = batch()
    expected = model(x, t)  # which autograd records: no plan computes it
    model.forward.__class__ = Met
    model.forward.__dict__.pop("_unet")
    assert torch.equal(model(x, t), expected)


# ---- layers --------------------------------------------------------------------------------------


class Activates(nn.GroupNorm):
    """As guided-diffusion's and its like: an activation where one is asked for."""

    def __init__(self, groups: int, channels: int, swish: float | None = None):
        super().__init__(groups, channels)
        if swish is not None:
            self.swish = swish

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return F.silu(y) if hasattr(self, "swish") else y


def test_one_odd_layer_says_nothing_of_its_class(monkeypatch):
    torch.manual_seed(0)
    model = randomised(
        nn.Sequential(
            Activates(8, 64, 1.0), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1),
            Activates(8, 64), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1),
        )
    )  # fmt: skip
    x = torch.randn(2, 64, 16, 16)
    with torch.no_grad():
        expected = model(x)
        accelerated(model)
        seen = count(monkeypatch)
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
        assert seen == [False, True]
        assert "swish" in model.report().left["0"]


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.GroupNorm, nn.SiLU])
def test_a_forward_that_all_of_a_class_get_is_taken(monkeypatch, kind):
    torch.manual_seed(0)
    model = randomised(
        nn.Sequential(nn.GroupNorm(8, 64), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1))
    )
    x = torch.randn(2, 64, 16, 16)
    with torch.no_grad():
        accelerated(model)(x)
        own = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, x: 2 * own(self, x))
        found = model(x)
        torch.testing.assert_close(found, model.undo()(x), atol=1e-4, rtol=1e-4)


class Draws(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * torch.randn(())


def test_no_random_numbers_are_drawn_by_looking():
    model = nn.Sequential(Draws(8, 64), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1))
    state = torch.get_rng_state()
    fastddpm.accelerate(model)
    assert torch.equal(state, torch.get_rng_state())


def test_a_default_device_changes_nothing():
    torch.manual_seed(0)
    for make in (
        W86,
        lambda: nn.Sequential(Activates(8, 64), nn.SiLU(), nn.Conv2d(64, 64, 3, 1, 1)),
    ):
        expected = accelerated(make()).report().replaced
        model = make()
        torch.set_default_device("meta")
        try:
            assert accelerated(model).report().replaced == expected
        finally:
            torch.set_default_device(None)


# ---- models of other kinds -----------------------------------------------------------------------


class Raises(nn.Sequential):
    """What it is asked for and has not raises an error of its own."""

    @property
    def undo(self):
        raise RuntimeError("undo was asked for")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_models_that_cannot_be_looked_at_are_left_by_name():
    conv = nn.Conv2d(64, 64, 3, padding=1)
    for model, why in (
        (torch.jit.script(nn.Sequential(conv)), "is compiled by torch.jit"),
        (nn.Sequential(nn.LazyConv2d(64, 3, padding=1)), "has lazy layers"),
        (nn.Sequential(nn.Conv2d(64, 64, 3, device="meta")), "on the meta device"),
    ):
        with pytest.warns(UserWarning, match=f"replaced nothing .*{why}"):
            fastddpm.accelerate(model)
    model = accelerated(Raises(conv))
    assert isinstance(conv.__dict__.get("forward"), StandIn)
    assert undo(model) is model
    assert "forward" not in conv.__dict__
    inside = accelerated(nn.Sequential(nn.Sequential(conv), torch.jit.script(nn.SiLU())))
    assert list(inside.report().replaced) == ["0.0"]


def test_exported_programs_are_of_the_networks_own(monkeypatch):
    torch.manual_seed(0)
    x, t = batch()
    for model, inputs in (
        (randomised(W86()), (x, t)),
        (randomised(nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3, 1, 1))), (x,)),
    ):
        with torch.no_grad():
            expected = model(*inputs)
            program = torch.export.export(accelerated(model), inputs).module()
            torch.testing.assert_close(program(*inputs), expected, atol=1e-4, rtol=1e-4)
        with pytest.raises(AttributeError, match=r"torch\.jit\.script takes a network after \.un"):
            torch.jit.script(model)


def test_accelerated_where_nothing_is_recorded_it_trains():
    """In inference mode: what is kept of the network takes part in steps of training."""
    torch.manual_seed(0)
    model = randomised(OpenAI())
    x, t = batch()
    expected = results(model, x, t)
    with torch.inference_mode():
        accelerated(model)
        model(x, t)
    assert_close(results(model, x, t), expected)
    assert model.forward._unet is not None


@pytest.mark.parametrize(
    ("size", "said"), [(16, True), ((16, 16), True), ("16", False), (16.0, False)], ids=str
)
@pytest.mark.filterwarnings("ignore:abar_T")
def test_the_size_of_the_images_is_the_networks(size, said):
    torch.manual_seed(0)
    model = randomised(OpenAI())
    model.image_size = size
    options = {"diffusion": fastddpm.Diffusion(fastddpm.Schedule.linear(2, 0.1, 0.3))}
    accelerated(model)
    if said:
        assert fastddpm.sample(model, 1, progress=False, **options).shape == (1, 3, 16, 16)
    else:
        with pytest.raises(ValueError, match=r"shape=\(C, H, W\) is needed"):
            fastddpm.sample(model, 1, progress=False, **options)
