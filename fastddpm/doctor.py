"""What was built, what can run here, what will be used and why not the faster one: the report,
nothing else.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch
from tabulate import tabulate

from fastddpm import _native, cards
from fastddpm.diffusion import Model
from fastddpm.engine import choose, cpu_plan, cuda_graph
from fastddpm.ops import dispatch
from fastddpm.precision import has_fast_bf16
from fastddpm.pretrained import bundled_models
from fastddpm.unet import UNet


def doctor() -> str:
    """A report in plain text: versions, native build, devices, the backend of every op, engines and
    models; what is wrong with a setting, if anything is, comes first.
    """
    problems = [("", problem) for problem in _problems()]
    sections = {
        **({"settings that are wrong": problems} if problems else {}),
        "versions": _versions(),
        "native module": _native_build(),
        "devices": _devices(),
        "engines": _engines(),
        "bundled models": [(name, "") for name in bundled_models()] or [("none", "")],
    }
    text = [
        f"{title}\n{_indent(tabulate(rows, tablefmt='plain'))}" for title, rows in sections.items()
    ]
    text.insert(-1, f"ops: the backend that each uses\n{_indent(_ops())}")
    return "\n\n".join(text)


def _problems() -> list[str]:
    """With FASTDDPM_ISA and FASTDDPM_BACKEND."""
    return [problem for problem in (_native.problem(), dispatch.problem()) if problem]


def what_runs(model: Model, engine: str, precision: str) -> str:
    """One line: engine, precision, device and instruction set of a sampling run."""
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    device = torch.device("cpu") if parameter is None else parameter.device
    chosen, precision = choose(engine, model, device, precision)
    if device.type == "cpu":
        isa = _native.isa() if _native.C is not None else "reference"
        where = f"cpu with {torch.get_num_threads()} threads, ops {isa}, torch {_torch_isa()}"
    else:
        where = f"cuda ({torch.cuda.get_device_name(device)})"
    return f"engine {chosen.name}, {precision}, {where}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _versions() -> list[tuple[str, str]]:
    names = ("fastddpm", "torch", "triton", "numpy", "safetensors", "pillow", "lmdb", "diffusers")
    return [("python", platform.python_version()), *((name, _version(name)) for name in names)]


def _native_build() -> list[tuple[str, str]]:
    if _native.C is None:
        return [("fastddpm._C", f"missing: {_native.reason}")]
    build = {name: _text(value) for name, value in _native.build_info().items()}
    forced = (
        f" (FASTDDPM_ISA={os.environ['FASTDDPM_ISA']})" if os.environ.get("FASTDDPM_ISA") else ""
    )
    return [
        *build.items(),
        ("instruction sets here", _text(_native.isas_available())),
        ("instruction set used", _native.problem() or f"{_native.isa()}{forced}"),
    ]


def _devices() -> list[tuple[str, str]]:
    triton = _version("triton")
    if os.environ.get("TRITON_INTERPRET") == "1" and triton != "not installed":
        triton += ", interpreted on the CPU (TRITON_INTERPRET=1)"
    bf16 = (
        "bf16" if has_fast_bf16(torch.device("cpu")) else "fp32: this CPU has no bfloat16 products"
    )
    return [
        ("cpu", f"{torch.get_num_threads()} threads, torch uses {_torch_isa()}"),
        ("cpu precision 'auto'", bf16),
        *cards.rows(UNet(channels=32)),
        ("triton", triton),
    ]


def _engines() -> list[tuple[str, str]]:
    cpu = torch.device("cpu")
    reason = next(iter(_problems()), None) or cpu_plan.unsupported(UNet(channels=32), cpu)
    if reason is not None:
        plan = f"'auto' does not use it: {reason}"
    else:
        plan = f"'auto' uses it, in {cpu_plan.best_precision()}"
    graph = cuda_graph.unsupported(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return [
        (
            "cuda_plan",
            "a fastddpm.UNet as one graph launch a step, of the fewest passes; "
            + (graph or "'auto' uses it"),
        ),
        (
            "cuda_graph",
            "any model as one graph launch a step; "
            + (graph or "'auto' uses it for a UNet that is changed"),
        ),
        ("cpu_plan", f"a fastddpm.UNet on the CPU as one native call a step; {plan}"),
        ("eager", "any model, on any device torch has; what 'auto' uses for all others"),
    ]


def _ops() -> str:
    rows = []
    for op, backends in dispatch.matrix().items():
        for backend, entry in backends.items():
            used = [device for device in ("cpu", "cuda") if entry.get(device)]
            rows.append(
                (
                    op,
                    backend,
                    "yes" if entry["available"] else "no",
                    ", ".join(used),
                    entry["reason"] or "",
                )
            )
            op = ""
    return tabulate(
        rows, headers=("op", "backend", "can run", "used on", "why not"), tablefmt="simple"
    )


def _torch_isa() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
