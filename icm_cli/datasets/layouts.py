"""Find a dataset's files on disk, as published, below whatever root the user has them in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from icm_cli.datasets.samples import Sample
from icm_cli.errors import Problem, UsageError
from icm_cli.files import TEMPORARY_PREFIX, UNREADABLE, SkippedPaths, expand_glob, split_glob, walk_files
from icm_cli.images.kinds import IMAGE_SUFFIXES
from icm_cli.images.reading import CompositeSource

MOST_LISTED = 12
"""Names listed in an error about a wrong root."""

Files = dict[str, Path]
"""Files by the key that an image, its alpha and its trimap share."""


def same(key: str) -> str:
    """Images, alphas and trimaps are named alike."""
    return key


def leading_number(key: str) -> str:
    """``00012_input`` -> ``00012``."""
    found = re.match(r"\d+", key)
    return found[0] if found else key


def without_last_number(key: str) -> str:
    """``street_2`` -> ``street``: several alphas of one image."""
    return re.sub(r"_\d+$", "", key)


def without_label_and_box(key: str) -> str:
    """``00a1_m01bjv_7f3e`` -> ``00a1``: Open Images' masks are named image, label, box."""
    return re.sub(r"_[^_/]+_[^_/]+$", "", PurePosixPath(key).name)


@dataclass(frozen=True)
class Layout:
    """Folders below a dataset's root. ``trimaps`` may be absent on disk, the others may not."""

    images: str
    alphas: str
    trimaps: str | None = None
    key: Callable[[str], str] = same
    """From a file's path below its folder, suffix left out, to the name that image, alpha and trimap share."""
    image_of: Callable[[str], str] = same
    """From an alpha's key to its image's, where several alphas belong to one image."""
    under: str = ""
    """A folder that all of them are in."""
    backgrounds_each: int = 0
    """Above 0, ``images`` holds foregrounds, each to be put on that many backgrounds."""
    lists: tuple[str, ...] = ()
    """Text files; the first that is there names the images that count, one image or folder of images a line."""

    def expected(self) -> str:
        """Description of the layout, for error messages."""
        under = f"{self.under}/" if self.under else ""
        listed = f", listed in {' or '.join(under + name for name in self.lists)}" if self.lists else ""
        return f"{under}{self.images}/ and {under}{self.alphas}/{listed}" + (
            f" (and perhaps {under}{self.trimaps}/)" if self.trimaps else ""
        )


@dataclass(frozen=True)
class FileSets:
    """The files of one dataset, each kind by its key."""

    images: Files
    alphas: Files
    trimaps: Files
    problems: tuple[Problem, ...] = ()
    """Files of one kind that share a key, so that only the first is taken, and listed images that are not there."""


def find_files(layouts: Sequence[Layout], root: Path, title: str) -> tuple[Layout, FileSets]:
    """The first layout that lies below ``root``, and its files.

    ``root`` may also be a folder above the published root, or one inside it; the case of folder names does not
    predictor. Raises UsageError that lists what was found and what was expected.
    """
    if not root.is_dir():
        raise UsageError(f"data root {root} is not a folder; expected {title} there")
    root = root.resolve()
    below = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    for layout in layouts:
        if found := _files_at(layout, root):
            return layout, found
        there = {base: found for base in below if (found := _files_at(layout, base))}
        if len(there) > 1:
            raise UsageError(
                f"{title} seems to be in {' and in '.join(map(str, there))}; give one of them as data root"
            )
        for found in there.values():
            return layout, found
        for base in list(root.parents)[:3]:
            if found := _files_at(layout, base, inside=root):
                return layout, found
    for layout in layouts:
        if folders := _at(layout, root):
            raise UsageError(f"data root {root} does not hold {title}: {_empty(folders)} holds no images")
    expected = "; or ".join(layout.expected() for layout in layouts)
    raise UsageError(f"data root {root} does not hold {title}: expected {expected}; found {_listing(root)}")


def find_by_pattern(images: str, alphas: str, trimaps: str | None) -> FileSets:
    """Files of three folders or quoted globs; raises UsageError for one that holds no image."""
    clashes: list[Problem] = []
    options = zip((images, alphas, trimaps), ("--images", "--alphas", "--trimaps"), strict=True)
    found = [_matching(text, option, clashes) if text else {} for text, option in options]
    return FileSets(found[0], found[1], found[2], tuple(clashes))


def pair(layout: Layout, files: FileSets, backgrounds: Sequence[Path] = ()) -> tuple[list[Sample], list[Problem]]:
    """Samples in the order of their names, and what has no partner."""
    problems = list(files.problems)
    samples: list[Sample] = []
    used: set[str] = set()
    for key, alpha in sorted(files.alphas.items()):
        image_key = layout.image_of(key)
        image = files.images.get(image_key)
        if image is None:
            problems.append(Problem("missing-image", key, f"{alpha} has no image; expected one named {image_key}"))
            continue
        used.add(image_key)
        samples += (
            _composites(layout, files, key, backgrounds)
            if layout.backgrounds_each
            else [Sample(key, image, alpha, files.trimaps.get(key))]
        )
    problems += [
        Problem("missing-alpha", key, f"{image} has no alpha; expected one named {key}")
        for key, image in sorted(files.images.items())
        if key not in used
    ]
    if files.trimaps:
        problems += [
            Problem("missing-trimap", sample.name, f"{sample.file} has no trimap; one is made from its alpha")
            for sample in samples
            if sample.trimap is None
        ]
    return samples, problems


def _composites(layout: Layout, files: FileSets, key: str, backgrounds: Sequence[Path]) -> Iterator[Sample]:
    """One foreground on its share of the backgrounds: the next ``backgrounds_each`` of them for each foreground."""
    each = layout.backgrounds_each
    first = sorted(files.alphas).index(key) * each
    for number in range(each):
        background = backgrounds[(first + number) % len(backgrounds)]
        name = f"{key}_{number}"
        composite = CompositeSource(files.images[layout.image_of(key)], files.alphas[key], background)
        yield Sample(name, composite, files.alphas[key], files.trimaps.get(name) or files.trimaps.get(key))


def image_files(folder: Path) -> list[Path]:
    """Every image below a folder, hidden ones left out, sorted; links to folders elsewhere are followed.

    Raises UsageError for a folder that cannot be read.
    """
    passed: SkippedPaths = {}
    found = sorted(path for path in walk_files(folder, passed) if _is_image(path))
    if unreadable := passed.get(UNREADABLE):
        raise UsageError(f"{min(unreadable)} is {UNREADABLE}; a part of the data would be missing, so mend its rights")
    return found


def _files_at(layout: Layout, base: Path, inside: Path | None = None) -> FileSets | None:
    """The files of a layout that begins at ``base``; ``inside``: only where its images lie in that folder."""
    folders = _at(layout, base)
    if folders is None or (inside and not folders[0].is_relative_to(inside)):
        return None
    clashes: list[Problem] = []
    images, alphas, trimaps = (
        _by_key(image_files(folder), folder, layout.key, clashes) if folder else {} for folder in folders
    )
    found = FileSets(images, alphas, trimaps, tuple(clashes))
    if layout.lists:
        found = _listed(layout, base, found)
    return found if found.images and found.alphas else None


def _listed(layout: Layout, base: Path, files: FileSets) -> FileSets:
    """The files that the layout's list names; what it names and is not there becomes a problem.

    A line of DAVIS' lists begins with an image (``/JPEGImages/480p/goat/00000.jpg``), or is a folder (``goat``).
    Raises UsageError where there is no list, or one that cannot be read.
    """
    places = [base / layout.under / name for name in layout.lists]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise UsageError(
            f"{base} has no list of the images that count; expected {' or '.join(map(str, places))}; put it there, "
            "one image or folder of images a line"
        )
    try:
        names = [line.split()[0] for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(f"list {path} cannot be read ({error}); expected one image or folder a line") from error
    names = [name.strip("/").removeprefix(f"{layout.images}/") for name in names]
    wanted = {str(PurePosixPath(name).with_suffix("")) if "/" in name else name for name in names}
    absent = wanted - {name for key in {*files.images, *files.alphas} for name in (key, key.split("/")[0])}
    problems = [Problem("absent-file", name, f"{path} names {name}, but there is no such image") for name in absent]

    def of_the_list(found: Files) -> Files:
        return {key: file for key, file in found.items() if key in wanted or key.split("/")[0] in wanted}

    images, alphas, trimaps = map(of_the_list, (files.images, files.alphas, files.trimaps))
    return FileSets(images, alphas, trimaps, (*files.problems, *sorted(problems, key=lambda each: each.name)))


def _at(layout: Layout, base: Path) -> tuple[Path, Path, Path | None] | None:
    home = _descend(base, layout.under)
    images, alphas = (_descend(home, folder) if home else None for folder in (layout.images, layout.alphas))
    if home is None or images is None or alphas is None:
        return None
    return images, alphas, _descend(home, layout.trimaps) if layout.trimaps else None


def _empty(folders: Sequence[Path | None]) -> Path:
    return next(folder for folder in folders if folder and not image_files(folder))


def _descend(base: Path, folders: str) -> Path | None:
    """A folder below another, whatever the case of the names; None where it is not there."""
    try:
        for name in PurePosixPath(folders).parts:
            exact = base / name
            alike = [path for path in base.iterdir() if path.name.lower() == name.lower()] if not exact.is_dir() else []
            base = alike[0] if alike else exact
            if not base.is_dir():
                return None
    except PermissionError:  # such as lost+found beside the dataset
        return None
    return base


def _by_key(paths: Iterable[Path], root: Path, key: Callable[[str], str], clashes: list[Problem]) -> Files:
    files: Files = {}
    for path in paths:
        name = key(path.relative_to(root).with_suffix("").as_posix())
        if (first := files.setdefault(name, path)) != path:
            clashes.append(Problem("same-name", name, f"{first} and {path} share a name; only the first is taken"))
    return files


def _matching(text: str, option: str, clashes: list[Problem]) -> Files:
    fixed, wildcards = split_glob(text)
    if wildcards:
        root = Path(fixed)
        paths = [path for path in sorted(expand_glob(text, {})) if _is_image(path)]
    else:
        root = Path(text)
        if not root.is_dir():
            raise UsageError(f"{option} {text} is not a folder; expected a folder of images or a quoted glob")
        paths = image_files(root)
    if not paths:
        raise UsageError(f"{option} {text} holds no images; expected a folder of images or a quoted glob")
    return _by_key(paths, root, same, clashes)


def _is_image(path: Path) -> bool:
    return (
        path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith((".", TEMPORARY_PREFIX)) and path.is_file()
    )


def _listing(root: Path) -> str:
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in root.iterdir())
    if not names:
        return "nothing"
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return ", ".join(names[:MOST_LISTED]) + more
