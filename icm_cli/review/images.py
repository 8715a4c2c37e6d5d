"""Images for the browser: sources, alphas and thumbnails, encoded as JPEG and PNG."""

from __future__ import annotations

import contextlib
import functools
import io
import threading
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import cachetools
import numpy as np
from PIL import Image, ImageCms, ImageOps

from icm_cli.errors import ImageError, OutputError
from icm_cli.files.atomic_writes import atomic_write
from icm_cli.files.digests import combined_digest
from icm_cli.geometry import ImageU8
from icm_cli.images.decoding import open_image
from icm_cli.images.reading import RAW_VALUES, read_alpha, read_image
from icm_cli.images.writing import PNG_COMPRESSION, read_provenance_header
from icm_cli.matting.provenance import SOURCE_KEY
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
VERSION_DIGITS = 16
"""Number of bytes at the end of a thumbnail on the disk: a digest of the files that it was made from."""


class DisplayImages:
    """Read and encode the images of a run. All methods are thread-safe."""

    def __init__(self, run: ReviewRun) -> None:
        self._run = run
        self._sizes: cachetools.LRUCache[tuple[int, str, str], tuple[int, int]] = cachetools.LRUCache(4096)
        self._lock = threading.Lock()

    def source_jpeg(self, id: int) -> bytes:
        """Return the source, upright and in sRGB, as a JPEG. Raises ImageError."""
        return _encode_jpeg(Image.fromarray(self._read_source(id)), 95)

    def alpha_png(self, id: int) -> bytes:
        """Return the alpha as a PNG of 8 bits. Raises ImageError."""
        return encode_alpha(self.read_alpha(id))

    def read_alpha(self, id: int, path: Path | None = None) -> ImageU8:
        """Return the alpha of an image in its display window, uint8 [H,W]. Raises ImageError.

        ``path``: file of the alpha, such as a copy of an earlier one; the output of the run by default.
        """
        path, settings = path or self._run.jobs[id].output, self._run.output
        if settings.foreground != "none":  # the file is a cutout, whose alpha channel is the alpha
            image = read_image(path, RAW_VALUES).to_display_window()
            if image.alpha is None:
                raise ImageError(f"{path} has no alpha channel; run icm matte again")
            return image.alpha
        values = read_alpha(path)
        return np.asarray(255 - values, np.uint8) if settings.invert else values

    def display_size(self, id: int) -> tuple[int, int]:
        """Return height and width of an image as it is displayed. Raises ImageError."""
        key = id, self._run.alpha_file(id).version, self.source_version(id)
        with self._lock:
            size = self._sizes.get(key)
        if size is None:
            size = self._read_size(id)
            with self._lock:
                self._sizes[key] = size
        return size

    def source_version(self, id: int) -> str:
        """Return a text that changes whenever a file of the source changes; "" if one does not exist."""
        with contextlib.suppress(OSError):
            statuses = [path.stat() for path in self._run.jobs[id].files]
            return " ".join(f"{status.st_size} {status.st_mtime_ns}" for status in statuses)
        return ""

    def thumbnail(self, id: int, view: View) -> bytes:
        """Return a thumbnail of a view as a JPEG, cached on the disk until its files change. Raises ImageError."""
        versions = [self.source_version(id)]
        if view != "source":
            versions.append(self._run.refresh_alpha(id).version)
        version = combined_digest(*versions)[:VERSION_DIGITS].encode()
        path = self._thumbnail_path(id, view)
        with contextlib.suppress(OSError):
            content = path.read_bytes()
            if content.endswith(version):
                return content[:-VERSION_DIGITS]
        content = _encode_jpeg(self._draw_thumbnail(id, view), 88)
        with contextlib.suppress(OutputError), atomic_write(path, is_synced=False) as file:
            file.write(content + version)
        return content

    def _draw_thumbnail(self, id: int, view: View) -> Image.Image:
        """Return the thumbnail of a view."""
        if view == "source":
            return self._draw_source(id)
        if not self._run.jobs[id].output.exists():
            self._draw_source(id, use_cache=True)  # raises ImageError if it cannot be read
            raise ImageError("no alpha: it is not computed yet, the image failed, or the run did not include it")
        alpha = Image.fromarray(shrink_image(self.read_alpha(id), THUMBNAIL_PX))
        if view == "alpha":
            return alpha
        rgb = self._draw_source(id, use_cache=True)
        if alpha.size != rgb.size:
            raise ImageError(f"{self._run.jobs[id].output} has another size than its source; run icm matte again")
        if view == "cutout":
            return Image.composite(rgb, _checkerboard(rgb.size), alpha)
        tinted = Image.blend(rgb, Image.new("RGB", rgb.size, OVERLAY_COLOUR), OVERLAY_OPACITY)
        return Image.composite(tinted, rgb, alpha)

    def _draw_source(self, id: int, *, use_cache: bool = False) -> Image.Image:
        """Return the source at the size of a thumbnail.

        ``use_cache``: return the cached thumbnail, and make it first if it is missing. A JPEG in the default colour
        space is decoded instead, because decoding at a reduced size is as fast.
        """
        job = self._run.jobs[id]
        if id not in self._run.errors and isinstance(job.source, Path) and job.colour.space == "auto":
            with open_image(job.source) as file:
                if file.type.name == "jpeg":
                    return Image.fromarray(shrink_image(_decode_small_jpeg(file.stream), THUMBNAIL_PX))
        if use_cache:
            with Image.open(io.BytesIO(self.thumbnail(id, "source"))) as image:
                return image.convert("RGB")
        return Image.fromarray(shrink_image(self._read_source(id), THUMBNAIL_PX))

    def _read_source(self, id: int) -> ImageU8:
        """Return the source, upright and in sRGB, uint8 [H,W,3]. Raises ImageError."""
        if reason := self._run.errors.get(id):
            raise ImageError(reason)
        return self._run.jobs[id].read_image().to_display_window().rgb

    def _read_size(self, id: int) -> tuple[int, int]:
        """Return height and width of an image, from an alpha of this source, else from the source.

        If the source cannot be read, the size of any alpha is used. Raises ImageError, about the source.
        """
        job = self._run.jobs[id]
        with contextlib.suppress(ImageError):
            if read_provenance_header(job.output).get(SOURCE_KEY) == job.state():
                height, width = self.read_alpha(id).shape
                return height, width
        try:
            height, width = self._read_source(id).shape[:2]
        except ImageError as error:
            try:
                height, width = self.read_alpha(id).shape
            except ImageError:
                raise error from None
        return height, width

    def _thumbnail_path(self, id: int, view: View) -> Path:
        key = combined_digest(self._run.names[id])[:32]
        return self._run.record_folder / THUMBNAILS_NAME / key[:2] / f"{key}-{view}.jpg"


def encode_alpha(alpha: ImageU8) -> bytes:
    """Return an alpha, uint8 [H,W], as a PNG."""
    return _encode(Image.fromarray(alpha), "PNG", compress_level=PNG_COMPRESSION)


def _decode_small_jpeg(stream: BinaryIO) -> ImageU8:
    """Decode a JPEG at a reduced size, upright and in sRGB, uint8 [H,W,3]. Raises OSError for a damaged file.

    The result has at least the size of a thumbnail, unless the JPEG itself is smaller.
    """
    with Image.open(stream, formats=["JPEG"]) as image:
        image.draft("RGB", (THUMBNAIL_PX, THUMBNAIL_PX))
        profile = image.info.get("icc_profile")
        upright = ImageOps.exif_transpose(image) if image.info.get("exif") else image
        if profile and upright.mode == "RGB":
            with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a damaged profile is ignored
                converted = ImageCms.profileToProfile(
                    upright, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
                )
                upright = converted or upright
        return np.asarray(upright.convert("RGB"))


def _encode_jpeg(image: Image.Image, quality: int) -> bytes:
    return _encode(image, "JPEG", quality=quality, subsampling=0)


def _encode(image: Image.Image, format_: str, **options: int) -> bytes:
    """Encode an image with options of Pillow's writer."""
    encoded = io.BytesIO()
    image.save(encoded, format=format_, **options)
    return encoded.getvalue()


@functools.lru_cache(64)
def _checkerboard(size: tuple[int, int]) -> Image.Image:
    """Return a checkerboard of dark and light grey squares. ``size``: (width, height)."""
    width, height = size
    dark, light = CHECKER_GREYS
    rows, columns = np.ogrid[:height, :width]
    is_light = (rows // CHECKER_PX + columns // CHECKER_PX) % 2
    return Image.fromarray(np.where(is_light, light, dark).astype(np.uint8)).convert("RGB")
