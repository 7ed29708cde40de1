"""Which cells of op x backend x dtype x layout x direction a run has passed: printed at its end.

A test that fills cells is marked @pytest.mark.matrix("forward"), ("backward") or both; its backend,
dtype and layout are its parameters. Where a run of everything was told by FASTDDPM_REQUIRE_BACKENDS
which backends there have to be, an empty cell makes it fail."""

from __future__ import annotations

from collections import defaultdict

import pytest
from compare import DTYPES, LAYOUTS
from tabulate import tabulate

OPS = (
    "noise",
    "posterior_step",
    "group_norm_silu",
    "group_norm_silu_fused",  # with what it takes in beside its norm
    "residual_sum",
    "attention_block",
    "convolution",
    "discretized_log_likelihood",
    "squared_error",
    "vlb_term",
)
WITHOUT_GRADIENT = ("vlb_term",)
DIRECTIONS = ("forward", "backward")

_passed: dict[tuple, set[str]] = defaultdict(set)  # (op, backend, direction, dtype) -> layouts


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    marker = item.get_closest_marker("matrix")
    if marker is not None and call.when == "call" and report.passed:
        given = item.callspec.params
        op = item.path.stem.removeprefix("test_")
        for direction in marker.args:
            _passed[op, given["backend"], direction, given["dtype"]].add(given["layout"])
    return report


def table(ops, backends) -> tuple[list[list[str]], int]:
    """The rows of the table, and how many of its cells are empty."""
    rows, empty = [], 0
    for op in ops:
        for backend in backends:
            for direction in DIRECTIONS:
                if direction == "backward" and op in WITHOUT_GRADIENT:
                    continue
                row = [op, backend, direction]
                for dtype in DTYPES:
                    layouts = _passed.get((op, backend, direction, dtype), set())
                    empty += len(set(LAYOUTS) - layouts)
                    lacking = [layout for layout in LAYOUTS if layout not in layouts]
                    row.append(
                        f"all {len(LAYOUTS)}" if not lacking else f"not {', '.join(lacking)}"
                    )
                rows.append(row)
    return rows, empty


def pytest_terminal_summary(terminalreporter, config):
    if not _passed:
        return
    seen = {key[0] for key in _passed}
    rows, empty = table(
        [op for op in OPS if op in seen], sorted({backend for _, backend, _, _ in _passed})
    )
    terminalreporter.section("layouts passed, by op, backend, direction and dtype")
    headers = ("op", "backend", "direction", *(str(d).removeprefix("torch.") for d in DTYPES))
    terminalreporter.write_line(tabulate(rows, headers, tablefmt="simple"))
    terminalreporter.write_line(f"{empty} empty cells" if empty else "no empty cell")


def is_whole(config) -> bool:
    """Whether every test was asked for."""
    chosen = config.option.keyword or config.option.markexpr not in ("", "not slow")  # addopts
    return config.args_source is not config.ArgsSource.ARGS and not chosen


def pytest_sessionfinish(session, exitstatus):
    from conftest import REQUIRED

    if exitstatus == 0 and REQUIRED and is_whole(session.config) and table(OPS, REQUIRED)[1]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
