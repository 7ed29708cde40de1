"""The term of the bound: every backend against float64 evaluation of the paper's formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from compare import (
    DTYPES,
    LAYOUTS,
    assert_same_for_any_thread_count,
    in_layout,
    require,
    timesteps,
)
from scipy.special import log_ndtr
from torch.library import opcheck

from fastddpm import Diffusion, Schedule, ops
from fastddpm.schedule import COLUMNS

SCHEDULE = Schedule.linear()
PREDICTIONS = ("eps", "x0", "mean", "v")
VARIANCES = ("fixed_large", "fixed_small", "learned", "learned_range")
BAR = 1e-5


def tables(variance="fixed_large", device="cpu"):
    ratio = torch.from_numpy(SCHEDULE.log_variance_ratio(variance)).float()
    return SCHEDULE.table(variance, device=device), ratio.to(device)


def case(shape, prediction="eps", variance="fixed_large", dtype=torch.float32, bytes_too=True):
    """(x0, xt, output, t, log_variance) of a model that is nearly right, as a trained one is."""
    n = shape[0]
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    pixels.view(-1)[:2] = torch.tensor([0, 255], dtype=torch.uint8)[: pixels.numel()]
    t = timesteps(n)
    if n > 2:
        t[1] = 1
    x0 = pixels if bytes_too else (pixels.float() / 127.5 - 1).to(dtype)
    unit, eps = pixels.float() / 127.5 - 1, torch.randn(shape)
    c = dict(zip(COLUMNS, SCHEDULE.table()[t][:, :, None, None, None].unbind(1), strict=True))
    xt = c["sqrt_ab"] * unit + c["sqrt_1m_ab"] * eps
    wrong = 0.1 * torch.randn(shape)
    output = {
        "eps": eps + wrong,
        "x0": unit + wrong,
        "v": c["sqrt_ab"] * eps - c["sqrt_1m_ab"] * unit + wrong,
        "mean": c["mean_x0"] * (unit + wrong) + c["mean_xt"] * xt,
    }[prediction]
    word = None
    if variance == "learned":
        lower = torch.from_numpy(SCHEDULE.posterior_log_variance).float()
        word = lower[t][:, None, None, None] + 0.3 * torch.randn(shape)
    elif variance == "learned_range":
        word = torch.randn(shape)
    return x0, xt.to(dtype), output.to(dtype), t, None if word is None else word.to(dtype)


def by_numpy(x0, xt, output, t, word, prediction, variance, clip):
    """Eq. 5 and 13 in float64, of the schedule's own float64 numbers: the KL of two Gaussians, not
    rearranged, and the mass of a bin by scipy."""
    columns = {k: v[t.numpy()][:, None, None, None] for k, v in SCHEDULE.columns(variance).items()}
    lower, way = (v[t.numpy()][:, None, None, None] for v in SCHEDULE.log_variance_bounds())
    x = x0.numpy() / 127.5 - 1 if x0.dtype == torch.uint8 else x0.double().numpy()
    xt, out = xt.double().numpy(), output.double().numpy()
    root, rest = columns["sqrt_ab"], columns["sqrt_1m_ab"]
    a, b = columns["mean_x0"], columns["mean_xt"]
    predicted = {
        "eps": (xt - rest * out) / root,
        "x0": out,
        "v": root * xt - rest * out,
        "mean": (out - b * xt) / a,
    }[prediction]
    clipped = predicted.clip(-1, 1) if clip else predicted
    mean = out if prediction == "mean" else a * clipped + b * xt
    log_sigma2 = columns["log_variance"]
    if variance == "learned":
        log_sigma2 = word.double().numpy()
    elif variance == "learned_range":
        log_sigma2 = lower + (word.double().numpy() + 1) / 2 * way
    true_mean = a * x + b * xt
    kl = 0.5 * (log_sigma2 - lower + np.exp(lower - log_sigma2) - 1)
    kl = kl + 0.5 * (true_mean - mean) ** 2 * np.exp(-log_sigma2)
    sigma = np.exp(0.5 * log_sigma2)
    above, below = (x + 1 / 255 - mean) / sigma, (x - 1 / 255 - mean) / sigma
    above = np.where(x > 0.999, np.inf, above)
    below = np.where(x < -0.999, -np.inf, below)
    flip = below > 0  # the tail that has digits
    hi, lo = np.where(flip, -below, above), np.where(flip, -above, below)
    nll = -(log_ndtr(hi) + np.log1p(-np.exp(log_ndtr(lo) - log_ndtr(hi))))
    first = (t.numpy() == 0)[:, None, None, None]
    nats = np.where(first, nll, kl).mean((1, 2, 3))
    return nats / math.log(2), ((clipped - x) ** 2).mean((1, 2, 3))


def run(x0, xt, output, t, word, prediction, variance, clip, device="cpu"):
    table, ratio = tables(variance, device)
    on = [None if x is None else x.to(device) for x in (x0, xt, output, t, word)]
    return ops.vlb_term(
        *on[:4], table, ratio, clip=clip, prediction=prediction, log_variance=on[4],
        learned_range=variance == "learned_range",
    )  # fmt: skip


def close(got, expected, prediction="eps"):
    """Relative, next to where a term of the last steps is all but 0. An x0 that is solved from a
    mean in those takes the table's float32 coefficients a thousandfold."""
    for a, b, least in zip(
        got, expected, (1e-10, 1e-6 if prediction == "mean" else 0), strict=True
    ):
        assert a.dtype == torch.float32
        np.testing.assert_allclose(a.cpu().double().numpy(), b, rtol=BAR, atol=least)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_term_by_term_against_float64(backend, device, prediction, variance, clip):
    given = case((4, 3, 6, 5), prediction, variance)
    got = run(*given, prediction, variance, clip, device)
    close(got, by_numpy(*given, prediction, variance, clip), prediction)


@pytest.mark.parametrize("t", range(0, 1000, 111))
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_part_of_the_chain(prediction, t):
    x0, xt, output, _, word = case((1, 3, 32, 32), prediction, "learned")
    del xt, output, word
    c = {k: float(v[t]) for k, v in SCHEDULE.columns().items()}
    unit, eps = x0.double() / 127.5 - 1, torch.randn(x0.shape, dtype=torch.float64)
    xt = (c["sqrt_ab"] * unit + c["sqrt_1m_ab"] * eps).float()
    wrong = 0.05 * torch.randn(x0.shape, dtype=torch.float64)
    output = {
        "eps": eps + wrong,
        "x0": unit + wrong,
        "v": c["sqrt_ab"] * eps - c["sqrt_1m_ab"] * unit + wrong,
        "mean": c["mean_x0"] * (unit + wrong) + c["mean_xt"] * xt.double(),
    }[prediction].float()
    step = torch.tensor([t])
    given = (x0, xt, output, step, None)
    close(
        run(*given, prediction, "fixed_large", True),
        by_numpy(*given, prediction, "fixed_large", True),
        prediction,
    )


@pytest.mark.matrix("forward")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_and_storage(backend, device, dtype, layout):
    """The layout changes no bit of a sum; what is stored in 16 bits is exact from there on."""
    for bytes_too in (True, False):
        x0, xt, output, t, word = case((3, 3, 5, 7), "v", "learned", dtype, bytes_too)
        moved = [in_layout(x, layout) for x in (x0, xt, output, word)]
        got = run(*moved[:3], t, moved[3], "v", "learned", True, device)
        if bytes_too:
            close(got, by_numpy(x0, xt, output, t, word, "v", "learned", True))
        plain = run(x0, xt, output, t, word, "v", "learned", True, device)
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 1, 1, 1), (1, 3, 64, 64), (2, 5, 1, 3), (3, 2, 33, 33)]
)
def test_sizes(backend, device, shape):
    given = case(shape)
    got = run(*given, "eps", "fixed_large", True, device)
    for a, b in zip(got, by_numpy(*given, "eps", "fixed_large", True), strict=True):
        # Of a few pixels a prediction may be right to what float32 tables know.
        np.testing.assert_allclose(a.cpu().double().numpy(), b, rtol=BAR, atol=BAR)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_drawn_xt_is_that_of_noise(backend, device, dtype):
    x0, _, output, t, _ = case((3, 3, 6, 5), bytes_too=dtype == torch.uint8)
    x0, output, t = x0.to(device), output.to(device), t.to(device)
    table, ratio = tables(device=device)
    stream = {"seed": 2**63 + 5, "sample_index": torch.arange(7, 10).to(device), "step": 11}
    xt, _ = ops.noise(x0, t, table, **stream)
    given = ops.vlb_term(x0, xt, output, t, table, ratio)
    drawn = ops.vlb_term(x0, None, output, t, table, ratio, **stream)
    for a, b in zip(given, drawn, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    own = ops.vlb_term(x0, None, output, t, table, ratio, seed=1, sample_index=t)
    at_t, _ = ops.noise(x0, t, table, seed=1, sample_index=t)
    expected = ops.vlb_term(x0, at_t, output, t, table, ratio)
    for a, b in zip(own, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_an_image_does_not_depend_on_its_batch(backend, device):
    given = case((5, 3, 40, 40), "eps", "learned")
    whole = run(*given, "eps", "learned", True, device)
    for k in (0, 3):
        alone = run(*(x[k : k + 1] for x in given), "eps", "learned", True, device)
        assert all(torch.equal(a, b[k : k + 1]) for a, b in zip(alone, whole, strict=True))


@pytest.mark.backends("cpu")
def test_nor_on_the_threads(backend):
    given = case((7, 3, 64, 64), "v", "learned_range")
    for part in (0, 1):
        assert_same_for_any_thread_count(
            lambda part=part: run(*given, "v", "learned_range", True)[part]
        )


def test_nan_and_infinities_are_kept(backend, device):
    x0, xt, output, _, _ = case((5, 1, 4, 4))
    t = torch.tensor([0, 5, 5, 0, 999])
    output[0, 0, 1, 1] = output[1, 0, 1, 1] = math.nan
    xt[2, 0, 0, 0] = math.nan
    term, mse = run(x0, xt, output, t, None, "eps", "fixed_large", True, device)
    assert term.isnan().tolist() == mse.isnan().tolist() == [True, True, True, False, False]


def test_no_images_and_no_pixels(backend, device):
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4)):
        x = torch.zeros(shape)
        t = torch.zeros(shape[0], dtype=torch.int64)
        term, mse = run(x, x, x, t, None, "eps", "fixed_large", True, device)
        assert term.shape == mse.shape == shape[:1]
        assert term.isnan().all()


def test_float64_runs_in_float64():
    x0, xt, output, t, _ = case((3, 3, 6, 5), bytes_too=False)
    table, ratio = (
        SCHEDULE.table(dtype=torch.float64),
        torch.from_numpy(SCHEDULE.log_variance_ratio()),
    )
    got = ops.vlb_term(x0.double(), xt.double(), output.double(), t, table, ratio)
    expected = by_numpy(x0, xt, output, t, None, "eps", "fixed_large", True)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float64
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-9)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("steps", [None, 50])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_it_is_the_term_of_a_process(prediction, variance, steps):
    """Of a shorter chain, too, to whose steps a mean or a learned variance is translated."""
    loss = "vlb" if variance.startswith("learned") else "simple"
    process = Diffusion(SCHEDULE, prediction, variance, loss).respace(steps)
    x0, xt, output, _, word = case((4, 3, 8, 8), prediction, variance)
    t = timesteps(4, process.T)
    if word is not None:
        output = torch.cat((output, word), dim=1)
    for clip in (True, False):
        term, mse = process.bound_term(x0, xt, output, t, clip=clip)
        unit = x0.float() / 127.5 - 1
        expected = process.vlb_term(unit, xt, output, t, clip=clip)
        torch.testing.assert_close(term, expected, rtol=1e-4, atol=1e-6)
        predicted = process.predict_x0(xt, output, t, clip=clip)
        torch.testing.assert_close(
            # predict_x0 divides by a float32 mean_x0 of little, in float32
            mse,
            (predicted - unit).square().mean((1, 2, 3)),
            rtol=1e-3,
            atol=1e-5,
        )


X, T3 = torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 2])
TABLE, RATIO = tables()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x0": X[0]}, ValueError, r"x0 must be \(N, C, H, W\)"),
        ({"x0": X.int()}, TypeError, "x0 must be one of .*; got int32"),
        ({"xt": None}, ValueError, "give xt, or both seed and sample_index; got no seed"),
        ({"seed": 1, "sample_index": T3}, ValueError, "give xt, or seed, .*; got both"),
        ({"model_output": X[:, :, :1]}, ValueError, "model_output must have the shape of x0"),
        ({"xt": X[:2]}, ValueError, "xt must have the shape of model_output"),
        ({"t": T3.int()}, TypeError, "t must be int64"),
        ({"t": T3 + 999}, ValueError, r"t must be in 0 \.\. 999; got 1001"),
        ({"table": TABLE[:, :7]}, ValueError, r"table must be \(T, 8\)"),
        ({"log_ratio": RATIO[1:]}, ValueError, r"log_ratio must have shape \(1000,\)"),
        ({"log_ratio": RATIO.double()}, TypeError, "of the table's dtype, float32"),
        ({"log_ratio": None}, TypeError, "of the table's dtype, float32; got None"),
        ({"prediction": "z"}, ValueError, "one of 'eps', 'x0', 'mean', 'v'; got 'z'"),
        ({"learned_range": True}, ValueError, "learned_range is how log_variance is read; got no"),
        ({"log_variance": X[:1]}, ValueError, "log_variance must have the shape of model_output"),
        ({"clip": 1}, ValueError, "clip must be True or False"),
        ({"model_output": X.clone().requires_grad_()}, ValueError, "no gradient, which model_out"),
    ],
)
def test_bad_input(options, error, message):
    arguments = {
        "x0": X, "xt": X, "model_output": X, "t": T3, "table": TABLE,
        "log_ratio": RATIO, **options,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        ops.vlb_term(**arguments)


def test_gradients_are_refused_and_not_wrong():
    """In no mode; with none asked for, tensors that could have one are taken."""
    leaf = X.clone().requires_grad_()
    with torch.no_grad():
        ops.vlb_term(X, X, leaf, T3, TABLE, RATIO)

    def function(x):
        return ops.vlb_term(X, X, x, T3, TABLE, RATIO)[0].sum()

    with pytest.raises(ValueError, match="vlb_term has no gradient"):
        torch.func.grad(function)(X)
    with pytest.raises(ValueError, match="vlb_term has no gradient"):
        torch.func.jvp(function, (X,), (X,))


def test_registered_op_and_vmap():
    x0, xt, output, t, word = case((3, 2, 4, 5), "eps", "learned")
    op = torch.ops.fastddpm.vlb_term.default
    index = torch.arange(3)
    opcheck(op, (x0, xt, output, t, TABLE, RATIO, None, None, None, True, "eps", word, False))
    opcheck(op, (x0, None, output, t, TABLE, RATIO, 5, t, index, False, "v", None, False))

    def one(x, o):
        return ops.vlb_term(x0, x, o, t, TABLE, RATIO)

    both = torch.vmap(one)(torch.stack((xt, xt + 1)), torch.stack((output, output)))
    for k, x in enumerate((xt, xt + 1)):
        for a, b in zip(both, one(x, output), strict=True):
            torch.testing.assert_close(a[k], b, rtol=1e-6, atol=0)


def test_compiles_without_breaks(backend, device):
    require("vlb_term", backend)
    x0, xt, output, t, _ = (x if x is None else x.to(device) for x in case((3, 2, 4, 5)))
    table, ratio = tables(device=device)

    def function(x):
        term, mse = ops.vlb_term(x0, x * 1.5, output, t, table, ratio)
        return term + mse

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(xt), function(xt))
