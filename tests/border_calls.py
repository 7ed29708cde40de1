"""Calls of fastddpm._C that no caller of ours makes: valid ones with an argument or two replaced,
and plans used in another order. Run as a program by test_border.py, which survives it.

    python border_calls.py SEED FIRST COUNT

writes the number of each call before it is made, and a line for each that ends in anything but a
result, a ValueError, a TypeError or a MemoryError.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from fastddpm import Schedule, _native

SECONDS = 5  # that a call may take
MEMORY = 4 << 30  # more than this is refused by the system, not taken from the other processes
ALLOWED = (ValueError, TypeError, MemoryError)


class Liar(torch.Tensor):
    """A subclass that answers as it likes."""

    shape = (2, 4, 3, 5)

    def data_ptr(self):
        return 16

    def stride(self, *_):
        return (60, 15, 5, 1)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return 16


def leaked() -> torch.Tensor:
    """A wrapper of torch.func, after its transform has ended."""
    kept = []
    torch.func.vmap(lambda x: kept.append(x) or x)(torch.zeros(3, 2, 4, 3, 5))
    return kept[0]


def fake(x: torch.Tensor) -> torch.Tensor:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        return mode.from_tensor(x)


def resized(x: torch.Tensor, bytes_left: int) -> torch.Tensor:
    x = x.clone()
    x.untyped_storage().resize_(bytes_left)
    return x


def negated(x: torch.Tensor) -> torch.Tensor:
    return torch.complex(x.float(), x.float()).conj().imag


def strange_tensors(x: torch.Tensor, pick: random.Random) -> object:
    """Something in the place of the tensor x."""
    dims = x.dim()
    makers = (
        lambda: None,
        lambda: 7,
        lambda: "tensor",
        lambda: x.tolist(),
        lambda: x.numpy() if x.dtype != torch.bfloat16 else None,
        lambda: torch.empty_like(x, device="meta"),
        lambda: torch.empty_like(x, device="meta")[..., 1:],
        lambda: torch._efficientzerotensor(x.shape, dtype=x.dtype),
        lambda: torch._efficientzerotensor((*x.shape[:-1], x.shape[-1] + 3))[..., 3:],
        lambda: x.to_sparse(),
        lambda: x.float().to_mkldnn(),
        lambda: torch.nested.nested_tensor(list(x.float())),
        lambda: torch.quantize_per_tensor(x.float(), 0.1, 10, torch.quint8),
        lambda: negated(x),
        lambda: resized(x, 0),
        lambda: resized(x, max(1, x.numel() * x.element_size() // 2)),
        lambda: x.as_subclass(Liar),
        lambda: fake(x),
        leaked,
        lambda: x.double(),
        lambda: x.to(torch.complex64),
        lambda: x.to(torch.uint8),
        lambda: x.bool(),
        lambda: x.half(),
        lambda: x.int(),
        lambda: x[:0],
        lambda: x[:1].expand(1 << 40, *x.shape[1:]),
        lambda: x.new_zeros(1).expand(x.shape),
        lambda: x.new_zeros(1).expand(*[1 << 15] * dims),
        lambda: x.new_zeros(0, *[1 << 20] * (dims - 1)) if dims > 1 else x[:0],
        lambda: x.flatten(),
        lambda: x[None],
        lambda: x[None, None, None],
        lambda: x.transpose(0, -1),
        lambda: x.new_zeros(*(2 * s for s in x.shape))[tuple(slice(0, None, 2) for _ in x.shape)],
        lambda: x.clone().requires_grad_() if x.is_floating_point() else x.clone(),
        lambda: x.new_full(x.shape, -1),
        lambda: x.new_full(x.shape, 1 << 62) if x.dtype == torch.int64 else x * torch.nan,
    )
    try:
        return pick.choice(makers)()
    except Exception:  # torch makes none of this kind
        return None


NUMBERS = (
    *(0, -1, 1, 2, 3, 5, 1 << 31, (1 << 31) - 1, 1 << 32, 7 << 32, (1 << 62) + 1, (1 << 63) - 1),
    *(-(1 << 63), 1 << 63, 1 << 64, 1 << 100, 0.5, float("nan"), float("inf"), -1e300, 1e300),
    *(None, "1", "", True, [], (1, 2), object()),
)
NAMES = ("v", "", "eps\0", "x0", "mean", None, 5, "bf16", "winograd_4", "ä" * 100, b"eps")


def strange(value: object, pick: random.Random) -> object:
    if isinstance(value, torch.Tensor):
        return strange_tensors(value, pick)
    if isinstance(value, str):
        return pick.choice(NAMES)
    if isinstance(value, (list, tuple)):
        values = list(value)
        if values and pick.random() < 0.7:
            at = pick.randrange(len(values))
            values[at] = strange(values[at], pick)
        else:
            values = values[1:] if pick.random() < 0.5 else values * 3
        return pick.choice((values, tuple(values), None, []))
    if value is None and pick.random() < 0.5:
        return strange_tensors(torch.zeros(2, 4), pick)
    return pick.choice(NUMBERS)


# ---- the ops -------------------------------------------------------------------------------------

TABLE = Schedule.linear().table()


def op_calls() -> dict:
    """name -> valid arguments."""
    x, z = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    x1, x2, z1 = x[:, :3], x[:, 3:], z[:, 1:]
    t, index = torch.tensor([0, 999]), torch.arange(2)
    c, nc = torch.randn(4), torch.randn(2, 4)
    qkv, proj = torch.randn(12, 4), torch.randn(4, 4)
    w, f5 = torch.randn(5, 4, 3, 3), torch.randn(5)
    y, f = torch.empty_like(x), torch.empty
    flip = torch.tensor([True, False])
    attention = (2, c, c, qkv, torch.randn(12), proj, c, 2, 1e-6)
    drawn = (3, t, index)
    return {
        "randn": (y, *drawn, 2),
        "choices": (index, 3, 5, 1000, torch.empty_like(t), torch.empty_like(flip), 2),
        "noise": (x, z, y, None, None, None, t, flip, TABLE, 2),
        "noise drawn": (x, f(2, 4, 3, 5), y, *drawn, t, None, TABLE, 2),
        "noise not kept": (x, None, y, *drawn, t, flip, TABLE, 2),
        "posterior_step": (x, z, z, z, y, None, None, None, t, TABLE, "eps", True, False, 2),
        "posterior_step drawn": (x, z, None, None, y, *drawn, t, TABLE, "x0", False, False, 2),
        "group_norm_silu": (
            *(x, y, 2, c, c, 1e-6, nc, nc, True, None, None, None, None, 0.0, None, None, None),
            *(f(2, 2), f(2, 2), None, 2),
        ),
        "group_norm_silu fused": (
            *(x1, y, 2, c, c, 1e-6, nc, nc, True, c[1:], z1, f(2, 3, 3, 5), x2, 0.5, *drawn),
            *(f(2, 2), f(2, 2), None, 2),
        ),
        "group_norm_silu_backward": (
            *(z, x, 2, c, c, 1e-6, nc, nc, True, None, None, None, 0.0, None, None, None),
            *(y, f(4), f(4), f(2, 4), f(2, 4), None, None, None, 2),
        ),
        "group_norm_silu_backward fused": (
            *(z, x1, 2, c, c, 1e-6, nc, nc, True, nc[:, 1:], x2, z1, 0.5, *drawn),
            *(f(2, 3, 3, 5), f(4), f(4), f(2, 4), f(2, 4), f(2, 3), f(2, 1, 3, 5), None, 2),
        ),
        "residual_sum": (x, z, nc, y, 2),
        "attention_block": (x, y, *attention, 2),
        "attention_block_backward": (
            *(z, x, *attention, y, f(4), f(4), f(12, 4), f(12), f(4, 4), f(4), 2),
        ),
        "convolution": (
            *(x, w, f5, None, c, c, f5, None, f(2, 5, 3, 5), 2, 1e-6, True, 1, 1, 1, 1, False),
            *(0.0, None, None, None, _native.C.cpu.packed_weights(), 2),
        ),
        "convolution drawn": (
            *(x1, w, f5, x2, c, c, f(2, 5), f(2, 5, 6, 10), f(2, 5, 6, 10), 2, 1e-6, True, 1),
            *(1, 1, 2, True, 0.5, *drawn, None, 2),
        ),
        "convolution down": (
            *(x, w, None, None, None, None, None, None, f(2, 5, 1, 2), 0, 1e-6, False, 2, 0, 1, 1),
            *(False, 0.0, None, None, None, None, 2),
        ),
        "convolution_backward": (
            *(f(2, 5, 3, 5), x, w, None, c, c, 2, 1e-6, True, 1, 1, 1, 1, False),
            *(0.0, None, None, None, y, None, f(4), f(4), f(5, 4, 3, 3), f(5), f(2, 5), 2),
        ),
        "convolution_backward drawn": (
            *(f(2, 5, 1, 2), x1, w, x2, c, c, 2, 1e-6, True, 2, 0, 1, 1, True, 0.5, *drawn),
            *(f(2, 3, 3, 5), f(2, 1, 3, 5), f(4), f(4), f(5, 4, 3, 3), f(5), f(2, 5), 2),
        ),
        "packed_weights": (),
        "discretized_log_likelihood": (x, z, z, y, 2),
        "vlb_term": (
            *(x, z, x, z, f(2), f(2), None, None, None, t, TABLE, torch.randn(len(TABLE)), "eps"),
            *(True, False, None, 2),
        ),
        "vlb_term drawn": (
            *(x, None, z, None, f(2), f(2), *drawn, t, TABLE, torch.randn(len(TABLE)), "mean"),
            *(False, False, None, 2),
        ),
        "squared_error": (x, z, f(2), None, 2),
        "squared_error_backward": (torch.randn(2), x, z, y, 2),
        "adam": (
            *([x.clone(), c.clone()], [z, c.bfloat16()], [f(2, 4, 3, 5), f(4)]),
            *([f(2, 4, 3, 5), f(4)], [torch.zeros(()), torch.zeros(())], [z.clone(), c.clone()]),
            *([f(2, 4, 3, 5, dtype=torch.bfloat16)], *(torch.tensor(0.1) for _ in range(4))),
            *(0.9, 0.99, 1e-8, 1.0, 1.0, None, 2),
        ),
        "adam_if_plain": (
            *([x.clone(), c.clone()], [z, c], [f(2, 4, 3, 5), c.clone()]),
            *([f(2, 4, 3, 5), c.square()], [torch.zeros(()), torch.zeros(())]),
            *([z.clone(), c.clone()], 0.1, 0.1, torch.tensor(0.1), torch.tensor(0.0)),
            *(0.9, 0.99, 1e-8, 1.0, 1.0, 2),
        ),
        "are_plain": ([x, c],),
        "grad_norm": ([x, c.half()], torch.zeros(()), None, 2),
        "peak_flops": (1, 0.0, "fp32"),
        "multiplies_bf16": (),
        "use_isa": ("plain",),
    }


def op_call(pick: random.Random):
    calls = op_calls()
    name = pick.choice(list(calls))
    arguments = list(calls[name])
    count = min(len(arguments), pick.choice((1, 1, 1, 2, 3)))
    for at in pick.sample(range(len(arguments)), count):  # torch survives no copy of the strangest
        arguments[at] = strange(arguments[at], pick)
    if pick.random() < 0.05:
        arguments = arguments[1:] if pick.random() < 0.5 else [*arguments, 1]
    module = _native.C if name == "use_isa" else _native.C.cpu
    return name, lambda: getattr(module, name.split()[0])(*arguments)


# ---- plans ---------------------------------------------------------------------------------------


LAST = object()  # the activation of the layer before


def plan_calls() -> list[tuple[str, list, dict]]:
    """A valid life of a plan of a 4-channel image of 6x6."""
    x, out = torch.randn(2, 4, 6, 6), torch.empty(2, 4, 6, 6)
    norm = (2, 1e-6, [1.0] * 4, [0.0] * 4, True)
    t, index = torch.tensor([0, 5]), torch.arange(2)
    step = {
        "model_output": out,
        "log_variance": None,
        "x": torch.empty_like(x),
        "seed": 3,
        "step": t,
        "sample_index": index,
        "t": t,
        "table": TABLE,
        "prediction": "eps",
        "clip": True,
    }
    three, one = torch.randn(4, 36), torch.randn(12, 4)
    borders = {"before": 1, "after": 1}
    options = {
        **borders,
        "norm": norm,
        "time_offset": 1,
        "modulation_offset": 5,
        "algorithm": "auto",
    }
    return [
        ("convolution", ["a", [0], three, [0.0] * 4, 3], options),
        ("convolution", ["b", [1], one, [0.0] * 12, 1], {}),
        ("attention", ["c", LAST, 2], {}),
        ("convolution", ["d", [LAST], three, [0.0] * 4, 3], {**borders, "residual": 0}),
        ("convolution", ["e", [LAST], three, [0.0] * 4, 3], {**borders, "halve": True}),
        ("resample", ["f", LAST, True], {}),
        ("channels", [LAST], {}),
        ("finish", [LAST], {}),
        ("forward", [x, torch.zeros(13), out, 2], {"group": 1}),
        ("step", [x, torch.zeros(2, 13), out, 2], step),
        ("profile", [x, torch.zeros(2, 13), out, 1], {}),
        ("not_finite", [x, torch.zeros(13), 2], {}),
        ("layers", [], {}),
        ("segments", [], {}),
    ]


def plan_call(pick: random.Random):
    calls = plan_calls()
    size = [6, 6, 4, pick.random() < 0.5]
    what = pick.choice(("argument", "argument", "argument", "argument", "order", "size"))
    if what == "size":
        at = pick.randrange(4)
        size[at] = strange(size[at], pick)
    elif what == "order":
        for _ in range(pick.choice((1, 2, 3))):
            i, j = pick.randrange(len(calls)), pick.randrange(len(calls))
            match pick.choice(("drop", "twice", "swap")):
                case "drop":
                    del calls[i]
                    calls.append(plan_calls()[8])
                case "twice":
                    calls.insert(j, calls[i])
                case "swap":
                    calls[i], calls[j] = calls[j], calls[i]
    else:
        _, arguments, options = calls[pick.randrange(len(calls))]
        places = [*range(len(arguments)), *options]
        if places:
            at = pick.choice(places)
            target = arguments if isinstance(at, int) else options
            target[at] = strange(target[at], pick)

    def run() -> None:
        plan = _native.C.cpu.Plan(*size)
        last, wrong = 0, None
        for name, arguments, options in calls:
            given = [
                last if a is LAST else [last] if type(a) is list and a[:1] == [LAST] else a
                for a in arguments
            ]
            try:
                made = getattr(plan, name)(*given, **options)
            except ALLOWED as error:  # what comes after an error is a misuse too
                wrong = wrong or error
                continue
            if name in ("convolution", "attention", "resample"):
                last = made
        for name in ("weight_bytes", "image_bytes", "peak_bytes", "isa"):
            getattr(plan, name)
        if wrong:
            raise wrong

    return f"plan: {what}", run


def main(seed: int, first: int, count: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))

    for i in range(first, first + count):
        pick = random.Random(f"{seed} {i}")
        name, call = (plan_call if i % 4 == 3 else op_call)(pick)
        print("call", i, name, flush=True)
        signal.alarm(SECONDS)  # whose default action ends a process that hangs in C++
        try:
            call()
        except ALLOWED:
            pass
        except Exception as error:
            print("wrong", i, name, type(error).__name__, str(error)[:200], flush=True)
        signal.alarm(0)
    print("done", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
