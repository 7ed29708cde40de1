"""attention_block out of a GPU's libraries: the composition with any norm, and when it is taken.

What only a GPU has is called on tensors without values, which say whether the calls and the strides
are right; torch's fused attention of the CPU, in its place, says whether the values are."""

from __future__ import annotations

import pytest
import torch
from compare import LAYOUTS, assert_exact, double, in_layout
from test_attention_block import inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastddpm import ops, reference
from fastddpm.ops import attention, dispatch

aten = torch.ops.aten
CASES = (
    ((2, 12, 5, 3), 3, 1),
    ((3, 32, 4, 4), 8, 4),
    ((1, 8, 1, 1), 2, 2),
)
COPIES = {"clone", "copy_", "_to_copy", "cat", "stack", "index_select"}


def on_the_cpu(q, k, v, dmixed):
    """Torch's fused attention of the CPU and its gradient, called as the GPU's are."""
    mixed, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return mixed, *aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dmixed, q, k, v, mixed, log_sum, 0.0, False
    )


def run(x, groups, parameters, heads, grad, backend=reference):
    """y and all gradients by the composition with the norm of this backend."""
    y = attention.attention_block(backend.group_norm_silu, x, groups, *parameters, num_heads=heads)
    norm = backend.group_norm_silu, backend.group_norm_silu_backward
    return [
        y,
        *attention.attention_block_backward(*norm, grad, x, groups, *parameters, heads, 1e-6),
    ]


def expected(x, groups, parameters, heads, grad):
    leaves = [double(p).requires_grad_() for p in (x, *parameters)]
    y = reference.attention_block(leaves[0], groups, *leaves[1:], num_heads=heads)
    return [y, *torch.autograd.grad(y, leaves, double(grad))]


@pytest.mark.parametrize("fused", [None, on_the_cpu])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_reference(monkeypatch, case, layout, fused):
    """In float64, and in float32 with the CPU's own norm."""
    monkeypatch.setattr(attention, "fused_gradient", lambda *_: fused)
    shape, groups, heads = case
    x, parameters = inputs(shape, torch.float64, "cpu", layout)
    grad = torch.randn(shape, dtype=torch.float64)
    true = expected(x, groups, parameters, heads, grad)
    for a, b in zip(run(x, groups, parameters, heads, grad), true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    if dispatch.load("cpu").missing:
        return
    x, *parameters, grad = (p.float() for p in (x, *parameters, grad))
    got = run(x, groups, parameters, heads, grad, dispatch.load("cpu").module)
    assert got[0].stride() == got[1].stride() == torch.empty_like(x).stride()
    for a, b in zip(got, expected(x, groups, parameters, heads, grad), strict=True):
        assert_exact(a, b, ulps=64)


@pytest.mark.parametrize("fused", [None, on_the_cpu])
def test_half_weights_of_float32_images(monkeypatch, fused):
    """As autocast hands them over: products in bfloat16, the result and its gradient float32."""
    monkeypatch.setattr(attention, "fused_gradient", lambda *_: fused)
    x, parameters = inputs((2, 16, 4, 4), torch.float32, "cpu", "nhwc")
    parameters = [p.bfloat16() if p.dim() == 2 else p for p in parameters]
    grad = torch.randn_like(x)
    got = run(x, 4, parameters, 2, grad)
    leaves = [p.requires_grad_() for p in (x, *parameters)]
    plain = reference.attention_block(leaves[0], 4, *leaves[1:], num_heads=2)
    plain = [plain, *torch.autograd.grad(plain, leaves, grad)]
    for a, b, c in zip(got, expected(x, 4, parameters, 2, grad), plain, strict=True):
        assert a.dtype == c.dtype
        assert_exact(a, b, c)


class Calls(TorchDispatchMode):
    """The names of the ops that are called, but for views, and for vectors of so few elements."""

    def __init__(self, few=0):
        super().__init__()
        self.names, self.few = [], few

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        few = isinstance(result, torch.Tensor) and result.numel() <= self.few
        if not function.is_view and not few:
            self.names.append(function.overloadpacket.__name__)
        return result


def test_in_nhwc_nothing_is_copied():
    x, parameters = inputs((2, 32, 4, 4), torch.float32, "cpu", "nhwc")
    y = reference.group_norm_silu(x, 4, *parameters[:2], silu=False)
    made = {"empty_like", "_unsafe_view", "_scaled_dot_product_flash_attention_for_cpu"}
    for layout, copies in (("nhwc", []), ("nchw", ["clone"])):
        image, normalised = in_layout(x, layout), in_layout(y, layout)
        with Calls() as calls:
            attention.attention_block(lambda *_, z=normalised, **__: z, image, 4, *parameters)
        assert [n for n in calls.names if n in COPIES] == copies
        assert [n for n in calls.names if n not in {*COPIES, *made}] == ["addmm", "addmm", "add"]


def fake(shape, heads, dtype, fused, monkeypatch):
    """(the calls of a forward and a backward pass, results) on a GPU that is not there."""
    monkeypatch.setattr(attention, "fused_gradient", lambda *_: fused)
    c = shape[1]
    with FakeTensorMode(), Calls(few=3 * c) as calls:
        x = torch.empty(shape, dtype=dtype, device="cuda", memory_format=torch.channels_last)
        sizes = (c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,)
        parameters = [torch.empty(size, dtype=dtype, device="cuda") for size in sizes]
        norm = lambda x, *_, **__: torch.empty_like(x)  # noqa: E731
        norm_backward = lambda dy, x, _, w, b, *__, **___: (  # noqa: E731
            torch.empty_like(x), torch.empty_like(w), torch.empty_like(b),
        )  # fmt: skip
        results = attention.attention_block_backward(
            norm, norm_backward, x, x, 4, *parameters, heads, 1e-6
        )
    return calls.names, [x, *parameters], results


@pytest.mark.parametrize(
    ("fused", "name", "dtype"),
    [
        (attention._flash, "flash", torch.bfloat16),
        (attention._flash, "flash", torch.float16),
        (attention._efficient, "efficient", torch.bfloat16),
        (attention._efficient, "efficient", torch.float32),
    ],
)
@pytest.mark.parametrize("heads", [1, 4])
def test_the_calls_of_a_gpu(monkeypatch, fused, name, dtype, heads):
    """Torch knows them, what it returns fits what is made of it, and only q, k, v are gathered."""
    calls, given, results = fake((2, 64, 4, 4), heads, dtype, fused, monkeypatch)
    assert [(r.shape, r.dtype) for r in results] == [(p.shape, p.dtype) for p in given]
    assert results[0].stride() == given[0].stride()
    op = f"_scaled_dot_product_{name}_attention"
    assert [n for n in calls if n.startswith("_scaled")] == [op, f"{op}_backward"]
    assert [n for n in calls if n in COPIES] == ["cat"]


# ---- which route ---------------------------------------------------------------------------------

LIBRARIES, OWN = ("cuda", "triton"), ("triton", "cuda")


@pytest.mark.parametrize(
    ("shape", "heads", "dtype", "capability", "expected"),
    [
        ((256, 256, 16, 16), 1, torch.bfloat16, (9, 0), LIBRARIES),
        ((256, 256, 16, 16), 1, torch.float32, (9, 0), LIBRARIES),
        ((1, 512, 16, 16), 1, torch.bfloat16, (9, 0), LIBRARIES),  # wide, but a multiple of 8
        ((1, 516, 32, 64), 1, torch.bfloat16, (9, 0), OWN),  # for flash too wide, for the other odd
        ((1, 516, 4, 4), 1, torch.bfloat16, (9, 0), LIBRARIES),  # and few scores
        ((1, 20, 16, 16), 1, torch.float16, (8, 0), LIBRARIES),  # flash attention pads it
        ((1, 20, 16, 16), 1, torch.float16, (7, 5), OWN),
        ((1, 32, 16, 16), 1, torch.bfloat16, (7, 5), OWN),  # no such products
        ((1, 32, 16, 16), 1, torch.float16, (7, 5), LIBRARIES),
        ((1, 18, 16, 16), 1, torch.float32, (9, 0), OWN),
        ((40000, 32, 16, 16), 2, torch.bfloat16, (9, 0), OWN),  # more heads than a launch has
    ],
    ids=str,
)
def test_the_route(monkeypatch, shape, heads, dtype, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x, c = torch.empty(shape, dtype=dtype, device="meta"), shape[1]
    weight = torch.empty(3 * c, c, dtype=dtype, device="meta")
    for gradient in (False, True):
        assert attention.order(x, weight, heads, gradient=gradient) == expected


def test_the_route_by_torchs_switches(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    x = torch.empty(8, 64, 16, 16, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(192, 64, dtype=torch.bfloat16, device="meta")
    before = attention.flash_sdp_enabled(), attention.mem_efficient_sdp_enabled()
    try:
        torch.backends.cuda.enable_flash_sdp(False)
        assert attention.order(x, weight, 1, gradient=False) == LIBRARIES
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        assert attention.order(x, weight, 1, gradient=False) == OWN
    finally:
        torch.backends.cuda.enable_flash_sdp(before[0])
        torch.backends.cuda.enable_mem_efficient_sdp(before[1])
    torch.use_deterministic_algorithms(True)
    try:
        assert attention.order(x, weight, 1, gradient=True) == OWN
        assert attention.order(x, weight, 1, gradient=False) == LIBRARIES
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_dtype_of_the_products_says_the_route(monkeypatch):
    """Float32 images with half-precision weights, as under autocast."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    x = torch.empty(1, 20, 16, 16, device="meta")
    weight = torch.empty(60, 20, device="meta")
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    try:
        assert attention.order(x, weight, 1, gradient=False) == OWN
        assert attention.order(x, weight.bfloat16(), 1, gradient=False) == LIBRARIES
    finally:
        torch.backends.cuda.enable_mem_efficient_sdp(True)


def test_an_order_is_kept_as_far_as_backends_can():
    x = torch.zeros(1, 4, 2, 2)
    for order in (("reference", "cpu"), ("triton", "reference"), ("cuda", "reference")):
        able = [n for n in order if dispatch.load(n).unsupported("group_norm_silu", x) is None]
        chosen = dispatch.choose("group_norm_silu", x, order=order)
        assert chosen is dispatch.load(able[0]).module


# ---- tensors without values ----------------------------------------------------------------------


def shapes_of_every_op(device):
    x = torch.empty(2, 8, 4, 4, device=device)
    c, wide, square = (torch.empty(s, device=device) for s in ((8,), (24, 8), (8, 8)))
    t = torch.zeros(2, dtype=torch.int64, device=device)
    table, drawn = torch.empty(1000, 8, device=device), {"seed": 1, "sample_index": t}
    with torch.no_grad():
        made = [
            ops.attention_block(x, 2, c, c, wide, None, square, c),
            ops.group_norm_silu(x, 2, c, c),
            ops.noise(x, t, table, eps=x)[0],
            *ops.noise(x, t, table, **drawn),
            ops.posterior_step(x, x, t, table, **drawn),
            ops.posterior_step(x, x, t, table, z=x, out=torch.empty_like(x)),
            ops.discretized_log_likelihood(x, x, x),
            ops.residual_sum(x, x, c),
            ops.randn((2, 8, 4, 4), step=3, **drawn),
        ]
    return [(y.shape, y.device.type) for y in made]


def test_every_op_takes_tensors_without_values(backend, device):
    """On meta, and as FakeTensors of the CPU and of a GPU, whatever backend is forced."""
    shape = (2, 8, 4, 4)
    assert shapes_of_every_op("meta") == [(shape, "meta")] * 10
    for kind in ("cpu", "cuda"):
        with FakeTensorMode():
            assert shapes_of_every_op(kind) == [(shape, kind)] * 10
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert shapes_of_every_op("meta") == [(shape, "meta")] * 10


def test_gradients_without_values(backend, device):
    x, parameters = inputs((2, 8, 4, 4), torch.float32, "meta", "nhwc")
    leaves = [p.requires_grad_() for p in (x, *parameters)]
    y = ops.attention_block(leaves[0], 2, *leaves[1:], num_heads=2)
    for g, p in zip(torch.autograd.grad(y, leaves, x.detach()), leaves, strict=True):
        assert (g.shape, g.dtype, g.device) == (p.shape, p.dtype, p.device)
