"""Corrections of single images: answers to hints, accepting, rejecting and undoing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from icm_cli.geometry import ImageU8
from icm_cli.review.run import ReviewRun
from icm_cli.review.state import ModelNotReadyError, ReviewState

ModelState = Literal["loading", "ready", "failed"]


class Corrections:
    """Answers to hints, and changes of single images."""

    def __init__(self, run: ReviewRun, state: ReviewState, device: str | None, notice: Callable[[str], None]) -> None:
        self._run, self._state, self._device, self._notice = run, state, device, notice
        self.model_state: ModelState = "loading"
        self.model_error = ""
        self.model_name = run.options.model.model or "lite"

    def prepare(self, id: int) -> None:
        """Begin to prepare the model for an image; returns at once."""

    def answer(self, id: int, shapes: list[dict[str, Any]], refined: bool, tab: str = "") -> ImageU8:  # noqa: ARG002
        """Return the alpha that hints make, uint8 [H,W] of the display window."""
        raise ModelNotReadyError("the model is loading; try again")

    def accept(self, id: int, revision: int, shapes: list[dict[str, Any]] | None) -> None:  # noqa: ARG002
        """Accept the alpha of an image, with other hints or as it is."""
        raise ModelNotReadyError("the model is loading; try again")

    def reject(self, id: int, revision: int) -> None:
        """Reject the alpha of an image."""
        with self._state.edit(self._run.names[id], revision) as image:
            image.status = "rejected"

    def undo(self, id: int, revision: int) -> None:
        """Take back the last change of an image."""
        with self._state.edit(self._run.names[id], revision) as image:
            image.status = "open"

    def can_undo(self, id: int) -> bool:
        """Return whether there is a change to take back."""
        return self._state.read(self._run.names[id]).status == "rejected"

    def close(self) -> None:
        """End the work on the model."""
