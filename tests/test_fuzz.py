"""Every op on tensors of any shape, stride, offset and dtype: the right answer, or the right error.

Views are drawn that no other test thinks of: dimensions permuted in memory, stepped over, expanded,
padded with NaN, and starting at any element, so that a read out of place shows as NaN and a vector
load meets every alignment.
"""

from __future__ import annotations

import hypothesis
import pytest
import torch
from compare import DTYPES, double, gradients, table
from hypothesis import strategies as st

from fastddpm import Schedule, ops, reference
from fastddpm.ops import dispatch

fuzz = hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
TABLE = table()
RANGE = Schedule.linear().table("learned_range")
dtypes, seeds = st.sampled_from(DTYPES), st.integers(0, 2**63)
FLOATS = (torch.float32, torch.float16)  # which a convolution's operands are not rounded to


@st.composite
def shapes(draw, channels=None):
    """(N, C, H, W), empty batches and images among them."""
    n, c, h, w = (draw(st.integers(*ends)) for ends in ((0, 3), (1, 9), (0, 9), (0, 9)))
    return n, c if channels is None else draw(channels), h, w


@st.composite
def views(draw, values, expand=True):
    """`values` in a memory layout of its own; an expanded dimension repeats its first index."""
    order = draw(st.permutations(range(values.dim())))
    storage, at, select = [], {}, []
    for dim in order:
        size = values.shape[dim]
        if expand and size > 1 and draw(st.integers(0, 7)) == 0:
            values = values.narrow(dim, 0, 1).expand(values.shape)
            size = 1
        step, before = draw(st.sampled_from((1, 1, 1, 2))), draw(st.integers(0, 2))
        at[dim] = len(storage)
        storage.append(before + size * step + draw(st.integers(0, 2)))
        select.append(slice(before, before + size * step, step))
    offset = draw(st.integers(0, 3))
    numel = torch.Size(storage).numel()
    filler = torch.nan if values.is_floating_point() else 255
    memory = torch.full((offset + numel,), filler, dtype=values.dtype, device=values.device)
    view = memory[offset:].view(storage)[tuple(select)].permute([at[d] for d in range(len(at))])
    view.copy_(values[tuple(slice(0, size) for size in view.shape)])
    return view.expand(values.shape)


def normals(data, shape, dtype, device, **options):
    """A view of normal numbers."""
    torch.manual_seed(data.draw(seeds))
    return data.draw(views(torch.randn(shape).to(device, dtype), **options))


def timesteps(data, n, device):
    t = data.draw(st.lists(st.integers(0, TABLE.shape[0] - 1), min_size=n, max_size=n))
    return data.draw(views(torch.tensor(t, dtype=torch.int64, device=device), expand=False))


def assert_near(actual, truth, plain=None, *, ulps, slack=0.0):
    """Right up to rounding once to the storage type, and to `ulps` of float32 before that.

    Operands are of order 1, and so is the least value that an ulp is one of: a true 0 may be the
    difference of two of them. plain: the reference's own result, where it rounds on the way too;
    slack: what else it may be off by
    """
    actual, dtype = actual.detach().cpu().double(), actual.dtype
    assert actual.shape == truth.shape
    if truth.numel() == 0:
        return
    scale = max(1.0, truth.abs().max().item())
    allowed = (torch.finfo(dtype).eps + ulps * torch.finfo(torch.float32).eps) * scale + slack
    if plain is not None:
        allowed += 2 * (plain.detach().cpu().double() - truth).abs().max().item()
    error = (actual - truth).abs().max().item()
    assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"


def skip_without(backend, op):
    reason = dispatch.load(backend).unsupported(op)
    if reason is not None:
        pytest.skip(reason)


@fuzz
@hypothesis.given(st.data())
def test_randn(device, data):
    shape, seed, first = data.draw(shapes()), data.draw(seeds), data.draw(st.integers(0, 2**62))
    step = data.draw(st.integers(0, 2**32 - 1))
    got = ops.randn(shape, seed=seed, step=step, first_index=first, device=device)
    index = torch.arange(first, first + shape[0])
    truth = reference.randn(shape, seed=seed, step=step, sample_index=index, dtype=torch.float64)
    assert_near(got, truth, ulps=8)


@fuzz
@hypothesis.given(st.data())
def test_noise(device, data):
    shape, dtype = data.draw(shapes()), data.draw(dtypes)
    t = timesteps(data, shape[0], device)
    torch.manual_seed(data.draw(seeds))
    if data.draw(st.booleans()):
        x0 = data.draw(views(torch.randint(0, 256, shape, dtype=torch.uint8).to(device)))
    else:
        x0 = normals(data, shape, data.draw(dtypes), device)
    flips = data.draw(st.none() | st.lists(st.booleans(), min_size=shape[0], max_size=shape[0]))
    flip = None if flips is None else torch.tensor(flips, dtype=torch.bool, device=device)
    if data.draw(st.booleans()):
        noise = {"eps": normals(data, shape, data.draw(dtypes), device)}
    else:
        noise = {"seed": data.draw(seeds), "sample_index": torch.arange(shape[0]).to(device)}
    xt, eps = ops.noise(x0, t, TABLE.to(device), flip=flip, dtype=dtype, **noise)
    truth, _ = reference.noise(
        double(x0), t.cpu(), TABLE.double(), eps=double(eps), flip=double(flip)
    )
    assert xt.dtype == dtype
    assert xt.stride() == torch.empty_like(x0, dtype=dtype).stride()
    assert_near(xt, truth, ulps=8)


@fuzz
@hypothesis.given(st.data())
def test_posterior_step(device, data):
    shape = data.draw(shapes())
    xt = normals(data, shape, data.draw(dtypes), device)
    out = normals(data, shape, data.draw(dtypes), device)
    z = normals(data, shape, data.draw(dtypes), device)
    given = data.draw(st.booleans())
    log_variance = normals(data, shape, data.draw(dtypes), device) if given else None
    options = {
        "clip": data.draw(st.booleans()),
        "prediction": data.draw(st.sampled_from(("eps", "x0", "mean", "v"))),
        "learned_range": given and data.draw(st.booleans()),
    }
    table = RANGE if options["learned_range"] else TABLE
    t = timesteps(data, shape[0], device)
    truth = reference.posterior_step(
        double(xt), double(out), t.cpu(), table.double(), z=double(z),
        log_variance=double(log_variance), **options,
    )  # fmt: skip
    options["log_variance"] = log_variance
    got = ops.posterior_step(xt, out, t, table.to(device), z=z, **options)
    assert got.dtype == xt.dtype
    assert got.stride() == torch.empty_like(xt).stride()
    # Eq. 15's terms are up to 160 times the operands and may cancel.
    exact = options["prediction"] != "eps" and not options["learned_range"]
    assert_near(got, truth, ulps=8 if exact else 1000)
    target = normals(data, shape, xt.dtype, device, expand=False)
    assert ops.posterior_step(xt, out, t, table.to(device), z=z, out=target, **options) is target
    assert torch.equal(target, got)


@fuzz
@hypothesis.given(st.data())
def test_group_norm_silu(device, data):
    groups = data.draw(st.integers(1, 4))
    shape = data.draw(shapes(st.integers(1, 4).map(lambda c: c * groups)))
    x = normals(data, shape, data.draw(dtypes), device)
    parameters = [
        normals(data, size, data.draw(dtypes), device) if data.draw(st.booleans()) else None
        for size in (shape[1:2], shape[1:2], shape[:2], shape[:2])
    ]
    grad, silu = normals(data, shape, x.dtype, device), data.draw(st.booleans())

    def function(op):
        return lambda x, weight, bias, scale, shift: op(
            x, groups, weight, bias, 0.1, scale=scale, shift=shift, silu=silu
        )

    got = gradients(function(ops.group_norm_silu), (x, *parameters), grad)
    true = gradients(
        function(reference.group_norm_silu), list(map(double, (x, *parameters))), double(grad)
    )
    for a, b in zip(got, true, strict=True):
        assert_near(a, b, ulps=64)


@fuzz
@hypothesis.given(st.data())
def test_attention_block(backend, device, data):
    skip_without(backend, "attention_block")
    heads = data.draw(st.integers(1, 3))
    n, c, h, w = data.draw(shapes(st.integers(1, 6).map(lambda c: c * heads)))
    dtype = data.draw(dtypes)
    x, grad = (normals(data, (n, c, h, w), dtype, device) for _ in range(2))
    sizes = ((c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,))
    parameters = [
        normals(data, size, dtype, device) if len(size) == 2 or data.draw(st.booleans()) else None
        for size in sizes
    ]

    def function(op):
        return lambda x, *p: op(x, heads, *p, num_heads=heads, eps=0.1)

    got = gradients(function(ops.attention_block), (x, *parameters), grad)
    true = gradients(
        function(reference.attention_block), list(map(double, (x, *parameters))), double(grad)
    )
    plain = gradients(function(reference.attention_block), (x, *parameters), grad)
    spread = conditioning(function(reference.attention_block), (x, *parameters), grad, true)
    for a, b, c, wander in zip(got, true, plain, spread, strict=True):
        assert_near(a, b, c, ulps=64, slack=4 * wander)


def conditioning(function, inputs, grad, true) -> list[float]:
    """How far each result moves when every input does by an ulp of its storage type: where all
    pixels or weights are equal, the softmax's gradient is a difference of numbers as good as equal.
    """
    moved = [0.0] * len(true)
    for _ in range(3):
        near = [
            x
            if x is None
            else double(x) * (1 + torch.finfo(x.dtype).eps * (2 * torch.rand(x.shape) - 1))
            for x in inputs
        ]
        for k, (a, b) in enumerate(zip(gradients(function, near, double(grad)), true, strict=True)):
            if a.numel():
                moved[k] = max(moved[k], (a - b).abs().max().item())
    return moved


@pytest.mark.backends("reference", "cpu")  # a GPU's is a norm and torch's convolution
@fuzz
@hypothesis.given(st.data())
def test_convolution(device, data):
    kernel, stride, upsample = data.draw(
        st.sampled_from(((1, 1, 1), (3, 1, 1), (3, 2, 1), (3, 1, 2)))
    )
    padding = data.draw(st.sampled_from((1, (0, 1), (1, 0), 0)))
    groups = data.draw(st.sampled_from((None, 1, 2)))
    c1, c2 = (data.draw(st.integers(*ends)) * (groups or 1) for ends in ((1, 4), (0, 3)))
    n, outputs = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 9))
    h, w = (data.draw(st.integers(3, 9)) for _ in "hw")
    x = normals(data, (n, c1, h, w), data.draw(dtypes), device)
    x2 = normals(data, (n, c2, h, w), data.draw(dtypes), device) if c2 else None
    weight = normals(
        data, (outputs, c1 + c2, kernel, kernel), data.draw(st.sampled_from(FLOATS)), device
    )
    options = {"stride": stride, "padding": padding, "upsample": upsample, "num_groups": groups}
    options.update(silu=data.draw(st.booleans()), eps=0.1)
    y = reference.convolved(x, weight, padding, upsample, stride)
    parameters = [
        normals(data, size, data.draw(dtypes), device) if data.draw(st.booleans()) else None
        for size in ((outputs,), (n, outputs), y.shape)
    ]
    grad = normals(data, y.shape, x.dtype, device)

    def function(op):
        return lambda x, x2, weight, bias, shift, residual: op(
            x, weight, bias, x2=x2, shift=shift, residual=residual, **options
        )

    inputs = (x, x2, weight, *parameters)
    got = gradients(function(ops.convolution), inputs, grad)
    true = gradients(function(reference.convolution), list(map(double, inputs)), double(grad))
    for a, b in zip(got, true, strict=True):
        assert_near(a, b, ulps=512)


@fuzz
@hypothesis.given(st.data())
def test_discretized_log_likelihood(device, data):
    shape = data.draw(shapes())
    torch.manual_seed(data.draw(seeds))
    levels = torch.randint(0, 256, shape).float() / 127.5 - 1
    x = data.draw(views(levels.to(device, data.draw(dtypes))))
    mean = normals(data, shape, data.draw(dtypes), device)
    log_scale = normals(data, shape, data.draw(dtypes), device)
    got = ops.discretized_log_likelihood(x, mean, log_scale)
    truth = reference.discretized_log_likelihood(double(x), double(mean), double(log_scale))
    assert_near(got, truth, ulps=2)


IMAGE = torch.zeros(2, 4, 3, 5)
T0 = torch.zeros(2, dtype=torch.int64)
MATRIX = torch.zeros(4, 4)
CALLS = {  # op -> (the call, its arguments that are float tensors of one dtype family)
    "noise": (lambda x0, eps: ops.noise(x0, T0, TABLE, eps=eps), {"x0": IMAGE, "eps": IMAGE}),
    "posterior_step": (
        lambda xt, model_output, z, log_variance: ops.posterior_step(
            xt, model_output, T0, TABLE, z=z, log_variance=log_variance
        ),
        {"xt": IMAGE, "model_output": IMAGE, "z": IMAGE, "log_variance": IMAGE},
    ),
    "group_norm_silu": (
        lambda x, weight, scale: ops.group_norm_silu(x, 2, weight, None, scale=scale),
        {"x": IMAGE, "weight": IMAGE[0, :, 0, 0], "scale": IMAGE[..., 0, 0]},
    ),
    "attention_block": (
        lambda x, norm_weight, qkv_weight, proj_weight: ops.attention_block(
            x, 2, norm_weight, None, qkv_weight, None, proj_weight, None
        ),
        {
            "x": IMAGE,
            "norm_weight": IMAGE[0, :, 0, 0],
            "qkv_weight": MATRIX.repeat(3, 1),
            "proj_weight": MATRIX,
        },
    ),
    "convolution": (
        lambda x, weight, residual, shift: ops.convolution(
            x, weight, residual=residual, shift=shift, padding=0
        ),
        {"x": IMAGE, "weight": MATRIX, "residual": IMAGE, "shift": IMAGE[..., 0, 0]},
    ),
    "discretized_log_likelihood": (
        ops.discretized_log_likelihood,
        {"x": IMAGE, "mean": IMAGE, "log_scale": IMAGE},
    ),
    "squared_error": (ops.squared_error, {"prediction": IMAGE, "target": IMAGE}),
}
NOT_FLOAT = (torch.int64, torch.uint8, torch.bool, torch.int32, torch.complex64)


@hypothesis.given(st.data())
def test_a_wrong_dtype_is_named(data):
    """One operand that is no float at all: the TypeError says which and what it was."""
    call, arguments = CALLS[data.draw(st.sampled_from(list(CALLS)))]
    name, dtype = data.draw(st.sampled_from(list(arguments))), data.draw(st.sampled_from(NOT_FLOAT))
    if (name, dtype) == ("x0", torch.uint8):
        return
    mixed = {key: x.to(data.draw(dtypes)) for key, x in arguments.items()}
    mixed[name] = mixed[name].to(dtype)
    text = str(dtype).removeprefix("torch.")
    with pytest.raises(TypeError, match=rf"^{name} must be one of .*; got {text}$"):
        call(*mixed.values())


@hypothesis.given(st.data())
def test_float64_does_not_mix_with_storage_types(data):
    call, arguments = CALLS[data.draw(st.sampled_from(("noise", "posterior_step")))]
    first, *others = arguments
    name = data.draw(st.sampled_from(others))
    mixed = {key: x.to(data.draw(dtypes)) for key, x in arguments.items()}
    which = data.draw(st.sampled_from((first, name)))
    mixed[which] = mixed[which].double()
    with pytest.raises(TypeError, match=r"^\w+ and \w+ must both be float64 or neither; got"):
        call(*mixed.values())
