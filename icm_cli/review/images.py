"""Images for the browser: sources, alphas and thumbnails, encoded as JPEG and PNG."""

from __future__ import annotations

import contextlib
import io
import threading
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import cachetools
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from icm_cli.errors import ImageError, OutputError
from icm_cli.files import atomic_write, combined_digest
from icm_cli.geometry import ImageU8
from icm_cli.images.decoding import open_image
from icm_cli.images.reading import RAW_VALUES, read_alpha, read_image
from icm_cli.images.writing import PNG_COMPRESSION
from icm_cli.matting.jobs import Job
from icm_cli.reports.report import shrink_image
from icm_cli.review.run import ReviewRun

View = Literal["source", "alpha", "cutout", "overlay"]
VIEWS: tuple[View, ...] = get_args(View)
THUMBNAIL_PX = 256
THUMBNAILS_NAME = "thumbnails"
CHECKER_PX = 16
CHECKER_GREYS = 96, 144
OVERLAY_COLOUR = 255, 64, 64
OVERLAY_OPACITY = 0.55
JPEG_END = b"\xff\xd9"
"""Last bytes of a complete JPEG."""


class DisplayImages:
    """Read and encode the images of a run. All methods are thread-safe."""

    def __init__(self, run: ReviewRun) -> None:
        self._run = run
        self._sizes: cachetools.LRUCache[tuple[int, str], tuple[int, int]] = cachetools.LRUCache(4096)
        self._lock = threading.Lock()

    def source_jpeg(self, id: int) -> bytes:
        """Return the source, upright and in sRGB, as a JPEG. Raises ImageError."""
        return _encode_jpeg(self._read_source(id), 95)

    def alpha_png(self, id: int) -> bytes:
        """Return the alpha as a PNG of 8 bits. Raises ImageError."""
        return encode_alpha(self.read_alpha(id))

    def read_alpha(self, id: int, path: Path | None = None) -> ImageU8:
        """Return the alpha of an image in its display window, uint8 [H,W]. Raises ImageError.

        ``path``: file of the alpha, such as a copy of an earlier one; the output of the run by default.
        """
        path, output = path or self._run.jobs[id].output, self._run.output
        if output.foreground != "none":
            image = read_image(path, RAW_VALUES).to_display_window()
            if image.alpha is None:
                raise ImageError(f"{path} has no alpha channel; run icm matte again")
            return image.alpha
        values = read_alpha(path)
        return np.asarray(255 - values, np.uint8) if output.invert else values

    def display_size(self, id: int) -> tuple[int, int]:
        """Return height and width of an image as it is displayed. Raises ImageError."""
        key = id, self._run.alpha_file(id).version
        with self._lock:
            size = self._sizes.get(key)
        if size is None:
            size = self._read_size(id)
            with self._lock:
                self._sizes[key] = size
        return size

    def thumbnail(self, id: int, view: View) -> bytes:
        """Return a thumbnail of a view as a JPEG. It is cached on the disk. Raises ImageError."""
        job = self._run.jobs[id]
        parts = {"source": _file_version(job)}
        if view != "source":
            parts["alpha"] = self._run.refresh(id).version
        path = self._thumbnail_path(id, view, combined_digest(*parts.values())[:16])
        with contextlib.suppress(OSError):
            content = path.read_bytes()
            if content.endswith(JPEG_END):
                return content
        content = _encode_jpeg(self._draw_thumbnail(id, view), 88)
        with contextlib.suppress(OutputError), atomic_write(path, is_synced=False) as file:
            file.write(content)
        # Remove the thumbnails of earlier versions of the image.
        for other in path.parent.glob(f"{path.name.rpartition('-')[0]}-*.jpg"):
            if other != path:
                other.unlink(missing_ok=True)
        return content

    def _draw_thumbnail(self, id: int, view: View) -> ImageU8:
        """Return a thumbnail of a view, uint8 [H,W,3] or [H,W]."""
        if view == "alpha":
            return shrink_image(self.read_alpha(id), THUMBNAIL_PX)
        if view == "source":
            return shrink_image(self._read_small_source(id), THUMBNAIL_PX)
        with Image.open(io.BytesIO(self.thumbnail(id, "source"))) as image:
            rgb = np.asarray(image.convert("RGB"), np.float32)
        alpha = shrink_image(self.read_alpha(id), THUMBNAIL_PX)
        if alpha.shape != rgb.shape[:2]:
            raise ImageError(f"{self._run.jobs[id].output} has another size than its source; run icm matte again")
        weight = alpha[..., None] / np.float32(255)
        background = _checkerboard(alpha.shape[0], alpha.shape[1]) if view == "cutout" else rgb
        colour = rgb if view == "cutout" else rgb + (np.array(OVERLAY_COLOUR, np.float32) - rgb) * OVERLAY_OPACITY
        return np.asarray(colour * weight + background * (1 - weight) + 0.5, np.uint8)

    def _read_source(self, id: int) -> ImageU8:
        if reason := self._run.errors.get(id):
            raise ImageError(reason)
        return self._run.jobs[id].read_image().to_display_window().rgb

    def _read_small_source(self, id: int) -> ImageU8:
        """Return a source, sRGB uint8 [H,W,3]. A JPEG is decoded at a reduced size, which is ten times as fast."""
        job = self._run.jobs[id]
        if id not in self._run.errors and isinstance(job.source, Path) and job.colour.space == "auto":
            with open_image(job.source) as file:
                if file.type.name == "jpeg":
                    return _decode_small_jpeg(file.stream)
        return self._read_source(id)

    def _read_size(self, id: int) -> tuple[int, int]:
        with contextlib.suppress(ImageError):
            height, width = self.read_alpha(id).shape
            return height, width
        height, width = self._read_source(id).shape[:2]
        return height, width

    def _thumbnail_path(self, id: int, view: View, version: str) -> Path:
        key = combined_digest(self._run.names[id])[:32]
        return self._run.record_folder / THUMBNAILS_NAME / key[:2] / f"{key}-{view}-{version}.jpg"


def encode_alpha(alpha: ImageU8) -> bytes:
    """Return an alpha, uint8 [H,W], as a PNG."""
    return _encode(alpha, "PNG", compress_level=PNG_COMPRESSION)


def _decode_small_jpeg(stream: BinaryIO) -> ImageU8:
    """Decode a JPEG at a reduced size, upright and in sRGB, uint8 [H,W,3]. Raises OSError for a damaged file.

    The result has at least twice the size of a thumbnail, unless the JPEG itself is smaller.
    """
    with Image.open(stream, formats=["JPEG"]) as image:
        image.draft("RGB", (2 * THUMBNAIL_PX, 2 * THUMBNAIL_PX))
        upright = ImageOps.exif_transpose(image)
        profile = image.info.get("icc_profile")
        if profile and upright.mode == "RGB":
            with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a damaged profile is ignored
                converted = ImageCms.profileToProfile(
                    upright, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
                )
                upright = converted or upright
        return np.asarray(upright.convert("RGB"))


def _encode_jpeg(image: ImageU8, quality: int) -> bytes:
    return _encode(image, "JPEG", quality=quality, subsampling=0)


def _encode(image: ImageU8, format_: str, **options: int) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, format=format_, **options)
    return encoded.getvalue()


def _checkerboard(height: int, width: int) -> NDArray[Any]:
    rows, columns = np.ogrid[:height, :width]
    is_light = (rows // CHECKER_PX + columns // CHECKER_PX) % 2
    return np.where(is_light, *reversed(CHECKER_GREYS))[..., None]


def _file_version(job: Job) -> str:
    """Return a text that changes whenever a file of a source changes; "" if one does not exist."""
    with contextlib.suppress(OSError):
        states = [path.stat() for path in job.files]
        return " ".join(f"{state.st_size} {state.st_mtime_ns}" for state in states)
    return ""
