"""The bound of a data set: the same however it is cut and gone on with; terms=K; refusals."""

from __future__ import annotations

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from openai_plain import Plain
from toy import SCHEDULE, images, tiny_unet, wave

import fastddpm
from fastddpm import Diffusion, Schedule, ops
from fastddpm.data.arrays import ArrayDataset
from fastddpm.evaluation import bits
from fastddpm.evaluation import bound as bound_module
from fastddpm.evaluation.bound import PIECE, Bound, bound
from fastddpm.evaluation.strata import Strata, pilot_terms

CHAIN = Schedule.linear(40, 0.001, 0.3)
X0 = images(2 * PIECE + 5, 1, 8, 8)


def unet(**options):
    return tiny_unet(diffusion=Diffusion(CHAIN), **options)


def found(model=None, x0=X0, **options) -> Bound:
    return bound(model or unet(), x0, **{"progress": False, **options})


def same(a: Bound, b: Bound) -> bool:
    """To the bit, as the plan of a CPU is for every batch."""
    return a.to_json() == b.to_json()


def test_it_is_the_mean_of_bits_per_dim():
    model = unet()
    whole, each = found(model), fastddpm.bits_per_dim(model, X0, progress=False)
    assert (whole.n, whole.T, whole.dims, whole.sampled) == (len(X0), 40, 64, None)
    np.testing.assert_array_equal(whole.total, each.total.double().numpy())
    for name in ("terms", "mse"):
        expected = getattr(each, name).double().mean(0).numpy()
        np.testing.assert_allclose(getattr(whole, name), expected, rtol=1e-12)
    assert whole.prior == pytest.approx(each.prior.double().mean().item(), rel=1e-12)
    assert whole.mean == pytest.approx(whole.prior + whole.terms.sum(), rel=1e-6)
    deviation = each.total.double().std().item()
    assert whole.stderr == pytest.approx(deviation / len(X0) ** 0.5, rel=1e-9)
    assert same(Bound.from_json(json.loads(json.dumps(whole.to_json()))), whole)


def test_batches_data_sets_and_folders_change_no_bit(tmp_path):
    model, whole = unet(), found()
    data = ArrayDataset(tmp_path / "x", "npy", X0.numpy())
    assert same(found(model, data, batch_size=7), whole)
    assert same(found(model, batch_size=200, folder=tmp_path / "a"), whole)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["00000000-00000037.npz"]


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Killed after the first of its files, with one damaged and one half-written: only what is
    missing is found again, to the same bits."""
    model, whole, asked = unet(), found(), []
    run = bits.Likelihood.of

    def counted(self, x0, index, *rest):
        if len(asked) == 1 and not monkeypatched:
            raise KeyboardInterrupt
        asked.append(index.tolist())
        return run(self, x0, index, *rest)

    monkeypatched = []
    monkeypatch.setattr(bits.Likelihood, "of", counted)
    with pytest.raises(KeyboardInterrupt):
        found(model, batch_size=PIECE, folder=tmp_path)
    monkeypatched.append(True)
    assert [p.name for p in tmp_path.glob("*.npz")] == [f"00000000-{PIECE:08d}.npz"]
    (tmp_path / f"{PIECE:08d}-{2 * PIECE:08d}.npz").write_bytes(b"half of a fi")
    (tmp_path / ".00000000-00000016.npz.abcdefgh").write_bytes(b"left by a process that was killed")
    assert same(found(model, batch_size=PIECE, folder=tmp_path), whole)
    assert asked == [list(range(PIECE)), list(range(PIECE, 2 * PIECE)), list(range(2 * PIECE, 37))]
    assert not list(tmp_path.glob(".0*"))
    assert same(found(model, batch_size=5, folder=tmp_path), whole), "all is there"
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"seed": 1}, "seed is 0 and here 1"),
        ({"model": unet(seed=1)}, "model is"),
        ({"x0": images(2 * PIECE + 5, 1, 8, 8, seed=3)}, "data is"),
        ({"x0": X0[:20]}, "images is 37 and here 20"),
        ({"steps": 20}, "chain is 40 and here 20"),
        ({"clip": False}, "clip is True and here False"),
        ({"terms": 9}, "terms is None and here 9"),
        ({"precision": "bf16"}, "precision is 'fp32' and here 'bf16'"),
    ],
)
def test_a_folder_of_another_bound_is_refused_and_left_as_it_is(tmp_path, options, what):
    found(folder=tmp_path, x0=X0)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"is of another bound: its {what}"):
        found(**{"x0": X0, **options}, folder=tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x0": images(4, 3, 8, 8)}, "images are 3x8x8, the model's 1x8x8"),
        ({"x0": images(4, 1, 16, 16)}, "images are 1x16x16, the model's 1x8x8"),
        ({"x0": X0.float()}, "images must be .* uint8"),
        ({"x0": X0[:0]}, "images: none"),
        ({"x0": [X0[0]]}, "images must be a fastddpm.data.Dataset"),
        ({"terms": 2}, "terms must be .*at least 3"),
        ({"terms": 41}, r"terms must be in 3 \.\. 40"),
        ({"terms": 4.5}, "terms must be an integer"),
        ({"terms": 3, "steps": 2}, "terms needs a chain of 3 steps or more; got 3 of 2"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"engine": "gpu"}, "engine must be one of"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"folder": ""}, "output '': give a name"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        found(**options)


def test_only_a_unet_has_a_fingerprint(tmp_path):
    options = {"diffusion": Diffusion(SCHEDULE), "folder": tmp_path / "new"}
    with pytest.raises(ValueError, match=r"fastddpm.UNet; got function; folder=None keeps nothing"):
        found(wave, images(3, 2, 3, 4), **options)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="file is no folder"):
        found(folder=tmp_path / "file")


def test_from_json_refuses_what_is_no_bound():
    content = found(x0=X0[:3]).to_json()
    for change in ({"n": 4}, {"terms": [1.0]}, {"total": "x"}, {"mse": None}):
        with pytest.raises(ValueError, match="this is no bound"):
            Bound.from_json({**content, **change})
    assert math.isnan(found(x0=X0[:1]).stderr)


# ---- NaN -----------------------------------------------------------------------------------------


def test_nan_names_the_image_and_the_step():
    """The sample's own number and the model's own t, on any engine."""

    def model(x, t):
        output = wave(x, t)
        output[1] = torch.where(t[1] == 7, math.nan, output[1])
        return output

    options = {"diffusion": Diffusion(SCHEDULE), "steps": 4, "progress": False}
    with pytest.raises(FloatingPointError, match="image 101 is not finite at step t = 7"):
        fastddpm.bits_per_dim(model, images(3, 2, 3, 4), first_index=100, **options)


def test_a_plans_layer_is_named_with_the_image(monkeypatch):
    model, draw = unet(), ops.noise

    def noise(x0, t, *rest, **options):
        xt, eps = draw(x0, t, *rest, **options)
        if int(t[0]) == 3:
            xt[2] = math.nan
        return xt, eps

    monkeypatch.setattr(ops, "noise", noise)
    with pytest.raises(
        FloatingPointError, match=r"image 2: not a number .*t = 3, first in conv_in"
    ):
        fastddpm.bits_per_dim(model, X0[:4], engine="cpu_plan", progress=False)


def test_weights_that_are_not_finite_are_named():
    model = unet()
    with torch.no_grad():
        model.conv_in.bias[0] = math.inf
    with pytest.raises(FloatingPointError, match=r"conv_in\.bias holds a NaN or an inf"):
        fastddpm.bits_per_dim(model, X0[:2], progress=False)


# ---- the engines, and others' loops --------------------------------------------------------------


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "learned", "learned_range"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "mean", "v"])
def test_the_engines_agree(prediction, variance):
    """All of Table 2, on a respaced chain too."""
    loss = "vlb" if variance.startswith("learned") else "simple"
    model = tiny_unet(diffusion=Diffusion(CHAIN, prediction, variance, loss))
    for steps in (None, 7):
        plan, eager = (
            fastddpm.bits_per_dim(model, X0[:3], steps=steps, engine=engine, progress=False)
            for engine in ("cpu_plan", "eager")
        )
        for name in ("terms", "mse", "total"):
            a, b = getattr(plan, name), getattr(eager, name)
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "learned_range"])
def test_guided_diffusions_loop_on_the_same_noise(variance, monkeypatch):
    """Their formulas and their loop in plain torch; of the decoder's distribution the exact one,
    which theirs approximates."""
    learned = variance == "learned_range"
    process = Diffusion(CHAIN, "eps", variance, "vlb" if learned else "simple")
    plain = Plain(CHAIN.betas, "EPSILON", variance.upper(), "KL", cdf=torch.special.ndtr)

    def model(x, t):
        out = wave(x, t) * 0.3
        return torch.cat((out, out.cos()), dim=1) if learned else out

    x0 = images(3, 2, 5, 4)
    draws = iter([ops.randn(x0.shape, seed=4, step=t) for t in reversed(range(CHAIN.T))])
    monkeypatch.setattr(torch, "randn_like", lambda *_, **__: next(draws).to(torch.float64))
    expected = plain.bpd(model, (x0.double() / 127.5 - 1))
    got = fastddpm.bits_per_dim(model, x0, diffusion=process, seed=4, progress=False)
    torch.testing.assert_close(
        got.terms.double(), expected["vb"].flip(1).double(), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(got.total.double(), expected["total_bpd"], rtol=1e-5, atol=1e-5)


# ---- terms=K -------------------------------------------------------------------------------------


def test_a_sampled_bound_scatters_about_the_whole_by_its_error_bar():
    """Over many draws of the steps, with the noise of x_t as it is: unbiased, and as far off as it
    says, on the safe side."""
    model, x0 = unet(), images(600, 1, 8, 8, seed=2)
    whole = fastddpm.bits_per_dim(model, x0, progress=False)
    some = fastddpm.bits_per_dim(model, x0, terms=10, progress=False)
    off = (some.total - whole.total).double().numpy()
    assert abs(off.mean()) < 4 * off.std() / len(off) ** 0.5
    assert off.std() > 0.01
    said = some.error.double().square().mean().sqrt().item()
    assert off.std() < 1.1 * said
    assert said < 3 * off.std()
    torch.testing.assert_close(some.total, some.prior + some.terms.sum(1))
    assert torch.equal(some.terms[:, 0], whole.terms[:, 0])
    for a, b in ((some.terms, whole.terms), (some.mse, whole.mse)):
        apart, spread = (a - b).double().mean(0), a.double().std(0) / len(x0) ** 0.5
        assert (apart.abs() <= 5 * spread + 1e-6).all()


def test_sampled_terms_are_a_function_of_seed_and_index(tmp_path):
    model = unet()
    some = found(model, terms=9, folder=tmp_path, batch_size=PIECE)
    assert some.sampled == 9
    assert same(found(model, terms=9, batch_size=5), some)
    (tmp_path / f"{PIECE:08d}-{2 * PIECE:08d}.npz").unlink()
    assert same(found(model, terms=9, folder=tmp_path), some)
    assert not same(found(model, terms=9, seed=1), some)
    assert found(model).mean == pytest.approx(
        some.mean, abs=5 * (some.stderr + found(model).stderr)
    )
    pilot = json.loads((tmp_path / "pilot.json").read_text(encoding="utf-8"))
    assert len(pilot["weights"]) == 40
    (tmp_path / "pilot.json").write_text("{", encoding="utf-8")
    assert same(found(model, terms=9, folder=tmp_path), some)


def test_all_terms_by_strata_are_all_terms():
    model = unet()
    a = fastddpm.bits_per_dim(model, X0[:3], terms=40, progress=False)
    b = fastddpm.bits_per_dim(model, X0[:3], progress=False)
    torch.testing.assert_close(a.total, b.total)
    assert torch.equal(a.terms, b.terms)
    assert (a.error == 0).all()


@pytest.mark.parametrize("K", [3, 4, 17, 60])
@pytest.mark.parametrize("T", [61, 1000])
def test_the_expectation_over_strata_is_the_sum(K, T):
    """By the strata's own lengths: each step's expected count over its weight is 1."""
    weights = np.exp(-np.arange(T) / 20) + 1e-4
    strata = Strata.of(weights, K)
    assert strata.certain[0] == 0
    assert len(strata.certain) + strata.draws == K
    assert strata.draws >= 2
    index = torch.arange(20000)
    steps = strata.drawn(3, index)
    counts = torch.bincount(steps.flatten(), minlength=T).double().numpy() / len(index)
    expected = np.zeros(T)
    expected[strata.others] = strata.draws * strata.p
    assert np.all(np.abs(counts - expected) < 6 * np.sqrt(expected / len(index)) + 1e-9)
    assert expected.max() <= 1 or len(strata.certain) == K - 2
    assert torch.equal(steps[7:9], strata.drawn(3, index[7:9]))
    assert not set(strata.certain.tolist()) & set(steps.flatten().tolist())
    ones = torch.ones(len(index), strata.draws)
    assert strata.expanded(ones, steps).mean() == pytest.approx(len(strata.others), rel=0.05)


def test_a_pilot_sees_both_ends():
    for T in (3, 40, 1000, 4000):
        grid = pilot_terms(T)
        assert grid[0] == 0
        assert grid[-1] == T - 1
        assert len(grid) <= 32
        assert (np.diff(grid) > 0).all()


def test_a_model_with_classes_takes_its_terms_one_by_one():
    model = unet(num_classes=5)
    y = torch.arange(20) % 5
    options = {"model_kwargs": {"y": y}, "progress": False, "terms": 8}
    plan = fastddpm.bits_per_dim(model, X0[:20], engine="cpu_plan", batch_size=6, **options)
    eager = fastddpm.bits_per_dim(model, X0[:20], engine="eager", **options)
    torch.testing.assert_close(plan.total, eager.total, rtol=1e-4, atol=1e-4)


def test_the_folders_lock(tmp_path):
    with bound_module.locked(tmp_path, "bound"), pytest.raises(BlockingIOError, match="in use by"):
        found(folder=tmp_path)
    assert os.listdir(tmp_path) == []
    shutil.rmtree(tmp_path)
