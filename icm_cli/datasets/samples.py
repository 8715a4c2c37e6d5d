"""What a dataset holds: samples, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from icm_cli.datasets.composites import Composite

PROBLEM_KINDS: Mapping[str, str] = {
    "missing-image": "an alpha without an image",
    "missing-alpha": "an image without an alpha",
    "missing-trimap": "no trimap where the dataset has some; one is made from the alpha",
    "missing-prediction": "no alpha in the folder of predictions",
    "same-name": "two files of one kind with one name",
    "no-group": "an image that the groups' metadata does not name",
    "absent-file": "a name in the groups' metadata without an image",
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
    """Of the image or group."""
    reason: str
    """A sentence: what, where, and what was expected."""


@dataclass(frozen=True)
class Sample:
    """An image with its true alpha."""

    name: str
    """Unique in the dataset: the alpha's path below its folder without suffix, or its number."""
    image: Path | Composite
    alpha: Path
    trimap: Path | None = None
    group: str = ""
    """Images of one group show the same kind of thing; "" where the dataset's groups do not name the image."""
    categories: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Such as {"class": "animal", "type": "SO"}."""

    @property
    def file(self) -> Path:
        """The image's file; of a composite, its foreground's."""
        return self.image.foreground if isinstance(self.image, Composite) else self.image

    @property
    def is_video_frame(self) -> bool:
        """Whether the group is a video, its frames in the order of their names."""
        return self.categories.get("type") == "video"
