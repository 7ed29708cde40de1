"""The paper's U-Net: its parts, what it is made from, and the walks that run it."""

from fastddpm.unet.network import AttentionBlock, Level, ResnetBlock, UNet

__all__ = ["AttentionBlock", "Level", "ResnetBlock", "UNet"]
