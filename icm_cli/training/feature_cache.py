"""A frozen backbone's features on disk, so that an image that comes again is not encoded again.

By content: an entry's name is the digest of the canvas, of what is padding, and of all that decides the backbone. In
half precision, and so is what is used of an image that was encoded just now, whether it can be kept or not: a run's
numbers do not depend on what the cache holds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from icm_cli.errors import ImageError, OutputError
from icm_cli.files import atomic_write, cache_folder, digest_of
from icm_cli.model.contracts import Features, MatrixIntraSimilarity
from icm_cli.model.in_context_matting import InContextMatting, PairFeatures, Pairs
from icm_cli.model.similarity import AttentionMatrix
from icm_cli.training.samples import Batch


class FeatureCache:
    """Features of pairs, from the disk where they are there; ``hits`` and ``misses`` count images."""

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
        self.hits = 0
        self.misses = 0

    def features(self, model: InContextMatting, batch: Batch, pairs: Pairs) -> PairFeatures:
        """Of a batch whose pixels are the files' own; the backbone runs for what is not there yet."""
        backbone = model.backbone
        targets = [
            self._one(
                ("target", batch.rgb[i], batch.valid[i]),
                partial(backbone.target, pairs.image[i : i + 1], pairs.valid[i : i + 1], pairs.target_noise[:1]),
                pairs.image,
            )
            for i in range(len(batch.names))
        ]
        references = [
            self._one(
                ("reference", batch.reference_rgb[i], batch.reference_valid[i]),
                partial(
                    backbone.reference,
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
        digest = digest_of(role, rgb.cpu().numpy().tobytes(), valid.cpu().numpy().tobytes(), str(tuple(rgb.shape)))
        path = self._home / f"{digest}.safetensors"
        with contextlib.suppress(OSError, safetensors.SafetensorError):
            packed = load_file(path)
            self.hits += 1
            return unpacked(packed, like.device)
        self.misses += 1
        packed = pack(encode())
        self._keep(path, save(packed))
        return unpacked(packed, like.device)

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


def pack(features: Features) -> dict[str, Tensor]:
    """Tensors of one image's features for a file, on the CPU in half precision.

    Attention is scaled by the number of tokens: its mean, 1/N, is near the smallest half-precision numbers.
    """
    tensors = {"correspondence": features.correspondence, "valid": features.valid}
    for stride, feature in features.scales.items():
        if feature.shape != features.correspondence.shape or not torch.equal(feature, features.correspondence):
            tensors[f"scale.{stride}"] = feature
        else:
            tensors[f"same.{stride}"] = torch.zeros(0)
    for stride, intra in features.intra.items():
        if isinstance(intra, MatrixIntraSimilarity):
            matrix = intra.matrix()
            tensors[f"intra.{stride}"] = matrix * matrix.shape[-1]
            tensors[f"grid.{stride}"] = torch.tensor(intra.grid)
    return {name: _small(tensor).cpu().contiguous() for name, tensor in tensors.items()}


def unpacked(tensors: dict[str, Tensor], device: torch.device) -> Features:
    """The other way."""
    on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
    correspondence = on_device["correspondence"].float()
    scales = {stride: tensor.float() for stride, tensor in _by_stride(on_device, "scale")}
    scales |= {stride: correspondence for stride, _ in _by_stride(on_device, "same")}
    intra = {}
    for stride, scaled in _by_stride(on_device, "intra"):
        height, width = tensors[f"grid.{stride}"].tolist()
        intra[stride] = AttentionMatrix(scaled.float() / scaled.shape[-1], (height, width))
    return Features(correspondence, on_device["valid"], scales, intra)


def joined(singles: Sequence[Features]) -> Features:
    """Features of single images as those of a batch; all have the same strides and grids."""
    first = singles[0]
    intra = {
        stride: AttentionMatrix(torch.cat([_matrix(each, stride) for each in singles]), of_first.grid)
        for stride, of_first in first.intra.items()
    }
    return Features(
        torch.cat([each.correspondence for each in singles]),
        torch.cat([each.valid for each in singles]),
        {stride: torch.cat([each.scales[stride] for each in singles]) for stride in first.scales},
        intra,
    )


def _matrix(features: Features, stride: int) -> Tensor:
    intra = features.intra[stride]
    assert isinstance(intra, MatrixIntraSimilarity)
    return intra.matrix()


def _by_stride(tensors: dict[str, Tensor], kind: str) -> Iterator[tuple[int, Tensor]]:
    for name, tensor in tensors.items():
        if name.startswith(f"{kind}."):
            yield int(name.removeprefix(f"{kind}.")), tensor


def _small(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor
