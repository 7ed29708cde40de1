"""squared_error and its gradient, on every backend."""

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
    require,
)
from torch.library import opcheck

from fastddpm import ops, reference


@pytest.fixture(autouse=True)
def _can(request):
    if "backend" in request.fixturenames:
        require("squared_error", request.getfixturevalue("backend"))


def inputs(shape, dtype, device, layout="nhwc", other=None):
    """(prediction, target); other: the dtype of the latter, whose layout is another one."""
    another = LAYOUTS[LAYOUTS.index(layout) - 1] if other else layout
    pair = []
    for of, order in ((dtype, layout), (other or dtype, another)):
        x = torch.randn(shape).to(device, of)
        pair.append(in_layout(x, order) if x.dim() == 4 else x)
    return pair


def check(tensors, grad):
    """Sums and squares are float64's, rounded once; gradients are rounded three times."""
    got = gradients(ops.squared_error, tensors, grad)
    true = gradients(reference.squared_error, list(map(double, tensors)), double(grad))
    torch.testing.assert_close(got[0].cpu().double(), true[0], rtol=1e-6, atol=0)
    assert got[0].dtype == torch.float32
    for a, b, x in zip(got[1:], true[1:], tensors, strict=True):
        assert_exact(a, b, what="gradient")
        assert a.dtype == x.dtype
        assert a.stride() == torch.empty_like(x).stride()


@pytest.mark.matrix("forward", "backward")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", [None, torch.float16, torch.bfloat16], ids=str)
def test_every_option(device, dtype, layout, other):
    tensors = inputs((3, 8, 3, 4), dtype, device, layout, other)
    check(tensors, torch.randn(3).to(device))


@pytest.mark.parametrize(
    "shape",
    [(3, 1, 1, 1), (257, 3, 2, 2), (1, 40, 31, 33), (2, 3, 130, 129), (1, 1500, 1, 2)],
    ids=str,
)
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "slice"])
def test_shapes(device, shape, layout):
    check(inputs(shape, torch.float32, device, layout), torch.randn(shape[0]).to(device))


@pytest.mark.parametrize("shape", [(5,), (3, 7), (3, 7, 5)], ids=str)
def test_other_numbers_of_dimensions(device, shape):
    check(inputs(shape, torch.float32, device), torch.randn(shape[0]).to(device))


def test_five_dimensions_are_the_references():
    check(inputs((2, 3, 2, 3, 2), torch.float32, "cpu"), torch.randn(2))


def test_expanded(device):
    """Strides of 0 in all that is read: the gradient of a mean over the batch is such."""
    prediction, target = inputs((3, 6, 5, 4), torch.float32, device)
    prediction, target = prediction[:1].expand(3, -1, -1, -1), target[:, :1].expand(-1, 6, -1, -1)
    got = ops.squared_error(prediction, target)
    torch.testing.assert_close(got, ops.squared_error(prediction.clone(), target.clone()))
    check([prediction, target], torch.tensor(0.3).to(device).expand(3))


def test_as_torch_computes_it(device):
    """Exact sums where float32's would be of a few large and many small squares."""
    prediction = torch.full((2, 3, 64, 64), 1e-3).to(device)
    prediction[:, 0, 0, 0] = 1000
    target = torch.zeros_like(prediction)
    exact = (prediction.cpu().double() ** 2).mean(dim=(1, 2, 3))
    got = ops.squared_error(prediction, target).cpu()
    torch.testing.assert_close(got.double(), exact, rtol=1e-7, atol=0)


def test_what_is_not_finite(device):
    prediction, target = inputs((4, 3, 8, 8), torch.float32, device)
    for n, value in enumerate((torch.nan, torch.inf, 1e30)):
        prediction[n, 1, 2, 3] = value
    got = ops.squared_error(prediction, target).cpu()
    assert got[:3].isfinite().tolist() == [False, False, False]
    assert got[0].isnan()
    assert torch.equal(got[3:], ops.squared_error(prediction[3:], target[3:]).cpu())


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_sample_does_not_depend_on_its_batch(device, layout):
    for size in (9, 160):
        prediction, target = inputs((3, 6, size, 7), torch.bfloat16, device, layout)
        whole = ops.squared_error(prediction, target)
        assert torch.equal(ops.squared_error(prediction[1:2], target[1:2]), whole[1:2])


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "slice"])
def test_bits_do_not_depend_on_the_thread_count(device, layout):
    tensors = inputs((3, 40, 33, 31), torch.float32, device, layout)
    grad = torch.randn(3)
    assert_same_for_any_thread_count(lambda: ops.squared_error(*tensors))
    assert_same_for_any_thread_count(lambda: gradients(ops.squared_error, tensors, grad)[1])


def test_empty(device):
    for shape, value in (((0, 3, 4, 4), []), ((2, 3, 0, 4), [torch.nan, torch.nan])):
        tensors = inputs(shape, torch.float32, device, "nchw")
        error, *grads = gradients(ops.squared_error, tensors, torch.ones(shape[0]).to(device))
        torch.testing.assert_close(error.cpu(), torch.tensor(value), equal_nan=True)
        assert all(grad.shape == shape for grad in grads)


def test_only_what_is_asked_for_has_a_gradient(device):
    """Of a target that is data none is computed."""
    prediction, target = inputs((2, 3, 4, 4), torch.float32, device)
    loss = ops.squared_error(prediction.requires_grad_(), target).mean()
    loss.backward()
    torch.testing.assert_close(prediction.grad, (prediction.detach() - target) / 48)
    assert target.grad is None
    with torch.no_grad():
        assert ops.squared_error(prediction, target).grad_fn is None


def test_float64_goes_to_the_reference():
    tensors = inputs((2, 3, 4, 4), torch.float64, "cpu")
    assert torch.equal(ops.squared_error(*tensors), reference.squared_error(*tensors))
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(ops.squared_error, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(ops.squared_error, leaves, fast_mode=True)


def test_a_gradient_of_the_gradient(device):
    """create_graph=True, in float32."""
    tensors = [x.requires_grad_() for x in inputs((2, 3, 4, 4), torch.float32, device)]

    def twice(tensors, function):
        (grad,) = torch.autograd.grad(function(*tensors).sum(), tensors[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), tensors)

    exact = [x.detach().cpu().double().requires_grad_() for x in tensors]
    for got, true in zip(
        twice(tensors, ops.squared_error), twice(exact, reference.squared_error), strict=True
    ):
        assert_exact(got, true)


X = torch.zeros(2, 6, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.byte(), X), TypeError, "prediction must be one of float32, .*; got uint8"),
        ((X.sum(), X.sum()), ValueError, r"prediction must be \(N, ...\); got \(\)"),
        (([1.0], X), TypeError, "prediction must be a tensor; got list"),
        ((X, X[:1]), ValueError, r"target must have .*\(2, 6, 4, 4\); got \(1, 6, 4, 4\)"),
        ((X, X.long()), TypeError, "target must be one of .*; got int64"),
        ((X, X.double()), TypeError, "target and prediction must both be float64 or neither"),
        ((X, X.to("meta")), ValueError, "target must be on cpu .*; got meta"),
        ((X, None), TypeError, "target must be a tensor; got NoneType"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.squared_error(*arguments)


def test_registered_op():
    prediction, target = inputs((2, 3, 4, 4), torch.float32, "cpu", "slice")
    op = torch.ops.fastddpm.squared_error.default
    opcheck(op, (prediction.requires_grad_(), target))
    opcheck(op, (prediction, target.requires_grad_()))
    gradient = torch.ops.fastddpm.squared_error_backward.default
    opcheck(gradient, (torch.randn(2), prediction.detach(), target.detach()))


def test_compiles_without_breaks(device):
    def function(prediction, target):
        return ops.squared_error(prediction * 2, target) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    tensors, grad = inputs((2, 6, 5, 3), torch.float32, device), torch.randn(2).to(device)
    expected = gradients(function, tensors, grad)
    for got, value in zip(gradients(compiled, tensors, grad), expected, strict=True):
        torch.testing.assert_close(got, value)
