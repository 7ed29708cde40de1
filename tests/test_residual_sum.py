"""residual_sum and its gradient, on every backend."""

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
        require("residual_sum", request.getfixturevalue("backend"))


def inputs(shape, dtype, device, layout="nhwc", residual=True, before="rows", other=None):
    """[x, residual, before]; other: the dtype of the latter two."""
    n, c = shape[:2]
    k, other = LAYOUTS.index(layout), other or dtype

    def images(dtype, layout):
        x = torch.randn(shape).to(device, dtype)
        return in_layout(x, layout) if x.dim() == 4 else x

    sizes = {"column": (c,), "rows": (n, c), "one": (n, 1)}
    offset = torch.randn(sizes[before]).to(device, other) if before else None
    return [
        images(dtype, layout),
        images(other, LAYOUTS[k - 1]) if residual else None,
        offset.expand(n, c) if before == "one" else offset,
    ]


def check(tensors, grad):
    """The sum is rounded once; the gradients are those of float64 but for their storage."""
    got = gradients(ops.residual_sum, tensors, grad)
    true = gradients(reference.residual_sum, list(map(double, tensors)), double(grad))
    assert_exact(got[0], true[0], ulps=1, what="u")
    assert got[0].dtype == tensors[0].dtype
    assert got[0].stride() == torch.empty_like(tensors[0]).stride()
    given = [x for x in tensors if x is not None]
    for a, b, x in zip(got[1:], true[1:], given, strict=True):
        assert_exact(a, b, what="gradient")
        assert a.dtype == x.dtype


@pytest.mark.matrix("forward", "backward")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {"before": None},
        {"before": "column", "residual": False},
        {"before": "rows"},
        {"before": "one", "other": torch.float16},
        {"before": "column", "other": torch.bfloat16},
    ],
    ids=str,
)
def test_every_option(device, dtype, layout, options):
    tensors = inputs((2, 7, 3, 5), dtype, device, layout, **options)
    grad = in_layout(torch.randn(2, 7, 3, 5).to(device, dtype), LAYOUTS[LAYOUTS.index(layout) - 2])
    check(tensors, grad)


@pytest.mark.parametrize(
    "shape",
    [(3, 1, 1, 1), (257, 3, 2, 2), (1, 40, 31, 33), (1, 1500, 1, 2), (2, 3, 70, 9)],
    ids=str,
)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_shapes(device, shape, layout):
    check(inputs(shape, torch.float32, device, layout), torch.randn(shape).to(device))


@pytest.mark.parametrize("shape", [(3, 7), (3, 7, 5)], ids=str)
def test_other_numbers_of_dimensions(device, shape):
    check(inputs(shape, torch.float32, device), torch.randn(shape).to(device))


def test_expanded(device):
    """Strides of 0 in what is read."""
    x, residual, before = inputs((3, 6, 5, 4), torch.float32, device)
    x, residual = x[:1].expand(3, -1, -1, -1), residual[:, :1].expand(-1, 6, -1, -1)
    got = ops.residual_sum(x, residual, before)
    assert torch.equal(got, ops.residual_sum(x.clone(), residual.clone(), before))
    check([x, residual, before], torch.randn(()).to(device).expand(3, 6, 5, 4))


def test_a_sample_does_not_depend_on_its_batch(device):
    x, residual, before = inputs((33, 6, 9, 7), torch.bfloat16, device)
    whole = ops.residual_sum(x, residual, before)
    one = ops.residual_sum(x[7:8], residual[7:8], before[7:8])
    assert torch.equal(one, whole[7:8])


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_bits_do_not_depend_on_the_thread_count(device, layout):
    tensors = inputs((3, 40, 33, 31), torch.float32, device, layout)
    assert_same_for_any_thread_count(lambda: ops.residual_sum(*tensors))


def test_empty(device):
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        tensors = inputs(shape, torch.float32, device, "nchw", before="column")
        grad = torch.zeros(shape).to(device)
        u, dx, dresidual, dbefore = gradients(ops.residual_sum, tensors, grad)
        assert u.shape == dx.shape == dresidual.shape == shape
        assert torch.equal(dbefore.cpu(), torch.zeros(3))


def test_float64_goes_to_the_reference():
    tensors = inputs((2, 3, 4, 4), torch.float64, "cpu")
    assert torch.equal(ops.residual_sum(*tensors), reference.residual_sum(*tensors))
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradgradcheck(ops.residual_sum, leaves, fast_mode=True)


X, P = torch.zeros(2, 6, 4, 4), torch.zeros(6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.byte(),), TypeError, "x must be one of float32, .*; got uint8"),
        ((P,), ValueError, r"x must be \(N, C, ...\); got \(6,\)"),
        (([1.0],), TypeError, "x must be a tensor; got list"),
        ((X, X[:1]), ValueError, r"residual must have .*\(2, 6, 4, 4\); got \(1, 6, 4, 4\)"),
        ((X, X.long()), TypeError, "residual must be one of .*; got int64"),
        ((X, X.to("meta")), ValueError, "residual must be on cpu .*; got meta"),
        ((X, None, P[1:]), ValueError, r"before must have shape \(6,\) or \(2, 6\); got \(5,\)"),
        ((X, None, P.int()), TypeError, "before must be one of .*; got int32"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.residual_sum(*arguments)


def test_registered_op():
    x, residual, before = (
        t.requires_grad_() for t in inputs((2, 3, 4, 4), torch.float32, "cpu", "slice")
    )
    op = torch.ops.fastddpm.residual_sum.default
    opcheck(op, (x, residual, before))
    opcheck(op, (x, None, None))


def test_compiles_without_breaks(device):
    def function(*tensors):
        return torch.relu(ops.residual_sum(*tensors)) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    tensors = inputs((2, 6, 5, 3), torch.float32, device)
    grad = torch.randn_like(tensors[0])
    expected = gradients(function, tensors, grad)
    for got, value in zip(gradients(compiled, tensors, grad), expected, strict=True):
        assert torch.equal(got, value)
        assert got.stride() == value.stride()
