"""Parse frame numbers in names, patterns (``shot.####.exr``) and ranges (``1001-1100x2``)."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from fileseq import constants, filesequence, frameset

from icm_cli.errors import UsageError, list_first, shorten
from icm_cli.files.paths import MAX_NAME_BYTES

_NUMBERED = re.compile(r"(?P<stem>.*?)(?P<frame>[._-]?(?P<number>[0-9]{1,255}))", re.DOTALL)
_PLACEHOLDER = re.compile(
    r"##+|@@+"
    r"|[#@](?![^\W_])"  # icon@2x and take#1 are names
    r"|%[0-9]+d|%d(?![^\W\d_])"  # 100%done is a name
    r"|\$F[0-9]+|\$F(?![^\W\d_])"  # $Final is a name
)
_RANGE = re.compile(r"(?P<first>-?[0-9]{1,99})(?:-(?P<last>-?[0-9]{1,99})(?:(?P<mode>[xy:])-?(?P<step>[0-9]{1,99}))?)?")
_NUMBERS = re.compile("[0-9]+")
PAGE_NUMBER = re.compile(r"\.\d{4,}(?=(\.[^./]*)?$)")
"""Number in the name of a page, which the name of its file does not have."""
_NUMBER_MARK = "\0"
"""Marks the place of the number while wildcards are translated to a regular expression. No file name contains it."""

MAX_LISTED_RANGES = 12
"""Largest number of ranges that a message lists."""
MAX_SIMILAR_NAMES = 3
"""Largest number of similar names that a message lists."""
MAX_EXPANDED_FRAMES = 10_000
"""Largest number of frames that are enumerated one by one."""


@dataclass(frozen=True)
class FrameName:
    """The parts of a file's stem.

    ``shot.1001`` has the stem ``shot``, the frame ``.1001`` and the number 1001.
    """

    stem: str
    frame: str = ""
    """Separator and digits; "" if there is no number."""
    number: int | None = None

    @classmethod
    def from_path(cls, path: Path) -> FrameName:
        """Split the name of a file."""
        match = _NUMBERED.fullmatch(path.stem)
        return cls(match["stem"], match["frame"], int(match["number"])) if match else cls(path.stem)


def page_name(name: Path, page: int) -> Path:
    """Return the name of a page (from 0) of a file with several, such as scan.0001.tif for the first one."""
    return name.with_name(f"{name.stem}.{page + 1:04d}{name.suffix}")


@dataclass(frozen=True)
class FramePattern:
    """A path with a placeholder for the frame number, in any notation of ``fileseq``."""

    folder: str
    before: str
    """Text before the number."""
    after: str
    """Text after the number."""
    digits: int
    """Minimum number of digits."""

    @classmethod
    def parse(cls, text: str) -> FramePattern | None:
        """Parse a path.

        Returns None if it has no placeholder. ``#`` and ``@`` that are part of a name, as in ``icon@2x.####.png``, are
        ordinary characters. Raises UsageError if several placeholders are equally plausible.
        """
        folder, name = str(Path(text).parent), Path(text).name
        placeholders = list(_PLACEHOLDER.finditer(name))
        if not placeholders:
            return None
        ranks = [_placeholder_rank(name, placeholder) for placeholder in placeholders]
        if ranks.count(max(ranks)) > 1:
            raise UsageError(
                f"{text} has {ranks.count(max(ranks))} placeholders for a frame number; expected one, as in "
                "shot.####.exr"
            )
        token = placeholders[ranks.index(max(ranks))]
        sequence = filesequence.FileSequence(f"x.{token[0]}.x", pad_style=constants.PAD_STYLE_HASH1)
        digits = max(1, sequence.zfill())
        if digits > MAX_NAME_BYTES:
            raise UsageError(f"{text} has a frame number of {digits} digits; expected at most {MAX_NAME_BYTES}")
        return cls(folder, name[: token.start()], name[token.end() :], digits)

    def matching_names(self, names: Iterable[str]) -> list[str]:
        """Return the names that match. The text around the number may have wildcards.

        With four digits, 0001 and 10000 match, but 1 and 00001 do not.
        """
        number = r"\\d+" if self.digits == 1 else rf"(?:\\d{{{self.digits}}}|[1-9]\\d{{{self.digits},}})"
        expression = self._compile_expression(number)
        return [name for name in names if expression.match(name)]

    def names_with_other_numbers(self, names: Iterable[str]) -> list[str]:
        """Return the names that differ from the pattern only in sign or digits of their number."""
        names, expression = list(names), self._compile_expression(r"-?\\d+")
        matching = set(self.matching_names(names))
        return [name for name in names if name not in matching and expression.match(name)]

    def similar_names(self, names: Iterable[str]) -> str:
        """Return the names that are most similar to the pattern, as the end of a message; "" if none is similar.

        Names that differ only in their numbers are listed once.
        """
        groups: dict[str, list[str]] = {}
        for name in sorted(names):
            groups.setdefault(_NUMBERS.sub("0", name), []).append(name)
        similar = get_close_matches(_NUMBERS.sub("0", self.frame_name(0)), groups, n=MAX_SIMILAR_NAMES)
        listed = [list_first(groups[name]) for name in similar]
        return f"; similar names in {self.folder}: {', '.join(listed)}" if listed else ""

    def _compile_expression(self, number: str) -> re.Pattern[str]:
        """Return the regular expression of this pattern.

        ``number``: the expression for the number, with doubled backslashes, because re.sub inserts it.
        """
        expression = fnmatch.translate(self.before + _NUMBER_MARK + self.after)
        return re.compile(re.sub(r"\\?\x00", number, expression))

    def escape_wildcards(self) -> FramePattern:
        """Return the pattern with brackets and other wildcards as ordinary characters."""
        return replace(self, before=glob.escape(self.before), after=glob.escape(self.after))

    def frame_name(self, number: int) -> str:
        """Return the file name of a frame."""
        return f"{self.before}{number:0{self.digits}d}{self.after}"

    def __str__(self) -> str:
        return str(Path(self.folder, f"{self.before}{'#' * self.digits}{self.after}"))


@dataclass(frozen=True)
class FrameRanges:
    """Frame numbers as disjoint ranges, so that a range of a million frames costs no more than one of ten."""

    ranges: tuple[range, ...] = ()
    """Ascending ranges without common numbers."""

    def __contains__(self, number: int | None) -> bool:
        return number is not None and any(number in frames for frames in self.ranges)

    def __iter__(self) -> Iterator[int]:
        return itertools.chain.from_iterable(self.ranges)

    @property
    def count(self) -> int:
        """Number of frames. It may be too large for len()."""
        return sum((frames.stop - frames.start + frames.step - 1) // frames.step for frames in self.ranges)

    def without(self, numbers: Iterable[int]) -> FrameRanges:
        """Return the ranges without these numbers."""
        ordered = sorted(set(numbers))
        return FrameRanges(tuple(part for frames in self.ranges for part in _split_range(frames, ordered)))

    def __str__(self) -> str:
        """Return the numbers as text, such as ``1001-1003,1010``. Only the first of many ranges are listed."""
        if self.count <= MAX_EXPANDED_FRAMES:
            parts = str(frameset.FrameSet.framesToFrameRange(sorted(self))).split(",")
        else:
            parts = [_format_range(frames) for frames in sorted(self.ranges, key=lambda frames: frames.start)]
        more = f" and {len(parts) - MAX_LISTED_RANGES} more ranges" if len(parts) > MAX_LISTED_RANGES else ""
        return ",".join(parts[:MAX_LISTED_RANGES]) + more


def parse_frame_range(text: str) -> FrameRanges:
    """Return the numbers of ``1001-1100x2`` or ``1001,1005-1010``. Raises UsageError."""
    ranges: list[range] = []
    shown = shorten(text)
    for part in filter(None, "".join(text.split()).split(",")):
        added = _parse_range_part(part, shown)
        for earlier in tuple(ranges):  # keep the ranges without common numbers
            added = [rest for new in added for rest in _subtract_range(new, earlier, shown)]
        ranges += added
    if not text.strip(" ,"):
        raise UsageError(f"--frames {shown!r} has no frames; expected a range such as 1001-1100 or 1001-1100x2")
    frames = FrameRanges(tuple(ranges))
    if frames.count > constants.MAX_FRAME_SIZE:
        raise UsageError(
            f"--frames {shown!r} has too many frames; expected at most {constants.MAX_FRAME_SIZE}; give a smaller range"
        )
    return frames


def _parse_range_part(part: str, text: str) -> list[range]:
    """Return the numbers of a part of the frame range ``text``, such as ``1001-1100x2``. Raises UsageError."""
    match = _RANGE.fullmatch(part)
    step = int(match["step"] or 1) if match else 0
    if match is None or step < 1:
        raise UsageError(f"--frames {text!r} is not a frame range; expected a range such as 1001-1100 or 1001-1100x2")
    first = int(match["first"])
    last = int(match["last"] or first)
    full = range(min(first, last), max(first, last) + 1)
    if match["mode"] not in ("x", "y"):
        return [full]
    # Steps are counted from the first number, also in 10-1x3, which is 10, 7, 4, 1.
    stepped = full[::step] if first <= last else full[::-1][::step][::-1]
    return [stepped] if match["mode"] == "x" else _subtract_range(full, stepped, text)


def _split_range(frames: range, numbers: Sequence[int]) -> list[range]:
    """Return a range without some numbers, as ranges. ``numbers``: in ascending order; others are ignored."""
    parts, start = [], 0
    for number in numbers[bisect_left(numbers, frames.start) : bisect_right(numbers, frames[-1])]:
        if number in frames:
            index = frames.index(number)
            parts.append(frames[start:index])
            start = index + 1
    parts.append(frames[start:])
    return [part for part in parts if part]


def _subtract_range(frames: range, other: range, text: str) -> list[range]:
    """Return the numbers of ``frames`` that are not in ``other``, as few ranges. Raises UsageError for too many.

    If every n-th number is removed, the rest can be written in two ways: the pieces between the removed numbers, or
    n - 1 ranges with n times the step. The way with fewer ranges is used.
    """
    common = _common_frames(frames, other)
    if not common:
        return [frames]
    start, end = frames.index(common[0]), frames.index(common[-1])
    period = common.step // frames.step  # n
    count = (common[-1] - common[0]) // common.step + 1
    if min(period, count) > MAX_EXPANDED_FRAMES:
        raise UsageError(f"--frames {text!r} has too many separate ranges; give fewer or simpler ranges")
    if count <= period:
        return _split_range(frames, list(common))
    between = [frames[start + offset : end : period] for offset in range(1, period)]
    return [part for part in (frames[:start], *between, frames[end + 1 :]) if part]


def _common_frames(frames: range, other: range) -> range:
    """Return the numbers that are in both ranges."""
    divisor = math.gcd(frames.step, other.step)
    if (other.start - frames.start) % divisor:
        return range(0)
    # Chinese remainder theorem: if both ranges had no ends, their common numbers would be first + n * step.
    period = other.step // divisor
    offset = (other.start - frames.start) // divisor * pow(frames.step // divisor, -1, period) % period
    first, step = frames.start + offset * frames.step, frames.step * period
    too_low = max(0, max(frames.start, other.start) - first)  # how far ``first`` is below the start of a range
    first += (too_low + step - 1) // step * step
    return range(first, min(frames.stop, other.stop), step)


def _format_range(frames: range) -> str:
    if frames[0] == frames[-1]:
        return f"{frames[0]}"
    return f"{frames[0]}-{frames[-1]}" + (f"x{frames.step}" if frames.step > 1 else "")


def missing_frames(
    paths: Sequence[Path], wanted: FrameRanges | None, ignored: Iterable[Path] = ()
) -> dict[FramePattern, FrameRanges]:
    """Return the missing frame numbers of each sequence, by its pattern, such as ``shot.####.exr``.

    ``wanted``: the expected numbers; None for all between the first and the last frame of a sequence. ``ignored``:
    existing files that are not in ``paths``, such as excluded ones. Their numbers are not missing.
    """
    patterns = _find_patterns([*paths, *ignored])
    existing: dict[FramePattern, set[int]] = {}
    for pattern, number in patterns.values():
        existing.setdefault(pattern, set()).add(number)
    numbers_of_paths: dict[FramePattern, list[int]] = {}
    for path in paths:
        if path in patterns:
            pattern, number = patterns[path]
            numbers_of_paths.setdefault(pattern, []).append(number)
    missing = {}
    for pattern, numbers in numbers_of_paths.items():
        expected = FrameRanges((range(min(numbers), max(numbers) + 1),)) if wanted is None else wanted
        absent = expected.without(existing[pattern])
        if absent.ranges:
            missing[pattern] = absent
    return missing


def _find_patterns(paths: Sequence[Path]) -> dict[Path, tuple[FramePattern, int]]:
    """Return the pattern and the frame number of each path that has a frame number.

    Leading zeros fix the smallest count of digits: 09, 10 and 100 have one pattern, of at least two digits. Without
    leading zeros, the shortest number fixes it: 9 and 10 have one pattern, of at least one digit.
    """
    families: dict[tuple[str, str, str], list[tuple[Path, str]]] = {}
    """Paths and their digits, by folder, text before the number and text after it."""
    for path in paths:
        name = FrameName.from_path(path)
        if name.number is not None:
            digits = name.frame.lstrip("._-")
            before = name.stem + name.frame.removesuffix(digits)
            families.setdefault((str(path.parent), before, path.suffix), []).append((path, digits))
    patterns = {}
    for family, members in families.items():
        # A single 0 is not padded.
        padded_widths = {len(digits) for _, digits in members if digits.startswith("0") and len(digits) > 1}
        smallest_width = min(len(digits) for _, digits in members)
        for path, digits in members:
            fitting = [width for width in padded_widths if width <= len(digits)]
            patterns[path] = FramePattern(*family, max(fitting, default=smallest_width)), int(digits)
    return patterns


def _placeholder_rank(name: str, placeholder: re.Match[str]) -> tuple[bool, bool, int]:
    """Return a rank that is highest for the most plausible placeholder in a name."""
    text = placeholder[0]
    character_before, character_after = name[: placeholder.start()][-1:], name[placeholder.end() :][:1]
    is_separate = {character_before, character_after} <= {"", ".", "_", "-"}
    is_explicit = text[0] in "%$"
    return is_explicit, is_separate, 0 if is_explicit else len(text)
