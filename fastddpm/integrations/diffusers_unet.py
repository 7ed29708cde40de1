"""Our U-Net where diffusers' pipelines and training loops expect a UNet2DModel."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from fastddpm.unet import UNet


class PipelineUNet(nn.Module):
    """A UNet as UNet2DModel is called: model(sample, timestep).sample, with .config, .dtype and
    .device. It holds the UNet itself, as .unet, so training it trains that one.

    config: sample_size, in_channels and out_channels, as keys and as attributes
    It is not saved with a pipeline: `to_diffusers(model)` is what is, and what diffusers reads.
    """

    def __init__(self, unet: UNet):
        super().__init__()
        if not isinstance(unet, UNet):
            raise ValueError(f"unet must be a fastddpm.UNet; got {type(unet).__name__}")
        self.unet = unet
        self.train(unet.training)
        height, width = unet.image_size
        self.config = FrozenDict(
            sample_size=height if height == width else (height, width),
            in_channels=unet.config["in_channels"],
            out_channels=unet.config["out_channels"],
        )

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """sample: (N, C, H, W);  timestep: one number, or (N,) or (1,), 0-based as t is here
        class_labels: (N,) int64 for a UNet with classes
        """
        t = torch.as_tensor(timestep, device=sample.device)
        t = t if t.is_floating_point() else t.to(torch.int64)
        t = t.reshape(-1).expand(len(sample))
        labels = () if class_labels is None else (class_labels,)
        output = self.unet(sample, t, *labels)
        return UNet2DOutput(sample=output) if return_dict else (output,)
