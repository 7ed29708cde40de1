"""What a caller gives for each image of a set: where it begins, what the network is told, who looks
on. Batches and ranks cut it; nothing of it is silently dropped."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest
import torch
from toy import SCHEDULE, generator, images, tiny_unet, wave

import fastddpm
from fastddpm import Diffusion, ops, reference
from fastddpm.given import Given

T = SCHEDULE.T
SHAPE = (2, 3, 5)
DIFFUSION = Diffusion(SCHEDULE)


def draw(n=5, model=wave, **options) -> torch.Tensor:
    defaults = {"shape": SHAPE, "diffusion": DIFFUSION, "progress": False}
    return fastddpm.sample(model, n, **{**defaults, **options})


class Recorder:
    """A model that keeps what it was given: {t: x_t}."""

    def __init__(self):
        self.seen = {}

    def __call__(self, x, t):
        self.seen[int(t[0])] = x.clone()
        return wave(x, t)


def labelled(x, t, y, scale=1.0):
    return torch.sin(scale * 3 * x + (t + y)[:, None, None, None])


# ---- where the chain begins ----------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize(
    "options", [{}, {"sampler": "ddim"}, {"steps": 4, "first_index": 3}], ids=str
)
def test_a_given_x_T_takes_the_place_of_the_seeds(options, batch_size):
    x_T = ops.randn((5, *SHAPE), seed=7, step=T, first_index=options.get("first_index", 0))
    kept = x_T.clone()
    expected = draw(seed=7, **options)
    for given in (x_T, x_T.to(memory_format=torch.channels_last), x_T.requires_grad_()):
        got = draw(seed=7, x_T=given, batch_size=batch_size, **options)
        assert torch.equal(got, expected)
        assert not got.requires_grad
    assert torch.equal(x_T, kept)
    assert torch.equal(
        draw(None, seed=7, x_T=x_T, shape=None, **options), expected
    )  # says n, shape
    half = draw(seed=7, x_T=x_T.detach().to(torch.bfloat16), **options)
    assert torch.equal(half, draw(seed=7, x_T=x_T.to(torch.bfloat16).float(), **options))


@pytest.mark.parametrize("engine", ["cpu_plan", "eager"])
def test_a_unets_x_T_in_any_engine(engine):
    model = tiny_unet()
    options = {"progress": False, "precision": "fp32", "engine": engine, "seed": 2}
    x_T = ops.randn((3, 1, 8, 8), seed=2, step=T)
    expected = fastddpm.sample(model, 3, **options)
    for given in (x_T, x_T.double()):
        assert torch.equal(fastddpm.sample(model, x_T=given, **options), expected)
    shared = fastddpm.sample(model, x_T=x_T[:1].expand(3, -1, -1, -1), **options)
    torch.testing.assert_close(shared[0], expected[0], atol=1e-5, rtol=0)
    assert not torch.equal(shared[1], expected[1])


@pytest.mark.parametrize(
    ("steps", "start", "t"), [(None, 7, 6), (None, T, T - 1), (5, 3, 6), (5, 1, 0)]
)
def test_a_chain_goes_on_from_any_of_its_x_t(steps, start, t):
    recorder = Recorder()
    whole = draw(model=recorder, steps=steps, seed=3, batch_size=5)
    again = Recorder()
    rest = draw(model=again, steps=steps, seed=3, start=start, x_T=recorder.seen[t], batch_size=2)
    assert torch.equal(rest, whole)
    assert max(again.seen) == t


@pytest.mark.parametrize(
    ("options", "visited"),
    [({"steps": 4, "spacing": "trailing"}, [11, 8, 5, 2]), ({"steps": [11, 4, 0]}, [11, 4, 0]),
     ({"steps": "ddim6"}, [10, 8, 6, 4, 2, 0])],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:abar_T")
def test_any_steps_may_be_visited(options, visited):
    recorder = Recorder()
    got = draw(model=recorder, **options)
    assert list(recorder.seen) == visited
    assert torch.equal(got, draw(diffusion=DIFFUSION.respace(**options)))
    again = draw(x_T=recorder.seen[visited[1]], start=len(visited) - 1, **options)
    assert torch.equal(again, got)
    a, b = images(2, *SHAPE)
    plain = {"diffusion": DIFFUSION.respace(**options), "progress": False, "n": 2, "t": 2}
    mixed = fastddpm.interpolate(wave, a, b, **{**plain, "diffusion": DIFFUSION, **options})
    assert torch.equal(mixed, fastddpm.interpolate(wave, a, b, **plain))


@pytest.mark.parametrize(
    ("steps", "start", "t"), [(None, 7, 6), (None, 1, 0), (5, 3, 6), (5, 5, 11)]
)
def test_images_are_noised_and_drawn_again(steps, start, t):
    x0 = images(5, *SHAPE)
    ab = SCHEDULE.alphas_cumprod[t]
    eps = ops.randn((5, *SHAPE), seed=3, step=T, first_index=4)
    xt = ab**0.5 * reference.to_unit(x0) + (1 - ab) ** 0.5 * eps
    options = {"steps": steps, "start": start, "seed": 3, "first_index": 4}
    recorder = Recorder()
    got = draw(model=recorder, init=x0, **options)
    torch.testing.assert_close(recorder.seen[t], xt.float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(got, draw(x_T=xt.float(), **options), atol=1e-5, rtol=0)
    for given in (x0, reference.to_unit(x0), reference.to_unit(x0).double()):
        again = draw(None, init=given, batch_size=2, shape=None, **options)
        torch.testing.assert_close(again, got, atol=1e-6, rtol=0)


def test_what_an_image_is_noised_by_is_no_steps_noise():
    """Else the first step would take away what was added."""
    drawn = [ops.randn((1, *SHAPE), seed=0, step=t) for t in range(T)]
    recorder = Recorder()
    zero = torch.zeros(1, *SHAPE)
    draw(1, recorder, init=zero, start=8)
    eps = recorder.seen[7] / (1 - SCHEDULE.alphas_cumprod[7]) ** 0.5
    for z in drawn:
        assert abs(np.corrcoef(eps.flatten(), z.flatten())[0, 1]) < 0.7


# ---- what the network is told --------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_arguments_are_cut_with_the_batches(batch_size):
    y = torch.tensor([3, 0, 4, 1, 2])
    expected = torch.cat(
        [
            draw(1, lambda x, t, k=k: labelled(x, t, y[k : k + 1], 0.5), first_index=k)
            for k in range(5)
        ]
    )
    got = draw(5, labelled, model_kwargs={"y": y, "scale": 0.5}, batch_size=batch_size)
    assert torch.equal(got, expected)
    rest = draw(2, labelled, first_index=3, model_kwargs={"y": y[3:], "scale": 0.5})
    assert torch.equal(rest, expected[3:])


def test_all_else_is_passed_as_it_is():
    seen = []

    def model(x, t, **given):
        seen.append(given)
        return wave(x, t)

    rows, shared, scalar, text = torch.arange(5.0), torch.ones(1, 7), torch.tensor(2.0), ("a", "b")
    # Names that functions on the way have arguments of.
    names = {"xt": rows, "i": shared, "seed": scalar, "model": text, "self": None, "n": 5}
    assert torch.equal(draw(5, model, model_kwargs=names, batch_size=3), draw())
    assert len(seen) == 2 * T
    for given, part in zip(seen[::T], (rows[:3], rows[3:]), strict=True):
        assert given.keys() == names.keys()
        assert torch.equal(given["xt"], part)
        assert given["i"] is shared
        assert given["seed"] is scalar
        assert given["model"] is text


@pytest.mark.parametrize("batch_size", [None, 2])
def test_arguments_within_others_are_cut_too(batch_size):
    y, scale = torch.tensor([3, 0, 4, 1, 2]), torch.full((5,), 0.5)
    expected = draw(5, labelled, model_kwargs={"y": y, "scale": 0.5})
    named = collections.namedtuple("named", "y rest")
    seen = []

    def model(x, t, given):
        labels = given["y"] if isinstance(given, dict) else given[0]
        seen.append(given)
        return labelled(x, t, labels[0] if isinstance(labels, list) else labels, 0.5)

    for given in ({"y": y, "s": scale, "a": 1}, [y, "a"], (y,), named(y, 2), {"y": [y, {"s": y}]}):
        got = draw(5, model, model_kwargs={"given": given}, batch_size=batch_size)
        assert torch.equal(got, expected)
        assert type(seen[-1]) is type(given)
    with pytest.raises(ValueError, match=r"model_kwargs\['given'\]\['y'\]\[0\] is an array of 5"):
        draw(5, model, model_kwargs={"given": {"y": [y.numpy()]}})


def test_a_length_that_is_some_batchs_is_named_before_the_first():
    def model(x, t, w):
        raise AssertionError("the model ran")

    with pytest.raises(ValueError, match=r"model_kwargs\['w'\] has the length 3 of a batch"):
        draw(7, model, model_kwargs={"w": torch.ones(3)}, batch_size=4)


def test_a_network_that_writes_into_its_input_leaves_the_callers_alone():
    def model(x, t):
        return wave(x.mul_(0.9), t)

    x_T = NOISE.clone()
    got = draw(model=model, x_T=x_T)
    assert torch.equal(x_T, NOISE)
    assert torch.equal(got, draw(model=model, x_T=x_T, batch_size=2))
    rows = draw(None, model=model, x_T=x_T[:1].expand(5, *SHAPE), shape=None)
    assert torch.equal(rows[0], got[0])


def test_every_way_of_sampling_tells_the_network():
    y = torch.tensor([3, 0, 4])
    fixed = {k: (lambda x, t, k=k: labelled(x, t, y[k : k + 1].expand(len(x)))) for k in range(3)}
    told = {"model_kwargs": {"y": y}, "shape": SHAPE, "diffusion": DIFFUSION, "progress": False}
    plain = {"shape": SHAPE, "diffusion": DIFFUSION, "progress": False}
    samples, x0, _ = fastddpm.sample_progressive(labelled, 3, frames=4, **told)
    for k in range(3):
        a, b, _ = fastddpm.sample_progressive(fixed[k], 1, frames=4, first_index=k, **plain)
        assert torch.equal(samples[k], a[0])
        assert torch.equal(x0[:, k], b[:, 0])
    a, b = images(2, *SHAPE)
    mixed = fastddpm.interpolate(labelled, a, b, n=3, t=(2, 7), **told)
    rows = fastddpm.sample_shared_latent(labelled, 3, t=(4, T), **told)
    # The latent that is shared lies on the way to the first sample, of the first image's class.
    recorder = {}
    fastddpm.sample(
        lambda x, t: (recorder.update({int(t[0]): x.clone()}), fixed[0](x, t))[1], 1, **plain
    )
    for k in range(3):
        assert torch.equal(
            mixed[:, k], fastddpm.interpolate(fixed[k], a, b, n=3, t=(2, 7), **plain)[:, k]
        )
        for row, t in zip(rows, (4, T), strict=True):
            rest = {"start": t, "x_T": recorder[t - 1], "first_index": k}
            assert torch.equal(row[k], draw(1, fixed[k], **rest)[0])


def test_a_progressive_set_may_begin_anywhere():
    recorder = Recorder()
    whole = draw(model=recorder, seed=3, batch_size=5)
    options = {"shape": SHAPE, "diffusion": DIFFUSION, "progress": False, "seed": 3}
    samples, x0, times = fastddpm.sample_progressive(
        wave, frames=3, start=7, x_T=recorder.seen[6], **options
    )
    assert torch.equal(samples, whole)
    assert times == [6, 3, 0]
    for frame, t in zip(x0, times, strict=True):
        step = torch.full((5,), t)
        expected = DIFFUSION.predict_x0(recorder.seen[t], wave(recorder.seen[t], step), step)
        assert torch.equal(frame, expected)


def test_a_unets_classes():
    model = tiny_unet(num_classes=4)
    options = {"progress": False, "precision": "fp32", "engine": "eager"}
    y = torch.tensor([0, 3, 1])
    got = fastddpm.sample(model, 3, model_kwargs={"y": y}, batch_size=2, **options)
    for k in range(3):
        one = fastddpm.sample(model, 1, first_index=k, model_kwargs={"y": y[k : k + 1]}, **options)
        torch.testing.assert_close(got[k], one[0], atol=1e-4, rtol=0)
    for given, message in (
        ({}, "the model has 4 classes: it needs y"),
        ({"y": y[:2]}, r"needs y, \(3,\) int64 in 0 \.\. 3; got shape \(2,\)"),
        ({"y": y.float()}, "got shape .* torch.float32"),
        ({"y": torch.tensor([0, 4, 1])}, "y"),
        ({"y": y, "z": 1}, "can't be called as .*'z'"),
    ):
        with pytest.raises(ValueError, match=message):
            fastddpm.sample(model, 3, model_kwargs=given, batch_size=1, **options)
    with pytest.raises(ValueError, match="has no classes"):
        fastddpm.sample(tiny_unet(), 3, model_kwargs={"y": y}, **options)


# ---- who looks on --------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["cpu_plan", "eager"])
def test_on_step_sees_every_step_of_every_batch(engine):
    model = tiny_unet()
    seen = []

    def on_step(i, x, x0):
        seen.append((i, x, x0()))
        x.clone().fill_(0)
        x.zero_()  # its own copy

    options = {"progress": False, "precision": "fp32", "engine": engine, "steps": 5, "seed": 6}
    got = fastddpm.sample(model, 3, batch_size=2, on_step=on_step, **options)
    assert torch.equal(got, fastddpm.sample(model, 3, batch_size=2, **options))
    assert [i for i, _, _ in seen] == [4, 3, 2, 1, 0] * 2
    assert [len(x) for _, x, _ in seen] == [2] * 5 + [1] * 5
    seen.clear()
    results = fastddpm.sample(
        model, 2, on_step=lambda i, x, x0: seen.append((i, x, x0())), **options
    )
    assert torch.equal(seen[-1][1], results)
    torch.testing.assert_close(seen[-1][2], results, atol=1e-5, rtol=0)  # the last mean is x0
    _, x0, _ = fastddpm.sample_progressive(model, 2, frames=5, **options)
    for (_, _, mine), frame in zip(seen, x0, strict=True):
        assert torch.equal(mine, frame)


@pytest.mark.parametrize("engine", ["cpu_plan", "eager"])
def test_on_step_may_end_the_call_and_nothing_else(engine, capsys):
    model = tiny_unet(dropout=0.5).train()
    options = {"precision": "fp32", "engine": engine, "seed": 1}
    expected = fastddpm.sample(model, 2, progress=False, **options)

    class Enough(Exception):
        pass

    def on_step(i, x, x0):
        if i == 4:
            raise Enough("that is enough")

    for _ in range(2):
        with pytest.raises(Enough, match="enough"):
            fastddpm.sample(model, 2, on_step=on_step, progress=True, **options)
    assert model.training
    assert all(m.training for m in model.modules())
    assert torch.is_grad_enabled()
    assert torch.equal(fastddpm.sample(model, 2, progress=False, **options), expected)
    assert f"{T - 4}/{T}" in capsys.readouterr().err


# ---- mistakes ------------------------------------------------------------------------------------

NOISE = torch.randn(5, *SHAPE, generator=generator())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x_T": NOISE[:4]}, r"x_T must be .*\(5, 2, 3, 5\) here; got \(4, 2, 3, 5\)"),
        ({"x_T": NOISE[:, :1]}, "x_T must be"),
        ({"x_T": NOISE[0]}, "x_T must be"),
        ({"x_T": NOISE.numpy()}, "x_T must be a tensor .*; got ndarray"),
        ({"x_T": NOISE.long()}, "x_T must be one of torch.float32.*; got torch.int64"),
        ({"x_T": NOISE.to(torch.uint8)}, "x_T must be one of"),
        ({"x_T": NOISE + 0j}, "x_T must be one of .* got torch.complex64"),
        ({"x_T": NOISE / 0}, "x_T must be finite"),
        ({"x_T": NOISE.to("meta")}, "x_T must be a dense tensor"),
        ({"x_T": NOISE.to_sparse()}, "x_T must be a dense tensor"),
        ({"x_T": 3}, "x_T must be a tensor"),
        ({"x_T": NOISE, "init": NOISE.tanh(), "start": 3}, "x_T and init both say"),
        ({"init": NOISE.tanh()}, "init needs start"),
        ({"init": NOISE.tanh()[:1], "start": 3}, "init must be"),
        ({"init": NOISE, "start": 3}, r"init must be uint8, or float in \[-1, 1\]; got floats"),
        ({"init": NOISE.int(), "start": 3}, r"init must be uint8, .* got torch.int32"),
        ({"init": NOISE / 0, "start": 3}, "init must be"),
        ({"init": "A.png", "start": 3}, "init must be a tensor"),
        ({"start": 3}, "start = 3 of 12 steps begins at an x_t"),
        *(({"x_T": NOISE, "start": start}, r"start must be an integer in 1 \.\. 12; got")
          for start in (0, T + 1, -1, 2.0, True, "3")),
        ({"x_T": NOISE, "start": 6, "steps": 5}, r"start must be an integer in 1 \.\. 5; got 6"),
        ({"model_kwargs": [("y", 1)]}, "model_kwargs must be a dict"),
        ({"model_kwargs": {1: 2}}, "model_kwargs must be a dict"),
        ({"model_kwargs": {"z": 1}}, r"can't be called as model\(x, t, z=\.\.\.\): got an unexp"),
        ({"model": labelled}, r"model\(x, t\): missing a required argument: 'y'.*model_kwargs"),
        ({"model": labelled, "model_kwargs": {"y": np.arange(5)}}, r"\['y'\] is an array of 5"),
        ({"spacing": "karras", "steps": 3}, "spacing must be one of 'strided'"),
        ({"on_step": 3}, "on_step must be a function"),
        ({"denoised_fn": 0.5}, "denoised_fn must be a function"),
        ({"cond_fn": NOISE}, "cond_fn must be a function"),
        ({"self_condition": 1}, "self_condition must be True or False"),
        ({"self_condition": True}, r"called as model\(x, t, x0\): too many positional"),
        ({"generator": 3}, "generator must be a torch.Generator, .*; got int"),
        ({"generator": np.random.default_rng(0)}, "generator must be a torch.Generator"),
        ({"generator": [generator(k) for k in range(4)]}, "a list of 5.*; got a list of 4"),
        ({"generator": [generator()] * 5}, "must hold a different one for each image"),
        ({"generator": [generator(), 3, 4, 5, 6]}, "got int in a list"),
        ({"generator": []}, "got a list of 0"),
        ({"generator": generator(), "seed": 3}, "generator and seed both say .* seed = 3"),
        ({"generator": generator(), "first_index": 2}, "generator and first_index both"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_any_work(options, message):
    def model(x, t):
        raise AssertionError("the model ran")

    with pytest.raises(ValueError, match=message):
        draw(**{"model": model, **options})


def test_an_argument_of_a_batchs_length_is_not_taken_for_all():
    y = torch.arange(2)
    with pytest.raises(ValueError, match=r"'y'\] has the length 2 of a batch, .* all 4 images"):
        draw(4, labelled, model_kwargs={"y": y}, batch_size=2)
    torch.testing.assert_close(
        draw(2, labelled, model_kwargs={"y": y}), draw(2, lambda x, t: labelled(x, t, y))
    )


def test_a_network_and_its_self_condition_have_to_agree():
    class Network(torch.nn.Module):
        def __init__(self, self_condition):
            super().__init__()
            self.self_condition = self_condition

        def forward(self, x, t, x_self_cond=None):
            return wave(x if x_self_cond is None else x + x_self_cond, t)

    for own, asked in itertools.product((True, False), repeat=2):
        if own == asked:
            assert draw(model=Network(own), self_condition=asked).shape == (5, *SHAPE)
        else:
            with pytest.raises(ValueError, match=f"the model's self_condition is {own}: pass"):
                draw(model=Network(own), self_condition=asked)
    with pytest.raises(ValueError, match=r"a fastddpm\.UNet sees no x0"):
        fastddpm.sample(tiny_unet(), 1, self_condition=True, progress=False)


@pytest.mark.parametrize(
    ("function", "arguments", "refused"),
    [
        ("sample_progressive", (), ("batch_size", "distributed")),
        ("sample_shared_latent", (),
         ("x_T", "init", "start", "generator", "on_step", "self_condition", "batch_size")),
        ("interpolate", (torch.zeros(SHAPE), torch.zeros(SHAPE)),
         ("x_T", "init", "start", "generator", "on_step", "batch_size", "distributed")),
    ],
)  # fmt: skip
def test_what_a_way_of_sampling_has_no_use_for_is_refused(function, arguments, refused):
    options = {"shape": SHAPE, "diffusion": DIFFUSION, "progress": False}
    for name in refused:
        with pytest.raises(ValueError, match=f"{function} takes no {name}: fastddpm.sample does"):
            getattr(fastddpm, function)(wave, *arguments, **{name: NOISE}, **options)
        with pytest.raises(TypeError, match="n_steps"):
            getattr(fastddpm, function)(wave, *arguments, n_steps=3, **options)


def test_what_ranks_have_in_common_tells_sets_apart():
    def facts(**each):
        return Given(5, 0, SHAPE, T, torch.device("cpu"), **each).facts()

    same = [facts(x_T=NOISE), facts(x_T=NOISE.clone())]
    assert same[0] == same[1]
    every = [
        facts(), *same[:1], facts(x_T=NOISE + 1), facts(x_T=NOISE, start=3),
        facts(init=NOISE.tanh(), start=3), facts(init=-NOISE.tanh(), start=3),
        facts(model_kwargs={"y": torch.arange(5)}), facts(model_kwargs={"y": torch.ones(5)}),
        facts(model_kwargs={"z": torch.arange(5)}), facts(model_kwargs={"y": 3}),
        facts(model_kwargs={"y": 4}), facts(generator=generator(1)), facts(generator=generator(2)),
        facts(generator=[generator(k) for k in range(5)]),
    ]  # fmt: skip
    every += [
        facts(model_kwargs={"y": {"a": torch.arange(5)}}),
        facts(model_kwargs={"y": {"a": torch.ones(5)}}), facts(model_kwargs={"y": [1, 2]}),
        facts(model_kwargs={"y": [1, 3]}),
    ]  # fmt: skip
    assert len({str(one) for one in every}) == len(every)
    assert all(one.keys() == every[0].keys() for one in every)
