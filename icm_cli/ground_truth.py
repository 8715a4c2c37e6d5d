"""True alphas beside the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from icm_cli.datasets.layouts import image_files
from icm_cli.errors import UsageError
from icm_cli.sources import Job


@dataclass(frozen=True)
class GroundTruth:
    """True alphas by the name of the image they belong to, its suffix left out; empty where none were given."""

    files: dict[Path, Path] = field(default_factory=dict)

    @classmethod
    def found(cls, folder: str | Path | None, jobs: Sequence[Job]) -> GroundTruth:
        """The alphas of a folder laid out like the sources. Raises UsageError if none belongs to any image."""
        if folder is None:
            return cls()
        root = Path(folder)
        if not root.is_dir():
            raise UsageError(f"ground truth folder {root} does not exist; expected alphas named like the images")
        files = {path.relative_to(root).with_suffix(""): path for path in image_files(root)}
        if not any(job.name.with_suffix("") in files for job in jobs):
            expected = jobs[0].name.with_suffix(".png")
            raise UsageError(f"ground truth folder {root} has no alpha named like any image, such as {expected}")
        return cls(files)

    def of(self, job: Job) -> Path | None:
        """The ground truth of an image, None where there is none."""
        return self.files.get(job.name.with_suffix(""))
