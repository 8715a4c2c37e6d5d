"""Decide which existing alphas are kept and which are recomputed, and report it."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import compress, islice
from pathlib import Path
from types import MappingProxyType

from icm_cli.environment import __version__
from icm_cli.errors import ImageError, OutputError, UsageError, format_count, list_first
from icm_cli.files.json_files import read_json, write_json
from icm_cli.files.paths import RECORD_FOLDER, is_file, walk_files
from icm_cli.images.writing import has_changed_pixels, read_provenance_header
from icm_cli.matting.digest import AlphaDigest, code_fingerprint
from icm_cli.matting.frames import PAGE_NUMBER
from icm_cli.matting.jobs import Job
from icm_cli.matting.provenance import (
    CODE_KEY,
    CONTENT_KEY,
    DIGEST_KEY,
    HINTS_KEY,
    NAME_KEY,
    PARTS_KEY,
    PREDECESSORS_KEY,
    REVIEWED_KEY,
    ROOT_KEY,
    SOURCE_KEY,
    VERSION_KEY,
    OtherSourceError,
    escape_name,
    read_own_provenance,
    recorded_details,
    retouched_error,
)
from icm_cli.matting.sources import MAX_LISTED_FILES
from icm_cli.reports.result import ImageResult

PART_NAMES = {
    "model": "files of the model",
    "dtype": "--device",
    "colour_config": "OpenColorIO configuration",
    "garbage": "garbage matte",
    "keep": "keep matte",
    "references": "references",
}
"""Names in messages of parts that no option changed, and of options. Others are the option of their name."""
PART_CAUSES = {
    "references": {"colorspace", "layer", "view", "exposure", "white", "colour_config"},
    "learn_steps": {"model", "propagation"},
    "dtype": {"model"},
}
"""Parts that another part can change too. Messages name only that one."""
STATES_NAME = "source-states.json"
"""File in RECORD_FOLDER of an output folder; see :func:`read_source_states`."""
PREDECESSOR_CHANGED = "a frame that is propagated to it changed"
"""Why a frame of a shot is recomputed, if neither its files nor its settings have changed."""
MAX_OTHER_FILES = 10_000
"""If an output folder has more files that are no outputs of the run, alphas without source are not counted."""


@dataclass(frozen=True)
class ExistingAlpha:
    """A complete alpha that an earlier run made for the source of a job."""

    job: Job
    digest: AlphaDigest
    """The digest that the alpha would have if it were computed now."""
    provenance: Mapping[str, str]
    source_state: str
    """State of the source, and digest of the content from which the alpha was made; "" with another root."""
    is_of_same_state: bool
    """Whether the state of the source shows that its content has not changed since the alpha was made."""
    retouched: Path | None
    """An output whose pixels another program changed; None if there is none."""

    @property
    def result(self) -> ImageResult:
        """The result of the job if the alpha is kept."""
        return replace(self.job.planned, status="kept", matting=recorded_details(self.provenance))

    @property
    def is_reviewed(self) -> bool:
        """Whether a person has accepted the alpha."""
        return REVIEWED_KEY in self.provenance

    @property
    def predecessors(self) -> list[str]:
        """The value of PREDECESSORS_KEY, divided."""
        return self.provenance.get(PREDECESSORS_KEY, "").split()

    @property
    def is_of_this_icm(self) -> bool:
        """Whether this version of icm, with this code, made it."""
        made_by = self.provenance.get(VERSION_KEY), self.provenance.get(CODE_KEY)
        return made_by == (__version__, code_fingerprint())

    @property
    def has_same_digest(self) -> bool:
        """Whether a new alpha can differ from this one only if the source differs."""
        return self.provenance[DIGEST_KEY] == self.digest.value

    @property
    def changed_parts(self) -> list[str]:
        """What has changed since the alpha was made, apart from its source and hints, as messages name it."""
        changed = _find_changed_parts(self.provenance, self.digest)
        parts = [name for name in changed if "--" not in name]
        return sorted({name for part in parts for name in _name_changed_part(part, changed)})

    def can_be_kept(self, *, keep_all: bool) -> bool:
        """Return whether the alpha is kept: if it is reviewed, or if its source and its digest are the same.

        With ``keep_all``, which is ``--keep-existing``, the digest does not count.
        """
        return self.is_reviewed or ((keep_all or self.has_same_digest) and self._has_same_source())

    def is_outdated(self) -> bool:
        """Return whether this icm might compute another alpha, because code, settings or source have changed."""
        return not (self.is_of_this_icm and self.has_same_digest and self._has_same_source())

    def _has_same_source(self) -> bool:
        """Return whether the source has the same content. It is only read if its state is another one."""
        return self.is_of_same_state or self.provenance.get(CONTENT_KEY) == self.job.content_digest()

    def outdated_reason(self) -> str:
        """Return why the alpha is recomputed."""
        if not self.is_of_this_icm:
            return "another version of icm made its alpha"
        earlier_hints = self.provenance.get(HINTS_KEY, "")
        if earlier_hints != self.job.hints_digest:
            if self.job.hints is None:
                return "its hints were removed"
            return "its hints changed" if earlier_hints else "its hints are new"
        if not self._has_same_source():
            return "its source changed"
        if self.has_same_digest:  # it is recomputed because of a frame that is propagated to it
            return PREDECESSOR_CHANGED
        return f"{' and '.join(self.changed_parts) or 'settings'} changed"


def _find_changed_parts(provenance: Mapping[str, str], digest: AlphaDigest) -> set[str]:
    """Return the names of the parts of a digest that differ from those of an alpha; none if it does not record them."""
    recorded = provenance.get(PARTS_KEY, digest.parts)
    return {part.partition("=")[0] for part in set(recorded.split()).symmetric_difference(digest.parts.split())}


def _name_changed_part(part: str, changed: Collection[str]) -> list[str]:
    """Return what messages call a changed part: the options that changed it, else the part; [] if another explains it.

    ``changed``: names of all changed parts, and of changed options after their part, such as "model--edges".
    """
    options = [name.removeprefix(part) for name in changed if name.startswith(f"{part}--")]
    if options:
        return [PART_NAMES.get(option, option) for option in options]
    if not PART_CAUSES.get(part, set()).isdisjoint(changed):
        return []
    return [PART_NAMES.get(part, f"--{part.replace('_', '-')}")]


def find_kept_result(job: Job, digest_for: Callable[[Job], AlphaDigest], *, keep_all: bool) -> ImageResult | None:
    """Return the result of an existing alpha that is kept; None if the image must be matted.

    ``digest_for`` and ``keep_all``: see :func:`find_existing_alphas`. Raises OtherSourceError if the output is the
    alpha of another source or was retouched, and ImageError if the source or the output cannot be read.
    """
    existing = read_existing_alpha(job, digest_for, keep_all=keep_all)
    if existing is None:
        return None
    if existing.can_be_kept(keep_all=keep_all):
        return existing.result
    if existing.retouched is not None:
        raise retouched_error(existing.retouched, job)
    return None


def read_source_states(folder: Path) -> dict[str, str]:
    """Return the source states that are recorded in an output folder, by the names of the images.

    They are those of sources whose modification time has changed and whose content has not, so that it need not be
    compared again.
    """
    with contextlib.suppress(UsageError):
        states = read_json(folder / RECORD_FOLDER / STATES_NAME, "source states", {"*": str}, "")
        return dict(states)
    return {}


def add_source_states(folder: Path, states: Mapping[str, str]) -> None:
    """Add source states to those in an output folder. If they cannot be written, contents are compared again."""
    with contextlib.suppress(OutputError):
        write_json(folder / RECORD_FOLDER / STATES_NAME, {**read_source_states(folder), **states})


@dataclass(frozen=True)
class ExistingAlphas:
    """Which images of a run are matted, and which existing alphas are kept or recomputed."""

    remaining: list[Job]
    """The images to matte: those without an alpha, and those whose alpha is recomputed."""
    kept: Sequence[ExistingAlpha] = ()
    recomputed: Sequence[ExistingAlpha] = ()
    """Complete alphas that will be recomputed."""

    @property
    def new_source_states(self) -> dict[str, str]:
        """States of sources that :func:`add_source_states` can record, so that they are not compared again."""
        compared = [alpha for alpha in self.kept if not (alpha.is_of_same_state or alpha.is_reviewed)]
        return {escape_name(alpha.job.planned.name): alpha.source_state for alpha in compared}

    def report(self, on_result: Callable[[ImageResult], None], notice: Callable[[str], None], hint: str = "") -> None:
        """Report the images whose alpha is kept.

        Notices count the alphas of another version of icm, those of other settings, and those that were retouched.
        ``hint``: end of the notices about alphas that are recomputed.
        """
        for alpha in self.kept:
            on_result(alpha.result)
        outdated = [alpha.job.output for alpha in self.kept if alpha.is_reviewed and alpha.is_outdated()]
        if outdated:
            notice(
                f"kept {format_count(len(outdated), 'reviewed alpha')} although settings, hints, the source or icm "
                f"have changed, such as {outdated[0]}; --overwrite recomputes them"
            )
        unreviewed = [alpha for alpha in self.kept if not alpha.is_reviewed]
        _report_other_versions(unreviewed, "kept", "", notice)
        _report_other_settings([alpha for alpha in unreviewed if not alpha.has_same_digest], "kept", "", notice)
        retouched = [alpha.retouched for alpha in self.kept if alpha.retouched is not None]
        if retouched:
            count = format_count(len(retouched), "alpha")
            notice(f"kept {count} with pixels changed by another program, such as {retouched[0]}")
        _report_other_versions(self.recomputed, "recomputing", hint, notice)
        _report_other_settings([alpha for alpha in self.recomputed if alpha.changed_parts], "recomputing", hint, notice)


def find_existing_alphas(
    jobs: Sequence[Job],
    digest_for: Callable[[Job], AlphaDigest],
    *,
    workers: int,
    keep_all: bool = False,
    reusable_outputs: Callable[[Collection[Path], Mapping[Path, ExistingAlpha]], set[Path]] | None = None,
    source_states: Mapping[str, str] = MappingProxyType({}),
) -> ExistingAlphas:
    """Return which existing alphas are kept.

    Raises UsageError if an output that would be replaced is the alpha of another source or was retouched.

    Args:
        digest_for: Returns the digest that the alpha of a job would have now.
        workers: Number of threads that read files.
        keep_all: Keep every alpha that icm made from the same source, whatever its digest.
        reusable_outputs: For shots, :meth:`icm_cli.matting.shot.Shot.reusable_outputs`: returns the outputs to keep, of
            those that could be kept and all existing alphas. Not used with ``keep_all``.
        source_states: Result of :func:`read_source_states`.
    """

    def inspect(job: Job) -> tuple[ExistingAlpha | OtherSourceError | None, bool]:
        """Return the existing alpha, or the error if it conflicts with this run; and whether it can be kept."""
        try:
            alpha = read_existing_alpha(job, digest_for, source_states, keep_all=keep_all)
            return alpha, alpha is not None and alpha.can_be_kept(keep_all=keep_all)
        except OtherSourceError as error:
            return error, False
        except ImageError:
            return None, False  # the engine reports it

    with ThreadPoolExecutor(workers, "icm-inspect") as executor:
        inspected = list(executor.map(inspect, jobs))
    kept = {job.output for job, (_, can_be_kept) in zip(jobs, inspected, strict=True) if can_be_kept}
    alphas = [alpha for alpha, _ in inspected if isinstance(alpha, ExistingAlpha)]
    if reusable_outputs is not None and not keep_all:
        kept = reusable_outputs(kept, {alpha.job.output: alpha for alpha in alphas})
    recomputed = [alpha for alpha in alphas if alpha.job.output not in kept]
    conflicts = [error for error, _ in inspected if isinstance(error, OtherSourceError)]
    conflicts += [retouched_error(alpha.retouched, alpha.job) for alpha in recomputed if alpha.retouched]
    if conflicts:
        raise UsageError(list_first(conflicts, MAX_LISTED_FILES, "; ", "; and"))
    remaining = [job for job in jobs if job.output not in kept]
    return ExistingAlphas(remaining, [alpha for alpha in alphas if alpha.job.output in kept], recomputed)


def report_lost_hints(jobs: Sequence[Job], *, workers: int, notice: Callable[[str], None]) -> None:
    """Give a notice that counts the alphas that were made with hints and are recomputed without them.

    ``jobs``: those without hints whose images are matted. ``workers``: number of threads that read files.
    """

    def has_hints(path: Path) -> bool:
        with contextlib.suppress(ImageError):
            return is_file(path) and HINTS_KEY in read_provenance_header(path)
        return False

    outputs = [job.output for job in jobs]
    with ThreadPoolExecutor(workers, "icm-inspect") as executor:
        lost = list(compress(outputs, executor.map(has_hints, outputs)))
    if lost:
        notice(
            f"recomputing {format_count(len(lost), 'alpha')} made with hints, such as {lost[0]}, without hints; "
            "to keep the corrections, give --hints DIR, or --keep-existing without --overwrite"
        )


def report_alphas_without_source(
    folder: Path, jobs: Sequence[Job], *, workers: int, notice: Callable[[str], None]
) -> None:
    """Give a notice that counts the alphas and trimaps below a folder whose source was removed or renamed.

    ``jobs``: those of all sources of the run. Files of sources below other roots are not counted. If a drive does not
    answer, there is no notice. ``workers``: number of threads that read files.
    """
    try:
        without_source = _find_files_without_source(folder, jobs, workers)
    except OSError:
        return
    if without_source:
        notice(
            f"without source: {format_count(len(without_source), 'file')} of icm in {folder}, such as "
            f"{min(without_source)}, whose images were removed or renamed; delete the files that you do not need"
        )


def _find_files_without_source(folder: Path, jobs: Sequence[Job], workers: int) -> list[Path]:
    """Return the alphas and trimaps below a folder whose source does not exist. Raises OSError.

    A source that this run does not matte, such as one that a glob does not match, exists. Sources whose name is not
    UTF-8 are not looked for, because their recorded name differs from that of the file.
    """
    names = {escape_name(job.planned.name) for job in jobs}
    roots = {escape_name(job.root): Path(job.root) for job in jobs}
    sources = {os.path.abspath(path) for job in jobs for path in job.files}  # noqa: PTH100
    own = {path for job in jobs for path in (*job.files, job.output, job.trimap)}
    others = list(islice((path for path in walk_files(folder, {}) if path not in own), MAX_OTHER_FILES + 1))
    if len(others) > MAX_OTHER_FILES:
        return []

    def is_without_source(path: Path) -> bool:
        try:
            provenance = read_provenance_header(path)
        except ImageError:
            return False
        name, root = provenance.get(NAME_KEY, ""), roots.get(provenance.get(ROOT_KEY, ""))
        if not name or root is None or name in names or "\\" in name:
            return False
        possible_sources = (root / name, root / PAGE_NUMBER.sub("", name))
        return not any(is_file(source) and str(source) not in sources for source in possible_sources)

    with ThreadPoolExecutor(workers, "icm-inspect") as executor:
        return list(compress(others, executor.map(is_without_source, others)))


def _report_other_versions(
    alphas: Sequence[ExistingAlpha], action: str, hint: str, notice: Callable[[str], None]
) -> None:
    """Give a notice that counts the alphas of other versions of icm. ``action``: "kept" or "recomputing"."""
    others = [alpha.result.matting.made_by for alpha in alphas if not alpha.is_of_this_icm]
    versions = Counter(f"{maker} with other code" if maker == __version__ else maker for maker in others)
    if versions:
        counts = ", ".join(f"{version}: {count}" for version, count in sorted(versions.items()))
        notice(f"{action} {format_count(len(others), 'alpha')} made by another version of icm ({counts}){hint}")


def _report_other_settings(
    alphas: Sequence[ExistingAlpha], action: str, hint: str, notice: Callable[[str], None]
) -> None:
    """Give a notice that counts those alphas that this icm made, and names what has changed since."""
    others = [alpha for alpha in alphas if alpha.is_of_this_icm]
    names = sorted({name for alpha in others for name in alpha.changed_parts}) or ["hints"]
    if others:
        made = f"{format_count(len(others), 'alpha')} made with other settings ({', '.join(names)})"
        notice(f"{action} {made}, such as {others[0].job.output}{hint}")


def read_existing_alpha(
    job: Job,
    digest_for: Callable[[Job], AlphaDigest],
    source_states: Mapping[str, str] = MappingProxyType({}),
    *,
    keep_all: bool = False,
) -> ExistingAlpha | None:
    """Return the alpha that an earlier run made for a job; None if there is none, or if it is damaged.

    If the run writes trimaps too, an alpha without its trimap counts as damaged. Exceptions are a reviewed alpha, and
    with ``keep_all`` an alpha that may have been made without trimaps. Raises OtherSourceError if the
    alpha was made from another source: one with another name below its root, or one below another root and with other
    content. Raises ImageError if the source or the output cannot be read.

    ``digest_for``, ``source_states`` and ``keep_all``: see :func:`find_existing_alphas`.
    """
    provenances = {path: read_own_provenance(path, job) for path in job.outputs}
    retouched = next(
        (path for path, provenance in provenances.items() if provenance and has_changed_pixels(path, provenance)), None
    )
    provenance = provenances[job.output]
    digest = digest_for(job)
    may_lack_trimap = bool(provenance) and provenance[DIGEST_KEY] != digest.value
    if PARTS_KEY in provenance:
        may_lack_trimap = "trimap" in _find_changed_parts(provenance, digest)
    is_kept_alone = REVIEWED_KEY in provenance or (keep_all and may_lack_trimap)
    if not is_kept_alone and not all(provenances.values()):
        if retouched is not None:
            raise retouched_error(retouched, job)
        return None
    if provenance.get(ROOT_KEY) != escape_name(job.root):
        # The state may differ, but read_own_provenance() has compared the content.
        return ExistingAlpha(job, digest, provenance, "", is_of_same_state=True, retouched=retouched)
    state = job.state()
    source_state = f"{state} {provenance.get(CONTENT_KEY)}"
    is_recorded = source_states.get(escape_name(job.planned.name)) == source_state
    is_of_same_state = is_recorded or provenance.get(SOURCE_KEY) == state
    return ExistingAlpha(job, digest, provenance, source_state, is_of_same_state, retouched)
