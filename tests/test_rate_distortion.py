"""Rate and distortion of a bound: Table 4's numbers, what they add up to, and the plots."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from toy import SCHEDULE, images, tiny_unet

from fastddpm import Diffusion, ops, reference
from fastddpm.evaluation.bound import Bound, bound
from fastddpm.evaluation.plots import PLOTS, rate_distortion_plots
from fastddpm.evaluation.rate_distortion import rate_distortion

TABLE_4 = {  # of the paper: reverse process time, rate, distortion
    1000: (1.77581, 0.95136), 900: (0.11994, 12.02277), 800: (0.05415, 18.47482),
    700: (0.02866, 24.43656), 600: (0.01507, 30.80948), 500: (0.00716, 38.03236),
    400: (0.00282, 46.12765), 300: (0.00081, 54.18826), 200: (0.00013, 60.97170),
    100: (0.00000, 67.60125),
}  # fmt: skip


def made(terms, mse, prior: float = 0.0, **options) -> Bound:
    terms, mse = np.asarray(terms, np.float64), np.asarray(mse, np.float64)
    total = np.full(2, prior + terms.sum())
    given = {"n": 2, "T": len(terms), "total": total, "prior": prior, "terms": terms, "mse": mse}
    return Bound(**{**given, "dims": 64, "sampled": None, **options})


def papers() -> Bound:
    """A chain of 1000 steps with the rates and distortions of Table 4."""
    times = sorted(TABLE_4)
    rates, rmse = (np.array([TABLE_4[time][k] for time in times]) for k in (0, 1))
    received = np.interp(np.arange(1, 1001), [0, *times], [0, *rates])
    terms = np.empty(1000)  # at time r the terms down to t + 1 = T - r + 1 are there
    terms[:0:-1] = np.diff(received)
    terms[0] = 1.97
    mse = (np.interp(np.arange(1, 1001), times, rmse)[::-1] / 127.5) ** 2
    return made(terms, mse, prior=received[0])


def test_table_4_is_printed_as_in_the_paper():
    curve = rate_distortion(papers())
    rows = curve.rows()
    assert [row[0] for row in rows] == list(TABLE_4)
    for time, rate, distortion in rows:
        assert (rate, distortion) == pytest.approx(TABLE_4[time], abs=1e-9)
    lines = curve.table().splitlines()[2:]
    assert [line.split() for line in lines] == [
        [str(time), f"{rate:.5f}", f"{rmse:.5f}"] for time, (rate, rmse) in TABLE_4.items()
    ]
    assert curve.lossless == pytest.approx(1.77581 + 1.97)


def test_the_rate_is_the_cumulative_sum_of_what_was_sent():
    rng = np.random.default_rng(0)
    terms, mse = rng.random(12), rng.random(12)
    curve = rate_distortion(made(terms, mse, prior=0.25))
    for time in range(1, 13):
        t = 12 - time  # the receiver has x_t
        assert curve.rate[time - 1] == pytest.approx(0.25 + terms[t + 1 :].sum(), rel=1e-12)
        assert curve.distortion[time - 1] == pytest.approx(127.5 * mse[t] ** 0.5, rel=1e-12)
    assert curve.time.tolist() == list(range(1, 13))
    assert curve.decoder == terms[0]
    assert curve.lossless == pytest.approx(0.25 + terms.sum(), rel=1e-12)
    assert np.all(np.diff(curve.rate) >= 0)


@pytest.mark.parametrize("steps", [None, 5])
def test_of_a_model_rates_add_up_to_the_bound_and_distortions_are_its_own(steps):
    """x_t of the noise that the bound takes, and the model's x0 there, by the formulas."""
    model, x = tiny_unet(), images(3, 1, 8, 8)
    found = bound(model, x, seed=5, steps=steps, progress=False)
    curve = rate_distortion(found)
    assert curve.lossless == pytest.approx(found.total.mean(), rel=1e-6)
    chain = Diffusion(SCHEDULE).respace(steps)
    table = chain.schedule.table("fixed_large")
    for time in (1, chain.T // 2, chain.T):
        t = torch.full((3,), chain.T - time)
        own = int(chain.model_t(t)[0])
        eps = ops.randn(tuple(x.shape), seed=5, step=own)
        xt, _ = reference.noise(x, t, table, eps=eps)
        with torch.no_grad():
            output = model(xt, torch.full((3,), own))
        x0 = reference.predict_x0(xt, output, t, table, prediction="eps", clip=True)
        error = (x0.double() - reference.to_unit(x).double()) * 127.5
        rmse = error.square().mean().sqrt().item()
        assert curve.distortion[time - 1] == pytest.approx(rmse, rel=1e-4)


def test_a_short_chain_has_as_many_rows_as_steps():
    curve = rate_distortion(made([1.0, 2, 3], [0.1, 0.2, 0.3]))
    assert [row[0] for row in curve.rows()] == [3, 2, 1]
    assert [row[0] for row in rate_distortion(made(np.ones(50), np.ones(50))).rows()] == [
        50, 45, 40, 35, 30, 25, 20, 15, 10, 5,
    ]  # fmt: skip


def test_numbers_of_another_chain_are_refused():
    some = made([1.0, 2, 3], [0.1, 0.2, 0.3], sampled=2)
    with pytest.raises(ValueError, match="of 2 of 3 terms there is no distortion at every step"):
        rate_distortion(some)
    with pytest.raises(ValueError, match=r"\(T,\) = \(4,\); got \(3,\), \(3,\)"):
        rate_distortion(made([1.0, 2, 3], [0.1, 0.2, 0.3], T=4))


def test_three_plots_appear_whole(tmp_path):
    curve = rate_distortion(papers())
    other = rate_distortion(made(np.full(50, 0.1), np.linspace(0, 0.3, 50)))
    rate_distortion_plots(tmp_path, {"test": curve})
    before = {name: (tmp_path / name).read_bytes() for name in PLOTS}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(PLOTS)
    for name in PLOTS:
        with Image.open(tmp_path / name) as picture:
            picture.load()
            assert picture.size == (720, 540)
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20
    assert len(set(before.values())) == 3
    rate_distortion_plots(tmp_path, {"test": curve, "train": other})
    assert all((tmp_path / name).read_bytes() != before[name] for name in PLOTS)
