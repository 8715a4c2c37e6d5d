"""The stage "matte": train the head, and the backbone if it is trainable, on pairs of images, as in the paper."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from icm_cli.errors import ImageError, OutputError, UsageError
from icm_cli.events import TrainingListener
from icm_cli.files.atomic_writes import atomic_write
from icm_cli.files.digests import cache_folder, combined_digest
from icm_cli.geometry import ImageU8, alpha_to_u8
from icm_cli.model.contracts import Features, IntraSimilarity, TrainedHead
from icm_cli.model.core import InContextMatting, PairFeatures, Pairs
from icm_cli.model.similarity import AttentionMatrix, SelfSimilarity
from icm_cli.reports.contact_sheet import composite_on_backdrop
from icm_cli.training.data.pool import TrainingPool
from icm_cli.training.data.samples import PairBatch, PairMaker
from icm_cli.training.learner import Learner
from icm_cli.training.losses import LOSS_NAMES, compute_losses
from icm_cli.training.settings import Settings
from icm_cli.training.stages import PANEL_ROWS, Prediction, Stage, darken_outside, image_grid, to_rgb

FORMAT = "3"
"""Version of the cache entries. It is part of their names, so that entries of other versions are not used."""


class MatteStage(Stage[PairBatch]):
    """Predicts the alphas of pairs of images, with the losses of the released code (Guo et al. 2024, section 4)."""

    trainable_parts = ("head", "backbone")
    loss_names = LOSS_NAMES

    def __init__(self, settings: Settings, pool: TrainingPool) -> None:
        super().__init__(settings, pool)
        if settings.train.pairs.negative_probability and len(pool.groups) < 2 and not pool.backgrounds:
            raise UsageError(
                "there is only one group and no background, so every image shows the reference's object; add data: "
                "backgrounds, or give the images of each object with 'groups' or subfolders, or set "
                "train.pairs.negative_probability=0"
            )
        self.maker: PairMaker = PairMaker(pool, settings.train)
        self._model: InContextMatting | None = None
        self._cache: FeatureCache | None = None

    def select_module(self, model: InContextMatting) -> nn.Module:
        return model

    def prepare(self, learner: Learner, folder: Path, first_step: int, listener: TrainingListener) -> None:
        del folder, first_step
        self._model = learner.model
        config = self.settings.train
        if learner.trains_backbone or config.changes_pixels or not config.feature_cache_gb:
            return
        if learner.is_main:
            listener.on_notice(
                "features of the frozen backbone are cached on disk, because no augmentation changes pixels; the noise "
                "is the same in every step"
            )
        backbone = json.dumps(self.settings.model.as_dict()["backbone"], sort_keys=True)
        digest = combined_digest(backbone, learner.weights_digest, str(config.seed), learner.device.dtype_name)
        limit_bytes = int(config.feature_cache_gb * 1e9) // learner.accelerator.num_processes
        self._cache = FeatureCache(digest, limit_bytes, notice=listener.on_notice)

    def predict(self, forward: nn.Module, batch: PairBatch) -> Prediction:
        """Predict the alpha, float32 [B,1,S,S]. At padding it is the true alpha, so that padding has no loss."""
        pairs = batch.to_pairs(fixed_noise=self._cache is not None)
        features = None
        if self._cache is not None and self._model is not None:
            features = self._cache.pair_features(self._model, batch, pairs)
        alpha: Tensor = forward(pairs, features).alpha.float()
        return (torch.where(batch.valid[:, None], alpha, batch.true_alpha()),)

    def compute_losses(self, prediction: Prediction, batch: PairBatch) -> dict[str, Tensor]:
        return compute_losses(prediction[0], batch.true_alpha(), batch.trimap_levels(), self.settings.train.loss)

    @torch.no_grad()
    def render_panel(self, learner: Learner, batch: PairBatch) -> ImageU8:
        """Show for each sample: target, reference, true alpha, prediction, inter- and intra-similarity."""
        head = learner.model.head
        assert isinstance(head, TrainedHead)
        shown = batch.first_samples(PANEL_ROWS)
        pairs = shown.to_pairs(fixed_noise=self._cache is not None)  # cached features have fixed noise
        features = learner.model.extract_features(pairs)
        prepared = learner.model.prepare_pair_references(pairs, features)
        predicted = head(features.target, prepared, pairs.image, pairs.valid).alpha
        inter, intra = head.similarity_maps(features.target, prepared)
        references = [
            darken_outside(rgb.cpu().numpy(), mask.cpu().numpy())
            for rgb, mask in zip(shown.reference_rgb, shown.guidance, strict=True)
        ]
        columns = (
            shown.rgb,
            references,
            shown.alpha,
            predicted[:, 0],
            map(_heat_map, inter[:, 0]),
            map(_heat_map, intra[:, 0]),
        )
        return image_grid([[to_rgb(cell) for cell in row] for row in zip(*columns, strict=True)])

    def preview_sample(self, number: int) -> tuple[str, list[ImageU8]]:
        """Return reference, target, alpha, trimap and the object cut out of the target."""
        batch = self.maker.make_batch([number])
        rgb, alpha = batch.rgb[0].numpy(), batch.alpha[0].numpy()
        reference = darken_outside(batch.reference_rgb[0].numpy(), batch.guidance[0].numpy())
        cut_out = composite_on_backdrop(rgb, alpha)
        return batch.names[0], [reference, rgb, to_rgb(alpha), to_rgb(batch.trimap[0]), cut_out]


def _heat_map(values: Tensor) -> ImageU8:
    """Colour a map, [h,w] of any range, from its minimum (dark) to its maximum (bright)."""
    scaled = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-12)
    coloured = cv2.applyColorMap(alpha_to_u8(scaled.float().cpu().numpy()), cv2.COLORMAP_INFERNO)
    return np.ascontiguousarray(coloured[..., ::-1], np.uint8)


class FeatureCache:
    """A disk cache of the features of a frozen backbone, so that every image is encoded only once.

    The name of an entry is the digest of the canvas, its padding mask, and everything that determines the backbone.
    Entries are in half precision. Newly computed features are rounded to half precision, too, so that the results of a
    run do not depend on the contents of the cache.
    """

    def __init__(self, backbone_digest: str, limit_bytes: int, *, notice: Callable[[str], None]) -> None:
        """Open the cache. ``limit_bytes``: limit of the total size of all entries, also of other backbones.

        If later entries need space, those of other backbones are deleted, oldest first.
        """
        self._folder = cache_folder() / "features" / backbone_digest[:32]
        entries = [(path, path.stat()) for path in self._folder.parent.glob("*/*.pt")]
        self._free_bytes = limit_bytes - sum(state.st_size for _, state in entries)
        others = [(path, state) for path, state in entries if path.parent != self._folder]
        self._entries_of_other_backbones = sorted(others, key=lambda entry: entry[1].st_mtime, reverse=True)
        """Path and status of these entries; the last one is the oldest."""
        self._notice = notice
        self._is_full = False

    @torch.no_grad()
    def pair_features(self, model: InContextMatting, batch: PairBatch, pairs: Pairs) -> PairFeatures:
        """Return the features of a batch without augmentation; the backbone encodes what is not cached."""
        target_inputs = pairs.image, pairs.valid, pairs.target_noise_keys
        reference_inputs = pairs.reference_image, pairs.reference_valid, pairs.reference_noise_keys
        return PairFeatures(
            self._load_or_encode("target", batch.rgb, model.backbone.target_features, target_inputs),
            self._load_or_encode("reference", batch.reference_rgb, model.backbone.reference_features, reference_inputs),
        )

    def _load_or_encode(
        self,
        role: str,
        rgb: Tensor,
        encode: Callable[[Tensor, Tensor, Sequence[str]], Features],
        inputs: tuple[Tensor, Tensor, Sequence[str]],
    ) -> Features:
        """Return the features of images from the cache, or encode and store them.

        ``role``: target or reference. ``rgb``: the images, uint8 [B,S,S,3]. ``inputs``: arguments of ``encode``.
        """
        image, valid, noise_keys = inputs
        singles = []
        shape = str(tuple(rgb.shape[1:]))
        for i in range(len(rgb)):
            pixels, padding = rgb[i].cpu().numpy().tobytes(), valid[i].cpu().numpy().tobytes()
            path = self._folder / f"{combined_digest(FORMAT, role, pixels, padding, shape)}.pt"
            single = _read_entry(path)
            if single is None:
                # All noise keys are the same: see :meth:`PairBatch.to_pairs`.
                single = halve_features(encode(image[i : i + 1], valid[i : i + 1], noise_keys[:1]))
                content = io.BytesIO()
                torch.save(single, content)
                self._write_entry(path, content.getvalue())
            singles.append(single)
        return join_features(singles, image.device)

    def _write_entry(self, path: Path, data: bytes) -> None:
        """Write an entry if there is space. A failure is reported and ends caching, but not the run."""
        if self._is_full or not self._make_room(len(data)):
            self._stop_writing("the feature cache is full")
            return
        try:
            with atomic_write(path) as file:
                file.write(data)
            self._free_bytes -= len(data)
        except (OutputError, ImageError) as error:
            self._stop_writing(str(error))

    def _make_room(self, needed_bytes: int) -> bool:
        """Delete entries of other backbones until ``needed_bytes`` are free; return whether they are."""
        while self._free_bytes < needed_bytes and self._entries_of_other_backbones:
            path, stat = self._entries_of_other_backbones.pop()
            with contextlib.suppress(OSError):
                path.unlink()
                self._free_bytes += stat.st_size
        return self._free_bytes >= needed_bytes

    def _stop_writing(self, reason: str) -> None:
        if not self._is_full:
            self._is_full = True
            self._notice(f"{reason}; features of further images are not cached but computed whenever they are used")


def _read_entry(path: Path) -> Features | None:
    """Return the features of an entry; None if there is none, or if it is damaged."""
    try:
        with torch.serialization.safe_globals([Features, SelfSimilarity, AttentionMatrix]):
            return torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return None


def halve_features(features: Features) -> Features:
    """Return features in half precision on the CPU; a tensor that is used several times is converted once.

    Attention is multiplied by the number N of tokens: its mean, 1/N, is near the smallest half-precision number.
    """

    @functools.cache
    def halve(tensor: Tensor) -> Tensor:
        return (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous()

    def halve_attention(matrix: Tensor) -> Tensor:
        return halve(matrix * matrix.shape[-1])

    return _combine_features([features], lambda tensors: halve(*tensors), lambda matrices: halve_attention(*matrices))


def join_features(singles: Sequence[Features], device: torch.device) -> Features:
    """Join the results of :func:`halve_features` to those of a batch, in float32 on a device."""

    def join(tensors: Sequence[Tensor]) -> Tensor:
        joined = torch.cat([tensor.to(device) for tensor in tensors])
        return joined.float() if joined.is_floating_point() else joined

    return _combine_features(singles, join, lambda matrices: join(matrices) / matrices[0].shape[-1])


def _combine_features(
    singles: Sequence[Features],
    combine: Callable[[Sequence[Tensor]], Tensor],
    combine_attention: Callable[[Sequence[Tensor]], Tensor],
) -> Features:
    """Combine the features of several images, with the same grids, to those of a batch.

    ``combine`` makes one tensor of the corresponding tensors of all images, ``combine_attention`` the same of attention
    matrices.
    """

    def combine_intra(parts: Sequence[Any]) -> IntraSimilarity:
        if isinstance(parts[0], AttentionMatrix):
            return AttentionMatrix(combine_attention([part.matrix for part in parts]), parts[0].grid)
        feature, valid = combine([part.feature for part in parts]), combine([part.valid for part in parts])
        return SelfSimilarity(feature, valid, parts[0].temperature)

    return Features(
        correspondence_features=combine([single.correspondence_features for single in singles]),
        valid=combine([single.valid for single in singles]),
        scale_features={
            stride: combine([single.scale_features[stride] for single in singles])
            for stride in singles[0].scale_features
        },
        intra_similarity={
            stride: combine_intra([single.intra_similarity[stride] for single in singles])
            for stride in singles[0].intra_similarity
        },
    )


STAGE = MatteStage
