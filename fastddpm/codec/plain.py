"""Images by prediction and deflate: what the first of a set are coded with, whose bytes are the
bits that bits back begins with. No model."""

from __future__ import annotations

import zlib

import torch

WHOLE, LEFT, UP, MEAN = range(4)  # what a pixel is predicted by


def encode(images: torch.Tensor) -> bytes:
    """(N, C, H, W) uint8 -> a byte that names the prediction, and a raw deflate stream: the
    shortest of all predictions."""
    streams = []
    for kind in (WHOLE, LEFT, UP, MEAN):
        residual = images - _predicted(images, kind)  # modulo 256
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
        content = residual.contiguous().numpy().tobytes()
        streams.append(bytes([kind]) + deflate.compress(content) + deflate.flush())
    return min(streams, key=len)


def decode(content: bytes, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """The images (N, C, H, W) that `encode` wrote; ValueError for what is no such stream. Bytes
    after its end are not read."""
    size = shape[0] * shape[1] * shape[2] * shape[3]
    kind = content[0] if content else MEAN + 1
    inflate = zlib.decompressobj(-15)
    try:
        residual = inflate.decompress(content[1:], size + 1)
    except zlib.error as error:
        raise ValueError(f"the plainly coded images are damaged: {error}") from None
    if len(residual) != size or not inflate.eof or kind > MEAN:
        raise ValueError("the plainly coded images are damaged: they have another size")
    images = torch.frombuffer(bytearray(residual), dtype=torch.uint8).view(shape)
    if kind == LEFT:
        return images.cumsum(dim=3, dtype=torch.uint8)
    if kind == UP:
        return images.cumsum(dim=2, dtype=torch.uint8)
    if kind == MEAN:
        return _undo_mean(images)
    return images


def _predicted(images: torch.Tensor, kind: int) -> torch.Tensor:
    left, up = torch.zeros_like(images), torch.zeros_like(images)
    left[..., 1:], up[:, :, 1:] = images[..., :-1], images[:, :, :-1]
    if kind == MEAN:
        return ((left.to(torch.int16) + up) // 2).to(torch.uint8)
    return {WHOLE: torch.zeros_like(images), LEFT: left, UP: up}[kind]


def _undo_mean(residual: torch.Tensor) -> torch.Tensor:
    """A pixel after those to its left and above it: by diagonals, which depend on earlier ones."""
    n, c, h, w = residual.shape
    padded = torch.zeros(n, c, h + 1, w + 1, dtype=torch.int16)
    for diagonal in range(h + w - 1):
        y = torch.arange(max(0, diagonal - w + 1), min(h, diagonal + 1))
        x = diagonal - y
        mean = (padded[:, :, y + 1, x] + padded[:, :, y, x + 1]) // 2
        padded[:, :, y + 1, x + 1] = (residual[:, :, y, x] + mean) % 256
    return padded[:, :, 1:, 1:].to(torch.uint8).contiguous()
