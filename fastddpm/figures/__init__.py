"""What people look at and where it goes: grids with labels, curves, nearest neighbours, and the
gallery of the paper's figures. Public names only; no logic here.
"""

from typing import TYPE_CHECKING, Any

from fastddpm.figures.labels import labelled_grid
from fastddpm.figures.neighbours import nearest
from fastddpm.figures.output import FORMATS, check_output, save_image, save_samples
from fastddpm.figures.pictures import MODES, check_channels, grid, read_image, to_pil, to_uint8
from fastddpm.figures.plots import loss_plot

if TYPE_CHECKING:
    from fastddpm.figures.folder import gallery

__all__ = [
    "FORMATS",
    "MODES",
    "check_channels",
    "check_output",
    "gallery",
    "grid",
    "labelled_grid",
    "loss_plot",
    "nearest",
    "read_image",
    "save_image",
    "save_samples",
    "to_pil",
    "to_uint8",
]


def __getattr__(name: str) -> Any:
    """The gallery, which samples, stands above sampling and training, which draw grids: it is
    loaded when it is asked for."""
    if name == "gallery":
        from fastddpm.figures.folder import gallery

        return gallery
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
