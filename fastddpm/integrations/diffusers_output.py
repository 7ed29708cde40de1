"""What a scheduler's step returns: x_{t-1}, and the x0 prediction, which is computed when it is
first looked at.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput

X0 = "pred_original_sample"


def later(
    compute: Callable[[], torch.Tensor], *tensors: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """compute(), under the present grad mode and of `tensors` as they are now.

    RuntimeError where one was written to in between; where nothing counts the writes (inference
    tensors), it is computed here.
    """
    if any(x.is_inference() for x in tensors):
        now = compute()
        return lambda: now
    grad, versions = torch.is_grad_enabled(), [x._version for x in tensors]

    def then() -> torch.Tensor:
        if [x._version for x in tensors] != versions:
            raise RuntimeError(
                f"{X0} is computed when it is first looked at, but the step's sample or "
                "model_output has been written to in place since: look at it before"
            )
        with torch.set_grad_enabled(grad):
            return compute()

    return then


class StepOutput(DDPMSchedulerOutput):
    """diffusers' output of a step: attributes, keys and indices alike. Whatever shows more than
    prev_sample computes the x0 prediction.
    """

    @classmethod
    def of(cls, prev_sample: torch.Tensor, x0: Callable[[], torch.Tensor]) -> StepOutput:
        output = cls(prev_sample)
        output.__dict__["_later"] = x0
        return output

    def _whole(self) -> None:
        """The x0 prediction is among the values from here on."""
        compute = self.__dict__.get("_later")
        if compute is not None:
            x0 = compute()
            self.__dict__["_later"] = None
            self[X0] = x0

    @property
    def pred_original_sample(self) -> Any:
        self._whole()
        return self.__dict__.get("_x0")

    @pred_original_sample.setter
    def pred_original_sample(self, x0: Any) -> None:
        self.__dict__["_later"], self.__dict__["_x0"] = None, x0

    def __getitem__(self, key: Any) -> Any:
        if key == "prev_sample" or (type(key) is int and key == 0):
            return self.prev_sample
        x0 = self.pred_original_sample
        if x0 is not None and (key == X0 or (type(key) is int and key == 1)):
            return x0
        return super().__getitem__(key)


class StepTuple(tuple):
    """(x_{t-1}, the x0 prediction), where return_dict is False. As StepOutput, so `[0]` costs no
    prediction; a comparison, a copy or a slice is that of the plain tuple."""

    _later: Callable[[], torch.Tensor]

    def __new__(cls, prev_sample: torch.Tensor, x0: Callable[[], torch.Tensor]) -> StepTuple:
        pair = super().__new__(cls, (prev_sample, None))
        pair._later = x0
        return pair

    @functools.cached_property
    def _plain(self) -> tuple[torch.Tensor, torch.Tensor]:
        return super().__getitem__(0), self._later()

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(0) if type(key) is int and key == 0 else self._plain[key]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return tuple, (self._plain,)


def _of_all(kind: type, all_of: Callable[[Any], Any], names: tuple[str, ...]) -> None:
    """Give `kind` the methods `names` of what all_of(self) is."""

    def method_of(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **options: Any) -> Any:
            return getattr(all_of(self), name)(*args, **options)

        method.__name__ = name
        return method

    for name in names:
        setattr(kind, name, method_of(name))


def _whole(output: StepOutput) -> Any:
    output._whole()
    return super(StepOutput, output)


_of_all(
    StepOutput,
    _whole,
    ("__contains__", "__eq__", "__iter__", "__len__", "__ne__", "__or__", "__reduce__", "__repr__",
     "__reversed__", "__ror__", "copy", "get", "items", "keys", "move_to_end", "popitem", "values"),
)  # fmt: skip
_of_all(
    StepTuple,
    lambda pair: pair._plain,
    ("__add__", "__contains__", "__eq__", "__ge__", "__gt__", "__hash__", "__iter__", "__le__",
     "__lt__", "__mul__", "__ne__", "__repr__", "__rmul__", "count", "index"),
)  # fmt: skip
