"""The oracle itself, against the paper's formulas, published vectors and numerical derivatives."""

from __future__ import annotations

import inspect

import pytest
import torch
from compare import table, timesteps

from fastddpm import Schedule, reference
from fastddpm.ops import dispatch

# Random123's kat_vectors for philox4x32-10: counter, key, result.
PHILOX = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
)  # fmt: skip


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), PHILOX)
def test_philox_gives_the_published_vectors(counter, key, result):
    low, high = words(key)
    got = reference.philox4x32(torch.tensor([words(counter)]), high << 32 | low)
    assert got.tolist() == [words(result)]


def test_random_words_follow_the_documented_counter():
    """key = seed; counter = (block, step, index low, index high)."""
    seed, step, index = 0x299F31D0A4093822, 0x85A308D3, 0x0370734413198A2E
    got = reference.random_words(
        9, seed=seed, step=torch.tensor([step]), sample_index=torch.tensor([index])
    )
    blocks = torch.tensor([[b, step, 0x13198A2E, 0x03707344] for b in range(3)])
    assert torch.equal(got, reference.philox4x32(blocks, seed).reshape(1, 12))


def test_a_seed_may_come_as_the_signed_integer_of_the_same_bits():
    kwargs = {"step": 3, "sample_index": torch.arange(2)}
    for seed in (2**63, 2**64 - 1):
        assert torch.equal(
            reference.random_words(8, seed=seed, **kwargs),
            reference.random_words(8, seed=seed - 2**64, **kwargs),
        )


OWN = {"packed"}  # what a backend takes beside the reference's arguments


@pytest.mark.parametrize("backend", dispatch.BACKENDS[1:])
def test_backends_have_the_signatures_of_the_reference(backend):
    loaded = dispatch.load(backend)
    if loaded.module is None:
        pytest.skip(loaded.missing)
    for op in dispatch.OPS:
        if hasattr(loaded.module, op):
            expected = inspect.signature(getattr(reference, op)).parameters
            got = dict(inspect.signature(getattr(loaded.module, op)).parameters)
            passing = [name for name, p in got.items() if p.kind is p.VAR_KEYWORD]
            for name in passing:  # what it hands on as it is
                del got[name]
            assert {k: p for k, p in got.items() if p != expected.get(k)}.keys() <= OWN, op
            assert passing or got.keys() >= expected.keys(), op


def test_noise_is_eq_4_of_the_schedule():
    schedule = Schedule.linear()
    x0, t = torch.randn(5, 2, 3, 3, dtype=torch.float64), timesteps(5)
    eps = torch.randn_like(x0)
    xt, _ = reference.noise(x0, t, schedule.table(dtype=torch.float64), eps=eps)
    ab = torch.from_numpy(schedule.alphas_cumprod)[t].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(xt, ab.sqrt() * x0 + (1 - ab).sqrt() * eps, rtol=1e-14, atol=0)


def test_posterior_step_is_eq_11():
    """Without clipping, x_{t-1} = (x_t - beta / sqrt(1 - abar) eps) / sqrt(alpha) + sigma z."""
    schedule = Schedule.linear()
    xt, t = torch.randn(5, 2, 3, 3, dtype=torch.float64), timesteps(5)
    eps, z = torch.randn_like(xt), torch.randn_like(xt)
    got = reference.posterior_step(xt, eps, t, schedule.table(dtype=torch.float64), z=z, clip=False)
    at = t.reshape(-1, 1, 1, 1)
    beta, ab = torch.tensor(schedule.betas)[at], torch.tensor(schedule.alphas_cumprod)[at]
    sigma = torch.where(at > 0, beta.sqrt(), 0)  # fixed_large; no noise at the last step
    expected = (xt - beta / (1 - ab).sqrt() * eps) / (1 - beta).sqrt() + sigma * z
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_the_three_predictions_agree():
    xt, t = torch.randn(4, 2, 3, 3, dtype=torch.float64), timesteps(4)
    tab, z = table(dtype=torch.float64), torch.randn_like(xt)
    x0 = torch.rand_like(xt) * 2 - 1
    c = tab[t].T.reshape(8, -1, 1, 1, 1)
    outputs = {"x0": x0, "eps": (c[2] * xt - x0) / c[3], "mean": c[4] * x0 + c[5] * xt}
    steps = {
        kind: reference.posterior_step(xt, out, t, tab, z=z, prediction=kind)
        for kind, out in outputs.items()
    }
    torch.testing.assert_close(steps["eps"], steps["x0"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(steps["mean"], steps["x0"], rtol=1e-10, atol=1e-10)
    for kind, out in outputs.items():
        got = reference.predict_x0(xt, out, t, tab, prediction=kind, clip=False)
        torch.testing.assert_close(got, x0, rtol=1e-9, atol=1e-9)


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def numerical(function, *inputs):
    """By differences: torch's gradient of `function`, which closed formulas are compared with."""
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("modulated", "affine"), [(True, True), (False, True), (True, False)])
def test_group_norm_silu_gradients(silu, modulated, affine):
    x, grad = leaf(2, 6, 3, 2), torch.randn(2, 6, 3, 2, dtype=torch.float64)
    parameters = [leaf(6) if affine else None for _ in "wb"]
    parameters += [leaf(2, 6) if modulated else None for _ in "ss"]

    def function(x, weight, bias, scale, shift):
        return reference.group_norm_silu(
            x, 3, weight, bias, 1e-3, scale=scale, shift=shift, silu=silu
        )

    numerical(function, x, *parameters)
    weight, bias, scale, shift = parameters
    *closed, dbefore, dx2 = reference.group_norm_silu_backward(
        grad, x, 3, weight, bias, 1e-3, scale, shift, silu
    )
    assert dbefore is None
    assert dx2 is None
    given = [y for y in (x, *parameters) if y is not None]
    expected = torch.autograd.grad(function(x, *parameters), given, grad)
    assert [g is None for g in closed] == [y is None for y in (x, *parameters)]
    for got, true in zip([g for g in closed if g is not None], expected, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("prediction", ["eps", "x0", "mean"])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("clip", [True, False])
def test_posterior_step_gradients(prediction, learned, clip):
    t, tab = torch.tensor([0, 400, 999]), table(dtype=torch.float64)
    xt, out, z = leaf(3, 2, 2, 2), leaf(3, 2, 2, 2), leaf(3, 2, 2, 2)
    log_variance = leaf(3, 2, 2, 2) if learned else None
    options = {"prediction": prediction, "clip": clip}

    def function(xt, out, z, log_variance):
        return reference.posterior_step(xt, out, t, tab, z=z, log_variance=log_variance, **options)

    y = function(xt, out, z, log_variance)
    grad = torch.randn_like(y)
    given = [x for x in (xt, out, z, log_variance) if x is not None]
    expected = torch.autograd.grad(y, given, grad, allow_unused=True, materialize_grads=True)
    closed = reference.posterior_step_backward(
        grad, xt, out, t, tab, z=z, log_variance=log_variance, **options
    )
    assert (closed[3] is None) == (not learned)
    for got, true in zip(closed, expected, strict=False):
        torch.testing.assert_close(got, true, rtol=1e-10, atol=1e-12)


def test_noise_gradients():
    x0, eps, t = leaf(3, 2, 2, 3), leaf(3, 2, 2, 3), torch.tensor([0, 400, 999])
    flip, tab = torch.tensor([True, False, True]), table(dtype=torch.float64)

    def function(x0, eps):
        return reference.noise(x0, t, tab, eps=eps, flip=flip)[0]

    numerical(function, x0, eps)
    y = function(x0, eps)
    grad = torch.randn_like(y)
    closed = reference.noise_backward(grad, t, tab, flip)
    for got, true in zip(closed, torch.autograd.grad(y, (x0, eps), grad), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-12, atol=0)


def test_attention_block_is_the_formula():
    """Against softmax attention spelt out, two heads, with a gradient by differences."""
    n, c, h, w, heads = 2, 8, 3, 2, 2
    x, gamma, beta = leaf(n, c, h, w), leaf(c), leaf(c)
    qkv_w, qkv_b, proj_w, proj_b = leaf(3 * c, c), leaf(3 * c), leaf(c, c), leaf(c)

    def function(*inputs):
        return reference.attention_block(inputs[0], 4, *inputs[1:], num_heads=heads)

    got = function(x, gamma, beta, qkv_w, qkv_b, proj_w, proj_b)
    y = torch.nn.functional.group_norm(x, 4, gamma, beta, 1e-6)
    q, k, v = (torch.einsum("oc,nchw->nohw", qkv_w, y) + qkv_b[:, None, None]).chunk(3, dim=1)
    q, k, v = (part.reshape(n, heads, c // heads, h * w) for part in (q, k, v))
    weights = torch.einsum("nmdi,nmdj->nmij", q, k) / (c // heads) ** 0.5
    mixed = torch.einsum("nmij,nmdj->nmdi", weights.softmax(-1), v).reshape(n, c, h, w)
    expected = x + torch.einsum("oc,nchw->nohw", proj_w, mixed) + proj_b[:, None, None]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    numerical(function, x, gamma, beta, qkv_w, qkv_b, proj_w, proj_b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_keep_memory_format_and_dtype(dtype):
    x = torch.randn(2, 4, 5, 3).to(dtype).contiguous(memory_format=torch.channels_last)
    t, index = timesteps(2), torch.arange(2)
    xt, eps = reference.noise(x, t, table(), seed=0, sample_index=index)
    for y in (
        reference.group_norm_silu(x, 2, None, None),
        reference.group_norm_silu_backward(x, x, 2, None, None, 1e-6, None, None, True)[0],
        reference.attention_block(
            x, 2, None, None, torch.randn(12, 4), None, torch.randn(4, 4), None
        ),
        reference.posterior_step(x, x.contiguous(), t, table(), z=x),
        reference.discretized_log_likelihood(x, x, x),
        xt,
        eps,
    ):
        assert y.stride() == x.stride()
        assert y.dtype == dtype
