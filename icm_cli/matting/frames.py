"""Parse frame numbers in names, patterns (``shot.####.exr``) and ranges (``1001-1100x2``)."""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fileseq import constants, exceptions, filesequence, frameset

from icm_cli.errors import UsageError

_NUMBERED = re.compile(r"(?P<stem>.*?)(?P<frame>[._-]?(?P<number>\d+))", re.DOTALL)
_PLACEHOLDER = re.compile(r"#+|@+|%0?\d*d|\$F\d*")
_NUMBER_MARK = "\0"
"""Replaces the number while wildcards are translated. No file name contains it."""


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

        Returns None if it has no placeholder. Raises UsageError if it has several.
        """
        folder, name = str(Path(text).parent), Path(text).name
        placeholders = list(_PLACEHOLDER.finditer(name))
        if not placeholders:
            return None
        if len(placeholders) > 1:
            raise UsageError(
                f"{text} has {len(placeholders)} placeholders for a frame number; expected one, as in shot.####.exr"
            )
        token = placeholders[0]
        sequence = filesequence.FileSequence(f"x.{token[0]}.x", pad_style=constants.PAD_STYLE_HASH1)
        return cls(folder, name[: token.start()], name[token.end() :], max(1, sequence.zfill()))

    def matching_names(self, names: Iterable[str]) -> list[str]:
        """Return the names that match the pattern.

        The text around the number may have wildcards.
        """
        digits = r"\\d+" if self.digits == 1 else rf"(?:\\d{{{self.digits}}}|[1-9]\\d{{{self.digits},}})"
        expression = self._compile_expression(digits)
        return [name for name in names if expression.match(name)]

    def names_with_other_numbers(self, names: Iterable[str]) -> list[str]:
        """Return the names that differ from the pattern only in sign or digits of their number."""
        names, expression = list(names), self._compile_expression(r"-?\\d+")
        matching = set(self.matching_names(names))
        return [name for name in names if name not in matching and expression.match(name)]

    def _compile_expression(self, number: str) -> re.Pattern[str]:
        """Return the expression for names.

        ``number``: expression for the number, with doubled backslashes.
        """
        expression = fnmatch.translate(self.before + _NUMBER_MARK + self.after)
        return re.compile(re.sub(r"\\?\x00", number, expression))

    def escape_wildcards(self) -> FramePattern:
        """Return the pattern in which brackets and other wildcards are ordinary characters."""
        return replace(self, before=glob.escape(self.before), after=glob.escape(self.after))

    def frame_name(self, number: int) -> str:
        """Return the file name of a frame."""
        return f"{self.before}{number:0{self.digits}d}{self.after}"


def parse_frame_range(text: str) -> frozenset[int]:
    """Return the numbers of a range such as ``1001-1100x2`` or ``1001,1005-1010``.

    Raises UsageError.
    """
    try:
        return frozenset(int(each) for each in frameset.FrameSet(text))
    except exceptions.MaxSizeException as error:
        raise UsageError(
            f"--frames {text!r} has too many frames; expected at most {constants.MAX_FRAME_SIZE}; give a smaller range"
        ) from error
    except (exceptions.ParseException, ValueError, TypeError) as error:
        raise UsageError(
            f"--frames {text!r} is not a frame range; expected a range such as 1001-1100 or 1001-1100x2"
        ) from error


def format_frame_ranges(numbers: Iterable[int]) -> str:
    """Return numbers as ranges: ``1001-1003,1010``."""
    return str(frameset.FrameSet.framesToFrameRange(sorted(numbers)))


def missing_frames(paths: Sequence[Path], wanted: frozenset[int] | None) -> dict[Path, list[int]]:
    """Return the missing frame numbers by sequence.

    A sequence is named by its pattern, such as ``shot.####.exr``.

    ``wanted``: the expected numbers; None: all numbers between the first and the last frame of a
    sequence.
    """
    sequences: dict[Path, set[int]] = {}
    for path in paths:
        name = FrameName.from_path(path)
        if name.number is not None:
            digits = len(name.frame.lstrip("._-"))
            pattern = path.with_name(f"{name.stem}{name.frame[: len(name.frame) - digits]}{'#' * digits}{path.suffix}")
            sequences.setdefault(pattern, set()).add(name.number)
    missing = {}
    for pattern, numbers in sequences.items():
        expected = set(range(min(numbers), max(numbers))) if wanted is None else wanted
        if absent := sorted(expected - numbers):
            missing[pattern] = absent
    return missing
