"""Search the files of a dataset on disk, in its published folder layout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from icm_cli.datasets.groups import Sample
from icm_cli.errors import Problem, UsageError, list_first
from icm_cli.files.paths import UNREADABLE, SkippedPaths, expand_glob, split_glob, walk_files
from icm_cli.images.image_file import IMAGE_SUFFIXES
from icm_cli.images.reading import CompositeSource

MAX_LISTED = 12
"""Maximum number of names listed in the error about a wrong data root."""

Files = dict[str, Path]
"""Files by the key that an image shares with its alpha and its trimap."""


@dataclass(frozen=True)
class Layout:
    """Folders of a dataset, relative to its root. ``trimaps`` is optional on disk.

    Image, alpha and trimap of a sample have the same key, which is found from their names.
    """

    images: str
    alphas: str
    trimaps: str | None = None
    key_pattern: str = "(?s).+"
    """Matches the key of an image, alpha or trimap: the start of its path in its folder, without suffix."""
    alpha_suffix: str = "$"
    """What is removed from the key of an alpha to get the key of its image, if images have several alphas."""
    parent_folder: str = ""
    """Folder that contains all of these folders."""
    backgrounds_per_foreground: int = 0
    """If above 0, ``images`` are foregrounds, each composited onto this many backgrounds."""
    lists: tuple[str, ...] = ()
    """Text files. The first that exists lists the images of the dataset, one image or folder of images per line."""

    def describe(self) -> str:
        """Return the folders of the layout as text for error messages."""
        prefix = f"{self.parent_folder}/" if self.parent_folder else ""
        lists = " or ".join(prefix + name for name in self.lists)
        listed = f", listed in {lists}" if lists else ""
        trimaps = f" (optionally {prefix}{self.trimaps}/)" if self.trimaps else ""
        return f"{prefix}{self.images}/ and {prefix}{self.alphas}/{listed}{trimaps}"


@dataclass(frozen=True)
class FileSets:
    """The files of a dataset by kind and key."""

    images: Files
    alphas: Files
    trimaps: Files
    problems: tuple[Problem, ...] = ()
    """Files of one kind with the same key, of which only the first is used, and listed images that do not exist."""


def find_files(layouts: Sequence[Layout], root: Path, title: str) -> tuple[Layout, FileSets]:
    """Return the first of the layouts that exists on disk, and its files. ``title``: name of the dataset.

    Each layout is searched at ``root``, then in its subfolders, then in the three folders above it; above it, the
    images must be inside ``root``. The case of folder names is ignored. Raises UsageError.
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
        if files := _search_layout(layout, root, subfolders, title):
            return layout, files
    raise UsageError(f"data root {root} does not contain {title}: {_describe_missing_layouts(layouts, root)}")


def _describe_missing_layouts(layouts: Sequence[Layout], root: Path) -> str:
    """Return why a folder has none of the layouts: an empty folder, or the folders expected and those found."""
    for layout in layouts:
        for existing in _layout_folders(layout, root) or ():
            if existing and not list_images(existing):
                return f"{existing} contains no images"
    expected = "; or ".join(layout.describe() for layout in layouts)
    return f"expected {expected}; found {_list_folder(root)}"


def _search_layout(layout: Layout, root: Path, subfolders: Sequence[Path], title: str) -> FileSets | None:
    """Return the files of a layout, searched as in :func:`find_files`; None without any. Raises UsageError."""
    if files := _layout_files(layout, root):
        return files
    matches = {folder: files for folder in subfolders if (files := _layout_files(layout, folder))}
    if len(matches) > 1:
        raise UsageError(f"{title} was found in {' and in '.join(map(str, matches))}; give one of them as data root")
    if matches:
        return next(iter(matches.values()))
    for folder in list(root.parents)[:3]:
        if files := _layout_files(layout, folder, inside=root):
            return files
    return None


def find_file_sets(images: str, alphas: str, trimaps: str | None) -> FileSets:
    """Return the files of three folders or glob patterns. Raises UsageError if one has no images."""
    problems: list[Problem] = []
    image_files = _find_matching(images, "--images", problems)
    alpha_files = _find_matching(alphas, "--alphas", problems)
    trimap_files = _find_matching(trimaps, "--trimaps", problems) if trimaps else {}
    return FileSets(image_files, alpha_files, trimap_files, tuple(problems))


def pair_files(layout: Layout, files: FileSets, backgrounds: Sequence[Path] = ()) -> tuple[list[Sample], list[Problem]]:
    """Return the samples sorted by name, and a problem for every file without a counterpart.

    Consecutive foregrounds use consecutive ``backgrounds``, and the first one again after the last.
    """
    problems = list(files.problems)
    samples: list[Sample] = []
    used_images: set[str] = set()
    composites = layout.backgrounds_per_foreground
    for number, (key, alpha) in enumerate(sorted(files.alphas.items())):
        image_key = re.sub(layout.alpha_suffix, "", key)
        image = files.images.get(image_key)
        if image is None:
            problems.append(Problem("missing-image", key, f"{alpha} has no image; expected one named {image_key}"))
            continue
        used_images.add(image_key)
        trimap = files.trimaps.get(key)
        if not composites:
            samples.append(Sample(key, image, alpha, trimap))
        for index in range(composites):
            name = f"{key}_{index}"
            composite = CompositeSource(image, alpha, backgrounds[(number * composites + index) % len(backgrounds)])
            samples.append(Sample(name, composite, alpha, files.trimaps.get(name) or trimap))
    problems += [
        Problem("missing-alpha", key, f"{image} has no alpha; expected one named {key}")
        for key, image in sorted(files.images.items())
        if key not in used_images
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
    images = sorted(path for path in walk_files(folder, skipped) if _is_image_file(path))
    if unreadable := skipped.get(UNREADABLE):
        raise UsageError(
            f"{min(unreadable)} is {UNREADABLE}; without it the data would be incomplete; change its permissions"
        )
    return images


def _layout_files(layout: Layout, base: Path, inside: Path | None = None) -> FileSets | None:
    """Return the files of a layout whose folders are in ``base``; None if there are no images or no alphas.

    ``inside``: the folder of the images must be this folder or in it.
    """
    folders = _layout_folders(layout, base)
    if folders is None:
        return None
    image_folder, alpha_folder, trimap_folder = folders
    if inside and not image_folder.is_relative_to(inside):
        return None
    problems: list[Problem] = []
    pattern = layout.key_pattern
    images = _index_by_key(list_images(image_folder), image_folder, pattern, problems)
    alphas = _index_by_key(list_images(alpha_folder), alpha_folder, pattern, problems)
    trimaps = _index_by_key(list_images(trimap_folder), trimap_folder, pattern, problems) if trimap_folder else {}
    files = FileSets(images, alphas, trimaps, tuple(problems))
    if layout.lists:
        files = _apply_list(layout, base, files)
    return files if files.images and files.alphas else None


def _apply_list(layout: Layout, base: Path, files: FileSets) -> FileSets:
    """Return only the files that the list of the layout names. Raises UsageError if it cannot be read."""
    path, names = _read_list(layout, base)
    keys = {*files.images, *files.alphas}
    absent = names - keys - {key.split("/")[0] for key in keys}  # a list names images, or folders of images
    problems = [
        Problem("absent-file", name, f"{path} lists {name}, but there is no image or folder of this name")
        for name in sorted(absent)
    ]

    def select_listed(files_by_key: Files) -> Files:
        return {key: file for key, file in files_by_key.items() if key in names or key.split("/")[0] in names}

    images, alphas, trimaps = map(select_listed, (files.images, files.alphas, files.trimaps))
    return FileSets(images, alphas, trimaps, (*files.problems, *problems))


def _read_list(layout: Layout, base: Path) -> tuple[Path, set[str]]:
    """Return the path of the list of a layout, and the keys of images and names of folders in it. Raises UsageError.

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
    # With a slash, a name is the path of an image; without one, it is a folder.
    return path, {str(PurePosixPath(name).with_suffix("")) if "/" in name else name for name in names}


def _layout_folders(layout: Layout, base: Path) -> tuple[Path, Path, Path | None] | None:
    """Return the folders of images, alphas and trimaps in ``base``; None without images or alphas."""
    parent = _find_subfolder(base, layout.parent_folder)
    if parent is None:
        return None
    images, alphas = _find_subfolder(parent, layout.images), _find_subfolder(parent, layout.alphas)
    if images is None or alphas is None:
        return None
    return images, alphas, _find_subfolder(parent, layout.trimaps) if layout.trimaps else None


def _find_subfolder(base: Path, relative_path: str) -> Path | None:
    """Return a folder below ``base``, ignoring the case of names, or None if it does not exist."""
    folder = base
    try:
        for name in PurePosixPath(relative_path).parts:
            matches = [path for path in folder.iterdir() if path.name.lower() == name.lower() and path.is_dir()]
            if not matches:
                return None
            folder = min(matches, key=lambda path: path.name != name)  # one of exactly this name first
    except OSError:  # no permission, such as lost+found next to the dataset
        return None
    return folder


def _index_by_key(paths: Iterable[Path], root: Path, pattern: str, problems: list[Problem]) -> Files:
    """Return key -> path, for files below ``root``. ``pattern``: as :attr:`Layout.key_pattern`.

    Of files with the same key, the first is used. The others are added to ``problems``.
    """
    files: Files = {}
    for path in paths:
        name = path.relative_to(root).with_suffix("").as_posix()
        match = re.match(pattern, name)
        key = match[0] if match else name
        first = files.setdefault(key, path)
        if first != path:
            problems.append(Problem("same-name", key, f"{first} and {path} have the same name; only the first is used"))
    return files


def _find_matching(pattern: str, option: str, problems: list[Problem]) -> Files:
    """Return key -> path, for the images of a folder or glob pattern. Raises UsageError if there are none."""
    fixed, wildcards = split_glob(pattern)
    if wildcards:
        root = Path(fixed)
        paths = [path for path in sorted(expand_glob(pattern, skipped={})) if _is_image_file(path)]
    else:
        root = Path(pattern)
        if not root.is_dir():
            raise UsageError(f"{option} {pattern} is not a folder; expected a folder of images or a quoted glob")
        paths = list_images(root)
    if not paths:
        raise UsageError(f"{option} {pattern} contains no images; expected a folder of images or a quoted glob")
    return _index_by_key(paths, root, Layout.key_pattern, problems)


def _is_image_file(path: Path) -> bool:
    """Return whether a path is a file with the suffix of an image that is not hidden."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _list_folder(root: Path) -> str:
    """Return the names in a folder for error messages."""
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in root.iterdir())
    return list_first(names, MAX_LISTED) or "nothing"
