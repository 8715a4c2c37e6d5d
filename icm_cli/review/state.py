"""State of a review in ``ALPHAS/.icm/review.json``, which several processes may change at once."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, Literal, TypeAlias, get_args

from icm_cli.errors import IcmError, UsageError
from icm_cli.files.atomic_writes import atomic_write, locked_file
from icm_cli.files.json_files import read_json

STATE_NAME, LOCK_NAME = "review.json", "review.lock"
SCHEMA_VERSION = 1
LOCK_TIMEOUT_S = 20.0
ReviewStatus = Literal["open", "accepted", "rejected"]
NUMBER_OR_NULL = (int, float, NoneType)
STATE_SCHEMA = {
    "schema_version": int,
    "revision": int,
    "images": {
        "*": {"status": str, "revision": int, "taught": (dict, NoneType), "change": NUMBER_OR_NULL, "undo": [{}]}
    },
}
EXPECTED = "expected the state that icm review saved; move the file away to begin a new review: the alphas stay"


class StaleRevisionError(IcmError):
    """The image was changed in another tab or by another person."""


class StaleSourceError(StaleRevisionError):
    """The files of the image's source have changed since the page loaded it."""


class StaleAnswerError(IcmError):
    """A newer request of the same browser tab replaced this one before it began."""


class ModelNotReadyError(IcmError):
    """The model is loading, or could not be loaded."""


class StateBusyError(IcmError):
    """Another process holds the lock of the state."""


TeachingUse: TypeAlias = dict[str, Any]
"""How a taught image is used: ``kind`` and ``area`` as in :meth:`Teaching.teach`, and the file name of the ``mask``."""


@dataclass
class ImageState:
    """What is stored about one image of a review."""

    status: ReviewStatus = "open"
    revision: int = 0
    """Revision of the whole state at the last change of this image; 0 if it was never changed."""
    taught: TeachingUse | None = None
    """None if it is used neither as a reference nor as a negative."""
    change: float | None = None
    """Difference between the alphas before and after the last recompute, 0..1; see :func:`measure_change`."""
    undo: list[dict[str, Any]] = field(default_factory=list)
    """Entries of :class:`icm_cli.review.undo.UndoCopies`, one for each change that can be undone, newest last."""


class ReviewState:
    """State of all images of a review, by name. Images that were never changed are not stored.

    Every access reads the file again if another process has changed it.
    """

    def __init__(self, record_folder: Path) -> None:
        """Read the state. Raises UsageError if the file is damaged or of another version."""
        self._path = record_folder / STATE_NAME
        self._lock_path = record_folder / LOCK_NAME
        self._lock = threading.RLock()
        self._identity: tuple[int, int, int] | None = None
        """Identity of the file when it was read or written last; see :meth:`_read_identity`."""
        self._revision = 0
        self._images: dict[str, ImageState] = {}
        self._refresh()

    @property
    def revision(self) -> int:
        """Revision of the whole state. It grows with every change."""
        with self._lock:
            self._refresh()
            return self._revision

    def read(self, name: str) -> ImageState:
        """Return a copy of the state of an image."""
        return copy.deepcopy(self.read_all()[1].get(name, ImageState()))

    def read_all(self) -> tuple[int, Mapping[str, ImageState]]:
        """Return the revision and the stored states. Do not edit these: use :meth:`edit` or :meth:`edit_all`."""
        with self._lock:
            self._refresh()
            return self._revision, MappingProxyType(self._images)

    @contextlib.contextmanager
    def edit(self, name: str, revision: int | None = None) -> Iterator[ImageState]:
        """Context that yields the state of an image for editing. It is saved at the end, but not after an exception.

        Raises StaleRevisionError if ``revision`` is given and the image now has another one, and StateBusyError if
        another process holds the lock for ``LOCK_TIMEOUT_S``.
        """
        with self._saving() as images:
            image = images[name] = copy.deepcopy(images.get(name, ImageState()))
            if revision is not None and revision != image.revision:
                raise StaleRevisionError(
                    f"{name} was changed in another tab or by another person; its newest state is shown: check it, and "
                    "repeat your change if it is still needed"
                )
            yield image

    @contextlib.contextmanager
    def edit_all(self) -> Iterator[dict[str, ImageState]]:
        """Context that yields all stored states for editing. Those that differ at the end get a new revision."""
        with self._saving() as images:
            images |= copy.deepcopy(images)  # the old states must stay as they are, for the comparison when saving
            yield images

    @contextlib.contextmanager
    def _saving(self) -> Iterator[dict[str, ImageState]]:
        """Context that yields the states by name, and saves them at the end, but not after an exception.

        The mapping is a copy, but its states are not: to change a state, replace it by a changed copy.
        """
        with self._lock, locked_file(self._lock_path, LOCK_TIMEOUT_S) as is_free:
            if not is_free:
                raise StateBusyError(f"another process has used {self._lock_path} for too long; try again")
            self._refresh()
            images = dict(self._images)
            yield images
            self._save(images)

    def _save(self, images: dict[str, ImageState]) -> None:
        """Write the states to the file. Those that differ from the old ones get a new revision."""
        changed = [name for name, image in images.items() if image != self._images.get(name, ImageState())]
        if not changed:
            return
        revision = self._revision + 1
        for name in changed:
            images[name].revision = revision
        kept = {name: image for name, image in images.items() if image.revision}
        content = {name: vars(image) for name, image in kept.items()}
        text = json.dumps({"schema_version": SCHEMA_VERSION, "revision": revision, "images": content})
        with atomic_write(self._path) as file:
            file.write(text.encode())
        self._images, self._revision, self._identity = kept, revision, self._read_identity()

    def _refresh(self) -> None:
        """Read the file again if it has changed."""
        identity = self._read_identity()
        if identity == self._identity:
            return
        if identity is None:  # the file was removed: the review begins again, but revisions must still grow
            self._images, self._identity, self._revision = {}, None, self._revision + 1
            return
        content = read_json(self._path, "review", STATE_SCHEMA, EXPECTED)
        if content["schema_version"] != SCHEMA_VERSION:
            raise UsageError(
                f"review {self._path} has schema version {content['schema_version']}; this icm reads version "
                f"{SCHEMA_VERSION}; use the icm that wrote it"
            )
        for name, image in content["images"].items():
            if image["status"] not in get_args(ReviewStatus):
                raise UsageError(f"review {self._path}: {name} has the status {image['status']!r}; {EXPECTED}")
        keys = [field.name for field in dataclasses.fields(ImageState)]
        self._images = {
            name: ImageState(**{key: image[key] for key in keys}) for name, image in content["images"].items()
        }
        self._revision, self._identity = max(content["revision"], self._revision), identity

    def _read_identity(self) -> tuple[int, int, int] | None:
        """Return values that change whenever the file changes; None if it does not exist."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns
