"""What an optimiser moves: a network's parameters in float32 at least, their average, and the
network's buffers as they are when they are asked for. No steps and no files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastddpm.ops.overlap import overlaps_itself
from fastddpm.training.working_copies import widen
from fastddpm.wrapped import is_sharded

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALVES = DTYPES[2:]
# Gradients of a mean over a batch's pixels lie below what float16 holds: they are computed of the
# loss times a power of two, which leaves their digits as they are.
LOSS_SCALE = 2.0**10


class MasterWeights:
    """The parameters of a network, their float32 masters and the average of these, by name.

    A bfloat16 or float16 parameter can't take a small step: 1 + 2^-10 is 1 there. It gets a master
    in float32, which the optimiser and the average see, and is its rounded copy after each step. A
    float32 or float64 parameter is its own master.

    Raises ValueError for parameters of other types and sharded ones, a state_dict that holds more
    than tensors, and, from `check` on, for a network that has other parameters than when this was
    made.
    """

    def __init__(self, network: nn.Module):
        if is_sharded(network):
            raise ValueError("sharded parameters (FSDP, DTensor) can't be trained here: train in "
                             "one process")  # fmt: skip
        self.network = network
        self.parameters = dict(network.named_parameters())
        if not self.parameters:
            raise ValueError(f"{type(network).__name__} has no parameters to train")
        self._types: dict[str, tuple[torch.dtype, torch.device]] = {}
        self.masters: dict[str, torch.Tensor] = {}
        for name, p in self.parameters.items():
            if p.dtype not in DTYPES or p.layout != torch.strided or p.is_meta:
                raise ValueError(
                    f"{name} is {p.dtype} ({p.layout}, {p.device}): parameters must be dense and "
                    f"{', '.join(str(d).removeprefix('torch.') for d in DTYPES)}"
                )
            self._types[name] = p.dtype, p.device
            self.masters[name] = p
            if p.dtype in HALVES:
                self.masters[name] = p.detach().float().requires_grad_(p.requires_grad)
        for name, value in network.state_dict(keep_vars=True).items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(
                    f"state_dict()[{name!r}] is {type(value).__name__}, which can't be saved: only "
                    "tensors can"
                )
        self.average = {name: m.detach().clone() for name, m in self.masters.items()}
        self._halves = [name for name, p in self.parameters.items() if p.dtype in HALVES]
        self._versions = {name: self.parameters[name]._version for name in self._halves}
        fp16 = any(p.dtype == torch.float16 for p in self.parameters.values())
        self.loss_scale = LOSS_SCALE if fp16 else 1.0

    @property
    def has_halves(self) -> bool:
        """Whether a parameter is a rounded copy of its master."""
        return bool(self._halves)

    def check(self) -> None:
        """ValueError if a parameter was replaced, moved or cast since; a half-precision one that
        was written to is taken up.
        """
        now = dict(self.network.named_parameters())
        for name in sorted(now.keys() | self._types.keys()):
            p, there = now.get(name), self.parameters.get(name)
            if p is not there or (p.dtype, p.device) != self._types[name]:  # type: ignore[union-attr]
                raise ValueError(
                    f"{name} is not the parameter that it was when the Trainer was made: change "
                    "the model first (layers, .to(...)) and make the Trainer then"
                )
        for name in self._halves:
            p = self.parameters[name]
            if p._version != self._versions[name]:
                self.masters[name].detach().copy_(p.detach())
                self._versions[name] = p._version

    def zero_gradients(self) -> None:
        for p in (*self.parameters.values(), *self.masters.values()):
            p.grad = None

    def take_gradients(self) -> list[torch.Tensor]:
        """The parameters' gradients become the masters', which are returned: of the scaled loss."""
        halves: list[torch.Tensor] = [self.parameters[name] for name in self._halves]
        widen(halves, [self.masters[name] for name in self._halves])
        return [master.grad for master in self.masters.values() if master.grad is not None]

    @torch.no_grad()
    def round(self) -> None:
        """The half-precision parameters become their masters' rounded copies."""
        if not self._halves:
            return
        halves: list[torch.Tensor] = [self.parameters[name] for name in self._halves]
        torch._foreach_copy_(halves, [self.masters[name] for name in self._halves])
        self.were_rounded()

    @property
    def rounded(self) -> dict[str, torch.Tensor]:
        """The half-precision parameters, which are their masters' rounded copies."""
        return {name: self.parameters[name] for name in self._halves}

    def were_rounded(self) -> None:
        """The half-precision parameters are what their masters are now."""
        for name in self._halves:
            self._versions[name] = self.parameters[name]._version

    @torch.no_grad()
    def move_average(
        self,
        share: float | torch.Tensor,
        refused: torch.Tensor | None = None,
        names: Iterable[str] | None = None,
    ) -> None:
        """average <- average + share (masters - average), unless `refused` is 1; of all, or of
        these alone.

        share: the weight of the present, 1 - ema_decay, or a () float32 tensor that holds it"""
        groups: dict[tuple, tuple[list, list]] = defaultdict(lambda: ([], []))
        for name in self.average if names is None else names:
            average = self.average[name]
            averages, masters = groups[average.dtype, average.device]  # that one launch may take
            averages.append(average)
            masters.append(self.masters[name])
        # A step of gradient descent, as torch's fused one is what a tensor on the device can skip.
        for averages, masters in groups.values():
            away, device = torch._foreach_sub(averages, masters), averages[0].device
            torch._fused_sgd_(
                averages, away, [], weight_decay=0.0, momentum=0.0,
                lr=on_device(share, device), dampening=0.0, nesterov=False, maximize=False,
                is_first_step=False, grad_scale=None, found_inf=on_device(refused, device),
            )  # fmt: skip

    def averaged_state(self) -> dict[str, torch.Tensor]:
        """The network's state_dict with the averages in the parameters' places: tied names all have
        the one that they share, buffers are as they are now.
        """
        averages = {id(p): self.average[name] for name, p in self.parameters.items()}
        state = self.network.state_dict(keep_vars=True)
        return {name: averages.get(id(v), v.detach()) for name, v in state.items()}

    def buffers(self) -> dict[str, torch.Tensor]:
        """Every buffer as it is now, of those that share memory each its own copy."""
        named = self.network.named_buffers(remove_duplicate=False)
        return {name: b.detach().clone(memory_format=torch.preserve_format) for name, b in named}

    def passing(self) -> set[str]:
        """The names of the buffers that are no part of the architecture (persistent=False)."""
        return {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in self.network.named_modules(remove_duplicate=False)
            for name in module._non_persistent_buffers_set
        }

    @torch.no_grad()
    def set_buffers(self, values: dict[str, torch.Tensor]) -> None:
        """Write the buffers, in place where they have the room: others may share it."""
        device = next(iter(self.parameters.values())).device
        for name, value in values.items():
            owner, _, leaf = name.rpartition(".")
            module = self.network.get_submodule(owner)
            buffer = module._buffers.get(leaf)
            if (
                buffer is not None
                and (buffer.shape, buffer.dtype) == (value.shape, value.dtype)
                and not overlaps_itself(buffer)
            ):
                buffer.copy_(value)
            else:
                module._buffers[leaf] = value.to(device if buffer is None else buffer.device)


def on_device(value: Any, device: torch.device) -> Any:
    """A tensor among `value`s there."""
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
