"""Choice of the model. It is checked before slow work, and loaded only if there are images to matte."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from icm_cli.config import MatchConfig, ModelConfig, component_class
from icm_cli.device import Device
from icm_cli.environment import check_not_forked
from icm_cli.errors import UsageError
from icm_cli.matting.optical_flow import PropagationConfig
from icm_cli.matting.predictor import Predictor, check_guidance, check_learn_steps
from icm_cli.matting.references import Reference
from icm_cli.model.contracts import Head
from icm_cli.model.lite.finetuning import DEFAULT_STEPS, FINETUNING
from icm_cli.model.lite.mobile_sam import MobileSam
from icm_cli.model.loading import (
    check_weights_exist,
    load_model,
    model_digest,
    override_edges,
    override_match,
    resolve_model,
    select_device,
)
from icm_cli.options import LoadOptions, ModelOptions, keyword_arguments
from icm_cli.options.definition import DigestPart


@dataclass(frozen=True)
class ModelChoice:
    """A model that can be loaded: its configuration, its weights and its device."""

    config: ModelConfig
    checkpoint: Path | None
    weights: str | None
    offline: bool
    seed: int
    device: Device
    batch_size: int

    @classmethod
    def from_options(
        cls, options: ModelOptions, batch_size: int | Literal["auto"], *, device: str | None = None
    ) -> ModelChoice:
        """Return the choice that options describe, without reading weights. ``device``: instead of ``--device``.

        Raises UsageError or ConfigError.
        """
        config, path = resolve_model(options.model, options.checkpoint)
        config = override_edges(config, options.edges, options.edges_weights)
        config = override_match(config, options.match, options.min_similarity)
        selected = select_device(config, device or options.device, options.dtype)
        resolved_batch_size = selected.auto_batch_size if batch_size == "auto" else batch_size
        return cls(config, path, options.weights, options.offline, options.seed, selected, resolved_batch_size)

    def digest_parts(self) -> dict[DigestPart, str]:
        """Return what the model contributes to the digest of its alphas. Reads weights, but loads no model."""
        model = model_digest(self.config, checkpoint=self.checkpoint, weights=self.weights, offline=self.offline)
        return {DigestPart.MODEL: model, DigestPart.DTYPE: self.device.dtype_name}

    def decoder_digest(self) -> str:
        """Return the digest of the object model for hints; "" if the model has its own. Raises ConfigError."""
        return "" if self.config.objects else MobileSam.weights_digest(MobileSam.Config(), offline=True)

    def weights_to_download(self) -> list[str]:
        """Return the weights that must be downloaded, without downloading them.

        Raises ConfigError for missing or refused weights.
        """
        return check_weights_exist(self.config, checkpoint=self.checkpoint, weights=self.weights, offline=self.offline)

    def resolve_learn_steps(self, requested: int | None, *, is_shot: bool) -> int:
        """Return the number of steps for fine-tuning the head on the references. ``requested``: ``--learn-steps``.

        The default is ``DEFAULT_STEPS`` in a shot, if the head can be fine-tuned, and 0 otherwise. Raises UsageError.
        """
        return _resolve_learn_steps(requested, component_class("head", self.config.head.name), is_shot=is_shot)

    def check_shot(self) -> None:
        """Raise UsageError if this model cannot matte shots."""
        _check_shot(self.config.match)

    def check_guidance(self, references: Sequence[Reference]) -> None:
        """Raise UsageError for references that the head of this model cannot use."""
        check_guidance(references, component_class("head", self.config.head.name))

    def load_predictor(self) -> Predictor:
        """Load the model onto its device. Raises ConfigError."""
        model = load_model(
            self.config, checkpoint=self.checkpoint, weights=self.weights, offline=self.offline, seed=self.seed
        )
        return Predictor(model, self.device)

    @property
    def description(self) -> str:
        """Components and device, as messages name them."""
        return f"model {self.config.title} on {self.device.description}"

    def as_settings(self) -> dict[str, Any]:
        """Return the settings that reports state."""
        return {
            "model_name": self.config.title,
            "model": self.config.as_dict(),
            "checkpoint": str(self.checkpoint) if self.checkpoint else None,
            "weights": self.weights,
            "device": self.device.description,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class LoadedModel:
    """A model that is loaded already, such as one in training. Alphas of earlier runs are never kept with it."""

    predictor: Predictor

    seed = 0
    """Only a placeholder in digests: the seed of the loaded weights is unknown."""
    checkpoint = None
    """Unknown, so that the images that the model was trained on are unknown too."""

    @property
    def device(self) -> Device:
        return self.predictor.device

    @property
    def batch_size(self) -> int:
        return self.device.auto_batch_size

    def digest_parts(self) -> dict[DigestPart, str]:
        """Return parts that differ at every call, so that no alpha is kept, because the weights may change."""
        return {DigestPart.MODEL: secrets.token_hex(), DigestPart.DTYPE: self.device.dtype_name}

    def resolve_learn_steps(self, requested: int | None, *, is_shot: bool) -> int:
        """As in :class:`ModelChoice`."""
        return _resolve_learn_steps(requested, type(self.predictor.model.head), is_shot=is_shot)

    def check_shot(self) -> None:
        """As in :class:`ModelChoice`."""
        _check_shot(self.predictor.model.match)

    def load_predictor(self) -> Predictor:
        """Return the loaded model."""
        return self.predictor

    @property
    def description(self) -> str:
        """Components and device, as messages name them."""
        return f"model {self._title} on {self.device.description}"

    @property
    def _title(self) -> str:
        """Classes of all components."""
        model = self.predictor.model
        parts = (model.backbone, model.head, model.objects, model.edges)
        return " + ".join(type(part).__name__ for part in parts if part is not None)

    def as_settings(self) -> dict[str, Any]:
        return {"model_name": self._title, "device": self.device.description, "batch_size": self.batch_size}


def sequence_digest_parts(learn_steps: int, *, is_shot: bool) -> dict[DigestPart, str]:
    """Return what fine-tuning on the references and propagation in shots contribute to the digest of alphas."""
    return {
        DigestPart.LEARN_STEPS: f"{learn_steps} {FINETUNING}" if learn_steps else "0",
        DigestPart.PROPAGATION: str(PropagationConfig()) if is_shot else "none",
    }


def _resolve_learn_steps(requested: int | None, head: type[Head], *, is_shot: bool) -> int:
    if requested is None:
        return DEFAULT_STEPS if is_shot and head.can_learn_references else 0
    check_learn_steps(requested, head)
    return requested


def _check_shot(match: MatchConfig) -> None:
    if match.rule == "same":
        raise UsageError(
            "--match same decides about the objects in single images, and --shot follows one object through all "
            "frames; omit one of the two"
        )


@keyword_arguments(LoadOptions)
def load(options: LoadOptions) -> Predictor:
    """Load a model that mattes arrays; keywords are options of ``icm matte``.

    >>> predictor = icm_cli.load()
    >>> reference = predictor.reference([(reference_rgb, mask)])
    >>> alpha = predictor.matte(rgb, reference)

    Raises ConfigError if the model, its weights or the device cannot be used, UsageError for an invalid argument.
    """
    check_not_forked()
    return ModelChoice.from_options(options.model, batch_size="auto").load_predictor()


AnyModelChoice = ModelChoice | LoadedModel
