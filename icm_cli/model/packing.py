"""A trained checkpoint with its backbone, in few bytes: what ``icm train --pack`` writes, and ships
inside the package.

    python -m icm_cli.model.packing OUT HEAD.safetensors [HEAD2.safetensors ...] --objects OBJECTS
    --edges EDGES

packs the mean of several trainings' heads with the objects (``--objects`` again for the mean of
several) and the edges of others; ``--model`` gives the settings with which they are used, where
those of the training differ. Kernels become float16, matrices of the backbone and the objects 8-bit
integers with a scale for every row; vectors (biases, BatchNorm statistics) stay float32.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from torch import Tensor

from icm_cli.config import ModelConfig, component_class, load_model_config
from icm_cli.errors import ConfigError, IcmError
from icm_cli.model.checkpoint import (
    TRAINED_ON_KEY,
    Checkpoint,
    load_strict,
    read_checkpoint,
    read_config,
    save_checkpoint,
)
from icm_cli.model.core import InContextMatting
from icm_cli.model.loading import load_model

LICENCES_KEY = "icm.licences"
"""Metadata of a checkpoint: the licence of every source of its training data."""


def pack(
    checkpoint: Path,
    out: Path,
    *,
    heads: Sequence[Path] = (),
    objects: Sequence[Path] = (),
    edges: Path | None = None,
    settings: str | None = None,
) -> None:
    """Write ``out`` whole or not at all.

    ``heads``: further checkpoints of the same head, of whose weights the mean is taken; ``objects``
    and ``edges``: those whose parts take the place of the checkpoint's own, of several objects the
    mean; of its objects a file may hold what was learned alone. ``settings``: a preset or a YAML
    file whose settings the packed model gets. Raises ConfigError where one is no checkpoint of ours
    or of another model.
    """
    config = _config(checkpoint)
    model = load_model(config, checkpoint=checkpoint, weights=None, offline=True, seed=0)
    parts = [read_checkpoint(path) for path in (checkpoint, *heads)]
    for path in heads:
        if _config(path).head != config.head:
            raise ConfigError(f"{path} has another head than {checkpoint}; expected trainings of one configuration")
    if heads:
        load_strict(model.head, _mean([_tensors(part, "head") for part in parts]), f"the mean of {len(parts)} heads")
    if objects:
        learned = [read_checkpoint(path) for path in objects]
        parts += learned
        config = _with_objects(model, config, objects, learned)
    if edges is not None:
        if model.edges is None:
            raise ConfigError(f"{checkpoint} is of a model without edges; leave --edges out")
        part = _config(edges).edges
        if part is None:
            raise ConfigError(f"{edges} is of a model without edges; expected one that has learned them")
        parts.append(read_checkpoint(edges))
        config = replace(config, edges=part)
        model.edges = component_class("edges", part.name).load(part.settings, offline=True)
        load_strict(model.edges, _tensors(parts[-1], "edges"), f"checkpoint {edges}")
    if settings is not None:
        config = _with_settings(model, config, settings)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(out, model, config, with_backbone=True, small=True, metadata=_metadata(parts))


def _with_settings(model: InContextMatting, config: ModelConfig, settings: str) -> ModelConfig:
    """Build head and edges anew with other settings, and the weights that they have; the
    configuration with them."""
    wanted = load_model_config(settings)
    if (wanted.backbone, wanted.objects) != (config.backbone, config.objects):
        raise ConfigError(
            f"--model {settings} has another backbone or other objects than the checkpoints; expected theirs"
        )
    head = component_class("head", wanted.head.name)(wanted.head.settings)
    load_strict(head, model.head.state_dict(), f"--model {settings}: the checkpoints' head")
    model.head = head.eval()
    if wanted.edges is not None and model.edges is not None:
        edges = component_class("edges", wanted.edges.name).load(wanted.edges.settings, offline=True)
        load_strict(edges, model.edges.state_dict(), f"--model {settings}: the checkpoints' edges")
        model.edges = edges
    elif (wanted.edges is None) != (model.edges is None):
        raise ConfigError(f"--model {settings} and the checkpoints do not both have edges; expected the same parts")
    return wanted


def _with_objects(
    model: InContextMatting, config: ModelConfig, objects: Sequence[Path], learned: Sequence[Checkpoint]
) -> ModelConfig:
    """Give a model the mean of several trainings' objects; the configuration with them."""
    part = _config(objects[0]).objects
    if part is None:
        raise ConfigError(f"{objects[0]} is of a model without objects; expected one that has learned them")
    for path in objects[1:]:
        if _config(path).objects != part:
            raise ConfigError(f"{path} has other objects than {objects[0]}; expected trainings of one configuration")
    model.objects = component_class("objects", part.name).load(part.settings)
    whole = [{**model.objects.state_dict(), **_tensors(each, "objects")} for each in learned]
    load_strict(model.objects, _mean(whole), f"the objects of {', '.join(map(str, objects))}")
    return replace(config, objects=part)


def _config(checkpoint: Path) -> ModelConfig:
    config = read_config(checkpoint)
    if config is None:
        raise ConfigError(f"checkpoint {checkpoint} holds no configuration; expected one that icm trained")
    return config


def _tensors(checkpoint: Checkpoint, part: str) -> dict[str, Tensor]:
    """Tensors of a part of the model, by their names in it."""
    start = f"{part}."
    return {name.removeprefix(start): each for name, each in checkpoint.tensors.items() if name.startswith(start)}


def _mean(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of tensors of the same names; counters, such as BatchNorm's, are the last one's."""
    return {
        name: torch.stack([part[name].float() for part in parts]).mean(dim=0) if last.is_floating_point() else last
        for name, last in parts[-1].items()
    }


def _metadata(parts: Sequence[Checkpoint]) -> dict[str, str]:
    """Metadata of the first, with the training images and licences of all."""
    metadata = dict(parts[0].metadata)
    seen = {image for part in parts for image in json.loads(part.metadata.get(TRAINED_ON_KEY, "[]"))}
    if seen:
        metadata[TRAINED_ON_KEY] = json.dumps(sorted(seen))
    licences = {
        name: each for part in parts for name, each in json.loads(part.metadata.get(LICENCES_KEY, "{}")).items()
    }
    if licences:
        metadata[LICENCES_KEY] = json.dumps(licences)
    return metadata


def main(
    out: Annotated[Path, typer.Argument(help="The .safetensors to write.")],
    heads: Annotated[list[Path], typer.Argument(help="Checkpoints of one head; the mean of their weights is taken.")],
    objects: Annotated[
        Optional[list[Path]], typer.Option(help="Checkpoint with the objects; again for the mean of several.")
    ] = None,
    edges: Annotated[Optional[Path], typer.Option(help="Checkpoint with the edges.")] = None,
    model: Annotated[
        Optional[str], typer.Option(help="Preset or YAML file whose settings the packed model gets.")
    ] = None,
) -> None:
    """Pack trainings of icm into one small file."""
    try:
        pack(heads[0], out, heads=heads[1:], objects=objects or [], edges=edges, settings=model)
    except IcmError as error:
        typer.echo(f"icm: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


if __name__ == "__main__":
    typer.run(main)
