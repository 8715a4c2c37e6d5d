"""Search the files of a dataset on disk, in its published folder layout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from icm_cli.datasets.groups import Sample
from icm_cli.errors import Problem, UsageError
from icm_cli.files import TEMPORARY_PREFIX, UNREADABLE, SkippedPaths, expand_glob, split_glob, walk_files
from icm_cli.images.image_file import IMAGE_SUFFIXES
from icm_cli.images.reading import CompositeSource

MAX_LISTED = 12
"""Maximum number of names listed in the error about a wrong data root."""

Files = dict[str, Path]
"""Files by the key that an image shares with its alpha and its trimap."""


@dataclass(frozen=True)
class Layout:
    """Folders of a dataset, relative to its root. ``trimaps`` is optional on disk."""

    images: str
    alphas: str
    trimaps: str | None = None
    key_pattern: str = "(?s).+"
    """Matches the key of an image, alpha or trimap: the start of its path in its folder, without suffix."""
    alpha_suffix: str = "$"
    """The key of an alpha without this pattern is the key of its image, for images with several alphas."""
    parent_folder: str = ""
    """A folder that contains all of these folders."""
    backgrounds_per_foreground: int = 0
    """If above 0, ``images`` are foregrounds, each composited onto this many backgrounds."""
    lists: tuple[str, ...] = ()
    """Text files. The first that exists lists the images of the dataset, one image or folder of images per line."""

    def describe(self) -> str:
        """Describe the layout for error messages."""
        prefix = f"{self.parent_folder}/" if self.parent_folder else ""
        listed = f", listed in {' or '.join(prefix + name for name in self.lists)}" if self.lists else ""
        return f"{prefix}{self.images}/ and {prefix}{self.alphas}/{listed}" + (
            f" (optionally {prefix}{self.trimaps}/)" if self.trimaps else ""
        )


@dataclass(frozen=True)
class FileSets:
    """The files of a dataset by kind and key."""

    images: Files
    alphas: Files
    trimaps: Files
    problems: tuple[Problem, ...] = ()
    """Files of one kind with the same key, of which only the first is used, and listed images that do not exist."""


def find_files(layouts: Sequence[Layout], root: Path, title: str) -> tuple[Layout, FileSets]:
    """Return the first of the layouts that exists at ``root``, in a folder of it or around it, and its files.

    The case of folder names is ignored. Raises UsageError, which lists the folders found and those expected.
    """
    if not root.is_dir():
        raise UsageError(f"data root {root} is not a folder; expected the folder of {title}")
    root = root.resolve()
    try:
        subfolders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise UsageError(
            f"data root {root} cannot be read: {error.strerror}; expected the folder of {title}"
        ) from error
    for layout in layouts:
        if found := _layout_files(layout, root):
            return layout, found
        matches = {base: found for base in subfolders if (found := _layout_files(layout, base))}
        if len(matches) > 1:
            raise UsageError(
                f"{title} was found in {' and in '.join(map(str, matches))}; give one of them as data root"
            )
        for found in matches.values():
            return layout, found
        for base in list(root.parents)[:3]:
            if found := _layout_files(layout, base, inside=root):
                return layout, found
    folders = (folder for layout in layouts for folder in _layout_folders(layout, root) or () if folder)
    if empty := next((folder for folder in folders if not list_images(folder)), None):
        raise UsageError(f"data root {root} does not contain {title}: {empty} contains no images")
    expected = "; or ".join(layout.describe() for layout in layouts)
    raise UsageError(f"data root {root} does not contain {title}: expected {expected}; found {_list_folder(root)}")


def find_file_sets(images: str, alphas: str, trimaps: str | None) -> FileSets:
    """Return the files of three folders or glob patterns. Raises UsageError if one has no images."""
    problems: list[Problem] = []
    options = zip((images, alphas, trimaps), ("--images", "--alphas", "--trimaps"), strict=True)
    found = [_find_matching(text, option, problems) if text else {} for text, option in options]
    return FileSets(found[0], found[1], found[2], tuple(problems))


def pair_files(layout: Layout, files: FileSets, backgrounds: Sequence[Path] = ()) -> tuple[list[Sample], list[Problem]]:
    """Return the samples sorted by name, and a problem for every file without a counterpart."""
    problems = list(files.problems)
    samples: list[Sample] = []
    used: set[str] = set()
    for number, (key, alpha) in enumerate(sorted(files.alphas.items())):
        image_key = re.sub(layout.alpha_suffix, "", key)
        image = files.images.get(image_key)
        if image is None:
            problems.append(Problem("missing-image", key, f"{alpha} has no image; expected one named {image_key}"))
            continue
        used.add(image_key)
        count = layout.backgrounds_per_foreground
        samples += [] if count else [Sample(key, image, alpha, files.trimaps.get(key))]
        for index in range(count):  # consecutive foregrounds use consecutive backgrounds
            composite = CompositeSource(image, alpha, backgrounds[(number * count + index) % len(backgrounds)])
            trimap = files.trimaps.get(f"{key}_{index}") or files.trimaps.get(key)
            samples.append(Sample(f"{key}_{index}", composite, alpha, trimap))
    problems += [
        Problem("missing-alpha", key, f"{image} has no alpha; expected one named {key}")
        for key, image in sorted(files.images.items())
        if key not in used
    ]
    if files.trimaps:
        problems += [
            Problem("missing-trimap", sample.name, f"{sample.file} has no trimap; it is generated from the alpha")
            for sample in samples
            if sample.trimap is None
        ]
    return samples, problems


def list_images(folder: Path) -> list[Path]:
    """Return all images in a folder and its subfolders, sorted, without hidden files; follow symbolic links.

    Raises UsageError if a folder cannot be read.
    """
    skipped: SkippedPaths = {}
    found = sorted(path for path in walk_files(folder, skipped) if _is_image_file(path))
    if unreadable := skipped.get(UNREADABLE):
        raise UsageError(
            f"{min(unreadable)} is {UNREADABLE}; without it the data would be incomplete; change its permissions"
        )
    return found


def _layout_files(layout: Layout, base: Path, inside: Path | None = None) -> FileSets | None:
    """Return the files of a layout at ``base``, whose images must be ``inside`` a folder if given; None without any."""
    folders = _layout_folders(layout, base)
    if folders is None or (inside and not folders[0].is_relative_to(inside)):
        return None
    problems: list[Problem] = []
    images, alphas, trimaps = (
        _index_by_key(list_images(folder), folder, layout.key_pattern, problems) if folder else {} for folder in folders
    )
    found = FileSets(images, alphas, trimaps, tuple(problems))
    if layout.lists:
        found = _apply_list(layout, base, found)
    return found if found.images and found.alphas else None


def _apply_list(layout: Layout, base: Path, files: FileSets) -> FileSets:
    """Return only the files that the list of the layout names. Raises UsageError if it cannot be read.

    A line of a DAVIS list begins with an image (``/JPEGImages/480p/goat/00000.jpg``) or is a folder (``goat``).
    """
    paths = [base / layout.parent_folder / name for name in layout.lists]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UsageError(
            f"{base} has no list of images; expected {' or '.join(map(str, paths))} with one image "
            "or folder of images per line; copy it from the published dataset"
        )
    try:
        names = [line.split()[0] for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"list {path} cannot be read ({reason}); expected one image or folder per line") from error
    names = [name.strip("/").removeprefix(f"{layout.images}/") for name in names]
    wanted = {str(PurePosixPath(name).with_suffix("")) if "/" in name else name for name in names}
    absent = wanted - {name for key in {*files.images, *files.alphas} for name in (key, key.split("/")[0])}
    problems = [Problem("absent-file", name, f"{path} lists {name}, but this image does not exist") for name in absent]

    def listed_files(found: Files) -> Files:
        return {key: file for key, file in found.items() if key in wanted or key.split("/")[0] in wanted}

    images, alphas, trimaps = map(listed_files, (files.images, files.alphas, files.trimaps))
    return FileSets(images, alphas, trimaps, (*files.problems, *sorted(problems, key=lambda problem: problem.name)))


def _layout_folders(layout: Layout, base: Path) -> tuple[Path, Path, Path | None] | None:
    """Return the folders of a layout at ``base``, or None if they do not exist."""
    parent = _find_subfolder(base, layout.parent_folder)
    images, alphas = (_find_subfolder(parent, folder) if parent else None for folder in (layout.images, layout.alphas))
    if parent is None or images is None or alphas is None:
        return None
    return images, alphas, _find_subfolder(parent, layout.trimaps) if layout.trimaps else None


def _find_subfolder(base: Path, relative_path: str) -> Path | None:
    """Return a subfolder, ignoring the case of its name, or None if it does not exist."""
    try:
        for name in PurePosixPath(relative_path).parts:
            path = base / name
            if not path.is_dir():
                path = next((folder for folder in base.iterdir() if folder.name.lower() == name.lower()), path)
            if not path.is_dir():
                return None
            base = path
    except OSError:  # no permission, such as lost+found next to the dataset
        return None
    return base


def _index_by_key(paths: Iterable[Path], root: Path, pattern: str, problems: list[Problem]) -> Files:
    """Return the files by key. Files with the key of an earlier file are added to ``problems``."""
    files: Files = {}
    for path in paths:
        name = path.relative_to(root).with_suffix("").as_posix()
        key = match[0] if (match := re.match(pattern, name)) else name
        if (first := files.setdefault(key, path)) != path:
            problems.append(Problem("same-name", key, f"{first} and {path} have the same name; only the first is used"))
    return files


def _find_matching(text: str, option: str, problems: list[Problem]) -> Files:
    """Return the files of a folder or glob pattern by key. Raises UsageError if it contains no images."""
    fixed, wildcards = split_glob(text)
    if wildcards:
        root = Path(fixed)
        paths = [path for path in sorted(expand_glob(text, skipped={})) if _is_image_file(path)]
    else:
        root = Path(text)
        if not root.is_dir():
            raise UsageError(f"{option} {text} is not a folder; expected a folder of images or a quoted glob")
        paths = list_images(root)
    if not paths:
        raise UsageError(f"{option} {text} contains no images; expected a folder of images or a quoted glob")
    return _index_by_key(paths, root, Layout.key_pattern, problems)


def _is_image_file(path: Path) -> bool:
    return (
        path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith((".", TEMPORARY_PREFIX)) and path.is_file()
    )


def _list_folder(root: Path) -> str:
    """Return the names in a folder for error messages."""
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in root.iterdir())
    if not names:
        return "nothing"
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
