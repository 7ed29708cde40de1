"""attention_block: the whole block, on every backend that has one."""

from __future__ import annotations

import pytest
import torch
from compare import DTYPES, LAYOUTS, assert_exact, double, gradients, in_layout

from fastddpm import ops, reference
from fastddpm.ops import dispatch

# (N, C, H, W), groups, heads
CASES = (
    ((1, 4, 1, 1), 2, 1),  # one pixel attends to itself
    ((2, 12, 5, 3), 3, 1),
    ((2, 12, 5, 3), 4, 3),
    ((1, 32, 9, 8), 32, 4),
    ((65, 8, 2, 2), 2, 2),
)


@pytest.fixture(autouse=True)
def _has_the_op(backend):
    reason = dispatch.load(backend).unsupported("attention_block")
    if reason is not None:
        pytest.skip(reason)


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


def test_without_biases(device):
    x, (_, _, qkv_w, _, proj_w, _) = inputs((2, 12, 5, 3), torch.float32, device)
    y = ops.attention_block(x, 3, None, None, qkv_w, None, proj_w, None)
    truth = reference.attention_block(
        double(x), 3, None, None, double(qkv_w), None, double(proj_w), None
    )
    assert_exact(y, truth, ulps=32)


def test_empty(device):
    x, parameters = inputs((0, 12, 5, 3), torch.float32, device)
    assert ops.attention_block(x, 3, *parameters).shape == x.shape


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
