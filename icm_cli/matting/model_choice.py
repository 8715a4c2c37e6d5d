"""Choice of the model: checked before anything slow, loaded only if there is something to matte."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from icm_cli.config import ModelConfig, component_class
from icm_cli.device import Device
from icm_cli.matting.predictor import Predictor, check_learn_steps
from icm_cli.matting.propagation import PropagationConfig
from icm_cli.model.contracts import Head
from icm_cli.model.lite.finetuning import DEFAULT_STEPS, FINETUNING
from icm_cli.model.loading import load_model, model_digest, override_edges, resolve_model, select_device
from icm_cli.options import ModelOptions
from icm_cli.options.definition import DigestPart


@dataclass(frozen=True)
class ModelChoice:
    """All that decides which model is loaded, and where it runs."""

    config: ModelConfig
    checkpoint: Path | None
    weights: str | None
    offline: bool
    seed: int
    where: Device
    batch_size: int

    @classmethod
    def from_options(
        cls, options: ModelOptions, batch_size: int | Literal["auto"], *, device: str | None = None
    ) -> ModelChoice:
        """Return the choice that the options make; ``device`` replaces theirs. Reads no weights.

        Raises UsageError or ConfigError.
        """
        config, path = resolve_model(options.model, options.checkpoint)
        config = override_edges(config, options.edges, options.edges_weights)
        where = select_device(config, device or options.device, options.dtype)
        images = where.auto_batch_size if batch_size == "auto" else batch_size
        return cls(config, path, options.weights, options.offline, options.seed, where, images)

    def digest_parts(self) -> dict[DigestPart, str]:
        """Return what the model contributes to the digest of its alphas. Reads weights, but loads no model."""
        model = model_digest(self.config, checkpoint=self.checkpoint, weights=self.weights, offline=self.offline)
        return {DigestPart.MODEL: model, DigestPart.DTYPE: self.where.dtype_name}

    def learn_steps(self, asked: int | None, *, is_shot: bool) -> int:
        """Steps in which the head learns the references: as asked for, else the usual number in a shot where it can.

        Raises UsageError.
        """
        return _learn_steps(asked, component_class("head", self.config.head.name), is_shot=is_shot)

    def load(self) -> Predictor:
        """The model on its device."""
        model = load_model(
            self.config, checkpoint=self.checkpoint, weights=self.weights, offline=self.offline, seed=self.seed
        )
        return Predictor(model, self.where)

    def describe(self) -> str:
        parts = [self.config.backbone, self.config.head, *filter(None, [self.config.edges])]
        return f"model {' + '.join(part.name for part in parts)} on {self.where.description}"

    def as_settings(self) -> dict[str, Any]:
        """For the report."""
        return {
            "model": self.config.as_dict(),
            "checkpoint": str(self.checkpoint) if self.checkpoint else None,
            "weights": self.weights,
            "device": self.where.description,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class LoadedModel:
    """A model that is there already, such as one in training; nothing of an earlier run was made by it."""

    predictor: Predictor

    seed = 0
    """Seed that counts in digests; that of the loaded weights is not known."""
    checkpoint = None
    """Unknown here, so the images it was trained on are too."""

    @property
    def where(self) -> Device:
        return self.predictor.device

    @property
    def batch_size(self) -> int:
        return self.where.auto_batch_size

    def digest_parts(self) -> dict[DigestPart, str]:
        """As of :class:`ModelChoice`, but no two are equal, because the weights of a loaded model may change."""
        return {DigestPart.MODEL: secrets.token_hex(), DigestPart.DTYPE: self.where.dtype_name}

    def learn_steps(self, asked: int | None, *, is_shot: bool) -> int:
        """As of :class:`ModelChoice`."""
        return _learn_steps(asked, type(self.predictor.model.head), is_shot=is_shot)

    def load(self) -> Predictor:
        return self.predictor

    def describe(self) -> str:
        model = self.predictor.model
        return f"model {type(model.backbone).__name__} + {type(model.head).__name__} on {self.where.description}"

    def as_settings(self) -> dict[str, Any]:
        return {"model": self.describe(), "device": self.where.description, "batch_size": self.batch_size}


def sequence_digest_parts(learn_steps: int, *, is_shot: bool) -> dict[DigestPart, str]:
    """Return what fine-tuning on the references and propagation in shots contribute to the digest of alphas."""
    return {
        DigestPart.LEARN_STEPS: f"{learn_steps} {FINETUNING}" if learn_steps else "0",
        DigestPart.PROPAGATION: str(PropagationConfig()) if is_shot else "none",
    }


def _learn_steps(asked: int | None, head: type[Head], *, is_shot: bool) -> int:
    if asked is None:
        return DEFAULT_STEPS if is_shot and head.can_learn_references else 0
    check_learn_steps(asked, head)
    return asked


AnyModel = ModelChoice | LoadedModel
