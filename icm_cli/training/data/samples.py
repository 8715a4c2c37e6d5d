"""Training samples: a target with its alpha, and a reference that shows the thing; each by seed and counter alone."""

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
from icm_cli.model.core import TARGET_NOISE, Pairs, reference_noise
from icm_cli.scoring.rule import make_trimap
from icm_cli.training.batches import Batch
from icm_cli.training.data.augment import Rng, jittered_guidance
from icm_cli.training.data.pool import Item, Pool
from icm_cli.training.data.scenes import Scene, SceneMaker, require_foreground
from icm_cli.training.losses import quantised
from icm_cli.training.settings import TrainConfig

MOST_ATTEMPTS = 10
"""Unreadable draws for one sample before training stops."""
BACKDROP_SHARE = 0.3
"""Share of negatives that are a background with nothing in it but distractors."""
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class TrainingSample:
    """One pair on the canvas; rgb uint8 [S,S,3], alpha and trimap uint8 [S,S], guidance and valid bool [S,S]."""

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
    """Why draws before this one could not be read."""


class SampleMaker(Dataset["TrainingSample | str"]):
    """Makes sample number ``counter``: the same for every run, process and worker of a seed.

    A str in the place of a sample says why none could be made (an exception would lose its type on the way from a
    worker).
    """

    def __init__(self, pool: Pool, config: TrainConfig) -> None:
        self.pool = pool
        self.config = config
        self._scenes = SceneMaker(config.canvas_px, config.augment)

    def sample(self, counter: int) -> TrainingSample:
        """Raises TrainingError where draw after draw cannot be read."""
        made = self[counter]
        if isinstance(made, str):
            raise TrainingError(made)
        return made

    def __getitem__(self, counter: int) -> TrainingSample | str:
        skipped: list[str] = []
        for attempt in range(MOST_ATTEMPTS):
            rng = np.random.default_rng((self.config.seed, counter, attempt))
            try:
                return replace(self._draw(counter, rng), skipped=tuple(skipped))
            except ImageError as error:
                skipped.append(str(error))
        return (
            f"sample {counter} could not be made in {MOST_ATTEMPTS} draws, the last because {skipped[-1]}; mend the "
            "data, or leave files out with 'exclude'"
        )

    def view(self, item: Item, rng: Rng) -> Scene:
        """An item's scene as a target or a reference shows it, other things in it at times. Raises ImageError."""
        scene = self._scenes.distracted(self._scene(item, rng), self._distractors(item, rng), rng)
        return self._scenes.finished(scene, rng)

    def _draw(self, counter: int, rng: Rng) -> TrainingSample:
        pairs, pool = self.config.pairs, self.pool
        item = pool.draw(rng)
        shown = pool.partner(item, rng, pairs.same_image_share)
        is_negative = rng.random() < pairs.negative_share
        others = self._distractors(item, rng)
        if is_negative:
            target, name = self._without(shown, rng)
        else:
            target, name = self._scene(item, rng), item.name
        target = self._scenes.finished(self._scenes.distracted(target, others, rng), rng)
        reference = self._scene(shown, rng)
        if others and rng.random() < pairs.reference_distractor_share:
            reference = self._scenes.distracted(reference, others[:1], rng)
        reference = self._scenes.finished(require_foreground(reference, shown), rng)
        alpha = binarize_alpha(target.alpha) if item.is_binary else target.alpha
        return TrainingSample(
            name=f"{name} by {shown.name}",
            counter=counter,
            rgb=target.rgb,
            alpha=alpha,
            trimap=self._trimap(alpha, target.trimap),
            valid=target.valid,
            reference_rgb=reference.rgb,
            guidance=jittered_guidance(reference.alpha, pairs, rng),
            reference_valid=reference.valid,
        )

    def _scene(self, item: Item, rng: Rng) -> Scene:
        """An item's photograph, or its thing on another background."""
        backgrounds = self.pool.backgrounds
        can_move = bool(backgrounds) and not item.is_binary
        if item.is_foreground or (rng.random() < self.config.pairs.composite_share and can_move):
            behind = self._scenes.backdrop(backgrounds[rng.integers(len(backgrounds))], rng)
            return self._scenes.composite(item, behind, rng)
        return self._scenes.photograph(item, rng)

    def _without(self, shown: Item, rng: Rng) -> tuple[Scene, str]:
        """A picture of something else, with an alpha of 0, and its name."""
        backgrounds = self.pool.backgrounds
        other = self.pool.stranger(shown, rng, cuttable=False)
        if backgrounds and (other is None or rng.random() < BACKDROP_SHARE):
            path = backgrounds[rng.integers(len(backgrounds))]
            scene, name = self._scenes.backdrop(path, rng), path.name
        elif other is None:
            raise ImageError(f"there is no picture without the thing of {shown.image}")
        else:
            scene, name = self._scene(other, rng), other.name
        return replace(scene, alpha=np.zeros_like(scene.alpha), trimap=None), f"{name} (absent)"

    def _distractors(self, shown: Item, rng: Rng) -> list[Item]:
        pairs = self.config.pairs
        if rng.random() >= pairs.distractor_share or not pairs.distractors:
            return []
        count = int(rng.integers(1, pairs.distractors + 1))
        drawn = (self.pool.stranger(shown, rng, cuttable=True) for _ in range(count))
        return [item for item in drawn if item is not None]

    def _trimap(self, alpha: ImageU8, published: ImageU8 | None) -> ImageU8:
        """The file's, moved with its picture; else unknown are 0 < alpha < 1, dilated."""
        if published is not None:
            return published
        return make_trimap(alpha, self.config.trimap_kernel)


@dataclass(frozen=True)
class PairBatch(Batch):
    """Pairs: images uint8 [B,S,S,3], alpha and trimap uint8 [B,S,S], guidance and valid bool [B,S,S]."""

    rgb: Tensor
    alpha: Tensor
    trimap: Tensor
    valid: Tensor
    reference_rgb: Tensor
    guidance: Tensor
    reference_valid: Tensor

    @classmethod
    def of(cls, samples: Sequence[TrainingSample]) -> Self:
        """Join samples."""
        arrays = {name: torch.from_numpy(np.stack([getattr(sample, name) for sample in samples])) for name in TENSORS}
        return cls(
            tuple(sample.name for sample in samples),
            tuple(sample.counter for sample in samples),
            tuple(reason for sample in samples for reason in sample.skipped),
            **arrays,
        )

    def pairs(self, *, fixed_noise: bool) -> Pairs:
        """As the model takes them. Noise is a function of the sample, or with ``fixed_noise`` the one of inference."""
        if fixed_noise:
            noise = [TARGET_NOISE] * len(self.names), [reference_noise(0)] * len(self.names)
        else:
            noise = [f"target {n}" for n in self.counters], [f"reference {n}" for n in self.counters]
        return Pairs(
            _image(self.rgb),
            self.valid,
            _image(self.reference_rgb),
            self.guidance[:, None].float(),
            self.reference_valid,
            *noise,
        )

    def truth(self) -> Tensor:
        """Alpha [B,1,S,S] float32 in 0..1."""
        return self.alpha[:, None].float() / 255.0

    def trimap_levels(self) -> Tensor:
        """Trimap [B,1,S,S] float32: 0, 0.5, 1."""
        return quantised(self.trimap[:, None])


TENSORS = tuple(each.name for each in fields(PairBatch) if each.name not in ("names", "counters", "skipped"))


def collated(samples: list[TrainingSample | str]) -> PairBatch | str:
    """Join samples, or say why one of them could not be made."""
    failures = [sample for sample in samples if isinstance(sample, str)]
    return (
        failures[0] if failures else PairBatch.of([sample for sample in samples if isinstance(sample, TrainingSample)])
    )


def _image(rgb: Tensor) -> Tensor:
    """uint8 [B,S,S,3] -> float32 [B,3,S,S] in 0..1."""
    return rgb.permute(0, 3, 1, 2).float() / 255.0
