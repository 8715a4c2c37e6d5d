"""The stages of training: what each shows the model, what it asks of the answer, and which weights learn."""

from __future__ import annotations

import importlib

from icm_cli.training.data.pool import Pool
from icm_cli.training.settings import Settings
from icm_cli.training.stages.contract import AnyStage


def make_stage(settings: Settings, pool: Pool) -> AnyStage:
    """Build the stage that ``train.stage`` names; touches no model."""
    module = importlib.import_module(f"icm_cli.training.stages.{settings.train.stage}")
    stage: AnyStage = module.STAGE(settings, pool)
    return stage
