"""The stages of training: the samples, predictions and losses of each kind of training."""

from __future__ import annotations

import importlib

from icm_cli.training.data.pool import TrainingPool
from icm_cli.training.settings import Settings
from icm_cli.training.stages.contract import AnyStage


def make_stage(settings: Settings, pool: TrainingPool) -> AnyStage:
    """Create the stage that ``train.stage`` names. It does not need the model yet."""
    module = importlib.import_module(f"icm_cli.training.stages.{settings.train.stage}")
    stage: AnyStage = module.STAGE(settings, pool)
    return stage
