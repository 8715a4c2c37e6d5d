"""Pack a trained checkpoint with its backbone into one small file, as ``icm train --pack`` does.

    python -m icm_cli.model.packing OUT HEAD.safetensors [HEAD2.safetensors ...] --objects OBJECTS --edges EDGES

packs the mean of the heads of several trainings, with the objects and the edges of other trainings. Repeat
``--objects`` to use the mean of several. ``--model`` sets the settings of the packed model, if they differ from those
of the training.

The file is compressed: see ``small`` of :func:`~icm_cli.model.checkpoint.save_checkpoint`. The weights inside the
package are made in this way.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from torch import Tensor

from icm_cli.config import ComponentConfig, ModelConfig, component_class, load_model_config
from icm_cli.errors import ConfigError, IcmError
from icm_cli.model.checkpoint import (
    LICENCES_KEY,
    SOURCES_KEY,
    TRAINED_ON_KEY,
    Checkpoint,
    parse_json,
    read_checkpoint,
    save_checkpoint,
)
from icm_cli.model.loading import build_model


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

    ``heads``: further checkpoints of the same head; the packed head has the mean weights of all these heads.
    ``objects``: checkpoints from which the objects are taken, instead of ``checkpoint``; of several, the mean. They may
    contain only the trained tensors of the objects. ``edges``: a checkpoint from which the edges are taken instead.
    ``model``: a preset or YAML file with the settings of the packed model; None for the settings in the checkpoints.

    Raises ConfigError if a file is not a checkpoint of icm, or is of another model.
    """
    sources = [_read_trained(path) for path in (checkpoint, *heads)]
    tensors, config = dict(sources[0].tensors), sources[0].config
    for path, source in zip(heads, sources[1:], strict=True):
        if source.config.head != config.head:
            raise ConfigError(f"{path} has another head than {checkpoint}; give checkpoints of one configuration")
    if heads:
        tensors |= _average_tensors(sources, "head")
    if objects:
        with_objects = [_read_trained(path) for path in objects]
        sources += with_objects
        objects_config = _shared_objects(objects, with_objects)
        config = replace(config, objects=objects_config)
        initial = component_class("objects", objects_config.name).load(objects_config.settings).state_dict()
        tensors |= {f"objects.{name}": tensor for name, tensor in initial.items()}
        tensors |= _average_tensors(with_objects, "objects")
    if edges is not None:
        with_edges = _read_edges(edges, checkpoint, config)
        sources.append(with_edges)
        config = replace(config, edges=with_edges.config.edges)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("edges.")}
        tensors |= {f"edges.{name}": tensor for name, tensor in with_edges.component("edges").items()}
    if model is not None:
        config = _load_requested_config(model, config)
    merged = Checkpoint(tensors, config, _merge_metadata(sources), f"the model packed from {checkpoint}")
    packed = build_model(config, merged, None, offline=True, seed=0).eval()
    out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(out, packed, config, with_backbone=True, small=True, metadata=merged.metadata)


def _shared_objects(paths: Sequence[Path], checkpoints: Sequence[_TrainedCheckpoint]) -> ComponentConfig:
    """Return the settings of the objects of all checkpoints. Raises ConfigError if they differ."""
    shared = checkpoints[0].config.objects
    if shared is None:
        raise ConfigError(f"--objects {paths[0]} is of a model without objects; give a checkpoint with trained objects")
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        if checkpoint.config.objects != shared:
            raise ConfigError(f"{path} has other objects than {paths[0]}; give checkpoints of one configuration")
    return shared


def _read_edges(path: Path, checkpoint: Path, config: ModelConfig) -> _TrainedCheckpoint:
    """Read the checkpoint whose edges replace the edges of ``checkpoint``. ``config``: model of ``checkpoint``.

    Raises ConfigError if one of the two has no edges.
    """
    if config.edges is None:
        raise ConfigError(f"{checkpoint} is of a model without edges; omit --edges")
    with_edges = _read_trained(path)
    if with_edges.config.edges is None:
        raise ConfigError(f"--edges {path} is of a model without edges; give a checkpoint with trained edges")
    return with_edges


def _load_requested_config(model: str, config: ModelConfig) -> ModelConfig:
    """Return the configuration of ``--model``. ``config``: configuration of the checkpoints.

    Raises ConfigError if they differ in more than the settings of head and edges.
    """
    requested = load_model_config(model)
    if (requested.backbone, requested.objects) != (config.backbone, config.objects):
        raise ConfigError(
            f"--model {model} and the checkpoints differ in their sections 'backbone' or 'objects'; only the "
            "settings of head and edges can be replaced"
        )
    if (requested.edges is None) != (config.edges is None):
        raise ConfigError(f"--model {model} and the checkpoints must both have edges, or both have none")
    return requested


@dataclass(frozen=True)
class _TrainedCheckpoint(Checkpoint):
    config: ModelConfig


def _read_trained(path: Path) -> _TrainedCheckpoint:
    """Read a checkpoint that icm trained. Raises ConfigError for the published one."""
    checkpoint = read_checkpoint(path)
    if checkpoint.config is None:
        raise ConfigError(f"checkpoint {path} contains no configuration; give one that icm trained")
    return _TrainedCheckpoint(checkpoint.tensors, checkpoint.config, checkpoint.metadata, checkpoint.where)


def _average_tensors(checkpoints: Sequence[Checkpoint], component: str) -> dict[str, Tensor]:
    """Return the mean of the tensors of a component; integers are taken from the last checkpoint."""
    states = [checkpoint.component(component) for checkpoint in checkpoints]
    averaged = {}
    for name, tensor in states[-1].items():
        if tensor.is_floating_point():
            tensor = torch.stack([state[name].float() for state in states]).mean(dim=0)
        averaged[f"{component}.{name}"] = tensor
    return averaged


def _merge_metadata(checkpoints: Sequence[Checkpoint]) -> dict[str, str]:
    """Return the metadata of the first checkpoint, with the training images and licences of all."""
    metadata = dict(checkpoints[0].metadata)
    images: set[str] = set()
    for checkpoint in checkpoints:
        images.update(map(str, parse_json(checkpoint.metadata, TRAINED_ON_KEY, list, "a checkpoint") or ()))
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
    heads: Annotated[
        list[Path], typer.Argument(help="Checkpoints of the same head. The mean of their weights is used.")
    ],
    objects: Annotated[
        Optional[list[Path]], typer.Option(help="Checkpoint of the stage objects. Repeat for the mean of several.")
    ] = None,
    edges: Annotated[Optional[Path], typer.Option(help="Checkpoint of the stage refine.")] = None,
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
