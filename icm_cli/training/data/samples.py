"""Training samples of the stage "matte": a target with its alpha, and a reference that shows the object.

A sample depends only on the seed and its number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from icm_cli.errors import ImageError, TrainingError
from icm_cli.geometry import ImageU8, binarize_alpha
from icm_cli.model.core import TARGET_NOISE, Pairs, reference_noise_key
from icm_cli.scoring.rule import make_trimap
from icm_cli.training.batches import Batch
from icm_cli.training.data.augment import Rng, draw_guidance
from icm_cli.training.data.pool import TrainingItem, TrainingPool
from icm_cli.training.data.scenes import Scene, SceneMaker, require_foreground
from icm_cli.training.losses import quantise_trimap
from icm_cli.training.settings import TrainConfig

MAX_ATTEMPTS = 10
"""Number of unreadable draws for one sample after which training ends."""
BACKGROUND_PROBABILITY = 0.3
"""Probability that a negative is a background image, with distractors at most, instead of another item."""
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class TrainingSample:
    """A pair on the canvas: rgb uint8 [S,S,3], alpha and trimap uint8 [S,S], guidance and valid bool [S,S]."""

    name: str
    counter: int
    rgb: ImageU8
    alpha: ImageU8
    trimap: ImageU8
    valid: Bools
    reference_rgb: ImageU8
    guidance: Bools
    reference_valid: Bools
    skipped: tuple[str, ...] = ()
    """For each earlier draw that could not be read: the reason."""


class SampleMaker(Dataset["TrainingSample | str"]):
    """Makes sample number ``counter``, which is the same in every run, process and worker with the same seed.

    If no sample can be made, the item is a str with the reason (an exception would lose its type between
    processes).
    """

    def __init__(self, pool: TrainingPool, config: TrainConfig) -> None:
        self.pool = pool
        self.config = config
        self._scenes = SceneMaker(config.canvas_px, config.augment)

    def make_sample(self, counter: int) -> TrainingSample:
        """Make sample number ``counter``. Raises TrainingError if all draws are unreadable."""
        sample = self[counter]
        if isinstance(sample, str):
            raise TrainingError(sample)
        return sample

    def __getitem__(self, counter: int) -> TrainingSample | str:
        skipped: list[str] = []
        for attempt in range(MAX_ATTEMPTS):
            rng = np.random.default_rng((self.config.seed, counter, attempt))
            try:
                return replace(self._draw_pair(counter, rng), skipped=tuple(skipped))
            except ImageError as error:
                skipped.append(str(error))
        return (
            f"sample {counter} could not be made in {MAX_ATTEMPTS} draws; the last reason: {skipped[-1]}. Repair the "
            "data, or exclude files with 'exclude'"
        )

    def make_view(self, item: TrainingItem, rng: Rng) -> Scene:
        """Make a scene of an item as a target or a reference, with random distractors. Raises ImageError."""
        scene = self._scenes.add_distractors(self._make_scene(item, rng), self._draw_distractors(item, rng), rng)
        return self._scenes.augment_colours(scene, rng)

    def _draw_pair(self, counter: int, rng: Rng) -> TrainingSample:
        pairs, pool = self.config.pairs, self.pool
        item = pool.draw_item(rng)
        partner = pool.draw_partner(item, rng, pairs.same_image_probability)
        is_negative = rng.random() < pairs.negative_probability
        distractors = self._draw_distractors(item, rng)
        if is_negative:
            target, name = self._make_negative(partner, rng)
        else:
            target, name = self._make_scene(item, rng), item.name
        target = self._scenes.augment_colours(self._scenes.add_distractors(target, distractors, rng), rng)
        reference = self._make_scene(partner, rng)
        if distractors and rng.random() < pairs.reference_distractor_probability:
            reference = self._scenes.add_distractors(reference, distractors[:1], rng)
        reference = self._scenes.augment_colours(require_foreground(reference, partner), rng)
        alpha = binarize_alpha(target.alpha) if item.is_binary else target.alpha
        return TrainingSample(
            name=f"{name} by {partner.name}",
            counter=counter,
            rgb=target.rgb,
            alpha=alpha,
            trimap=self._make_trimap(alpha, target.trimap),
            valid=target.valid,
            reference_rgb=reference.rgb,
            guidance=draw_guidance(reference.alpha, pairs, rng),
            reference_valid=reference.valid,
        )

    def _make_scene(self, item: TrainingItem, rng: Rng) -> Scene:
        """Make a scene of an item: its photograph, or its object on another background."""
        backgrounds = self.pool.backgrounds
        can_composite = bool(backgrounds) and not item.is_binary
        if item.is_foreground or (rng.random() < self.config.pairs.composite_probability and can_composite):
            behind = self._scenes.make_background(backgrounds[rng.integers(len(backgrounds))], rng)
            return self._scenes.make_composite(item, behind, rng)
        return self._scenes.make_photograph(item, rng)

    def _make_negative(self, reference: TrainingItem, rng: Rng) -> tuple[Scene, str]:
        """Make a scene without the reference's object, with an alpha of 0; return it and its name."""
        backgrounds = self.pool.backgrounds
        negative = self.pool.draw_negative(reference, rng, for_cutout=False)
        if backgrounds and (negative is None or rng.random() < BACKGROUND_PROBABILITY):
            path = backgrounds[rng.integers(len(backgrounds))]
            scene, name = self._scenes.make_background(path, rng), path.name
        elif negative is None:
            raise ImageError(f"there is no image without the object of {reference.image}")
        else:
            scene, name = self._make_scene(negative, rng), negative.name
        return replace(scene, alpha=np.zeros_like(scene.alpha), trimap=None), f"{name} (absent)"

    def _draw_distractors(self, item: TrainingItem, rng: Rng) -> list[TrainingItem]:
        """Draw items whose objects are pasted into a scene of ``item``."""
        pairs = self.config.pairs
        if rng.random() >= pairs.distractor_probability or not pairs.max_distractors:
            return []
        count = int(rng.integers(1, pairs.max_distractors + 1))
        drawn = (self.pool.draw_negative(item, rng, for_cutout=True) for _ in range(count))
        return [distractor for distractor in drawn if distractor is not None]

    def _make_trimap(self, alpha: ImageU8, published: ImageU8 | None) -> ImageU8:
        """Return the published trimap; without one, a trimap whose unknown region is 0 < alpha < 1, dilated."""
        if published is not None:
            return published
        return make_trimap(alpha, self.config.trimap_kernel_px)


@dataclass(frozen=True)
class PairBatch(Batch):
    """A batch of pairs: images uint8 [B,S,S,3], alpha and trimap uint8 [B,S,S], guidance and valid bool [B,S,S]."""

    rgb: Tensor
    alpha: Tensor
    trimap: Tensor
    valid: Tensor
    reference_rgb: Tensor
    guidance: Tensor
    reference_valid: Tensor

    @classmethod
    def from_samples(cls, samples: Sequence[TrainingSample]) -> Self:
        """Stack samples into a batch."""
        arrays = {
            name: torch.from_numpy(np.stack([getattr(sample, name) for sample in samples])) for name in TENSOR_NAMES
        }
        return cls(
            tuple(sample.name for sample in samples),
            tuple(sample.counter for sample in samples),
            tuple(reason for sample in samples for reason in sample.skipped),
            **arrays,
        )

    def to_pairs(self, *, fixed_noise: bool) -> Pairs:
        """Return the inputs of the model. The noise depends on the sample number, or is that of inference (fixed)."""
        if fixed_noise:
            noise = [TARGET_NOISE] * len(self.names), [reference_noise_key(0)] * len(self.names)
        else:
            noise = [f"target {n}" for n in self.counters], [f"reference {n}" for n in self.counters]
        return Pairs(
            _to_image_tensor(self.rgb),
            self.valid,
            _to_image_tensor(self.reference_rgb),
            self.guidance[:, None].float(),
            self.reference_valid,
            *noise,
        )

    def true_alpha(self) -> Tensor:
        """Return the true alpha, float32 [B,1,S,S] in 0..1."""
        return self.alpha[:, None].float() / 255.0

    def trimap_levels(self) -> Tensor:
        """Return the trimap, float32 [B,1,S,S] of 0, 0.5 (unknown) and 1."""
        return quantise_trimap(self.trimap[:, None])


TENSOR_NAMES = tuple(each.name for each in fields(PairBatch) if each.name not in ("names", "counters", "skipped"))


def collate_pairs(samples: list[TrainingSample | str]) -> PairBatch | str:
    """Stack samples into a batch, or return the reason why one of them could not be made."""
    if failure := next((sample for sample in samples if isinstance(sample, str)), None):
        return failure
    return PairBatch.from_samples([sample for sample in samples if isinstance(sample, TrainingSample)])


def _to_image_tensor(rgb: Tensor) -> Tensor:
    """Convert images uint8 [B,S,S,3] to float32 [B,3,S,S] in 0..1."""
    return rgb.permute(0, 3, 1, 2).float() / 255.0
