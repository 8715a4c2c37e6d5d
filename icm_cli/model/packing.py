"""Pack a trained checkpoint with its backbone into one small file, as ``icm train --pack`` does.

    python -m icm_cli.model.packing OUT HEAD.safetensors [HEAD2.safetensors ...] --objects OBJECTS
    --edges EDGES

packs the mean of the heads of several trainings, with the objects and the edges of other trainings. Repeat
``--objects`` to use the mean of several. ``--model`` sets the settings of the packed model, if they differ from those
of the training.

The file is compressed: see ``small`` of :func:`~icm_cli.model.checkpoint.save_checkpoint`. The weights inside the
package are made in this way.
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
    LICENCES_KEY,
    SOURCES_KEY,
    TRAINED_ON_KEY,
    Checkpoint,
    load_strict,
    parse_json,
    read_checkpoint,
    read_config,
    save_checkpoint,
)
from icm_cli.model.core import InContextMatting
from icm_cli.model.loading import load_model


def pack_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    heads: Sequence[Path] = (),
    objects: Sequence[Path] = (),
    edges: Path | None = None,
    model: str | None = None,
) -> None:
    """Write a compressed checkpoint that contains all components, atomically.

    Args:
        checkpoint: Checkpoint to pack.
        out: File to write.
        heads: Further checkpoints of the same head. The mean of all weights is used.
        objects: Checkpoints whose objects replace those of ``checkpoint``. The mean of their weights is used. They may
            contain the trained tensors only.
        edges: Checkpoint whose edges replace those of ``checkpoint``.
        model: Preset or YAML file with the settings of the packed model; None for those of the checkpoints.

    Raises:
        ConfigError: A file is not a checkpoint of icm, or is of another model.
    """
    config = _require_config(checkpoint)
    packed = load_model(config, checkpoint=checkpoint, weights=None, offline=True, seed=0)
    parts = [read_checkpoint(path) for path in (checkpoint, *heads)]
    for path in heads:
        if _require_config(path).head != config.head:
            raise ConfigError(f"{path} has another head than {checkpoint}; give checkpoints of one configuration")
    if heads:
        mean = _average_tensors([part.component("head") for part in parts])
        load_strict(packed.head, mean, f"the mean of {len(parts)} heads")
    if objects:
        trained = [read_checkpoint(path) for path in objects]
        parts += trained
        config = _replace_objects(packed, config, objects, trained)
    if edges is not None:
        if packed.edges is None:
            raise ConfigError(f"{checkpoint} is of a model without edges; omit --edges")
        part = _require_config(edges).edges
        if part is None:
            raise ConfigError(f"--edges {edges} is of a model without edges; give a checkpoint with trained edges")
        parts.append(read_checkpoint(edges))
        config = replace(config, edges=part)
        packed.edges = component_class("edges", part.name).load(part.settings, offline=True)
        load_strict(packed.edges, parts[-1].component("edges"), f"checkpoint {edges}")
    if model is not None:
        config = _replace_settings(packed, config, model)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(out, packed, config, with_backbone=True, small=True, metadata=_merge_metadata(parts))


def _replace_settings(packed: InContextMatting, config: ModelConfig, model: str) -> ModelConfig:
    """Rebuild head and edges with other settings and the same weights. Return the configuration."""
    requested = load_model_config(model)
    if (requested.backbone, requested.objects) != (config.backbone, config.objects):
        raise ConfigError(
            f"--model {model} and the checkpoints differ in their sections 'backbone' or 'objects'; only "
            "the settings of head and edges can be replaced"
        )
    head = component_class("head", requested.head.name)(requested.head.settings)
    load_strict(head, packed.head.state_dict(), f"--model {model}: the head of the checkpoints")
    packed.head = head.eval()
    if requested.edges is not None and packed.edges is not None:
        cls = component_class("edges", requested.edges.name)
        edges = cls.load(requested.edges.settings, offline=True)
        where = f"--model {model}: the edges of the checkpoints"
        load_strict(edges, packed.edges.state_dict(), where)
        packed.edges = edges
    elif (requested.edges is None) != (packed.edges is None):
        raise ConfigError(f"--model {model} and the checkpoints must both have edges, or both have none")
    return requested


def _replace_objects(
    packed: InContextMatting,
    config: ModelConfig,
    objects: Sequence[Path],
    trained: Sequence[Checkpoint],
) -> ModelConfig:
    """Replace the objects by the mean of several trainings. Return the configuration."""
    objects_config = _require_config(objects[0]).objects
    if objects_config is None:
        raise ConfigError(
            f"--objects {objects[0]} is of a model without objects; give a checkpoint with trained objects"
        )
    for path in objects[1:]:
        if _require_config(path).objects != objects_config:
            raise ConfigError(f"{path} has other objects than {objects[0]}; give checkpoints of one configuration")
    packed.objects = component_class("objects", objects_config.name).load(objects_config.settings)
    complete = [{**packed.objects.state_dict(), **checkpoint.component("objects")} for checkpoint in trained]
    where = f"the objects of {', '.join(map(str, objects))}"
    load_strict(packed.objects, _average_tensors(complete), where)
    return replace(config, objects=objects_config)


def _require_config(checkpoint: Path) -> ModelConfig:
    config = read_config(checkpoint)
    if config is None:
        raise ConfigError(f"checkpoint {checkpoint} contains no configuration; give one that icm trained")
    return config


def _average_tensors(components: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of tensors of the same name; integers are those of the last component."""
    return {
        name: torch.stack([mapping[name].float() for mapping in components]).mean(dim=0)
        if last.is_floating_point()
        else last
        for name, last in components[-1].items()
    }


def _merge_metadata(checkpoints: Sequence[Checkpoint]) -> dict[str, str]:
    """Return the metadata of the first checkpoint, with the training images and licences of all."""
    metadata = dict(checkpoints[0].metadata)
    images = {
        str(image)
        for checkpoint in checkpoints
        for image in parse_json(checkpoint.metadata, TRAINED_ON_KEY, list, "a checkpoint") or ()
    }
    if images:
        metadata[TRAINED_ON_KEY] = json.dumps(sorted(images))
    for key in (SOURCES_KEY, LICENCES_KEY):
        entries: dict[str, object] = {}
        for checkpoint in checkpoints:
            entries |= parse_json(checkpoint.metadata, key, dict, "a checkpoint") or {}
        if entries:
            metadata[key] = json.dumps(entries)
    return metadata


def main(
    out: Annotated[Path, typer.Argument(help="File to write, .safetensors.")],
    heads: Annotated[list[Path], typer.Argument(help="Checkpoints of one head. The mean of their weights is used.")],
    objects: Annotated[
        Optional[list[Path]], typer.Option(help="Checkpoint with trained objects. Repeat for the mean of several.")
    ] = None,
    edges: Annotated[Optional[Path], typer.Option(help="Checkpoint with trained edges.")] = None,
    model: Annotated[
        Optional[str], typer.Option(help="Preset or YAML file with the settings of the packed model.")
    ] = None,
) -> None:
    """Pack checkpoints into one small file."""
    try:
        pack_checkpoint(heads[0], out, heads=heads[1:], objects=objects or [], edges=edges, model=model)
    except IcmError as error:
        typer.echo(f"icm: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


if __name__ == "__main__":
    typer.run(main)
