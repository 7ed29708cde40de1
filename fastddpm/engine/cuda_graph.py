"""The engine of a GPU: model and posterior step recorded once as a CUDA graph and replayed for
every step, with seed and step counter on the device, so that the host waits for nothing.

What is recorded is here, and what a recording needs; the step itself is eager.py's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from fastddpm.batching import is_out_of_memory
from fastddpm.diffusion import Diffusion, Model
from fastddpm.engine.eager import Eager, OnStep
from fastddpm.engine.guided import Guide
from fastddpm.host import evaluating
from fastddpm.ops import checks
from fastddpm.ops.dispatch import report_slower
from fastddpm.presence import first_line
from fastddpm.unet import UNet
from fastddpm.unet.plain import settings
from fastddpm.wrapped import parts

Action = Callable[[], None]
Record = Callable[[Action, Action, torch.device], Action]
WARM_UP = 3  # steps before a recording: libraries choose their kernels in the first
AHEAD = 8  # steps between two marks on the device; the host waits for the last but one


def unsupported(device: torch.device) -> str | None:
    """Why no graph can be recorded on this device, or None."""
    return None if device.type == "cuda" else f"CUDA graphs are for GPUs, not {device.type}"


def record(step: Action, rewind: Action, device: torch.device) -> Action:
    """The work that `step` queues on the device, as a function that queues it again. rewind: what
    makes another step possible, queued before each that runs."""
    # A recording that fails leaves torch on the stream of the recording: the outer block leaves it.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                rewind()
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph, first = torch.cuda.CUDAGraph(), None
        try:
            # thread_local: another thread may allocate, on another device say, while this records.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
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


def mark(device: torch.device) -> Any:
    """An event after all that is queued on the device by now; None on a CPU, where nothing is."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        event = torch.cuda.Event()
        event.record()
    return event


class _Pace:
    """Called after each step: keeps the host at most 2 AHEAD of them before the device, so that who
    counts them tells the truth."""

    def __init__(self, device: torch.device):
        self._device, self._steps, self._mark = device, 0, None

    def __call__(self) -> None:
        self._steps += 1
        if self._steps % AHEAD == 0:
            before, self._mark = self._mark, mark(self._device)
            if before is not None:
                before.synchronize()


class CudaGraph(Eager):
    """Algorithm 2 as one graph launch a step.

    The model runs at the memory addresses and with the Python decisions of the recording: it may
    depend on x and t in no other way than through tensors on the device. One that can't be recorded
    runs step by step, which a warning says once. Weights may change from run to run; where they lie
    elsewhere than before, a run is recorded anew. A U-Net's smaller batches are filled up to the
    one that is recorded, whose results for an image are the same. What on_step gets are the
    recording's own tensors, good until the next step."""

    name = "cuda_graph"
    takes = ("y",)
    guided = False
    records_xt = True  # whether the recording itself keeps x_t

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
        self._recorded: dict[tuple[tuple[int, ...], tuple[Any, ...]], Step] = {}
        self._read: list[Any] = []
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
        model_kwargs: Mapping[str, Any] | None = None,
        guide: Guide | None = None,
    ) -> torch.Tensor:
        """As Eager's, which see; a shape that was not met before is recorded first."""
        assert guide is None, "make_engine chose it for steps that are guided"
        start = self.diffusion.T if start is None else start
        model_kwargs = dict(model_kwargs or {})
        self.check_arguments(model_kwargs, len(xt))
        try:
            recorded = self._get(xt, model_kwargs) if start > stop and len(xt) else None
            if recorded is not None:
                recorded.begin(xt, seed, sample_index, start, model_kwargs)
                return self._replay(recorded, xt, start, stop, on_step)
        except (RuntimeError, MemoryError, OSError) as error:
            if is_out_of_memory(error):  # a smaller batch may fit where this is not
                self._recorded = {}
            raise
        return super().run(
            xt, seed=seed, sample_index=sample_index, start=start, stop=stop, on_step=on_step,
            model_kwargs=model_kwargs,
        )  # fmt: skip

    def check_arguments(self, model_kwargs: Mapping[str, Any], n: int) -> None:
        super().check_arguments(model_kwargs, n)
        for name, value in model_kwargs.items():
            shape = value.shape if isinstance(value, torch.Tensor) else None
            if shape is None or shape[:1] != (n,):
                got = type(value).__name__ if shape is None else tuple(shape)
                raise ValueError(f"{name} must be a tensor of {n} rows here; got {got}")

    def _replay(
        self,
        recorded: Step,
        xt: torch.Tensor,
        start: int,
        stop: int,
        on_step: OnStep | None,
    ) -> torch.Tensor:
        clip, n, pace = bool(self.step_options["clip"]), len(xt), _Pace(self.device)
        # Who only counts steps says so, and spares the copy of x_t that predict_x0 needs.
        shown = on_step is not None and getattr(on_step, "reads_x0", True)
        for i in reversed(range(stop, start)):
            if shown and not self.records_xt:
                recorded.keep()
            recorded.replay()
            if on_step is not None:
                pace()
                seen = (recorded.xt[:n], recorded.output[:n], recorded.t[:n])
                predict = functools.partial(self.diffusion.predict_x0, *seen, clip=clip)
                on_step(i, recorded.x[:n], predict)
        return torch.empty_like(xt).copy_(recorded.x[:n])

    def advance(self, step: Step) -> torch.Tensor:
        """The recorded work of a step: x <- x_{t-1} of x_t = x; what the model said of it."""
        step.keep()
        output = self.output(step.xt, -1, step.t, **step.model_kwargs)
        self.diffusion.p_step(
            step.xt, output, step.t, seed=step.seed, sample_index=step.sample_index, out=step.x,
            **self.step_options,
        )  # fmt: skip
        return output

    def recording(self, step: Action) -> Action | None:
        """The work that `step` queues, as a function that queues it again; None where it can't be
        recorded, which a warning says once."""
        if self._refused:
            return None
        try:
            return self._record(step, lambda: None, self.device)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self._refuse(first_line(error))
            return None

    def _get(self, xt: torch.Tensor, model_kwargs: dict[str, torch.Tensor]) -> Step | None:
        """The recording for this shape; None where none can be made."""
        self.follow()
        if self._refused:
            return None
        if self._read != (read := self._reads()):
            self._recorded, self._read = {}, read
        kinds = tuple((k, v.shape[1:], v.dtype) for k, v in model_kwargs.items())
        recorded = self._find(tuple(xt.shape), kinds)
        return self._make(xt, model_kwargs, kinds) if recorded is None else recorded

    def _reads(self) -> list[Any]:
        """What of the model a recording depends on: where its weights lie, and what Python read."""
        own = settings(self.model) if isinstance(self.model, UNet) else ()
        return [own, *_places(self.model)]

    def _find(self, shape: tuple[int, ...], kinds: tuple[Any, ...]) -> Step | None:
        if not isinstance(self._given, UNet):  # another model may mix the images of a batch
            return self._recorded.get((shape, kinds))
        for ((n, *size), _), recorded in self._recorded.items():
            if n >= shape[0] and tuple(size) == shape[1:]:
                return recorded
        return None

    def _make(
        self, xt: torch.Tensor, model_kwargs: dict[str, torch.Tensor], kinds: tuple[Any, ...]
    ) -> Step | None:
        shape = tuple(xt.shape)
        if isinstance(self._given, UNet):  # the smaller one's memory is given back first
            kept = {key: step for key, step in self._recorded.items() if key[0][1:] != shape[1:]}
            self._recorded = kept
        try:
            with evaluating(self.model):
                self._recorded[shape, kinds] = recorded = Step(self, xt, model_kwargs)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self._refuse(first_line(error))
            return None
        return recorded

    def _refuse(self, why: str) -> None:
        """From here on, steps are not recorded."""
        self._refused = True
        report_slower(f"fastddpm samples with the engine 'eager', not '{self.name}': {why}")


def _places(model: Model) -> list[tuple[Any, ...]]:
    """Where in memory the model has its weights, and how: what a recording reads them by."""
    plain = (torch.Tensor, torch.nn.Parameter)  # others may have no memory of their own
    modules = (part for part in parts(model) if isinstance(part, torch.nn.Module))
    return [
        (x.data_ptr(), x.device, x.dtype, x.shape, x.stride()) if type(x) in plain else (id(x),)
        for module in modules
        for x in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]


class Step:
    """A recording: t <- t - 1, x <- x_{t-1}, on tensors of its own; of at most as many images as xt
    has."""

    def __init__(
        self,
        engine: CudaGraph,
        xt: torch.Tensor,
        model_kwargs: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ):
        n, device = xt.shape[0], engine.device
        self.model_kwargs = {k: v.to(device, copy=True) for k, v in model_kwargs.items()}
        self.x = xt.to(device, memory_format=torch.channels_last, copy=True)
        self.xt = torch.empty_like(self.x)
        self.t = torch.empty(n, dtype=torch.int64, device=device)
        self.sample_index = torch.zeros(n, dtype=torch.int64, device=device)
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.output = torch.empty(0, device=device)  # the recording's, once it is made

        def step() -> None:
            self.t.sub_(1)
            self.output = engine.advance(self)

        self.replay = engine._record(step, lambda: self._rewind(engine.diffusion.T), device)

    def _rewind(self, start: int) -> None:
        self.t.fill_(start)

    def begin(
        self,
        xt: torch.Tensor,
        seed: int,
        sample_index: torch.Tensor,
        start: int,
        model_kwargs: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        """From xt at chain index `start` on. Fewer images than there is room for are repeated."""
        n, room = len(xt), len(self.x)
        if n < room:
            row = torch.arange(room, device=xt.device) % n
            xt, sample_index = xt.index_select(0, row), sample_index.index_select(0, row)
            model_kwargs = {k: v[row.to(v.device)] for k, v in model_kwargs.items()}
        for name, value in model_kwargs.items():
            self.model_kwargs[name].copy_(value)
        self.x.copy_(xt)
        self.sample_index.copy_(sample_index)
        self.seed.fill_(checks.seed_word(seed))
        self._rewind(start)

    def keep(self) -> None:
        """x_t, which the step may write over."""
        self.xt.copy_(self.x)
