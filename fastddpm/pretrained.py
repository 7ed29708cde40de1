"""Models by name and on disk: the bundled ones, our own folders and other projects' files."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from fastddpm import digest
from fastddpm.checkpoint import named, read_json, read_metadata, write_json, write_tensors
from fastddpm.diffusion import Diffusion
from fastddpm.host import callers_level
from fastddpm.integrations.containers import check_weights_choice
from fastddpm.integrations.diffusers import PROJECT as DIFFUSERS
from fastddpm.integrations.diffusers import check_options, load_folder
from fastddpm.integrations.files import Origin, check_finite, load_file
from fastddpm.integrations.port import PROJECT as PORT
from fastddpm.integrations.schedulers import process_files
from fastddpm.unet import UNet
from fastddpm.weights import load

CONFIG, WEIGHTS = "config.json", "model.safetensors"
CONFIG_DIGEST = "config_digest"  # in the metadata of WEIGHTS: of the CONFIG that it belongs to
BUNDLED = Path(__file__).parent / "checkpoints"


def save_model(
    model: UNet,
    folder: str | os.PathLike,
    weights: dict[str, torch.Tensor] | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write the model's config.json and model.safetensors (or `weights` in its place) into
    `folder`, each with a digest of what is in it; a process that can't be saved is a ValueError
    before a file is touched.

    metadata: what else the header of model.safetensors is to say
    """
    folder = named(folder)
    config = _config(model)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = model.state_dict() if weights is None else weights
    metadata = {**(metadata or {}), CONFIG_DIGEST: config[digest.KEY]}
    write_tensors(folder / WEIGHTS, tensors, metadata)
    write_json(folder / CONFIG, config)


def save_config(model: UNet, folder: str | os.PathLike) -> None:
    """Write the model's config.json alone."""
    write_json(named(folder) / CONFIG, _config(model))


def _config(model: UNet) -> dict[str, Any]:
    config = {"format": "fastddpm", "unet": model.config, "diffusion": model.diffusion.to_config()}
    return {**config, digest.KEY: digest.of_json(config)}


def build_model(config: dict[str, Any], source: str | os.PathLike) -> UNet:
    """The UNet of a config.json's content, with fresh weights.

    Raises ValueError naming the option that can't be, or saying that the content is another than
    the one whose digest it names. One that names none is taken as it is.
    """
    for name in ("unet", "diffusion"):
        if not isinstance(config.get(name), dict):
            raise ValueError(f"{source}: the object {name!r} is missing")
    try:
        model = UNet(**config["unet"], diffusion=Diffusion.from_config(config["diffusion"]))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from None
    if digest.KEY in config and config[digest.KEY] != digest.of_json(config):
        raise ValueError(
            f"{source} is not what was written with the model (its digest is another): it is "
            f"damaged or was edited; if you edited it on purpose, remove its {digest.KEY!r}"
        )
    return model


def bundled_models() -> list[str]:
    """The names that come with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG}"))


def load_model(source: str | os.PathLike, **options: Any) -> UNet:
    """A UNet in eval mode from what `read_model` reads. A warning says what was taken where neither
    the file nor the caller did: the EMA's weights or the raw ones, and the defaults of the project
    that the file is of."""
    model, origin = read_model(source, **options)
    said = []
    if origin.chosen:
        said.append(f"of its sets of weights, {origin.weights} are taken (weights=...)")
    if origin.unsaid and origin.project not in (PORT, DIFFUSERS):
        said.append(f"what it does not say is its project's default: {origin.assumed()}")
    if said:
        warnings.warn(
            f"{os.fspath(source)} is read as a model of {origin.project}; {'; '.join(said)}",
            stacklevel=callers_level(),
        )
    return model


def read_model(source: str | os.PathLike, **options: Any) -> tuple[UNet, Origin]:
    """A UNet in eval mode, and where it came from: a folder of `save_model`, a diffusers folder, a
    file of weights or a training checkpoint of a project that `fastddpm.integrations` knows, or a
    bundled name; a file or folder that is there comes before a bundled model of that name, with a
    warning.

    options go to the loaders of `fastddpm.integrations`; our own folders take none. Raises
    FileNotFoundError or ValueError, naming what is wrong.
    """
    path = _find(source)
    if os.path.isfile(path):
        model, origin = load_file(path, **options)
        return model.eval(), origin
    options = dict(options)
    said, chosen = "", False
    if os.path.isdir(path):
        path, said, chosen = _network_folder(path, options)
    if not os.path.isfile(path / CONFIG):
        what = f"no {CONFIG} in it" if path.is_dir() else "no such file or folder"
        bundled = ", ".join(f"{name} ({BUNDLED / name})" for name in bundled_models())
        raise FileNotFoundError(
            f"model {str(source)!r}: {what}; give a folder with {CONFIG} and {WEIGHTS}, or one of "
            f"the bundled names: {bundled or 'none'}"
        )
    config = read_json(path / CONFIG)
    if config.get("format") != "fastddpm":
        check_options(path, options)
        model = load_folder(path, config, **options).eval()
        check_finite(model, path)
        given = options.get("diffusion") is not None or process_files(path)
        unsaid = {} if given else {"diffusion": model.diffusion}
        return model, Origin(DIFFUSERS, said, unsaid, chosen)
    return _read_own(path, config, options)


def _network_folder(folder: Path, options: dict[str, Any]) -> tuple[Path, str, bool]:
    """Where a folder has its network: itself, a pipeline's unet, or of a training checkpoint of
    diffusers the EMA's, unet_ema, or the raw one, unet. (folder, which weights, whether neither was
    asked for); options lose `weights`, which says so.

    A folder that is the network's own has one set, whichever that is."""
    if os.path.isfile(folder / CONFIG):
        if "weights" in options and read_json(folder / CONFIG).get("format") != "fastddpm":
            check_weights_choice(options.pop("weights"))
        return folder, "the weights", False
    wanted = options.pop("weights", None)
    check_weights_choice(wanted)
    there = [name for name in ("unet_ema", "unet") if os.path.isfile(folder / name / CONFIG)]
    if not there:
        return folder, "", False
    if os.path.isfile(folder / "model_index.json") and "unet" in there:
        return folder / "unet", "the weights (unet)", False
    name = {"ema": "unet_ema", "raw": "unet", None: there[0]}[wanted]
    if name not in there:
        raise ValueError(
            f"{folder} has no {name}, where weights={wanted!r} would be; it has {there[0]}"
        )
    what = {"unet_ema": "EMA", "unet": "raw"}[name]
    return folder / name, f"{what} weights ({name})", wanted is None and len(there) > 1


def _read_own(folder: Path, config: dict[str, Any], options: dict[str, Any]) -> tuple[UNet, Origin]:
    if options:
        raise ValueError(f"a fastddpm folder takes no options; got {', '.join(sorted(options))}")
    weights = folder / WEIGHTS
    model = load(lambda _: build_model(config, folder / CONFIG), [weights], source=weights)
    said = read_metadata(weights).get(CONFIG_DIGEST)
    if said is not None and config.get(digest.KEY, said) != said:
        raise ValueError(
            f"{weights} was written with another {CONFIG} than the one beside it: save the model "
            "again, or bring the two files of one model together"
        )
    return model.eval(), Origin("fastddpm", "the weights", {})


def _find(source: str | os.PathLike) -> Path:
    """The path of a model: one that is there, or a bundled one's."""
    path = Path(source)
    bundled = BUNDLED / path
    if str(source) not in bundled_models() or not os.path.lexists(path):
        return bundled if str(source) in bundled_models() else path
    # A link that leads nowhere, to a disk that is not mounted maybe, is the user's own too.
    if isinstance(source, str) and path.exists() and not bundled.samefile(path):
        warnings.warn(
            f"{source!r} is {path.resolve()} here; the bundled model of that name is {bundled}",
            stacklevel=4,
        )
    return path
