"""Weights in the layout of Hugging Face: locate or download them, and load models from them.

Pickled files are never opened.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from icm_cli.errors import ConfigError
from icm_cli.model.checkpoint import check_tensor_values
from icm_cli.model.hub.catalogue import PUBLISHED

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
"""Index of the files that contain the tensors, if there are several."""
REPOSITORY_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
PixelStatistics: TypeAlias = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation of red, green and blue, on the scale 0..1."""


class WeightsNotFoundError(ConfigError):
    """Weights of the hub that are not on this machine. ``downloads`` describes them."""

    def __init__(self, message: str, downloads: str) -> None:
        super().__init__(message)
        self.downloads = downloads


def find_weight_files(
    weights: str,
    default: str,
    list_files: Callable[[Path], Sequence[Path]],
    patterns: Sequence[str],
    *,
    offline: bool,
    option: str,
) -> list[Path]:
    """Return the files of a model in a local folder, or download them from the hub.

    ``weights`` is the path of a folder or the id of a hub repository, and ``default`` an id for error messages.
    ``list_files`` returns the files that a folder must contain, and ``patterns`` select what is downloaded. ``option``
    is the option that selects a folder. ``offline``: use files that are already on this machine.

    Raises ConfigError if files are not available.
    """
    folder = _find_local_folder(weights, option)
    is_local = folder is not None
    if folder is None:
        if not REPOSITORY_ID.fullmatch(weights):
            raise ConfigError(
                f"{option} {weights!r}: no such folder; give an existing folder, or the id of a hub repository "
                f"such as {default}"
            )
        folder = _download(weights, patterns, offline=offline, option=option)
    files = list_files(folder)
    missing = ", ".join(path.relative_to(folder).as_posix() for path in files if not path.is_file())
    if missing:
        source, target = (default, folder) if is_local else (weights, "FOLDER")
        message = (
            f"the folder {folder} does not contain {missing}; expected a complete model as safetensors (pickled "
            f"files are not opened), get it with: hf download {source} --local-dir {target}"
        )
        raise ConfigError(message) if is_local else WeightsNotFoundError(message, _describe_download(weights))
    for path in files:
        if not os.access(path, os.R_OK):
            raise ConfigError(
                f"no permission to read {path}; change its permissions, or give another folder with {option}"
            )
    return list(files)


def _find_local_folder(weights: str, option: str) -> Path | None:
    """Return the folder that ``weights`` names; None if there is none. Raises ConfigError if it cannot be used."""
    try:
        folder = Path(weights).expanduser()
        if folder.is_file():
            raise ConfigError(f"{option} {weights!r} is a file; expected the folder of a complete model")
        if not weights or not folder.is_dir():
            return None
    except (OSError, RuntimeError):  # a name that is too long; an unknown user after "~"
        return None
    if not os.access(folder, os.R_OK | os.X_OK):
        raise ConfigError(
            f"no permission to read the folder {folder}; change its permissions, or give another folder with {option}"
        )
    return folder


def _describe_download(weights: str) -> str:
    """Return the id of a hub repository, and its size if that is known."""
    published = PUBLISHED.get(weights)
    return f"{weights} ({published.size})" if published else weights


def _download(weights: str, patterns: Sequence[str], *, offline: bool, option: str) -> Path:
    """Return the folder of a hub repository on this machine, after a download if needed."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError

    try:
        return Path(snapshot_download(weights, allow_patterns=list(patterns), local_files_only=offline))
    except (OSError, HFValidationError) as error:
        reason = "offline" if offline else (str(error) or type(error).__name__).splitlines()[0]
        published = PUBLISHED.get(weights)
        size = f" Their size is about {published.size}." if published else ""
        accept_licence = ""
        if isinstance(error, GatedRepoError) or (published is not None and published.is_gated):
            licence = f"their licence ({published.licence})" if published else "their licence"
            accept_licence = f"accept {licence} at https://huggingface.co/{weights}, run: hf auth login, then: "
        raise WeightsNotFoundError(
            f"the weights {weights!r} are not on this machine and cannot be downloaded ({reason}); there is no such "
            f"folder either.{size} On a machine with network access, {accept_licence or 'run: '}hf download {weights} "
            f"--local-dir FOLDER (older versions: huggingface-cli). Copy FOLDER to this machine and give it with "
            f"{option} FOLDER",
            _describe_download(weights),
        ) from error


def find_model_files(weights: str, default: str, *, offline: bool, option: str) -> list[Path]:
    """Return the files of a complete model of ``transformers``; see :func:`find_weight_files`.

    The first one is its configuration.
    """
    patterns = [CONFIG_FILE, PREPROCESSOR_FILE, "model*.safetensors", INDEX_FILE]
    return find_weight_files(weights, default, _list_model_files, patterns, offline=offline, option=option)


def _list_model_files(folder: Path) -> list[Path]:
    """Return configuration, statistics if there are any, and weights: one file, or an index and its files."""
    files = [folder / CONFIG_FILE]
    if (folder / PREPROCESSOR_FILE).is_file():
        files.append(folder / PREPROCESSOR_FILE)
    index = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file() or not index.is_file():
        return [*files, folder / WEIGHTS_FILE]
    file_of_tensor = read_hub_json(index).get("weight_map")
    if not isinstance(file_of_tensor, dict):
        raise ConfigError(f"{index} has no weight_map; expected the file name of every tensor, get it again")
    names = sorted({str(name) for name in file_of_tensor.values()})
    return [*files, index, *(folder / Path(name).name for name in names)]  # .name: no file outside the folder


def read_hub_json(path: Path) -> dict[str, Any]:
    """Read a configuration in JSON. Raises ConfigError if the file cannot be read or does not contain a mapping."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); get the file again") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON; get the file again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a configuration; expected keys with values, get the file again")
    return content


def read_pixel_statistics(folder: Path, default: PixelStatistics) -> PixelStatistics:
    """Return the statistics with which a model normalises pixels. Raises ConfigError.

    They are ``image_mean`` and ``image_std`` in ``preprocessor_config.json``, or ``default`` if these are missing.
    """
    path = folder / PREPROCESSOR_FILE
    if not path.is_file():
        return default
    content = read_hub_json(path)
    mean = _check_colour(content.get("image_mean", default[0]), f"{path}: image_mean")
    std = _check_colour(content.get("image_std", default[1]), f"{path}: image_std")
    if min(std) <= 0:
        raise ConfigError(f"{path}: image_std is {list(std)}; expected numbers above 0, get the file again")
    return mean, std


def _check_colour(values: object, where: str) -> tuple[float, float, float]:
    """Return the values of red, green and blue. Raises ConfigError if ``values`` are not three numbers."""
    if isinstance(values, (list, tuple)) and len(values) == 3:
        red, green, blue = values
        if all(isinstance(value, (int, float)) for value in values):
            return float(red), float(green), float(blue)
    raise ConfigError(f"{where} is {values!r}; expected three numbers, get the file again")


def load_pretrained(cls: Any, folder: Path) -> Any:
    """Load a ``transformers`` model of class ``cls``, frozen, on the CPU in float32 and in evaluation mode.

    Raises ConfigError if the weights cannot be read, are not finite, or are not exactly those of the model.
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
            # Mismatched keys are tuples of the name and both shapes.
            name = min(str(entry[0] if isinstance(entry, tuple) else entry) for entry in report[key])
            raise ConfigError(
                f"the weights in {folder} {problem.format(repr(name))}; expected a complete "
                f"{cls.__name__}, get them again"
            )
    tensors = model.state_dict()
    # Names and shapes were checked above. Here only values that are not finite are found.
    check_tensor_values(tensors, tensors, f"the weights in {folder}")
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
