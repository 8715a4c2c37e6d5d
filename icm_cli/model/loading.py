"""Build a model from a configuration and a checkpoint."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from icm_cli.config import (
    COMPONENT_KEYS,
    ComponentConfig,
    ComponentKind,
    ModelConfig,
    component_class,
    load_model_config,
    preset_paths,
)
from icm_cli.device import Device, resolve_device
from icm_cli.errors import ConfigError, UsageError
from icm_cli.files.digests import cached_file_digest, combined_digest
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
from icm_cli.options import MatchRule

DEFAULT_MODEL = "lite"
PUBLISHED_MODEL = "icm-sd21"
"""Preset of the published checkpoint, which contains no configuration."""
UNTRAINED_MODELS = "lite-training-free or sd21-training-free"


def resolve_model(model: str | None, checkpoint: Path | None) -> tuple[ModelConfig, Path | None]:
    """Return the configuration and the checkpoint that ``--model`` and ``--checkpoint`` select.

    ``model``: name of a preset or path of a YAML file. None selects the configuration in the checkpoint, the preset of
    the published checkpoint, or :data:`DEFAULT_MODEL` if there is no checkpoint. ``checkpoint``: None selects the file
    that the package contains for the preset, or for a preset with the components of the YAML file, if there is one.

    The weights are not read. Raises ConfigError if model and checkpoint do not belong together, or there is no
    checkpoint for a head that needs one.
    """
    if checkpoint is None:
        name = model or DEFAULT_MODEL
        config, packed = load_model_config(name), packed_checkpoint(name)
        if packed is None and name not in preset_paths():
            packed = _find_packed_checkpoint(config)
        if packed is None:
            _check_needs_no_checkpoint(config)
        return config, packed
    requested = None if model is None else load_model_config(model)
    stored = read_config(checkpoint)  # None for the published checkpoint
    if stored is not None and requested is not None and not stored.has_components_of(requested):
        raise ConfigError(
            f"checkpoint {checkpoint} has another configuration than --model {model}: "
            f"{_describe_difference(stored, requested)}; omit --model to use the configuration in the checkpoint"
        )
    config = requested or stored or load_model_config(PUBLISHED_MODEL)
    if not component_class("head", config.head.name).is_trained:
        raise ConfigError(
            f"--checkpoint {checkpoint} cannot be used with model {model!r}, because its head "
            f"{config.head.name!r} has no weights; omit --checkpoint"
        )
    return config, checkpoint


def _find_packed_checkpoint(config: ModelConfig) -> Path | None:
    """Return the checkpoint in the package for a preset with the components of a configuration; None without any."""
    for name in preset_paths():
        path = packed_checkpoint(name)
        if path is not None and load_model_config(name).has_components_of(config):
            return path
    return None


def override_edges(config: ModelConfig, edges: str, weights: str | None) -> ModelConfig:
    """Return the configuration with the edges of ``--edges`` and ``--edges-weights``.

    Raises UsageError if no edges would use ``weights``.
    """
    chosen = config.edges
    if edges != "model" and (chosen is None or chosen.name != edges):  # equal edges keep the settings of the model
        chosen = ComponentConfig(edges, component_class("edges", edges).Config())
    if weights is None:
        return replace(config, edges=chosen)
    if chosen is None:
        raise UsageError(f"the model has no edges, so --edges-weights {weights!r} has no effect; give --edges vitmatte")
    settings = component_class("edges", chosen.name).settings_with_weights(chosen.settings, weights)
    return replace(config, edges=ComponentConfig(chosen.name, settings))


def override_match(config: ModelConfig, rule: MatchRule | None, min_similarity: float | None) -> ModelConfig:
    """Return the configuration with the rule of ``--match`` and its ``--min-similarity``, if they are given.

    Raises UsageError if the head cannot compare objects, or if the rule does not use the similarity.
    """
    match = config.match
    if rule is not None:
        match = replace(match, rule=rule)
    if min_similarity is not None:
        match = replace(match, min_similarity=min_similarity)
        if match.rule != "same":
            raise UsageError(f"--min-similarity {min_similarity:g} has no effect without --match same; add it")
    if match.rule == "same" and not component_class("head", config.head.name).can_compare_objects:
        raise UsageError(
            f"--match same compares whole objects, which the head {config.head.name!r} cannot do; omit it, or choose a "
            "model with the token-match head, such as lite"
        )
    return replace(config, match=match)


def select_device(config: ModelConfig, device: str, dtype: str) -> Device:
    """Return the device and dtypes of a model from ``--device`` and ``--dtype``. The backbone may prefer a dtype.

    Raises ConfigError.
    """
    backbone = component_class("backbone", config.backbone.name)
    preferred = backbone.preferred_transformer_dtype(config.backbone.settings)
    target = resolve_device(device, dtype, transformer_dtype=preferred)
    return target if backbone.has_transformer else replace(target, transformer_dtype=target.dtype)


def load_model(
    config: ModelConfig, *, checkpoint: Path | None, weights: str | None, offline: bool, seed: int
) -> InContextMatting:
    """Load a model with its weights, on the CPU in float32 and in evaluation mode.

    ``checkpoint`` is None for models without trained weights. ``weights`` is the folder or hub id of the backbone's
    weights, None for the configured one. ``seed``: seed of the backbone's noise. Raises ConfigError if weights are
    missing or do not fit the configuration.
    """
    if checkpoint is None:
        _check_needs_no_checkpoint(config)
    stored = None if checkpoint is None else read_checkpoint(checkpoint)
    with torch.random.fork_rng(devices=[]):  # the random numbers of the caller stay as they are
        return build_model(config, stored, weights, offline=offline, seed=seed).eval()


def load_objects_and_edges(device: Device) -> tuple[Objects, Edges]:
    """Load the parts of ``lite`` that find an object by points and boxes, for inference on a device.

    Raises ConfigError if the weights are not in the package.
    """
    config, path = resolve_model(DEFAULT_MODEL, None)
    assert path is not None
    checkpoint = read_checkpoint(path)

    def load(kind: ComponentKind) -> Any:
        part: ComponentConfig = getattr(config, kind)
        with _WithoutRandomWeights():
            component = component_class(kind, part.name)(part.settings).eval()
        load_strict(component, checkpoint.component(kind), checkpoint.where)
        component.optimise_for_inference()
        component.to(device.torch_device).set_dtype(device.dtype, device.transformer_dtype)
        return component

    return load("objects"), load("edges")


def load_model_for_training(
    config: ModelConfig, *, checkpoint: Path | None, weights: str | None, offline: bool, seed: int
) -> InContextMatting:
    """Load a model for training; see :func:`load_model`.

    Without a checkpoint, the weights of the head are random and depend on ``seed``. Raises ConfigError, also if the
    head has no weights to train.
    """
    if not component_class("head", config.head.name).is_trained:
        raise ConfigError(
            f"head {config.head.name!r} has no weights to train; use another head, for example token-match"
        )
    stored = None if checkpoint is None else read_checkpoint(checkpoint)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(config, stored, weights, offline=offline, seed=seed)


class _WithoutRandomWeights(TorchFunctionMode):
    """Mode that skips the random initialisation of weights: its functions return their tensor as it is.

    Weights that a checkpoint replaces then take neither time nor memory, because their pages are never written. On the
    meta device, drawing random numbers imports torch's compiler, which takes seconds and sets environment variables.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0]
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def build_model(
    config: ModelConfig, checkpoint: Checkpoint | None, weights: str | None, *, offline: bool, seed: int
) -> InContextMatting:
    """Build a model and load its weights; see :func:`load_model`.

    Backbone and objects get their pretrained weights unless they are in the checkpoint. The head is built first, so
    that its random weights depend on the seed only.
    """
    stored = {} if checkpoint is None else _stored_components(config, checkpoint)

    def skip_initialisation_if_stored(kind: ComponentKind) -> contextlib.AbstractContextManager[object]:
        return _WithoutRandomWeights() if kind in stored else contextlib.nullcontext()

    with skip_initialisation_if_stored("head"):
        head = component_class("head", config.head.name)(config.head.settings)
    backbone_class = component_class("backbone", config.backbone.name)
    if checkpoint is not None and "backbone" in stored and backbone_class.is_self_contained:
        _reject_weights(weights, checkpoint.where)
        with skip_initialisation_if_stored("backbone"):
            backbone = backbone_class(config.backbone.settings).eval()
    else:
        backbone = backbone_class.load(config.backbone.settings, weights, offline=offline, seed=seed)
    edges, objects = None, None
    if config.edges is not None:
        with skip_initialisation_if_stored("edges"):
            edges = component_class("edges", config.edges.name).load(config.edges.settings, offline=offline)
    if config.objects is not None:
        objects_class = component_class("objects", config.objects.name)
        make_objects = objects_class if "objects" in stored else objects_class.load
        with skip_initialisation_if_stored("objects"):
            objects = make_objects(config.objects.settings).eval()
    model = InContextMatting(
        backbone,
        head,
        edges,
        objects,
        second_pass=config.second_pass,
        match=config.match,
        guided_filter=config.guided_filter,
    )
    if checkpoint is not None:
        for kind, tensors in stored.items():
            load_strict(getattr(model, kind), tensors, checkpoint.where)
    return model


def _stored_components(config: ModelConfig, checkpoint: Checkpoint) -> dict[ComponentKind, dict[str, Tensor]]:
    """Return the tensors of the components whose weights come from the checkpoint.

    Trained heads and edges must be in it; others keep their own weights. Backbone and objects may be in it.

    Raises ConfigError if tensors of a trained head or of trained edges are missing or have other shapes.
    """
    stored: dict[ComponentKind, dict[str, Tensor]] = {}
    for kind in COMPONENT_KEYS:
        part: ComponentConfig | None = getattr(config, kind)
        if part is None:
            continue
        tensors = checkpoint.component(kind)
        cls = component_class(kind, part.name)
        if kind in ("backbone", "objects"):
            if tensors:
                stored[kind] = tensors
        elif cls.is_trained:
            _check_shapes(cls, part.settings, tensors, checkpoint.where)
            stored[kind] = tensors
    return stored


def _check_shapes(cls: type[Component], settings: Any, tensors: Mapping[str, Tensor], where: str) -> None:
    """Check the shapes of a component's tensors. Raises ConfigError.

    The component is not built, because with wrong settings it may be too large for the memory.
    """
    with torch.device("meta"), _WithoutRandomWeights():
        expected = cls(settings).state_dict()
    check_tensor_shapes(expected, {name: tensor.shape for name, tensor in tensors.items()}, where)


def model_digest(config: ModelConfig, *, checkpoint: Path | None, weights: str | None, offline: bool) -> str:
    """Return a hash of the configuration and of all weights, without loading the model; see :func:`load_model`."""
    content = "none" if checkpoint is None else cached_file_digest(checkpoint)
    pretrained = [
        cls.weights_digest(settings, source, offline=offline)
        for cls, settings, source in _pretrained_components(config, checkpoint, weights)
    ]
    return combined_digest(json.dumps(config.as_dict(), sort_keys=True), content, *pretrained)


def check_weights_exist(
    config: ModelConfig, *, checkpoint: Path | None, weights: str | None, offline: bool
) -> list[str]:
    """Check that :func:`load_model` will find all weights, without reading or downloading them.

    Returns the weights that it will download, for example "facebook/dinov2-large (1.2 GB)". Raises ConfigError if
    weights are missing, incomplete or refused.
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
    """Yield class, settings and source of the components that load pretrained weights.

    Backbone and objects do so unless the checkpoint contains them. The source is a folder or hub id, or None for that
    in the settings. ``weights``: source of the backbone's weights.
    """
    backbone = component_class("backbone", config.backbone.name)
    if checkpoint is None or not _contains_backbone(checkpoint, backbone, weights):
        yield backbone, config.backbone.settings, weights
    if config.edges is not None:
        yield component_class("edges", config.edges.name), config.edges.settings, None
    if config.objects is not None and (checkpoint is None or not has_component(checkpoint, "objects")):
        yield component_class("objects", config.objects.name), config.objects.settings, None


def backbone_digest(config: ModelConfig, checkpoint: Path | None, weights: str | None, *, offline: bool) -> str:
    """Return a hash of the backbone's initial weights: those in the checkpoint, or the pretrained ones.

    Arguments: see :func:`load_model`.
    """
    backbone = component_class("backbone", config.backbone.name)
    if checkpoint is not None and _contains_backbone(checkpoint, backbone, weights):
        return cached_file_digest(checkpoint)
    return backbone.weights_digest(config.backbone.settings, weights, offline=offline)


def _contains_backbone(checkpoint: Path, backbone: type[Backbone], weights: str | None) -> bool:
    """Return whether a checkpoint contains the weights of the backbone, so that no pretrained ones are loaded.

    Raises ConfigError if other weights are given too.
    """
    is_contained = backbone.is_self_contained and has_component(checkpoint, "backbone")
    if is_contained:
        _reject_weights(weights, f"checkpoint {checkpoint}")
    return is_contained


def _check_needs_no_checkpoint(config: ModelConfig) -> None:
    """Raise ConfigError if the head has weights, because there is no checkpoint."""
    if component_class("head", config.head.name).is_trained:
        raise ConfigError(
            f"head {config.head.name!r} needs trained weights; give them with --checkpoint FILE (the published .ckpt, "
            f"or a file that icm trained), or use a model without trained weights: --model {UNTRAINED_MODELS}"
        )


def _reject_weights(weights: str | None, where: str) -> None:
    if weights is not None:
        raise ConfigError(
            f"--weights is {weights!r}, but {where} already contains the weights of the backbone; omit --weights"
        )


def _describe_difference(stored: ModelConfig, requested: ModelConfig) -> str:
    """Describe the first setting in which two configurations differ."""
    all_stored, all_requested = stored.as_dict(), requested.as_dict()
    for component in {**all_stored, **all_requested}:
        ours, theirs = all_stored.get(component, {}), all_requested.get(component, {})
        for key in {**ours, **theirs}:
            if ours.get(key) != theirs.get(key):
                return f"its {component} has {key} {ours.get(key)!r}, not {theirs.get(key)!r}"
    raise AssertionError("equal configurations have no difference")
