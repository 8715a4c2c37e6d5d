"""True alphas beside the images, and how far ours are from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from icm_cli.errors import ImageError, UsageError
from icm_cli.geometry import ImageU8
from icm_cli.images import IMAGE_SUFFIXES, read_matte
from icm_cli.metrics import mse, sad
from icm_cli.report import ImageResult
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
        files = {
            path.relative_to(root).with_suffix(""): path
            for path in sorted(root.rglob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES
        }
        if not any(job.name.with_suffix("") in files for job in jobs):
            expected = jobs[0].name.with_suffix(".png")
            raise UsageError(f"ground truth folder {root} has no alpha named like any image, such as {expected}")
        return cls(files)

    def score(self, result: ImageResult, job: Job, alpha: ImageU8 | None = None) -> ImageResult:
        """Add MSE and SAD where there is a ground truth; the alpha is read back where it is not at hand.

        A ground truth that cannot be used fails the image: its alpha is there, its score is not.
        """
        path = self.files.get(job.name.with_suffix(""))
        if path is None:
            return result
        try:
            truth = read_matte(path)
            alpha = read_matte(job.output) if alpha is None else alpha
        except ImageError as error:
            return replace(result, status="failed", reason=f"no score, its ground truth cannot be used: {error}")
        if truth.shape != alpha.shape:
            sizes = f"{truth.shape[1]}x{truth.shape[0]}, the image {alpha.shape[1]}x{alpha.shape[0]}"
            return replace(result, status="failed", reason=f"no score, its ground truth {path} is {sizes}")
        return replace(result, mse=mse(alpha, truth), sad=sad(alpha, truth))
