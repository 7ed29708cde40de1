"""Writing into a tensor of the caller's: what autograd and shared memory allow; tensors that torch
keeps lazily, whose memory holds other values; what a host has set; empty sizes.
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from compare import table, timesteps
from torch.autograd import forward_ad

from fastddpm import ops
from fastddpm.ops.overlap import overlaps_itself, share_memory

SHAPE = (3, 2, 4, 4)


def step(device, **options):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(device)
    arguments = {"xt": x, "model_output": x, "z": x, "t": torch.tensor([0, 7, 999]).to(device)}
    return ops.posterior_step(**{**arguments, "table": table(device=device), **options})


def elements(x: torch.Tensor) -> list[set[int]]:
    """The bytes of each element."""
    indices = itertools.product(*map(range, x.shape))
    places = [
        x.data_ptr() + x.element_size() * sum(i * s for i, s in zip(index, x.stride(), strict=True))
        for index in indices
    ]
    return [set(range(place, place + x.element_size())) for place in places]


def test_shared_memory_is_found_exactly():
    """Against all bytes of random strided views of one storage, of two element sizes."""
    pick, found = random.Random(0), {True: 0, False: 0}
    memory = torch.zeros(64)
    for _ in range(1500):
        views = []
        for _ in range(2):
            base = memory if pick.random() < 0.7 else memory.view(torch.bfloat16)
            size = [pick.randint(1, 3) for _ in range(pick.randint(0, 3))]
            stride = [pick.choice((0, 1, 2, 3, 5, 8)) for _ in size]
            last = sum((n - 1) * s for n, s in zip(size, stride, strict=True))
            views.append(base.as_strided(size, stride, pick.randint(0, 63 - last)))
        a, b = map(elements, views)
        shared = bool(set().union(*a) & set().union(*b))
        assert share_memory(*views) == shared, views
        assert overlaps_itself(views[0]) == (len(set().union(*a)) < sum(map(len, a)))
        found[shared] += 1
    assert min(found.values()) > 100


def test_writing_counts_as_a_change(device):
    """A gradient that saved what is overwritten says so, as with torch's own ops."""
    a, b = (torch.ones(SHAPE, device=device) for _ in range(2))
    y = (a.requires_grad_() * b).sum()
    before = b._version
    step(device, out=b)
    assert b._version == before + 1 or b._version == before + 2  # torch's copy_ counts too
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    xt = torch.ones(SHAPE, device=device)
    y = (a * xt).sum()
    view = xt.view(-1).view(SHAPE)
    step(device, xt=view, out=view)  # in place, through a view
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_what_has_a_derivative_is_not_overwritten(device):
    leaf = torch.zeros(SHAPE, device=device, requires_grad=True)
    for out in (leaf, leaf[:], (leaf * 2)[:]):
        with pytest.raises(ValueError, match="out can't be given where out requires grad"):
            step(device, out=out)
    with torch.no_grad():
        expected = step(device)
        assert torch.equal(step(device, out=leaf), expected)
    out = torch.zeros(SHAPE, device=device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(out, out)
        for options in ({"xt": dual, "out": torch.zeros_like(out)}, {"out": dual}):
            with pytest.raises(ValueError, match="has a tangent"):
                step(device, **options)


def test_inference_tensors(device):
    expected = step(device)
    with torch.inference_mode():
        frozen = torch.zeros(SHAPE, device=device)
        assert torch.equal(step(device, out=frozen), expected)
    with pytest.raises(ValueError, match=r"only torch.inference_mode\(\) may write it"):
        step(device, out=frozen)
    out = torch.zeros(SHAPE, device=device)
    with torch.inference_mode():
        step(device, out=out)
    assert out._version > 0


def operands(wide):
    """name -> how one operand and out lie in a wider tensor; the last is whether they may."""
    n, c, h, w = SHAPE
    return {
        "the same": (wide[:, :c], wide[:, :c], True),
        "side by side": (wide[:, :c], wide[:, c : 2 * c], True),
        "every other": (wide[:, : 2 * c : 2], wide[:, 1 : 2 * c : 2], True),
        "shifted by a channel": (wide[:, :c], wide[:, 1 : c + 1], False),
        "shifted by an element": (
            *(wide.flatten()[i : i + n * c * h * w].view(SHAPE) for i in (0, 1)),
            False,
        ),
        "transposed": (wide[:, :c], wide[:, :c].transpose(2, 3), False),
    }


@pytest.mark.backends("cpu", "reference")  # the same check for all
@pytest.mark.parametrize("name", ["xt", "model_output", "z", "log_variance"])
@pytest.mark.parametrize("case", list(operands(torch.zeros(3, 8, 4, 4))))
def test_out_and_an_operand(device, name, case):
    wide = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(2)).to(device)
    x, out, allowed = operands(wide)[case]
    expected, before = step(device, **{name: x.clone()}), wide.clone()
    if allowed:
        assert torch.equal(step(device, **{name: x}, out=out), expected)
        return
    with pytest.raises(ValueError, match=f"out must be {name} itself or share no memory with it"):
        step(device, **{name: x}, out=out)
    assert torch.equal(wide, before)


def test_out_is_no_operand_of_another_kind(device):
    memory = torch.zeros(1000, 8, device=device)
    memory.copy_(table())
    with pytest.raises(ValueError, match="out must be table itself or share no memory"):
        step(device, table=memory, out=memory.flatten()[8 : 8 + 96].view(SHAPE))


@pytest.mark.backends("cpu", "reference")
@pytest.mark.parametrize(
    "strides", [(32, 16, 4, 2), (16, 16, 4, 1), (8, 32, 1, 4), (1, 3, 8, 9), (32, 16, 0, 1)]
)
def test_out_that_overlaps_itself(device, strides):
    memory = torch.zeros(400, device=device)
    with pytest.raises(ValueError, match=r"out must (not be an expanded|have a place of its own)"):
        step(device, out=memory.as_strided(SHAPE, strides))
    assert not memory.any()


@pytest.mark.parametrize("strides", [(64, 32, 8, 2), (1, 3, 8, 32), (2, 1, 30, 6)])
def test_out_of_odd_strides(device, strides):
    out = torch.zeros(400, device=device).as_strided(SHAPE, strides)
    assert torch.equal(step(device, out=out), step(device))


# ---- lazily negated and lazily zero --------------------------------------------------------------


def negated(x):
    """x, in memory that holds -x."""
    lazy = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert lazy.is_neg()
    return lazy


def zeros(x):
    return torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device)


def ops_of(device):
    """name -> (function of float tensors, their shapes)."""
    t, tab = torch.tensor([0, 7, 999]).to(device), table(device=device)
    n, c = SHAPE[:2]
    index = torch.arange(3).to(device)
    return {
        "noise": (lambda x, eps: ops.noise(x, t, tab, eps=eps)[0], [SHAPE] * 2),
        "noise drawn": (lambda x: ops.noise(x, t, tab, seed=1, sample_index=index)[0], [SHAPE]),
        "posterior_step": (
            lambda x, o, z, v: ops.posterior_step(x, o, t, tab, z=z, log_variance=v),
            [SHAPE] * 4,
        ),
        "group_norm_silu": (
            lambda x, w, b, s, h: ops.group_norm_silu(x, 1, w, b, scale=s, shift=h),
            [SHAPE, (c,), (c,), (n, c), (n, c)],
        ),
        "attention_block": (
            lambda x, w, b, q, qb, p, pb: ops.attention_block(x, 1, w, b, q, qb, p, pb),
            [SHAPE, (c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,)],
        ),
        "discretized_log_likelihood": (
            lambda x, m, s: ops.discretized_log_likelihood(x.detach(), m, s),
            [SHAPE] * 3,
        ),
        "squared_error": (
            lambda p, q: ops.squared_error(p, q)[:, None, None, None].expand(SHAPE),
            [SHAPE] * 2,
        ),
    }


@pytest.mark.parametrize("lazy", [negated, zeros])
@pytest.mark.parametrize("name", list(ops_of("cpu")))
def test_lazy_operands_and_gradients(backend, device, name, lazy):
    function, shapes = ops_of(device)[name]
    torch.manual_seed(3)
    inputs = [torch.randn(shape).to(device) / 2 for shape in shapes]
    grad = torch.randn(SHAPE).to(device)

    def run(changed, grad):
        leaves = [x.detach().requires_grad_() for x in changed]
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, grad, allow_unused=True)]

    for at in range(len(inputs) + 1):
        plain = [*inputs, grad]
        if lazy is zeros:
            plain[at] = torch.zeros_like(plain[at])
        held = list(plain)
        held[at] = lazy(plain[at])
        for a, b in zip(run(held[:-1], held[-1]), run(plain[:-1], plain[-1]), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                # The order of a sum may depend on where in memory an operand lies.
                assert (a - b).abs().max() <= 1e-5 * b.abs().max(), (name, at)


def test_lazy_tables_and_out(device):
    expected = step(device)
    assert torch.equal(step(device, table=negated(table(device=device))), expected)
    for out in (negated(expected), zeros(expected)):
        with pytest.raises(ValueError, match="out must be plain memory"):
            step(device, out=out)
    out = torch.zeros_like(expected)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(device)
    assert torch.equal(step(device, xt=negated(x), out=out), expected)
    assert out._version > 0


def test_tensors_without_strides():
    x = torch.randn(SHAPE)
    with pytest.raises(TypeError, match="xt must be a dense tensor; got sparse_coo"):
        step("cpu", xt=x.to_sparse())
    with pytest.raises(TypeError, match="z must be a dense tensor; got _mkldnn"):
        step("cpu", z=x.to_mkldnn())
    with pytest.raises(TypeError, match="weight must be a dense tensor; got sparse_coo"):
        ops.group_norm_silu(x, 1, torch.ones(2).to_sparse(), None)


# ---- transforms ----------------------------------------------------------------------------------


def test_integers_of_each_sample_of_a_vmap():
    """Steps and sample indices may be mapped over; a wrong one is found in any of the samples."""
    t = torch.tensor([[0, 7, 999], [5, 1, 2]])
    x = torch.randn(SHAPE)

    def mapped(row):
        return ops.posterior_step(x, x, row, table(), z=x)

    expected = torch.stack([mapped(row) for row in t])
    assert torch.allclose(torch.func.vmap(mapped)(t), expected, atol=1e-6)
    index = torch.arange(6).view(2, 3)
    drawn = torch.func.vmap(lambda i: ops.randn((3, 4), seed=1, step=2, sample_index=i))(index)
    expected = ops.randn((6, 4), seed=1, step=2).view(2, 3, 4)
    assert torch.allclose(drawn, expected, atol=1e-6)
    t[1, 2] = 1000
    with pytest.raises(ValueError, match=r"t must be in 0 \.\. 999; got 1000"):
        torch.func.vmap(mapped)(t)


def test_forward_mode_through_attention():
    torch.manual_seed(5)
    x, dx = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    qkv, proj = torch.randn(6, 2), torch.randn(2, 2)

    def block(x):
        return ops.attention_block(x, 1, None, None, qkv.to(x), None, proj.to(x), None)

    _, tangent = torch.func.jvp(block, (x,), (dx,))
    a, b = (block(x.double() + sign * 1e-6 * dx.double()) for sign in (1, -1))
    assert torch.allclose(tangent, ((a - b) / 2e-6).float(), atol=1e-4)


def test_forward_mode_without_a_tangent_changes_nothing(device):
    expected = step(device)
    drawn = ops.randn((3, 4), seed=1, step=2, device=device)
    with forward_ad.dual_level():
        assert torch.equal(step(device), expected)
        assert torch.equal(ops.randn((3, 4), seed=1, step=2, device=device), drawn)


# ---- options -------------------------------------------------------------------------------------


def test_options_are_numpys_numbers_too_and_nothing_else():
    x, weight = torch.randn(2, 8, 4, 4), torch.randn(8)
    expected = ops.group_norm_silu(x, 4, weight, weight, 1e-5)
    got = ops.group_norm_silu(x, np.int64(4), weight, weight, np.float64(1e-5))
    assert torch.equal(got, expected)
    square = (torch.randn(24, 8), None, torch.randn(8, 8), None)
    block = ops.attention_block(x, 4, weight, weight, *square, num_heads=2)
    assert torch.equal(
        ops.attention_block(x, np.int32(4), weight, weight, *square, num_heads=np.int64(2)), block
    )
    assert ops.randn((np.int64(2), 3), seed=1, step=0).shape == (2, 3)
    for call, message in (
        (lambda: ops.group_norm_silu(x, 4.0, weight, weight), "num_groups must divide the 8"),
        (lambda: ops.group_norm_silu(x, torch.tensor(4.5), weight, weight), "num_groups must"),
        (lambda: ops.randn((torch.tensor(2.5), 3), seed=1, step=0), "shape must be"),
        (lambda: ops.group_norm_silu(x, 4, weight, weight, "1"), "eps must be a number"),
        (lambda: ops.group_norm_silu(x, 4, weight, weight, silu="no"), "silu must be True or"),
        (lambda: step("cpu", clip="no"), "clip must be True or False; got 'no'"),
        (lambda: step("cpu", clip=torch.tensor([True, False])), "clip must be True or False"),
        (lambda: ops.randn((2, 2**62), seed=1, step=0), r"shape must be of less than 2\^48"),
        (lambda: ops.randn((2, 3), seed=1, step=0, device="toaster"), "device must be one that"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# ---- what a host has set, and empty sizes --------------------------------------------------------


def everything(device, functions):
    results = [ops.randn((3, 5), seed=1, step=3), ops.randn((2, 2), seed=1, step=2, device=device)]
    for name, (function, shapes) in functions.items():
        if name == "attention_block":  # asks for the products of autocast by design
            continue
        generator = torch.Generator().manual_seed(4)
        leaves = [
            torch.randn(s, generator=generator, dtype=torch.float32, device="cpu").to(device) / 2
            for s in shapes
        ]
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [x.clone().requires_grad_() for x in leaves]
            y = function(*leaves)
            grads = torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
        results += [y, *(g for g in grads if g is not None)]
    return results


@pytest.mark.parametrize("host", ["float64", "float16", "meta", "deterministic", "autocast"])
def test_results_do_not_depend_on_what_the_host_has_set(device, host):
    functions = ops_of(device)
    expected = everything(device, functions)
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    try:
        if host in ("float64", "float16"):
            torch.set_default_dtype(getattr(torch, host))
        if host == "deterministic":
            torch.use_deterministic_algorithms(True)
        if host == "meta":
            with torch.device("meta"):
                got = everything(device, functions)
        else:
            with torch.autocast(device.type, torch.bfloat16, enabled=host == "autocast"):
                got = everything(device, functions)
    finally:
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic)
    for a, b in zip(got, expected, strict=True):
        assert (a.dtype, a.device) == (b.dtype, b.device)
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 2, 4, 4), (2, 0, 4, 4), (2, 2, 0, 4), (2, 2, 4, 0)])
def test_empty_sizes_are_the_same_on_every_backend(backend, device, shape):
    x, c = torch.zeros(shape, device=device, requires_grad=True), shape[1]
    t, tab = timesteps(2)[: shape[0]].to(device), table(device=device)
    weight = torch.ones(c, device=device, requires_grad=True)
    for y in (
        ops.noise(x, t, tab, eps=x)[0],
        ops.posterior_step(x, x, t, tab, z=x),
        ops.posterior_step(x, x, t, tab, seed=0, sample_index=t),
        ops.discretized_log_likelihood(x, x, x),
        ops.randn(shape, seed=0, step=1, device=device),
    ):
        assert y.shape == shape
        if y.requires_grad:
            y.sum().backward()
    norm = [lambda: ops.group_norm_silu(x, 1, weight, weight)]
    if backend != "cuda":
        wide = weight.detach()[:, None]
        qkv, proj = wide.new_ones(3 * c, c), wide.new_ones(c, c)
        norm.append(lambda: ops.attention_block(x, 1, weight, weight, qkv, None, proj, None))
    for function in norm:
        if c == 0:
            with pytest.raises(ValueError, match=r"x must have at least 1 channel; got \(2, 0, 4"):
                function()
            continue
        y = function()
        assert y.shape == shape
        weight.grad = None
        y.sum().backward()
        assert torch.equal(weight.grad, torch.zeros_like(weight))
