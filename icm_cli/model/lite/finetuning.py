"""Fine-tune a copy of a head on the references of a run, before it mattes the frames of a shot.

The method follows one-shot video object segmentation (Caelles et al., CVPR 2017). The head is trained on augmented
views of the references, and learns what belongs to the object when it moves, and what does not. The backbone is frozen:
it processes each view once, and only the small head is trained.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.model.contracts import (
    Backbone,
    Features,
    LearnedReferences,
    ReferenceFeatures,
    ReferenceImage,
    TrainedHead,
    ignore_progress,
)
from icm_cli.model.similarity import ReferenceTokens, background_token_mask, foreground_token_mask, is_negative

DEFAULT_STEPS = 140
"""Training steps for a shot if ``--learn-steps`` is not given."""
LOSS_TERMS = ("cross_entropy", "dice", "coarse", "comparisons", "presence")
"""Names of the losses of :func:`match_losses`."""
MIN_LOG_ALPHA = 1e-4
"""Smallest distance of an alpha from 0 and 1 before its logarithm is taken."""


@dataclass(frozen=True)
class FinetuningConfig:
    """Settings of the fine-tuning. All of them are part of the digest of an alpha."""

    views: int = 16
    """Number of augmented views that contain the object, in addition to the references."""
    negative_views: int = 4
    """Number of negatives: enlarged crops of the references that do not contain the object."""
    negative_fraction: float = 0.15
    """Fraction of the steps whose target is a negative."""
    original_fraction: float = 0.7
    """Fraction of the steps whose reference is an original reference instead of a view."""
    rate: float = 3e-4
    """Highest learning rate; it rises linearly over ``warmup_steps`` and decays along a cosine."""
    warmup_steps: int = 10
    clip_norm: float = 5.0
    """Largest norm of the gradients."""
    max_log_scale: float = 0.4
    """Largest absolute logarithm of the scale of a view."""
    max_angle: float = 15.0
    """Largest rotation of a view, in degrees."""
    max_shear: float = 0.15
    border: float = 0.25
    """Smallest distance of the object's centre from the borders of a view, as a fraction of the view's sides."""
    negative_max_log_scale: float = 0.7
    """Largest logarithm of the scale of a negative."""
    max_gain: float = 0.2
    """Largest relative change of brightness, of each channel and of the image."""
    max_offset: float = 0.06
    """Largest value that is added to all channels, on the scale 0..1."""
    negative_attempts: int = 100
    """Number of random crops that are tried for a negative."""
    negative_max_guidance: float = 0.25
    """Largest guidance in a negative."""
    negative_check_px: int = 16
    """The first check of a crop samples its guidance at this distance, in px; the second check uses all pixels."""
    seed: int = 0


FINETUNING = FinetuningConfig()
"""The settings in use."""


class MatchPrediction(NamedTuple):
    """Outputs of a :class:`FinetunableHead` that the losses use."""

    coarse_logit: Tensor
    """Logit of the coarse alpha, float32 [B,h,w]."""
    fine_logit: Tensor
    """Logit of the decoded alpha, float32 [B,nh,nw]."""
    transferred_guidance: Tensor
    """Guidance that each comparison transfers to the target, float32 [B,comparisons,h,w] in -1..1."""
    presence_logit: Tensor
    """Logit of the presence of the object, float32 [B]."""


class FinetunableHead(TrainedHead, ABC):
    """A head of which a copy can be fine-tuned on references."""

    can_learn_references = True
    presence_mlp: nn.Module
    """Layers that predict the presence of the object. They are not fine-tuned."""

    decoder_steps: int
    """Number of times that the decoder doubles the resolution of the tokens."""
    decoder_uses_image: bool
    """Whether the decoder reads the image in addition to the features."""

    @abstractmethod
    def project_tokens(self, feature: Tensor) -> Tensor:
        """Project correspondence features [B,C,h,w] to the tokens [B,N,D] that are compared, float32."""

    @abstractmethod
    def predict_match(
        self, target: Features, references: Sequence[ReferenceTokens], image: Tensor | None
    ) -> MatchPrediction:
        """Compute what :func:`match_losses` compares with the ground truth.

        ``image`` [B,3,H,W] may be None if the decoder does not use it.
        """

    def learn_references(
        self,
        backbone: Backbone,
        references: Sequence[ReferenceImage],
        steps: int,
        on_progress: Callable[[float], None] = ignore_progress,
    ) -> LearnedReferences:
        """Fine-tune a copy of this head on the references. This head is not changed.

        Negative references are targets without the object. On a CPU, the same references give the same weights if the
        number of threads is the same.
        """
        rng = np.random.default_rng(FINETUNING.seed)
        references = sorted(references, key=lambda reference: is_negative(reference[1]))  # negatives are the last
        with torch.no_grad():
            views = self._extract_views(backbone, references, rng, on_progress)
        student = copy.deepcopy(self).float().eval()
        with torch.enable_grad():
            _train_head(student, views, steps, rng, on_progress)
        dtypes = {name: tensor.dtype for name, tensor in self.state_dict(keep_vars=True).items()}
        for name, tensor in student.state_dict(keep_vars=True).items():
            tensor.requires_grad_(False)
            tensor.data = tensor.data.to(dtypes[name])
        features = [
            ReferenceFeatures(view.features, guidance, valid)
            for view, (_, guidance, valid) in zip(views.references, references, strict=True)
        ]
        return LearnedReferences(student, student.prepare_references(features))

    def _extract_views(
        self,
        backbone: Backbone,
        references: Sequence[ReferenceImage],
        rng: np.random.Generator,
        on_progress: Callable[[float], None],
    ) -> _Views:
        """Return the views for the training. Negative references must be the last ones."""
        scenes = []
        for image, guidance, valid in references:
            is_known = ((guidance - 0.5).abs() > 0.25).float()
            object_guidance = torch.zeros_like(guidance) if is_negative(guidance) else guidance
            scenes.append(_Scene(image, object_guidance, is_known, valid))
        unchanged = [_extract_view(backbone, self, scene) for scene in scenes]
        positives = sum(not is_negative(guidance) for _, guidance, _ in references)
        augmented = []
        for number in range(FINETUNING.views):
            augmented.append(_extract_view(backbone, self, _augment_scene(scenes[number % positives], rng)))
            on_progress(0.5 * (number + 1) / FINETUNING.views)
        crops = [_crop_negative(scenes[number % positives], rng) for number in range(FINETUNING.negative_views)]
        negatives = [_extract_view(backbone, self, crop) for crop in crops if crop is not None]
        return _Views(
            references=unchanged,
            originals=unchanged[:positives],
            augmented=augmented,
            negatives=[*negatives, *unchanged[positives:]],
        )


def match_losses(
    prediction: Sequence[Tensor], fine_truth: Tensor, valid: Tensor, presence_weight: float
) -> dict[str, Tensor]:
    """Compute the losses of a prediction, a tuple of the fields of :class:`MatchPrediction`.

    ``fine_truth`` is the true alpha at the resolution of the decoder, float32 [B,nh,nw] in 0..1. ``valid``: tokens that
    count, bool [B,h,w]. Returns each loss of :data:`LOSS_TERMS`, and their sum as "total", float32 [B].
    """
    coarse_logit, fine_logit, transferred, presence_logit = prediction
    upsampling = fine_logit.shape[-1] // coarse_logit.shape[-1]
    fine_valid = valid.repeat_interleave(upsampling, 1).repeat_interleave(upsampling, 2)
    truth = F.avg_pool2d(fine_truth[:, None], upsampling)[:, 0]
    valid_count = valid.sum(dim=(1, 2))
    is_present = (truth.amax(dim=(1, 2)) > 0.5).float()

    alpha = torch.sigmoid(fine_logit) * fine_valid
    # Areas are in tokens, so that the smoothing by 1 does not depend on the resolution of the decoder.
    intersection = (alpha * fine_truth).mean(dim=(1, 2)) * valid_count
    sum_of_areas = (alpha + fine_truth).mean(dim=(1, 2)) * valid_count
    dice_loss = 1.0 - (2.0 * intersection + 1.0) / (sum_of_areas + 1.0)
    has_area = truth.sum(dim=(1, 2)) > 1.0

    transferred_alpha = (0.5 + 0.5 * transferred).clamp(MIN_LOG_ALPHA, 1.0 - MIN_LOG_ALPHA)
    comparison_truth = truth[:, None].expand_as(transferred_alpha)
    comparison_loss = F.binary_cross_entropy(transferred_alpha, comparison_truth, reduction="none").mean(dim=1)
    terms = {
        "cross_entropy": _mean_cross_entropy(fine_logit, fine_truth, fine_valid),
        "dice": dice_loss * has_area,
        "coarse": _mean_cross_entropy(coarse_logit, truth, valid) if upsampling > 1 else torch.zeros_like(is_present),
        "comparisons": (comparison_loss * valid).sum(dim=(1, 2)) / valid_count,
        "presence": presence_weight * F.binary_cross_entropy_with_logits(presence_logit, is_present, reduction="none"),
    }
    return {**terms, "total": torch.stack(list(terms.values())).sum(dim=0)}


def _mean_cross_entropy(logit: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Return the mean cross-entropy [B] over the valid cells of [B,H,W]."""
    cross_entropy = F.binary_cross_entropy_with_logits(logit, truth, reduction="none")
    return (cross_entropy * valid).sum(dim=(1, 2)) / valid.sum(dim=(1, 2))


class _Scene(NamedTuple):
    """A reference or an augmented view of one, on the canvas.

    image: float32 sRGB [1,3,H,W] in 0..1; guidance: float32 [1,1,H,W] in 0..1; known: float32 [1,1,H,W], 0 where the
    guidance is unknown, else 1; valid: bool [1,H,W].
    """

    image: Tensor
    guidance: Tensor
    known: Tensor
    valid: Tensor

    @property
    def frame_size(self) -> np.ndarray:
        """Width and height of the frame on its canvas, in px, float64 [2]."""
        first_row, first_column = self.valid[0, 0], self.valid[0, :, 0]
        return np.array([float(first_row.sum()), float(first_column.sum())])


class _View(NamedTuple):
    """Features and labels of a scene, for its use as a reference and as a target. All are batches of one."""

    features: Features
    inside: Tensor
    """Reference: tokens inside the guidance, bool [1,h,w]."""
    outside: Tensor
    """Reference: tokens outside the guidance, bool [1,h,w]."""
    alpha: Tensor
    """Target: true alpha at the resolution of the decoder, float32 [1,nh,nw] in 0..1."""
    known: Tensor
    """Target: tokens whose true alpha is known, bool [1,h,w]."""
    image: Tensor | None
    """Target: float32 [1,3,H,W]; None if the decoder does not use the image."""


class _Views(NamedTuple):
    """The views with which a head is trained."""

    references: Sequence[_View]
    """All references without augmentation, negatives last."""
    originals: Sequence[_View]
    """The references that contain the object."""
    augmented: Sequence[_View]
    """Augmented views that contain the object."""
    negatives: Sequence[_View]
    """Views that do not contain the object."""


def _train_head(
    head: FinetunableHead, views: _Views, steps: int, rng: np.random.Generator, on_progress: Callable[[float], None]
) -> None:
    """Train the head in place. Each step has one view as the reference and another one as the target.

    Its presence layers are not trained, because almost every frame of a shot contains the object. Neither are the
    statistics of its normalisation layers.
    """
    head.requires_grad_(True)
    head.presence_mlp.requires_grad_(False)
    weights = [weight for weight in head.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=FINETUNING.rate, weight_decay=0.0)
    for step in range(steps):
        warmup = min(1.0, (step + 1) / FINETUNING.warmup_steps)
        for group in optimiser.param_groups:
            group["lr"] = FINETUNING.rate * warmup * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        is_original = rng.random() < FINETUNING.original_fraction
        reference = _draw_view(views.originals if is_original else views.augmented, rng)
        if views.negatives and rng.random() < FINETUNING.negative_fraction:
            target = _draw_view(views.negatives, rng)
        else:
            target = _draw_view([*views.originals, *views.augmented], rng)
        tokens = head.project_tokens(reference.features.correspondence_features)
        prepared = ReferenceTokens(tokens[reference.inside.flatten(1)], tokens[reference.outside.flatten(1)])
        prediction = head.predict_match(target.features, [prepared], target.image)
        loss = match_losses(prediction, target.alpha, target.known, presence_weight=0.0)["total"].mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, FINETUNING.clip_norm)
        optimiser.step()
        on_progress(0.5 + 0.5 * (step + 1) / steps)


def _draw_view(views: Sequence[_View], rng: np.random.Generator) -> _View:
    """Return a random view."""
    return views[int(rng.integers(len(views)))]


def _extract_view(backbone: Backbone, head: FinetunableHead, scene: _Scene) -> _View:
    """Run the backbone on a scene, and reduce its guidance to the grids of tokens and of the decoder."""
    features = backbone.target_features(scene.image, scene.valid, [""])
    token_px = scene.image.shape[-1] // features.correspondence_features.shape[-1]
    known = features.valid & (F.avg_pool2d(scene.known, token_px)[:, 0] > 0.5)
    guidance_or_half = scene.guidance * scene.known + 0.5 * (1.0 - scene.known)
    scale_features = {stride: feature.float() for stride, feature in features.scale_features.items()}
    return _View(
        features=Features(features.correspondence_features, features.valid, scale_features, {}),
        inside=foreground_token_mask(guidance_or_half, scene.valid, token_px)[0],
        outside=background_token_mask(guidance_or_half, scene.valid, token_px),
        alpha=F.avg_pool2d(scene.guidance, token_px >> head.decoder_steps)[:, 0],
        known=known if bool(known.any()) else features.valid,
        image=scene.image if head.decoder_uses_image else None,
    )


def _augment_scene(scene: _Scene, rng: np.random.Generator) -> _Scene:
    """Return a randomly transformed and recoloured view, whose object is at a random position.

    Beyond the borders of the image, it is mirrored.
    """
    scale = math.exp(rng.uniform(-FINETUNING.max_log_scale, FINETUNING.max_log_scale))
    new_centre = scene.frame_size * rng.uniform(FINETUNING.border, 1.0 - FINETUNING.border, 2)
    rows, columns = torch.nonzero(scene.guidance[0, 0] > 0.75, as_tuple=True)
    centre = np.array([float(columns.float().mean()), float(rows.float().mean())])
    return _Augmentation.draw_random(scale, centre, new_centre, rng).apply(scene)


def _crop_negative(scene: _Scene, rng: np.random.Generator) -> _Scene | None:
    """Return a random crop, magnified, that does not contain the object; None if none is found."""
    size = scene.frame_size
    for _ in range(FINETUNING.negative_attempts):
        scale = math.exp(rng.uniform(0.0, FINETUNING.negative_max_log_scale))
        centre = size * rng.uniform(0.0, 1.0, 2)
        augmentation = _Augmentation.draw_random(scale, centre, size / 2, rng)
        # a quick check of few pixels, before the crop is made
        sampled_guidance = augmentation.sample(scene, scene.guidance, FINETUNING.negative_check_px)
        if float(sampled_guidance.max()) < FINETUNING.negative_max_guidance:
            crop = augmentation.apply(scene)
            if float(crop.guidance.max()) < FINETUNING.negative_max_guidance:
                return crop
    return None


class _Augmentation(NamedTuple):
    """A geometric and a colour transformation of a scene.

    matrix: from px (x, y, 1) of the scene to those of the view, [3,3]; gain: factor of each channel, [3,1,1]; offset:
    value that is added to all channels.
    """

    matrix: np.ndarray
    gain: np.ndarray
    offset: float

    @classmethod
    def draw_random(
        cls, scale: float, source: np.ndarray, target: np.ndarray, rng: np.random.Generator
    ) -> _Augmentation:
        """Draw an augmentation: a change of the colours, and a transformation with a given scale.

        The transformation moves the point ``source`` (x, y), in px, to ``target``.
        """
        max_gain, max_shear = FINETUNING.max_gain, FINETUNING.max_shear
        angle = math.radians(rng.uniform(-FINETUNING.max_angle, FINETUNING.max_angle))
        flip = rng.choice([-1.0, 1.0])
        cos, sin, shear = math.cos(angle), math.sin(angle), rng.uniform(-max_shear, max_shear)
        matrix = np.eye(3)  # scale, rotation, mirroring and shear; then the shift from source to target
        matrix[:2, :2] = [[scale * flip * cos, shear - scale * sin], [scale * flip * sin, scale * cos]]
        matrix[:2, 2] = target - matrix[:2, :2] @ source
        # The gain of each channel times a gain of all channels.
        gain = rng.uniform(1.0 - max_gain, 1.0 + max_gain, (3, 1, 1)) * rng.uniform(1.0 - max_gain, 1.0 + max_gain)
        return cls(matrix, gain, float(rng.uniform(-FINETUNING.max_offset, FINETUNING.max_offset)))

    def apply(self, scene: _Scene) -> _Scene:
        """Return the transformed scene."""
        layers = self.sample(scene, torch.cat([scene.image, scene.guidance, scene.known], dim=1))
        padding_right = scene.image.shape[-1] - layers.shape[-1]
        padding_below = scene.image.shape[-2] - layers.shape[-2]
        layers = F.pad(layers, (0, padding_right, 0, padding_below), mode="replicate")
        image, guidance, known = layers[:, :3], layers[:, 3:4], layers[:, 4:]
        image = image * torch.from_numpy(self.gain).float().to(layers.device) + self.offset
        return _Scene(image.clamp(0.0, 1.0), guidance * scene.valid[:, None], known, scene.valid)

    def sample(self, scene: _Scene, layers: Tensor, px: int = 1) -> Tensor:
        """Sample layers [1,C,H,W] of the scene on a regular grid over the view, [1,C,h,w].

        Neighbouring points of the grid are at most ``px`` pixels of the view apart. Their values are interpolated.
        """
        width, height = (int(side) for side in scene.frame_size)
        # The affine grid of torch has the coordinates -1..1, whose ends are the outer edges of the border pixels.
        to_normalised = np.array(
            [[2.0 / width, 0.0, 1.0 / width - 1.0], [0.0, 2.0 / height, 1.0 / height - 1.0], [0.0, 0.0, 1.0]]
        )
        view_to_scene = (to_normalised @ np.linalg.inv(self.matrix) @ np.linalg.inv(to_normalised))[:2]
        grid = F.affine_grid(
            torch.from_numpy(view_to_scene[None]).float().to(layers.device),
            [1, 1, math.ceil(height / px), math.ceil(width / px)],
            align_corners=False,
        )
        frame = layers[..., :height, :width]
        return F.grid_sample(frame, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
