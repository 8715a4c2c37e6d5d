"""From a configuration and a checkpoint to a model that mattes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from icm_cli.config import ComponentConfig, ModelConfig, component_class, load_model_config
from icm_cli.device import Device, resolve_device
from icm_cli.errors import ConfigError, UsageError, did_you_mean
from icm_cli.files import cached_file_digest, combined_digest
from icm_cli.model.checkpoint import Checkpoint, has_backbone, load_strict, read_checkpoint, read_config
from icm_cli.model.contracts import Objects
from icm_cli.model.core import InContextMatting
from icm_cli.model.hub.catalogue import packed_checkpoint

DEFAULT_MODEL = "lite"
PUBLISHED_MODEL = "icm-sd21"
"""Preset of the published checkpoint, which holds no configuration."""
EDGES = ("model", "closed-form", "vitmatte")
"""Names of ``--edges``: the model's own, or one that takes any coarse alpha."""
UNTRAINED_MODELS = "lite-training-free or sd21-training-free"


def resolve_model(model: str | None, checkpoint: Path | None) -> tuple[ModelConfig, Path | None]:
    """Find the model meant by ``--model`` (a preset or a YAML file) and ``--checkpoint``, and where its weights are.

    Without a model it is the checkpoint's own, the published one's preset for the published file, and
    "lite" where there is no checkpoint either. A preset whose weights come with the package takes those.
    Reads no weights. Raises ConfigError where the two do not fit.
    """
    if checkpoint is None:
        name = model or DEFAULT_MODEL
        config, packed = load_model_config(name), packed_checkpoint(name)
        if packed is None:
            _require_checkpoint(config)
        return config, packed
    given = None if model is None else load_model_config(model)
    inside = read_config(checkpoint)
    if inside is not None and given is not None and inside != given:
        raise ConfigError(
            f"checkpoint {checkpoint} was made with another configuration than --model {model}: "
            f"{_difference(inside, given)}; leave --model out to take the checkpoint's own"
        )
    config = inside or given or load_model_config(PUBLISHED_MODEL)
    if not component_class("head", config.head.name).is_trained:
        raise ConfigError(
            f"--checkpoint {checkpoint} does not apply to model {model!r}, whose head {config.head.name!r} has no "
            "weights; leave the option out"
        )
    return config, checkpoint


def override_edges(config: ModelConfig, edges: str, weights: str | None) -> ModelConfig:
    """The model with other edges: those named, "model" for its own; ``weights``: a folder or hub id of theirs.

    Raises UsageError for a name that is not known, or weights that nothing would read.
    """
    if edges not in EDGES:
        raise UsageError(f"--edges is {edges!r}; expected {', '.join(EDGES)}. {did_you_mean(edges, EDGES)}")
    part = config.edges
    if edges != "model" and (part is None or part.name != edges):
        part = ComponentConfig(edges, component_class("edges", edges).Config())
    if weights is None:
        return replace(config, edges=part)
    if part is None:
        raise UsageError(f"the model has no edges, so --edges-weights {weights!r} has no effect; give --edges vitmatte")
    settings = component_class("edges", part.name).with_weights(part.settings, weights)
    return replace(config, edges=ComponentConfig(part.name, settings))


def select_device(config: ModelConfig, device: str, dtype: str) -> Device:
    """Device and dtypes of a model, by the command's names and what its backbone wants. Raises ConfigError."""
    backbone = component_class("backbone", config.backbone.name)
    wanted = backbone.preferred_transformer_dtype(config.backbone.settings)
    where = resolve_device(device, dtype, transformer_dtype=wanted)
    return where if backbone.has_transformer else replace(where, transformer_dtype=where.dtype)


def load_model(
    config: ModelConfig, *, checkpoint: Path | None, weights: str | None, offline: bool, seed: int
) -> InContextMatting:
    """Build the model with its weights, on the CPU in float32, in eval mode. Raises ConfigError.

    ``weights``: a local folder or hub id of the backbone's weights, in place of the configuration's. ``offline``:
    never reach for the network. ``seed``: of the backbone's noise.
    """
    if checkpoint is None:
        _require_checkpoint(config)
    return _build_model(config, checkpoint, weights, offline=offline, seed=seed).eval()


def load_model_for_training(
    config: ModelConfig, *, checkpoint: Path | None, weights: str | None, offline: bool, seed: int
) -> InContextMatting:
    """The model before training: the head's weights are the checkpoint's, or random ones that ``seed`` decides.

    The other arguments are those of :func:`load_model`. Raises ConfigError.
    """
    if not component_class("head", config.head.name).is_trained:
        raise ConfigError(f"head {config.head.name!r} has no weights, so there is nothing to train; take another head")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _build_model(config, checkpoint, weights, offline=offline, seed=seed)


def _build_model(
    config: ModelConfig, checkpoint: Path | None, weights: str | None, *, offline: bool, seed: int
) -> InContextMatting:
    head = component_class("head", config.head.name)(config.head.settings)
    loaded = None if checkpoint is None else read_checkpoint(checkpoint)
    if loaded is not None:
        load_strict(head, _part(loaded, "head"), f"checkpoint {checkpoint}")
    kind, settings = component_class("backbone", config.backbone.name), config.backbone.settings
    tensors = None if loaded is None else _part(loaded, "backbone")
    if tensors and kind.is_self_contained:
        _reject_weights(weights, checkpoint)
        backbone = kind(settings).eval()
    else:
        backbone = kind.load(settings, weights, offline=offline, seed=seed)
    if tensors:
        load_strict(backbone, tensors, f"checkpoint {checkpoint}")
    edges = None
    if config.edges is not None:
        edges = component_class("edges", config.edges.name).load(config.edges.settings, offline=offline)
        if loaded is not None and edges.is_trained:
            load_strict(edges, _part(loaded, "edges"), f"checkpoint {checkpoint}")
    return InContextMatting(backbone, head, edges, _objects(config, loaded, checkpoint))


def _objects(config: ModelConfig, loaded: Checkpoint | None, checkpoint: Path | None) -> Objects | None:
    """Build the objects, with the checkpoint's weights or else their pretrained ones."""
    if config.objects is None:
        return None
    kind, settings = component_class("objects", config.objects.name), config.objects.settings
    tensors = {} if loaded is None else _part(loaded, "objects")
    objects: Objects = kind(settings) if tensors else kind.load(settings)
    if tensors:
        load_strict(objects, tensors, f"checkpoint {checkpoint}")
    return objects.eval()


def model_digest(config: ModelConfig, *, checkpoint: Path | None, weights: str | None, offline: bool) -> str:
    """Hash of what decides a matte on the model's side: configuration, checkpoint, the backbone's weights.

    Loads no model; the arguments are those of :func:`load_model`.
    """
    content = "none" if checkpoint is None else cached_file_digest(checkpoint)
    pretrained = backbone_digest(config, checkpoint, weights, offline=offline)
    parts = [json.dumps(config.as_dict(), sort_keys=True), pretrained, content]
    if config.edges is not None:
        edges = component_class("edges", config.edges.name).weights_digest(config.edges.settings, offline=offline)
        parts += [edges] if edges else []
    if config.objects is not None and checkpoint is None:
        parts.append(component_class("objects", config.objects.name).weights_digest(config.objects.settings))
    return combined_digest(*parts)


def backbone_digest(config: ModelConfig, checkpoint: Path | None, weights: str | None, *, offline: bool) -> str:
    """Hash of the weights that the backbone begins with: those in the checkpoint, else the pretrained ones.

    Raises ConfigError where ``weights`` are given beside a checkpoint that holds them.
    """
    backbone = component_class("backbone", config.backbone.name)
    if checkpoint is not None and backbone.is_self_contained and has_backbone(checkpoint):
        _reject_weights(weights, checkpoint)
        return cached_file_digest(checkpoint)
    digest: str = backbone.weights_digest(config.backbone.settings, weights, offline=offline)
    return digest


def _require_checkpoint(config: ModelConfig) -> None:
    if component_class("head", config.head.name).is_trained:
        raise ConfigError(
            f"head {config.head.name!r} has weights of its own and there are none to take; give them with --checkpoint "
            f"FILE (the published .ckpt or one that icm trained). --model {UNTRAINED_MODELS} needs none"
        )


def _reject_weights(weights: str | None, checkpoint: Path | None) -> None:
    if weights is not None:
        raise ConfigError(
            f"--weights {weights!r} does not apply: checkpoint {checkpoint} holds its backbone's weights; leave the "
            "option out"
        )


def _part(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """The tensors of one part, "head", "backbone", "objects" or "edges", without its name before theirs."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in checkpoint.tensors.items() if key.startswith(prefix)}


def _difference(inside: ModelConfig, given: ModelConfig) -> str:
    """The first setting in which two configurations differ, in words."""
    ours, theirs = inside.as_dict(), given.as_dict()
    for part in {**ours, **theirs}:
        settings = ours.get(part, {})
        for key in {**settings, **theirs.get(part, {})}:
            other = theirs.get(part, {}).get(key)
            if settings.get(key) != other:
                return f"its {part} has {key} {settings.get(key)!r}, not {other!r}"
    raise AssertionError("equal configurations have no difference")
