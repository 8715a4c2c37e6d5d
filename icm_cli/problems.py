"""Everything that can be wrong with data, by kind; a run names it and goes on without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PROBLEM_KINDS: Mapping[str, str] = {
    "missing-image": "an alpha without an image",
    "missing-alpha": "an image without an alpha",
    "missing-trimap": "no trimap where the dataset has some; one is made from the alpha",
    "missing-prediction": "no alpha in the folder of predictions",
    "same-name": "two files of one kind with one name",
    "no-group": "an image that the groups' metadata does not name",
    "absent-file": "a name in the groups' metadata or the dataset's list without an image",
    "lone-image": "a group of one, so nothing could be its reference",
    "bad-reference": "an image that cannot serve as a reference",
    "unreadable": "a file that cannot be read",
    "size-mismatch": "image, alpha or trimap of unequal sizes",
    "colour-alpha": "a true or predicted alpha with colour",
    "unscaled-alpha": "a true or predicted alpha of 0 and 1 instead of 0 and 255",
    "bad-trimap": "a trimap with other values than 0, 128 and 255",
    "16-bit-alpha": "a true alpha of 16 bits, scored after rounding to 8",
    "empty-alpha": "a true alpha without foreground",
    "no-unknown": "a trimap without unknown pixels, so no score over that region",
}
"""Every way in which data can be bad. Each is named and counted, and makes the exit code 1 unless it is allowed."""


@dataclass(frozen=True)
class Problem:
    """Something wrong with the data; the run goes on without it."""

    kind: str
    """One of PROBLEM_KINDS."""
    name: str
    """Name of the image or group."""
    reason: str
    """A sentence: what, where, and what was expected."""
