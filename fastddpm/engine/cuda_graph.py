"""The engine of a GPU: model and posterior step recorded once as a CUDA graph and replayed for
every step, with the step counter on the device, so that the host waits for nothing.

What is recorded is here, and what a recording needs; the step itself is eager.py's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fastddpm.batching import is_out_of_memory
from fastddpm.diffusion import Diffusion, Model
from fastddpm.engine.eager import Eager, OnStep
from fastddpm.host import evaluating
from fastddpm.ops.dispatch import report_slower
from fastddpm.wrapped import parts

Record = Callable[[Callable[[], None], torch.device], Callable[[], None]]
WARM_UP = 3  # steps before a recording: libraries choose their kernels in the first


def unsupported(device: torch.device) -> str | None:
    """Why no graph can be recorded on this device, or None."""
    return None if device.type == "cuda" else f"CUDA graphs are for GPUs, not {device.type}"


def record(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The work that `step` queues on the device, as a function that queues it again."""
    # A recording that fails leaves torch on the stream of the recording: the outer block leaves it.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph, first = torch.cuda.CUDAGraph(), None
        try:
            with torch.cuda.graph(graph):
                try:
                    step()
                except Exception as error:
                    first = error
                    raise
        except Exception as last:  # the end of the recording fails as well, and says less
            try:
                raise first or last from None
            finally:
                first = None  # it holds this frame, and so the memory of the step
        return graph.replay


class CudaGraph(Eager):
    """Algorithm 2 as one graph launch a step.

    The model runs at the memory addresses and with the Python decisions of the recording: it may
    depend on x and t in no other way than through tensors on the device. Weights that are written
    to are seen; where they were replaced the model is recorded anew. One that can't be recorded
    runs step by step, which a warning says once. x and its shape are those of `run`; what on_step
    gets are the recording's own tensors, good until the next step."""

    name = "cuda_graph"

    def __init__(
        self,
        model: Model,
        diffusion: Diffusion,
        *,
        device: torch.device,
        record: Record = record,
        **options: Any,
    ):
        super().__init__(model, diffusion, device=device, **options)
        self._record = record
        self._recorded: dict[tuple[Any, ...], _Step] = {}
        self._places = _places(self.model)
        self._refused = False

    @torch.no_grad()
    def run(
        self,
        xt: torch.Tensor,
        *,
        seed: int,
        sample_index: torch.Tensor,
        start: int | None = None,
        stop: int = 0,
        on_step: OnStep | None = None,
    ) -> torch.Tensor:
        """As Eager's, which see; a seed and a shape that were not met before are recorded first."""
        start = self.diffusion.T if start is None else start
        recorded = self._get(xt, seed) if start > stop else None
        if recorded is None:
            return super().run(
                xt, seed=seed, sample_index=sample_index, start=start, stop=stop, on_step=on_step
            )
        clip = bool(self.step_options["clip"])
        recorded.begin(xt, sample_index, start)
        for i in reversed(range(stop, start)):
            recorded.replay()
            if on_step is not None:
                predict = functools.partial(
                    self.diffusion.predict_x0, recorded.xt, recorded.output, recorded.t, clip=clip
                )
                on_step(i, recorded.x, predict)
        return torch.empty_like(xt).copy_(recorded.x)

    def _get(self, xt: torch.Tensor, seed: int) -> _Step | None:
        """The recording for this shape and seed; None where none can be made."""
        if (places := _places(self.model)) != self._places:
            self._recorded, self._places = {}, places
        key = (tuple(xt.shape), seed)
        if key in self._recorded or self._refused:
            return self._recorded.get(key)
        try:
            with evaluating(self.model):
                self._recorded = {**_of_seed(self._recorded, seed), key: _Step(self, xt, seed)}
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self._refused = True
            why = str(error).strip().splitlines()[0]
            report_slower(f"fastddpm samples with the engine 'eager', not 'cuda_graph': {why}")
            return None
        return self._recorded[key]


def _of_seed(recorded: dict[tuple[Any, ...], _Step], seed: int) -> dict[tuple[Any, ...], _Step]:
    """The recordings of this seed: the others' memory is given back, as a set has one seed."""
    return {key: step for key, step in recorded.items() if key[1] == seed}


def _places(model: Model) -> list[tuple[Any, ...]]:
    """Where in memory the model has its weights, and how: what a recording reads them by."""
    plain = (torch.Tensor, torch.nn.Parameter)  # others may have no memory of their own
    modules = (part for part in parts(model) if isinstance(part, torch.nn.Module))
    return [
        (x.data_ptr(), x.device, x.dtype, x.shape, x.stride()) if type(x) in plain else (id(x),)
        for module in modules
        for x in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]


class _Step:
    """A recording: t <- t - 1, x_t <- x, output <- model(x_t, t), x <- x_{t-1}, on tensors of its
    own."""

    def __init__(self, engine: CudaGraph, xt: torch.Tensor, seed: int):
        n, device = xt.shape[0], engine.device
        self.x = xt.to(device, memory_format=torch.channels_last, copy=True)
        self.xt = torch.empty_like(self.x)
        self.t = torch.full((n,), engine.diffusion.T, dtype=torch.int64, device=device)
        self.sample_index = torch.zeros(n, dtype=torch.int64, device=device)
        self.output = torch.empty(0, device=device)  # the recording's, once it is made

        def step() -> None:
            self.t.sub_(1).clamp_(min=0)  # warming up may take more steps than there are
            self.xt.copy_(self.x)
            self.output = engine.output(self.xt, -1, self.t)
            x = engine.diffusion.p_step(
                self.xt, self.output, self.t, seed=seed, sample_index=self.sample_index,
                **engine.step_options,
            )  # fmt: skip
            self.x.copy_(x)

        self.replay = engine._record(step, device)

    def begin(self, xt: torch.Tensor, sample_index: torch.Tensor, start: int) -> None:
        """From x at chain index `start` on."""
        self.x.copy_(xt)
        self.sample_index.copy_(sample_index)
        self.t.fill_(start)
