"""The contract between the training loop and a stage of training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias

from torch import Tensor, nn

from icm_cli.geometry import ImageU8
from icm_cli.model.core import InContextMatting
from icm_cli.training.batches import AnyBatch, StepSampler
from icm_cli.training.data.pool import Pool
from icm_cli.training.settings import Settings

if TYPE_CHECKING:
    from icm_cli.events import TrainingListener
    from icm_cli.training.learner import Learner

Answer: TypeAlias = tuple[Tensor, ...]
"""Outputs of the model for a batch, [B,...] each, with gradients."""


class Stage(ABC, Generic[AnyBatch]):
    """One kind of training. The loop takes its batches, asks the model, and learns from the losses."""

    learns: ClassVar[tuple[str, ...]]
    """Parts of the model whose weights may learn: "backbone", "head", "objects", "edges"."""
    terms: ClassVar[tuple[str, ...]]
    """Names of the losses, as they are logged."""

    def __init__(self, settings: Settings, pool: Pool) -> None:
        self.settings = settings
        self.pool = pool

    @abstractmethod
    def module(self, model: InContextMatting) -> nn.Module:
        """The module that runs with gradients. Raises ConfigError where the model lacks it."""

    def prepare(self, learner: Learner, folder: Path, first_step: int, listener: TrainingListener) -> None:
        """Make ready what the batch of ``first_step`` (from 0) needs, once the learner's state is loaded.

        Does nothing here.
        """
        del learner, folder, first_step, listener

    @abstractmethod
    def batches(self, sampler: StepSampler, *, workers: int, pin: bool) -> Iterator[AnyBatch]:
        """Batches in the order of the sampler. Raises TrainingError for one that cannot be made."""

    @abstractmethod
    def answer(self, forward: nn.Module, batch: AnyBatch) -> Answer:
        """Run :meth:`module`, as the accelerator wraps it, on a batch."""

    @abstractmethod
    def losses(self, answer: Answer, batch: AnyBatch) -> dict[str, Tensor]:
        """Every loss, weighted, [B] each, and their sum under "total"."""

    @abstractmethod
    def panel(self, learner: Learner, batch: AnyBatch) -> ImageU8:
        """A picture of a batch and what the model says of it, uint8 [H,W,3]; the model is in evaluation mode."""

    @abstractmethod
    def preview(self, counter: int) -> tuple[str, list[ImageU8]]:
        """A caption and pictures, uint8 [h,w,3], of sample number ``counter``. Raises TrainingError or ImageError."""


AnyStage: TypeAlias = Stage[Any]
