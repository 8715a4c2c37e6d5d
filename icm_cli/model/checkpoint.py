"""Read and write checkpoints.

They are safetensors files of icm, which contain the configuration, or the published Lightning file. That one is a
pickle, and is read without running code of it.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn

from icm_cli.config import COMPONENT_KEYS, ModelConfig, parse_model_config
from icm_cli.errors import ConfigError, did_you_mean
from icm_cli.files.atomic_writes import atomic_write

T = TypeVar("T")

CONFIG_KEY = "icm.config"
"""Metadata key of the model configuration, as JSON."""
TRAINED_ON_KEY = "icm.trained_on"
"""Metadata key of the SHA-256 of every image file that the model was trained on, as a JSON list."""
SOURCES_KEY = "icm.sources"
"""Metadata key of the sources of these images, as JSON: title -> licence, numbers of groups and images."""
LICENCES_KEY = "icm.licences"
"""Metadata key of earlier versions: title of a source -> licence, as JSON."""
ROW_SCALE = ".row_scale"
"""Suffix of the tensor with the scales of an 8-bit matrix, float32 [rows]."""
PUBLISHED_PREFIX = "in_context_decoder."
"""Prefix of all keys of the published checkpoint."""
PLACEHOLDER_PACKAGES = ("pytorch_lightning.", "icm.")
"""Packages whose classes an old Lightning file may refer to. Placeholders replace the classes."""
MAX_HEADER_BYTES = 1 << 30
"""A file whose header would have this size or more is not a safetensors file."""
DAMAGED = "the file is damaged, get it again"
EXPECTED_CHECKPOINT = "expected a checkpoint of icm (.safetensors) or the published checkpoint (.ckpt)"

PUBLISHED_NAMES = (
    ("in_context_fusion.attn_module.norm.", "inter_similarity.norm."),
    *((f"in_context_fusion.attn_module_list.{i}.", f"intra_similarity.{i}.") for i in range(2)),
    *((f"in_context_fusion.ft_module_list.{i}.", f"fusion.project.{i}.") for i in range(2)),
    *((f"in_context_fusion.ft_attn_module_list.{i}.", f"fusion.join.{i}.") for i in range(2)),
    ("in_context_fusion.fusion.module_list.0.conv.", "fusion.merge."),
    *((f"detail_decoder.convstream.convs.{i}.", f"detail_decoder.image_stream.{i}.") for i in range(3)),
    *((f"detail_decoder.fusion_blks.{i}.conv.", f"detail_decoder.steps.{i}.") for i in range(4)),
    ("detail_decoder.matting_head.matting_convs.", "detail_decoder.output."),
)
"""Module names in the published checkpoint -> names in this package. In addition, "bn" and "ln" become "norm"."""


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint."""

    tensors: Mapping[str, Tensor]
    """Tensors by their name in :class:`~icm_cli.model.core.InContextMatting`, for example "head.coarse.bias"."""
    config: ModelConfig | None
    """None for the published file, which contains none."""
    metadata: Mapping[str, str]
    where: str
    """Describes the file in error messages."""

    def component(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of "head", "backbone", "objects" or "edges" by their names in that component."""
        prefix = f"{name}."
        return {key.removeprefix(prefix): tensor for key, tensor in self.tensors.items() if key.startswith(prefix)}


def save_checkpoint(
    path: Path,
    model: nn.Module,
    config: ModelConfig,
    *,
    with_backbone: bool,
    small: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model as safetensors with its configuration and further metadata, atomically.

    Without the backbone, its weights are loaded from the source in its configuration. ``small`` compresses the tensors
    for distribution: convolution kernels become float16, and matrices of the backbone and the objects become 8-bit
    integers with a scale per row. Vectors stay float32.
    """
    tensors = {
        key: tensor.detach().cpu().contiguous()
        for key, tensor in model.state_dict().items()
        if with_backbone or not key.startswith("backbone.")
    }
    if small:
        tensors = _compress_tensors(tensors)
    texts = {**(metadata or {}), CONFIG_KEY: json.dumps(config.as_dict())}
    with atomic_write(path) as file:
        file.write(save(tensors, texts))


EIGHT_BIT_PREFIXES = ("backbone.", "objects.")
"""Prefixes of the components whose matrices are compressed to 8-bit integers."""


def _compress_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in compressed form, and the scales of those that become 8-bit integers."""
    compressed = {}
    for key, tensor in tensors.items():
        if tensor.ndim < 2 or not tensor.is_floating_point():
            compressed[key] = tensor
        elif tensor.ndim > 2 or not key.startswith(EIGHT_BIT_PREFIXES):
            compressed[key] = tensor.half()
        else:
            scale = tensor.abs().amax(dim=1).clamp(min=1e-12) / 127  # of a row, so that its largest value becomes 127
            compressed[key] = (tensor / scale[:, None]).round().to(torch.int8)
            compressed[key + ROW_SCALE] = scale
    return compressed


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of icm, or the one that the authors of the paper published.

    Raises ConfigError for a damaged file, and for any other file.
    """
    header = _read_header(path)
    if header is None:
        return Checkpoint(_read_published(path), None, {}, f"checkpoint {path}")
    config = _parse_config(path, header.metadata)
    for key in header.keys:
        if key.partition(".")[0] not in COMPONENT_KEYS:
            raise ConfigError(f"checkpoint {path}: unknown tensor {key!r}; {DAMAGED}")
    with _open_safetensors(path) as file:
        # get_tensor maps the file into memory; copies let it be closed, or replaced while a model uses the tensors.
        tensors = {key: file.get_tensor(key).clone() for key in header.keys}
    _expand_matrices(tensors, path)
    return Checkpoint(tensors, config, header.metadata, f"checkpoint {path}")


def _expand_matrices(tensors: dict[str, Tensor], path: Path) -> None:
    """Replace 8-bit matrices by float32 matrices, and remove their scales, in place. Raises ConfigError."""
    scale_names = [name for name in tensors if name.endswith(ROW_SCALE)]
    for scale_name in scale_names:
        scale, name = tensors.pop(scale_name), scale_name.removesuffix(ROW_SCALE)
        matrix = tensors.get(name)
        if matrix is None or matrix.dtype != torch.int8 or matrix.ndim != 2 or scale.shape != matrix.shape[:1]:
            raise ConfigError(
                f"checkpoint {path}: tensor {scale_name!r} with the shape {list(scale.shape)} has no 8-bit matrix "
                f"{name!r} with as many rows; {DAMAGED}"
            )
        tensors[name] = matrix.float().mul_(scale[:, None])


def read_config(path: Path) -> ModelConfig | None:
    """Return the configuration in a checkpoint of icm, or None for the published file. Tensors are not read."""
    header = _read_header(path)
    return None if header is None else _parse_config(path, header.metadata)


def has_component(path: Path, name: str) -> bool:
    """Return whether a checkpoint contains weights of a component of the model. Tensors are not read."""
    header = _read_header(path)
    if header is None:  # the published file contains only the head
        return name == "head"
    return any(key.startswith(f"{name}.") for key in header.keys)


def read_training_digests(path: Path) -> frozenset[str] | None:
    """Return the SHA-256 of the image files that a checkpoint was trained on; None if they are not recorded."""
    header = _read_header(path)
    if header is None:
        return None
    digests = parse_json(header.metadata, TRAINED_ON_KEY, list, f"checkpoint {path}")
    return None if digests is None else frozenset(map(str, digests))


def parse_json(metadata: Mapping[str, str], key: str, kind: type[T], where: str) -> T | None:
    """Return the value of a metadata key of a checkpoint, parsed from JSON; None if the key does not exist.

    ``kind``: expected type of the value, list or dict. ``where``: name of the file. Raises ConfigError.
    """
    if key not in metadata:
        return None
    try:
        value = json.loads(metadata[key])
    except (ValueError, RecursionError):
        value = None  # no JSON: reported below
    if not isinstance(value, kind):
        raise ConfigError(f"{where}: its metadata {key!r} is not JSON with a {kind.__name__}; {DAMAGED}")
    return value


def read_training_sources(path: Path) -> dict[str, dict[str, Any]]:
    """Return what a checkpoint was trained on: title of a source -> its entry in :data:`SOURCES_KEY`.

    Files of earlier versions contain only the licences.
    """
    header, where = _read_header(path), f"checkpoint {path}"
    if header is None:
        return {}
    licences = parse_json(header.metadata, LICENCES_KEY, dict, where) or {}
    sources = {title: {"licence": licence} for title, licence in licences.items()}
    return sources | (parse_json(header.metadata, SOURCES_KEY, dict, where) or {})


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict whose tensors must be exactly those of the module, with finite values.

    Tensors that have the data types of the module are not copied. ``where``: name of the file. Raises ConfigError.
    """
    expected = module.state_dict()
    check_tensor_shapes(expected, {key: tensor.shape for key, tensor in tensors.items()}, where)
    check_tensor_values(expected, tensors, where)
    converted = {key: tensor.to(expected[key].dtype) for key, tensor in tensors.items()}
    module.load_state_dict(converted, strict=True, assign=True)


def check_tensor_shapes(expected: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], where: str) -> None:
    """Check that ``shapes``, by the name of the tensor, has exactly the names and shapes of ``expected``.

    ``where``: name of the file. Raises ConfigError.
    """
    for key in expected:
        if key not in shapes:
            raise ConfigError(
                f"{where}: tensor {key!r} is missing; the file is incomplete or of another model, get it again"
            )
    for key, shape in shapes.items():
        if key not in expected:
            raise ConfigError(f"{where}: unknown tensor {key!r}. {did_you_mean(key, expected)}")
        if shape != expected[key].shape:
            raise ConfigError(
                f"{where}: tensor {key!r} has the shape {list(shape)}; expected "
                f"{list(expected[key].shape)}. The file was made for another configuration"
            )


def check_tensor_values(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Check that tensors are finite, and floating-point where the expected ones are. Raises ConfigError.

    It takes 2 ms per million weights. Every tensor must have an expected one of the same name.
    """
    for key, tensor in tensors.items():
        is_float = tensor.is_floating_point()
        if is_float != expected[key].is_floating_point() or tensor.is_complex() or tensor.layout != torch.strided:
            raise ConfigError(
                f"{where}: tensor {key!r} has the type {tensor.dtype} ({tensor.layout}); expected "
                f"{expected[key].dtype} (torch.strided); {DAMAGED}"
            )
        if is_float and tensor.numel():
            values = tensor if tensor.element_size() > 1 else tensor.float()  # aminmax does not support float8
            smallest, largest = torch.aminmax(values)  # NaN if there is any; 20 times as fast as isfinite() of all
            if not (bool(smallest.isfinite()) and bool(largest.isfinite())):
                raise ConfigError(f"{where}: tensor {key!r} contains values that are NaN or infinite; {DAMAGED}")


def convert_published_tensors(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Rename the tensors of the published decoder to their names in this package, "head.*".

    The published names are without PUBLISHED_PREFIX. Raises ConfigError if one is unknown.
    """
    converted = {}
    for published, tensor in tensors.items():
        name = _rename_published(published)
        if name is None:
            raise ConfigError(
                f"{where} has an unknown key {PUBLISHED_PREFIX + published!r}; expected the state dict of the "
                "published In-Context Matting checkpoint"
            )
        converted[f"head.{name}"] = tensor
    return converted


def _rename_published(published: str) -> str | None:
    """Return the name in this package of a published tensor, by PUBLISHED_NAMES; None if it is unknown."""
    for theirs, ours in PUBLISHED_NAMES:
        if published.startswith(theirs):
            return ours + published.removeprefix(theirs).replace("bn.", "norm.").replace("ln.", "norm.")
    return None


def _read_published(path: Path) -> dict[str, Tensor]:
    """Return the tensors of the published checkpoint by their names in this package. Raises ConfigError."""
    content = _read_pickle(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, Mapping):
        raise ConfigError(f"checkpoint {path} is a torch file without a 'state_dict'; {EXPECTED_CHECKPOINT}")
    decoder = {}
    for key, tensor in state.items():
        if not str(key).startswith(PUBLISHED_PREFIX):
            raise ConfigError(
                f"checkpoint {path} has the key {key!r}, so it is of another project; expected keys that start with "
                f"{PUBLISHED_PREFIX!r}, as in the published In-Context Matting checkpoint"
            )
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"checkpoint {path}: {key!r} is not a tensor; {DAMAGED}")
        decoder[str(key).removeprefix(PUBLISHED_PREFIX)] = tensor
    return convert_published_tensors(decoder, f"checkpoint {path}")


def _read_pickle(path: Path) -> Any:
    """Read a torch file without running code of it (``weights_only``).

    The published file refers to classes of an old Lightning version. Empty placeholder classes replace them. Raises
    ConfigError for a file that refers to other classes, and for a damaged one.
    """
    try:
        class_names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        for name in class_names:
            if not name.startswith(PLACEHOLDER_PACKAGES):
                raise ConfigError(
                    f"checkpoint {path} refers to {name!r}, which could run code and is not part of the published "
                    "checkpoint; it was not opened. Get the file from where In-Context Matting was published"
                )
        placeholders = [(type(name.rpartition(".")[2], (), {}), name) for name in class_names]
        with torch.serialization.safe_globals(placeholders):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except Exception as error:  # a damaged file raises exceptions of many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"checkpoint {path} cannot be read ({reason}); the file is damaged, get it again") from error


@dataclass(frozen=True)
class _Header:
    metadata: Mapping[str, str]
    keys: Sequence[str]
    """Names of the tensors."""


def _read_header(path: Path) -> _Header | None:
    """Return the header of a checkpoint of icm, or None for a torch file. Raises ConfigError."""
    if path.is_dir():
        raise ConfigError(f"checkpoint {path} is a folder; give the file in it")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise ConfigError(f"checkpoint {path} cannot be read: {error.strerror}; give an existing file") from error
    if start.startswith(b"PK\x03\x04"):
        _check_torch_file(path)
        return None
    # A safetensors file begins with the size of its JSON header in 8 bytes, and the header.
    if len(start) <= 8 or start[8:9] != b"{" or int.from_bytes(start[:8], "little") >= MAX_HEADER_BYTES:
        raise ConfigError(f"checkpoint {path} is {_describe_content(start)}; {EXPECTED_CHECKPOINT}")
    with _open_safetensors(path) as tensors:
        header = _Header(tensors.metadata() or {}, list(tensors.keys()))
    if CONFIG_KEY not in header.metadata:
        raise ConfigError(
            f"checkpoint {path} is a safetensors file of another project; it has no configuration "
            f"of icm. {EXPECTED_CHECKPOINT}"
        )
    return header


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises ConfigError, also for errors while it is read."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except OSError as error:
        raise ConfigError(f"checkpoint {path} cannot be read: {error.strerror or error}; get it again") from error
    except (safetensors.SafetensorError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError(f"checkpoint {path} is a damaged or truncated safetensors file; get it again") from error


def _check_torch_file(path: Path) -> None:
    """Raise ConfigError if a zip archive is not a torch file."""
    try:
        with zipfile.ZipFile(path) as archive:
            is_torch_file = any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise ConfigError(f"checkpoint {path} is a damaged or truncated torch or zip file; get it again") from error
    if not is_torch_file:
        raise ConfigError(
            f"checkpoint {path} is a zip archive; extract it and give the checkpoint that it contains, "
            f"{EXPECTED_CHECKPOINT}"
        )


FORMATS = (
    (b"version https://git-lfs", "a Git LFS pointer instead of the file itself (run: git lfs pull)"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"%PDF", "a PDF"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    *((bytes((0x80, protocol)), "a bare pickle") for protocol in range(2, 6)),
)
"""First bytes of files that are often given by mistake -> description."""


def _describe_content(head: bytes) -> str:
    """Describe a file by its first bytes."""
    if not head:
        return "an empty file"
    for magic, description in FORMATS:
        if head.startswith(magic):
            return description
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page (HTML), possibly a login page instead of the download"
    if b"\0" in head:
        return "a file of unknown type"
    text = head.decode("utf-8", errors="replace")
    return "a text file" if text.count("\ufffd") < len(text) // 16 else "a file of unknown type"


def _parse_config(path: Path, metadata: Mapping[str, str]) -> ModelConfig:
    """Return the configuration in the metadata of a checkpoint. Raises ConfigError."""
    mapping = parse_json(metadata, CONFIG_KEY, dict, f"checkpoint {path}")
    return parse_model_config(mapping, f"configuration in checkpoint {path}")
