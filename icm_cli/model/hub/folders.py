"""Weights in Hugging Face's form: from a folder or a hub id to files that are here, their digest, and a model of them.

A folder holds ``config.json``, ``model.safetensors`` (or its parts with an index) and, mostly,
``preprocessor_config.json``. No pickle is opened.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from icm_cli.errors import ConfigError
from icm_cli.files import cached_file_digest, combined_digest
from icm_cli.model.hub.catalogue import PUBLISHED

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Table of the files that hold the tensors, where the weights are too large for one."""
Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation of red, green and blue, on the scale 0..1."""


def fetch_snapshot(weights: str, patterns: Sequence[str], *, offline: bool, option: str) -> Path:
    """Folder of the files of a hub repository that match ``patterns``, downloaded unless ``offline`` or here already.

    ``option``: the command's option that takes a folder in its place, for the error. Raises ConfigError that says what
    to fetch, where to put it, and the licence to accept where the repository is gated.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError

    try:
        return Path(snapshot_download(weights, allow_patterns=list(patterns), local_files_only=offline))
    except HFValidationError as error:
        raise ConfigError(
            f"weights {weights!r} is neither a folder that exists nor the id of a hub repository"
        ) from error
    except OSError as error:
        reason = "this run is offline" if offline else (str(error) or type(error).__name__).splitlines()[0]
        known = PUBLISHED.get(weights)
        size = f" They need about {known.size}." if known else ""
        is_gated = isinstance(error, GatedRepoError) or (known is not None and known.is_gated)
        licence = f"their licence ({known.licence})" if known else "their licence"
        login = f"accept {licence} at https://huggingface.co/{weights}, run: hf auth login, then: "
        step = login if is_gated else "run: "
        raise ConfigError(
            f"the weights {weights!r} are not on this machine and cannot be fetched ({reason}).{size} Where there is a "
            f"network, {step}hf download {weights} --local-dir FOLDER (in older versions: huggingface-cli), "
            f"copy FOLDER here and give it with {option} FOLDER"
        ) from error


def find_folder(weights: str, *, offline: bool, option: str) -> Path:
    """Folder of a local path or of a hub id (fetched unless ``offline``) with a configuration and safetensors.

    ``option`` as of :func:`fetch_snapshot`. Raises ConfigError that says what is missing.
    """
    folder = Path(weights).expanduser()
    if not folder.is_dir():
        folder = fetch_snapshot(
            weights, [CONFIG, PREPROCESSOR, "model*.safetensors", INDEX], offline=offline, option=option
        )
    if not os.access(folder, os.R_OK | os.X_OK):
        raise ConfigError(f"the folder {folder} may not be read; give yourself the right to, or another folder")
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"the folder {folder} lacks {CONFIG}; expected a model in Hugging Face's form, get it whole")
    absent = [path.name for path in _weight_files(folder) if not path.is_file()]
    if absent:
        raise ConfigError(
            f"the folder {folder} lacks {', '.join(absent)}; expected safetensors (pickles are not opened), get it "
            "whole"
        )
    for path in (folder / CONFIG, folder / PREPROCESSOR, *_weight_files(folder)):
        if path.is_file() and not os.access(path, os.R_OK):
            raise ConfigError(f"{path} may not be read; give yourself the right to, or another folder")
    return folder


def folder_digest(folder: Path) -> str:
    """Hash of every file of a folder that decides an answer: SHA-256 of their contents, hexadecimal."""
    texts = [folder / name for name in (CONFIG, PREPROCESSOR) if (folder / name).is_file()]
    return combined_digest(*(cached_file_digest(path) for path in [*texts, *_weight_files(folder)]))


def read_json(path: Path) -> dict[str, Any]:
    """A configuration's content. Raises ConfigError where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); get the file again") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not a configuration ({error}); get the file again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a configuration; expected keys with values, get the file again")
    return content


def read_pixel_statistics(folder: Path, default: Statistics) -> Statistics:
    """Mean and standard deviation by which pixels 0..1 are normalised: the folder's own, else ``default``.

    The published processors read ``image_mean`` and ``image_std`` from the same file. Raises ConfigError.
    """
    path = folder / PREPROCESSOR
    if not path.is_file():
        return default
    content = read_json(path)
    found = []
    for key, fallback in zip(("image_mean", "image_std"), default, strict=True):
        values = content.get(key, fallback)
        if not isinstance(values, (list, tuple)) or [isinstance(each, (int, float)) for each in values] != [True] * 3:
            raise ConfigError(f"{path}: {key} is {values!r}; expected three numbers, get the file again")
        found.append((float(values[0]), float(values[1]), float(values[2])))
    if min(found[1]) <= 0:
        raise ConfigError(f"{path}: image_std is {list(found[1])}; expected numbers above 0, get the file again")
    return found[0], found[1]


def load_pretrained(cls: Any, folder: Path) -> Any:
    """A model of a ``transformers`` class with the folder's weights, float32 on the CPU, in eval mode, frozen.

    Strict: every tensor of the model comes from the file, and nothing is left over. Raises ConfigError.
    """
    with _quiet():
        try:
            model, report = cls.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told below
            )
        except Exception as error:  # transformers checks a configuration by any library's exceptions
            said = " ".join(str(error).split())
            reason = said if " " in said else f"{type(error).__name__}: {said}"
            raise ConfigError(f"the weights in {folder} cannot be read ({reason}); get them again") from error
    for kind, said in (
        ("missing_keys", "lack"),
        ("mismatched_keys", "have in another shape"),
        ("unexpected_keys", "have, and the model has not,"),
    ):
        if report[kind]:
            key = sorted(str(each[0] if isinstance(each, tuple) else each) for each in report[kind])[0]
            raise ConfigError(
                f"the weights in {folder} {said} {key!r}; expected a {cls.__name__} whole, get them again"
            )
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing: its bars and reports know nothing of ours."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    before, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if had_bar:
            logging.enable_progress_bar()


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: one, or those that the index names, and the index."""
    index = folder / INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():
        return [folder / WEIGHTS]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise ConfigError(f"{index} has no weight_map; expected the name of a file for every tensor, get it again")
    return [index, *(folder / Path(str(name)).name for name in sorted(set(names.values())))]
