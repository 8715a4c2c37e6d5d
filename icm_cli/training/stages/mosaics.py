"""Mosaics: the tokens of several images on one canvas. One, several or none of the images show the reference's object.

The stages that train a token-match head use them: "match" and "objects" on stored tokens, "end-to-end" on images that
are made for each step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from icm_cli.errors import ConfigError, TrainingError, UsageError
from icm_cli.events import TrainingListener
from icm_cli.geometry import HALF_U8, UNKNOWN, ImageU8
from icm_cli.model.contracts import Backbone, Features, Objects
from icm_cli.model.core import InContextMatting
from icm_cli.model.decoding import resize_bilinear
from icm_cli.model.lite.finetuning import LOSS_TERMS
from icm_cli.model.lite.head import TokenMatchHead
from icm_cli.model.similarity import ReferenceTokens, background_token_mask, foreground_token_mask
from icm_cli.training.batches import Batch, BatchT
from icm_cli.training.data.pool import MAX_PARTNER_DRAWS, TrainingItem, TrainingPool
from icm_cli.training.data.scenes import Scene
from icm_cli.training.learner import Learner
from icm_cli.training.settings import LAYOUTS, MatchStageConfig, Settings
from icm_cli.training.stages import Prediction, Stage, darken_outside, render_layers, to_rgb

LARGE_FACTOR = 2
"""Side of a large view, as a multiple of a view's side."""
NOISE_REGION = 6
"""Side, in tokens, of the regions whose tokens have a part of their noise in common."""
FURTHER_PROBABILITY = 0.7
"""Probability that a further tile shows the object, in mosaics where several tiles may show it."""
MAX_MOSAIC_DRAWS = 1000
"""Training ends if no mosaic, or no image for one of its tiles, was found in this many draws."""


class View(NamedTuple):
    """Tokens of an image; or of N images, if all tensors have a further first axis.

    Attributes:
        feature: Correspondence features, [C,h,w].
        scales: Inputs of the head's decoder, from coarse to fine: [C',2h,2w], [C",4h,4w] ...
        alpha: Mean of the alpha in each cell of the decoder's output, [nh,nw].
        inside: Tokens inside the guidance, bool [h,w].
        outside: Tokens outside the guidance, bool [h,w].
        valid: Tokens that are image and not padding, bool [h,w].
        embedding: Image embedding of the object model, [E,mh,mw]; empty if that is not trained.
    """

    feature: Tensor
    scales: tuple[Tensor, ...]
    alpha: Tensor
    inside: Tensor
    outside: Tensor
    valid: Tensor
    embedding: Tensor

    @property
    def has_object(self) -> bool:
        """Whether the mean alpha of any cell is above one half."""
        return bool(self.alpha.max() > 0.5)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> View:
        """Return the view with ``change`` applied to every tensor."""
        changed = [tuple(map(change, field)) if isinstance(field, tuple) else change(field) for field in self]
        return View._make(changed)


ImageT = TypeVar("ImageT", View, Scene)
"""An image of a mosaic: its tokens, or what they are computed from."""


class ImageSource(Generic[ImageT]):
    """The images of one size from which mosaics are made: small or large views.

    ``views`` has the views of each item; ``load`` returns the image of a view, or None if it cannot be read.
    """

    def __init__(
        self, pool: TrainingPool, views: Mapping[TrainingItem, Sequence[Any]], load: Callable[[Any], ImageT | None]
    ) -> None:
        self.pool = pool.restrict_to(views)
        self._views = views
        self._load: Callable[[Any], ImageT | None] = load

    def draw_image(self, item: TrainingItem, rng: np.random.Generator) -> ImageT | None:
        """Draw the image of one of an item's views; None if it has none, or if it cannot be read."""
        views = self._views.get(item)
        return self._load(views[int(rng.integers(len(views)))]) if views else None


@dataclass(frozen=True)
class Mosaic(Generic[ImageT]):
    """Tiles, row by row, and the references that show the target object."""

    name: str
    rows: int
    columns: int
    references: Sequence[ImageT]
    tiles: Sequence[ImageT]
    positive_tiles: tuple[int, ...]
    """Indices of the tiles that show the references' object."""

    @property
    def is_positive(self) -> list[bool]:
        """For each tile: whether it shows the references' object."""
        return [index in self.positive_tiles for index in range(len(self.tiles))]


@dataclass(frozen=True)
class MosaicBatch(Batch):
    """A batch of mosaics of H x W tokens, with R references of h x w tokens each.

    The tensors are those of :class:`View`. Of the mosaics: feature [B,C,H,W], valid bool [B,H,W], scales [B,C',2H,2W]
    ..., alpha float32 [B,nH,nW] of the reference's object, every_alpha [B,nH,nW] of the objects of all tiles, and
    embedding [B,E,mH,mW] if the object model is trained. Of the references: reference_feature [B,R,C,h,w], inside and
    outside bool [B,R,h,w].
    """

    rows: int
    columns: int
    feature: Tensor
    scales: tuple[Tensor, ...]
    alpha: Tensor
    valid: Tensor
    reference_feature: Tensor
    inside: Tensor
    outside: Tensor
    embedding: Tensor
    every_alpha: Tensor


class TokenMatcher(nn.Module):
    """Runs a token-match head on stored tokens, without images."""

    def __init__(self, head: TokenMatchHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, batch: MosaicBatch) -> Prediction:
        """Return the head's outputs:

        - the logits of the coarse alpha [B,H,W], and of the decoder's alpha, which is n times as large [B,nH,nW];
        - the similarity maps of all comparisons [B,comparisons,H,W] in -1..1;
        - the presence logit [B].
        """
        head = self.head
        # The head finds a scale by its size, so any distinct keys will do.
        scales = {level: scale.float() for level, scale in enumerate(batch.scales)}
        target = Features(batch.feature.float(), batch.valid, scale_features=scales, intra_similarity={})
        projected = head.project_tokens(batch.reference_feature.flatten(0, 1).float())
        projected = projected.reshape(len(batch.feature), -1, projected.shape[-1])
        references = [
            ReferenceTokens(tokens[inside.flatten()], tokens[outside.flatten()])
            for tokens, inside, outside in zip(projected, batch.inside, batch.outside, strict=True)
        ]
        return head.predict_match(target, references, image=None)


def require_token_match_head(model: InContextMatting, stage: str) -> TokenMatchHead:
    """Return the head of a model that a stage can train on mosaics. Raises ConfigError if it has another head."""
    if not isinstance(model.head, TokenMatchHead):
        raise ConfigError(
            f"train: stage is {stage}, which needs a token-match head; use the stage matte, which trains other heads, "
            "or 'head: {name: token-match}'"
        )
    skips, steps = len(model.head.config.skip_channels), len(model.head.config.decoder_channels)
    if steps > skips:
        raise ConfigError(
            f"train: stage is {stage}, which has no images, but {steps - skips} of the {steps} decoder_channels of the "
            "head need the image; expected no more decoder_channels than skip_channels"
        )
    return model.head


def fit_config_to_groups(config: MatchStageConfig, pool: TrainingPool) -> tuple[MatchStageConfig, str]:
    """Return the settings of mosaics, adapted to a pool, and a notice if they were changed, else "".

    If all images show the same object, there are no negatives: each mosaic is a single image that shows the object.
    Raises UsageError if only some of the groups have negatives.
    """
    representatives = [items[0] for items in pool.groups.values()]  # one of each group
    without_negative = [
        item for item in representatives if not any(item.is_negative_for(other) for other in representatives)
    ]
    needs_negatives = config.negative_probability > 0 or any(config.layout_weights[1:])
    if not without_negative or not needs_negatives:
        return config, ""
    if len(without_negative) < len(representatives):
        raise UsageError(
            f"data: there is no image without the object of {without_negative[0].image}, because every other group "
            "has a class in common with it; correct 'classes', or add images of other classes"
        )
    notice = (
        "all images belong to one group or class, so every mosaic is a single image that shows the object; add images "
        "of other objects, from which the model learns to tell objects apart"
    )
    return replace(config, negative_probability=0.0, layout_weights=(1.0, 0.0, 0.0, 0.0)), notice


def draw_mosaics(
    config: MatchStageConfig,
    small: ImageSource[ImageT],
    large: ImageSource[ImageT] | None,
    count: int,
    rng: np.random.Generator,
) -> list[Mosaic[ImageT]]:
    """Draw mosaics of the same layout and number of references. Raises TrainingError.

    ``large``: images of LARGE_FACTOR times the size. They are the targets if the layout is one image, and in half of
    the calls the references.
    """
    rows, columns = LAYOUTS[draw_index(config.layout_weights, rng)]
    reference_count = draw_index(config.reference_count_weights, rng) + 1
    targets = references = small
    if large is not None:
        if rows == columns == 1:
            targets = large
        if rng.random() < 0.5:
            references = large
    sampler = MosaicSampler(targets, references, config, rows, columns, reference_count, rng)
    return [sampler.sample() for _ in range(count)]


@dataclass(frozen=True)
class MosaicSampler(Generic[ImageT]):
    """Samples mosaics of one layout."""

    targets: ImageSource[ImageT]
    references: ImageSource[ImageT]
    config: MatchStageConfig
    rows: int
    columns: int
    reference_count: int
    rng: np.random.Generator

    def sample(self) -> Mosaic[ImageT]:
        """Sample a mosaic. Raises TrainingError if there are not enough usable images."""
        tile_count = self.rows * self.columns
        for _ in range(MAX_MOSAIC_DRAWS):
            item, target = self._sample_tile()
            sampled = [self._sample_reference(item, target) for _ in range(self.reference_count)]
            reference_items = [reference[0] for reference in sampled if reference is not None]
            references = [reference[1] for reference in sampled if reference is not None]
            if len(references) < self.reference_count:
                continue
            positives = self._sample_positives(item, target, tile_count, references)
            tiles = []
            for index in range(tile_count):
                tiles.append(positives[index] if index in positives else self._sample_tile(without=item)[1])
            name = f"{item.name} by {reference_items[0].name}{'' if positives else ' (absent)'}"
            return Mosaic(name, self.rows, self.columns, references, tiles, tuple(positives))
        raise TrainingError(
            "no group has two readable views; increase train.match.views_per_group, or give more images of each object"
        )

    def _sample_tile(self, without: TrainingItem | None = None) -> tuple[TrainingItem, ImageT]:
        """Sample a usable item and its image, which does not show the object of the item ``without``."""
        for _ in range(MAX_MOSAIC_DRAWS):
            item = self.targets.pool.draw_item(self.rng)
            if without is None or without.is_negative_for(item):
                image = self.targets.draw_image(item, self.rng)
                if image is not None:
                    return item, image
        if without is None:
            raise TrainingError(
                "almost no training image could be read; repair the data, or exclude files with 'exclude'"
            )
        raise TrainingError(f"no readable image lacks the object of {without.image}; add images of other objects")

    def _sample_reference(self, item: TrainingItem, target: ImageT) -> tuple[TrainingItem, ImageT] | None:
        """Sample a reference for ``item`` that is not the image ``target``; None if its group has no other one."""
        for _ in range(MAX_PARTNER_DRAWS):
            partner = self.references.pool.draw_partner(item, self.rng, self.config.same_image_probability)
            image = self.references.draw_image(partner, self.rng)
            if image is not None and image.has_object and image is not target:
                return partner, image
        return None

    def _sample_positives(
        self, item: TrainingItem, target: ImageT, tile_count: int, references: Sequence[ImageT]
    ) -> dict[int, ImageT]:
        """Sample the tiles that show the object of ``item``: index -> image, which is not one of the references."""
        rng, config = self.rng, self.config
        if rng.random() < config.negative_probability:
            return {}
        positives = {int(rng.integers(tile_count)): target}
        if config.multiple_probability and rng.random() < config.multiple_probability:
            further = [
                tile for tile in range(tile_count) if tile not in positives and rng.random() < FURTHER_PROBABILITY
            ]
            for tile in further:
                partner = self.targets.pool.draw_partner(item, rng, config.same_image_probability)
                image = self.targets.draw_image(partner, rng)
                if image is not None and not any(image is reference for reference in references):
                    positives[tile] = image
        return positives


def collate_mosaics(mosaics: Sequence[Mosaic[View]], sample_numbers: Sequence[int]) -> MosaicBatch:
    """Stack mosaics of the same layout and number of references into a batch."""
    layout = MosaicLayout(
        names=tuple(mosaic.name for mosaic in mosaics),
        sample_numbers=tuple(sample_numbers),
        rows=mosaics[0].rows,
        columns=mosaics[0].columns,
        is_positive=torch.tensor([mosaic.is_positive for mosaic in mosaics]),
    )
    tiles = _stack_views([view for mosaic in mosaics for view in mosaic.tiles])
    references = _stack_views([view for mosaic in mosaics for view in mosaic.references])
    return layout.make_batch(tiles, references)


@dataclass(frozen=True)
class MosaicLayout:
    """Arrangement of the tiles of B mosaics, with T = ``rows`` * ``columns`` tiles each."""

    names: tuple[str, ...]
    sample_numbers: tuple[int, ...]
    rows: int
    columns: int
    is_positive: Tensor
    """Which tiles show the references' object, bool [B,T]."""

    def make_batch(self, tiles: View, references: View) -> MosaicBatch:
        """Return the batch of B * T tiles and B * R references."""
        mosaics = tiles.map_tensors(self._join_tiles)
        references = references.map_tensors(self._group_references)
        alpha = self._join_tiles(tiles.alpha * self.is_positive.flatten()[:, None, None])
        return MosaicBatch(
            names=self.names,
            sample_numbers=self.sample_numbers,
            skipped=(),
            rows=self.rows,
            columns=self.columns,
            feature=mosaics.feature,
            scales=mosaics.scales,
            alpha=alpha.float(),
            valid=mosaics.valid,
            reference_feature=references.feature,
            inside=references.inside,
            outside=references.outside,
            embedding=mosaics.embedding,
            every_alpha=mosaics.alpha.float(),
        )

    def _join_tiles(self, tensor: Tensor) -> Tensor:
        """Join the tiles [B*T,...,h,w] of each mosaic to [B,...,rows*h,columns*w]."""
        grid = tensor.reshape(len(self.names), self.rows, self.columns, *tensor.shape[1:])
        return grid.movedim((1, 2), (-4, -2)).flatten(-4, -3).flatten(-2)  # from [B,...,rows,h,columns,w]

    def _group_references(self, tensor: Tensor) -> Tensor:
        """Split the first axis of a tensor [B*R,...] to [B,R,...]."""
        count = len(self.names)
        return tensor.reshape(count, len(tensor) // count, *tensor.shape[1:])


def _stack_views(views: Sequence[View]) -> View:
    """Stack the views of N images to one with tensors [N,...]."""
    stacked: View = default_collate(list(views))
    return stacked._replace(scales=tuple(stacked.scales))  # default_collate returns a list


def add_feature_noise(batch: MosaicBatch, max_std: float, rng: np.random.Generator) -> MosaicBatch:
    """Return a batch with noise in its correspondence features, so that the head errs as it does on unseen images.

    The strength of the noise is drawn for each image, up to a standard deviation of ``max_std``; the features have a
    variance of 1. One part of the noise differs from token to token, the other from region to region.
    """
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))

    def add_noise(feature: Tensor) -> Tensor:
        strength = max_std * torch.rand(len(feature), 1, 1, 1, generator=generator) ** 2
        regions = [max(1, side // NOISE_REGION) for side in feature.shape[-2:]]
        coarse = torch.randn(*feature.shape[:2], *regions, generator=generator)
        coarse = F.interpolate(coarse, feature.shape[-2:], mode="bilinear", align_corners=False)
        noise = 0.5 * torch.randn(feature.shape, generator=generator) + 1.3 * coarse
        return feature.float() + strength * noise

    reference = batch.reference_feature
    return replace(
        batch,
        feature=add_noise(batch.feature),
        reference_feature=add_noise(reference.flatten(0, 1)).reshape(reference.shape),
    )


def render_mosaics(alpha: Tensor, prediction: Prediction) -> ImageU8:
    """Show for each mosaic: true alpha [B,nH,nW], predicted alpha, and the combined similarity map."""
    _, logit, similarity, _ = prediction
    combined = 0.5 + 0.5 * similarity[:, -1:]  # the last map, from -1..1 to 0..1
    return render_layers((alpha, torch.sigmoid(logit), resize_bilinear(combined, logit.shape[-2:])[:, 0]))


def _render_preview(mosaic: Mosaic[Scene]) -> list[ImageU8]:
    """Return images of the references, the mosaic, and its true alpha, uint8 [h,w,3] each.

    References are dark outside their masks. Several references are arranged in two columns.
    """
    references = [darken_outside(scene.rgb, scene.alpha > HALF_U8) for scene in mosaic.references]
    columns = 1 if len(references) == 1 else 2
    references += [np.full_like(references[0], UNKNOWN)] * (-len(references) % columns)  # fill the last row
    images = [scene.rgb for scene in mosaic.tiles]
    alphas = [
        to_rgb(scene.alpha * np.uint8(shows)) for scene, shows in zip(mosaic.tiles, mosaic.is_positive, strict=True)
    ]

    def arrange(cells: list[ImageU8], columns: int) -> ImageU8:
        rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
        return np.concatenate([np.concatenate(row, axis=1) for row in rows])

    return [arrange(references, columns), arrange(images, mosaic.columns), arrange(alphas, mosaic.columns)]


def stack_scenes(scenes: Sequence[Scene]) -> list[Tensor]:
    """Return the layers of N scenes: rgb uint8 [N,S,S,3], alpha uint8 [N,S,S] and valid bool [N,S,S]."""
    return [
        torch.from_numpy(np.stack([getattr(scene, name) for scene in scenes])) for name in ("rgb", "alpha", "valid")
    ]


def encode_scenes(
    backbone: Backbone, head: TokenMatchHead, scenes: Sequence[Tensor], objects: Objects | None = None
) -> View:
    """Encode N scenes, stacked by :func:`stack_scenes`, to what the head is trained on."""
    rgb, alpha_u8, valid = scenes
    image = rgb.permute(0, 3, 1, 2).float() / 255.0
    alpha = alpha_u8[:, None].float() / 255.0
    features = backbone.target_features(image, valid, [""] * len(image))
    stride = image.shape[-1] // features.correspondence_features.shape[-1]
    inside, outside = [], []
    for scene_alpha, scene_valid in zip(alpha, valid, strict=True):
        guidance = (scene_alpha > 0.5).float()[None]
        inside.append(foreground_token_mask(guidance, scene_valid[None], stride)[0])
        outside.append(background_token_mask(guidance, scene_valid[None], stride))
    # Each level of the decoder halves the stride of the tokens.
    scale_strides = [stride >> (level + 1) for level in range(len(head.config.skip_channels))]
    output_stride = stride >> len(head.config.decoder_channels)
    return View(
        feature=features.correspondence_features,
        scales=tuple(features.scale_features[scale_stride] for scale_stride in scale_strides),
        alpha=F.avg_pool2d(alpha, output_stride)[:, 0],
        inside=torch.cat(inside),
        outside=torch.cat(outside),
        valid=features.valid,
        embedding=image.new_zeros(len(image), 0, 0, 0) if objects is None else objects.embedding(image),
    )


class MosaicStage(Stage[BatchT]):
    """A stage whose samples are mosaics. Its preview shows their images."""

    loss_names: ClassVar[tuple[str, ...]] = LOSS_TERMS

    def __init__(self, settings: Settings, pool: TrainingPool) -> None:
        super().__init__(settings, pool)
        self._config, self._notice = fit_config_to_groups(settings.train.match, pool)
        self._previews: dict[int, list[Mosaic[Scene]]] = {}
        """The mosaics of the last previewed batch, by the number of its first sample."""

    def prepare(self, learner: Learner, folder: Path, first_step: int, listener: TrainingListener) -> None:
        del folder, first_step
        if self._notice and learner.is_main:
            listener.on_notice(self._notice)

    @abstractmethod
    def draw_scenes(self, sample_numbers: Sequence[int]) -> list[Mosaic[Scene]]:
        """Draw the mosaics of a batch, with images instead of tokens."""

    def preview_sample(self, number: int) -> tuple[str, list[ImageU8]]:
        """Return the name of a training sample, and its images: references, mosaic and true alpha.

        All mosaics of a batch are drawn together, as in the training, because each depends on those before it.
        """
        size = self.settings.train.micro_batch_size or self.settings.train.batch_size
        first = number - number % size
        if first not in self._previews:
            self._previews = {first: self.draw_scenes(range(first, first + size))}
        mosaic = self._previews[first][number - first]
        return mosaic.name, _render_preview(mosaic)


def draw_index(weights: Sequence[float], rng: np.random.Generator) -> int:
    """Draw an index with a probability proportional to its weight."""
    return int(rng.choice(len(weights), p=np.asarray(weights) / sum(weights)))
