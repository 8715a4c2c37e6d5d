"""Find the hint files of ``--hints``, assign them to images, and read the hints of each image."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

from icm_cli.environment import DEFAULT_WORKERS
from icm_cli.errors import ImageError, UsageError
from icm_cli.files.digests import combined_digest
from icm_cli.files.paths import UNREADABLE, SkippedPaths, walk_files
from icm_cli.files.system_errors import describe_os_error, retry_transient
from icm_cli.guidance.annotations import (
    OTHER_IMAGE,
    find_other_image,
    find_other_label,
    is_annotation,
    read_annotation,
    read_hints,
)
from icm_cli.guidance.hints import Area, Hints
from icm_cli.images.decoding import SourceFile, image_size
from icm_cli.images.image_file import IMAGE_SUFFIXES
from icm_cli.images.pixels import ImageWindows
from icm_cli.images.reading import read_stored_pixels
from icm_cli.matting.frames import PAGE_NUMBER, FrameName, FramePattern, page_name
from icm_cli.matting.sources import PathResolver, SkippedFiles, Sources, find_sources, name_below, real_path

JSON_SUFFIX = ".json"
SUFFIXES = (JSON_SUFFIX, ".png")
EXPECTED = "expected a folder of .json and .png files named like the images, or frames such as hints/sh010.####.json"
WITHOUT_IMAGE = "a hint without an image of its name"
OF_REFERENCE = "a hint for a reference, which is not matted; correct its mask instead"
OF_PAGES = "a hint for a file with several pages; add the number of a page to its name, as in scan.0001.json"
NOT_A_HINT = "not a hint; expected .json or .png"
MAX_CHECKED_PIXELS = 1 << 26
"""A file that states a larger image size is checked only when its image is read, to save memory."""


@dataclass(frozen=True)
class ImageHints:
    """The hint files of one image, and the digest of their content."""

    image: Path
    """Path of the image below the root."""
    paths: tuple[Path, ...]
    digest: str = ""
    notices: tuple[str, ...] = ()
    other_labels: Mapping[str, Path] = field(default_factory=dict)
    """Unknown labels, which are used as ``fg``; each with a file that has it."""

    @classmethod
    def from_files(cls, image: Path, paths: Sequence[Path], source: Path | None = None) -> ImageHints:
        """Read the files, and check what can be checked without decoding the image. Raises UsageError.

        ``source``: file of the image. Its size is used for annotations of labelme that do not state one.
        """
        hints = cls(image, tuple(sorted(paths, key=lambda path: (path.suffix.lower(), path))))
        digest = hints._content_digest()
        sizes = {path: hints._checked_size(path, source) for path in hints.paths}
        known_sizes = {path: size for path, size in sizes.items() if size and math.prod(size) <= MAX_CHECKED_PIXELS}
        parts = [hints._read_file(path, size) for path, size in known_sizes.items()]
        if len(set(known_sizes.values())) == 1:
            hints._merge(parts)  # raises UsageError for a contradiction
        notices = []
        other_labels = {}
        for path in filter(is_annotation, hints.paths):
            if path in known_sizes and (other_label := find_other_label(path)):
                other_labels[other_label] = path
            if other_image := find_other_image(path, image):
                notices.append(OTHER_IMAGE.format(path=path, name=other_image, image=image))
        return cls(image, hints.paths, digest, tuple(notices), other_labels)

    def read(self, windows: ImageWindows) -> Hints:
        """Return the hints in pixels of the data window of the image. ``windows``: those of the image.

        Raises ImageError if they are for an image of another size, or if the files changed after :meth:`from_files`.
        """
        from icm_cli.matting.hinting import move_hints  # imports torch, which scoring alone does not need

        try:
            if self._content_digest() != self.digest:
                raise ImageError(f"{self._title} changed during the run; run again")
            parts = [self._read_file(path, windows.display) for path in self.paths]
            return move_hints(self._merge(parts), windows)
        except UsageError as error:
            raise ImageError(str(error)) from error

    @property
    def _title(self) -> str:
        return f"hints {' and '.join(map(str, self.paths))}"

    def _content_digest(self) -> str:
        try:
            contents = [retry_transient(path.read_bytes) for path in self.paths]
        except OSError as error:
            raise UsageError(f"{self._title} cannot be read: {describe_os_error(error)}") from error
        return combined_digest(*(path.suffix.lower() for path in self.paths), *contents)

    def _checked_size(self, path: Path, source: Path | None) -> tuple[int, int] | None:
        """Return the height and width of the image with which a file is checked; None if they are not known.

        They are those that the file states, or else those of the source.
        """
        if path.suffix.lower() == JSON_SUFFIX:
            content = read_annotation(path)
            if content.get("shapes") == []:
                raise UsageError(f"annotation {path} has no shape; delete the file to remove the hints of {self.image}")
            size: tuple[Any, Any] = content.get("imageHeight"), content.get("imageWidth")
            if size == (None, None) and source is not None and "shapes" in content:
                with contextlib.suppress(ImageError):  # is reported when the image is matted
                    size = image_size(source)
        else:
            try:
                size = read_stored_pixels(path).values.shape[:2]
            except ImageError as error:
                raise UsageError(f"hint cannot be used: {error}{self._painted_advice}") from error
        height, width = size
        has_size = isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0
        return (height, width) if has_size else None

    def _read_file(self, path: Path, size: tuple[int, int]) -> Hints:
        try:
            return read_hints(path, size, image=self.image)
        except UsageError as error:
            advice = "" if path.suffix.lower() == JSON_SUFFIX else self._painted_advice
            raise UsageError(f"{error}{advice}") from error

    @property
    def _painted_advice(self) -> str:
        return f"; it was taken as the hints of {self.image}: if it is another image, give --hints another folder"

    def _merge(self, parts: Sequence[Hints]) -> Hints:
        """Join the hints of several files about this image. Raises UsageError if they contradict each other."""
        try:
            return reduce(_join_hints, parts)
        except UsageError as error:
            raise UsageError(f"{self._title} contradict each other: {error}") from error


@dataclass(frozen=True)
class HintFiles:
    """All files that ``--hints`` names."""

    where: str
    """Value of ``--hints``."""
    folder: Path | None
    """Real path of the folder; None for a frame pattern."""
    files: Mapping[str | int, Sequence[Path]]
    """Files by their path below the folder, without extension, or by their frame number."""
    real_paths: frozenset[Path]
    others: Sequence[Path] = ()
    """Files in the folder that are not hints."""
    _resolve: PathResolver = field(default_factory=PathResolver, repr=False, compare=False)

    @classmethod
    def find(cls, where: str, skipped_files: SkippedFiles) -> HintFiles:
        """Find the files of a folder or frame pattern. Raises UsageError if the folder does not exist.

        A pattern that matches no file is accepted with a notice, so that hints can be removed by deleting their files.
        """
        folder = Path(where)
        files: defaultdict[str | int, list[Path]] = defaultdict(list)
        others: list[Path] = []
        is_folder = retry_transient(folder.is_dir)
        if is_folder:
            skipped: SkippedPaths = {}
            for path in walk_files(folder, skipped):
                if path.suffix.lower() in SUFFIXES:
                    files[path.relative_to(folder).with_suffix("").as_posix()].append(path)
                else:
                    others.append(path)
            skipped_files.add(skipped.get(UNREADABLE, []), UNREADABLE)
        elif (pattern := FramePattern.parse(where)) is None:
            raise UsageError(f"--hints {where} {'is a file' if folder.exists() else 'does not exist'}; {EXPECTED}")
        else:
            for path in _find_numbered_files(where, pattern, skipped_files):
                number = FrameName.from_path(path).number
                if path.suffix.lower() not in SUFFIXES or number is None:
                    raise UsageError(f"--hints {where} names {path}; {EXPECTED}")
                files[number].append(path)
        real_paths = frozenset(real_path(path) for paths in files.values() for path in paths)
        return cls(where, real_path(folder) if is_folder else None, files, real_paths, others)

    @cached_property
    def _outer_folders(self) -> frozenset[Path]:
        """The folders that contain the folder of hints."""
        return frozenset() if self.folder is None else frozenset(self.folder.parents)

    def is_hint_file(self, path: Path, root: Path) -> bool:
        """Return whether a file below the root of the sources is a hint file, and not an image to matte.

        That is so if the folder of ``--hints`` is inside the root and contains it, if it matches the frame pattern of
        ``--hints``, or if it is a JSON file with hints.
        """
        if self.folder is not None and self._resolve(root) in self._outer_folders:
            return self.folder in self._resolve(path).parents
        may_be_hint = bool(self.real_paths) and (self.folder is None or path.suffix.lower() == JSON_SUFFIX)
        return may_be_hint and self._resolve(path) in self.real_paths

    def remove_hint_files(self, images: Sequence[Path], root: Path) -> list[Path]:
        """Return the images that are no hint files. Files are removed only if ``--hints`` and ``--src`` are one folder.

        There, a PNG is a hint if it has the name of another image: a.png or a.jpg.png for a.jpg.
        """
        if self.folder != real_path(root):
            return list(images)
        names_of_hints = {*images, *(path.with_suffix("") for path in images if path.suffix.lower() != ".png")}

        def is_hint(path: Path) -> bool:
            return path.with_suffix("") in names_of_hints and real_path(path) in self.real_paths

        return [path for path in images if not is_hint(path)]

    def assign_files(
        self, images: Sequence[Path], is_excluded: Callable[[Path], bool]
    ) -> tuple[dict[Path, list[Path]], dict[str | int, list[Path]]]:
        """Return the files of each image that has some, by its name; and the files of no image, by their key.

        ``images``: names of the images that are matted. ``is_excluded``: returns whether a file is an image or an
        output itself. Raises UsageError for a file that may belong to several images.
        """
        assigned: defaultdict[Path, list[Path]] = defaultdict(list)
        unused: dict[str | int, list[Path]] = {}
        images_by_key: defaultdict[str | int | None, list[Path]] = defaultdict(list)
        for image in images if self.files else ():
            for key in self._keys(image):
                images_by_key[key].append(image)
        for key, files in self.files.items():
            paths = [path for path in files if not is_excluded(path)]
            if not paths:
                continue
            # a.jpg.json belongs to a.jpg only, a.json to each image with the stem a.
            owners = [image for image in images_by_key[key] if image.as_posix() == key] or images_by_key[key]
            if len(owners) > 1:
                remedy = f"name it {owners[0].name}{paths[0].suffix}" if self.folder else "give --hints a folder"
                raise UsageError(f"hint {paths[0]} may belong to {owners[0]} or to {owners[1]}; {remedy}")
            if owners:
                assigned[owners[0]] += paths
            else:
                unused[key] = paths
        return assigned, unused

    def report_unused(
        self,
        unused: Mapping[str | int, Sequence[Path]],
        sources: Sources,
        files_with_pages: Set[Path],
        is_reference: Callable[[Path], bool],
        skipped_files: SkippedFiles,
    ) -> None:
        """Report files that belong to no source, a reference or a file with pages, and those that are not hints.

        Hints of images that are not matted are not reported, also if ``--src`` does not name these images. Files that
        are not hints are reported unless the folder contains the sources. ``unused``: see :meth:`assign_files`.
        ``files_with_pages``: the sources of which more than one page is matted.
        """
        keys_by_reason = defaultdict[str, set[str | int | None]](set)
        for path in sources.files if unused else ():
            reason = OF_REFERENCE if is_reference(path) else OF_PAGES if path in files_with_pages else ""
            keys_by_reason[reason] |= self._keys(name_below(path, sources.root))
        unknown_keys = unused.keys() - set().union(*keys_by_reason.values())
        if unknown_keys:
            keys_by_reason[WITHOUT_IMAGE] |= unknown_keys - self._keys_of_unlisted_images(unknown_keys, sources)
        for reason in (WITHOUT_IMAGE, OF_REFERENCE, OF_PAGES):
            unused_paths = [path for key, paths in unused.items() if key in keys_by_reason[reason] for path in paths]
            skipped_files.add(sorted(unused_paths), reason)
        real_root = real_path(sources.root)
        if self.folder not in (real_root, *real_root.parents):
            skipped_files.add(sorted(self.others), NOT_A_HINT)

    def _keys_of_unlisted_images(self, keys: Set[str | int], sources: Sources) -> set[str | int | None]:
        """Return those keys of images and pages that exist, although ``--src`` may name only some of them.

        The folders of the sources and of ``keys`` are searched. A folder that cannot be read has no images.
        """
        texts = [key for key in keys if isinstance(key, str)]
        keys_with_pages = {PAGE_NUMBER.sub("", key) for key in texts if PAGE_NUMBER.search(key)}
        folders = {path.parent for path in sources.files}
        folders |= {(sources.root / key).parent for key in texts}
        found: set[str | int | None] = set()
        for folder in folders:
            with contextlib.suppress(OSError):
                for path in folder.iterdir():
                    name = name_below(path, sources.root)
                    image_keys = self._keys(name)
                    may_have_pages = not image_keys.isdisjoint(keys_with_pages)
                    is_image = path.suffix.lower() in IMAGE_SUFFIXES and bool(may_have_pages or image_keys & keys)
                    if is_image and self._resolve(path) not in self.real_paths:
                        pages = range(SourceFile.inspect(path).frame_count if may_have_pages else 0)
                        found |= image_keys.union(*(self._keys(page_name(name, page)) for page in pages))
        return found

    def _keys(self, image: Path) -> set[str | int | None]:
        """Return the keys of ``files`` at which hints of an image may be. ``image``: its path below the root."""
        if self.folder is None:
            return {FrameName.from_path(image).number}
        has_suffix = image.suffix.lower() in IMAGE_SUFFIXES
        return {image.as_posix(), (image.with_suffix("") if has_suffix else image).as_posix()}


def _find_numbered_files(where: str, pattern: FramePattern, skipped_files: SkippedFiles) -> Sequence[Path]:
    """Return the files that match a frame pattern; if none matches, give a notice.

    Raises UsageError if the folder does not exist, or the suffix is not that of a hint file.
    """
    try:
        return find_sources(where, None, skipped_files).files
    except UsageError:
        folder = Path(pattern.folder)
        if Path(where).suffix.lower() not in SUFFIXES or not retry_transient(folder.is_dir):
            raise
        names = [path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
        skipped_files.notify(
            f"no hints match {where}, so no image has hints; if there are such files, check the name and the number "
            f"of digits, {pattern.digits} or more{pattern.similar_names(names)}"
        )
        return ()


def check_image_hints(
    files: Mapping[Path, Sequence[Path]], sources: Mapping[Path, Path | None]
) -> dict[Path, ImageHints]:
    """Read and check the hint files of several images, by the names of the images. Raises UsageError.

    ``sources``: the file of each image; None for an image of several pages, which may have different sizes.
    """
    with ThreadPoolExecutor(DEFAULT_WORKERS, "icm-hints") as executor:
        hints = executor.map(ImageHints.from_files, files, files.values(), map(sources.get, files))
        return dict(zip(files, hints, strict=True))


def _join_hints(first: Hints, second: Hints) -> Hints:
    def join(one: Area | None, other: Area | None) -> Area | None:
        if one is None or other is None:
            return one if other is None else other
        return one | other

    return Hints(
        size=first.size,
        points=[*first.points, *second.points],
        not_points=[*first.not_points, *second.not_points],
        boxes=[*first.boxes, *second.boxes],
        is_outlined=first.is_outlined or second.is_outlined,
        object_area=join(first.object_area, second.object_area),
        background_area=join(first.background_area, second.background_area),
        keep=join(first.keep, second.keep),
        drop=join(first.drop, second.drop),
    )
