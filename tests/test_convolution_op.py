"""convolution as torch sees it: errors, compiling, transforms, autocast, and the weights that the
C++ keeps packed from call to call.
"""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from sanitized import BF16, EMULATED, FLAGS, KERNELS, Compiler, needs_compiler, run_checks
from test_convolution import NAMES, OPTIONS, case
from torch.library import opcheck

from fastddpm import _native, ops, reference
from fastddpm.ops import packed

needs_native = pytest.mark.skipif(_native.C is None, reason="what is kept is the native module's")


def small(name="resnet", dtype=torch.float32, device="cpu"):
    return case(name, (2, 4, 2, 3), (4, 5), dtype, device)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_gradient_can_be_differentiated(name):
    tensors, options, _ = small(name, torch.float64)
    given = [k for k in NAMES if tensors[k] is not None]

    def function(*values):
        return ops.convolution(**dict(zip(given, values, strict=True)), **options)

    leaves = [tensors[k].requires_grad_() for k in given]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_a_penalty_on_the_gradient(device):
    """create_graph=True, on every backend: the graph of the gradient is plain torch."""
    tensors, options, _ = small(device=device)
    x = tensors["x"].requires_grad_()
    y = ops.convolution(**tensors, **options)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(dx.square().sum(), x)
    exact = {k: v.detach().cpu().double() for k, v in tensors.items()}
    x = exact["x"].requires_grad_()
    options = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    y = reference.convolution(**exact, **options)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (true,) = torch.autograd.grad(dx.square().sum(), x)
    torch.testing.assert_close(twice.cpu().double(), true, rtol=1e-3, atol=1e-3)


def flat(tensors, options):
    """The arguments of the registered op."""
    before, after = reference.sides(options.get("padding", 1))
    n = tensors["x"].shape[0]
    drawn = (options.get(k) for k in ("seed", "step", "sample_index"))
    seed, step, index = drawn
    return (
        *(tensors[k] for k in ("x", "weight", "bias", "x2")),
        *(tensors[k] for k in ("norm_weight", "norm_bias", "shift", "residual")),
        options.get("num_groups") or 0, 1e-6, options.get("silu", False),
        options.get("stride", 1), before, after, options.get("upsample", 1),
        tensors["weight"].dtype, options.get("dropout", 0.0),
        None if seed is None else seed - 2**64, step, index if n else None,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["resnet", "down"])
def test_opcheck(name):
    tensors, options, grad = small(name)
    arguments = flat(
        {k: v if v is None else v.requires_grad_() for k, v in tensors.items()}, options
    )
    opcheck(torch.ops.fastddpm.convolution.default, arguments)
    x, weight, _, x2, norm_weight, norm_bias, _, _, *others = flat(
        {k: v if v is None else v.detach() for k, v in tensors.items()}, options
    )
    opcheck(
        torch.ops.fastddpm.convolution_backward.default,
        (grad, x, weight, x2, norm_weight, norm_bias, *others, [name == "down", True, True, False]),
    )


@pytest.mark.parametrize("name", ["resnet", "up", "down"])
def test_compiled(name):
    tensors, options, grad = small(name)
    given = [k for k in NAMES if tensors[k] is not None]

    def function(*values):
        return ops.convolution(**dict(zip(given, values, strict=True)), **options) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        leaves = [tensors[k].detach().requires_grad_() for k in given]
        y = call(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, grad)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_under_torch_func_and_forward_mode():
    tensors, options, _ = small("plain", torch.float64)
    x, weight = tensors["x"], tensors["weight"]

    def function(x, weight):
        return ops.convolution(x, weight, **options).square().sum()

    expected = torch.autograd.functional.jacobian(function, (x, weight))
    for a, b in zip(torch.func.grad(function, (0, 1))(x, weight), expected, strict=True):
        torch.testing.assert_close(a, b)
    singles = torch.func.vmap(lambda x: ops.convolution(x[None], weight)[0])(x)
    torch.testing.assert_close(singles, ops.convolution(x, weight))
    _, tangent = torch.func.jvp(lambda x: ops.convolution(x, weight), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, ops.convolution(torch.ones_like(x), weight))


def test_under_autocast(device):
    """The operands are rounded, the result and the weight's gradient are not."""
    tensors, options, grad = small(device=device)
    weight = tensors["weight"].requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = ops.convolution(**tensors, **options)
    exact = ops.convolution(**tensors, **options)
    assert y.dtype == torch.float32
    assert not torch.equal(y, exact)
    torch.testing.assert_close(y, exact, rtol=2e-2, atol=5e-2)
    (dweight,) = torch.autograd.grad(y, weight, grad)
    assert dweight.dtype == torch.float32
    (true,) = torch.autograd.grad(exact, weight, grad)
    torch.testing.assert_close(dweight, true, rtol=2e-2, atol=0.1)


def test_only_inputs_are_kept_for_the_gradient():
    tensors, options, _ = small()
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    kept = []

    def pack(x):
        kept.append(x.untyped_storage().data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ops.convolution(**leaves, **options)
    names = ("x", "weight", "x2", "norm_weight", "norm_bias")
    known = [leaves[k] for k in names] + [options["step"], options["sample_index"]]
    assert set(kept) <= {x.untyped_storage().data_ptr() for x in known}


# ---- what is refused -----------------------------------------------------------------------------

X, W = torch.zeros(2, 6, 4, 4), torch.zeros(5, 6, 3, 3)
INDEX = torch.arange(2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": X.byte()}, TypeError, "x must be one of float32, .*; got uint8"),
        ({"x": X[0]}, ValueError, r"x must be \(N, C, H, W\); got \(6, 4, 4\)"),
        ({"x": X[:, :0]}, ValueError, "x must have at least 1 channel, row and column"),
        ({"x": X[:, :, :0]}, ValueError, "x must have at least 1 channel, row and column"),
        ({"x": X.double()}, TypeError, "weight and x must both be float64 or neither"),
        ({"weight": W.double()}, TypeError, "weight and x must both be float64 or neither"),
        ({"weight": W.int()}, TypeError, "weight must be one of float32, .*; got int32"),
        ({"weight": None}, TypeError, "weight must be a tensor; got NoneType"),
        ({"weight": W[:, :5]}, ValueError, r"weight must be \(O, 6, k, k\), k = 1 or 3"),
        ({"weight": W[:0]}, ValueError, r"weight must be \(O, 6, k, k\), .*got \(0, 6, 3, 3\)"),
        ({"weight": W[..., :2]}, ValueError, r"weight must be .*; got \(5, 6, 3, 2\)"),
        ({"weight": torch.zeros(5, 6, 5, 5)}, ValueError, "k = 1 or 3"),
        ({"weight": W[:, 0, 0, 0]}, ValueError, r"weight must be .*; got \(5,\)"),
        ({"x2": X[:, :1, :3]}, ValueError, "x2 must have the shape of x"),
        ({"x2": X[:, :1].double()}, TypeError, "x2 and x must both be float64 or neither"),
        ({"x2": X[:, :1]}, ValueError, r"weight must be \(O, 7, k, k\)"),
        ({"bias": torch.zeros(6)}, ValueError, r"bias must have shape \(5,\); got \(6,\)"),
        ({"shift": torch.zeros(3, 5)}, ValueError, r"shift must have shape \(5,\) or \(2, 5\)"),
        ({"residual": X}, ValueError, r"residual must have the shape of the result, \(2, 5"),
        ({"stride": 3}, ValueError, "stride must be 1 or 2; got 3"),
        ({"stride": True}, ValueError, "stride must be 1 or 2; got True"),
        ({"stride": 1.0}, ValueError, "stride must be 1 or 2; got 1.0"),
        ({"padding": 1.0}, ValueError, "padding must be 0 or 1"),
        ({"upsample": 0}, ValueError, "upsample must be 1 or 2; got 0"),
        ({"padding": 2}, ValueError, r"padding must be 0 or 1, or \(before, after\).*; got 2"),
        ({"padding": (1,)}, ValueError, r"padding must be 0 or 1.*; got \(1,\)"),
        ({"padding": "same"}, ValueError, "padding must be 0 or 1.*; got 'same'"),
        ({"num_groups": 4}, ValueError, "num_groups must divide the 6 channels; got 4"),
        ({"num_groups": 0}, ValueError, "num_groups must divide the 6 channels; got 0"),
        ({"norm_weight": torch.zeros(6)}, ValueError, "norm_weight needs num_groups; got None"),
        (
            {"num_groups": 2, "norm_bias": torch.zeros(5)},
            ValueError, r"norm_bias must have shape \(6,\); got \(5,\)",
        ),
        ({"num_groups": 2, "eps": -1.0}, ValueError, "eps must be a number of at least 0"),
        ({"silu": 1}, (TypeError, ValueError), "silu"),
        ({"dropout": 1.0}, ValueError, r"dropout must be a number in \[0, 1\)"),
        ({"dropout": 0.5}, ValueError, "dropout needs seed, step and sample_index; got no seed"),
        (
            {"dropout": 0.5, "seed": 1, "step": 1, "sample_index": INDEX - 1},
            ValueError, "sample_index must be in 0",
        ),
        ({"x": X[:, :, :2, :2], "padding": 0}, ValueError, "a kernel of 3 is larger than x of 2x2"),
        (
            {"x": X[:, :, :1], "padding": (0, 1), "stride": 2},
            ValueError, r"a kernel of 3 is larger than x of 1x4 .*padding \(0, 1\)",
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_bad_input(backend, device, options, error, message):
    arguments = {"x": X, "weight": W, **options}
    arguments = {
        k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()
    }
    with pytest.raises(error, match=message):
        ops.convolution(**arguments)


# ---- weights that are kept packed ----------------------------------------------------------------


@pytest.fixture
def kept():
    """A convolution that infers: its weight, and whether the result is that of fresh tensors."""
    torch.manual_seed(0)
    x = torch.randn(2, 20, 8, 8)
    weight = torch.nn.Parameter(torch.randn(36, 20, 3, 3))

    def right() -> bool:
        with torch.no_grad():
            got = ops.convolution(x, weight)
            return torch.equal(got, ops.convolution(x, weight.detach().clone()))

    return weight, right


@needs_native
def test_what_is_kept_is_not_fooled(kept):
    weight, right = kept
    for _ in range(4):
        assert right()
    with torch.no_grad():
        weight.mul_(2)
    assert right()
    assert right()
    assert right()
    weight.data.mul_(0.5)  # which no version counter sees
    assert right()
    assert right()
    assert right()
    weight.data[3, 1, 0, 2] += 1e-3
    assert right()
    for changed in (weight, weight[5], weight[:2], weight.data.view(-1)[7::64]):  # signs alone
        assert right()
        assert right()
        with torch.no_grad():
            changed.neg_()
        assert right()
    weight.data = torch.randn_like(weight)
    assert right()
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    assert right()
    weight.data = weight.data.bfloat16()
    assert right()
    for _ in range(3):
        assert right()


@needs_native
def test_memory_that_is_used_again():
    x = torch.randn(2, 20, 8, 8)
    places = set()
    for seed in range(20):
        weight = torch.empty(36, 20, 3, 3)
        places.add(weight.data_ptr())
        weight.normal_(generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            for _ in range(3):
                y = ops.convolution(x, weight)
        assert torch.equal(y, ops.convolution(x, weight.clone().requires_grad_()))
        del weight
    assert len(places) < 20


@needs_native
def test_what_is_kept_dies_with_its_tensor():
    gc.collect()
    before = len(packed._kept)
    weights = [torch.randn(4, 3, 3, 3) for _ in range(5)]
    for weight in weights:
        ops.convolution(torch.randn(1, 3, 4, 4), weight)
    assert len(packed._kept) == before + 5
    del weight, weights
    gc.collect()
    assert len(packed._kept) == before


@needs_native
def test_nothing_is_kept_where_a_gradient_is_recorded():
    gc.collect()
    before = len(packed._kept)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    ops.convolution(torch.randn(1, 3, 4, 4), weight).sum().backward()
    assert len(packed._kept) == before


@needs_native
def test_sizes_instruction_sets_and_products_of_one_weight(kept):
    weight, right = kept
    isa = _native.isa()
    try:
        for name in (*_native.isas_available(), isa):
            _native.use_isa(name)
            for _ in range(3):
                assert right()
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    assert right()
                with torch.no_grad():
                    for size in (3, 5, 16, 33):
                        x = torch.randn(1, 20, size, size)
                        for options in ({}, {"stride": 2}, {"upsample": 2}, {"padding": 0}):
                            got = ops.convolution(x, weight, **options)
                            fresh = ops.convolution(x, weight.clone(), **options)
                            assert torch.equal(got, fresh)
    finally:
        _native.use_isa(isa)


@needs_native
def test_threads_share_what_is_kept():
    x = torch.randn(1, 20, 8, 8)
    weight = torch.randn(36, 20, 3, 3)
    expected = ops.convolution(x, weight.clone())
    right = []

    def call():
        right.extend(torch.equal(ops.convolution(x, weight), expected) for _ in range(50))

    team = [threading.Thread(target=call) for _ in range(4)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert right == [True] * 200


# ---- memory --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return Compiler(tmp_path_factory.mktemp("objects"))


CHECK = ("convolution_check", "ops/convolution", "ops/convolution_backward", "ops/packed_weights")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("isa", sorted({"plain", _native.isa() or "plain"} & FLAGS.keys()))
def test_sums_bits_and_memory(isa, compiled, tmp_path):
    """Forward and gradients, under AddressSanitizer and UndefinedBehaviorSanitizer, in memory full
    of NaN.
    """
    objects = [compiled(stem, *FLAGS[isa]) for stem in (*CHECK, *KERNELS, *BF16)]
    assert "0 of the results are wrong" in run_checks(tmp_path, objects)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("isa", EMULATED)
def test_bf16_instructions(isa, compiled, tmp_path):
    """The same for kernels of bfloat16 instructions, which run on any processor here."""
    objects = [compiled(stem) for stem in (*CHECK, *KERNELS)]
    objects += [compiled(stem, *EMULATED[isa]) for stem in BF16]
    assert "0 of the results are wrong" in run_checks(tmp_path, objects, "bf16")
