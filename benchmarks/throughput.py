"""Times sampling, or with --train training, all implementations in turn on the same weights:
fastddpm's engines, diffusers, torch.compile, OpenVINO, ONNX Runtime; fastddpm's Trainer, diffusers'
U-Net with torch's fastest optimiser, torch.compile, lucidrains' trainer.

    python benchmarks/throughput.py [--train] [--json FILE] [--plot FILE.png] [--batches 1,4,16,64]
        [--model cifar10|fashion-mnist|FOLDER] [--only NAME,...] [--precisions fp32,bf16]
        [--limit SECONDS] [--patience SECONDS] [--device cuda] [--dropout P] [--quick]

First each contestant shows that it computes the same: its eps at two steps, or the loss, all
gradients and what the optimiser makes of them in its first step, against the network in float64.
One that computes something else is not timed, and the exit code is 1. Then those of one batch size
and precision take turns, warm: median and range. A contestant whose turns would take more than
--limit seconds together takes fewer of them, at least one: the table says how many. One that fails,
or does not answer for --patience seconds, is left out, and the reason is printed.

TFLOP/s count the products of convolutions and dense layers, twice their multiply-adds, as the
network is written, 3 times those of the forward in training: fewer are needed by Winograd's
algorithm, which can pass the ceiling. That is the rate of multiply-adds from registers on as many
threads (on a GPU torch's largest in a matrix product), measured at the start. No numbers are kept
here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # the checkout that this file is in
sys.path.insert(0, str(Path(__file__).parent))

import contestants
import sampling_race
import torch
import training_race
from contestants import DTYPES, Job
from machine import ceiling, environment
from networks import flop, make_model, with_dropout
from tables import finish, plot, table

from fastddpm import UNet
from fastddpm.precision import has_fast_bf16


def precisions(device: torch.device, asked: str | None) -> tuple[list[str], list[str]]:
    """(those to time, what is left out)."""
    if asked:
        return asked.split(","), []
    if has_fast_bf16(device):
        return ["fp32", "bf16"], []
    return ["fp32"], [
        "all in bf16: this device has no bfloat16 products (--precisions asks anyway)"
    ]


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def read(arguments: list[str] | None) -> tuple[argparse.Namespace, UNet, list[str]]:
    """(options, model, names of those who may take part)."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--train", action="store_true", help="training steps, not sampling")
    parser.add_argument("--json", type=Path, help="write environment and rows to this file")
    parser.add_argument("--plot", type=Path, help="write a bar chart to this .png file")
    parser.add_argument("--batches", type=integers, help="default: 1,4,16,64; of training 16,64")
    parser.add_argument("--model", default="cifar10", help="cifar10, a bundled name or a folder")
    parser.add_argument("--dropout", type=float, default=0.0, help="in training, default 0")
    parser.add_argument("--only", default="", help="names of contestants, or how they start")
    parser.add_argument("--precisions", help="fp32,bf16; default: those the device multiplies")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5, help="turns of each, default 5")
    parser.add_argument(
        "--limit", type=float, default=40.0, help="seconds of all turns of one, default 40"
    )
    parser.add_argument(
        "--patience", type=float,
        help="seconds without an answer, default 300; of training, which may compile, 1200",
    )  # fmt: skip
    parser.add_argument("--least", type=float, default=1.0, help="seconds a turn, default 1")
    parser.add_argument("--quick", action="store_true", help="a tiny cifar10, to see that it runs")
    options = parser.parse_args(arguments)
    race = options.race = training_race if options.train else sampling_race
    options.batches = options.batches or race.BATCHES
    options.patience = options.patience or race.PATIENCE
    everybody = (*race.OURS, *race.PEERS)
    names = [name for name in everybody if name.startswith(tuple(options.only.split(",")))]
    if not names:
        parser.error(f"--only must name some of: {', '.join(everybody)}")
    asked = (options.precisions or "fp32").split(",")
    if unknown := set(asked) - set(DTYPES):
        parser.error(f"--precisions must be of fp32, bf16; got {', '.join(sorted(unknown))}")
    if not 0 <= options.dropout < 1:
        parser.error(f"--dropout must lie in [0, 1); got {options.dropout:g}")
    try:
        model = make_model(options.model, options.quick)
        if options.train:
            model = with_dropout(model, options.dropout)
    except (OSError, ValueError) as error:
        parser.error(f"--model: {error}")
    return options, model, names


def say_where(
    options: argparse.Namespace, device: torch.device, chosen: list[str]
) -> tuple[dict[str, Any], dict[str, float | None]]:
    """Print and return the facts of the machine, and the ceiling of each precision in FLOP/s."""
    facts: dict[str, Any] = {**environment(), "device": str(device), "threads": options.threads}
    facts |= options.race.versions()
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts |= contestants.settings(device)
    for name, value in facts.items():
        print(f"{name:<15} {value}")
    ceilings: dict[str, float | None] = {}
    for precision in chosen:
        rate, what = ceiling(DTYPES[precision], device, options.threads, quick=options.quick)
        ceilings[precision] = rate
        known = f"{rate / 1e12:.3g} TFLOP/s" if rate else "unknown"
        print(f"{'ceiling':<15} {known}, {precision}: {what}")
    return facts, ceilings


def main(arguments: list[str] | None = None) -> int:
    options, model, names = read(arguments)
    race: ModuleType = options.race
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    chosen, left_out = precisions(device, options.precisions)
    entries: dict[str, list[str]] = {precision: [] for precision in chosen}
    for precision, taking_part in entries.items():
        for name in names:
            if reason := race.missing(name, precision, device.type):
                left_out.append(f"{name} {precision}: {reason}")
            else:
                taking_part.append(name)

    facts, ceilings = say_where(options, device, chosen)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        shape = (model.in_channels, *model.image_size)
        per_image = flop(model) * race.PRODUCTS
        print(f"{'model':<15} {per_image / 1e9:.4g} GFLOP {race.UNIT}\n\n{race.EQUAL}\n")
        for batch, (precision, taking_part) in itertools.product(options.batches, entries.items()):
            jobs = []
            for name in taking_part:
                own = tempfile.mkdtemp(dir=folder)
                jobs.append(Job(
                    name, precision, folder, batch, str(device), options.threads, shape, own
                ))  # fmt: skip
            done, missing = race.race(jobs, model, options) if jobs else ([], [])
            finish(done, race, ceilings)
            rows += done
            left_out += missing
    print("\n" + table(rows, race))
    for line in left_out:
        print(f"not here: {line}")
    if options.json:
        report = {
            "environment": facts, "model": options.model, f"GFLOP {race.UNIT}": per_image / 1e9,
            "ceiling TFLOP/s": {name: rate and rate / 1e12 for name, rate in ceilings.items()},
            "equal": race.EQUAL, "rows": rows, "not here": left_out,
        }  # fmt: skip
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.plot and any("seconds" in row for row in rows):
        title = f"{options.model} on {facts['cpu']}, {options.threads} threads"
        plot(options.plot, rows, race, f"training {title}" if options.train else title)
    return 0 if all("seconds" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
