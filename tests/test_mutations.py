"""Whatever a model's files say: an error that names it within seconds, or a model that works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file
from test_integrations import as_port
from toy import tiny_unet

from fastddpm.integrations.diffusers import to_diffusers

pytest.importorskip("diffusers")
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="limits of memory and time are Linux's here"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    model = tiny_unet()
    model.save_pretrained(folder / "ours")
    to_diffusers(model).save_pretrained(folder / "theirs")
    to_diffusers(model).save_pretrained(folder / "sharded", max_shard_size="60KB")
    save_file(as_port(model), folder / "port.safetensors")
    return folder


def run(folder: Path, count: int, seed: int) -> None:
    script = Path(__file__).parent / "mutations.py"
    done = subprocess.run(
        [sys.executable, script, folder, str(count), str(seed)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]


def test_mutated_files(whole):
    run(whole, 64, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_many_mutated_files(whole, seed):
    run(whole, 1200, seed)
