"""attention_block: the whole block and its gradient, on every backend that has one."""

from __future__ import annotations

import pytest
import torch
from compare import (
    DTYPES,
    LAYOUTS,
    assert_exact,
    assert_same_for_any_thread_count,
    double,
    gradients,
    in_layout,
)
from torch.library import opcheck

from fastddpm import _native, ops, reference

# (N, C, H, W), groups, heads
CASES = (
    ((1, 4, 1, 1), 2, 1),  # one pixel attends to itself
    ((2, 12, 5, 3), 3, 1),
    ((2, 12, 5, 3), 4, 3),
    ((1, 32, 9, 8), 32, 4),
    ((65, 8, 2, 2), 2, 2),
)


def eager(x, num_groups, norm_w, norm_b, qkv_w, qkv_b, proj_w, proj_b, num_heads=1):
    """Eager torch in the dtype of x, attention spelt out."""
    n, c, h, w = x.shape
    y = torch.group_norm(x, num_groups, norm_w, norm_b, 1e-6)
    qkv = torch.nn.functional.conv2d(y, qkv_w[:, :, None, None], qkv_b)
    q, k, v = qkv.reshape(n, 3, num_heads, c // num_heads, h * w).unbind(1)
    weights = (q.transpose(2, 3) @ k * (c // num_heads) ** -0.5).softmax(-1)
    mixed = (v @ weights.transpose(2, 3)).reshape(n, c, h, w)
    return x + torch.nn.functional.conv2d(mixed, proj_w[:, :, None, None], proj_b)


def inputs(shape, dtype, device, layout="nchw"):
    c = shape[1]
    x = in_layout((torch.randn(shape) - 0.5).to(device, dtype), layout)
    parameters = [
        *(torch.randn(c), torch.randn(c)),
        *(torch.randn(3 * c, c) * 0.3, torch.randn(3 * c)),
        *(torch.randn(c, c) * 0.3, torch.randn(c)),
    ]
    return x, [p.to(device, dtype) for p in parameters]


@pytest.mark.matrix("forward", "backward")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(device, case, layout, dtype):
    shape, num_groups, num_heads = case
    x, parameters = inputs(shape, dtype, device, layout)
    grad = torch.randn(shape).to(device, dtype)
    got, plain, true = (
        gradients(
            lambda x, *p, f=function: f(x, num_groups, *p, num_heads=num_heads),
            [cast(y) for y in (x, *parameters)],
            cast(grad),
        )
        for function, cast in (
            (ops.attention_block, lambda y: y),
            (eager, lambda y: y),
            (reference.attention_block, double),
        )
    )
    names = ("y", "x", "norm_w", "norm_b", "qkv_w", "qkv_b", "proj_w", "proj_b")
    for name, a, b, c in zip(names, got, true, plain, strict=True):
        assert_exact(a, b, c, ulps=16, what=name)
        assert a.dtype == dtype


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_pixels_than_a_tile(device, layout, dtype):
    x, parameters = inputs((2, 24, 11, 13), dtype, device, layout)
    y = ops.attention_block(x, 3, *parameters, num_heads=2)
    truth = reference.attention_block(double(x), 3, *map(double, parameters), num_heads=2)
    assert y.stride() == torch.empty_like(x).stride()
    assert_exact(y, truth, eager(x, 3, *parameters, num_heads=2), ulps=16)


@pytest.mark.skipif(_native.C is None, reason=str(_native.reason))
@pytest.mark.parametrize("isa", _native.isas_available())
def test_every_instruction_set(isa):
    x, parameters = inputs((2, 36, 7, 9), torch.float32, "cpu", "nhwc")
    truth = reference.attention_block(double(x), 3, *map(double, parameters), num_heads=2)
    before = _native.isa()
    try:
        _native.use_isa(isa)
        with ops.use_backend("cpu"):
            y = ops.attention_block(x, 3, *parameters, num_heads=2)
    finally:
        _native.use_isa(before)
    assert_exact(y, truth, eager(x, 3, *parameters, num_heads=2), ulps=16)


@pytest.mark.skipif(_native.C is None, reason=str(_native.reason))
@pytest.mark.parametrize("isa", _native.isas_available())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "layout"), [((3, 40, 11, 13), "nchw"), ((1, 32, 17, 17), "nhwc")], ids=str
)
def test_gradients_of_every_instruction_set(isa, dtype, shape, layout):
    """Of channels that fill no block of a product, and of more queries than are kept at a time;
    their bits do not depend on the threads."""
    x, parameters = inputs(shape, dtype, "cpu", layout)
    grad = torch.randn(shape).to(dtype)

    def computed(function=ops.attention_block, cast=lambda y: y):
        leaves = [cast(y) for y in (x, *parameters)]
        return gradients(lambda x, *p: function(x, 4, *p, num_heads=2), leaves, cast(grad))

    before = _native.isa()
    try:
        _native.use_isa(isa)
        with ops.use_backend("cpu"):
            got = computed()
            assert_same_for_any_thread_count(lambda: torch.cat([g.flatten() for g in computed()]))
    finally:
        _native.use_isa(before)
    true, plain = computed(reference.attention_block, double), computed(eager)
    for a, b, c in zip(got, true, plain, strict=True):
        assert_exact(a, b, c, ulps=16)


@pytest.mark.backends("cpu")  # a promise of the native CPU kernels alone
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_same_bits_for_any_threads_and_batch(device, layout):
    x, parameters = inputs((5, 24, 11, 13), torch.float32, device, layout)

    def function(x=x):
        return ops.attention_block(x, 3, *parameters, num_heads=2)

    assert_same_for_any_thread_count(function)
    assert torch.equal(function()[3:4], function(x[3:4]))


def test_large_scores(device):
    """A softmax that picks one key; and what is not finite stays in its own sample."""
    x, parameters = inputs((2, 8, 4, 5), torch.float32, device)
    parameters[2] = parameters[2] * 100
    y = ops.attention_block(x, 2, *parameters)
    truth = reference.attention_block(double(x), 2, *map(double, parameters))
    assert_exact(y, truth, eager(x, 2, *parameters), ulps=64)
    x[1, 3, 2, 2] = torch.nan
    broken = ops.attention_block(x, 2, *parameters)
    assert torch.equal(broken[0], y[0])
    assert broken[1].isnan().all()


@pytest.mark.parametrize("expand", [(1, 1, 1, 1), (1, 12, 1, 1), (2, 1, 5, 3)], ids=str)
def test_expanded_gradients(device, expand):
    x, parameters = inputs((2, 12, 5, 3), torch.float32, device, "nhwc")
    grad = torch.randn(expand).to(device).expand(x.shape)
    got, plain, true = (
        gradients(
            lambda x, *p, f=function: f(x, 3, *p),
            [cast(p) for p in (x, *parameters)],
            cast(grad),
        )
        for function, cast in (
            (ops.attention_block, lambda y: y),
            (eager, lambda y: y),
            (reference.attention_block, double),
        )
    )
    for a, b, c in zip(got, true, plain, strict=True):
        assert_exact(a, b, c, ulps=16)


def test_the_same_tensor_twice(device):
    """One matrix as both weights of a single channel: the gradients add up."""
    x = torch.randn(2, 1, 3, 4).to(device)
    shared = torch.randn(1).to(device)

    def function(x, shared, f=ops.attention_block):
        weight = shared.reshape(1, 1)
        return f(x, 1, shared, shared, weight.expand(3, 1), None, weight, shared)

    got = gradients(function, (x, shared), x)
    true = gradients(
        lambda *a: function(*a, f=reference.attention_block), (double(x), double(shared)), double(x)
    )
    for a, b in zip(got, true, strict=True):
        assert_exact(a, b, ulps=32)


def test_half_precision_with_float32_parameters(device):
    x, parameters = inputs((2, 12, 5, 3), torch.float32, device, "nhwc")
    low = x.bfloat16()
    y = ops.attention_block(low, 3, *parameters)
    truth = reference.attention_block(double(low), 3, *map(double, parameters))
    plain = eager(low, 3, *(p.bfloat16() for p in parameters))
    assert y.dtype == torch.bfloat16
    assert y.stride() == low.stride()
    assert_exact(y, truth, plain)


def test_under_autocast(device):
    x, parameters = inputs((2, 12, 5, 3), torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = ops.attention_block(x, 3, *parameters)
    assert y.dtype == torch.float32
    truth = reference.attention_block(double(x), 3, *map(double, parameters))
    plain = eager(x.bfloat16(), 3, *(p.bfloat16() for p in parameters))
    assert_exact(y, truth, plain)


def test_the_products_run_in_the_dtype_of_autocast():
    x, parameters = inputs((2, 12, 5, 3), torch.float32, "cpu")
    leaves = [p.requires_grad_() for p in parameters]
    with ops.use_backend("reference"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = ops.attention_block(x, 3, *leaves)
        low = [p.bfloat16() if p.dim() == 2 else p for p in parameters]
        assert torch.equal(y, ops.attention_block(x, 3, *low))
        exact = ops.attention_block(x, 3, *leaves)
    assert 1e-4 < (y - exact).abs().max() < 0.3
    assert all(
        g.dtype == torch.float32 for g in torch.autograd.grad(y, leaves, torch.randn_like(y))
    )


@pytest.mark.parametrize("given", [(), (0,), (1,), (3,), (5,)], ids=str)
def test_without_some_parameters(device, given):
    x, parameters = inputs((2, 12, 5, 3), torch.float32, device)
    parameters = [p if k in (2, 4, *given) else None for k, p in enumerate(parameters)]
    grad = torch.randn_like(x)
    got = gradients(lambda x, *p: ops.attention_block(x, 3, *p), (x, *parameters), grad)
    true = gradients(
        lambda x, *p: reference.attention_block(x, 3, *p),
        list(map(double, (x, *parameters))),
        double(grad),
    )
    for a, b in zip(got, true, strict=True):
        assert_exact(a, b, ulps=64)


@pytest.mark.parametrize("shape", [(0, 12, 5, 3), (2, 12, 0, 3)], ids=str)
def test_empty(device, shape):
    x, parameters = inputs(shape, torch.float32, device)
    y, dx, *others = gradients(lambda x, *p: ops.attention_block(x, 3, *p), (x, *parameters), x)
    assert y.shape == dx.shape == x.shape
    assert all(torch.equal(g, torch.zeros_like(p)) for g, p in zip(others, parameters, strict=True))


def test_the_formula_is_the_derivative():
    """Of all seven arguments, and it can be differentiated again."""
    x, parameters = inputs((2, 4, 2, 3), torch.float64, "cpu")
    leaves = [p.requires_grad_() for p in (x, *parameters)]

    def function(x, *p):
        return ops.attention_block(x, 2, *p, num_heads=2)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
    grad = torch.randn_like(x)
    expected = torch.autograd.grad(
        reference.attention_block(x, 2, *parameters, num_heads=2), leaves, grad
    )
    got = reference.attention_block_backward(grad, x, 2, *parameters, 2, 1e-6)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "slice"])
def test_registered_ops(layout):
    x, parameters = inputs((2, 6, 5, 3), torch.float32, "cpu", layout)
    norm_w, _, qkv_w, qkv_b, proj_w, _ = parameters
    backward = torch.ops.fastddpm.attention_block_backward.default
    opcheck(backward, (x.clone(), x, 3, norm_w, None, qkv_w, qkv_b, proj_w, None, 2, 1e-6))
    leaves = [p.requires_grad_() for p in (x, *parameters)]
    opcheck(torch.ops.fastddpm.attention_block.default, (leaves[0], 3, *leaves[1:], 2, 1e-6))


def test_compiles_without_breaks(device):
    x, parameters = inputs((2, 12, 5, 3), torch.float32, device, "nhwc")

    def function(x, *p):
        return ops.attention_block(x * 2, 3, *p, num_heads=2) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        gradients(compiled, (x, *parameters), x), gradients(function, (x, *parameters), x),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, expected)


X, P = torch.zeros(2, 6, 4, 4), torch.zeros(6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x must be \(N, C, H, W\); got \(6, 4, 4\)"),
        ({"num_groups": 4}, ValueError, "num_groups must divide the 6 channels; got 4"),
        ({"num_heads": 4}, ValueError, "num_heads must divide the 6 channels; got 4"),
        ({"num_heads": 0}, ValueError, "num_heads must divide the 6 channels; got 0"),
        ({"norm_weight": P[1:]}, ValueError, r"norm_weight must have shape \(6,\)"),
        ({"qkv_weight": P}, ValueError, r"qkv_weight must have shape \(18, 6\); got \(6,\)"),
        ({"qkv_weight": None}, TypeError, "qkv_weight must be a tensor; got NoneType"),
        ({"qkv_bias": P}, ValueError, r"qkv_bias must have shape \(18,\); got \(6,\)"),
        ({"proj_weight": P.expand(5, 6)}, ValueError, r"proj_weight must have shape \(6, 6\)"),
        ({"proj_bias": P.long()}, TypeError, "proj_bias must be one of .*; got int64"),
        ({"eps": -1}, ValueError, "eps must be a number of at least 0; got -1"),
    ],
)
def test_bad_input(options, error, message):
    arguments = {
        "x": X, "num_groups": 3, "norm_weight": P, "norm_bias": P,
        "qkv_weight": P.expand(18, 6), "qkv_bias": None, "proj_weight": P.expand(6, 6),
        "proj_bias": P, **options,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        ops.attention_block(**arguments)
