"""The work of one device: all that a process needs to load the model and matte images, small enough to be sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from icm_cli.matting.engine import Engine, EngineOptions
from icm_cli.matting.jobs import Job
from icm_cli.matting.model_choice import ModelChoice
from icm_cli.matting.near import shown
from icm_cli.matting.references import Reference
from icm_cli.reports.result import ImageResult


@dataclass(frozen=True)
class Work:
    """The model and its device, the references, and the engine's options; it can be pickled."""

    choice: ModelChoice
    references: Sequence[Reference]
    learn_steps: int
    options: EngineOptions

    def engine(self, on_result: Callable[[ImageResult], None], notice: Callable[[str], None]) -> Engine:
        """Load the model and show it the references, once. Raises ConfigError."""
        predictor = self.choice.load()
        if self.learn_steps:
            notice(f"learning the references, {self.learn_steps} steps; --learn-steps 0 leaves that out")
        prepared = shown(predictor, self.references, self.learn_steps, is_shot=self.options.shot is not None)
        for sentence in prepared.notices:
            notice(sentence)
        return Engine(predictor, lambda _: prepared, self.options, on_result=on_result, notice=notice)


class Crew(Protocol):
    """Whoever does the work: the engine of this process, processes of several devices, or the actors of a cluster."""

    def run(self, jobs: Sequence[Job], /) -> None:
        """Matte every image, and tell of each as it ends."""

    def peak_memory_bytes(self) -> int:
        """The most memory that any of them held."""


@dataclass(frozen=True)
class Asked:
    """A process wants another image."""


@dataclass(frozen=True)
class Idle:
    """A process is ready: its model is loaded, or the images that it was given are done."""

    peak_memory_bytes: int


@dataclass(frozen=True)
class Begin:
    """Images are there for a process to ask for."""


@dataclass(frozen=True)
class NoMore:
    """No image is left for now."""
