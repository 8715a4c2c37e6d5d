"""Interface of the training stages: the samples, predictions and losses of each kind of training."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeAlias

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from icm_cli.events import TrainingListener
from icm_cli.geometry import ImageU8, alpha_to_u8
from icm_cli.model.core import InContextMatting
from icm_cli.training.batches import BatchMaker, BatchT, load_batches
from icm_cli.training.data.pool import TrainingPool
from icm_cli.training.learner import Learner
from icm_cli.training.settings import Settings

PANEL_ROWS = 4
"""Largest number of samples in a panel: an image of samples and predictions, which TensorBoard shows."""
PANEL_CELL_PX = 256
OUTSIDE_BRIGHTNESS = 0.35
"""Brightness of a reference outside its guidance, in panels and previews."""
Prediction: TypeAlias = tuple[Tensor, ...]
"""Outputs of the model for a batch, [B,...] each, with gradients."""


class Stage(ABC, Generic[BatchT]):
    """A kind of training. The loop takes its batches, predicts, computes the losses, and updates the weights."""

    trainable_parts: ClassVar[tuple[str, ...]]
    """Parts of the model whose weights may change: "backbone", "head", "objects", "edges"."""
    loss_names: ClassVar[tuple[str, ...]]
    """Names of the losses in the log."""
    maker: BatchMaker[BatchT]
    """Makes the batches in worker processes; not set by stages that make them in the main process."""

    def __init__(self, settings: Settings, pool: TrainingPool) -> None:
        self.settings = settings
        self.pool = pool

    @abstractmethod
    def select_module(self, model: InContextMatting) -> nn.Module:
        """Return the module that runs with gradients. Raises ConfigError if the model lacks it."""

    def prepare(self, learner: Learner, folder: Path, first_step: int, listener: TrainingListener) -> None:
        """Prepare for the batch of ``first_step`` (from 0), after the learner's state is loaded."""

    def make_batches(self, learner: Learner, first_step: int) -> Iterator[BatchT]:
        """Yield the batches of this process, starting at a step. Raises TrainingError if a batch cannot be made."""
        is_cuda = learner.device.torch_device.type == "cuda"
        return load_batches(self.maker, learner.sample_numbers(first_step), workers=learner.workers, pin=is_cuda)

    def predict(self, forward: nn.Module, batch: BatchT) -> Prediction:
        """Run ``forward`` on a batch: the selected module, as Accelerate has wrapped it."""
        return forward(batch)

    @abstractmethod
    def compute_losses(self, prediction: Prediction, batch: BatchT) -> dict[str, Tensor]:
        """Return every loss, weighted, [B] each, and their sum as "total"."""

    @abstractmethod
    def render_panel(self, learner: Learner, batch: BatchT) -> ImageU8:
        """Render the panel of a batch, uint8 [H,W,3]. The model is in evaluation mode."""

    @abstractmethod
    def preview_sample(self, number: int) -> tuple[str, list[ImageU8]]:
        """Return a caption and images, uint8 [h,w,3], of a sample. Raises TrainingError or ImageError."""


AnyStage: TypeAlias = Stage[Any]


def make_stage(settings: Settings, pool: TrainingPool) -> AnyStage:
    """Create the stage that ``train.stage`` names. It does not need the model yet."""
    module = importlib.import_module(f"icm_cli.training.stages.{settings.train.stage.replace('-', '_')}")
    return module.STAGE(settings, pool)


def add_total(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return losses, [B] each, with their sum as "total"."""
    return {**losses, "total": torch.stack(list(losses.values())).sum(dim=0)}


def image_grid(rows: Sequence[Sequence[ImageU8]]) -> ImageU8:
    """Arrange images, uint8 [h,w,3], in rows; each is resized to PANEL_CELL_PX."""
    size = (PANEL_CELL_PX, PANEL_CELL_PX)
    return np.concatenate(
        [
            np.concatenate([cv2.resize(cell, size, interpolation=cv2.INTER_AREA) for cell in cells], axis=1)
            for cells in rows
        ]
    )


def render_layers(layers: Sequence[Tensor]) -> ImageU8:
    """Show samples in rows, with a cell for each layer [B,...] of a sample; see :func:`to_rgb`."""
    return image_grid([[to_rgb(layer[i]) for layer in layers] for i in range(len(layers[0]))])


def to_rgb(layer: Tensor | NDArray[Any]) -> ImageU8:
    """Convert a layer to an image, uint8 [h,w,3]: float [h,w] in 0..1, uint8 [h,w], or already uint8 [h,w,3]."""
    values = torch.as_tensor(layer).cpu()
    pixels: ImageU8 = alpha_to_u8(values.float().numpy()) if values.is_floating_point() else values.numpy()
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=-1)


def darken_outside(rgb: ImageU8, guidance: NDArray[np.bool_]) -> ImageU8:
    """Darken a reference, uint8 [H,W,3], outside its guidance, bool [H,W]."""
    return np.where(guidance[..., None], rgb, (rgb * OUTSIDE_BRIGHTNESS).astype(np.uint8)).astype(np.uint8)
