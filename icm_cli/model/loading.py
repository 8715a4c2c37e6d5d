"""Build a model from a configuration and a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icm_cli.config import ComponentConfig, ModelConfig, component_class, load_model_config
from icm_cli.device import Device, resolve_device
from icm_cli.errors import ConfigError, UsageError
from icm_cli.files import cached_file_digest, combined_digest
from icm_cli.model.checkpoint import (
    Checkpoint,
    check_tensor_shapes,
    has_component,
    load_strict,
    read_checkpoint,
    read_config,
)
from icm_cli.model.contracts import Backbone, Component, Edges, Objects
from icm_cli.model.core import InContextMatting
from icm_cli.model.hub.catalogue import packed_checkpoint
from icm_cli.model.hub.folders import WeightsNotFoundError

DEFAULT_MODEL = "lite"
PUBLISHED_MODEL = "icm-sd21"
"""Preset of the published checkpoint, which contains no configuration."""
UNTRAINED_MODELS = "lite-training-free or sd21-training-free"


def resolve_model(model: str | None, checkpoint: Path | None) -> tuple[ModelConfig, Path | None]:
    """Return the configuration and the checkpoint that ``--model`` and ``--checkpoint`` select.

    The weights are not read.

    Args:
        model: Name of a preset, or path of a YAML file. None selects the configuration in the checkpoint, the preset of
            the published checkpoint, or :data:`DEFAULT_MODEL` if there is no checkpoint.
        checkpoint: File with the weights. None selects the file that the package contains for the preset, if there is
            one.

    Raises:
        ConfigError: Model and checkpoint do not belong together, or weights are missing.
    """
    if checkpoint is None:
        name = model or DEFAULT_MODEL
        config, packed = load_model_config(name), packed_checkpoint(name)
        if packed is None:
            _require_checkpoint(config)
        return config, packed
    requested = None if model is None else load_model_config(model)
    stored = read_config(checkpoint)
    if stored is not None and requested is not None and stored != requested:
        raise ConfigError(
            f"checkpoint {checkpoint} has another configuration than --model {model}: "
            f"{_describe_difference(stored, requested)}; omit --model to use the configuration in the checkpoint"
        )
    config = stored or requested or load_model_config(PUBLISHED_MODEL)
    if not component_class("head", config.head.name).is_trained:
        raise ConfigError(
            f"--checkpoint {checkpoint} cannot be used with model {model!r}, because its head "
            f"{config.head.name!r} has no weights; omit --checkpoint"
        )
    return config, checkpoint


def override_edges(config: ModelConfig, edges: str, weights: str | None) -> ModelConfig:
    """Return the configuration with the edges of ``--edges`` and ``--edges-weights``.

    Args:
        config: Configuration of the model.
        edges: A value of ``--edges``.
        weights: Folder or hub id of the edges' pretrained weights; None for the configured one.

    Raises:
        UsageError: No edges would use ``weights``.
    """
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
    """Return the device and dtypes of a model.

    Args:
        config: Configuration of the model, whose backbone may prefer a dtype.
        device: Value of ``--device``.
        dtype: Value of ``--dtype``.

    Raises:
        ConfigError: The device or dtype is unknown or not available.
    """
    backbone = component_class("backbone", config.backbone.name)
    preferred = backbone.preferred_transformer_dtype(config.backbone.settings)
    target = resolve_device(device, dtype, transformer_dtype=preferred)
    return target if backbone.has_transformer else replace(target, transformer_dtype=target.dtype)


def load_model(
    config: ModelConfig,
    *,
    checkpoint: Path | None,
    weights: str | None,
    offline: bool,
    seed: int,
) -> InContextMatting:
    """Load a model with its weights, on the CPU in float32 and in evaluation mode.

    Args:
        config: Configuration of the model.
        checkpoint: File with the weights; None for models without trained weights.
        weights: Folder or hub id of the backbone's weights; None for the configured one.
        offline: Do not access the network.
        seed: Seed of the backbone's noise.

    Raises:
        ConfigError: Weights are missing or do not fit the configuration.
    """
    if checkpoint is None:
        _require_checkpoint(config)
    return _build_model(config, checkpoint, weights, offline=offline, seed=seed).eval()


def load_model_for_training(
    config: ModelConfig,
    *,
    checkpoint: Path | None,
    weights: str | None,
    offline: bool,
    seed: int,
) -> InContextMatting:
    """Load a model for training.

    The arguments are those of :func:`load_model`. Without a checkpoint, the weights of the head are random and depend
    on ``seed``.

    Raises:
        ConfigError: As :func:`load_model`, or the head has no weights to train.
    """
    if not component_class("head", config.head.name).is_trained:
        raise ConfigError(
            f"head {config.head.name!r} has no weights to train; use another head, for example token-match"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _build_model(config, checkpoint, weights, offline=offline, seed=seed)


def _build_model(
    config: ModelConfig, path: Path | None, weights: str | None, *, offline: bool, seed: int
) -> InContextMatting:
    """Build the model and load its weights. The head comes first, so that a seed decides it."""
    checkpoint = None if path is None else read_checkpoint(path)
    head_class, settings = component_class("head", config.head.name), config.head.settings
    if checkpoint is not None:
        _check_shapes(head_class, settings, checkpoint.component("head"), f"checkpoint {path}")
    head = head_class(settings)
    if checkpoint is not None:
        load_strict(head, checkpoint.component("head"), f"checkpoint {path}")
    backbone = _build_backbone(config, checkpoint, path, weights, offline=offline, seed=seed)
    edges = _build_edges(config, checkpoint, path, offline=offline)
    objects = _build_objects(config, checkpoint, path)
    return InContextMatting(
        backbone, head, edges, objects, second_pass=config.second_pass, guided_filter=config.guided_filter
    )


def _check_shapes(cls: type[Component], settings: Any, tensors: Mapping[str, Tensor], where: str) -> None:
    """Check the shapes of tensors before their module, which may be too large, takes memory."""
    with torch.device("meta"):
        expected = cls(settings).state_dict()
    check_tensor_shapes(expected, {key: tensor.shape for key, tensor in tensors.items()}, where)


def _build_backbone(
    config: ModelConfig,
    checkpoint: Checkpoint | None,
    path: Path | None,
    weights: str | None,
    *,
    offline: bool,
    seed: int,
) -> Backbone:
    cls, settings = component_class("backbone", config.backbone.name), config.backbone.settings
    tensors = None if checkpoint is None else checkpoint.component("backbone")
    if tensors and cls.is_self_contained:
        _reject_weights(weights, path)
        backbone: Backbone = cls(settings).eval()
    else:
        backbone = cls.load(settings, weights, offline=offline, seed=seed)
    if tensors:
        load_strict(backbone, tensors, f"checkpoint {path}")
    return backbone


def _build_edges(
    config: ModelConfig, checkpoint: Checkpoint | None, path: Path | None, *, offline: bool
) -> Edges | None:
    if config.edges is None:
        return None
    cls, settings = component_class("edges", config.edges.name), config.edges.settings
    if checkpoint is not None and cls.is_trained:
        _check_shapes(cls, settings, checkpoint.component("edges"), f"checkpoint {path}")
    edges: Edges = cls.load(settings, offline=offline)
    if checkpoint is not None and cls.is_trained:
        load_strict(edges, checkpoint.component("edges"), f"checkpoint {path}")
    return edges


def _build_objects(config: ModelConfig, checkpoint: Checkpoint | None, path: Path | None) -> Objects | None:
    """Build the objects with the checkpoint's weights, or else with the pretrained ones."""
    if config.objects is None:
        return None
    cls, settings = component_class("objects", config.objects.name), config.objects.settings
    tensors = {} if checkpoint is None else checkpoint.component("objects")
    objects: Objects = cls(settings) if tensors else cls.load(settings)
    if tensors:
        load_strict(objects, tensors, f"checkpoint {path}")
    return objects.eval()


def model_digest(config: ModelConfig, *, checkpoint: Path | None, weights: str | None, offline: bool) -> str:
    """Return a hash of the configuration and of all weights, without loading the model.

    The arguments are those of :func:`load_model`.
    """
    content = "none" if checkpoint is None else cached_file_digest(checkpoint)
    pretrained = [
        cls.weights_digest(settings, source, offline=offline)
        for cls, settings, source in _pretrained_components(config, checkpoint, weights)
    ]
    return combined_digest(json.dumps(config.as_dict(), sort_keys=True), content, *pretrained)


def check_weights_exist(
    config: ModelConfig, *, checkpoint: Path | None, weights: str | None, offline: bool
) -> list[str]:
    """Check that all weights of a model can be loaded, without reading or downloading them.

    The arguments are those of :func:`load_model`.

    Returns:
        The weights that :func:`load_model` will download, for example "facebook/dinov2-large (1.2 GB)".

    Raises:
        ConfigError: Weights are missing, incomplete or refused.
    """
    downloads = []
    for cls, settings, source in _pretrained_components(config, checkpoint, weights):
        try:
            cls.weight_files(settings, source, offline=True)
        except WeightsNotFoundError as error:
            if offline:
                raise
            downloads.append(error.downloads)
    return downloads


def _pretrained_components(
    config: ModelConfig, checkpoint: Path | None, weights: str | None
) -> Iterator[tuple[type[Component], Any, str | None]]:
    """Yield class, settings and source of the components whose pretrained weights are loaded, because the checkpoint
    does not contain them."""
    backbone = component_class("backbone", config.backbone.name)
    if checkpoint is not None and backbone.is_self_contained and has_component(checkpoint, "backbone"):
        _reject_weights(weights, checkpoint)
    else:
        yield backbone, config.backbone.settings, weights
    if config.edges is not None:
        yield component_class("edges", config.edges.name), config.edges.settings, None
    if config.objects is not None and (checkpoint is None or not has_component(checkpoint, "objects")):
        yield component_class("objects", config.objects.name), config.objects.settings, None


def backbone_digest(config: ModelConfig, checkpoint: Path | None, weights: str | None, *, offline: bool) -> str:
    """Return a hash of the backbone's initial weights: those in the checkpoint, or the pretrained ones.

    The arguments are those of :func:`load_model`.

    Raises:
        ConfigError: ``weights`` is given, but the checkpoint contains the backbone.
    """
    backbone = component_class("backbone", config.backbone.name)
    if checkpoint is not None and backbone.is_self_contained and has_component(checkpoint, "backbone"):
        _reject_weights(weights, checkpoint)
        return cached_file_digest(checkpoint)
    settings = config.backbone.settings
    digest: str = backbone.weights_digest(settings, weights, offline=offline)
    return digest


def _require_checkpoint(config: ModelConfig) -> None:
    """Raise ConfigError if the head has weights, because there is no checkpoint."""
    if component_class("head", config.head.name).is_trained:
        raise ConfigError(
            f"head {config.head.name!r} needs trained weights; give them with --checkpoint FILE (the published .ckpt, "
            f"or a file that icm trained), or use a model without trained weights: --model {UNTRAINED_MODELS}"
        )


def _reject_weights(weights: str | None, checkpoint: Path | None) -> None:
    """Raise ConfigError if weights are given, because the checkpoint contains the backbone."""
    if weights is not None:
        raise ConfigError(
            f"--weights is {weights!r}, but checkpoint {checkpoint} already contains the weights "
            "of the backbone; omit --weights"
        )


def _describe_difference(stored: ModelConfig, requested: ModelConfig) -> str:
    """Describe the first setting in which two configurations differ."""
    ours, theirs = stored.as_dict(), requested.as_dict()
    for component in {**ours, **theirs}:
        settings = ours.get(component, {})
        for key in {**settings, **theirs.get(component, {})}:
            requested_value = theirs.get(component, {}).get(key)
            if settings.get(key) != requested_value:
                return f"its {component} has {key} {settings.get(key)!r}, not {requested_value!r}"
    raise AssertionError("equal configurations have no difference")
