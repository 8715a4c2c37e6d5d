"""Frames of a shot: the numbers in names, patterns such as ``shot.####.exr``, and ranges such as ``1001-1100x2``."""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fileseq import constants, exceptions, filesequence, frameset

from icm_cli.errors import UsageError

MissingPolicy = Literal["skip", "report", "error"]
"""Ways to take frames that are not there: with a notice, as failed images, or not at all."""
_NUMBERED = re.compile(r"(?P<stem>.*?)(?P<frame>[._-]?(?P<number>\d+))", re.DOTALL)
_TOKEN = re.compile(r"#+|@+|%0?\d*d|\$F\d*")
_ESCAPED = "\0"
"""Stands for the number while a name's wildcards are translated; no name holds it."""


@dataclass(frozen=True)
class FrameName:
    """The stem of a file's name in two: ``shot.1001`` is ``shot`` and ``.1001``, of number 1001."""

    stem: str
    frame: str = ""
    """Separator and digits; "" where there is no number."""
    number: int | None = None

    @classmethod
    def from_path(cls, path: Path) -> FrameName:
        """Split the name of a file."""
        found = _NUMBERED.fullmatch(path.stem)
        return cls(found["stem"], found["frame"], int(found["number"])) if found else cls(path.stem)


@dataclass(frozen=True)
class FramePattern:
    """A path whose name has a place for the number, in any of the notations that ``fileseq`` knows."""

    folder: str
    before: str
    after: str
    digits: int
    """Least number of digits."""

    @classmethod
    def parse(cls, text: str) -> FramePattern | None:
        """Parse a path; None where it is no pattern. Raises UsageError for one with two places for a number."""
        folder, name = str(Path(text).parent), Path(text).name
        tokens = list(_TOKEN.finditer(name))
        if not tokens:
            return None
        if len(tokens) > 1:
            raise UsageError(f"{text} has {len(tokens)} places for a frame number; expected one, as in shot.####.exr")
        token = tokens[0]
        sequence = filesequence.FileSequence(f"x.{token[0]}.x", pad_style=constants.PAD_STYLE_HASH1)
        return cls(folder, name[: token.start()], name[token.end() :], max(1, sequence.zfill()))

    def matching_names(self, names: Iterable[str]) -> list[str]:
        """The names that fit; the text beside the number may have wildcards."""
        fits = self._fitting(r"\\d+" if self.digits == 1 else rf"(?:\\d{{{self.digits}}}|[1-9]\\d{{{self.digits},}})")
        return [name for name in names if fits.match(name)]

    def names_with_other_numbers(self, names: Iterable[str]) -> list[str]:
        """The names that would fit but for their number's sign or digits."""
        names, fits = list(names), self._fitting(r"-?\\d+")
        taken = set(self.matching_names(names))
        return [name for name in names if name not in taken and fits.match(name)]

    def _fitting(self, number: str) -> re.Pattern[str]:
        """The names whose number is as a regular expression says, whose backslashes are doubled."""
        regex = fnmatch.translate(self.before + _ESCAPED + self.after)
        return re.compile(re.sub(r"\\?\x00", number, regex))

    def escape_wildcards(self) -> FramePattern:
        """The pattern whose brackets and other wildcards stand for themselves."""
        return replace(self, before=glob.escape(self.before), after=glob.escape(self.after))

    def frame_name(self, number: int) -> str:
        """The name of a frame."""
        return f"{self.before}{number:0{self.digits}d}{self.after}"


def parse_frame_range(text: str) -> frozenset[int]:
    """Numbers of a range: ``1001-1100``, ``1001-1100x2``, ``1001,1005-1010``. Raises UsageError."""
    try:
        return frozenset(int(each) for each in frameset.FrameSet(text))
    except exceptions.MaxSizeException as error:
        raise UsageError(
            f"--frames {text!r} has too many frames; expected {constants.MAX_FRAME_SIZE} at most"
        ) from error
    except (exceptions.ParseException, ValueError, TypeError) as error:
        raise UsageError(
            f"--frames {text!r} is no range of frames; expected such as 1001-1100 or 1001-1100x2"
        ) from error


def format_frame_ranges(numbers: Iterable[int]) -> str:
    """Ranges of numbers, as people write them: ``1001-1003,1010``."""
    return str(frameset.FrameSet.framesToFrameRange(sorted(numbers)))


def missing_frames(paths: Sequence[Path], wanted: frozenset[int] | None) -> dict[Path, list[int]]:
    """Numbers that are missing, by the name of their sequence as a pattern: of ``wanted``, or between the first and the
    last frame there is."""
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
        if lost := sorted(expected - numbers):
            missing[pattern] = lost
    return missing
