"""Mosaics of pictures' tokens, of which one, several or none show the reference's thing, and what is asked of them.

Both stages that teach a token-match head which thing is meant use them: "match", on tokens that are kept, and "joint",
on pictures that are made anew for every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.errors import ConfigError, TrainingError
from icm_cli.geometry import ImageU8, alpha_to_u8
from icm_cli.model.contracts import Backbone, Features, Objects
from icm_cli.model.core import InContextMatting
from icm_cli.model.decoding import resize_bilinear
from icm_cli.model.lite.head import TokenMatchHead
from icm_cli.model.similarity import ReferenceTokens, background_token_mask, foreground_token_mask
from icm_cli.training.batches import Batch
from icm_cli.training.data.pool import Item, Pool
from icm_cli.training.panels import grey, table
from icm_cli.training.settings import MatchConfig
from icm_cli.training.stages.contract import Answer

LAYOUTS = ((1, 1), (1, 2), (2, 1), (2, 2))
"""Rows and columns of the mosaics."""
LARGE = 2
"""Side of a large view, in views."""
NOISE_PART = 6
"""Side, in tokens, of the parts that share some of their noise."""
SEVERAL = 0.7
"""Chance of a further tile to show the thing too, in mosaics where several may."""
ATTEMPTS = 1000
"""Draws for one place of a mosaic before training stops."""
PARTNER_ATTEMPTS = 20
"""Draws for one reference before another target is drawn."""
Shown = TypeVar("Shown")
"""A picture as a mosaic shows it: its tokens, or what they are made of."""


@dataclass(frozen=True)
class View:
    """Tokens of a picture: feature [C,h,w]; what joins the head's decoder, from coarse to fine, [C',2h,2w],
    [C",4h,4w] ...; alpha [nh,nw], each cell's mean, as fine as the decoder goes; which tokens lie inside and outside
    the guidance, and which hold the frame, bool [h,w]; where some of the backbone's blocks learn, the tokens that
    enter them, stem [1+N,D], else [0,0]; and where objects learn, what they know of the picture, embedding [E,mh,mw],
    else [0,0,0]."""

    feature: Tensor
    scales: tuple[Tensor, ...]
    alpha: Tensor
    inside: Tensor
    outside: Tensor
    valid: Tensor
    stem: Tensor
    embedding: Tensor


@dataclass(frozen=True)
class Mosaic(Generic[Shown]):
    """Pictures side by side, row by row, and the references that say which one is wanted."""

    name: str
    references: Sequence[Shown]
    tiles: Sequence[Shown]
    places: tuple[int, ...]
    """Indices of the tiles that show the references' thing."""


@dataclass(frozen=True)
class MosaicBatch(Batch):
    """Mosaics beside R references each.

    feature [B,C,H,W], valid bool [B,H,W], scales [B,C',2H,2W] ... and alpha float32 [B,nH,nW] of the mosaics;
    reference_feature [B,R,C,h,w], inside and outside bool [B,R,h,w] of the references; the stems of views,
    [B,rows*columns,1+N,D] and [B,R,1+N,D], where some of the backbone's blocks learn; and embedding [B,E,mH,mW] of the
    mosaics, where objects learn.
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
    stem: Tensor
    reference_stem: Tensor
    embedding: Tensor


@runtime_checkable
class Stemmed(Protocol):
    """A backbone whose last blocks can learn from kept tokens."""

    def last_blocks(self, count: int, /) -> nn.ModuleList: ...

    def keeping_stems(self, count: int, /) -> AbstractContextManager[list[Tensor]]: ...

    def from_stems(self, feature: Tensor, stem: Tensor, count: int, /) -> Tensor: ...


class TokenMatcher(nn.Module):
    """A token-match head that is asked for its answers on tokens, before any picture is there.

    With ``live_blocks`` the last so many blocks of the backbone make theirs anew.
    """

    def __init__(self, head: TokenMatchHead, backbone: Stemmed | None = None, live_blocks: int = 0) -> None:
        super().__init__()
        self.head = head
        self._backbone = backbone
        self._live_blocks = live_blocks

    def forward(self, batch: MosaicBatch) -> Answer:
        """Logit of the coarse alpha [B,H,W] and of the decoder's [B,nH,nW], what each comparison carries over
        [B,comparisons,H,W] in -1..1, and the logit of whether the thing is there [B]."""
        head = self.head
        scales = {-level: scale.float() for level, scale in enumerate(batch.scales)}
        feature, reference = self._features(batch)
        target = Features(feature, batch.valid, scales, {})
        shown = head.project_tokens(reference)
        shown = shown.reshape(len(batch.feature), -1, shown.shape[-1])
        references = [
            ReferenceTokens(each[inside.flatten()], each[outside.flatten()])
            for each, inside, outside in zip(shown, batch.inside, batch.outside, strict=True)
        ]
        return head.predict_logits(target, references, None)

    def _features(self, batch: MosaicBatch) -> tuple[Tensor, Tensor]:
        """Correspondence features of the mosaics [B,C,H,W] and of all references [B*R,C,h,w], float32."""
        mosaic, reference = batch.feature.float(), batch.reference_feature.flatten(0, 1).float()
        if self._backbone is None:
            return mosaic, reference
        reference = self._backbone.from_stems(reference, batch.reference_stem.flatten(0, 1).float(), self._live_blocks)
        height, width = mosaic.shape[-2] // batch.rows, mosaic.shape[-1] // batch.columns
        tiles = [
            mosaic[..., row * height : (row + 1) * height, column * width : (column + 1) * width]
            for row in range(batch.rows)
            for column in range(batch.columns)
        ]
        stems = batch.stem.float()
        live = [self._backbone.from_stems(tile, stems[:, i], self._live_blocks) for i, tile in enumerate(tiles)]
        return laid_out(live, batch.rows, batch.columns), reference


def token_match_head(model: InContextMatting, stage: str) -> TokenMatchHead:
    """The head of a model that such a stage can teach. Raises ConfigError."""
    if not isinstance(model.head, TokenMatchHead):
        raise ConfigError(f"train: stage is {stage}, which is for the token-match head; take another stage or head")
    skips, steps = (len(getattr(model.head.config, name)) for name in ("skip_channels", "decoder_channels"))
    if steps > skips:
        raise ConfigError(
            f"train: stage is {stage}, and the head's decoder has {steps} steps, of which {steps - skips} take the "
            "image in; the stage has no images: expected no more decoder_channels than skip_channels"
        )
    return model.head


def stemmed(backbone: Backbone) -> Stemmed:
    """The backbone, whose last blocks can learn from kept tokens. Raises ConfigError."""
    if not isinstance(backbone, Stemmed):
        raise ConfigError(
            f"train: match: live_blocks is set, and the backbone {type(backbone).__name__} keeps no tokens to learn "
            "from; take dinov2-lite, or set it to 0"
        )
    return backbone


def draw_layout(config: MatchConfig, rng: np.random.Generator) -> tuple[int, int, int]:
    """Rows, columns and number of references of a batch's mosaics, each by its share."""
    rows, columns = LAYOUTS[_drawn_index(config.layout_shares, rng)]
    return rows, columns, _drawn_index(config.reference_shares, rng) + 1


def draw_mosaic(
    pool: Pool,
    config: MatchConfig,
    tiles: int,
    references: int,
    rng: np.random.Generator,
    *,
    as_target: Callable[[Item], Shown | None],
    as_reference: Callable[[Item], Shown | None],
    reference_pool: Pool | None = None,
) -> Mosaic[Shown]:
    """Draw a mosaic of ``tiles`` images from the items of ``pool``, and its references from ``reference_pool``.

    The functions return the image of an item, None where it cannot be shown. Without a ``reference_pool`` the
    references are drawn from ``pool``. Raises TrainingError where the images do not suffice for a mosaic.
    """
    if reference_pool is None:
        reference_pool = pool
    for _ in range(ATTEMPTS):
        failure = "hardly any picture could be read; mend the data, or leave files out with 'exclude'"
        item, target = _draw_tile(pool, rng, as_target, lambda _: True, failure)
        partners = [_draw_partner(reference_pool, config, rng, item, target, as_reference) for _ in range(references)]
        found = [each for each in partners if each is not None]
        if len(found) < references:
            continue
        guides = [shown for _, shown in found]
        tiles_shown: dict[int, Shown] = {}
        if rng.random() >= config.negative_share:
            first = int(rng.integers(tiles))
            tiles_shown = {first: target, **_draw_further(pool, config, rng, item, first, tiles, as_target, guides)}
        failure = f"there is no picture without the thing of {item.image}; give more groups"
        shown = [
            tiles_shown[i] if i in tiles_shown else _draw_tile(pool, rng, as_target, item.is_alien_to, failure)[1]
            for i in range(tiles)
        ]
        return Mosaic(f"{item.name} by {found[0][0].name}", guides, shown, tuple(tiles_shown))
    raise TrainingError("no group has two views that can be read; raise train.match.views, or give more pictures")


def _draw_tile(
    pool: Pool,
    rng: np.random.Generator,
    as_target: Callable[[Item], Shown | None],
    is_usable: Callable[[Item], bool],
    failure: str,
) -> tuple[Item, Shown]:
    """Draw a usable item and its image. Raises TrainingError with ``failure`` where there is none."""
    for _ in range(ATTEMPTS):
        item = pool.draw(rng)
        if is_usable(item) and (shown := as_target(item)) is not None:
            return item, shown
    raise TrainingError(failure)


def _draw_partner(
    pool: Pool,
    config: MatchConfig,
    rng: np.random.Generator,
    item: Item,
    target: Shown,
    as_reference: Callable[[Item], Shown | None],
) -> tuple[Item, Shown] | None:
    """Draw a reference for ``item``, other than its ``target``; None where its group has no other one."""
    for _ in range(PARTNER_ATTEMPTS):
        partner = pool.partner(item, rng, config.same_image_share)
        if (shown := as_reference(partner)) is not None and shown is not target:
            return partner, shown
    return None


def _draw_further(
    pool: Pool,
    config: MatchConfig,
    rng: np.random.Generator,
    item: Item,
    first: int,
    tiles: int,
    as_target: Callable[[Item], Shown | None],
    guides: Sequence[Shown],
) -> dict[int, Shown]:
    """Draw the further tiles that show the thing too, at times; none of them is one of the references."""
    if not config.several_share or rng.random() >= config.several_share:
        return {}
    places = [place for place in range(tiles) if place != first and rng.random() < SEVERAL]
    drawn = {place: as_target(pool.partner(item, rng, config.same_image_share)) for place in places}
    return {
        place: shown
        for place, shown in drawn.items()
        if shown is not None and not any(shown is guide for guide in guides)
    }


def joined(samples: Sequence[Mosaic[View]], counters: Sequence[int], rows: int, columns: int) -> MosaicBatch:
    """Join mosaics of one layout, with as many references each."""
    feature, alpha, valid, embedding = (
        torch.stack([laid_out([getattr(view, name) for view in each.tiles], rows, columns) for each in samples])
        for name in ("feature", "alpha", "valid", "embedding")
    )
    scales = tuple(
        torch.stack([laid_out([view.scales[level] for view in each.tiles], rows, columns) for each in samples])
        for level in range(len(samples[0].references[0].scales))
    )
    wanted = torch.stack(
        [
            laid_out(
                [torch.full_like(view.alpha, float(i in each.places)) for i, view in enumerate(each.tiles)],
                rows,
                columns,
            )
            for each in samples
        ]
    )
    reference_feature, inside, outside = (
        torch.stack([torch.stack([getattr(view, name) for view in each.references]) for each in samples])
        for name in ("feature", "inside", "outside")
    )
    stem, reference_stem = (
        torch.stack([torch.stack([view.stem for view in getattr(each, name)]) for each in samples])
        for name in ("tiles", "references")
    )
    names = tuple(each.name for each in samples)
    return MosaicBatch(
        names,
        tuple(counters),
        (),
        rows,
        columns,
        feature,
        scales,
        (alpha * wanted).float(),
        valid,
        reference_feature,
        inside,
        outside,
        stem,
        reference_stem,
        embedding,
    )


def noisy(batch: MosaicBatch, most: float, rng: np.random.Generator) -> MosaicBatch:
    """The batch with noise on the features that are compared, of a standard deviation of up to ``most``, for each
    picture another: in every token, and in whole parts. Features of tokens have a variance of 1.

    What is asked then errs as it does on pictures that it never saw.
    """
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))

    def of(feature: Tensor) -> Tensor:
        strength = most * torch.rand(len(feature), 1, 1, 1, generator=generator) ** 2
        parts = [max(1, side // NOISE_PART) for side in feature.shape[-2:]]
        coarse = torch.randn(*feature.shape[:2], *parts, generator=generator)
        coarse = F.interpolate(coarse, feature.shape[-2:], mode="bilinear", align_corners=False)
        noise = 0.5 * torch.randn(feature.shape, generator=generator) + 1.3 * coarse
        return feature.float() + strength * noise

    shown = batch.reference_feature
    return replace(batch, feature=of(batch.feature), reference_feature=of(shown.flatten(0, 1)).reshape(shown.shape))


def panel(alpha: Tensor, answer: Answer) -> ImageU8:
    """For each mosaic its true alpha [B,nH,nW], the coarse alpha, and what all comparisons together carry over."""
    _, logit, carried, _ = answer
    layers = (alpha, torch.sigmoid(logit), resize_bilinear(0.5 + 0.5 * carried[:, -1:], logit.shape[-2:])[:, 0])
    return table([[grey(alpha_to_u8(layer[i].float().cpu().numpy())) for layer in layers] for i in range(len(alpha))])


def views_of(
    backbone: Backbone,
    head: TokenMatchHead,
    image: Tensor,
    alpha: Tensor,
    valid: Tensor,
    live_blocks: int = 0,
    objects: Objects | None = None,
) -> Iterator[View]:
    """Tokens of pictures, image [N,3,S,S] sRGB 0..1, alpha float32 [N,1,S,S] 0..1 and valid bool [N,S,S]."""
    keeping = stemmed(backbone).keeping_stems(live_blocks) if live_blocks else nullcontext([])
    with keeping as stems:
        features = backbone.target_features(image, valid, [""] * len(image))
    stride = image.shape[-1] // features.correspondence.shape[-1]
    share = F.avg_pool2d(alpha, stride >> len(head.config.decoder_channels))[:, 0]
    scales = [features.scales[stride >> level + 1] for level in range(len(head.config.skip_channels))]
    guidance = (alpha > 0.5).float()
    embeddings = None if objects is None else objects.embedding(image)
    for i in range(len(image)):
        one = slice(i, i + 1)
        yield View(
            features.correspondence[i],
            tuple(scale[i] for scale in scales),
            share[i],
            foreground_token_mask(guidance[one], valid[one], stride)[0][0],
            background_token_mask(guidance[one], valid[one], stride)[0],
            features.valid[i],
            stems[0][i] if stems else image.new_zeros(0, 0),
            image.new_zeros(0, 0, 0) if embeddings is None else embeddings[i],
        )


def laid_out(tiles: Sequence[Tensor], rows: int, columns: int) -> Tensor:
    """Tiles [...,h,w], row by row, side by side."""
    lines = [torch.cat(list(tiles[row * columns : (row + 1) * columns]), dim=-1) for row in range(rows)]
    return torch.cat(lines, dim=-2)


def _drawn_index(shares: Sequence[float], rng: np.random.Generator) -> int:
    """An index drawn by its share."""
    return int(rng.choice(len(shares), p=np.asarray(shares) / sum(shares)))
