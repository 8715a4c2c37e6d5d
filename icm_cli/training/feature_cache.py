"""A frozen backbone's features on disk, so that an image that comes again is not encoded again.

By content: an entry's name is the digest of the canvas, of what is padding, and of all that decides the backbone. In
half precision, and so is what is used of an image that was encoded just now, whether it can be kept or not: a run's
numbers do not depend on what the cache holds.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from icm_cli.errors import ImageError, OutputError
from icm_cli.files import atomic_write, cache_folder, combined_digest
from icm_cli.model.contracts import Features, IntraSimilarity, MatrixIntraSimilarity
from icm_cli.model.core import InContextMatting, PairFeatures, Pairs
from icm_cli.model.similarity import AttentionMatrix, SelfSimilarity
from icm_cli.training.data.samples import PairBatch


class FeatureCache:
    """Features of pairs, from the disk where they are there."""

    def __init__(
        self, backbone_digest: str, limit_bytes: int, *, notice: Callable[[str], None], root: Path | None = None
    ) -> None:
        """``limit_bytes`` bounds all entries under ``root``; the oldest of other backbones make room."""
        self._home = (root or cache_folder() / "features") / backbone_digest[:32]
        entries = [(path, path.stat()) for path in self._home.parent.glob("*/*.safetensors")]
        self._room = limit_bytes - sum(state.st_size for _, state in entries)
        others = [(path, state) for path, state in entries if path.parent != self._home]
        self._foreign = sorted(others, key=lambda entry: entry[1].st_mtime, reverse=True)
        self._notice = notice
        self._is_full = False

    def features(self, model: InContextMatting, batch: PairBatch, pairs: Pairs) -> PairFeatures:
        """Features of a batch whose pixels are the files' own; the backbone runs for those not on disk yet."""
        backbone = model.backbone
        targets = [
            self._one(
                ("target", batch.rgb[i], batch.valid[i]),
                partial(
                    backbone.target_features, pairs.image[i : i + 1], pairs.valid[i : i + 1], pairs.target_noise[:1]
                ),
                pairs.image,
            )
            for i in range(len(batch.names))
        ]
        references = [
            self._one(
                ("reference", batch.reference_rgb[i], batch.reference_valid[i]),
                partial(
                    backbone.reference_features,
                    pairs.reference_image[i : i + 1],
                    pairs.reference_valid[i : i + 1],
                    pairs.reference_noise[:1],
                ),
                pairs.image,
            )
            for i in range(len(batch.names))
        ]
        return PairFeatures(joined(targets), joined(references))

    @torch.no_grad()
    def _one(self, content: tuple[str, Tensor, Tensor], encode: Callable[[], Features], like: Tensor) -> Features:
        role, rgb, valid = content
        digest = combined_digest(
            role, rgb.cpu().numpy().tobytes(), valid.cpu().numpy().tobytes(), str(tuple(rgb.shape))
        )
        path = self._home / f"{digest}.safetensors"
        with contextlib.suppress(OSError, safetensors.SafetensorError), safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return unpacked(tensors, file.metadata(), like.device)
        tensors, texts = pack(encode())
        self._keep(path, save(tensors, texts))
        return unpacked(tensors, texts, like.device)

    def _keep(self, path: Path, data: bytes) -> None:
        """Write an entry where there is room; a cache is not worth a run, so no failure ends it."""
        if self._is_full or not self._makes_room(len(data)):
            self._stop("the feature cache is full")
            return
        try:
            with atomic_write(path) as file:
                file.write(data)
            self._room -= len(data)
        except (OutputError, ImageError) as error:
            self._stop(str(error))

    def _makes_room(self, size: int) -> bool:
        while self._room < size and self._foreign:
            path, state = self._foreign.pop()
            with contextlib.suppress(OSError):
                path.unlink()
                self._room += state.st_size
        return self._room >= size

    def _stop(self, reason: str) -> None:
        if not self._is_full:
            self._is_full = True
            self._notice(f"{reason}; features of further images are computed each time they come")


def pack(features: Features) -> tuple[dict[str, Tensor], dict[str, str]]:
    """One image's features for a file: tensors on the CPU in half precision, each once, and what else is to be known.

    Attention is scaled by the number of tokens: its mean, 1/N, is near the smallest half-precision numbers.
    """
    named = {"correspondence": features.correspondence, "valid": features.valid}
    named |= {f"scale.{stride}": feature for stride, feature in features.scales.items()}
    texts = {}
    for stride, intra in features.intra.items():
        texts[f"grid.{stride}"] = json.dumps(intra.grid)
        if isinstance(intra, SelfSimilarity):
            named |= {f"alike.{stride}": intra.feature, f"alike_valid.{stride}": intra.valid}
            texts[f"temperature.{stride}"] = str(intra.temperature)
        elif isinstance(intra, MatrixIntraSimilarity):
            matrix = intra.matrix()
            named[f"matrix.{stride}"] = matrix * matrix.shape[-1]
    first: dict[int, str] = {}
    for name, tensor in named.items():
        texts[f"is.{name}"] = first.setdefault(id(tensor), name)
    return {name: _small(named[name]).cpu().contiguous() for name in first.values()}, texts


def unpacked(tensors: Mapping[str, Tensor], texts: Mapping[str, str], device: torch.device) -> Features:
    """The other way."""
    on_device = {name: _large(tensor.to(device)) for name, tensor in tensors.items()}
    named = {key.removeprefix("is."): on_device[name] for key, name in texts.items() if key.startswith("is.")}
    intra: dict[int, IntraSimilarity] = {}
    for stride, grid in _by_stride(texts, "grid"):
        if f"temperature.{stride}" in texts:
            temperature = float(texts[f"temperature.{stride}"])
            intra[stride] = SelfSimilarity(named[f"alike.{stride}"], named[f"alike_valid.{stride}"], temperature)
        else:
            scaled = named[f"matrix.{stride}"]
            height, width = json.loads(grid)
            intra[stride] = AttentionMatrix(scaled / scaled.shape[-1], (height, width))
    return Features(named["correspondence"], named["valid"], dict(_by_stride(named, "scale")), intra)


def joined(singles: Sequence[Features]) -> Features:
    """Features of single images as those of a batch; all have the same strides and grids."""
    return Features(
        torch.cat([each.correspondence for each in singles]),
        torch.cat([each.valid for each in singles]),
        {stride: torch.cat([each.scales[stride] for each in singles]) for stride in singles[0].scales},
        {stride: _joined_intra([each.intra[stride] for each in singles]) for stride in singles[0].intra},
    )


def _joined_intra(singles: Sequence[IntraSimilarity]) -> IntraSimilarity:
    alike = [each for each in singles if isinstance(each, SelfSimilarity)]
    if alike:
        features, valid = torch.cat([each.feature for each in alike]), torch.cat([each.valid for each in alike])
        return SelfSimilarity(features, valid, alike[0].temperature)
    matrices = [each.matrix() for each in singles if isinstance(each, MatrixIntraSimilarity)]
    return AttentionMatrix(torch.cat(matrices), singles[0].grid)


Value = TypeVar("Value")


def _by_stride(named: Mapping[str, Value], kind: str) -> Iterator[tuple[int, Value]]:
    for name, value in named.items():
        if name.startswith(f"{kind}."):
            yield int(name.removeprefix(f"{kind}.")), value


def _small(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor


def _large(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
