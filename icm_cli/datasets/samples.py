"""Samples: images with their true alphas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from icm_cli.images.reading import CompositeSource


@dataclass(frozen=True)
class Sample:
    """An image with its true alpha."""

    name: str
    """Unique in the dataset: the alpha's path below its folder without suffix, or its number."""
    image: Path | CompositeSource
    alpha: Path
    trimap: Path | None = None
    group: str = ""
    """Images of one group show the same kind of thing; "" where the dataset's groups do not name the image."""
    categories: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Such as {"class": "animal", "type": "SO"}."""

    @property
    def file(self) -> Path:
        """The image's file; of a composite, its foreground's."""
        return self.image.foreground if isinstance(self.image, CompositeSource) else self.image

    @property
    def is_video_frame(self) -> bool:
        """Whether the group is a video, its frames in the order of their names."""
        return self.categories.get("type") == "video"
