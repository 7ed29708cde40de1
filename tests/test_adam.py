"""adam and grad_norm, on every backend: against torch's fused Adam, clip_grad_norm_ and an average
in float64, over many steps."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from compare import LAYOUTS, assert_same_for_any_thread_count, in_layout, require
from torch.library import opcheck

from fastddpm import _native, ops, reference

SHAPES = [(1,), (), (7,), (8, 3, 3, 3), (0, 4), (33, 65), (2, 3, 1, 2, 2), (4099,)]
OPTIONS = {"lr": 2e-3, "betas": (0.9, 0.99), "eps": 1e-8}


@pytest.fixture(autouse=True)
def _can(request):
    if "backend" in request.fixturenames:
        require("adam", request.getfixturevalue("backend"))


class Lists:
    """The tensors of a few parameters, as ops.adam takes them."""

    def __init__(self, device="cpu", shapes=SHAPES, dtype=torch.float32, copies=(), layout=None):
        def tensors(make=torch.zeros):
            made = [make(shape).to(device, dtype) for shape in shapes]
            return [in_layout(x, layout) if layout and x.dim() == 4 else x for x in made]

        self.params, self.averages = tensors(torch.randn), tensors(torch.randn)
        self.exp_avgs, self.exp_avg_sqs = tensors(), tensors()
        self.steps = [torch.zeros(()).to(device) for _ in shapes]
        self.copies = [
            torch.zeros_like(p, dtype=copies[i % len(copies)]) if copies and i % 4 != 3 else None
            for i, p in enumerate(self.params)
        ]

    def all(self):
        lists = (self.params, self.exp_avgs, self.exp_avg_sqs, self.steps, self.averages)
        return [x for tensors in (*lists, self.copies) for x in tensors if x is not None]

    def step(self, grads, **options):
        options = {**OPTIONS, "share": 0.01, "clip": 1.0, **options}
        ops.adam(
            self.params, grads, self.exp_avgs, self.exp_avg_sqs, self.steps, self.averages,
            self.copies, **options,
        )  # fmt: skip


class Torch:
    """The same parameters in float64, moved by torch.optim.Adam."""

    def __init__(self, lists):
        self.params = [p.detach().cpu().double().requires_grad_() for p in lists.params]
        self.averages = [a.cpu().double() for a in lists.averages]
        self.adam = torch.optim.Adam(self.params, **OPTIONS)

    def step(self, grads, share=0.01, clip=1.0, lr=OPTIONS["lr"]):
        for p, g in zip(self.params, grads, strict=True):
            p.grad = None if g is None else g.cpu().double()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(self.params, clip)
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        for a, p in zip(self.averages, self.params, strict=True):
            a += share * (p.detach() - a)


def gradients(lists, k, dtype=torch.float32, size=1.0):
    torch.manual_seed(k)
    return [(torch.randn_like(p) * size * 3.0 ** (k % 5 - 3)).to(dtype) for p in lists.params]


def check(lists, exact, eps=1e-6):
    for i, p in enumerate(exact.params):
        state = exact.adam.state[p]
        for got, true in (
            (lists.params[i], p.detach()),
            (lists.averages[i], exact.averages[i]),
            (lists.exp_avgs[i], state["exp_avg"]),
            (lists.exp_avg_sqs[i], state["exp_avg_sq"]),
        ):
            size = true.abs().max().item() if true.numel() else 0.0
            torch.testing.assert_close(got.cpu().double(), true, rtol=0, atol=eps * size)
        assert lists.steps[i].item() == state["step"].item()
        if lists.copies[i] is not None:
            rounded = lists.params[i].to(lists.copies[i].dtype)
            assert torch.equal(lists.copies[i], rounded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("clip", [None, 1.0, 1e6])
def test_many_steps(device, dtype, clip):
    """Gradients of the dtype, which are exact in float64; norms below and above the clip."""
    lists = Lists(device, copies=(torch.bfloat16, torch.float16))
    exact = Torch(lists)
    for k in range(12):
        lr, share = 1e-3 * (k + 1), 1 / (k + 2)
        grads = gradients(lists, k, dtype)
        lists.step(grads, lr=lr, share=share, clip=clip)
        exact.step(grads, share=share, clip=clip, lr=lr)
    check(lists, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, device, layout):
    """Dense tensors are walked as they lie; slices, and mixtures, are the reference's."""
    shapes = [(5, 3, 2, 3), (4,), (6, 4, 3, 3)]
    lists = Lists(device, shapes, layout=layout)
    exact = Torch(lists)
    for k in range(3):
        grads = [in_layout(g, layout) if g.dim() == 4 else g for g in gradients(lists, k)]
        if "slice" in layout and backend != "reference":
            with pytest.raises(ValueError, match=r"can't run on .*: a tensor is not dense"):
                lists.step(grads)
            return
        lists.step(grads)
        exact.step(grads)
    check(lists, exact)


def test_tensors_that_lie_in_different_orders():
    lists = Lists(shapes=[(5, 3, 2, 3), (4,)], layout="nhwc")
    exact = Torch(lists)
    grads = [g.contiguous() for g in gradients(lists, 1)]
    with ops.use_backend("cpu"), pytest.raises(ValueError, match="lie in different orders"):
        lists.step(grads)
    lists.step(grads)
    exact.step(grads)
    check(lists, exact)


def test_as_torchs_fused_adam(device):
    """Bit for bit but for the last places: steps of its own, none without a gradient."""
    lists = Lists(device)
    params = [p.clone().requires_grad_() for p in lists.params]
    adam = torch.optim.Adam(params, fused=True, **OPTIONS)
    for k in range(5):
        grads = gradients(lists, k)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        adam.step()
        lists.step(grads, clip=None)
    for p, own in zip(params, lists.params, strict=True):
        torch.testing.assert_close(own, p.detach(), rtol=1e-5, atol=1e-7)


def test_each_parameter_counts_its_own_steps(device):
    """Of those that a step does not list none moves."""
    lists = Lists(device, shapes=[(5,), (6,), (7,)])
    exact = Torch(lists)
    for k in range(6):
        grads = gradients(lists, k)
        listed = [i for i in range(3) if k % (i + 1) == 0]
        ops.adam(
            *([tensors[i] for i in listed] for tensors in (
                lists.params, grads, lists.exp_avgs, lists.exp_avg_sqs, lists.steps,
            )), **OPTIONS,
        )  # fmt: skip
        exact.step([g if i in listed else None for i, g in enumerate(grads)], share=0, clip=None)
    assert [step.item() for step in lists.steps] == [6, 3, 2]
    check(lists, exact)


def test_many_tensors(device):
    """More than a launch takes, the empty ones among them."""
    shapes = [(k % 4 * 50,) for k in range(300)]
    lists = Lists(device, shapes)
    exact = Torch(lists)
    for k in range(2):
        grads = gradients(lists, k)
        lists.step(grads)
        exact.step(grads)
    check(lists, exact)


@pytest.mark.backends("reference", "cpu", "triton")
def test_a_million_elements(device):
    lists = Lists(device, [(1000, 1001), (3,)], copies=(torch.bfloat16,))
    exact = Torch(lists)
    grads = gradients(lists, 1)
    lists.step(grads)
    exact.step(grads)
    check(lists, exact)


def test_tensors_that_are_not_aligned(device):
    """Views that begin at any element: no vector of theirs is."""
    lists = Lists(device, shapes=[(37,)])
    for name in ("params", "exp_avgs", "exp_avg_sqs", "averages"):
        for tensors in (getattr(lists, name),):
            wide = torch.zeros(40).to(device)
            tensors[0] = wide[1:38].copy_(tensors[0])
    exact = Torch(lists)
    for k in range(3):
        grads = gradients(lists, k)
        lists.step(grads)
        exact.step(grads)
    check(lists, exact)


# ---- steps that do not count ---------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["gradient", "norm", "refused", "refused, of nan"])
def test_a_step_that_does_not_count(device, what, value):
    """Nothing of it reaches the state, and the next one is as if it had not been."""
    lists = Lists(device, copies=(torch.bfloat16,))
    lists.step(gradients(lists, 0))
    before = [x.clone() for x in lists.all()]
    grads, options = gradients(lists, 1), {}
    if what == "norm":
        options["norm"] = torch.tensor(value).to(device)
    else:
        grads[3][1, 2, 0, 1] = value
    if what.startswith("refused"):
        refused = 1.0 if what == "refused" else math.nan
        options = {"refused": torch.tensor(refused).to(device), "clip": None}
    lists.step(grads, **options)
    for x, y in zip(lists.all(), before, strict=True):
        assert torch.equal(x, y)
    lists.step(gradients(lists, 2), refused=torch.tensor(0.0).to(device))
    assert not torch.equal(lists.params[3], before[3])
    assert lists.steps[0].item() == 2


def test_rates_of_the_device(device):
    """Numbers and tensors give the same step; so does a norm that is given."""
    first = Lists(device)
    second = copy.deepcopy(first)
    grads = gradients(first, 3, size=10)
    first.step([g * 1024 for g in grads], lr=0.01, share=0.3, grad_scale=1024.0)
    lr, share = (torch.tensor(x).to(device) for x in (0.01, 0.3))
    norm = ops.grad_norm(grads)
    second.step(grads, lr=lr, share=share, norm=norm, refused=torch.zeros(()).to(device))
    for x, y in zip(first.all(), second.all(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=0)
    for x in (*first.params, *first.averages):
        assert x._version > 0


def test_without_an_average(device):
    lists = Lists(device)
    lists.averages, averages = None, [a.cpu().double() for a in lists.averages]
    exact = Torch(Lists(device))
    exact.params = [p.cpu().double().requires_grad_() for p in lists.params]
    exact.adam = torch.optim.Adam(exact.params, **OPTIONS)
    grads = gradients(lists, 1)
    lists.step(grads, share=None)
    exact.step(grads, share=0.0)
    lists.averages, exact.averages = averages, averages
    check(lists, exact)


def test_leaves_that_require_a_gradient(device):
    lists = Lists(device)
    lists.params = [torch.nn.Parameter(p) for p in lists.params]
    exact = Torch(lists)
    grads = gradients(lists, 1)
    lists.step(grads)
    exact.step(grads)
    lists.params = [p.detach() for p in lists.params]
    check(lists, exact)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("isa", _native.isas_available())
def test_bits_do_not_depend_on_the_thread_count(device, isa):
    shapes = [(300, 257), (3,), (90_001,), (40, 8, 3, 3)]
    start = Lists(device, shapes, copies=(torch.bfloat16,))
    grads = gradients(start, 1)
    before = _native.isa()

    def moved():
        lists = copy.deepcopy(start)
        for _ in range(2):
            lists.step(grads)
        return torch.cat([x.float().flatten() for x in lists.all()])

    try:
        _native.use_isa(isa)
        assert_same_for_any_thread_count(moved)
        assert_same_for_any_thread_count(lambda: ops.grad_norm(grads))
    finally:
        _native.use_isa(before)


def test_float64_goes_to_the_reference():
    lists = Lists(dtype=torch.float64)
    exact = Torch(lists)
    for k in range(5):
        grads = gradients(lists, k, torch.float64)
        lists.step(grads)
        exact.step(grads)
    check(lists, exact, eps=1e-12)


# ---- the norm ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norms(device, dtype):
    for shapes in (SHAPES, [(0,)], [(3, 0), ()], [(40_000,), (5,), (16_384,)]):
        grads = [(torch.randn(shape).to(device) * 1e-3).to(dtype) for shape in shapes]
        exact = torch.cat([g.cpu().double().flatten() for g in grads]).norm()
        got = ops.grad_norm(grads)
        assert (got.dtype, got.shape) == (torch.float32, ())
        torch.testing.assert_close(got.cpu().double(), exact, rtol=1e-7, atol=0)


def test_norms_beyond_float32s_squares(device):
    for size in (1e-30, 1e30):
        got = ops.grad_norm([torch.full((3,), size).to(device), torch.full((1,), size).to(device)])
        torch.testing.assert_close(got.cpu(), torch.tensor(2 * size))
    for value in (math.nan, math.inf):
        assert not ops.grad_norm([torch.tensor([1.0, value]).to(device)]).cpu().isfinite()


def test_norms_of_mixed_types_and_of_what_is_not_dense():
    grads = [torch.randn(5, 6)[:, ::2], torch.randn(4).double(), torch.randn(3).bfloat16(),
             torch.randn(1).expand(7), torch.randn(3, 4).mT]  # fmt: skip
    exact = torch.cat([g.double().flatten() for g in grads]).norm()
    got = ops.grad_norm(grads)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, exact)


# ---- what is refused -----------------------------------------------------------------------------

LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "averages", "copies")
X, WIDE = torch.zeros(2, 3), torch.zeros(40)


def call(**changed):
    arguments = {name: [torch.zeros(2, 3), torch.zeros(4)] for name in LISTS}
    arguments["steps"] = [torch.zeros(()) for _ in range(2)]
    ops.adam(**{**arguments, "lr": 0.1, "share": 0.1, **changed})


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"params": X}, TypeError, "params must be a list of tensors; got Tensor"),
        ({"params": [X, None]}, TypeError, r"params\[1\] must be a tensor; got NoneType"),
        ({"params": [X, X[0].long()]}, TypeError, r"params\[1\] must be one of float32, .*int64"),
        ({"params": [X, WIDE[:4].bfloat16()]}, TypeError, r"params\[1\] .* its float32 master"),
        ({"grads": [X]}, ValueError, "grads must be one for each of 2 params; got 1"),
        ({"grads": [X, X]}, ValueError, r"grads\[1\] must have the shape of params\[1\], \(4,\)"),
        ({"grads": [X, WIDE[:4].double()]}, TypeError, r"grads\[1\] and params\[1\] must both be"),
        ({"grads": [X, X.to("meta")[0]]}, ValueError, r"grads\[1\] must be on cpu"),
        ({"exp_avgs": [X, WIDE[:4].bfloat16()]}, TypeError, r"exp_avgs\[1\] must be torch.float32"),
        ({"exp_avg_sqs": None}, TypeError, "exp_avg_sqs must be a list of tensors; got NoneType"),
        ({"steps": [WIDE[0], WIDE[:1]]}, ValueError, r"steps\[1\] must have no dimensions"),
        ({"steps": [WIDE[0], WIDE[1].double()]}, TypeError, r"steps\[1\] must be torch.float32"),
        ({"steps": []}, ValueError, "steps must be one for each of 2 params; got 0"),
        ({"averages": None}, ValueError, "averages and share must both be given, or neither"),
        ({"copies": [X]}, ValueError, "copies must be one for each of 2 params; got 1"),
        ({"lr": math.nan}, ValueError, "lr must be a finite number"),
        ({"lr": X}, ValueError, r"lr must have no dimensions; got \(2, 3\)"),
        ({"lr": "1"}, ValueError, "lr must be a finite number"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be in \[0, 1\); got 1.0"),
        ({"eps": -1e-8}, ValueError, "eps must be a number of at least 0"),
        ({"clip": 0}, ValueError, "clip must be above 0; got 0"),
        ({"grad_scale": math.inf}, ValueError, "grad_scale must be above 0; got inf"),
        ({"norm": 1.0}, TypeError, "norm must be a tensor; got float"),
        ({"refused": torch.tensor(True)}, TypeError, "refused must be one of float32"),
        (
            {"params": (p := [X.clone(), WIDE[:4].clone()]), "averages": [p[0], WIDE[4:8]]},
            ValueError,
            r"params\[0\] and averages\[0\] share memory: what is written must lie apart",
        ),
        ({"params": [X, WIDE[:4]], "grads": [X + 1, WIDE[3:7]]}, ValueError,
         r"params\[1\] and grads\[1\] share memory"),
        ({"exp_avgs": [X, WIDE[:1].expand(4)]}, ValueError, r"exp_avgs\[1\] must have a place of"),
        ({"params": [X, torch._efficientzerotensor(4)]}, ValueError, r"params\[1\] must be plain"),
        ({"steps": [(s := torch.zeros(())), s]}, ValueError, r"steps\[0\] and steps\[1\] share"),
    ],
)  # fmt: skip
def test_bad_input(changed, error, message):
    with pytest.raises(error, match=message):
        call(**changed)


@pytest.mark.parametrize("name", [*LISTS, "lr", "share", "norm", "refused"])
def test_an_operand_on_another_device(name):
    value, where = torch.zeros((), device="meta"), name
    if name in LISTS:
        first = torch.zeros(()) if name == "steps" else torch.zeros(2, 3)
        value = [first, value if name == "steps" else torch.zeros(4, device="meta")]
        where = rf"{name}\[1\]"
    with pytest.raises(ValueError, match=f"^{where} must be on cpu like .*; got meta"):
        call(**{name: value})


def test_interleaved_columns_lie_apart():
    """Exact for strided memory: two halves of rows."""
    wide = torch.randn(4, 6)
    call(params=[wide[:, :3][:2], torch.zeros(4)], averages=[wide[:, 3:][:2], torch.zeros(4)])


def test_a_gradient_that_several_share(device):
    """What is only read may be the same tensor."""
    lists = Lists(device, shapes=[(5,), (5,)])
    exact = Torch(lists)
    grad = torch.randn(5).to(device)
    lists.step([grad, grad])
    exact.step([grad, grad])
    check(lists, exact)


def test_nothing_to_do():
    ops.adam([], [], [], [], [], lr=0.1)
    with pytest.raises(ValueError, match="grads must have at least one tensor"):
        ops.grad_norm([])
    with pytest.raises(TypeError, match="grads must be a list of tensors; got Tensor"):
        ops.grad_norm(torch.zeros(3))


def test_registered_ops():
    lists = Lists(shapes=[(5,), (2, 3)], copies=(torch.bfloat16,))
    grads = gradients(lists, 1)
    numbers = [torch.tensor(x) for x in (0.1, 0.2, 3.0, 0.0)]
    opcheck(
        torch.ops.fastddpm.adam.default,
        (
            lists.params, grads, lists.exp_avgs, lists.exp_avg_sqs, lists.steps, lists.averages,
            lists.copies[:1], *numbers, 0.9, 0.99, 1e-8, 1.0, 1.0,
        ),
    )  # fmt: skip
    opcheck(torch.ops.fastddpm.grad_norm.default, (grads,))


def test_compiles_without_breaks(device):
    lists = Lists(device, shapes=[(5,), (2, 3)])
    grads, expected = gradients(lists, 1), copy.deepcopy(lists)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(params, exp_avgs, exp_avg_sqs, steps, averages, grads):
        ops.adam(params, grads, exp_avgs, exp_avg_sqs, steps, averages, lr=0.1, share=0.3, clip=1.0)
        return params[0] + 1

    kept = lists.params, lists.exp_avgs, lists.exp_avg_sqs, lists.steps, lists.averages
    above = step(*kept, grads)
    expected.step(grads, lr=0.1, share=0.3, betas=(0.9, 0.999))
    for x, y in zip(lists.all(), expected.all(), strict=True):
        torch.testing.assert_close(x, y)
    assert torch.equal(above, lists.params[0] + 1)


def test_the_reference_is_torchs_formula():
    """The oracle itself, in float64, where its own gradients are of no interest."""
    grads = [torch.tensor([3.0, 4.0], dtype=torch.float64)]
    assert reference.grad_norm(grads).item() == 5
