"""convolution and its gradients, on every backend, against float64."""

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

from fastddpm import _native, ops, reference

NAMES = ("x", "weight", "bias", "x2", "norm_weight", "norm_bias", "shift", "residual")
# F(4x4, 3x3) in float32 errs up to so many times more than a sum as it is written: see
# csrc/cpu/layers/winograd.h. In the gradients two such sums follow one another.
WINOGRAD = 8

PLAIN: dict = {}
NORMED = {"num_groups": 2, "silu": True}
DROPPED = {"dropout": 0.3, "seed": 2**64 - 5}
OPTIONS = {
    "plain": (PLAIN, ()),
    "resnet": ({**NORMED, **DROPPED}, ("x2", "shift", "residual")),
    "down": ({"stride": 2, "padding": (0, 1)}, ("column",)),
    "up": ({"upsample": 2, "silu": True}, ("residual",)),
    "normed up": ({"upsample": 2, **NORMED, **DROPPED}, ("x2",)),
    "shortcut": ({"padding": 0, "kernel": 1}, ("x2", "shift")),
}
# (N, C1, C2, O), (H, W), kernel
SHAPES = (
    ((3, 5, 3, 7), (5, 7), 3),
    ((2, 4, 4, 3), (1, 1), 3),
    ((2, 6, 2, 70), (9, 4), 1),  # more outputs than a panel, and not whole vectors
    ((2, 36, 28, 40), (17, 16), 3),
    ((33, 4, 4, 3), (3, 3), 3),  # more images than threads
    ((2, 64, 64, 64), (16, 16), 3),
)


def inputs(shape, size, kernel, given, dtype, device, layout="nhwc", *, other=None, **options):
    """The tensors by name, those that are not given as None. other: the dtype of the parameters."""
    (n, c1, c2, outputs), k = shape, LAYOUTS.index(layout)
    other = other or dtype
    c = c1 + (c2 if "x2" in given else 0)

    def draw(*sizes, dtype=other, mean=0.0, scale=1.0, turn=None):
        x = (torch.randn(sizes) * scale + mean).to(device, dtype)
        return x if turn is None else in_layout(x, LAYOUTS[(k + turn) % len(LAYOUTS)])

    tensors = dict.fromkeys(NAMES)
    tensors["x"] = draw(n, c1, *size, dtype=dtype, mean=-1.3, turn=0)
    weight = draw(outputs, c, kernel, kernel, scale=(c * kernel**2) ** -0.5)
    tensors["weight"] = weight.contiguous(memory_format=torch.channels_last) if k % 2 else weight
    tensors["bias"] = draw(outputs)
    if "x2" in given:
        tensors["x2"] = draw(n, c2, *size, dtype=dtype, mean=1.1, turn=1)
    if options.get("num_groups"):
        tensors["norm_weight"], tensors["norm_bias"] = draw(c), draw(c)
    if "shift" in given:
        tensors["shift"] = draw(n, outputs)
    if "column" in given:
        tensors["shift"] = draw(outputs)
    if "residual" in given:
        padding, upsample = options.get("padding", 1), options.get("upsample", 1)
        y = reference.convolved(tensors["x"], weight, padding, upsample, options.get("stride", 1))
        tensors["residual"] = draw(*y.shape, dtype=dtype, mean=0.8, turn=2)
    return tensors


def stream(options, n, device):
    """The options with the step and the sample index that a dropout needs."""
    if not options.get("dropout"):
        return options
    step, index = torch.arange(n) * 7 + 2**31, torch.arange(n) + 2**40
    return {**options, "step": step.to(device), "sample_index": index.to(device)}


def eager(x, weight, bias, x2, norm_weight, norm_bias, shift, residual, options, products=None):
    """Eager torch, all in the dtype of x but the products, whose operands have their own."""
    x2, weight, bias, norm_weight, norm_bias, shift, residual = (
        None if p is None else p.to(x.dtype)
        for p in (x2, weight, bias, norm_weight, norm_bias, shift, residual)
    )
    h = x if x2 is None else torch.cat((x, x2), 1)
    if options.get("num_groups"):
        h = torch.group_norm(h, options["num_groups"], norm_weight, norm_bias, 1e-6)
    h = F.silu(h) if options.get("silu") else h
    if options.get("dropout"):
        drawn = {k: options[k] for k in ("seed", "step", "sample_index")}
        h = h * reference.dropout_factors(h, options["dropout"], **drawn)
    h = F.interpolate(h, scale_factor=options.get("upsample", 1), mode="nearest")
    before, after = reference.sides(options.get("padding", 1))
    h = F.pad(h, (before, after, before, after))
    dtype = products or x.dtype
    y = F.conv2d(h.to(dtype), weight.to(dtype), stride=options.get("stride", 1)).to(x.dtype)
    for term in (bias, shift):
        y = y if term is None else y + term.reshape(*term.shape, 1, 1)
    return y if residual is None else y + residual


def check(tensors, options, grad, *, products=None):
    """Forward and all gradients against the truth, allowing what eager torch errs."""
    x, weight = tensors["x"], tensors["weight"]
    given = [name for name in NAMES if tensors[name] is not None]
    values = [tensors[name] for name in given]

    def calling(function):
        return lambda *v: function(**{**dict.fromkeys(NAMES), **dict(zip(given, v, strict=True))})

    got = gradients(calling(lambda **t: ops.convolution(**t, **options)), values, grad)
    plain = gradients(
        calling(lambda **t: eager(**t, options=options, products=products)), values, grad
    )
    exact = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    true = gradients(
        calling(lambda **t: reference.convolution(**t, **exact)),
        list(map(double, values)),
        double(grad),
    )
    for name, a, b, c in zip(("y", *given), got, true, plain, strict=True):
        factor = WINOGRAD if a.dtype == torch.float32 else 1
        error = c.detach().cpu().double() - b  # eager's, which then is `factor` times as large
        spread = b + factor * error
        assert_exact(a, b, spread, ulps=4 * factor, what=f"{name} of {tuple(x.shape)}, {options}")
    y = got[0]
    assert y.dtype == x.dtype
    assert y.stride() == reference.with_channels(x, y.shape[1], sizes=y.shape[2:]).stride()
    for name, gradient in zip(given, got[1:], strict=True):
        assert gradient.dtype == tensors[name].dtype
        if name == "weight":
            assert gradient.stride() == torch.empty_like(weight).stride()


def case(name, shape, size, dtype, device, layout="nhwc", kernel=3, **more):
    options, given = OPTIONS[name]
    options = dict(options)
    kernel = options.pop("kernel", kernel)
    tensors = inputs(shape, size, kernel, given, dtype, device, layout, **options, **more)
    options = stream(options, shape[0], device)
    padding, upsample = options.get("padding", 1), options.get("upsample", 1)
    y = reference.convolved(
        tensors["x"], tensors["weight"], padding, upsample, options.get("stride", 1)
    )
    return tensors, options, torch.randn(y.shape).to(device, dtype)


@pytest.mark.matrix("forward", "backward")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(device, dtype, layout, name):
    tensors, options, grad = case(name, (3, 6, 4, 5), (5, 7), dtype, device, layout)
    check(tensors, options, in_layout(grad, LAYOUTS[LAYOUTS.index(layout) - 1]))


@pytest.mark.backends("reference", "cpu")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "shortcut"])
def test_float32(device, shape, name):
    sizes, size, kernel = shape
    if name == "down" and size == (1, 1):
        return  # smaller than the kernel: an error
    check(*case(name, sizes, size, torch.float32, device, kernel=kernel))


def random_case(draw: random.Random, device):
    """Any options at all, on a small image."""
    kernel, stride, upsample = draw.choice((1, 3, 3)), draw.choice((1, 1, 2)), draw.choice((1, 2))
    padding = draw.choice((0, 1, 1, (0, 1), (1, 0)))
    groups, c1, c2 = draw.choice((None, 1, 2, 4)), draw.choice((4, 8, 12)), draw.choice((4, 20))
    size = tuple(draw.choice((1, 2, 3, 4, 5, 8, 13)) + 2 for _ in "hw")
    options = {"stride": stride, "padding": padding, "upsample": upsample, "num_groups": groups}
    options["silu"] = draw.random() < 0.5
    if draw.random() < 0.3:
        options.update(DROPPED)
    given = [name for name in ("x2", "shift", "column", "residual") if draw.random() < 0.4]
    shape = (draw.randint(1, 3), c1, c2, draw.choice((1, 3, 16, 33)))
    dtype, layout = draw.choice(DTYPES), draw.choice(LAYOUTS)
    tensors = inputs(shape, size, kernel, given, dtype, device, layout, **options)
    y = reference.convolved(tensors["x"], tensors["weight"], padding, upsample, stride)
    grad = in_layout(torch.randn(y.shape).to(device, dtype), draw.choice(LAYOUTS))
    return tensors, stream(options, shape[0], device), grad


@pytest.mark.backends("reference", "cpu")
@pytest.mark.parametrize("seed", range(40))
def test_random_options(device, seed):
    check(*random_case(random.Random(seed), device))


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("isa", _native.isas_available() if _native.C else ())
def test_every_instruction_set(device, isa):
    before = _native.isa()
    _native.use_isa(isa)
    try:
        for seed in range(100, 108):
            check(*random_case(random.Random(seed), device))
        for name in ("resnet", "normed up", "down"):
            tensors, options, grad = case(name, (2, 40, 24, 36), (12, 9), torch.float32, device)
            check(tensors, options, grad)
            weight = tensors["weight"].bfloat16()
            check({**tensors, "weight": weight}, options, grad, products=torch.bfloat16)
    finally:
        _native.use_isa(before)


@pytest.mark.backends("reference", "cpu")
@pytest.mark.parametrize("shape", [((3, 6, 4, 5), (5, 7)), ((2, 64, 64, 64), (16, 16))], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_bfloat16_weights_of_float32_images(device, shape, name):
    tensors, options, grad = case(name, *shape, torch.float32, device)
    tensors["weight"] = tensors["weight"].bfloat16()
    check(tensors, options, grad, products=torch.bfloat16)


@pytest.mark.parametrize("which", ["float32", "bfloat16"])
def test_parameters_of_another_type(device, which):
    dtype = getattr(torch, which)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    tensors, options, grad = case("resnet", (3, 6, 4, 5), (5, 7), dtype, device, other=other)
    check(tensors, options, grad, products=other if other == torch.bfloat16 else torch.float32)


def test_dropout_is_that_of_group_norm_silu(device):
    """The same elements, as a convolution with the identity shows."""
    x, x2 = torch.randn(3, 5, 4, 6).to(device), torch.randn(3, 3, 4, 6).to(device)
    options = {**stream(DROPPED, 3, device), "x2": x2, "silu": True}
    weight = torch.eye(8).reshape(8, 8, 1, 1).to(device)
    got = ops.convolution(x, weight, padding=0, num_groups=4, **options)
    torch.testing.assert_close(got, ops.group_norm_silu(x, 4, None, None, **options))


def test_a_linear_layers_weight(device):
    tensors, options, grad = case("shortcut", (3, 6, 4, 5), (5, 7), torch.float32, device)
    square = tensors["weight"]
    y = ops.convolution(**tensors, **options)
    tensors["weight"] = square[:, :, 0, 0].clone().requires_grad_()
    flat = ops.convolution(**tensors, **options)
    assert torch.equal(y, flat)
    (of_flat,) = torch.autograd.grad(flat, tensors["weight"], grad)
    tensors["weight"] = square.detach().requires_grad_()
    y = ops.convolution(**tensors, **options)
    (of_square,) = torch.autograd.grad(y, tensors["weight"], grad)
    assert torch.equal(of_flat, of_square[:, :, 0, 0])


@pytest.mark.parametrize("expand", [(1, 1, 1, 1), (1, 7, 1, 1), (3, 1, 5, 6)], ids=str)
def test_expanded_gradients(device, expand):
    tensors, options, _ = case("resnet", (3, 6, 4, 7), (5, 6), torch.float32, device)
    check(tensors, options, torch.randn(expand).to(device).expand(3, 7, 5, 6))


def test_expanded_inputs_and_strided_weights(device):
    x, x2 = torch.randn(1, 5, 4, 6).to(device), torch.randn(3, 1, 4, 6).to(device)
    weight = torch.randn(9, 8, 3, 6).to(device)[1:8, :, :, ::2]
    bias, shift = torch.randn(7, 2).to(device)[:, 1], torch.randn(1, 7).to(device)
    arguments = (x.expand(3, -1, -1, -1), weight, bias)
    options = {"x2": x2.expand(-1, 3, -1, -1), "shift": shift.expand(3, 7), "num_groups": 2}
    copies = [t.clone() for t in arguments]
    copied = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    assert torch.equal(ops.convolution(*arguments, **options), ops.convolution(*copies, **copied))


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("name", ["resnet", "down", "normed up"])
def test_bits_do_not_depend_on_the_thread_count(device, name):
    tensors, options, grad = case(name, (5, 40, 24, 36), (17, 12), torch.float32, device)
    given = [k for k in NAMES if tensors[k] is not None]

    def function():
        def call(*values):
            return ops.convolution(**dict(zip(given, values, strict=True)), **options)

        results = gradients(call, [tensors[k] for k in given], grad)
        return torch.cat([result.flatten() for result in results])

    assert_same_for_any_thread_count(function)


@pytest.mark.backends("cpu")
def test_bits_of_sums_over_groups_of_samples(device):
    """More images than are at work at once: the groups have to be those of one thread."""
    x, weight = torch.randn(7, 128, 64, 64).to(device), torch.randn(16, 128, 1, 1).to(device)
    norm = [torch.randn(128).to(device) for _ in "wb"]
    grad = torch.randn(7, 16, 64, 64).to(device)

    def function():
        def call(x, weight, norm_weight, norm_bias):
            return ops.convolution(
                x, weight, padding=0, num_groups=8, norm_weight=norm_weight, norm_bias=norm_bias
            )

        results = gradients(call, (x, weight, *norm), grad)
        return torch.cat([result.flatten() for result in results])

    assert_same_for_any_thread_count(function)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("name", ["resnet", "down", "normed up", "shortcut"])
def test_a_sample_does_not_depend_on_its_batch(device, name):
    tensors, options, grad = case(name, (9, 20, 12, 36), (8, 6), torch.float32, device)
    whole = gradients(
        lambda x: ops.convolution(**{**tensors, "x": x}, **options), (tensors["x"],), grad
    )
    for first, last in ((0, 1), (4, 7), (8, 9)):

        def part(value, first=first, last=last):
            of_samples = isinstance(value, torch.Tensor) and value.shape[0] == 9
            return value[first:last] if of_samples else value

        some = {k: part(v) if k != "weight" else v for k, v in tensors.items()}
        chosen = {k: part(v) for k, v in options.items()}
        got = gradients(
            lambda x, some=some, chosen=chosen: ops.convolution(**{**some, "x": x}, **chosen),
            (some["x"],),
            part(grad),
        )
        for a, b in zip(got, whole, strict=True):
            assert torch.equal(a, part(b))


@pytest.mark.parametrize("wanted", NAMES)
def test_one_gradient_at_a_time(device, wanted):
    tensors, options, grad = case("resnet", (3, 6, 4, 5), (5, 7), torch.float32, device)
    leaf = tensors[wanted].detach().requires_grad_()
    y = ops.convolution(**{**tensors, wanted: leaf}, **options)
    (alone,) = torch.autograd.grad(y, leaf, grad)
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    y = ops.convolution(**leaves, **options)
    assert torch.equal(alone, torch.autograd.grad(y, leaves[wanted], grad)[0])


def test_large_mean_with_small_spread(device):
    tensors, options, grad = case("resnet", (2, 8, 8, 5), (9, 8), torch.float32, device)
    tensors["x"] = tensors["x"] * 0.1 + 1000
    tensors["x2"] = tensors["x2"] * 0.1 + 1000
    check(tensors, options, grad)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(device, bad):
    tensors, options, _ = case("resnet", (3, 6, 4, 5), (5, 7), torch.float32, device)
    clean = ops.convolution(**tensors, **options)
    tensors["x"] = tensors["x"].contiguous().clone()
    tensors["x"][1, 2, 0, 0] = bad
    y = ops.convolution(**tensors, **options)
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert not y[1].isfinite().all()


def test_empty_batch(device):
    tensors, options, _ = case("resnet", (3, 6, 4, 5), (5, 7), torch.float32, device)
    empty = {
        k: (v[:0] if k in ("x", "x2", "shift", "residual") else v).detach().requires_grad_()
        for k, v in tensors.items()
    }
    options = {k: v[:0] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    y = ops.convolution(**empty, **options)
    assert y.shape == (0, 5, 5, 7)
    y.sum().backward()
    for name in ("weight", "bias", "norm_weight", "norm_bias"):
        assert torch.equal(empty[name].grad, torch.zeros_like(tensors[name])), name
    assert empty["x"].grad.shape == empty["x"].shape
