"""Read and write checkpoints: safetensors files of icm, which contain the configuration, and the
published Lightning file.

Pickled files are read only with ``weights_only``.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn

from icm_cli.config import ModelConfig, parse_model_config
from icm_cli.errors import ConfigError, did_you_mean
from icm_cli.files import atomic_write

FileKind = Literal["icm", "published"]

CONFIG_KEY = "icm.config"
"""Metadata key of the model configuration, as JSON."""
TRAINED_ON_KEY = "icm.trained_on"
"""Metadata key of the SHA-256 of every image file that the model was trained on, as a JSON list."""
ROW_SCALE = ".row_scale"
"""Suffix of the tensor with the scales of an 8-bit matrix, float32 [rows]."""
PUBLISHED_PREFIX = "in_context_decoder."
"""Prefix of all keys of the published checkpoint."""
PLACEHOLDER_PACKAGES = ("pytorch_lightning.", "icm.")
"""Packages whose classes an old Lightning file may refer to. Placeholders replace the classes."""
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
"""Module names in the published checkpoint -> names in this package. In addition, "bn" and "ln"
become "norm"."""


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint.

    Attributes:
        tensors: Tensors by their name in :class:`~icm_cli.model.core.InContextMatting`, for example
            "head.coarse.bias".
        config: Configuration of the model; None for the published file, which contains none.
        metadata: Metadata of the safetensors file.
    """

    tensors: Mapping[str, Tensor]
    config: ModelConfig | None
    metadata: Mapping[str, str]

    def component(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of "head", "backbone", "objects" or "edges" by their names in that
        component."""
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
    """Write a model as safetensors with its configuration, atomically.

    Args:
        path: File to write.
        model: Model whose tensors are saved.
        config: Configuration of the model.
        with_backbone: Include the backbone. Without it, the weights of the backbone are loaded from
            the source in its configuration.
        small: Compress the tensors for distribution. Convolution kernels become float16. Matrices
            of the backbone and the objects become 8-bit integers with a scale per row. Vectors stay
            float32.
        metadata: Additional metadata.
    """
    tensors = {
        key: tensor.detach().cpu().contiguous()
        for key, tensor in model.state_dict().items()
        if with_backbone or not key.startswith("backbone.")
    }
    if small:
        tensors = {
            name: each for key, tensor in tensors.items() for name, each in _compress_tensor(key, tensor).items()
        }
    texts = {**(metadata or {}), CONFIG_KEY: json.dumps(config.as_dict())}
    with atomic_write(path) as file:
        file.write(save(tensors, texts))


EIGHT_BIT_PREFIXES = ("backbone.", "objects.")
"""Prefixes of the components whose matrices are compressed to 8-bit integers."""


def _compress_tensor(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return a tensor in compressed form, by name, with its scales if it has any."""
    if tensor.ndim < 2 or not tensor.is_floating_point():
        return {key: tensor}
    if tensor.ndim > 2 or not key.startswith(EIGHT_BIT_PREFIXES):
        return {key: tensor.half()}
    scale = tensor.abs().amax(dim=1).clamp(min=1e-12) / 127
    return {key: (tensor / scale[:, None]).round().to(torch.int8), key + ROW_SCALE: scale}


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of icm or the published checkpoint.

    Raises:
        ConfigError: The file is something else, or damaged; the message says what it is.
    """
    if detect_file_kind(path) == "published":
        return Checkpoint(_read_published(path), None, {})
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    for key in [key for key in tensors if key.endswith(ROW_SCALE)]:
        scale, matrix = tensors.pop(key), key.removesuffix(ROW_SCALE)
        tensors[matrix] = tensors[matrix].float() * scale[:, None]
    return Checkpoint(tensors, _parse_config(path, metadata), metadata)


def read_config(path: Path) -> ModelConfig | None:
    """Return the configuration in a checkpoint of icm, or None for the published file. Tensors are
    not read."""
    if detect_file_kind(path) == "published":
        return None
    with safetensors.safe_open(path, framework="pt") as file:
        return _parse_config(path, file.metadata())


def has_component(path: Path, name: str) -> bool:
    """Return whether a checkpoint contains weights of a component of the model. Tensors are not
    read."""
    if detect_file_kind(path) == "published":
        return name == "head"
    with safetensors.safe_open(path, framework="pt") as file:
        return any(key.startswith(f"{name}.") for key in file.keys())  # noqa: SIM118 (not a mapping)


def read_training_digests(path: Path) -> frozenset[str] | None:
    """Return the SHA-256 of the image files that a checkpoint was trained on; None if they are not
    recorded."""
    if detect_file_kind(path) == "published":
        return None
    with safetensors.safe_open(path, framework="pt") as file:
        text = file.metadata().get(TRAINED_ON_KEY)
    return None if text is None else frozenset(json.loads(text))


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict whose names and shapes must be exactly those of the module.

    Raises:
        ConfigError: A tensor is missing, unknown or of another shape. ``where`` names the file in
            the message.
    """
    expected = {key: tensor.shape for key, tensor in module.state_dict().items()}
    check_tensor_shapes(expected, {key: tensor.shape for key, tensor in tensors.items()}, where)
    module.load_state_dict(tensors, strict=True)


def check_tensor_shapes(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size], where: str) -> None:
    """Check that tensors have exactly the expected names and shapes.

    Raises:
        ConfigError: A tensor is missing, unknown or of another shape. ``where`` names the file in
            the message.
    """
    for key in expected:
        if key not in found:
            raise ConfigError(
                f"{where}: tensor {key!r} is missing; the file is incomplete or of another model, get it again"
            )
    for key, shape in found.items():
        if key not in expected:
            raise ConfigError(f"{where}: unknown tensor {key!r}. {did_you_mean(key, expected)}")
        if shape != expected[key]:
            raise ConfigError(
                f"{where}: tensor {key!r} has the shape {list(shape)}; expected "
                f"{list(expected[key])}. The file was made for another configuration"
            )


def convert_published_tensors(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return the tensors of the published decoder by their names in this package, "head.*".

    Raises:
        ConfigError: A name is unknown.
    """
    return {f"head.{_convert_name(key, where)}": tensor for key, tensor in tensors.items()}


def _convert_name(published: str, where: str) -> str:
    for theirs, ours in PUBLISHED_NAMES:
        if published.startswith(theirs):
            rest = published.removeprefix(theirs)
            return ours + rest.replace("bn.", "norm.").replace("ln.", "norm.")
    raise ConfigError(
        f"{where} has an unknown key {PUBLISHED_PREFIX + published!r}; expected the state dict of "
        "the published In-Context Matting checkpoint"
    )


def _read_published(path: Path) -> dict[str, Tensor]:
    content = _read_pickle(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, Mapping):
        raise ConfigError(f"checkpoint {path} is a torch file without a 'state_dict'; {EXPECTED_CHECKPOINT}")
    decoder = {}
    for key, tensor in state.items():
        if not str(key).startswith(PUBLISHED_PREFIX):
            raise ConfigError(
                f"checkpoint {path} has the key {key!r}, so it is of another project; expected "
                f"keys that start with {PUBLISHED_PREFIX!r}, as in the published In-Context "
                "Matting checkpoint"
            )
        decoder[str(key).removeprefix(PUBLISHED_PREFIX)] = tensor
    return convert_published_tensors(decoder, f"checkpoint {path}")


def _read_pickle(path: Path) -> Any:
    """Read a torch file with empty placeholders for the classes that old Lightning versions refer
    to.

    Lightning before 2.0 uses class objects as keys of its "callbacks", which ``weights_only``
    refuses.
    """
    try:
        refused = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        foreign = [name for name in refused if not name.startswith(PLACEHOLDER_PACKAGES)]
        if foreign:
            raise ConfigError(
                f"checkpoint {path} refers to {foreign[0]!r}, which could run code and is not part "
                "of the published checkpoint; it was not opened. Get the file from where "
                "In-Context Matting was published"
            )
        placeholders = [(type(name.rpartition(".")[2], (), {}), name) for name in refused]
        with torch.serialization.safe_globals(placeholders):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"checkpoint {path} cannot be read ({reason}); the file is damaged, get it again") from error


def detect_file_kind(path: Path) -> FileKind:
    """Return whether a file is a checkpoint of icm or a torch file, by its content.

    Raises:
        ConfigError: The file is something else; the message says what it is.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise ConfigError(f"checkpoint {path} cannot be read: {error.strerror}; give an existing file") from error
    if head.startswith(b"PK\x03\x04"):
        return _zip_kind(path)
    if _is_safetensors(head):
        return _safetensors_kind(path)
    raise ConfigError(f"checkpoint {path} is {_describe_content(head)}; {EXPECTED_CHECKPOINT}")


def _zip_kind(path: Path) -> FileKind:
    if not zipfile.is_zipfile(path):
        raise ConfigError(f"checkpoint {path} is a truncated torch or zip file; get it again")
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/data.pkl") for name in archive.namelist()):
            return "published"
    raise ConfigError(
        f"checkpoint {path} is a zip archive; extract it and give the checkpoint that it contains, "
        f"{EXPECTED_CHECKPOINT}"
    )


def _safetensors_kind(path: Path) -> FileKind:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ConfigError(f"checkpoint {path} is a damaged or truncated safetensors file; get it again") from error
    if CONFIG_KEY not in metadata:
        raise ConfigError(
            f"checkpoint {path} is a safetensors file of another project; it has no configuration "
            f"of icm. {EXPECTED_CHECKPOINT}"
        )
    return "icm"


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30


FORMATS = (
    (b"version https://git-lfs", "a Git LFS pointer instead of the file itself (run: git lfs pull)"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"%PDF", "a PDF"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x80\x02", "a bare pickle"),
    (b"\x80\x03", "a bare pickle"),
    (b"\x80\x04", "a bare pickle"),
    (b"\x80\x05", "a bare pickle"),
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
    try:
        mapping = json.loads(metadata[CONFIG_KEY])
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"checkpoint {path} contains a configuration that is not JSON; the file is damaged, get it again"
        ) from error
    return parse_model_config(mapping, f"configuration in checkpoint {path}")
