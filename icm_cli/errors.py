"""Errors that end a run, and problems with input data that do not.

Library code raises an :class:`IcmError` and never exits. The commands print its message and exit with its
``exit_code``. Every message states what is wrong, what was expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import ClassVar

LONGEST_QUOTE = 120
"""Maximum number of characters of the result of :func:`quote_value`."""
MAX_SHOWN_CHARACTERS = 100
"""Maximum number of characters that :func:`shorten` keeps."""


class IcmError(Exception):
    """Base class of all errors that icm raises on purpose."""

    exit_code: ClassVar[int] = 3


class UsageError(IcmError):
    """Invalid option, reference, mask or source (exit code 2)."""

    exit_code = 2


class ConfigError(IcmError):
    """Unusable model, configuration, checkpoint, weights or device (exit code 3)."""


class DeviceError(IcmError):
    """All devices failed during the run; the argument names the last one (exit code 3)."""

    def __str__(self) -> str:
        return f"{self.args[0]}; all alphas written so far are complete; run the same command again to resume"


class OutputError(IcmError):
    """An output cannot be written, so the run cannot continue (exit code 3)."""


class FileWriteError(OutputError):
    """One output cannot be written; others may be.

    For the alpha of an image, the run continues (exit code 1). For another file, it ends (exit code 3).
    """


class ImageError(IcmError):
    """An image cannot be read or matted; the run continues with the other images (exit code 1)."""

    exit_code = 1


class FileAccessError(ImageError):
    """The system does not let an image be read: the drive fails, or the permission is missing."""

    is_transient = False
    """Whether the image may be readable later."""


class ImageMemoryError(ImageError):
    """An image needs more memory than is free."""


class ResourceError(IcmError):
    """Memory or threads ran out outside of a single image (exit code 3)."""


class TrainingError(IcmError):
    """Training cannot continue, such as with an infinite loss or unreadable data (exit code 1)."""

    exit_code = 1


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence for messages that suggests the most similar known name, or lists all known names."""
    names = sorted(known)
    similar = find_similar_name(name, names)
    return f"Did you mean {similar!r}?" if similar else f"Known: {', '.join(names) or 'none'}."


def find_similar_name(name: str, known: Iterable[str]) -> str:
    """Return the most similar known name; "" if none is similar."""
    return next(iter(get_close_matches(name, sorted(known), n=1, cutoff=0.6)), "")


def format_count(count: int, noun: str) -> str:
    """Return a number with its noun, such as "1 image" or "2 images"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def list_first(items: Sequence[object], limit: int = 1, separator: str = ", ", conjunction: str = " and") -> str:
    """Return the first items, and how many others there are, such as "a.png and 3 more"."""
    more = f"{conjunction} {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(map(str, items[:limit])) + more


def join_words(words: Iterable[str]) -> str:
    """Return one or more words as a sentence lists alternatives: "png, tiff or exr"."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def quote_value(value: object) -> str:
    """Return a value as messages show it: its repr, shortened in the middle if it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST_QUOTE else f"{text[: LONGEST_QUOTE - 30]} ... {text[-20:]}"


def shorten(text: str) -> str:
    """Return a wrong value for a message, cut off after ``MAX_SHOWN_CHARACTERS``."""
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."


PROBLEM_KINDS: Mapping[str, str] = {
    "missing-image": "an alpha has no image",
    "missing-alpha": "an image has no alpha",
    "missing-trimap": "an image has no trimap although the dataset has trimaps; it is generated from the alpha",
    "missing-prediction": "the folder of predictions has no alpha for an image",
    "same-name": "two files of the same kind have the same name",
    "no-group": "the groups file does not list an image",
    "absent-file": "the groups file or the list of the dataset names an image that does not exist",
    "lone-image": "a group has a single image, so that it has no reference",
    "bad-reference": "an image cannot be used as a reference",
    "unreadable": "a file cannot be read",
    "size-mismatch": "image, alpha or trimap differ in size",
    "colour-alpha": "a true or predicted alpha has colour",
    "unscaled-alpha": "a true or predicted alpha has the values 0 and 1 instead of 0 and 255",
    "bad-trimap": "a trimap has values other than 0, 128 and 255",
    "16-bit-alpha": "a true alpha has 16 bits; it is rounded to 8 bits before scoring",
    "empty-alpha": "a true alpha has no foreground",
    "no-unknown": "a trimap has no unknown pixels, so there is no score of the unknown region",
}
"""All kinds of problems with input data, and what they mean.

Reports list and count them. Each one makes the exit code 1 unless its kind is allowed.
"""


@dataclass(frozen=True)
class Problem:
    """A problem with the input data. The run continues without the affected data."""

    kind: str
    """One of ``PROBLEM_KINDS``."""
    name: str
    """Name of the image or group."""
    reason: str
    """A sentence that states what is wrong, with the file, and what was expected."""
