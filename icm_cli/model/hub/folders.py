"""Weights in the layout of Hugging Face: locate or download them, and load models from them.

A folder contains ``config.json``, ``model.safetensors`` (or several files with an index) and
usually ``preprocessor_config.json``. Pickled files are never opened.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from icm_cli.errors import ConfigError
from icm_cli.files import cached_file_digest, combined_digest
from icm_cli.model.hub.catalogue import PUBLISHED

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
"""Index of the files that contain the tensors, if there are several."""
PixelStatistics: TypeAlias = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation of red, green and blue, on the scale 0..1."""


def locate_folder(weights: str, patterns: Sequence[str], *, offline: bool, option: str) -> Path:
    """Return a local folder, or download the files of a hub repository.

    Args:
        weights: Path of a folder, or id of a hub repository.
        patterns: Glob patterns of the files to download.
        offline: Do not access the network; use files that are already on this machine.
        option: Option of the command that selects a folder, for error messages.

    Raises:
        ConfigError: The files are not available. The message says what to download, where to put
            it, and which licence to accept if the repository is gated.
    """
    folder = Path(weights).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError

    try:
        return Path(snapshot_download(weights, allow_patterns=list(patterns), local_files_only=offline))
    except HFValidationError as error:
        raise ConfigError(
            f"weights {weights!r} are neither an existing folder nor the id of a hub repository; "
            f"give one of these with {option}"
        ) from error
    except OSError as error:
        reason = "offline" if offline else (str(error) or type(error).__name__).splitlines()[0]
        known = PUBLISHED.get(weights)
        size = f" Their size is about {known.size}." if known else ""
        is_gated = isinstance(error, GatedRepoError) or (known is not None and known.is_gated)
        licence = f"their licence ({known.licence})" if known else "their licence"
        login = f"accept {licence} at https://huggingface.co/{weights}, run: hf auth login, then: "
        step = login if is_gated else "run: "
        raise ConfigError(
            f"the weights {weights!r} are not on this machine and cannot be downloaded ({reason})."
            f"{size} On a machine with network access, {step}hf download {weights} "
            "--local-dir FOLDER (older versions: huggingface-cli). Copy FOLDER to this machine and "
            f"give it with {option} FOLDER"
        ) from error


def find_model_folder(weights: str, *, offline: bool, option: str) -> Path:
    """Return the folder of a complete model, see :func:`locate_folder`.

    Raises:
        ConfigError: The folder is not available, incomplete or not readable.
    """
    patterns = [CONFIG_FILE, PREPROCESSOR_FILE, "model*.safetensors", INDEX_FILE]
    folder = locate_folder(weights, patterns, offline=offline, option=option)
    if not os.access(folder, os.R_OK | os.X_OK):
        raise ConfigError(
            f"no permission to read the folder {folder}; change its permissions, or give another folder with {option}"
        )
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(
            f"the folder {folder} does not contain {CONFIG_FILE}; expected a complete model in the "
            "layout of Hugging Face, get it again"
        )
    missing = [path.name for path in _weight_files(folder) if not path.is_file()]
    if missing:
        raise ConfigError(
            f"the folder {folder} does not contain {', '.join(missing)}; expected a complete model "
            "as safetensors (pickled files are not opened), get it again"
        )
    for path in (folder / CONFIG_FILE, folder / PREPROCESSOR_FILE, *_weight_files(folder)):
        if path.is_file() and not os.access(path, os.R_OK):
            raise ConfigError(
                f"no permission to read {path}; change its permissions, or give another folder with {option}"
            )
    return folder


def model_folder_digest(folder: Path) -> str:
    """Return a SHA-256 of the contents of all files of a model that decide its output."""
    texts = [folder / name for name in (CONFIG_FILE, PREPROCESSOR_FILE) if (folder / name).is_file()]
    return combined_digest(*(cached_file_digest(path) for path in [*texts, *_weight_files(folder)]))


def read_json(path: Path) -> dict[str, Any]:
    """Read a configuration in JSON.

    Raises:
        ConfigError: The file cannot be read or does not contain a mapping.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); get the file again") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); get the file again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a configuration; expected keys with values, get the file again")
    return content


def read_pixel_statistics(folder: Path, default: PixelStatistics) -> PixelStatistics:
    """Return the statistics with which a model normalises pixels.

    As in ``transformers``, they are ``image_mean`` and ``image_std`` in
    ``preprocessor_config.json``. ``default`` is used if the file or a key is missing.

    Raises:
        ConfigError: A value is not a list of three valid numbers.
    """
    path = folder / PREPROCESSOR_FILE
    if not path.is_file():
        return default
    content = read_json(path)
    statistics = []
    for key, fallback in zip(("image_mean", "image_std"), default, strict=True):
        values = content.get(key, fallback)
        is_list = isinstance(values, (list, tuple))
        if not is_list or [isinstance(number, (int, float)) for number in values] != [True] * 3:
            raise ConfigError(f"{path}: {key} is {values!r}; expected three numbers, get the file again")
        statistics.append((float(values[0]), float(values[1]), float(values[2])))
    if min(statistics[1]) <= 0:
        raise ConfigError(f"{path}: image_std is {list(statistics[1])}; expected numbers above 0, get the file again")
    return statistics[0], statistics[1]


def load_pretrained(cls: Any, folder: Path) -> Any:
    """Load a ``transformers`` model, frozen, on the CPU in float32 and in evaluation mode.

    Args:
        cls: Class of the model in ``transformers``.
        folder: Folder of the model.

    Raises:
        ConfigError: The weights cannot be read, or their tensors are not exactly those of the
            model.
    """
    with _silence_transformers():
        try:
            model, report = cls.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below
            )
        except Exception as error:  # transformers validates with exceptions of several libraries
            text = " ".join(str(error).split())
            reason = text if " " in text else f"{type(error).__name__}: {text}"
            raise ConfigError(f"the weights in {folder} cannot be read ({reason}); get them again") from error
    for key, problem in (
        ("missing_keys", "do not contain {}"),
        ("mismatched_keys", "contain {} in another shape"),
        ("unexpected_keys", "contain {}, which the model does not have"),
    ):
        if report[key]:
            name = sorted(str(each[0] if isinstance(each, tuple) else each) for each in report[key])[0]
            raise ConfigError(
                f"the weights in {folder} {problem.format(repr(name))}; expected a complete "
                f"{cls.__name__}, get them again"
            )
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def _silence_transformers() -> Iterator[None]:
    """Suppress the progress bars and reports of ``transformers``."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()


def _weight_files(folder: Path) -> list[Path]:
    """Files of the weights: a single file, or the index and the files that it lists."""
    index = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file() or not index.is_file():
        return [folder / WEIGHTS_FILE]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise ConfigError(f"{index} has no weight_map; expected the file name of every tensor, get it again")
    return [index, *(folder / Path(str(name)).name for name in sorted(set(names.values())))]
