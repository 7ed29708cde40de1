"""posterior_step: x_{t-1} ~ p(x_{t-1} | x_t), on every backend."""

from __future__ import annotations

import pytest
import torch
from compare import (
    DTYPES,
    LAYOUTS,
    assert_exact,
    double,
    gradients,
    in_layout,
    table,
    timesteps,
)
from torch.library import opcheck

from fastddpm import Schedule, ops, reference
from fastddpm.ops import library

PREDICTIONS = ("eps", "x0", "mean", "v")
SHAPES = (
    (1, 1, 1, 1),
    (2, 3, 7, 5),  # no multiple of any vector
    (257, 1, 4, 4),  # more samples than threads and blocks
    (2, 3, 33, 31),  # longer than a buffer
    (1, 70, 3, 5),  # more channels than pixels
)


def eager(xt, out, t, tab, z, clip=True, prediction="eps", log_variance=None, learned_range=False):
    """Eager torch, all in the dtype of xt."""
    c = [tab[t, k].to(xt.dtype).reshape(-1, 1, 1, 1) for k in range(8)]
    x0 = c[2] * xt - c[3] * out if prediction == "eps" else out
    x0 = c[0] * xt - c[1] * out if prediction == "v" else x0
    x0 = x0.clamp(-1, 1) if clip else x0
    mean = out if prediction == "mean" else c[4] * x0 + c[5] * xt
    sigma = c[6]
    if learned_range:  # improved-diffusion's p_mean_variance
        noisy, f = sigma > 0, (log_variance + 1) / 2
        log_variance = f * c[7] + (1 - f) * 2 * torch.log(torch.where(noisy, sigma, 1))
        log_variance = torch.where(noisy, log_variance, 0)
    if log_variance is not None:
        sigma = torch.where(sigma > 0, torch.exp(0.5 * log_variance), 0)
    return mean + sigma * z


LINEAR_BETAS = Schedule.linear().betas
RANGE = Schedule.linear().table("learned_range")


def inputs(shape, dtype, device, layout="nchw"):
    """x_t, output, z and log variance, each in another layout."""
    tensors = [torch.randn(shape), torch.randn(shape), torch.randn(shape), torch.randn(shape) - 4]
    first = LAYOUTS.index(layout)
    return [in_layout(x.to(device, dtype), LAYOUTS[(first + k) % 4]) for k, x in enumerate(tensors)]


@pytest.mark.matrix("forward")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_given_noise(device, shape, layout, dtype):
    xt, out, z, log_variance = inputs(shape, dtype, device, layout)
    t, tab = timesteps(shape[0]).to(device), table(device=device)
    for prediction in PREDICTIONS:
        for options in ({}, {"clip": False}, {"log_variance": log_variance}):
            got = ops.posterior_step(xt, out, t, tab, z=z, prediction=prediction, **options)
            truth = reference.posterior_step(
                *map(double, (xt, out, t, tab)),
                z=double(z),
                prediction=prediction,
                **{name: double(value) for name, value in options.items()},
            )
            expected = eager(xt, out, t, tab, z, prediction=prediction, **options)
            assert_exact(got, truth, expected, what=f"{prediction} {list(options)}")
            assert got.dtype == dtype
            assert got.stride() == torch.empty_like(xt).stride()


@pytest.mark.parametrize("shape", SHAPES[1:4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_learned_range(device, shape, layout, dtype):
    """Where log sigma^2 lies between log beta-tilde and log beta, -1 .. 1 and beyond."""
    xt, out, z, word = inputs(shape, dtype, device, layout)
    word, t, tab = word + 4, timesteps(shape[0]).to(device), RANGE.to(device)
    for prediction, drawn in (("eps", False), ("mean", False), ("v", True)):
        noise = {"z": z}
        if drawn:
            noise = {"seed": 3, "sample_index": torch.arange(shape[0]).to(device)}
            z = ops.randn(shape, step=t, **noise)
        options = {"prediction": prediction, "log_variance": word, "learned_range": True}
        got = ops.posterior_step(xt, out, t, tab, **noise, **options)
        options["log_variance"] = double(word)
        truth = reference.posterior_step(*map(double, (xt, out, t, tab)), z=double(z), **options)
        options["log_variance"] = word
        expected = eager(xt, out, t, tab, z.to(dtype), **options)
        assert_exact(got, truth, expected, what=prediction)
        assert got.dtype == dtype


def test_a_learned_range_by_its_bounds(device):
    """-1 is log beta-tilde, 1 log beta, at every step but the last, which has no noise."""
    t = torch.arange(1000)
    zero, one = torch.zeros(1000, 1, 1, 1), torch.ones(1000, 1, 1, 1)
    for word, sigma2 in ((-one, Schedule.linear().posterior_variance), (one, LINEAR_BETAS)):
        got = ops.posterior_step(
            zero.to(device), zero.to(device), t.to(device), RANGE.to(device), z=one.to(device),
            log_variance=word.to(device), learned_range=True,
        ).cpu().flatten()  # fmt: skip
        expected = torch.tensor(sigma2).sqrt()
        expected[0] = 0
        torch.testing.assert_close(got.double(), expected, rtol=4e-6, atol=0)


def test_every_step_of_the_chain(device):
    """Each t once: the coefficients span six decades, and t = 0 has no noise."""
    shape, t, tab = (1000, 1, 2, 2), torch.arange(1000), table()
    xt, eps, z, _ = inputs(shape, torch.float32, device)
    for sampler in ("ddpm", "ddim"):
        tab = Schedule.linear().table(sampler=sampler, eta=0.5)
        got = ops.posterior_step(xt, eps, t.to(device), tab.to(device), z=z)
        truth = reference.posterior_step(*map(double, (xt, eps, t, tab)), z=double(z))
        for k in range(0, 1000, 50):
            part = slice(k, k + 50)
            step = eager(xt[part].cpu(), eps[part].cpu(), t[part], tab, z[part].cpu())
            assert_exact(got[part], truth[part], step, what=f"t = {k} ..")


@pytest.mark.parametrize("dtype", DTYPES)
def test_drawn_noise_is_randn(device, dtype):
    """It is drawn in float32 and used so, whatever x_t is stored in."""
    xt, eps, _, log_variance = inputs((3, 2, 5, 6), dtype, device)
    t, tab = timesteps(3).to(device), table(device=device)
    stream = {"seed": 2**64 - 3, "sample_index": torch.tensor([2**40, 0, 9]).to(device)}
    for step in (None, 1000, torch.tensor([5, 6, 7]).to(device)):
        z = ops.randn(xt.shape, step=t if step is None else step, **stream)
        for options in ({}, {"log_variance": log_variance}):
            got = ops.posterior_step(xt, eps, t, tab, step=step, **stream, **options)
            assert torch.equal(got, ops.posterior_step(xt, eps, t, tab, z=z, **options))


def test_a_sample_does_not_depend_on_its_batch(device):
    xt, eps, _, _ = inputs((257, 3, 7, 5), torch.float32, device)
    t, index = timesteps(257).to(device), torch.arange(100, 357).to(device)
    tab = table(device=device)
    whole = ops.posterior_step(xt, eps, t, tab, seed=1, sample_index=index)
    for part in (slice(0, 1), slice(100, 103)):
        one = ops.posterior_step(
            xt[part], eps[part], t[part], tab, seed=1, sample_index=index[part]
        )
        assert torch.equal(one, whole[part])


def test_no_noise_passes_at_the_last_step(device):
    xt, eps, z, _ = inputs((2, 1, 3, 3), torch.float32, device)
    t, tab = torch.tensor([0, 1]).to(device), table(device=device)
    z[0] = torch.tensor([torch.nan, torch.inf, -torch.inf]).to(device)
    big = torch.full_like(z, 200.0)  # its exponential overflows
    for options in ({}, {"log_variance": big}, {"log_variance": big, "learned_range": True}):
        got = ops.posterior_step(xt, eps, t, tab, z=z, **options)
        silent = ops.posterior_step(xt, eps, t, tab, z=torch.zeros_like(z))
        assert torch.equal(got[0], silent[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(device, layout, dtype):
    xt, eps, z, _ = inputs((3, 3, 7, 5), dtype, device, layout)
    t, tab = timesteps(3).to(device), table(device=device)
    for noise in ({"z": z}, {"seed": 0, "sample_index": torch.arange(3).to(device)}):
        expected = ops.posterior_step(xt, eps, t, tab, **noise)
        other = in_layout(torch.zeros_like(xt), LAYOUTS[LAYOUTS.index(layout) - 1])
        assert ops.posterior_step(xt, eps, t, tab, out=other, **noise) is other
        assert torch.equal(other, expected)
        for target in (0, 1):
            operands = [xt.clone(), eps.clone()]
            out = operands[target]
            assert ops.posterior_step(*operands, t, tab, out=out, **noise) is out
            assert torch.equal(out, expected)


def test_the_same_tensor_everywhere(device):
    x = torch.randn(2, 2, 3, 3).to(device)
    t, tab = timesteps(2).to(device), table(device=device)
    got = ops.posterior_step(x, x, t, tab, z=x, log_variance=x)
    copies = [x.clone() for _ in range(4)]
    assert torch.equal(
        got, ops.posterior_step(*copies[:2], t, tab, z=copies[2], log_variance=copies[3])
    )


def test_half_precision_outputs_of_a_float32_chain(device):
    """Storage types mix: x_t float32, the model's output bfloat16, no copy in between."""
    xt, eps, z, log_variance = inputs((3, 2, 5, 6), torch.float32, device)
    t, tab = timesteps(3).to(device), table(device=device)
    eps, z, log_variance = eps.bfloat16(), z.half(), log_variance.bfloat16()
    got = ops.posterior_step(xt, eps, t, tab, z=z, log_variance=log_variance)
    same = ops.posterior_step(
        xt, eps.float(), t, tab, z=z.float(), log_variance=log_variance.float()
    )
    assert got.dtype == torch.float32
    assert torch.equal(got, same)


@pytest.mark.matrix("backward")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gradients(device, dtype, layout, prediction):
    learned_range = layout in ("nhwc", "slice")
    tensors = inputs((4, 2, 5, 4), dtype, device, layout)
    tensors[1][tensors[1].abs() == 1] = 0.5  # at the clip's kink torch's versions differ
    t, tab = timesteps(4).to(device), (RANGE if learned_range else table()).to(device)
    grad = torch.randn(()).to(device, dtype).expand(4, 2, 5, 4)  # as from y.sum()

    def run(function, t, tab):
        return lambda xt, out, z, log_variance: function(
            xt, out, t, tab, z=z, log_variance=log_variance, prediction=prediction,
            learned_range=learned_range,
        )  # fmt: skip

    got = gradients(run(ops.posterior_step, t, tab), tensors, grad)
    plain = gradients(run(eager, t, tab), tensors, grad)
    true = gradients(
        run(reference.posterior_step, t.cpu(), double(tab)), map(double, tensors), double(grad)
    )
    names = ("x", "xt", "model_output", "z", "log_variance")
    for name, a, b, c in zip(names, got, true, plain, strict=True):
        assert_exact(a, b, c, what=name)
        assert a.dtype == dtype


def test_gradients_with_drawn_noise(device):
    xt, eps, _, log_variance = inputs((3, 2, 4, 4), torch.float32, device)
    t, tab = timesteps(3).to(device), table(device=device)
    stream = {"seed": 5, "sample_index": torch.arange(3).to(device)}
    z, grad = ops.randn(xt.shape, step=t, **stream), torch.randn_like(xt)

    def run(noise):
        return lambda xt, eps, lv: ops.posterior_step(xt, eps, t, tab, log_variance=lv, **noise)

    drawn = gradients(run(stream), (xt, eps, log_variance), grad)
    given = gradients(run({"z": z}), (xt, eps, log_variance), grad)
    for a, b in zip(drawn, given, strict=True):
        assert torch.equal(a, b)
    leaf = eps.clone().requires_grad_()
    ops.posterior_step(xt, leaf, t, tab, **stream).sum().backward()
    assert leaf.grad.isfinite().all()


def test_empty(device):
    x, t = torch.rand(0, 3, 4, 4).to(device), torch.zeros(0, dtype=torch.int64).to(device)
    tab = table(device=device)
    assert ops.posterior_step(x, x, t, tab, z=x).shape == x.shape
    assert ops.posterior_step(x, x, t, tab, seed=0, sample_index=t, out=x) is x
    leaf = x.clone().requires_grad_()
    ops.posterior_step(leaf, x, t, tab, seed=0, sample_index=t).sum().backward()
    assert leaf.grad.shape == x.shape


def test_float64_goes_to_the_reference():
    xt, eps, z, _ = inputs((3, 2, 4, 4), torch.float64, "cpu")
    t, tab = timesteps(3), table(dtype=torch.float64)
    expected = reference.posterior_step(xt, eps, t, tab, z=z)
    assert torch.equal(ops.posterior_step(xt, eps, t, tab, z=z), expected)
    assert ops.posterior_step(xt, eps, t, tab, seed=0, sample_index=t).dtype == torch.float64


X, T3, TABLE = torch.zeros(3, 2, 4, 4), torch.tensor([0, 5, 999]), table()
LEAF = torch.zeros(3, 2, 4, 4, requires_grad=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"xt": X.byte()}, TypeError, "xt must be one of .*; got uint8"),
        ({"xt": X[0]}, ValueError, r"xt must be \(N, C, H, W\); got \(2, 4, 4\)"),
        ({"xt": None}, TypeError, "xt must be a tensor; got NoneType"),
        ({"model_output": X[:, :1]}, ValueError, "model_output must have the shape of xt"),
        ({"model_output": X.double()}, TypeError, "model_output and xt must both be float64 or"),
        ({"t": torch.tensor([0, 5, 1000])}, ValueError, r"t must be in 0 .. 999; got 1000"),
        ({"t": torch.tensor([-1, 5, 0])}, ValueError, r"t must be in 0 .. 999; got -1"),
        ({"t": T3.float()}, TypeError, "t must be int64; got float32"),
        ({"t": T3[:, None]}, ValueError, r"t must have shape \(3,\); got \(3, 1\)"),
        ({"table": TABLE[:, :7]}, ValueError, r"table must be \(T, 8\)"),
        ({"table": TABLE[:0]}, ValueError, r"table must be \(T, 8\) with T >= 1"),
        ({"table": TABLE.half()}, TypeError, "table must be float32 or float64; got float16"),
        ({"z": X[..., 1:]}, ValueError, "z must have the shape of xt"),
        ({"z": None}, ValueError, "give z, or both seed and sample_index; got no seed"),
        ({"z": None, "seed": 1}, ValueError, "got no sample_index"),
        ({"sample_index": T3}, ValueError, "give z, or seed, sample_index and step; got both"),
        ({"z": None, "seed": 2**64, "sample_index": T3}, ValueError, "seed must be in 0"),
        ({"z": None, "seed": 0, "sample_index": T3 - 1}, ValueError, "sample_index must be in 0"),
        ({"z": None, "seed": 0, "sample_index": T3.int()}, TypeError, "sample_index must be int64"),
        ({"prediction": "z"}, ValueError, "one of 'eps', 'x0', 'mean', 'v'; got 'z'"),
        ({"learned_range": True}, ValueError, "learned_range is how log_variance is read; got no"),
        ({"learned_range": 1, "log_variance": X}, ValueError, "learned_range must be True or Fal"),
        ({"log_variance": X[:1]}, ValueError, "log_variance must have the shape of xt"),
        ({"out": X[:1]}, ValueError, "out must have the shape of xt"),
        ({"out": X.half()}, TypeError, "out must be float32 like xt; got float16"),
        ({"out": X[:1].expand_as(X)}, ValueError, "out must not be an expanded tensor"),
        ({"out": LEAF}, ValueError, "out can't be given where out requires grad"),
        ({"out": X, "xt": LEAF}, ValueError, "out can't be given where xt requires grad"),
    ],
)
def test_bad_input(options, error, message):
    arguments = {"xt": X, "model_output": X, "t": T3, "table": TABLE, "z": X, **options}
    with pytest.raises(error, match=message):
        ops.posterior_step(**arguments)


@pytest.mark.parametrize("drawn", [True, False])
def test_t_outside_the_table_on_a_device(backend, device, monkeypatch, drawn):
    """Where its values are not read first the nearest row serves; C++ on the CPU reads them."""
    monkeypatch.setattr(library, "values_in", lambda *_: None)
    xt, eps, z, log_variance = inputs((4, 3, 2, 4), torch.float32, device)
    outside = torch.tensor([-1, 1000, -(2**40), 2**40]).to(device)
    nearest, tab = torch.tensor([0, 999, 0, 999]).to(device), table(device=device)
    noise = {"z": z}
    if drawn:
        noise = {"seed": 1, "sample_index": torch.arange(4).to(device), "step": 7}

    def function(t):
        leaves = xt, eps, log_variance
        return gradients(
            lambda xt, eps, v: ops.posterior_step(xt, eps, t, tab, log_variance=v, **noise),
            leaves, z,
        )  # fmt: skip

    if backend == "cpu":
        with pytest.raises(ValueError, match=r"t must lie in 0 .. 999; t\[0\] is -1"):
            function(outside)
        return
    for got, expected in zip(function(outside), function(nearest), strict=True):
        assert torch.equal(got, expected)


def test_registered_ops():
    xt, eps, z, log_variance = (
        x.requires_grad_() for x in inputs((3, 2, 4, 5), torch.float32, "cpu", "nhwc")
    )
    t, tab, index = timesteps(3), table(), torch.arange(3)
    op = torch.ops.fastddpm.posterior_step.default
    opcheck(op, (xt, eps, t, tab, z, None, None, None, True, "eps", log_variance))
    opcheck(op, (xt, eps, t, tab, None, -5, t, index, True, "x0", None))
    opcheck(op, (xt, eps, t, tab, None, -5, t, index, False, "mean", log_variance))
    opcheck(op, (xt, eps, t, RANGE, z, None, None, None, True, "v", log_variance, None, True))
    xt, eps = xt.detach(), eps.detach()
    opcheck(
        torch.ops.fastddpm.posterior_step_out.default,
        (xt, eps, t, tab, None, 5, t, index, True, "eps", None, torch.zeros_like(xt)),
    )


@pytest.mark.parametrize("drawn", [True, False])
def test_compiles_without_breaks(device, drawn):
    xt, eps, z, _ = inputs((3, 2, 4, 5), torch.float32, device)
    t, tab, index = timesteps(3).to(device), table(device=device), torch.arange(3).to(device)
    noise = {"seed": 5, "sample_index": index} if drawn else {"z": z}

    def function(xt, eps):
        return ops.posterior_step(xt * 1.5, eps, t, tab, **noise) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        gradients(compiled, (xt, eps), z), gradients(function, (xt, eps), z), strict=True
    ):
        assert torch.equal(got, expected)


def test_compiles_in_place(device):
    xt, eps, z, _ = inputs((3, 2, 4, 5), torch.float32, device)
    t, tab = timesteps(3).to(device), table(device=device)

    def function(x):
        ops.posterior_step(x, eps, t, tab, z=z, out=x)
        return x + 1

    expected, x = function(xt.clone()), xt.clone()
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(got, expected)
    assert torch.equal(x + 1, expected)
