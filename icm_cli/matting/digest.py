"""The digest of an alpha: a hash of everything that affects its pixels, except its source.

It covers the version of icm, the source code of the modules that affect pixels, the configuration of all parts of the
model, all weights, the references, and the options that are marked as part of it in :mod:`icm_cli.options`.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from types import MappingProxyType

from icm_cli.environment import __version__
from icm_cli.files.digests import combined_digest

FINGERPRINTED = ("geometry.py", "guidance", "guided_filter.py", "images", "matting", "model")
"""Modules and packages of ``icm_cli`` that decide pixels, apart from those in ``EXCLUDED``."""
EXCLUDED = frozenset(
    {
        "matting/cluster.py",
        "matting/devices.py",
        "matting/digest.py",
        "matting/dry_run.py",
        "matting/matte.py",
        "matting/memory_budget.py",
        "matting/model_choice.py",
        "matting/planning.py",
        "matting/provenance.py",
        "matting/quality_signals.py",
        "matting/result_collector.py",
        "matting/resume.py",
        "matting/run_record.py",
        "matting/sources.py",
        "matting/worker.py",
        "model/hub/catalogue.py",
        "model/packing.py",
    }
)
"""Modules of these packages that do not decide pixels."""
PART_DIGITS = 8
"""Number of hexadecimal digits of the digest of a part."""


@dataclass(frozen=True)
class AlphaDigest:
    """Digest of everything that decides an alpha, except its source."""

    value: str
    parts: str = ""
    """Names and short digests of the parts, such as "seed=5f3c9a01 model=06b1d2e7". They show which part differs.

    The given options follow their part, such as "model--edges=9d2e01c4". They show which option changed the part.
    """

    def add_parts(self, values: Mapping[str, str], given: Mapping[str, str] = MappingProxyType({})) -> AlphaDigest:
        """Return the digest of alphas that also depend on ``values``: name -> value as text.

        ``given``: see :meth:`icm_cli.options.definition.CommandOptions.given_by_part`. It only affects the parts.
        """
        parts = [f"{name}={values[name]}" for name in sorted(values)]
        recorded = {**values, **given}
        short_digests = [f"{name}={combined_digest(recorded[name])[:PART_DIGITS]}" for name in sorted(recorded)]
        return AlphaDigest(combined_digest(self.value, *parts), " ".join([*self.parts.split(), *short_digests]))


def alpha_digest(values: Mapping[str, str], given: Mapping[str, str] = MappingProxyType({})) -> AlphaDigest:
    """Return the digest of alphas that depend on the code of icm and on ``values``: name -> value as text.

    ``given``: see :meth:`AlphaDigest.add_parts`.
    """
    return AlphaDigest(combined_digest(__version__, code_fingerprint())).add_parts(values, given)


def describe_build() -> str:
    """Return the version of icm and the start of its code fingerprint, such as "0.2.1 (code 1a2b3c4d)"."""
    return f"{__version__} (code {code_fingerprint()[:8]})"


@functools.cache
def code_fingerprint() -> str:
    """Return the fingerprint of the installed package. It is computed once in a process."""
    return fingerprint_package(importlib.resources.files("icm_cli"))


def fingerprint_package(package: Traversable) -> str:
    """Return the SHA-256 of the source files that decide pixels.

    If a package has only compiled files, the version of icm is hashed in their place.
    """
    parts: list[bytes | str] = []
    for name in FINGERPRINTED:
        files = sorted(_source_files(package.joinpath(name), name))
        for path, source in files:
            parts += [path, source]
        if not files:
            parts.append(f"{name} of {__version__}")
    return combined_digest(*parts)


def _source_files(item: Traversable, path: str) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of every source file below ``item``, whose path in the package is ``path``.

    Line ends are the same on all systems.
    """
    if item.is_dir():
        for child in item.iterdir():
            yield from _source_files(child, f"{path}/{child.name}")
    elif item.is_file() and path.endswith(".py") and path not in EXCLUDED:
        yield path, item.read_bytes().replace(b"\r\n", b"\n")
