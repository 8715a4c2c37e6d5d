"""Samples of the stage "matte": a target with its alpha, and a reference that shows the object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from icm_cli.errors import ImageError, TrainingError
from icm_cli.geometry import binarize_alpha
from icm_cli.model.core import TARGET_NOISE_KEY, Pairs, reference_noise_key
from icm_cli.scoring.task import make_trimap
from icm_cli.training.batches import Batch, SampleMaker, TrainingSample
from icm_cli.training.data.augment import Rng, draw_guidance
from icm_cli.training.data.pool import MAX_PARTNER_DRAWS, TrainingItem, TrainingPool
from icm_cli.training.data.scenes import Scene, SceneMaker
from icm_cli.training.losses import quantise_trimap
from icm_cli.training.settings import TrainConfig

BACKGROUND_PROBABILITY = 0.3
"""Probability that a negative is a background image, with distractors at most, instead of another item."""
MAX_TARGET_DRAWS = 1000
"""Training ends if no target with a reference was found in this many draws."""


@dataclass(frozen=True)
class PairBatch(Batch):
    """Pairs on the canvas: images uint8 [B,S,S,3], alpha and trimap uint8 [B,S,S], guidance and valid bool [B,S,S]."""

    rgb: Tensor
    alpha: Tensor
    trimap: Tensor
    valid: Tensor
    reference_rgb: Tensor
    guidance: Tensor
    reference_valid: Tensor

    def to_pairs(self, *, fixed_noise: bool) -> Pairs:
        """Return the inputs of the model.

        With ``fixed_noise``, all samples have the noise of inference. Otherwise each sample has noise of its own, which
        its number decides.
        """
        if fixed_noise:
            target_keys = [TARGET_NOISE_KEY] * len(self.names)
            reference_keys = [reference_noise_key(0)] * len(self.names)
        else:
            target_keys = [f"target {number}" for number in self.sample_numbers]
            reference_keys = [f"reference {number}" for number in self.sample_numbers]
        return Pairs(
            _to_image_tensor(self.rgb),
            self.valid,
            _to_image_tensor(self.reference_rgb),
            self.guidance[:, None].float(),
            self.reference_valid,
            target_keys,
            reference_keys,
        )

    def true_alpha(self) -> Tensor:
        """Return the true alpha, float32 [B,1,S,S] in 0..1."""
        return self.alpha[:, None].float() / 255.0

    def trimap_levels(self) -> Tensor:
        """Return the trimap, float32 [B,1,S,S] of 0, 0.5 (unknown) and 1."""
        return quantise_trimap(self.trimap[:, None])


class PairMaker(SampleMaker[PairBatch]):
    """Makes pairs of a target and a reference."""

    batch_class = PairBatch

    def __init__(self, pool: TrainingPool, config: TrainConfig) -> None:
        super().__init__(config.seed)
        self.pool = pool
        self.config = config
        self._scenes = SceneMaker(pool, config)

    def draw_sample(self, rng: Rng) -> TrainingSample:
        empty_alphas: list[Path] = []
        for _ in range(MAX_TARGET_DRAWS):
            sample = self._draw_pair(rng, empty_alphas)
            if sample is not None:
                return sample
        raise TrainingError(
            f"no reference was found for {MAX_TARGET_DRAWS} targets, because almost no alpha has a pixel above one "
            "half; expected alphas that show an object; check 'alphas' of the data"
        )

    def _draw_pair(self, rng: Rng, empty_alphas: list[Path]) -> TrainingSample | None:
        """Draw a target and its reference; None without a reference.

        If the target should show the object, but its alpha is empty, the alpha is added to ``empty_alphas``.
        """
        pairs, scenes = self.config.pairs, self._scenes
        item = self.pool.draw_item(rng)
        partner = self.pool.draw_partner(item, rng, pairs.same_image_probability)
        is_negative = rng.random() < pairs.negative_probability
        distractors = scenes.draw_distractors(item, rng)
        if is_negative:
            target, name = self._make_negative(partner, rng)
        else:
            target, name = scenes.make_scene(item, rng), item.name
            if not target.alpha.any():
                empty_alphas.append(item.alpha_file)
        target = scenes.augment_colours(scenes.add_distractors(target, distractors, rng), rng)
        found = self._make_reference(item, partner, distractors[:1], rng)
        if found is None:
            return None
        reference_item, reference = found
        reference = scenes.augment_colours(reference, rng)
        alpha = binarize_alpha(target.alpha) if item.is_binary else target.alpha
        trimap = make_trimap(alpha, self.config.trimap_kernel_px) if target.trimap is None else target.trimap
        layers = {
            "rgb": target.rgb,
            "alpha": alpha,
            "trimap": trimap,
            "valid": target.valid,
            "reference_rgb": reference.rgb,
            "guidance": draw_guidance(reference.alpha, pairs, rng),
            "reference_valid": reference.valid,
        }
        return TrainingSample(f"{name} by {reference_item.name}", layers, tuple(empty_alphas))

    def _make_reference(
        self, item: TrainingItem, partner: TrainingItem, distractors: Sequence[TrainingItem], rng: Rng
    ) -> tuple[TrainingItem, Scene] | None:
        """Make a scene of ``partner``, or if its alpha has no object, of another partner of ``item``; return both.

        Returns None if none was found in MAX_PARTNER_DRAWS draws. Of an item without an object, only one scene is made.
        """
        pairs = self.config.pairs
        empty: set[TrainingItem] = set()
        for _ in range(MAX_PARTNER_DRAWS):
            if partner not in empty:
                reference = self._scenes.make_scene(partner, rng)
                if distractors and rng.random() < pairs.reference_distractor_probability:
                    reference = self._scenes.add_distractors(reference, distractors, rng)
                if reference.has_object:
                    return partner, reference
                if not reference.alpha.any():
                    empty.add(partner)
            partner = self.pool.draw_partner(item, rng, pairs.same_image_probability)
        return None

    def _make_negative(self, reference: TrainingItem, rng: Rng) -> tuple[Scene, str]:
        """Make a scene without the reference's object, with an alpha of 0; return it and its name."""
        negative = self.pool.draw_negative(reference, rng, for_cutout=False)
        if self.pool.backgrounds and (negative is None or rng.random() < BACKGROUND_PROBABILITY):
            path = self.pool.draw_background(rng)
            scene, name = self._scenes.make_background(path, rng), path.name
        elif negative is None:
            raise ImageError(f"there is no image without the object of {reference.image}")
        else:
            scene, name = self._scenes.make_scene(negative, rng), negative.name
        return replace(scene, alpha=np.zeros_like(scene.alpha), trimap=None), f"{name} (absent)"


def _to_image_tensor(rgb: Tensor) -> Tensor:
    """Convert images uint8 [B,S,S,3] to float32 [B,3,S,S] in 0..1."""
    return rgb.permute(0, 3, 1, 2).float() / 255.0
