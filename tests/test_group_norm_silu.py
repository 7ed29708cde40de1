"""group_norm_silu and its gradient, on every backend."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
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

from fastddpm import ops, reference
from fastddpm.ops import dispatch

# (N, C, H, W), groups
CASES = (
    ((2, 6, 1, 1), 3),
    *(((2, 12, 5, 7), g) for g in (1, 2, 3, 4, 6, 12)),  # every divisor, odd sizes
    ((257, 4, 3, 3), 2),  # more samples than threads and blocks
    ((2, 32, 16, 16), 32),  # a group is a channel
    ((1, 192, 9, 11), 32),  # 6 channels a group: no power of two
    ((2, 64, 17, 19), 16),  # longer than the buffers and blocks
    ((1, 320, 8, 8), 32),  # more channels than a line
)


def eager(x, num_groups, weight, bias, scale, shift, eps=1e-6, silu=True):
    """Eager torch, all in the dtype of x."""
    weight, bias, scale, shift = (
        None if p is None else p.to(x.dtype) for p in (weight, bias, scale, shift)
    )
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # torch's backward wants both or neither
    # torch.group_norm: F.group_norm refuses a single value per group.
    y = torch.group_norm(x, num_groups, weight, bias, eps)
    if scale is not None:
        y = y * (1 + scale[:, :, None, None])
    if shift is not None:
        y = y + shift[:, :, None, None]
    return F.silu(y) if silu else y


def fused(x, num_groups, weight, bias, scale, shift, eps=1e-6, silu=True):
    return ops.group_norm_silu(
        x, num_groups, weight, bias, eps, scale=scale, shift=shift, silu=silu
    )


def truth(x, num_groups, weight, bias, scale, shift, eps=1e-6, silu=True):
    return reference.group_norm_silu(
        x, num_groups, weight, bias, eps, scale=scale, shift=shift, silu=silu
    )


def inputs(shape, dtype, device, layout="nchw", affine=True, modulated=True):
    """x with a mean of -2.3, random parameters: never ones and zeros."""
    n, c = shape[:2]
    x = in_layout((torch.randn(shape) * 0.7 - 2.3).to(device, dtype), layout)
    parameters = [torch.randn(c), torch.randn(c), torch.randn(n, c), torch.randn(n, c)]
    given = [affine, affine, modulated, modulated]
    parameters = [
        p.to(device, dtype) if wanted else None for p, wanted in zip(parameters, given, strict=True)
    ]
    return x, parameters


def check(x, num_groups, parameters, grad, **options):
    """Forward and all gradients against the truth, allowing what eager torch errs."""
    got = gradients(lambda *a: fused(a[0], num_groups, *a[1:], **options), (x, *parameters), grad)
    plain = gradients(lambda *a: eager(a[0], num_groups, *a[1:], **options), (x, *parameters), grad)
    true = gradients(
        lambda *a: truth(a[0], num_groups, *a[1:], **options),
        list(map(double, (x, *parameters))),
        double(grad),
    )
    given = [
        name
        for name, p in zip(("weight", "bias", "scale", "shift"), parameters, strict=True)
        if p is not None
    ]
    for name, a, b, c in zip(("y", "x", *given), got, true, plain, strict=True):
        assert_exact(a, b, c, what=f"{name} of {tuple(x.shape)} in {num_groups} groups")
    assert got[0].dtype == got[1].dtype == x.dtype
    assert got[0].stride() == got[1].stride() == torch.empty_like(x).stride()
    for p, gradient in zip([p for p in parameters if p is not None], got[2:], strict=True):
        assert gradient.dtype == p.dtype


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32(device, case, layout):
    shape, num_groups = case
    x, parameters = inputs(shape, torch.float32, device, layout, modulated=num_groups % 2 == 0)
    grad = in_layout(torch.randn(shape).to(device), LAYOUTS[LAYOUTS.index(layout) - 1])
    check(x, num_groups, parameters, grad)


@pytest.mark.matrix("forward", "backward")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {"silu": True, "affine": True, "modulated": True},
        {"silu": True, "affine": False, "modulated": True},
        {"silu": False, "affine": True, "modulated": False},
        {"silu": False, "affine": False, "modulated": False},
    ],
    ids=str,
)
def test_every_option(device, dtype, layout, options):
    shape, options = (3, 12, 5, 7), dict(options)
    silu = options.pop("silu")
    x, parameters = inputs(shape, dtype, device, layout, **options)
    check(x, 4, parameters, torch.randn(shape).to(device, dtype), silu=silu, eps=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES[-4:], ids=str)
def test_low_precision(device, dtype, case):
    shape, num_groups = case
    x, parameters = inputs(shape, dtype, device, "nhwc")
    check(x, num_groups, parameters, torch.randn(shape).to(device, dtype))


def random_case(draw: random.Random):
    """A small shape and its groups, often 1 in some direction."""
    num_groups, channels = draw.choice((1, 1, 2, 3, 5, 8)), draw.choice((1, 1, 2, 3, 4, 7, 16))
    h, w = (draw.choice((1, 2, 3, 8, 13, 16, 31)) for _ in "hw")
    return (draw.randint(1, 3), num_groups * channels, h, max(w, 2)), num_groups


@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(device, seed):
    draw = random.Random(seed)
    shape, num_groups = random_case(draw)
    dtype, layout = draw.choice(DTYPES), draw.choice(LAYOUTS)
    x, parameters = inputs(shape, dtype, device, layout, modulated=draw.random() < 0.5)
    grad = in_layout(torch.randn(shape).to(device, dtype), draw.choice(LAYOUTS))
    check(x, num_groups, parameters, grad, silu=draw.random() < 0.7)


@pytest.mark.parametrize("which", range(4))
def test_one_parameter_at_a_time(device, which):
    x, parameters = inputs((2, 6, 5, 3), torch.float32, device)
    parameters = [p if k == which else None for k, p in enumerate(parameters)]
    check(x, 3, parameters, torch.randn_like(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("mean", "spread"), [(30, 0.01), (1000, 0.1), (-1000, 1e-2), (0, 1e-3)])
def test_large_mean_with_small_spread(device, layout, mean, spread):
    """E[x^2] - E[x]^2 fails here; so does a mean in float32 whose rounding is not taken off."""
    shape = (2, 8, 17, 16)
    x = in_layout((torch.randn(shape) * spread + mean).to(device), layout)
    _, parameters = inputs(shape, torch.float32, device)
    got = gradients(lambda *a: fused(a[0], 2, *a[1:]), (x, *parameters), x)
    true = gradients(
        lambda *a: truth(a[0], 2, *a[1:]), list(map(double, (x, *parameters))), double(x)
    )
    assert_exact(got[0], true[0], ulps=16, what="y")
    for a, b in zip(got[1:], true[1:], strict=True):
        assert_exact(a, b, ulps=64, what="gradient")


@pytest.mark.parametrize("value", [0.0, 1.0, -3.3, 1e4])
def test_constant_groups(device, value):
    x = torch.full((2, 6, 5, 3), value).to(device)
    _, (weight, bias, scale, shift) = inputs(x.shape, torch.float32, device)
    y = fused(x, 3, weight, bias, scale, shift)
    expected = F.silu((1 + scale) * bias + shift)[:, :, None, None].expand_as(y)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    dx = gradients(lambda x: fused(x, 3, weight, bias, scale, shift), (x,), torch.randn_like(x))[1]
    assert dx.isfinite().all()


def test_saturated_silu(device):
    """Large arguments on both sides: neither overflow nor NaN, in the value and the gradient."""
    x, parameters = inputs((2, 4, 5, 5), torch.float32, device)
    parameters[0] = torch.tensor([1e3, -1e3, 30.0, 90.0]).to(device)
    check(x, 2, parameters, torch.randn_like(x))


def test_one_element_a_group(device):
    """silu(bias), where torch.nn.functional refuses; the gradient of x is 0 up to rounding."""
    x, parameters = inputs((2, 4, 1, 1), torch.float32, device)
    y, dx, dweight, *_ = gradients(
        lambda *a: fused(a[0], 4, *a[1:], eps=1e-2), (x, *parameters), torch.ones_like(x)
    )
    expected = truth(torch.zeros(2, 4, 1, 1), 4, *map(double, parameters))
    assert_exact(y, expected.double())
    torch.testing.assert_close(dx, torch.zeros_like(dx), rtol=0, atol=1e-4)
    assert torch.equal(dweight, torch.zeros_like(dweight))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_group(device, bad):
    x, parameters = inputs((2, 6, 5, 3), torch.float32, device)
    clean = fused(x, 3, *parameters)
    x[1, 2, 0, 0] = bad  # the second group of the second sample
    y = fused(x, 3, *parameters)
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask[1, 2:4] = True
    assert torch.equal(y[~mask], clean[~mask])
    assert y[mask].isnan().any()


@pytest.mark.parametrize("expand", ["scalar", "channels", "pixels"])
def test_expanded_gradients(device, expand):
    """Strides of 0, as the backward of sum() and of broadcasting makes them."""
    x, parameters = inputs((3, 6, 5, 4), torch.float32, device, "nhwc")
    shape = {"scalar": (1, 1, 1, 1), "channels": (1, 6, 1, 1), "pixels": (3, 1, 5, 4)}[expand]
    check(x, 3, parameters, torch.randn(shape).to(device).expand(x.shape))


def test_expanded_inputs(device):
    x, parameters = inputs((1, 6, 5, 4), torch.float32, device)
    x = x.expand(3, -1, -1, -1)
    weight, bias, scale, shift = parameters
    parameters = [weight[:1].expand(6), bias, scale.expand(3, -1), shift[:, :1].expand(3, 6)]
    got = fused(x, 3, *parameters)
    assert torch.equal(got, fused(x.clone(), 3, *(p.clone() for p in parameters)))


def test_parameters_with_strides(device):
    """As the two halves of one linear layer's output, and a column of a matrix."""
    x, _ = inputs((3, 6, 5, 4), torch.float32, device)
    both, affine = torch.randn(3, 12).to(device), torch.randn(6, 2).to(device)
    scale, shift = both.chunk(2, dim=1)
    got = fused(x, 3, affine[:, 0], affine[:, 1], scale, shift)
    copies = [p.clone() for p in (affine[:, 0], affine[:, 1], scale, shift)]
    assert torch.equal(got, fused(x, 3, *copies))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters_of_half_precision_images(device, dtype):
    """What a module sees under autocast; the gradients come in the parameters' dtype."""
    x, _ = inputs((3, 12, 5, 7), dtype, device, "nhwc")
    _, parameters = inputs((3, 12, 5, 7), torch.float32, device)
    check(x, 4, parameters, torch.randn(x.shape).to(device, dtype))


def test_under_autocast(device):
    x, parameters = inputs((2, 8, 5, 5), torch.bfloat16, device)
    weight, bias = (p.float().requires_grad_() for p in parameters[:2])
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = ops.group_norm_silu(x, 4, weight, bias)
        float_y = ops.group_norm_silu(x.float(), 4, weight, bias)
    assert y.dtype == torch.bfloat16
    assert float_y.dtype == torch.float32
    y.sum().backward()
    assert weight.grad.dtype == torch.float32
    assert torch.equal(y, ops.group_norm_silu(x, 4, weight, bias))


def test_the_same_tensor_twice(device):
    x = torch.randn(3, 6, 1, 1).to(device)
    p = torch.randn(6).to(device)

    def function(x, p):
        return fused(x, 3, p, p, x[:, :, 0, 0], x[:, :, 0, 0])

    def spelt_out(x, p):
        return truth(x, 3, p, p, x[:, :, 0, 0], x[:, :, 0, 0])

    grad = torch.randn_like(x)
    for a, b in zip(
        gradients(function, (x, p), grad),
        gradients(spelt_out, (double(x), double(p)), double(grad)),
        strict=True,
    ):
        torch.testing.assert_close(a.cpu(), b.float(), rtol=1e-4, atol=1e-4)


def test_a_sample_does_not_depend_on_its_batch(device):
    x, parameters = inputs((33, 6, 9, 7), torch.float32, device, "nhwc")
    weight, bias, scale, shift = parameters
    whole = fused(x, 3, *parameters)
    one = fused(x[7:8], 3, weight, bias, scale[7:8], shift[7:8])
    assert torch.equal(one, whole[7:8])


@pytest.mark.backends("cpu", "cuda", "triton")  # torch's own sums depend on the thread count
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_bits_do_not_depend_on_the_thread_count(device, layout):
    x, parameters = inputs((3, 64, 33, 31), torch.float32, device, layout)

    def function():
        results = gradients(lambda *a: fused(a[0], 16, *a[1:]), (x, *parameters), x)
        return torch.cat([result.flatten() for result in results])

    assert_same_for_any_thread_count(function)


@pytest.mark.parametrize("shape", [(3, 12), (3, 12, 5), (2, 12, 3, 2, 2)], ids=str)
def test_other_numbers_of_dimensions(backend, device, shape):
    if len(shape) > 4 and backend != "reference":
        with pytest.raises(ValueError, match="5 dimensions"):
            ops.group_norm_silu(torch.zeros(shape).to(device), 3, None, None)
        return
    x, grad = torch.randn(shape).to(device), torch.randn(shape).to(device)
    # Groups of four: the gradient of two values cancels, and so do its digits.
    parameters = [torch.randn(size).to(device) for size in ((12,), (12,), shape[:2], shape[:2])]
    got = gradients(lambda *a: fused(a[0], 3, *a[1:]), (x, *parameters), grad)
    true = gradients(
        lambda *a: truth(a[0], 3, *a[1:]), list(map(double, (x, *parameters))), double(grad)
    )
    for a, b in zip(got, true, strict=True):
        assert_exact(a, b, ulps=64)


def test_empty(device):
    for shape in ((0, 6, 4, 4), (2, 6, 0, 4)):
        x, weight = torch.rand(shape).to(device), torch.rand(6, requires_grad=True, device=device)
        scale = torch.rand(shape[0], 6, requires_grad=True, device=device)
        y = ops.group_norm_silu(x, 3, weight, None, scale=scale)
        assert y.shape == x.shape
        y.sum().backward()
        assert torch.equal(weight.grad, torch.zeros_like(weight))
        assert torch.equal(scale.grad, torch.zeros_like(scale))


def test_float64_goes_to_the_reference():
    x, parameters = inputs((3, 6, 5, 3), torch.float64, "cpu")
    assert torch.equal(fused(x, 3, *parameters), truth(x, 3, *parameters))


def test_the_gradient_can_be_differentiated():
    x, parameters = inputs((2, 4, 2, 2), torch.float64, "cpu")
    leaves = [p.requires_grad_() for p in (x, *parameters)]
    assert torch.autograd.gradgradcheck(lambda *a: fused(a[0], 2, *a[1:]), leaves, fast_mode=True)


X, P = torch.zeros(2, 6, 4, 4), torch.zeros(6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": X.byte()}, TypeError, "x must be one of float32, .*; got uint8"),
        ({"x": X[0, 0, 0]}, ValueError, r"x must be \(N, C, ...\); got \(4,\)"),
        ({"x": [1.0]}, TypeError, "x must be a tensor; got list"),
        ({"num_groups": 4}, ValueError, "num_groups must divide the 6 channels; got 4"),
        ({"num_groups": 0}, ValueError, "num_groups must divide the 6 channels; got 0"),
        ({"num_groups": True}, ValueError, "num_groups must divide the 6 channels; got True"),
        ({"num_groups": 2.0}, ValueError, "num_groups must divide the 6 channels; got 2.0"),
        ({"weight": P[:5]}, ValueError, r"weight must have shape \(6,\); got \(5,\)"),
        ({"weight": P.long()}, TypeError, "weight must be one of .*; got int64"),
        ({"weight": P.to("meta")}, ValueError, "weight must be on cpu .*; got meta"),
        ({"bias": X[0]}, ValueError, r"bias must have shape \(6,\); got \(6, 4, 4\)"),
        ({"scale": P}, ValueError, r"scale must have shape \(2, 6\); got \(6,\)"),
        ({"shift": X[..., 0]}, ValueError, r"shift must have shape \(2, 6\); got \(2, 6, 4\)"),
        ({"eps": -1e-6}, ValueError, "eps must be a number of at least 0; got -1e-06"),
        ({"eps": "1"}, ValueError, "eps must be a number of at least 0; got '1'"),
    ],
)
def test_bad_input(options, error, message):
    arguments = {"x": X, "num_groups": 3, "weight": P, "bias": P, **options}
    with pytest.raises(error, match=message):
        ops.group_norm_silu(**arguments)


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "slice"])
def test_registered_ops(layout):
    x, parameters = inputs((2, 6, 5, 3), torch.float32, "cpu", layout)
    weight, bias, scale, shift = parameters
    backward = torch.ops.fastddpm.group_norm_silu_backward.default
    opcheck(backward, (x.clone(), x, 3, weight, None, 1e-6, scale, None, True))
    x.requires_grad_(), weight.requires_grad_(), shift.requires_grad_()
    forward = torch.ops.fastddpm.group_norm_silu.default
    opcheck(forward, (x, 3, weight, bias, 1e-6, scale, shift, True))
    opcheck(forward, (x, 3, weight, None, 1e-6, None, None, False))


@pytest.mark.parametrize("modulated", [True, False])
def test_compiles_without_breaks(device, modulated):
    def function(x, *parameters):
        return F.relu(fused(x * 2, 3, *parameters)) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for size in (5, 7):  # the second shape makes it dynamic
        x, parameters = inputs((2, 6, size, 3), torch.float32, device, "nhwc", modulated=modulated)
        grad = torch.randn_like(x)
        for got, expected in zip(
            gradients(compiled, (x, *parameters), grad),
            gradients(function, (x, *parameters), grad),
            strict=True,
        ):
            assert torch.equal(got, expected)
            assert got.stride() == expected.stride()


def test_transforms():
    """torch.func and forward mode get the formula in plain torch: a kernel is opaque to them."""
    x, (weight, bias, _, _) = inputs((2, 6, 5, 3), torch.float32, "cpu")

    def loss(weight):
        return ops.group_norm_silu(x, 3, weight, bias).sum()

    leaf = weight.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(weight), grad)
    value, slope = torch.func.jvp(loss, (weight,), (bias,))
    torch.testing.assert_close(value, loss(weight))
    torch.testing.assert_close(slope, grad @ bias, rtol=1e-4, atol=1e-4)
    both = torch.vmap(loss)(torch.stack((weight, bias)))
    torch.testing.assert_close(both, torch.stack((loss(weight), loss(bias))))


def test_a_forced_kernel_refuses_transforms():
    x = torch.randn(2, 6, 5, 3)
    if dispatch.load("cpu").missing:
        pytest.skip(dispatch.load("cpu").missing)
    with ops.use_backend("cpu"), pytest.raises(ValueError, match="'cpu' was forced"):
        torch.func.grad(lambda x: ops.group_norm_silu(x, 3, None, None).sum())(x)
