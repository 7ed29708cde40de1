"""Grids that say what they show: labels of rows and columns and a title, drawn into the picture.
No models.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from fastddpm.figures.pictures import MODES, check_channels, to_pil, whole_factor

SIZES = (14, 40)  # of the text, in pixels: the least, and the most of wide pictures
PER_PIXEL = 1 / 50  # the text's height of a picture's width
LAMBDA = "λ"  # which Pillow's own font does not have


def labelled_grid(
    images: torch.Tensor,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | int | None = None,
    *,
    title: str = "",
    corner: str = "",
    apart: Sequence[int] = (),
    padding: int = 2,
    min_width: int = 600,
) -> Image.Image:
    """(n, C, H, W) of one of MODES -> one picture, row by row, with black text on opaque white.

    rows:    a label left of each row; None: none
    columns: a label over each column, or how many there are; None: as square as can be
    title:   over all, broken into lines where it is long
    corner:  over the rows' labels, what they or the columns' are
    apart:   numbers of columns after which there is a wider gap

    Small images are enlarged by a whole factor, each pixel to a square, and nothing else is done to
    their pixels; text is drawn in the picture's own pixels. Raises ValueError for labels that are
    not as many as rows or columns, and for no images.
    """
    n, channels, h, w = images.shape
    mode = MODES[check_channels(channels)]
    if n == 0:
        raise ValueError("a grid is of at least one image; got none")
    over = [] if columns is None or isinstance(columns, int) else list(columns)
    if not isinstance(columns, int):
        columns = len(over) or math.ceil(math.sqrt(n))
    if columns < 1 or (n % columns and (over or rows is not None)):
        raise ValueError(f"{n} images are no whole rows of {columns} columns")
    down = math.ceil(n / columns)
    beside = [] if rows is None else list(rows)
    if rows is not None and len(beside) != down:
        raise ValueError(f"labels of {down} rows are needed; got {len(beside)}")

    bare = columns * (w + padding) + padding
    factor = whole_factor(bare, min_width)
    size = round(min(max(bare * factor * PER_PIXEL, SIZES[0]), SIZES[1]))
    text = _Text(size)
    gap, space = padding * factor, size // 2
    width = max([w * factor, *(text.width(label) + space for label in over)])
    height = max([h * factor, *(text.line for _ in beside)])
    left = max([0, *(text.width(label) + space for label in (*beside, corner) if label)])
    left = left + space if left else gap
    lefts, x = [], left
    for k in range(columns):
        lefts.append(x)
        x += width + (gap + 2 * space if k + 1 in apart else gap)
    total = max(x, lefts[-1] + width + gap)
    heading = text.broken(title, total - 2 * gap) if title else []
    total = max([total, *(text.width(line) + 2 * gap for line in heading)])
    top = gap + len(heading) * text.line + (space if heading else 0)
    if over or corner:
        top += text.line
    canvas = Image.new(mode, (total, top + down * (height + gap)), "white")
    for k, image in enumerate(images):
        row, column = divmod(k, columns)
        enlarged = to_pil(image).resize((w * factor, h * factor), Image.Resampling.NEAREST)
        middle = (width - enlarged.width) // 2, (height - enlarged.height) // 2
        at = lefts[column] + middle[0], top + row * (height + gap) + middle[1]
        canvas.paste(enlarged, at)

    for k, line in enumerate(heading):
        text.put(gap, gap + k * text.line, line)
    if corner:
        text.put(left - space, top - text.line, corner, right=True)
    for x, label in zip(lefts, over, strict=bool(over)):
        text.put(x + (width - text.width(label)) // 2, top - text.line, label)
    for k, label in enumerate(beside):
        y = top + k * (height + gap) + (height - text.line) // 2
        text.put(left - space, y, label, right=True)
    canvas.paste("black", (0, 0), text.mask(canvas.size))
    return canvas


class _Line(NamedTuple):
    x: int
    y: int
    text: str


class _Text:
    """Lines of text on one picture.

    line: the height of one, in pixels"""

    def __init__(self, size: int):
        self._font, self._said = _font(size)
        self.line = math.ceil(size * 1.3)
        self._lines: list[_Line] = []

    def width(self, text: str) -> int:
        return math.ceil(self._font.getlength(self._said(text)))

    def broken(self, text: str, width: int) -> list[str]:
        """In lines of at most so many pixels, where its words are short enough."""
        lines: list[str] = []
        for word in text.split():
            if lines and self.width(f"{lines[-1]} {word}") <= width:
                lines[-1] += f" {word}"
            else:
                lines.append(word)
        return lines

    def put(self, x: int, y: int, text: str, *, right: bool = False) -> None:
        """At (x, y), its upper left end or upper right one."""
        self._lines.append(_Line(x - self.width(text) if right else x, y, self._said(text)))

    def mask(self, size: tuple[int, int]) -> Image.Image:
        """How much of each pixel is text, 0 .. 255: of all lines, in any mode of a picture."""
        covered = Image.new("L", size, 0)
        draw = ImageDraw.Draw(covered)
        for line in self._lines:
            draw.text((line.x, line.y), line.text, fill=255, font=self._font)
        return covered


@functools.lru_cache
def _font(size: int) -> tuple[Any, Any]:
    """(a font, what it can say of a text): matplotlib's DejaVu Sans, which has Greek letters, or
    else Pillow's own."""
    try:
        import matplotlib

        path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
        return ImageFont.truetype(str(path), size), str
    except (ImportError, OSError):  # Pillow without FreeType, matplotlib without its fonts
        return _plain_font(size), _plainly


def _plain_font(size: int) -> Any:
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError):  # before 10.1, and without FreeType: of one size, in Latin-1
        return ImageFont.load_default()


def _plainly(text: str) -> str:
    return text.replace(LAMBDA, "lambda").encode("ascii", "replace").decode()
