"""The Triton backend itself: what the tests of the ops do not ask of every backend."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import card
import pytest
import torch
from compare import assert_exact, double, in_layout, table

from fastddpm import reference
from fastddpm.ops import dispatch

HERE = Path(__file__).parent
KERNELS = {
    "_randn_kernel", "_choices_kernel", "_noise_kernel", "_posterior_step_kernel",
    "_group_norm_silu_kernel",
    "_group_norm_silu_backward_kernel", "_partial_statistics_kernel", "_gradient_sums_kernel",
    "_gradient_kernel", "_parameter_gradients_kernel", "_residual_sum_kernel", "_linear_kernel",
    "_weight_gradient_kernel", "_attention_kernel", "_delta_kernel", "_dq_kernel", "_dkv_kernel",
    "_discretized_log_likelihood_kernel", "_squared_error_kernel", "_squared_error_mean_kernel",
    "_squared_error_backward_kernel", "_adam_kernel", "_squares_kernel", "_vlb_term_kernel",
    "_vlb_term_sums_kernel",
}  # fmt: skip
OF_NO_DTYPE = {
    "_choices_kernel",
    "_squared_error_mean_kernel",
    "_vlb_term_sums_kernel",
}  # compiled with the first
ELEMENTWISE = {
    f"_{op}_kernel"
    for op in (
        *("randn", "noise", "posterior_step", "residual_sum", "discretized_log_likelihood"),
        *("squared_error", "squared_error_mean", "squared_error_backward"),
        *("vlb_term", "vlb_term_sums"),
    )
}
NORM = {
    "_group_norm_silu_kernel", "_group_norm_silu_backward_kernel", "_partial_statistics_kernel",
    "_gradient_sums_kernel", "_gradient_kernel",
}  # fmt: skip
TOKENS = {  # whose tiles are tokens in NHWC, or their buffers
    "_linear_kernel", "_weight_gradient_kernel", "_attention_kernel", "_delta_kernel",
    "_dq_kernel", "_dkv_kernel",
}  # fmt: skip
DTYPES = "bfloat16", "float32", "float16"  # the first in every way that a kernel is compiled
COMPILED = {80: DTYPES, 90: DTYPES[:1], 100: DTYPES[:1]}  # by compute capability
ARCHITECTURES = 80, 86, 89, 90, 100, 120
WITHOUT_SPILLS = "3.6", "3.8", "3.9"  # versions of triton that were tried
# Bytes of local memory a thread with any other, and with these for rarer ways and architectures.
MARGIN = 32
OLDEST_MARGIN = 96  # 3.3: 80 bytes in half-precision attention on sm_90, 24 at most elsewhere
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.fixture
def triton():
    """The backend's module."""
    backend = dispatch.load("triton")
    if backend.missing:
        pytest.skip(backend.missing)
    return backend.module


def attention_inputs(triton, shape, dtype, layout="nhwc", gain=1.0):
    c = shape[1]
    x = in_layout((torch.randn(shape) - 0.5).to(triton.DEVICE, dtype), layout)
    parameters = [
        *(torch.randn(c), torch.randn(c)),
        *(torch.randn(3 * c, c) * gain / c**0.5, torch.randn(3 * c)),
        *(torch.randn(c, c) / c**0.5, torch.randn(c)),
    ]
    return x, [p.to(triton.DEVICE, dtype) for p in parameters]


def check_attention(triton, shape, groups, heads, dtype, layout="nhwc", gain=1.0, expand=False):
    """Values and all gradients against float64 autograd of the reference, beside eager torch."""
    x, parameters = attention_inputs(triton, shape, dtype, layout, gain)
    grad = torch.randn(()).to(x).expand(shape) if expand else torch.randn(shape).to(x)

    def by_autograd(cast):
        leaves = [cast(p).requires_grad_() for p in (x.detach(), *parameters)]
        y = reference.attention_block(leaves[0], groups, *leaves[1:], num_heads=heads)
        return [y, *torch.autograd.grad(y, leaves, cast(grad))]

    got = [
        triton.attention_block(x, groups, *parameters, num_heads=heads),
        *triton.attention_block_backward(grad, x, groups, *parameters, heads, 1e-6),
    ]
    names = ("y", "x", "norm_w", "norm_b", "qkv_w", "qkv_b", "proj_w", "proj_b")
    true, plain = by_autograd(lambda p: double(p).clone()), by_autograd(lambda p: p.clone())
    for name, a, b, c in zip(names, got, true, plain, strict=True):
        assert_exact(a, b, c, ulps=16, what=name)
        assert a.dtype == dtype
    assert got[0].stride() == got[1].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize(
    ("shape", "groups", "heads"),
    [
        ((1, 16, 2, 3), 4, 1),  # heads of 16
        ((1, 96, 3, 3), 32, 2),  # of 48: no power of two
        ((1, 160, 2, 2), 32, 1),  # wider than a tile of scores, no multiple of it
        ((2, 32, 1, 1), 4, 2),  # one token
        ((2, 8, 11, 7), 2, 2),  # more tokens than a tile, no multiple of it
    ],
    ids=str,
)
def test_attention_heads(triton, shape, groups, heads):
    check_attention(triton, shape, groups, heads, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["nchw", "nhwc_slice"])
def test_attention_in_half_precision(triton, dtype, layout):
    check_attention(triton, (2, 24, 5, 3), 4, 3, dtype, layout)


def test_attention_with_expanded_gradients(triton):
    check_attention(triton, (2, 12, 3, 3), 3, 1, torch.float32, "slice", expand=True)


def test_the_widest_head(triton):
    x, parameters = attention_inputs(triton, (1, 512, 1, 3), torch.float16)
    y = triton.attention_block(x, 32, *parameters)
    truth = reference.attention_block(double(x), 32, *map(double, parameters))
    assert_exact(y, truth, reference.attention_block(x, 32, *parameters))


def test_attention_of_large_scores(triton):
    """exp of a score overflows here; that of its distance to the row's largest does not."""
    x, parameters = attention_inputs(triton, (1, 16, 4, 4), torch.float32, gain=20.0)
    y = triton.attention_block(x, 4, *parameters)
    truth = reference.attention_block(double(x), 4, *map(double, parameters))
    plain = reference.attention_block(x, 4, *parameters)
    assert_exact(y, truth, plain, ulps=64)


def test_attention_without_biases_and_without_tokens(triton):
    x, (_, _, qkv_w, _, proj_w, _) = attention_inputs(triton, (1, 12, 2, 2), torch.float32)
    arguments = 3, None, None, qkv_w, None, proj_w, None
    truth = reference.attention_block(double(x), 3, *map(double, arguments[1:]))
    assert_exact(triton.attention_block(x, *arguments), truth, ulps=32)
    grads = triton.attention_block_backward(x, x, *arguments, 1, 1e-6)
    assert [g is None for g in grads] == [False, True, True, False, True, False, True]
    empty = x[:0]
    assert triton.attention_block(empty, *arguments).shape == empty.shape
    grads = triton.attention_block_backward(empty, empty, *arguments, 1, 1e-6)
    assert torch.equal(grads[3], torch.zeros_like(qkv_w))


def test_parameters_of_another_dtype(triton):
    """float32 parameters of bfloat16 images: multiplied as bfloat16, their gradients float32."""
    x, parameters = attention_inputs(triton, (1, 16, 3, 3), torch.bfloat16)
    wide = [p.float() for p in parameters]
    for got, same in zip(
        triton.attention_block_backward(x, x, 4, *wide, 1, 1e-6),
        triton.attention_block_backward(x, x, 4, *parameters, 1, 1e-6),
        strict=True,
    ):
        assert torch.equal(got.to(same.dtype), same)


@pytest.fixture
def torch_precision():
    """torch's settings of float32 products, put back afterwards."""
    matmul = torch.backends.cuda.matmul
    yield matmul
    torch.set_float32_matmul_precision("highest")
    if hasattr(matmul, "fp32_precision"):
        torch.backends.fp32_precision = matmul.fp32_precision = "none"


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        ([], "ieee"),
        ([("cuda.matmul.allow_tf32", True)], "tf32"),
        ([("cuda.matmul.allow_tf32", False)], "ieee"),
        ([("cuda.matmul.fp32_precision", "tf32")], "tf32"),
        ([("cuda.matmul.fp32_precision", "ieee")], "ieee"),
        ([("cuda.matmul.fp32_precision", "none")], "ieee"),
        ([("fp32_precision", "tf32")], "tf32"),
        ([("fp32_precision", "tf32"), ("cuda.matmul.fp32_precision", "ieee")], "ieee"),
        ([("cuda.matmul.allow_tf32", True), ("cuda.matmul.fp32_precision", "ieee")], "ieee"),
        ([("cuda.matmul.allow_tf32", False), ("cuda.matmul.fp32_precision", "tf32")], "tf32"),
    ],
)  # fmt: skip
def test_tf32_where_torch_is_told_to(triton, torch_precision, settings, precision):
    """In torch's older settings and its newer ones, one after the other too."""
    from fastddpm.kernels import linear

    if any("fp32" in name for name, _ in settings) and not hasattr(
        torch_precision, "fp32_precision"
    ):
        pytest.skip("this torch has the older setting only")
    for name, value in settings:
        *path, last = name.split(".")
        setattr(functools.reduce(getattr, path, torch.backends), last, value)
    assert linear.precision() == precision
    x, parameters = attention_inputs(triton, (1, 16, 1, 2), torch.float32)
    assert triton.attention_block(x, 4, *parameters).isfinite().all()


def test_offsets_beyond_int32(triton):
    """Two samples that lie more than 2^31 elements apart."""
    if triton.DEVICE != "cpu":
        pytest.skip("what lies between them costs no memory on the host only")
    apart = 2**31 + 8
    wide = torch.empty(2 * apart, dtype=torch.uint8)
    x0 = wide.as_strided((2, 1, 1, 4), (apart, 4, 4, 1))
    x0.copy_(torch.tensor([[0, 1, 2, 3], [252, 253, 254, 255]]).reshape(2, 1, 1, 4))
    t, tab = torch.tensor([3, 4]), table()
    eps = torch.randn(x0.shape)
    got, _ = triton.noise(x0, t, tab, eps=eps)
    assert torch.equal(got, triton.noise(x0.clone(), t, tab, eps=eps)[0])


def norm_inputs(triton, shape, c2, dtype, layouts, before):
    """(images x, residual, x2 and the gradients of y and u, before, parameters)."""
    (n, c), channels = shape[:2], shape[1] + c2

    def image(layout, channels):
        x = torch.randn(n, channels, *shape[2:]) * 0.7 - 1.3
        return in_layout(x.to(triton.DEVICE, dtype), layout)

    x, residual, grad_u = (image(layout, c) for layout in layouts)
    x2 = image(layouts[0], c2) if c2 else None
    grad = image(layouts[1], channels)
    before = torch.randn(*before, c).to(triton.DEVICE)
    parameters = [torch.randn(*size, channels) for size in ((), (), (n,), (n,))]
    return x, residual, x2, grad, grad_u, before, [p.to(triton.DEVICE) for p in parameters]


@pytest.fixture
def many_tiles(monkeypatch):
    """Slabs of a hundred elements are cut in chunks and tiles, as those of large images are."""
    for name, elements in {"SLAB": 128, "TILE": 512, "LEAST": 256}.items():
        monkeypatch.setattr(f"fastddpm.kernels.group_norm.{name}", elements)


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize(
    ("shape", "c2", "groups", "dtype", "layouts", "p"),
    [
        ((2, 16, 9, 7), 16, 8, torch.bfloat16, ("nhwc", "nhwc", "nhwc"), 0.3),
        ((2, 12, 9, 7), 6, 3, torch.float32, ("nhwc", "nchw", "slice"), 0.5),  # groups of 6
        ((1, 10, 8, 8), 2, 3, torch.float16, ("nchw", "nhwc_slice", "nhwc"), 0.9),
        ((3, 7, 11, 13), 0, 1, torch.float32, ("nhwc", "nhwc", "nchw"), 0.1),
    ],
    ids=str,
)
def test_slabs_of_many_tiles(triton, many_tiles, shape, c2, groups, dtype, layouts, p, summed):
    """All that the norm can take in: values and all gradients."""
    x, residual, x2, grad, grad_u, before, parameters = norm_inputs(
        triton, shape, c2, dtype, layouts, (shape[0],) if summed else ()
    )
    index = torch.arange(shape[0], device=triton.DEVICE) * 2**33 + 5
    stream = {"dropout": p, "seed": 2**40 + 1, "step": index % 7, "sample_index": index}

    def forward(module, cast, x, before, residual):
        w, b, scale, shift = map(cast, parameters)
        return module.group_norm_silu(
            cast(x), groups, w, b, 1e-5, scale=scale, shift=shift,
            before=cast(before), residual=cast(residual), x2=cast(x2),
            **{name: cast(value) for name, value in stream.items()},
        )  # fmt: skip

    def plain(value):
        return value

    if summed:  # the norm is that of u as it was written
        y, u = forward(triton, plain, x, before, residual)
        assert_exact(u, reference.residual_sum(*map(double, (x, residual, before))), what="u")
        assert u.stride() == torch.empty_like(x).stride()
        x, before = u, None
    else:
        y, grad_u = forward(triton, plain, x, before, None), None
    sources = x, before, None
    true, eager = forward(reference, double, *sources), forward(reference, plain, *sources)
    assert_exact(y, true, eager, what="y")
    assert torch.equal(y == 0, eager == 0)
    assert y.stride() == eager.stride()

    def backward(module, cast):
        w, b, scale, shift = map(cast, parameters)
        return module.group_norm_silu_backward(
            cast(grad), cast(x), groups, w, b, 1e-5, scale, shift, True, cast(before), cast(x2),
            cast(grad_u), *map(cast, stream.values()),
        )  # fmt: skip

    names = ("x", "weight", "bias", "scale", "shift", "before", "x2")
    grads = backward(triton, plain), backward(reference, double), backward(reference, plain)
    for name, got, truth, same in zip(names, *grads, strict=True):
        assert (got is None) == (truth is None), name
        if got is not None:
            assert_exact(got, truth, same, ulps=16, what=name)
            assert (got.dtype, got.shape) == (same.dtype, same.shape)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("shape", [(1, 8, 3, 3), (1, 8, 40, 40), (1, 8, 1, 1)], ids=str)
def test_the_cut_of_a_sample_is_the_same_in_every_batch(triton, shape, groups):
    """Nothing that a program does or is compiled for depends on the batch, but their number."""
    from fastddpm.kernels.group_norm import Cut

    def cut(x, kept):
        arguments = Cut(groups, [x, x], [x], kept=kept).arguments()
        strides = [view[1:] for view in Cut(groups, [x], kept=kept).views]
        return {name: value for name, value in arguments.items() if name != "N"}, strides

    for layout in ("nchw", "nhwc", "nhwc_slice"):
        one = in_layout(torch.zeros(shape), layout)
        for n in (2, 16, 33):
            batch = in_layout(torch.zeros(n, *shape[1:]), layout)
            for kept in (1, 2):
                assert cut(batch, kept) == cut(batch[1:2], kept) == cut(one, kept)


def test_offsets_in_a_sample_beyond_int32(triton):
    """Two channels of a sample that lie more than 2^31 elements apart."""
    if triton.DEVICE != "cpu":
        pytest.skip("what lies between them costs no memory on the host only")
    apart = 2**31 + 8
    wide = torch.empty(apart + 8, dtype=torch.float16)
    x = wide.as_strided((1, 2, 1, 4), (apart, apart, 4, 1))
    x.copy_(torch.randn(x.shape))
    y = triton.group_norm_silu(x, 1, None, None)
    assert torch.equal(y, triton.group_norm_silu(x.contiguous(), 1, None, None))


@pytest.mark.parametrize("seed", [5, -3])
def test_a_seed_that_is_read_when_the_kernel_runs(triton, seed):
    x = torch.randn(2, 3, 4, 4).to(triton.DEVICE)
    t = torch.tensor([3, 9], device=triton.DEVICE)
    tab = table().to(triton.DEVICE)
    bits = torch.tensor([seed], device=triton.DEVICE)
    drawn = triton.posterior_step(x, x, t, tab, seed=bits, sample_index=t)
    assert torch.equal(drawn, triton.posterior_step(x, x, t, tab, seed=seed, sample_index=t))
    bits += 1
    assert not torch.equal(drawn, triton.posterior_step(x, x, t, tab, seed=bits, sample_index=t))


def test_it_is_never_chosen_on_the_cpu_by_itself(triton):
    chosen = dispatch.choose("group_norm_silu", torch.zeros(1, 2, 2, 2))
    assert chosen is not triton


def test_what_it_can_not_do(triton):
    other = "cuda" if triton.DEVICE == "cpu" else "cpu"
    if other == "cpu" or card.VISIBLE:
        assert f"a tensor is on {other}" in triton.unsupported(
            "noise", torch.zeros(1, device=other)
        )
    x = torch.zeros(1, 1, device=triton.DEVICE)
    assert triton.unsupported("noise", x) is None
    assert triton.unsupported("noise", x.double()) == "float64 is not supported"
    assert triton.unsupported("randn", x, dtype=torch.float64) == "float64 is not supported"
    assert "5 dimensions" in triton.unsupported("group_norm_silu", x[None, None, None])
    huge = torch.zeros(1, 1, device=triton.DEVICE).expand(1, 2**31)
    assert "too large" in triton.unsupported("noise", huge)


@needs_triton
def test_without_interpreter_and_gpu_it_is_missing_with_the_reason():
    code = "from fastddpm.ops import dispatch; print(dispatch.load('triton').missing)"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=HERE.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "torch finds no CUDA device, and TRITON_INTERPRET=1 is not set"


def compiled_by_triton(folder, jobs):
    """The lines of compile_triton.py for each (capability, arguments), a few at the same time."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if not (tools / "ptxas").exists() or not (tools / "cuobjdump").exists():
        pytest.skip("this triton has no ptxas and cuobjdump of its own")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder)}
    paths = str(HERE.parent), os.environ.get("PYTHONPATH")
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def run(capability, arguments):
        done = subprocess.run(
            [sys.executable, HERE / "compile_triton.py", str(capability), *arguments],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [{"sm": capability, **json.loads(line)} for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [kernel for lines in pool.map(run, *zip(*jobs, strict=True)) for kernel in lines]


def check_compiled(kernels, *, rare=False):
    """For GPUs that need not be there: no local memory, shared memory that every one has, and of
    what waits for memory at least a quarter of the threads that fit.

    What ptxas spills of a kernel near a step of its occupancy is its version's: those that these
    kernels were made with leave nothing but in rare ways, any other may leave MARGIN bytes a
    thread, the oldest OLDEST_MARGIN.
    """
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    margin = OLDEST_MARGIN if version == "3.3" else MARGIN
    allowed = margin if rare or version not in WITHOUT_SPILLS else 0
    assert {kernel["kernel"] for kernel in kernels} == KERNELS
    for kernel in kernels:
        assert kernel["stack"] <= allowed, (f"triton {version}", kernel)
        assert kernel["shared"] <= 99 * 1024, kernel
        assert kernel["registers"] <= 128 or kernel["kernel"] not in ELEMENTWISE, kernel


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compiled_by_triton(tmp_path_factory.mktemp("triton"), COMPILED.items())


@needs_triton
@pytest.mark.parametrize(
    ("capability", "dtype"), [(c, dtype) for c, dtypes in COMPILED.items() for dtype in dtypes]
)
def test_every_kernel_compiles(compiled, capability, dtype):
    of_sm = [k for k in compiled if k["sm"] == capability]
    those = [k for k in of_sm if k["dtype"] == dtype or k["kernel"] in OF_NO_DTYPE]
    check_compiled(those)
    assert {k["kernel"] for k in those if k["wide"]} >= TOKENS


@needs_triton
def test_images_are_walked_in_vectors(compiled):
    """In NHWC, bfloat16, with all that the norm can take in: but for its five parameters no element
    is loaded or stored by itself.
    """
    for capability in COMPILED:
        of_images = [k for k in compiled if (k["sm"], k["dtype"]) == (capability, DTYPES[0])]
        for name in (*NORM, "_residual_sum_kernel"):
            first = next(k for k in of_images if k["kernel"] == name)  # those of NHWC come first
            assert first["wide"] > 0, first
            assert first["elements"] <= 5, first


@needs_triton
@pytest.mark.slow
def test_one_program_serves_every_batch(tmp_path):
    """The compiler is not told how many samples there are, and so makes one program for all."""
    kernels = compiled_by_triton(tmp_path, [(80, ("--batches", "bfloat16"))])
    once = {
        *NORM, *ELEMENTWISE, "_parameter_gradients_kernel", "_parameter_gradients_kernel of chunks",
        "_group_norm_silu_kernel of chunks", "_partial_statistics_kernel of the gradient",
    }  # fmt: skip
    assert sorted(k["kernel"] for k in kernels) == sorted(name.split(" ")[0] for name in once)


@needs_triton
@pytest.mark.slow
def test_every_kernel_compiles_in_every_way(tmp_path):
    """Each way to compile it, for each architecture, and for each dtype on one of them."""
    cases = [(capability, DTYPES[:1]) for capability in ARCHITECTURES]
    cases += [(90, (dtype,)) for dtype in DTYPES[1:]]
    kernels = compiled_by_triton(tmp_path, cases)
    for capability, (dtype,) in cases:
        those = [k for k in kernels if (k["sm"], k["dtype"]) == (capability, dtype)]
        check_compiled(those, rare=True)
