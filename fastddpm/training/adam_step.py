"""A step of the optimiser: torch's Adam keeps the state and the options, ops.adam moves weights,
moments, average and rounded copies in one pass over memory. When a step is taken, and which
gradients it gets, is step.py's."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch.optim import optimizer as torch_optimizer

from fastddpm import ops
from fastddpm.ops import plain_sweep
from fastddpm.ops.lists import in_order_of, is_dense, lie_apart
from fastddpm.training.master_weights import MasterWeights, on_device

# What the options that ops.adam does not have must be for it to be the same step.
PLAIN = {"amsgrad": False, "maximize": False, "differentiable": False, "weight_decay": 0}


def norm_of(gradients: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The norm of all gradients in one, on `device`."""
    if (norm := plain_sweep.grad_norm(gradients)) is not None:
        return norm.to(device, non_blocking=True)
    by_device = defaultdict(list)
    for gradient in gradients:
        by_device[gradient.device].append(gradient)
    norms = [ops.grad_norm(some).to(device, non_blocking=True) for some in by_device.values()]
    if not norms:
        return torch.zeros((), dtype=torch.float32, device=device)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def update(
    optimizer: torch.optim.Optimizer,
    weights: MasterWeights,
    *,
    rate: float | torch.Tensor,
    share: float | torch.Tensor,
    norm: torch.Tensor,
    clip: float,
    refused: torch.Tensor,
) -> None:
    """The masters' gradients, of weights.loss_scale times the loss, move the masters, and these
    their average and rounded copies, unless `refused` is 1.

    rate: Adam's;  share: of the weights in their average; numbers, or () float32 on the device
    norm: of the loss's own gradients;  clip: the largest

    An optimiser that is not torch.optim.Adam as the Trainer makes it, or whose options were set to
    what ops.adam does not have, takes its own step; so does one of parameters that share memory,
    which are moved one after the other."""
    plain = is_plain(optimizer)
    if plain and _sweep_at_once(optimizer, weights, rate, share, norm, clip, refused):
        return
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not (plain and lie_apart(params)):
        _torch_step(optimizer, weights, rate, norm, clip, refused)
        weights.round()
        weights.move_average(share, refused)
        return
    moved = _sweep(optimizer, weights, rate, share, norm, clip, refused)
    weights.were_rounded()
    still = [name for name, master in weights.masters.items() if id(master) not in moved]
    weights.move_average(share, refused, still)


def is_plain(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ops.adam is this optimiser's step, and nobody watches or replaces that."""
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    return (
        type(optimizer) is torch.optim.Adam
        and "step" not in vars(optimizer)  # as schedulers wrap it
        and not any(hooks)
        and all(_is_plain_group(group) for group in optimizer.param_groups)
    )


def _is_plain_group(group: dict[str, Any]) -> bool:
    return (
        group.get("fused") is True
        and not group.get("decoupled_weight_decay")
        and all(group[name] == value for name, value in PLAIN.items())
        and all(isinstance(beta, float) for beta in group["betas"])
    )


def _sweep_at_once(
    optimizer: torch.optim.Optimizer,
    weights: MasterWeights,
    rate: float | torch.Tensor,
    share: float | torch.Tensor,
    norm: torch.Tensor,
    clip: float,
    refused: torch.Tensor,
) -> bool:
    """Whether all was one native call, as it mostly is on a CPU: one group of float32 parameters
    that have their state and their average. If not, nothing was done."""
    if isinstance(rate, torch.Tensor) or isinstance(share, torch.Tensor):
        return False
    if weights.has_halves or len(optimizer.param_groups) != 1:
        return False
    (group,), states, averages = optimizer.param_groups, optimizer.state, weights.average
    names = {id(master): name for name, master in weights.masters.items()}
    rows = []
    for p in group["params"]:
        if (grad := p.grad) is None:
            continue
        state, name = states.get(p), names.pop(id(p), None)
        if not state or name is None:
            return False
        rows.append((p, grad, state["exp_avg"], state["exp_avg_sq"], state["step"], averages[name]))
    if not rows or not plain_sweep.adam(
        *zip(*rows, strict=True),
        lr=rate, betas=group["betas"], eps=group["eps"], share=share, clip=clip, norm=norm,
        refused=refused, grad_scale=weights.loss_scale,
    ):  # fmt: skip
        return False
    if names:
        weights.move_average(share, refused, names.values())
    return True


class _Row(NamedTuple):
    """What there is of one parameter; None for what there is not."""

    param: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: torch.Tensor
    average: torch.Tensor | None
    copy: torch.Tensor | None


def _sweep(
    optimizer: torch.optim.Optimizer,
    weights: MasterWeights,
    rate: float | torch.Tensor,
    share: float | torch.Tensor,
    norm: torch.Tensor,
    clip: float,
    refused: torch.Tensor,
) -> set[int]:
    """The ids of the parameters that were moved."""
    names = {id(master): name for name, master in weights.masters.items()}
    moved = set()
    alike: dict[tuple, list[_Row]] = defaultdict(list)  # of what one walk may take
    for number, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if p.grad is None:
                continue
            moved.add(id(p))
            row = _row(optimizer, weights, p, names.get(id(p)))
            others = (row.grad, row.exp_avg, row.exp_avg_sq, row.average, row.copy)
            walked = is_dense(p) and all(x is None or in_order_of(x, p) for x in others)
            alike[number, p.device, p.dtype, row.average is None, walked].append(row)
    for (number, device, _, no_average, _), rows in alike.items():
        options = optimizer.param_groups[number]
        params, grads, exp_avgs, exp_avg_sqs, steps, averages, copies = zip(*rows, strict=True)
        ops.adam(
            params, grads, exp_avgs, exp_avg_sqs, steps,
            None if no_average else averages, copies,
            lr=on_device(rate, device), betas=options["betas"], eps=options["eps"],
            share=None if no_average else on_device(share, device),
            clip=clip, norm=on_device(norm, device), refused=on_device(refused, device),
            grad_scale=weights.loss_scale,
        )  # fmt: skip
    return moved


def _row(
    optimizer: torch.optim.Optimizer, weights: MasterWeights, p: torch.Tensor, name: str | None
) -> _Row:
    """What Adam keeps of p is laid out as p, made where there is none yet."""
    state = optimizer.state[p]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = _laid_out(state[key], p)
    average = copy = None
    if name is not None:
        average = weights.average[name] = _laid_out(weights.average[name], p)
        copy = weights.rounded.get(name)
    assert p.grad is not None
    return _Row(
        p.detach(), _laid_out(p.grad, p), state["exp_avg"], state["exp_avg_sq"], state["step"],
        average, None if copy is None else copy.detach(),
    )  # fmt: skip


def _laid_out(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """x with its elements in the order of those of p, if these are dense."""
    if in_order_of(x, p) or not is_dense(p):
        return x
    return torch.empty_like(p, dtype=x.dtype).copy_(x)


def _torch_step(
    optimizer: torch.optim.Optimizer,
    weights: MasterWeights,
    rate: float | torch.Tensor,
    norm: torch.Tensor,
    clip: float,
    refused: torch.Tensor,
) -> None:
    """The optimiser's own. A fused one divides the gradients by what clips them, and leaves all as
    it is in a step that is refused: torch's grad scaler speaks to it in the same way. For one that
    doesn't, the host does both."""
    divisor = ((norm + 1e-6) / clip).clamp(min=1) * weights.loss_scale
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    for p in params:  # a fused one walks over memory, whatever the order of the elements there
        p.grad = _laid_out(p.grad, p)
        for key, value in optimizer.state[p].items():
            if isinstance(value, torch.Tensor) and value.shape == p.shape:
                optimizer.state[p][key] = _laid_out(value, p)
    for group in optimizer.param_groups:
        group["lr"] = rate
        on_gpu = any(p.is_cuda for p in group["params"])
        if "capturable" in group:
            group["capturable"] = on_gpu and torch.cuda.is_current_stream_capturing()
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.grad_scale = divisor.float()  # type: ignore[attr-defined]
        optimizer.found_inf = refused  # type: ignore[attr-defined]
    elif refused:
        return
    else:
        optimizer.grad_scale = optimizer.found_inf = None  # type: ignore[attr-defined]
        for p in params:
            p.grad.div_(on_device(divisor, p.device))  # type: ignore[union-attr]
    optimizer.step()
