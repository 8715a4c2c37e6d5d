"""Checkpoints: our own safetensors with the configuration inside, and the published Lightning file.

Nothing is ever unpickled without ``weights_only``.
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

FileKind = Literal["ours", "published"]

CONFIG_KEY = "icm.config"
"""Key of the safetensors metadata that holds the model's configuration as JSON."""
TRAINED_ON_KEY = "icm.trained_on"
"""Key of the safetensors metadata with the SHA-256 of every file the model was trained on, a JSON list."""
ROW_SCALE = ".row_scale"
"""After the name of an 8-bit matrix: float32 [rows], what its integers are to be multiplied with."""
PUBLISHED_PREFIX = "in_context_decoder."
PLACEHOLDER_PACKAGES = ("pytorch_lightning.", "icm.")
"""Packages whose classes an old Lightning file may name; nothing of them is run or needed."""
EXPECTED = "expected a checkpoint of icm (.safetensors) or the published one (.ckpt)"

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
"""Module names of the published checkpoint -> ours; below them "bn" and "ln" are "norm" with us."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint under our own names (``head.*``, perhaps ``backbone.*``).

    ``config`` is None for the published file, which holds none.
    """

    tensors: Mapping[str, Tensor]
    config: ModelConfig | None
    metadata: Mapping[str, str]


def save_checkpoint(
    path: Path,
    model: nn.Module,
    config: ModelConfig,
    *,
    with_backbone: bool,
    small: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model whole or not at all, as safetensors with its configuration inside.

    Without the backbone the file holds the rest alone, and the backbone's weights come from where its
    configuration says. ``small`` is for files that are to be given away: kernels become float16, matrices of the
    backbone and the objects 8-bit integers with a scale for every row; vectors (biases, BatchNorm statistics) stay
    float32.
    """
    tensors = {
        key: tensor.detach().cpu().contiguous()
        for key, tensor in model.state_dict().items()
        if with_backbone or not key.startswith("backbone.")
    }
    if small:
        tensors = {name: each for key, tensor in tensors.items() for name, each in _small(key, tensor).items()}
    texts = {**(metadata or {}), CONFIG_KEY: json.dumps(config.as_dict())}
    with atomic_write(path) as file:
        file.write(save(tensors, texts))


MATRICES_IN_8_BITS = ("backbone.", "objects.")
"""Parts whose matrices are written small as 8-bit integers."""


def _small(key: str, tensor: Tensor) -> dict[str, Tensor]:
    if tensor.ndim < 2 or not tensor.is_floating_point():
        return {key: tensor}
    if tensor.ndim > 2 or not key.startswith(MATRICES_IN_8_BITS):
        return {key: tensor.half()}
    scale = tensor.abs().amax(dim=1).clamp(min=1e-12) / 127
    return {key: (tensor / scale[:, None]).round().to(torch.int8), key + ROW_SCALE: scale}


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of ours or the published one. Raises ConfigError, which names what the file is."""
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
    """The configuration inside a checkpoint of ours, None for the published file; reads no tensor."""
    if detect_file_kind(path) == "published":
        return None
    with safetensors.safe_open(path, framework="pt") as file:
        return _parse_config(path, file.metadata())


def has_backbone(path: Path) -> bool:
    """Whether a checkpoint holds its backbone's weights too; reads no tensor."""
    if detect_file_kind(path) == "published":
        return False
    with safetensors.safe_open(path, framework="pt") as file:
        return any(key.startswith("backbone.") for key in file.keys())  # noqa: SIM118 (not a mapping)


def read_training_digests(path: Path) -> frozenset[str] | None:
    """SHA-256 of the image files a checkpoint was trained on, None where it does not say."""
    if detect_file_kind(path) == "published":
        return None
    with safetensors.safe_open(path, framework="pt") as file:
        text = file.metadata().get(TRAINED_ON_KEY)
    return None if text is None else frozenset(json.loads(text))


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict whose keys and shapes are exactly the module's. Raises ConfigError."""
    expected = {key: tensor.shape for key, tensor in module.state_dict().items()}
    check_tensor_shapes(expected, {key: tensor.shape for key, tensor in tensors.items()}, where)
    module.load_state_dict(tensors, strict=True)


def check_tensor_shapes(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size], where: str) -> None:
    """Keys and shapes must be the expected ones exactly. Raises ConfigError that names the first that is not."""
    for key in expected:
        if key not in found:
            raise ConfigError(f"{where}: key {key!r} is missing; expected the same model whole, get the file again")
    for key, shape in found.items():
        if key not in expected:
            raise ConfigError(f"{where}: unknown key {key!r}. {did_you_mean(key, expected)}")
        if shape != expected[key]:
            raise ConfigError(
                f"{where}: {key!r} is {list(shape)}; expected {list(expected[key])}, so it was made for another "
                "configuration"
            )


def convert_published_tensors(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Tensors of the published decoder under our names, ``head.*``. Raises ConfigError for a key it does not know."""
    return {f"head.{_our_name(key, where)}": tensor for key, tensor in tensors.items()}


def _our_name(published: str, where: str) -> str:
    for theirs, ours in PUBLISHED_NAMES:
        if published.startswith(theirs):
            rest = published.removeprefix(theirs)
            return ours + rest.replace("bn.", "norm.").replace("ln.", "norm.")
    raise ConfigError(
        f"{where} has an unknown key {PUBLISHED_PREFIX + published!r}; expected the state dict of "
        "the published In-Context Matting checkpoint"
    )


def _read_published(path: Path) -> dict[str, Tensor]:
    content = _unpickle(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, Mapping):
        raise ConfigError(f"checkpoint {path} is a torch file without a 'state_dict'; {EXPECTED}")
    decoder = {}
    for key, tensor in state.items():
        if not str(key).startswith(PUBLISHED_PREFIX):
            raise ConfigError(
                f"checkpoint {path} has the key {key!r}, so it is another project's; expected keys that start with "
                f"{PUBLISHED_PREFIX!r}, as in the published In-Context Matting checkpoint"
            )
        decoder[str(key).removeprefix(PUBLISHED_PREFIX)] = tensor
    return convert_published_tensors(decoder, f"checkpoint {path}")


def _unpickle(path: Path) -> Any:
    """The content of a torch file, with empty placeholders for the classes an old Lightning names.

    Lightning before 2.0 keys its "callbacks" by class objects, which ``weights_only`` refuses.
    """
    try:
        refused = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        foreign = [name for name in refused if not name.startswith(PLACEHOLDER_PACKAGES)]
        if foreign:
            raise ConfigError(
                f"checkpoint {path} would run {foreign[0]!r} when unpickled, which the published one does not; "
                "it was not opened, get the file from where In-Context Matting was published"
            )
        placeholders = [(type(name.rpartition(".")[2], (), {}), name) for name in refused]
        with torch.serialization.safe_globals(placeholders):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"checkpoint {path} cannot be read ({reason}); it is damaged, get it again") from error


def detect_file_kind(path: Path) -> FileKind:
    """Whether a file is a checkpoint of ours or a torch zip. Raises ConfigError, which names what else it is."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise ConfigError(f"checkpoint {path} cannot be read: {error.strerror}; give an existing file") from error
    if head.startswith(b"PK\x03\x04"):
        return _zip_kind(path)
    if _is_safetensors(head):
        return _safetensors_kind(path)
    raise ConfigError(f"checkpoint {path} is {_describe(head)}; {EXPECTED}")


def _zip_kind(path: Path) -> FileKind:
    if not zipfile.is_zipfile(path):
        raise ConfigError(f"checkpoint {path} is a torch file or zip that was cut short; get it again")
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/data.pkl") for name in archive.namelist()):
            return "published"
    raise ConfigError(f"checkpoint {path} is a zip archive; unpack it and give the checkpoint inside, {EXPECTED}")


def _safetensors_kind(path: Path) -> FileKind:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ConfigError(
            f"checkpoint {path} is a safetensors file that is damaged or cut short; get it again"
        ) from error
    if CONFIG_KEY not in metadata:
        raise ConfigError(
            f"checkpoint {path} is a safetensors file of another project, without a configuration of icm; {EXPECTED}"
        )
    return "ours"


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30


FORMATS = (
    (b"version https://git-lfs", "a git-LFS pointer and not the file itself (run: git lfs pull)"),
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
"""First bytes of files that are often given by mistake -> what they are."""


def _describe(head: bytes) -> str:
    if not head:
        return "an empty file"
    for magic, description in FORMATS:
        if head.startswith(magic):
            return description
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page (HTML), perhaps a download that asked to log in"
    if b"\0" in head:
        return "a file of an unknown kind"
    text = head.decode("utf-8", errors="replace")
    return "a text file" if text.count("\ufffd") < len(text) // 16 else "a file of an unknown kind"


def _parse_config(path: Path, metadata: Mapping[str, str]) -> ModelConfig:
    try:
        mapping = json.loads(metadata[CONFIG_KEY])
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"checkpoint {path} holds a configuration that is not JSON; it is damaged, get it again"
        ) from error
    return parse_model_config(mapping, f"configuration in checkpoint {path}")
