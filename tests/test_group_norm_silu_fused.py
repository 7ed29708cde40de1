"""What group_norm_silu takes in beside its norm, on every backend: a value per channel and a
residual before it, a second source, dropout after it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import (
    DTYPES,
    LAYOUTS,
    assert_exact,
    assert_same_for_any_thread_count,
    double,
    in_layout,
    require,
)
from torch.library import opcheck

from fastddpm import ops, reference

NAMES = ("x", "before", "residual", "x2", "weight", "bias", "scale", "shift")


@pytest.fixture(autouse=True)
def _can(request):
    """A backend that says that it can't take these in skips or fails, as one that is missing."""
    if "backend" in request.fixturenames:
        require("group_norm_silu", request.getfixturevalue("backend"), fused=True)


def stream(n: int, device, p=0.3) -> dict:
    return {
        "dropout": p,
        "seed": 2**64 - 5,
        "step": torch.arange(n, device=device) * 7 + 2**31,
        "sample_index": torch.arange(n, device=device) + 2**40,
    }


def inputs(
    shape, c2, dtype, device, layout="nhwc", *,
    before=None, residual=False, modulated=False, other=None,
):  # fmt: skip
    """The tensors by name, those that are not given as None. other: the dtype of all but x."""
    n, c1, *pixels = shape
    other = other or dtype
    k = LAYOUTS.index(layout)
    shapes = {"column": (c1,), "rows": (n, c1), "expanded": (1, c1), "one": (n, 1)}

    def draw(*shape, dtype=other, layout=None, mean=0.0):
        x = (torch.randn(shape) * 0.7 + mean).to(device, dtype)
        return x if layout is None or len(shape) != 4 else in_layout(x, layout)

    tensors = dict.fromkeys(NAMES)
    tensors["x"] = draw(*shape, dtype=dtype, layout=layout, mean=-2.3)
    if before:
        tensors["before"] = draw(*shapes[before])
        if before in ("expanded", "one"):
            tensors["before"] = tensors["before"].expand(n, c1)
    if residual:
        tensors["residual"] = draw(*shape, layout=LAYOUTS[k - 2], mean=0.8)
    if c2:
        tensors["x2"] = draw(n, c2, *pixels, layout=LAYOUTS[k - 1], mean=1.1)
    tensors["weight"], tensors["bias"] = draw(c1 + c2), draw(c1 + c2)
    if modulated:
        tensors["scale"], tensors["shift"] = draw(n, c1 + c2), draw(n, c1 + c2)
    return tensors


def fused(x, num_groups, *, weight, bias, **options):
    return ops.group_norm_silu(x, num_groups, weight, bias, **options)


def per_pixel(value, x):
    return value.reshape(*value.shape, *[1] * (x.dim() - 2))


def eager(
    x, num_groups, *, weight, bias, before=None, residual=None, x2=None, scale=None, shift=None,
    silu=True, eps=1e-6, **dropout,
):  # fmt: skip
    """Eager torch, all in the dtype of x."""
    like = {"dtype": x.dtype}
    u = x if residual is None else x + residual.to(**like)
    if before is not None:
        u = u + per_pixel(before.to(**like), x)
    h = u if x2 is None else torch.cat((u, x2.to(**like)), 1)
    y = torch.group_norm(h, num_groups, weight.to(**like), bias.to(**like), eps)
    if scale is not None:
        y = y * (1 + per_pixel(scale.to(**like), x)) + per_pixel(shift.to(**like), x)
    y = F.silu(y) if silu else y
    if dropout.pop("dropout", 0):
        y = y * kept(y, **dropout) / 0.7
    return y if residual is None else (y, u)


def kept(y, *, seed, step, sample_index, p=0.3):
    """By the definition, and not by reference.dropout_factors: 1 where an element is kept."""
    n, c, *pixels = y.shape
    numel = y[0].numel()
    words = reference.random_words(numel, seed=seed, step=step, sample_index=sample_index)
    mask = (words[:, :numel] >= int(p * 2**32)).reshape(n, *pixels, c)
    return mask.movedim(-1, 1).to(y.dtype)


def truth_of(u):
    """The reference, normalising the rounded sum u that was written, if there is one."""

    def truth(x, num_groups, *, weight, bias, before=None, residual=None, **options):
        if residual is None:
            return reference.group_norm_silu(x, num_groups, weight, bias, before=before, **options)
        exact = reference.residual_sum(x, residual, before)
        rounded = exact + (double(u) - exact).detach()
        y = reference.group_norm_silu(rounded, num_groups, weight, bias, **options)
        return y, rounded

    return truth


def results(function, tensors, num_groups, grads, **options):
    """Outputs by name, and the gradients of all tensors, where each output has its gradient."""
    given = {name: x.detach().requires_grad_() for name, x in tensors.items() if x is not None}
    out = function(num_groups=num_groups, **given, **options)
    out = dict(zip("yu", out if isinstance(out, tuple) else (out,), strict=False))
    used = [name for name in out if grads.get(name) is not None]
    found = torch.autograd.grad(
        [out[name] for name in used], list(given.values()), [grads[name] for name in used],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return {**out, **{f"d{name}": g for name, g in zip(given, found, strict=True)}}


def check(tensors, num_groups, grads, *, ulps=4, **options):
    """Outputs and all gradients against float64, allowing what eager torch errs."""
    got = results(fused, tensors, num_groups, grads, **options)
    plain = results(eager, tensors, num_groups, grads, **options)
    exact = {name: double(x) for name, x in tensors.items()}
    exact_grads = {name: double(x) for name, x in grads.items()}
    exact_options = {name: double(x) for name, x in options.items()}
    true = results(truth_of(got.get("u")), exact, num_groups, exact_grads, **exact_options)
    for name, value in got.items():
        assert_exact(value, true[name], plain[name], ulps=ulps, what=name)
    x = tensors["x"]
    if "u" in got:
        exact_u = reference.residual_sum(exact["x"], exact["residual"], exact["before"])
        assert_exact(got["u"], exact_u, ulps=1, what="u")
        assert got["u"].dtype == x.dtype
        assert got["u"].stride() == torch.empty_like(x).stride()
    like = reference.with_channels(x, got["y"].shape[1]) if tensors["x2"] is not None else x
    assert got["y"].dtype == x.dtype
    assert got["y"].stride() == torch.empty_like(like).stride()
    for name, tensor in tensors.items():
        if tensor is not None:
            assert got[f"d{name}"].dtype == tensor.dtype
    return got


def gradients_for(tensors, layout="nhwc"):
    """Random gradients of y and, with a residual, of u."""
    x, x2 = tensors["x"], tensors["x2"]
    shape = [x.shape[0], x.shape[1] + (0 if x2 is None else x2.shape[1]), *x.shape[2:]]
    grads = {"y": torch.randn(shape).to(x)}
    if tensors["residual"] is not None:
        grads["u"] = torch.randn(x.shape).to(x)
    if x.dim() == 4:
        grads = {name: in_layout(g, layout) for name, g in grads.items()}
    return grads


# 7 + 5 channels in groups of three or four: one spans the border of the two sources.
OPTIONS = (
    {"before": "column"},
    {"before": "rows", "residual": True, "modulated": True},
    {"residual": True, "dropout": True},
    {"c2": 5, "modulated": True},
    {"before": "expanded", "c2": 5, "dropout": True, "mixed": True},
    {"before": "one", "residual": True, "c2": 5, "dropout": True, "modulated": True, "mixed": True},
)


@pytest.mark.matrix("forward", "backward")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o))
def test_every_option(device, dtype, layout, options):
    options = dict(options)
    c2, dropout = options.pop("c2", 0), options.pop("dropout", False)
    if options.pop("mixed", False):
        options["other"] = DTYPES[DTYPES.index(dtype) - 1]
    shape, groups = (2, 7 if c2 else 12, 3, 5), 3 if dropout else 4
    tensors = inputs(shape, c2, dtype, device, layout, **options)
    grads = gradients_for(tensors, LAYOUTS[LAYOUTS.index(layout) - 3])
    check(tensors, groups, grads, eps=1e-3, **(stream(2, device) if dropout else {}))


@pytest.mark.parametrize(
    ("shape", "c2", "groups"),
    [
        ((2, 1, 1, 1), 3, 1),
        ((3, 6, 1, 1), 3, 1),
        ((257, 2, 2, 3), 2, 2),  # more samples than threads and blocks
        ((1, 40, 9, 11), 56, 32),  # three channels a group
        ((1, 2, 40, 21), 1, 1),  # longer than the buffers
        ((1, 20, 17, 25), 44, 16),  # and than a block
        ((1, 300, 3, 2), 20, 32),  # more channels than a line
    ],
    ids=str,
)
def test_shapes(device, shape, c2, groups):
    tensors = inputs(shape, c2, torch.float32, device, before="rows", residual=True, modulated=True)
    check(tensors, groups, gradients_for(tensors), silu=groups != 2, **stream(shape[0], device))


@pytest.mark.parametrize("which", ["y", "u"])
def test_one_output_is_used(device, which):
    tensors = inputs((2, 7, 3, 5), 5, torch.float32, device, before="column", residual=True)
    grads = gradients_for(tensors)
    check(tensors, 4, {which: grads[which]})


def test_expanded_gradients(device):
    """Strides of 0, as the backward of sum() and of broadcasting makes them."""
    tensors = inputs((3, 7, 3, 5), 5, torch.float32, device, before="rows", residual=True)
    grad = torch.randn(1, 12, 1, 1).to(device), torch.randn(()).to(device)
    grads = {"y": grad[0].expand(3, 12, 3, 5), "u": grad[1].expand(3, 7, 3, 5)}
    check(tensors, 4, grads, **stream(3, device))


@pytest.mark.parametrize("shape", [(3, 7), (3, 7, 5)], ids=str)
def test_other_numbers_of_dimensions(device, shape):
    tensors = inputs(shape, 5, torch.float32, device, before="rows", residual=True)
    # Groups of six: the gradient of two values cancels, and so do its digits.
    check(tensors, 2, gradients_for(tensors), ulps=64, **stream(3, device))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_large_values_before(device, layout):
    """A bias far from 0 takes no digit of x: it is a mean, and the spread is small beside it."""
    shape = (2, 8, 5, 4)
    tensors = inputs(shape, 4, torch.float32, device, layout, before="rows")
    tensors["before"] = tensors["before"] * 0.1 + 300
    tensors["x2"] = tensors["x2"] + 300
    exact = {name: double(x) for name, x in tensors.items()}
    true = results(truth_of(None), exact, 3, {"y": torch.ones(2, 12, 5, 4).double()})
    got = results(fused, tensors, 3, {"y": torch.ones(2, 12, 5, 4).to(device)})
    # An ulp of 300 is 128 of those of the spread.
    for name in ("y", "dx2", "dweight"):
        assert_exact(got[name], true[name], ulps=1000, what=name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("c2", [0, 5])
def test_dropout_keeps_what_the_words_say(device, layout, c2):
    """The same elements in every layout, forward and backward; p = 1/4 scales exactly by 4/3."""
    tensors = inputs((3, 7, 3, 5), c2, torch.float32, device, layout, modulated=True)
    options = stream(3, device, p=0.25)
    groups = 4 if c2 else 7
    whole = fused(num_groups=groups, **tensors, silu=False)
    tensors["shift"].requires_grad_()
    y = fused(num_groups=groups, **tensors, silu=False, **options)
    mask = kept(y.cpu(), p=0.25, **{k: double(v) for k, v in options.items() if k != "dropout"})
    assert 0 < mask.sum() < mask.numel()
    torch.testing.assert_close(y.cpu(), whole.cpu() * mask / 0.75, rtol=1e-6, atol=1e-6)
    assert torch.equal(y.cpu() == 0, mask == 0)
    (dshift,) = torch.autograd.grad(y.sum(), tensors["shift"])
    torch.testing.assert_close(dshift.cpu(), mask.sum((2, 3)) / 0.75)


def test_dropout_preserves_the_mean(device):
    x = torch.zeros(4, 8, 8, 8).to(device)
    weight, bias = torch.zeros(8).to(device), torch.ones(8).to(device)
    for p in (0.1, 0.9):
        y = fused(x, 2, weight=weight, bias=bias, silu=False, **stream(4, device, p=p))
        spread = (p / (1 - p) / y.numel()) ** 0.5
        assert abs(y.mean().item() - 1) < 4 * spread
        assert y.unique().numel() == 2


def test_dropout_draws_by_seed_step_and_index(device):
    tensors = inputs((2, 8, 3, 4), 0, torch.float32, device)
    base = {"dropout": 0.5, "seed": 1, "step": 2, "sample_index": torch.tensor([3, 4])}
    base["sample_index"] = base["sample_index"].to(device)

    def zeros(**options):
        return fused(num_groups=2, **tensors, **{**base, **options}) == 0

    first = zeros()
    assert torch.equal(first, zeros())
    assert torch.equal(first[1], zeros(sample_index=base["sample_index"] + 1)[0])
    for change in ({"seed": 2**63 + 1}, {"step": 2**32 - 2}, {"seed": 2}):
        assert not torch.equal(first, zeros(**change))
    assert not torch.equal(first[0], first[1])
    assert not zeros(dropout=1e-12).any()  # of 2^32 words none is so small


def test_a_sample_does_not_depend_on_its_batch(device):
    tensors = inputs((33, 7, 9, 7), 5, torch.float32, device, before="rows", residual=True)
    options = stream(33, device)
    grads = gradients_for(tensors)

    def run(rows):
        cut = {k: x if x is None or x.dim() == 1 else x[rows] for k, x in tensors.items()}
        cut_options = {k: x[rows] if torch.is_tensor(x) else x for k, x in options.items()}
        return results(fused, cut, 4, {k: g[rows] for k, g in grads.items()}, **cut_options)

    whole, one = run(slice(None)), run(slice(7, 8))
    for name in ("y", "u", "dx", "dresidual", "dx2", "dbefore"):
        assert torch.equal(one[name], whole[name][7:8]), name


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("residual", [False, True])
def test_bits_do_not_depend_on_the_thread_count(device, layout, residual):
    tensors = inputs(
        (3, 40, 33, 31), 24, torch.float32, device, layout, before="rows", residual=residual
    )
    grads = gradients_for(tensors)

    def function():
        found = results(fused, tensors, 16, grads, **stream(3, device))
        return torch.cat([x.flatten() for x in found.values()])

    assert_same_for_any_thread_count(function)


@pytest.mark.backends("cpu")
def test_sums_over_samples_do_not_depend_on_the_thread_count(device):
    tensors = inputs((1000, 37, 1, 1), 1, torch.float32, device, before="column")
    grads = gradients_for(tensors)
    assert_same_for_any_thread_count(lambda: results(fused, tensors, 2, grads)["dbefore"])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["x", "before", "residual", "x2"])
def test_what_is_not_finite_stays_in_its_group(device, bad, place):
    tensors = inputs((2, 4, 3, 3), 2, torch.float32, device, before="rows", residual=True)
    clean, _ = fused(num_groups=3, **tensors)
    tensors[place][1, 0] = bad
    y, u = fused(num_groups=3, **tensors)
    mask = torch.zeros_like(y, dtype=torch.bool)
    mask[1, 4 : 6 if place == "x2" else 2] = True
    if place != "x2":
        mask[1] = False
        mask[1, :2] = True
        assert not u[1, 0].isfinite().all()
    assert torch.equal(y[~mask], clean[~mask])
    assert y[mask].isnan().any()


def test_empty(device):
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        tensors = inputs(shape, 3, torch.float32, device, "nchw", before="rows", residual=True)
        found = results(fused, tensors, 2, gradients_for(tensors), **stream(shape[0], device))
        assert found["y"].shape == (shape[0], 6, *shape[2:])
        assert found["u"].shape == shape
        for name in ("before", "weight", "bias"):
            assert torch.equal(found[f"d{name}"], torch.zeros_like(tensors[name]))


def test_float64_goes_to_the_reference():
    tensors = inputs((2, 7, 3, 5), 5, torch.float64, "cpu", before="rows", residual=True)
    x, weight, bias = (tensors.pop(name) for name in ("x", "weight", "bias"))
    got = ops.group_norm_silu(x, 4, weight, bias, **tensors, **stream(2, "cpu"))
    true = reference.group_norm_silu(x, 4, weight, bias, **tensors, **stream(2, "cpu"))
    for a, b in zip(got, true, strict=True):
        assert torch.equal(a, b)


def test_dropout_hides_no_nan(device):
    """As torch's: what is dropped is multiplied by 0."""
    x = torch.randn(3, 6, 4, 4)
    x[1, 2, 0, 0], x[2, 5, 1, 1] = torch.inf, torch.nan
    grad = torch.randn_like(x)
    grad[0, :3] = torch.nan
    leaf = x.to(device).requires_grad_()
    y = ops.group_norm_silu(leaf, 3, None, None, **stream(3, device))
    (dx,) = torch.autograd.grad(y, leaf, grad.to(device))
    bad = torch.zeros(3, 6, dtype=torch.bool)
    bad[1, 2:4] = bad[2, 4:] = True
    assert torch.equal(y.detach().cpu().isnan(), bad[..., None, None].expand_as(x))
    bad[0, :4] = True
    assert torch.equal(dx.cpu().isnan(), bad[..., None, None].expand_as(x))


@pytest.mark.parametrize("mapped", ["x", "before", "residual", "x2", "weight", "shift"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc_slice"])
def test_vmap_over_one_of_the_tensors(mapped, layout):
    """The others, and with them the memory format, have no dimension of the batch."""
    options = {"before": "rows", "residual": True, "modulated": True}
    tensors = inputs((2, 3, 2, 5), 5, torch.float32, "cpu", layout, **options)
    several = torch.stack([tensors[mapped], tensors[mapped] + 1])

    def function(one):
        return fused(num_groups=4, **{**tensors, mapped: one}, **stream(2, "cpu"))

    expected = [function(one) for one in several]
    for got, values in zip(torch.func.vmap(function)(several), zip(*expected, strict=True),
                           strict=True):  # fmt: skip
        assert_exact(got, torch.stack(values).double())


@pytest.mark.parametrize("residual", [False, True])
def test_the_gradient_can_be_differentiated(residual):
    tensors = inputs(
        (2, 3, 2, 2), 1, torch.float64, "cpu", before="column", residual=residual, modulated=True
    )
    given = {name: x.requires_grad_() for name, x in tensors.items() if x is not None}

    def function(*leaves):
        named = dict(zip(given, leaves, strict=True))
        return fused(num_groups=2, **named, **stream(2, "cpu"))

    leaves = tuple(given.values())
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


X, P, INDEX = torch.zeros(2, 6, 4, 4), torch.zeros(6), torch.arange(2)
DRAWN = {"dropout": 0.5, "seed": 0, "step": 0, "sample_index": INDEX}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"before": P[:5]}, ValueError, r"before must have shape \(6,\) or \(2, 6\); got \(5,\)"),
        ({"before": X}, ValueError, r"before must have shape .*; got \(2, 6, 4, 4\)"),
        ({"before": P.long()}, TypeError, "before must be one of .*; got int64"),
        ({"before": P.to("meta")}, ValueError, "before must be on cpu .*; got meta"),
        ({"before": 1.0}, TypeError, "before must be a tensor; got float"),
        ({"residual": X[:1]}, ValueError, r"residual must have .*\(2, 6, 4, 4\); got \(1, 6"),
        ({"residual": X.byte()}, TypeError, "residual must be one of .*; got uint8"),
        ({"residual": X.to("meta")}, ValueError, "residual must be on cpu .*; got meta"),
        ({"x2": X[..., :3]}, ValueError, r"x2 must have the shape of x, .*; got \(2, 6, 4, 3\)"),
        ({"x2": X[:, :0]}, ValueError, r"x2 must have at least 1 channel; got \(2, 0, 4, 4\)"),
        ({"x2": X.double()}, TypeError, "x2 and x must both be float64 or neither"),
        ({"x2": X[:, :1]}, ValueError, "num_groups must divide the 7 channels; got 3"),
        ({"x2": X}, ValueError, r"weight must have shape \(12,\); got \(6,\)"),
        ({"x2": X, "weight": None}, ValueError, r"bias must have shape \(12,\); got \(6,\)"),
        ({**DRAWN, "dropout": 1.0}, ValueError, r"dropout must be .*in \[0, 1\); got 1.0"),
        ({**DRAWN, "dropout": -0.1}, ValueError, r"dropout must be .*in \[0, 1\); got -0.1"),
        ({**DRAWN, "dropout": "1"}, ValueError, "dropout must be .*; got '1'"),
        ({**DRAWN, "dropout": P}, ValueError, r"dropout must be a number in .*; got tensor\(\["),
        ({"dropout": P}, ValueError, "dropout must be a number in"),
        ({"eps": X}, ValueError, r"eps must be a number .*; got tensor\(.*$"),
        ({"num_groups": X}, ValueError, r"num_groups must divide .*; got tensor\(.*$"),
        ({**DRAWN, "seed": None}, ValueError, "dropout needs seed, .*; got no seed"),
        ({**DRAWN, "step": None}, ValueError, "dropout needs .*; got no step"),
        ({**DRAWN, "sample_index": None}, ValueError, "dropout needs .*; got no sample_index"),
        ({**DRAWN, "sample_index": INDEX[:1]}, ValueError, r"sample_index must .*\(2,\)"),
        (
            {**DRAWN, "sample_index": INDEX - 1},
            ValueError,
            "sample_index must be in 0 .*; got -1",
        ),
        ({**DRAWN, "step": 2**32}, ValueError, r"step must be .*in 0 \.\. "),
        ({**DRAWN, "seed": 2**64}, ValueError, "seed must be .*"),
    ],
)
def test_bad_input(options, error, message):
    arguments = {"x": X, "num_groups": 3, "weight": P, "bias": P, **options}
    with pytest.raises(error, match=message):
        ops.group_norm_silu(**arguments)


def test_registered_ops():
    tensors = inputs((2, 3, 2, 3), 3, torch.float32, "cpu", "slice", before="rows", residual=True)
    x, before, residual, x2, weight, bias = (tensors[name] for name in NAMES[:6])
    random = tuple(stream(2, "cpu").values())
    random = (random[0], 2**62, *random[2:])
    norm = (2, weight, bias, 1e-6, None, None, True)
    backward = torch.ops.fastddpm.group_norm_silu_backward.default
    grad, grad_u = torch.randn(2, 6, 2, 3), torch.randn(x.shape)
    opcheck(backward, (grad, x.clone(), *norm, before, x2, grad_u, *random))
    for tensor in (x, before, residual, x2, bias):
        tensor.requires_grad_()
    opcheck(torch.ops.fastddpm.group_norm_silu.default, (x, *norm, before, x2, *random))
    both = torch.ops.fastddpm.group_norm_silu_sum.default
    opcheck(both, (x, residual, *norm, before, x2, *random))


def test_compiles_without_breaks(device):
    def function(x, **tensors):
        y, u = fused(x * 2, 4, **tensors, **stream(2, device))
        return F.relu(y) + 1, u * 3

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for size in (3, 5):  # the second shape makes it dynamic
        tensors = inputs((2, 7, size, 3), 5, torch.float32, device, before="rows", residual=True)
        grads = gradients_for(tensors)
        given = {name: x for name, x in tensors.items() if x is not None}

        def run(f, given=given, grads=grads):
            return results(lambda num_groups, **named: f(**named), given, 4, grads)

        got, expected = run(compiled), run(function)
        for name, value in expected.items():
            assert torch.equal(got[name], value), name
            assert got[name].stride() == value.stride(), name
