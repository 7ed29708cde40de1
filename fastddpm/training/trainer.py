"""Algorithm 1, one step at a time, and its whole state on disk.

Everything random in a step (t, flips, eps, a UNet's dropout) is a function of (seed, number of the
example), and another network's dropout of (seed, step): a run that was killed and resumed from a
checkpoint takes the very same steps. On a GPU the host only queues them, and waits now and then."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastddpm.arguments import check_one_device, check_pixels
from fastddpm.checkpoint import named, read_tensors, write_tensors
from fastddpm.diffusion import Diffusion
from fastddpm.engine import cuda_graph
from fastddpm.engine.cuda_graph import Record
from fastddpm.host import callers_level, own_state, plain, training
from fastddpm.options import check_flag, check_integer, check_number
from fastddpm.precision import Precision, float32_kept, resolve_precision
from fastddpm.pretrained import save_config, save_model
from fastddpm.ranks import losing
from fastddpm.training.graph import Recordings
from fastddpm.training.guard import IN_A_ROW, Guard, in_range, out_of_range
from fastddpm.training.master_weights import DTYPES, MasterWeights
from fastddpm.training.replicas import Replicas, replicated
from fastddpm.training.run_folder import STATE
from fastddpm.training.run_settings import (
    architecture,
    compare,
    differing,
    machine,
    read_settings,
    with_later_options,
)
from fastddpm.training.state import check_tensors, take, tensors_of
from fastddpm.training.step import take_step
from fastddpm.training.upload import uploaded
from fastddpm.training.working_copies import WorkingCopies
from fastddpm.unet import UNet
from fastddpm.unet import walk as unet_walk
from fastddpm.wrapped import unwrap

WAY = 3  # of a step's masks and sums: another one goes on with a saved run but not bit for bit
READ_EVERY = 50  # steps, on a device that the host has to wait for


class Trainer:
    """Algorithm 1 with Adam, gradient clipping, learning-rate warm-up and an exponential moving
    average.

    model:     any module (x_t, t) -> output; trained in place, through its wrappers if it has some
               (DistributedDataParallel, torch.compile, ...); what is averaged and saved is the
               network inside. Parameters in half precision keep float32 masters and averages. In a
               DistributedDataParallel a step is one of all its ranks: see `step`
    diffusion: None: the model's own, or the paper's; another becomes the own one of a UNet, whose
               weights it is trained for from here on
    precision: "fp32", "bf16" (autocast, float32 weights) or "auto" (bf16 where the hardware
               multiplies it). On a GPU "fp32" is float32, in convolutions too, unless torch is told
               to take TF32 in matrix products (fastddpm.precision)
    lr, warmup: Adam's rate, reached linearly over the first `warmup` steps; betas (0.9, 0.999), eps
                1e-8
    ema_decay: weight of the past in the average of the weights; grad_clip: largest norm of the
               gradient
    ema_warmup: average over the first steps with min(ema_decay, (1 + k) / (10 + k)), so that a
               short run's average is not the initial weights; the paper has none
    flip:      mirror half of the images
    accumulate: pieces that a rank's images are computed in, one after the other, for less memory;
               the step is the same but for rounding

    record:     what records the steps of a plain UNet on a GPU, to launch each as one: see
                engine/cuda_graph.py; None: they are made one operation after the other
    read_every: steps between two looks at whether all were finite, for which the host waits until
                they are done; None: each on a CPU, else every 50th

    A step whose loss or gradient is not finite is skipped: weights, moments and averages stay as
    they are, and the next step takes the next examples. `skipped` counts them, up to the last
    look; the tenth in a row is a FloatingPointError: see check_finite.

    Numbers may be NumPy's. Raises ValueError for an option out of range and for a model that is
    changed (layers, device, dtype, process) after the trainer was made or has nothing to train."""

    @own_state()
    def __init__(
        self,
        model: torch.nn.Module,
        *,
        diffusion: Diffusion | None = None,
        precision: Precision = "auto",
        lr: float = 2e-4,
        ema_decay: float = 0.9999,
        ema_warmup: bool = False,
        grad_clip: float = 1.0,
        warmup: int = 5000,
        flip: bool = True,
        seed: int = 0,
        accumulate: int = 1,
        read_every: int | None = None,
        record: Record | None = cuda_graph.record,
    ):
        self.lr = check_number("lr", lr, lambda x: 0 < x < math.inf, "above 0")
        self.ema_decay = check_number("ema_decay", ema_decay, lambda x: 0 <= x < 1, "in [0, 1)")
        self.grad_clip = check_number("grad_clip", grad_clip, lambda x: x > 0, "above 0")
        self.warmup = check_integer("warmup", warmup, 0)
        self.seed = check_integer("seed", seed, 0)
        self.accumulate = check_integer("accumulate", accumulate, 1)
        self.ema_warmup, self.flip = check_flag("ema_warmup", ema_warmup), check_flag("flip", flip)
        self.diffusion = Diffusion.of(model, diffusion)
        self.diffusion.warn_of_the_end()
        self.model, self.network = model, unwrap(model)
        self.replicas = Replicas(model)
        if not isinstance(self.network, torch.nn.Module):
            raise ValueError(f"model must be a torch.nn.Module; got {type(self.network).__name__}")
        if any(p.is_inference() for p in self.network.parameters()):
            raise ValueError(
                "the model's weights were made under torch.inference_mode, so they can't be "
                "trained: build or load the model outside it"
            )
        if isinstance(self.network, UNet):
            check_one_device(self.network)
        self.weights = MasterWeights(self.network)
        self.device = next(self.network.parameters()).device
        self.precision = resolve_precision(precision, self.device)
        self.step_count = 0
        self.example_count = 0
        self.skipped = self.skipped_in_a_row = 0
        self._told_of_range = self._told_of_skipping = False
        if read_every is None:
            read_every = 1 if self.device.type == "cpu" else READ_EVERY
        self.read_every = check_integer("read_every", read_every, 1)
        self.guard = Guard(self.device)
        # The counts before and after each step since the last look.
        self._unread: list[tuple[tuple[int, int], tuple[int, int]]] = []
        self.optimizer = torch.optim.Adam(self._masters, lr=self.lr, fused=True)
        self.copies = None
        if self.precision == "bf16" and type(model) is UNet and unet_walk.takes_copies(self.device):
            self.copies = WorkingCopies(self.network)
        if record is cuda_graph.record and cuda_graph.unsupported(self.device) is not None:
            record = None
        self.recordings = Recordings(record, self.device, self.guard)
        if isinstance(self.network, UNet):
            self._check_outputs(self.network)
            self.network.diffusion = self.diffusion  # what its weights are for, in all its copies

    def _check_outputs(self, network: UNet) -> None:
        has, learned = network.config["out_channels"], self.diffusion.learns_variance
        if has != (needed := network.in_channels * (2 if learned else 1)):
            raise ValueError(
                f"the model has {has} output channels; of {network.in_channels} channels and "
                f"variance {self.diffusion.variance!r} it needs {needed}"
            )

    def _check(self) -> None:
        """ValueError if the model was changed since: its parameters, or a UNet's process."""
        self.weights.check()
        process = self.network.diffusion if isinstance(self.network, UNet) else self.diffusion
        if process is not self.diffusion and not self.diffusion._is_like(process):
            raise ValueError(
                "the model's diffusion is not the one that it had when the Trainer was made: "
                "change it first and make the Trainer then"
            )

    @property
    def _masters(self) -> list[torch.Tensor]:
        return list(self.weights.masters.values())

    def replicate(self) -> None:
        """Train the model on all ranks of torch.distributed from here on, as if it had been given
        in a DistributedDataParallel. All ranks must call this; they get rank 0's weights."""
        if self.replicas.world > 1:
            return
        if not isinstance(self.model, torch.nn.Module):
            raise ValueError(f"a {type(self.model).__name__} can't be trained on several ranks: "
                             "give the module itself")  # fmt: skip
        with losing():
            self.model = replicated(self.model, self.device)
        self.replicas = Replicas(self.model)

    @own_state(grad=True)
    def step(
        self,
        x0: torch.Tensor,
        y: torch.Tensor | None = None,
        *,
        part: tuple[int, int, int] | None = None,
    ) -> torch.Tensor:
        """One optimiser step on x0, (N, C, H, W) uint8 or float in [-1, 1], whose classes are y,
        (N,) int64 where the model takes some; returns the mean loss, detached, on the model's
        device.

        On a GPU the step is queued, and what is wrong with its numbers is known at the next look
        (`read_every`, see check_finite).

        In a DistributedDataParallel all ranks take the step together, each with its images of it,
        and the loss, the gradient and the counts are those of all: the step is that of one process
        with all of the images, but for rounding.

        part: (start, stop, total): x0 are the images start .. stop - 1 of the step's total; None:
              each rank has as many as any other, in the order of the ranks. A rank whose part is
              empty gives one image, which does not count. ValueError on every rank where the parts
              are not those of one step, which then is none
        """
        self._check()
        x0 = self._checked(x0)
        self._check_labels(y, len(x0))
        x0 = uploaded(plain(x0), self.device)
        y = None if y is None else uploaded(plain(y), self.device)
        own, k = self.replicas.part(part, x0.shape[0]), self.step_count
        rate = _float32(self.lr * min((k + 1) / max(self.warmup, 1), 1.0))
        decay = min(self.ema_decay, (1 + k) / (10 + k)) if self.ema_warmup else self.ema_decay
        module = self.model if isinstance(self.model, torch.nn.Module) else self.network
        with training(module), float32_kept(self.precision, self.device), losing():
            loss = take_step(self, x0, y, own, rate, _float32(1 - decay))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        before = self.step_count, self.example_count
        self.step_count += 1
        self.example_count += own.total
        self._unread.append((before, (self.step_count, self.example_count)))
        if len(self._unread) >= self.read_every:
            self.check_finite()
        return loss

    def check_finite(self) -> None:
        """Wait for the steps so far, and see which were skipped, since their loss or gradient was
        not finite, and whether the run was stopped: `step` does it every `read_every`th time, and
        save, ema_model and ema_weights. The first that was skipped is told of in a warning.

        Raises FloatingPointError where ten in a row were skipped; ValueError where a step's pixels
        were out of range, or the ranks' parts not those of one step: that step is none, and the
        next one takes its place. Whenever it is found, steps after what stopped the run were left
        out: weights, averages, moments and counts are as if they had not been taken. (Buffers,
        which a network writes itself, are as its last forward left them.)"""
        seen, counts = self.guard.read(), self._unread
        self._unread = []
        self.skipped += seen.skipped
        self.skipped_in_a_row = 0 if seen.stop else seen.in_a_row
        if seen.stop is None:
            if seen.skipped:
                self._tell_of_skipping(seen.skipped, counts[0][0][0])
            return
        before, after = counts[len(counts) - 1 - seen.stop.after]
        self.step_count, self.example_count = before if seen.stop.is_none else after
        raise seen.stop.error(before[0])

    def _tell_of_skipping(self, skipped: int, first: int) -> None:
        if not self._told_of_skipping:
            self._told_of_skipping = True
            warnings.warn(
                f"{skipped} of the steps {first} .. {self.step_count - 1} had a loss or gradient "
                "that is not finite, and changed nothing: Trainer.skipped counts them, "
                f"{IN_A_ROW} in a row stop the run",
                stacklevel=callers_level(),
            )

    def _checked(self, x0: torch.Tensor) -> torch.Tensor:
        """The batch, if it is one of images; else the ValueError that says what it is."""
        if not isinstance(x0, torch.Tensor) or x0.dim() != 4:
            got = tuple(x0.shape) if isinstance(x0, torch.Tensor) else type(x0).__name__
            raise ValueError(f"a batch must be a tensor of (N, C, H, W) images; got {got}")
        if 0 in x0.shape:
            raise ValueError(f"a batch needs at least one image; got shape {tuple(x0.shape)}")
        check_pixels("a batch", x0)
        if x0.dtype == torch.uint8:
            return x0
        if x0.dtype not in DTYPES:
            raise ValueError(
                f"images must be uint8, or float in [-1, 1]; got {x0.dtype}: of 0 .. 255, give "
                ".to(torch.uint8)"
            )
        if x0.device == self.device and self.read_every > 1 and self.step_count > 0:
            return x0  # reading may wait for the steps before: the guard looks at the values
        low, high = torch.stack(torch.aminmax(x0.detach())).tolist()
        # Of several ranks all raise it, or the others would wait for this one: see the guard.
        if self.replicas.world == 1 and not in_range(low, high):
            raise ValueError(out_of_range(low, high))
        if low >= 0 and not self._told_of_range and self.step_count == 0 and high > low:
            self._told_of_range = True
            warnings.warn(
                "the first batch has no pixel below 0: images of floats are taken as of [-1, 1]; "
                "of [0, 1], give 2 x - 1",
                stacklevel=callers_level(),
            )
        return x0

    def _check_labels(self, y: Any, n: int) -> None:
        """ValueError where a UNet can't take the classes y of n images, or another network's are no
        tensor of n rows."""
        if isinstance(self.network, UNet):
            self.network.check_labels(y, n)
        elif y is not None and not (isinstance(y, torch.Tensor) and y.shape[:1] == (n,)):
            got = tuple(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
            raise ValueError(f"y must be a tensor of {n} rows, one for each image; got {got}")

    def ema_weights(self) -> dict[str, torch.Tensor]:
        """The averaged weights, float32 of half-precision ones, and the buffers as they are now,
        under the network's state_dict names: `load_state_dict` takes them.
        """
        self._check()
        self.check_finite()
        return self.weights.averaged_state()

    @own_state()
    def ema_model(self) -> torch.nn.Module:
        """A copy of the network with the averaged weights, in eval mode."""
        self._check()
        self.check_finite()
        model = copy.deepcopy(self.network).eval().requires_grad_(False)
        for p, average in zip(model.parameters(), self.weights.average.values(), strict=True):
            p.copy_(average)
            p.grad = None
        return model

    # ---- the state on disk ----------------------------------------------------------------------

    @own_state()
    def save(self, folder: str | Path, run: Mapping[str, Any] | None = None) -> None:
        """Write the averaged model into `folder`, then the whole state into one file beside it,
        atomically: where there is a state, there is a model to resume with.

        run: what else must be the same when the run goes on (`fit`'s data), JSON-ready; see `load`
        """
        self._check()
        self.check_finite()
        folder = named(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if first := not (folder / STATE).exists():
            # Weights last: those without a state are a model that no run may write over.
            self.save_config(folder)
        else:
            self.save_model(folder)
        settings = {
            "step_count": self.step_count,
            "example_count": self.example_count,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "machine": machine(WAY, self.device, self.replicas.world, self.accumulate),
            "run": dict(run or {}),
            **self.recipe(),
        }
        tensors = tensors_of(self.weights, self.optimizer)
        write_tensors(folder / STATE, tensors, {"trainer": json.dumps(settings)})
        if first:
            self.save_model(folder)

    def save_config(self, folder: Path) -> None:
        if isinstance(self.network, UNet):
            save_config(self.network, folder)

    def save_model(self, folder: Path) -> None:
        """The averaged model, of a UNet: of other networks the state alone is kept."""
        if isinstance(self.network, UNet):
            save_model(self.network, folder, self.ema_weights())

    @own_state()
    def load(self, folder: str | Path, run: Mapping[str, Any] | None = None) -> None:
        """Take up the state of `save`. ValueError names what differs from this trainer's model or
        recipe, or from the `run` that was saved with it; nothing is taken up then.

        A warning names what the machine differs in where the steps go on but not bit for bit.
        """
        self._check()
        path = Path(folder) / STATE
        tensors, metadata = read_tensors(path, ours=True)
        settings = read_settings(path, metadata)
        counts = {name: settings.pop(name, None) for name in ("step_count", "example_count")}
        # Of a state that is older than that any may be skipped, none was.
        counts |= {name: settings.pop(name, 0) for name in ("skipped", "skipped_in_a_row")}
        for name, count in counts.items():
            check_integer(f"{path}: {name}", count, 0)
        there, before = (_object(settings.pop(name, None)) for name in ("machine", "run"))
        there = {"ranks": 1, "accumulate": 1, **there}
        compare(path, with_later_options(settings), self.recipe())
        if run is not None and before:
            compare(path, before, dict(run))
        elif run is not None and counts["step_count"]:
            warnings.warn(
                f"{path} was not saved by a run: its {', '.join(run)} can't be compared",
                stacklevel=callers_level(),
            )
        check_tensors(path, tensors, self.weights)
        own = machine(WAY, self.device, self.replicas.world, self.accumulate)
        if counts["step_count"] and (moved := differing(there, own)):
            warnings.warn(
                f"{path}: the run goes on, but not bit for bit as it would have where it was: "
                + ", ".join(f"{k} was {there.get(k)!r} and is {own.get(k)!r}"
                            for k in moved),
                stacklevel=callers_level(),
            )  # fmt: skip
        self.recordings.forget()
        self.guard.reset(counts["skipped_in_a_row"])  # of what was done here nothing matters
        self._unread = []
        take(tensors, self.weights, self.optimizer)
        self.step_count, self.example_count = counts["step_count"], counts["example_count"]
        self.skipped = counts["skipped"]
        self.skipped_in_a_row = counts["skipped_in_a_row"]

    def recipe(self) -> dict[str, Any]:
        """What must be the same for a resumed run to take the same steps, JSON-ready; ValueError
        names a process that can't be saved.
        """
        parameters = self.weights.parameters
        return {
            "precision": self.precision,
            "lr": self.lr,
            "warmup": self.warmup,
            "ema_decay": self.ema_decay,
            "ema_warmup": self.ema_warmup,
            "grad_clip": self.grad_clip,
            "flip": self.flip,
            "seed": self.seed,
            "diffusion": self.diffusion.to_config(),
            "model": architecture(self.network),
            "dtypes": {
                name: str(p.dtype) for name, p in parameters.items() if p.dtype != torch.float32
            },
            "frozen": [name for name, p in parameters.items() if not p.requires_grad],
        }


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _float32(x: float) -> float:
    """x as a float32 on a device holds it."""
    return float(np.float32(x))
