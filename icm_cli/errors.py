"""The errors a user can meet, each one a full sentence: what, where, what was expected, what to do.

Library code raises them and never exits; the command prints the sentence and exits with ``exit_code``.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar


class IcmError(Exception):
    """Base of every error that icm raises on purpose."""

    exit_code: ClassVar[int] = 3


class UsageError(IcmError):
    """The command line or the call is wrong: an option, a reference, a mask, a source (exit code 2)."""

    exit_code = 2


class ConfigError(IcmError):
    """A model, configuration, checkpoint, set of weights or device cannot be used (exit code 3)."""


class DeviceError(IcmError):
    """A device was lost while it worked, and no other is left; its argument says which and why (exit code 3)."""

    def __str__(self) -> str:
        return f"{self.args[0]}; every alpha that is there is whole, and the same command goes on where this stopped"


class OutputError(IcmError):
    """An output cannot be written, so no further image could be either (exit code 3)."""


class ImageError(IcmError):
    """One image cannot be read or matted; the others go on (exit code 1)."""

    exit_code = 1


class TrainingError(IcmError):
    """Training cannot go on: a NaN or infinite loss, or too many samples cannot be read (exit code 1)."""

    exit_code = 1


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A closing sentence that names the known name nearest to ``name``, or lists all of them."""
    names = sorted(known)
    nearest = get_close_matches(name, names, n=1, cutoff=0.6)
    return f"Did you mean {nearest[0]!r}?" if nearest else f"Known: {', '.join(names) or 'none'}."
