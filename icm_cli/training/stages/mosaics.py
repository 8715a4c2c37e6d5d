"""Mosaics of the tokens of images, of which one, several or none show the reference's object.

The stages that train a token-match head use them: "match" and "objects" on stored tokens, "joint" on images that are
made for each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.errors import ConfigError, TrainingError, UsageError
from icm_cli.geometry import HALF_U8, UNKNOWN, ImageU8
from icm_cli.model.contracts import Backbone, Features, Objects
from icm_cli.model.core import InContextMatting
from icm_cli.model.decoding import resize_bilinear
from icm_cli.model.lite.head import TokenMatchHead
from icm_cli.model.similarity import ReferenceTokens, background_token_mask, foreground_token_mask
from icm_cli.training.batches import Batch
from icm_cli.training.data.pool import TrainingItem, TrainingPool
from icm_cli.training.data.scenes import Scene
from icm_cli.training.settings import LAYOUTS, MatchStageConfig
from icm_cli.training.stages import Prediction, darken_outside, grey_to_rgb, render_layers

LARGE_FACTOR = 2
"""Side of a large view, as a multiple of a view's side."""
NOISE_REGION = 6
"""Side, in tokens, of the regions that share a part of their noise."""
FURTHER_PROBABILITY = 0.7
"""Probability that a further tile shows the object, in mosaics where several tiles may show it."""
MAX_ATTEMPTS = 1000
"""Number of draws for one tile of a mosaic after which training ends."""
MAX_PARTNER_DRAWS = 20
"""Number of draws for one reference after which another target is drawn."""
Image = TypeVar("Image")
"""An image of a mosaic: its tokens, or what they are computed from."""


@dataclass(frozen=True)
class View:
    """Tokens of an image.

    feature: correspondence features [C,h,w]; scales: inputs of the head's decoder, from coarse to fine, [C',2h,2w],
    [C",4h,4w] ...; alpha: mean of the alpha in each cell of the decoder's output, [nh,nw]; inside, outside: tokens
    inside and outside the guidance, bool [h,w]; valid: tokens of the image instead of padding, bool [h,w]; embedding:
    image embedding of the object model, [E,mh,mw], or [0,0,0] if it is not trained.
    """

    feature: Tensor
    scales: tuple[Tensor, ...]
    alpha: Tensor
    inside: Tensor
    outside: Tensor
    valid: Tensor
    embedding: Tensor


@dataclass(frozen=True)
class Mosaic(Generic[Image]):
    """Tiles, row by row, and the references that show the target object."""

    name: str
    rows: int
    columns: int
    references: Sequence[Image]
    tiles: Sequence[Image]
    positive_tiles: tuple[int, ...]
    """Indices of the tiles that show the references' object."""


@dataclass(frozen=True)
class MosaicBatch(Batch):
    """A batch of mosaics with R references each.

    Of the mosaics: feature [B,C,H,W], valid bool [B,H,W], scales [B,C',2H,2W] ..., alpha float32 [B,nH,nW], and
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


class TokenMatcher(nn.Module):
    """Runs a token-match head on stored tokens, without images."""

    def __init__(self, head: TokenMatchHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, batch: MosaicBatch) -> Prediction:
        """Return the head's outputs.

        They are the logit of the coarse alpha [B,H,W], the logit of the decoder's alpha [B,nH,nW], the similarity maps
        of all comparisons [B,comparisons,H,W] in -1..1, and the presence logit [B].
        """
        head = self.head
        scales = {-level: scale.float() for level, scale in enumerate(batch.scales)}
        target = Features(batch.feature.float(), batch.valid, scales, {})
        projected = head.project_tokens(batch.reference_feature.flatten(0, 1).float())
        projected = projected.reshape(len(batch.feature), -1, projected.shape[-1])
        references = [
            ReferenceTokens(tokens[inside.flatten()], tokens[outside.flatten()])
            for tokens, inside, outside in zip(projected, batch.inside, batch.outside, strict=True)
        ]
        return head.predict_match(target, references, None)


def require_token_match_head(model: InContextMatting, stage: str) -> TokenMatchHead:
    """Return the head of a model that a stage can train on mosaics. Raises ConfigError if it has another head."""
    if not isinstance(model.head, TokenMatchHead):
        raise ConfigError(
            f"train: stage is {stage}, which needs a token-match head; use another stage, or 'head: {{name: "
            "token-match}}'"
        )
    skips, steps = (len(getattr(model.head.config, name)) for name in ("skip_channels", "decoder_channels"))
    if steps > skips:
        raise ConfigError(
            f"train: stage is {stage}, which has no images, but {steps - skips} of the {steps} decoder_channels of the "
            "head need the image; expected no more decoder_channels than skip_channels"
        )
    return model.head


def fit_config_to_groups(config: MatchStageConfig, pool: TrainingPool) -> tuple[MatchStageConfig, str]:
    """Return the settings for the mosaics of a pool, and a notice if they differ from ``config``, else "".

    If all images show the same object, mosaics are single images that show it. Raises UsageError if only some of the
    groups have negatives.
    """
    firsts = [items[0] for items in pool.groups.values()]
    without_negative = [item for item in firsts if not any(item.is_negative_for(other) for other in firsts)]
    if not without_negative or not (config.negative_probability or any(config.layout_weights[1:])):
        return config, ""
    if len(without_negative) < len(firsts):
        raise UsageError(
            f"data: there is no image without the object of {without_negative[0].image}, because every other group "
            "has a class in common with it; correct 'classes', or add images of other classes"
        )
    notice = (
        "all images belong to one group or class, so every mosaic is a single image that shows the object; add images "
        "of other objects, from which the model learns to tell objects apart"
    )
    return replace(config, negative_probability=0.0, layout_weights=(1.0, 0.0, 0.0, 0.0)), notice


def draw_layout(config: MatchStageConfig, rng: np.random.Generator) -> tuple[int, int, int]:
    """Draw rows, columns and number of references of a batch's mosaics."""
    rows, columns = LAYOUTS[_draw_index(config.layout_weights, rng)]
    return rows, columns, _draw_index(config.reference_count_weights, rng) + 1


@dataclass(frozen=True)
class MosaicSampler(Generic[Image]):
    """Samples mosaics of images of ``pool``, with references of ``reference_pool``.

    ``load_target`` and ``load_reference`` return the image of an item, or None if it cannot be used.
    """

    pool: TrainingPool
    reference_pool: TrainingPool
    config: MatchStageConfig
    layout: tuple[int, int, int]
    """The result of :func:`draw_layout`."""
    rng: np.random.Generator
    load_target: Callable[[TrainingItem], Image | None]
    load_reference: Callable[[TrainingItem], Image | None]

    def sample(self) -> Mosaic[Image]:
        """Sample a mosaic. Raises TrainingError if there are not enough usable images."""
        rows, columns, reference_count = self.layout
        for _ in range(MAX_ATTEMPTS):
            item, target = self._sample_tile()
            sampled = [self._sample_reference(item, target) for _ in range(reference_count)]
            references = [each for each in sampled if each is not None]
            if len(references) < reference_count:
                continue
            images = [image for _, image in references]
            positives = self._sample_positives(item, target, rows * columns, images)
            tiles = [
                positives[i] if i in positives else self._sample_tile(without=item)[1] for i in range(rows * columns)
            ]
            name = f"{item.name} by {references[0][0].name}{'' if positives else ' (absent)'}"
            return Mosaic(name, rows, columns, images, tiles, tuple(positives))
        raise TrainingError(
            "no group has two readable views; increase train.match.views_per_group, or give more images of each object"
        )

    def _sample_tile(self, without: TrainingItem | None = None) -> tuple[TrainingItem, Image]:
        """Sample a usable item and its image, which does not show the object of the item ``without``."""
        for _ in range(MAX_ATTEMPTS):
            item = self.pool.draw_item(self.rng)
            is_usable = without is None or without.is_negative_for(item)
            if is_usable and (image := self.load_target(item)) is not None:
                return item, image
        if without is None:
            raise TrainingError(
                "almost no training image could be read; repair the data, or exclude files with 'exclude'"
            )
        raise TrainingError(f"no readable image lacks the object of {without.image}; add images of other objects")

    def _sample_reference(self, item: TrainingItem, target: Image) -> tuple[TrainingItem, Image] | None:
        """Sample a reference for ``item`` that is not the image ``target``; None if its group has no other one."""
        for _ in range(MAX_PARTNER_DRAWS):
            partner = self.reference_pool.draw_partner(item, self.rng, self.config.same_image_probability)
            if (image := self.load_reference(partner)) is not None and image is not target:
                return partner, image
        return None

    def _sample_positives(
        self, item: TrainingItem, target: Image, tile_count: int, references: Sequence[Image]
    ) -> dict[int, Image]:
        """Draw the tiles that show the object of ``item``, and their images, none of which is a reference."""
        rng, config = self.rng, self.config
        if rng.random() < config.negative_probability:
            return {}
        positives = {int(rng.integers(tile_count)): target}
        if config.multiple_probability and rng.random() < config.multiple_probability:
            further = [
                tile for tile in range(tile_count) if tile not in positives and rng.random() < FURTHER_PROBABILITY
            ]
            for tile in further:
                image = self.load_target(self.pool.draw_partner(item, rng, config.same_image_probability))
                if image is not None and not any(image is reference for reference in references):
                    positives[tile] = image
        return positives


def collate_mosaics(mosaics: Sequence[Mosaic[View]], counters: Sequence[int]) -> MosaicBatch:
    """Stack mosaics of the same layout and number of references into a batch."""
    rows, columns = mosaics[0].rows, mosaics[0].columns
    tiles = [
        [
            view if i in mosaic.positive_tiles else replace(view, alpha=torch.zeros_like(view.alpha))
            for i, view in enumerate(mosaic.tiles)
        ]
        for mosaic in mosaics
    ]

    def stack_tiles(name: str, level: int | None = None) -> Tensor:
        layers = [[getattr(view, name) for view in views] for views in tiles]
        if level is not None:
            layers = [[layer[level] for layer in each] for each in layers]
        return torch.stack([lay_out_tiles(each, rows, columns) for each in layers])

    def stack_references(name: str) -> Tensor:
        return torch.stack([torch.stack([getattr(view, name) for view in mosaic.references]) for mosaic in mosaics])

    return MosaicBatch(
        names=tuple(mosaic.name for mosaic in mosaics),
        counters=tuple(counters),
        skipped=(),
        rows=rows,
        columns=columns,
        feature=stack_tiles("feature"),
        scales=tuple(stack_tiles("scales", level) for level in range(len(mosaics[0].references[0].scales))),
        alpha=stack_tiles("alpha").float(),
        valid=stack_tiles("valid"),
        reference_feature=stack_references("feature"),
        inside=stack_references("inside"),
        outside=stack_references("outside"),
        embedding=stack_tiles("embedding"),
    )


def add_feature_noise(batch: MosaicBatch, max_std: float, rng: np.random.Generator) -> MosaicBatch:
    """Add noise to the features that are compared, so that the head errs as it does on images it never saw.

    Each image has noise of its own strength, with a standard deviation of up to ``max_std``: partly per token, partly
    in larger regions. The features themselves have a variance of 1.
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
    layers = (alpha, torch.sigmoid(logit), resize_bilinear(0.5 + 0.5 * similarity[:, -1:], logit.shape[-2:])[:, 0])
    return render_layers(layers)


def render_preview(mosaic: Mosaic[Scene]) -> list[ImageU8]:
    """Return images of the references, the mosaic, and its true alpha, uint8 [h,w,3] each.

    References are dark outside their masks. Several references are arranged in two columns.
    """
    references = [darken_outside(scene.rgb, scene.alpha > HALF_U8) for scene in mosaic.references]
    width = 1 if len(references) == 1 else 2
    references += [np.full_like(references[0], UNKNOWN)] * (-len(references) % width)
    alphas = [
        grey_to_rgb(scene.alpha * np.uint8(tile in mosaic.positive_tiles)) for tile, scene in enumerate(mosaic.tiles)
    ]
    images = [scene.rgb for scene in mosaic.tiles]
    return [
        np.concatenate([np.concatenate(tiles[i : i + count], axis=1) for i in range(0, len(tiles), count)])
        for tiles, count in ((references, width), (images, mosaic.columns), (alphas, mosaic.columns))
    ]


def encode_views(
    backbone: Backbone,
    head: TokenMatchHead,
    image: Tensor,
    alpha: Tensor,
    valid: Tensor,
    objects: Objects | None = None,
) -> Iterator[View]:
    """Yield the tokens of images: image [N,3,S,S] sRGB 0..1, alpha float32 [N,1,S,S] 0..1, valid bool [N,S,S]."""
    features = backbone.target_features(image, valid, [""] * len(image))
    stride = image.shape[-1] // features.correspondence_features.shape[-1]
    mean_alpha = F.avg_pool2d(alpha, stride >> len(head.config.decoder_channels))[:, 0]
    scales = [features.scale_features[stride >> level + 1] for level in range(len(head.config.skip_channels))]
    guidance = (alpha > 0.5).float()
    embeddings = None if objects is None else objects.embedding(image)
    for i in range(len(image)):
        index = slice(i, i + 1)
        yield View(
            features.correspondence_features[i],
            tuple(scale[i] for scale in scales),
            mean_alpha[i],
            foreground_token_mask(guidance[index], valid[index], stride)[0][0],
            background_token_mask(guidance[index], valid[index], stride)[0],
            features.valid[i],
            image.new_zeros(0, 0, 0) if embeddings is None else embeddings[i],
        )


def lay_out_tiles(tiles: Sequence[Tensor], rows: int, columns: int) -> Tensor:
    """Concatenate tiles, [...,h,w] row by row, to one tensor [...,H,W]."""
    lines = [torch.cat(list(tiles[row * columns : (row + 1) * columns]), dim=-1) for row in range(rows)]
    return torch.cat(lines, dim=-2)


def _draw_index(weights: Sequence[float], rng: np.random.Generator) -> int:
    """Draw an index with a probability proportional to its weight."""
    return int(rng.choice(len(weights), p=np.asarray(weights) / sum(weights)))
