"""One step of Algorithm 1 as work for the device, whose values nothing here reads: draws, loss,
gradients, Adam, the average. When a step is taken, and with which rate, is trainer.py's."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING

import torch

from fastddpm import ops
from fastddpm.host import seeded
from fastddpm.ops import dispatch
from fastddpm.precision import autocast, tf32_asked
from fastddpm.training.adam_step import norm_of, update
from fastddpm.training.replicas import Part, cut
from fastddpm.unet import UNet
from fastddpm.unet import walk as unet_walk
from fastddpm.unet.parts import changed
from fastddpm.unet.plain import foreign, settings

if TYPE_CHECKING:
    from fastddpm.training.trainer import Trainer

CHOICES_STEP = 2**32 - 1  # the RNG contract's step word of t and flip, which no chain reaches

MOVING = ("params", "lr", "capturable")  # of Adam's options: what a step is given, or sets itself


def take_step(
    run: Trainer,
    x0: torch.Tensor,
    y: torch.Tensor | None,
    part: Part,
    rate: float,
    share: float,
) -> torch.Tensor:
    """The step of the examples from run.example_count on, by a recording or by itself; returns its
    loss.

    x0: the images of this rank's `part` of the step, or one where that is empty;  y: their classes
    rate: Adam's;  share: of the weights in their average, 1 - ema_decay"""
    first, plain = run.example_count + part.start, is_plain(run.model)
    if plain:  # in the network's own layout while an image is bytes: x_t and eps are made in it
        x0 = x0.contiguous(memory_format=torch.channels_last)
    if plain and run.recordings.record is not None and not run.weights.has_halves:
        compute = functools.partial(_compute, run, part, plain=True)
        recorded = run.recordings.get(_alike(run, x0), compute, x0, y)
        if recorded is not None:
            loss = recorded(x0, y, first, rate, share)
            for p in run.weights.masters.values():  # as a write that torch has seen
                torch.autograd.graph.increment_version(p)
            return loss
    index = torch.arange(first, first + x0.shape[0], device=run.device)
    return _compute(run, part, x0, y, index, rate, share, plain=plain)


def is_plain(model: object) -> bool:
    """Whether the model is our network as it was made: with nothing around it, and nothing in it
    that could see which tensors it computes with, or when their gradients are there."""
    return (
        type(model) is UNet
        and getattr(model, "_compiled_call_impl", None) is None
        and changed(model) is None
        and foreign(model) is None
        and not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    )


def _alike(run: Trainer, x0: torch.Tensor) -> Hashable:
    """What must be the same for steps to be the same operations on the same tensors."""
    masters = list(run.weights.masters.values())
    states = (run.optimizer.state[m] for m in masters)
    moments = (value.data_ptr() for state in states for value in state.values())
    weights = ((m.data_ptr(), m.requires_grad) for m in masters)
    options = (run.seed, run.flip, run.grad_clip, run.precision, id(run.diffusion), run.accumulate)
    host = (dispatch.forced(), tf32_asked())
    layout = (x0.shape, x0.dtype, x0.stride())
    adam = ((k, v) for g in run.optimizer.param_groups for k, v in g.items() if k not in MOVING)
    network = settings(run.network)
    return layout, options, host, network, tuple(adam), tuple(weights), tuple(moments)


def _compute(
    run: Trainer,
    part: Part,
    x0: torch.Tensor,
    y: torch.Tensor | None,
    index: torch.Tensor,
    rate: float | torch.Tensor,
    share: float | torch.Tensor,
    *,
    plain: bool,
) -> torch.Tensor:
    """index: (N,) int64, the numbers of the examples;  rate, share: numbers, or () float32 on the
    device;  plain: whether the model is"""
    loss = _gradients(run, part, x0, y, index, plain)
    counts = run.step_count, run.example_count
    seen = run.replicas.agreed(loss, run.guard.range_of(x0), part, counts)
    norm = norm_of(run.weights.take_gradients(), run.device) / run.weights.loss_scale
    loss = seen[0]
    run.guard.look(loss, norm, *seen[1:])
    update(
        run.optimizer, run.weights,
        rate=rate, share=share, norm=norm, clip=run.grad_clip, refused=run.guard.refused,
    )  # fmt: skip
    return loss


def _gradients(
    run: Trainer,
    part: Part,
    x0: torch.Tensor,
    y: torch.Tensor | None,
    index: torch.Tensor,
    plain: bool,
) -> torch.Tensor:
    """The gradients of the step's mean loss, on every rank the same; returns this rank's share in
    the loss, detached.

    The images are taken in run.accumulate pieces, one after the other, whose gradients are added
    up: in float32 those of the copies that bfloat16 products are made with, and in one process
    those of half-precision weights."""
    copies = run.copies if plain else None
    t, flip = ops.choices(index, seed=run.seed, step=CHOICES_STEP, levels=run.diffusion.T)
    run.weights.zero_gradients()
    losses, pieces = [], cut(len(x0), run.accumulate)
    for start, stop in pieces:
        here, last = slice(start, stop), stop == len(x0)
        weight = run.replicas.weight(stop - start, part)
        # Dropout, copies and what reduces are for the backward, too: a checkpoint computes there.
        with contextlib.ExitStack() as stack:
            stack.enter_context(_dropout(run, index[here], part.start + start, plain))
            stack.enter_context(run.replicas.reducing(last))
            if copies is not None:
                stack.enter_context(copies.in_place())
            with autocast(run.precision, run.device):
                loss = run.diffusion.loss(
                    run.model, x0[here], t=t[here], flip=flip[here] if run.flip else None,
                    seed=run.seed, sample_index=index[here],
                    model_kwargs=None if y is None else {"y": y[here]},
                ).mean()  # fmt: skip
            if not loss.requires_grad:
                raise ValueError(
                    "the loss depends on no weight that may be trained: every parameter is frozen "
                    "(requires_grad=False), or the model computes without gradients"
                )
            scale = weight * run.weights.loss_scale
            (loss if scale == 1 else loss * scale).backward()
        if copies is not None:
            copies.take_gradients()
        if run.replicas.world == 1:  # else what is not reduced yet is the parameters'
            run.weights.take_gradients()
        loss, of_all = loss.detach(), weight / run.replicas.world
        losses.append(loss if of_all == 1 else loss * of_all)
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


@contextlib.contextmanager
def _dropout(run: Trainer, index: torch.Tensor, start: int, plain: bool) -> Iterator[None]:
    """Dropout as a function of the seed and, drawn by a UNet itself, of each example; of any other
    network, whose torch's generators give it, of the step and of where in it the images begin."""
    network = run.network
    draws = isinstance(network, UNet) and any(
        module.p for module in network.modules() if isinstance(module, torch.nn.Dropout)
    )
    with contextlib.ExitStack() as stack:
        if draws:
            stream = unet_walk.dropout_stream(network, seed=run.seed, sample_index=index)
            stack.enter_context(stream)
        if not plain or (draws and not unet_walk.is_taken(network, index)):
            seed = run.seed * 0x9E3779B97F4A7C15 + run.step_count + start * 0xBF58476D1CE4E5B9
            devices = {p.device for p in run.weights.parameters.values()}
            stack.enter_context(seeded(seed % 2**63, *devices))
        yield
