"""noise: x_t ~ q(x_t | x_0), on every backend."""

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

from fastddpm import ops, reference
from fastddpm.ops import checks, library

SHAPES = (
    (1, 1, 1, 1),
    (2, 3, 7, 5),  # no multiple of any vector
    (257, 1, 4, 4),  # more samples than threads and blocks
    (2, 3, 33, 31),  # longer than a buffer
    (1, 70, 3, 5),  # more channels than pixels
)


def eager(x0, t, tab, eps, flip=None):
    if flip is not None:
        x0 = torch.where(flip[:, None, None, None], x0.flip(-1), x0)
    a, b = (tab[t, k].to(x0.dtype).reshape(-1, 1, 1, 1) for k in (0, 1))
    return a * x0 + b * eps


def images(shape, dtype):
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8)
    return (torch.rand(shape) * 2 - 1).to(dtype)


@pytest.mark.matrix("forward")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_float(device, shape, layout, dtype):
    x0 = in_layout(images(shape, dtype).to(device), layout)
    eps = in_layout(torch.randn(shape).to(device, dtype), LAYOUTS[LAYOUTS.index(layout) - 1])
    t, tab = timesteps(shape[0]).to(device), table(device=device)
    flip = torch.rand(shape[0], device=device) < 0.5
    xt, used = ops.noise(x0, t, tab, eps=eps, flip=flip)
    truth, _ = reference.noise(*map(double, (x0, t, tab)), eps=double(eps), flip=double(flip))
    assert_exact(xt, truth, eager(x0, t, tab, eps, flip))
    assert used is eps
    assert xt.dtype == dtype
    assert xt.stride() == torch.empty_like(x0).stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes(device, layout, dtype):
    x0 = images((5, 3, 9, 6), torch.uint8)
    x0[0, 0, 0, :2] = torch.tensor([0, 255])
    x0 = in_layout(x0.to(device), layout)
    eps, t = torch.randn(x0.shape).to(device, dtype), timesteps(5).to(device)
    tab = table(device=device)
    xt, _ = ops.noise(x0, t, tab, eps=eps)
    assert xt.dtype == dtype
    unit = (x0.cpu().double() / 127.5 - 1).to(device)
    truth, _ = reference.noise(*map(double, (unit, t, tab)), eps=double(eps))
    assert_exact(xt, truth, eager(unit.to(dtype), t, tab, eps))


@pytest.mark.parametrize("layout", ["nhwc", "slice"])
@pytest.mark.parametrize("x0_dtype", [torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_eps_that_is_not_kept_is_the_same(device, x0_dtype, dtype, layout):
    for k, shape in enumerate(((3, 3, 6, 5), (1, 3, 40, 32))):
        x0 = in_layout(images(shape, x0_dtype).to(device), layout)
        t, tab, n = timesteps(len(x0)).to(device), table(device=device), len(x0)
        stream = {"seed": 2**64 - 3, "sample_index": torch.arange(9, 9 + n).to(device), "step": 77}
        flip = torch.arange(n).to(device) % 2 == 0
        options = {**stream, "dtype": dtype, **({"flip": flip} if k else {})}
        kept, _ = ops.noise(x0, t, tab, **options)
        xt, eps = ops.noise(x0, t, tab, keep_eps=False, **options)
        assert eps is None
        assert torch.equal(xt, kept)
        assert xt.stride() == kept.stride()


def test_an_eps_that_is_not_kept_has_the_same_gradient(device):
    x0, grad = torch.randn(2, 3, 4, 4).to(device), torch.randn(2, 3, 4, 4).to(device)
    t, tab = timesteps(2).to(device), table(device=device)
    stream = {"seed": 1, "sample_index": torch.arange(2).to(device)}
    got, expected = (
        gradients(lambda x, keep=keep: ops.noise(x, t, tab, keep_eps=keep, **stream)[0], [x0], grad)
        for keep in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with pytest.raises(ValueError, match="keep_eps must be True or False"):
        ops.noise(x0, t, tab, keep_eps=0, **stream)
    opcheck(
        torch.ops.fastddpm.noised.default,
        (x0.cpu(), t.cpu(), tab.cpu(), 1, t.cpu(), torch.arange(2), None, torch.float32),
    )


@pytest.mark.parametrize("x0_dtype", [torch.uint8, *DTYPES])
@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_drawn(device, x0_dtype, dtype):
    x0, t = images((3, 3, 6, 5), x0_dtype).to(device), timesteps(3).to(device)
    tab, index = table(device=device), torch.tensor([7, 2**33, 0]).to(device)
    expected = dtype or (torch.float32 if x0_dtype == torch.uint8 else x0_dtype)
    xt, eps = ops.noise(x0, t, tab, seed=9, sample_index=index, dtype=dtype)
    assert xt.dtype == eps.dtype == expected
    z = ops.randn(x0.shape, seed=9, step=t, sample_index=index, dtype=expected)
    assert torch.equal(eps, z)
    assert torch.equal(xt, ops.noise(x0, t, tab, eps=eps, dtype=expected)[0])


def test_the_step_word_is_t_unless_given(device):
    x0, t = images((3, 1, 4, 4), torch.float32).to(device), timesteps(3).to(device)
    tab, stream = table(device=device), {"seed": 1, "sample_index": torch.arange(3).to(device)}
    step = torch.tensor([1000, 5, 0]).to(device)
    assert torch.equal(ops.noise(x0, t, tab, **stream)[1], ops.randn(x0.shape, step=t, **stream))
    assert torch.equal(
        ops.noise(x0, t, tab, step=step, **stream)[1], ops.randn(x0.shape, step=step, **stream)
    )
    assert torch.equal(
        ops.noise(x0, t, tab, step=8, **stream)[1], ops.randn(x0.shape, step=8, **stream)
    )


@pytest.mark.matrix("backward")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(device, dtype, layout):
    x0 = in_layout(images((3, 2, 5, 4), dtype).to(device), layout)
    eps = in_layout(torch.randn(3, 2, 5, 4).to(device, dtype), layout)
    t, tab = timesteps(3).to(device), table(device=device)
    flip = torch.tensor([True, False, True]).to(device)
    grad = torch.randn(()).to(device, dtype).expand(x0.shape)  # as from y.sum()
    got = gradients(lambda x, e: ops.noise(x, t, tab, eps=e, flip=flip)[0], (x0, eps), grad)
    plain = gradients(lambda x, e: eager(x, t, tab, e, flip), (x0, eps), grad)
    true = gradients(
        lambda x, e: reference.noise(x, t.cpu(), double(tab), eps=e, flip=flip.cpu())[0],
        (double(x0), double(eps)),
        double(grad),
    )
    for name, a, b, c in zip(("xt", "x0", "eps"), got, true, plain, strict=True):
        assert_exact(a, b, c, what=name)
        assert a.dtype == dtype


def test_gradients_of_one_input_only(device):
    x0, eps = images((2, 2, 3, 3), torch.float32).to(device), torch.randn(2, 2, 3, 3).to(device)
    t, tab = timesteps(2).to(device), table(device=device)
    weight = tab[t].reshape(2, 8, 1, 1, 1)[:, :2].expand(-1, -1, 2, 3, 3)
    stream = {"seed": 0, "sample_index": torch.arange(2).to(device)}
    leaf = x0.clone().requires_grad_()
    xt, drawn = ops.noise(leaf, t, tab, **stream)
    assert not drawn.requires_grad
    (xt.sum() + drawn.sum()).backward()
    torch.testing.assert_close(leaf.grad, weight[:, 0])
    leaf = eps.clone().requires_grad_()
    ops.noise((x0 * 127 + 128).byte(), t, tab, eps=leaf)[0].sum().backward()
    torch.testing.assert_close(leaf.grad, weight[:, 1])


def test_the_same_tensor_twice(device):
    x = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    t, tab = timesteps(2).to(device), table(device=device)
    ops.noise(x, t, tab, eps=x)[0].sum().backward()
    expected = (tab[t, 0] + tab[t, 1])[:, None, None, None].expand_as(x)
    torch.testing.assert_close(x.grad, expected)


def test_expanded_arguments(device):
    x0 = torch.rand(1, 2, 3, 3).to(device).expand(4, -1, -1, -1)
    t, tab = torch.tensor([500]).to(device).expand(4), table(device=device)
    eps = torch.randn(4, 2, 3, 3).to(device)
    xt, _ = ops.noise(x0, t, tab, eps=eps, flip=torch.tensor([True]).to(device).expand(4))
    again, _ = ops.noise(x0.flip(-1), t.clone(), tab, eps=eps)
    torch.testing.assert_close(xt, again, rtol=1e-6, atol=1e-6)


def test_empty(device):
    x0, t = torch.rand(0, 3, 4, 4).to(device), torch.zeros(0, dtype=torch.int64).to(device)
    tab = table(device=device)
    leaf = x0.clone().requires_grad_()
    for x in (x0, leaf, x0.byte()):
        xt, eps = ops.noise(x, t, tab, seed=0, sample_index=t)
        assert xt.shape == eps.shape == x0.shape
        assert ops.noise(x, t, tab, eps=x0)[0].shape == x0.shape


def test_float64_goes_to_the_reference():
    x0, t = images((3, 2, 4, 4), torch.float64), timesteps(3)
    eps = torch.randn_like(x0)
    tab = table(dtype=torch.float64)
    xt, _ = ops.noise(x0, t, tab, eps=eps)
    assert torch.equal(xt, reference.noise(x0, t, tab, eps=eps)[0])
    drawn, eps = ops.noise(x0, t, tab, seed=0, sample_index=torch.arange(3))
    assert drawn.dtype == eps.dtype == torch.float64
    drawn, eps = ops.noise(x0.byte(), t, table(), seed=0, sample_index=t, dtype=torch.float64)
    assert drawn.dtype == eps.dtype == torch.float64


X, T3, TABLE = torch.zeros(3, 2, 4, 4), torch.tensor([0, 5, 999]), table()
STREAM = {"seed": 0, "sample_index": torch.arange(3)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x0": X.numpy()}, TypeError, "x0 must be a tensor; got ndarray"),
        ({"x0": X.long()}, TypeError, "x0 must be one of .*; got int64"),
        ({"x0": X[0]}, ValueError, r"x0 must be \(N, C, H, W\); got \(2, 4, 4\)"),
        ({"x0": X[0].byte()}, ValueError, r"x0 must be \(N, C, H, W\); got \(2, 4, 4\)"),
        ({"t": torch.tensor([0, 5, 1000])}, ValueError, r"t must be in 0 .. 999; got 1000"),
        ({"t": torch.tensor([0, 5, -1])}, ValueError, r"t must be in 0 .. 999; got -1"),
        ({"t": T3.int()}, TypeError, "t must be int64; got int32"),
        ({"t": T3[:2]}, ValueError, r"t must have shape \(3,\); got \(2,\)"),
        ({"t": 5}, TypeError, "t must be a tensor; got int"),
        ({"t": T3.to("meta")}, ValueError, "t must be on cpu like the other tensors; got meta"),
        ({"table": TABLE[:, :7]}, ValueError, r"table must be \(T, 8\).*; got \(1000, 7\)"),
        ({"table": TABLE[0]}, ValueError, r"table must be \(T, 8\).*; got \(8,\)"),
        ({"table": TABLE.bfloat16()}, TypeError, "table must be float32 or float64; got bfloat16"),
        ({"eps": X[:2]}, ValueError, r"eps must have the shape of x0, \(3, 2, 4, 4\); got \(2, "),
        ({"eps": X.long()}, TypeError, "eps must be one of .*; got int64"),
        ({"eps": X.double()}, TypeError, "eps and x0 must both be float64 or neither"),
        ({"eps": X.to("meta")}, ValueError, "eps must be on cpu"),
        ({"eps": None}, ValueError, "give eps, or both seed and sample_index; got no seed"),
        ({"eps": None, "seed": 0}, ValueError, "got no sample_index"),
        ({"seed": 0}, ValueError, "give eps, or seed, sample_index and step; got both"),
        ({"step": 3}, ValueError, "give eps, or seed, sample_index and step; got both"),
        ({"eps": None, **STREAM, "seed": -1}, ValueError, "seed must be in 0"),
        ({"eps": None, **STREAM, "step": -1}, ValueError, "step must be in 0"),
        ({"eps": None, **STREAM, "step": -T3}, ValueError, "step must be in 0"),
        ({"eps": None, "seed": 0, "sample_index": -T3}, ValueError, "sample_index must be in 0"),
        ({"eps": None, "seed": 0, "sample_index": T3[:2]}, ValueError, "sample_index must have sh"),
        ({"flip": T3}, TypeError, "flip must be bool; got int64"),
        ({"flip": (T3 > 0)[:2]}, ValueError, r"flip must have shape \(3,\); got \(2,\)"),
        ({"dtype": torch.uint8}, TypeError, "dtype must be a float dtype; got torch.uint8"),
    ],
)
def test_bad_input(options, error, message):
    arguments = {"x0": X, "t": T3, "table": TABLE, "eps": X, **options}
    with pytest.raises(error, match=message):
        ops.noise(**arguments)


def test_t_outside_the_table_on_a_device(backend, device, monkeypatch):
    """Where its values are not read first the nearest row serves; C++ on the CPU reads them."""
    monkeypatch.setattr(library, "values_in", lambda *_: None)
    x0, eps = torch.randn(2, 4, 2, 5, 3).to(device)
    outside = torch.tensor([-1, 1000, -(2**40), 2**40]).to(device)
    nearest, tab = torch.tensor([0, 999, 0, 999]).to(device), table(device=device)
    if backend == "cpu":
        with pytest.raises(ValueError, match=r"t must lie in 0 .. 999; t\[0\] is -1"):
            ops.noise(x0, outside, tab, eps=eps)
        return
    got, expected = (
        gradients(lambda x0, t=t: ops.noise(x0, t, tab, eps=eps)[0], (x0,), eps)
        for t in (outside, nearest)
    )
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


class OnDevice(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    device = property(lambda self: torch.device("cuda", 0))  # type: ignore[assignment]


def test_strict_reads_the_t_of_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    t = torch.tensor([0, 5, 1000]).as_subclass(OnDevice)
    monkeypatch.delenv("FASTDDPM_STRICT", raising=False)
    checks.values_in("t", t, 1000, "999")
    monkeypatch.setenv("FASTDDPM_STRICT", "1")
    checks.values_in("t", t, 1001, "1000")
    with pytest.raises(ValueError, match=r"t must be in 0 .. 999; got 1000"):
        checks.values_in("t", t, 1000, "999")
    # What a graph captures runs later, with other values.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    checks.values_in("t", t, 1000, "999")


def test_registered_ops():
    x0 = torch.randn(3, 2, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    eps, t, tab = torch.randn(3, 2, 4, 5, requires_grad=True), timesteps(3), table()
    flip, index = torch.tensor([True, False, True]), torch.arange(3)
    opcheck(torch.ops.fastddpm.noise.default, (x0, t, tab, eps, flip, torch.float32))
    opcheck(torch.ops.fastddpm.noise.default, (x0, t, tab, eps, None, torch.bfloat16))
    drawn = torch.ops.fastddpm.drawn_noise.default
    opcheck(drawn, (x0, t, tab, 5, t, index, flip, torch.float32))
    opcheck(drawn, (x0.detach().byte(), t, tab, 5, t, index, None, torch.float32))


@pytest.mark.parametrize("drawn", [True, False])
def test_compiles_without_breaks(device, drawn):
    t, tab = timesteps(3).to(device), table(device=device)
    eps, index = torch.randn(3, 2, 4, 5).to(device), torch.arange(3).to(device)
    noise = {"seed": 5, "sample_index": index} if drawn else {"eps": eps}

    def function(x0):
        xt, eps = ops.noise(x0, t, tab, **noise)
        return xt * 2 + eps

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for size in (3, 5):  # the second shape makes it dynamic
        x0 = torch.randn(3, 2, 4, size).to(device)
        if not drawn:
            noise["eps"] = torch.randn_like(x0)
        grad = torch.randn_like(x0)
        for got, expected in zip(
            gradients(compiled, (x0,), grad), gradients(function, (x0,), grad), strict=True
        ):
            assert torch.equal(got, expected)
