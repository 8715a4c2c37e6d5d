"""The stage "match": a token-match head learns which thing is meant, on the tokens of pictures alone.

The backbone is frozen, so every picture is seen by it once and its tokens are kept in the run's folder. A sample is
then a mosaic of one to four pictures' tokens, of which at most one shows the reference's thing: hundreds of times
cheaper than a sample of pictures, and it asks nothing but which thing is meant.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from icm_cli.errors import ConfigError, ImageError, TrainingError
from icm_cli.files import atomic_write, digest_of
from icm_cli.geometry import ImageU8, to_u8
from icm_cli.model.contracts import Features
from icm_cli.model.decoding import enlarged
from icm_cli.model.guidance import ReferenceTokens, background_tokens, foreground_tokens
from icm_cli.model.heads.token_match import CARRIED, EVIDENCE_NUMBERS, TokenMatchHead
from icm_cli.model.in_context_matting import InContextMatting
from icm_cli.training.batches import Batch, StepSampler, start_worker
from icm_cli.training.data.pool import Item, Pool
from icm_cli.training.data.samples import SampleMaker
from icm_cli.training.panels import MOST_ROWS, grey, table
from icm_cli.training.settings import Settings
from icm_cli.training.stages.contract import Answer, Stage

if TYPE_CHECKING:
    from icm_cli.events import TrainingListener
    from icm_cli.training.learner import Learner

LAYOUTS = ((1, 1), (1, 2), (2, 1), (2, 2))
"""Rows and columns of the mosaics."""
LARGE = 2
"""Side of a large view, in views."""
KEPT_NAME = "tokens.pt"
"""File of the tokens in a run's folder."""
BEGIN_VIEWS = 400
"""Pictures whose tokens give the principal components that the head's projections begin with."""
AT_A_TIME = 8
"""Pictures that the backbone sees together."""
TOLD_EVERY_S = 60.0
ATTEMPTS = 1000
"""Draws for one place of a mosaic before training stops."""
LEAST_ALPHA = 1e-4
"""Least distance of an alpha from 0 and 1 before its logarithm is taken."""


@dataclass(frozen=True)
class View:
    """Tokens of a picture: feature float16 [C,h,w]; what joins the head's decoder, from coarse to fine, float16
    [C',2h,2w], [C",4h,4w] ...; alpha float16 [nh,nw], each cell's mean, as fine as the decoder goes; which tokens lie
    inside and outside the guidance, and which hold the frame, bool [h,w]."""

    feature: Tensor
    scales: tuple[Tensor, ...]
    alpha: Tensor
    inside: Tensor
    outside: Tensor
    valid: Tensor


Views: TypeAlias = Mapping[Item, Sequence[View]]


@dataclass(frozen=True)
class MosaicBatch(Batch):
    """Mosaics beside R references each.

    feature float16 [B,C,H,W], valid bool [B,H,W], scales float16 [B,C',2H,2W] ... and alpha float32 [B,nH,nW] of the
    mosaics; reference_feature float16 [B,R,C,h,w], inside and outside bool [B,R,h,w] of the references.
    """

    feature: Tensor
    scales: tuple[Tensor, ...]
    alpha: Tensor
    valid: Tensor
    reference_feature: Tensor
    inside: Tensor
    outside: Tensor


class TokenMatcher(nn.Module):
    """A token-match head that is asked for its answers on tokens, before any picture is there."""

    def __init__(self, head: TokenMatchHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, batch: MosaicBatch) -> Answer:
        """Logit of the coarse alpha [B,H,W] and of the decoder's [B,nH,nW], what each comparison carries over
        [B,comparisons,H,W] in -1..1, and the logit of whether the thing is there [B]."""
        head = self.head
        scales = {-level: scale.float() for level, scale in enumerate(batch.scales)}
        target = Features(batch.feature.float(), batch.valid, scales, {})
        shown = head.projected(batch.reference_feature.flatten(0, 1).float())
        shown = shown.reshape(len(batch.feature), -1, shown.shape[-1])
        references = [
            ReferenceTokens(each[inside.flatten()], each[outside.flatten()])
            for each, inside, outside in zip(shown, batch.inside, batch.outside, strict=True)
        ]
        projected = head.projected(target.correspondence)
        evidence = head.evidence(projected, target.valid, references)
        fused = head.fused(target, evidence)
        presence = head.presence(fused, projected, evidence, target.valid, references)
        fine = head.decoded(fused, target, None)[:, 0]
        return head.coarse(fused)[:, 0].float(), fine, evidence[:, CARRIED::EVIDENCE_NUMBERS], presence


class MatchStage(Stage[MosaicBatch]):
    """Mosaics of tokens in, which of them are the thing out."""

    learns = ("head",)
    terms = ("cross_entropy", "dice", "coarse", "comparisons", "presence")

    def __init__(self, settings: Settings, pool: Pool) -> None:
        super().__init__(settings, pool)
        config = settings.train.match
        self.maker = SampleMaker(pool, settings.train)
        self.large_maker = SampleMaker(pool, replace(settings.train, canvas_px=LARGE * settings.train.canvas_px))
        self.shown = to_show(pool, config.views, config.most_views, settings.train.seed)
        self.shown_large = (
            to_show(pool, config.large_views, config.most_views, settings.train.seed + 1) if config.large_views else []
        )
        self.views: dict[Item, list[View]] = {}
        self.large_views: dict[Item, list[View]] = {}

    def module(self, model: InContextMatting) -> nn.Module:
        if not isinstance(model.head, TokenMatchHead):
            raise ConfigError("train: stage is match, which is for the token-match head; take another stage or head")
        skips, steps = (len(getattr(model.head.config, name)) for name in ("skip_channels", "decoder_channels"))
        if steps > skips:
            raise ConfigError(
                f"train: stage is match, and the head's decoder has {steps} steps, of which {steps - skips} take the "
                "image in; the stage has no images: expected no more decoder_channels than skip_channels"
            )
        return TokenMatcher(model.head)

    def prepare(self, learner: Learner, folder: Path, listener: TrainingListener) -> None:
        path = folder / KEPT_NAME
        digest = views_digest(self.settings, [*self.shown, *self.shown_large], learner.weights_digest)
        views = kept_views(path, digest)
        if views is None:
            listener.notice(f"reading the tokens of {len(self.shown) + len(self.shown_large)} pictures into {path}")
            views = self._read(learner, self.maker, self.shown, listener)
            views += self._read(learner, self.large_maker, self.shown_large, listener)
            if learner.is_main:
                keep_views(path, digest, views)
        self.views = _by_item(self.shown, views[: len(self.shown)])
        self.large_views = _by_item(self.shown_large, views[len(self.shown) :])
        if not learner.is_from_checkpoint:
            assert isinstance(learner.model.head, TokenMatchHead)
            found = [view for view in views if view is not None]
            learner.model.head.init_from_pca(_some_tokens(found, self.settings.train.seed).to(learner.device.place))

    def batches(self, sampler: StepSampler, *, workers: int, pin: bool) -> Iterator[MosaicBatch]:
        """Batches are drawn here, for the tokens are here; ``workers`` read pictures, before."""
        del workers
        for counters in sampler:
            batch = self.batch(counters)
            yield batch.pin_memory() if pin else batch

    def answer(self, forward: nn.Module, batch: MosaicBatch) -> Answer:
        found: Answer = forward(batch)
        return found

    def losses(self, answer: Answer, batch: MosaicBatch) -> dict[str, Tensor]:
        coarse, logit, carried, presence = answer
        fine_truth, valid = batch.alpha, batch.valid
        finer = logit.shape[-1] // coarse.shape[-1]
        fine_valid = valid.repeat_interleave(finer, 1).repeat_interleave(finer, 2)
        truth = F.avg_pool2d(fine_truth[:, None], finer)[:, 0]
        size = valid.sum(dim=(1, 2))
        each = (0.5 + 0.5 * carried).clamp(LEAST_ALPHA, 1.0 - LEAST_ALPHA)
        compared = F.binary_cross_entropy(each, truth[:, None].expand_as(each), reduction="none").mean(dim=1)
        there = truth.sum(dim=(1, 2)) > 1.0
        alpha = torch.sigmoid(logit) * fine_valid
        common, sizes = (alpha * fine_truth).mean(dim=(1, 2)), (alpha + fine_truth).mean(dim=(1, 2))
        common, sizes = common * size, sizes * size
        is_there = (truth.amax(dim=(1, 2)) > 0.5).float()
        terms = {
            "cross_entropy": _entropy(logit, fine_truth, fine_valid),
            "dice": (1.0 - (2.0 * common + 1.0) / (sizes + 1.0)) * there,
            "coarse": _entropy(coarse, truth, valid) if finer > 1 else torch.zeros_like(is_there),
            "comparisons": (compared * valid).sum(dim=(1, 2)) / size,
            "presence": self.settings.train.match.presence
            * F.binary_cross_entropy_with_logits(presence, is_there, reduction="none"),
        }
        return {**terms, "total": torch.stack(list(terms.values())).sum(dim=0)}

    @torch.no_grad()
    def panel(self, learner: Learner, batch: MosaicBatch) -> ImageU8:
        """For each mosaic its true alpha, the coarse alpha, and what all comparisons together carry over."""
        few = batch.first(MOST_ROWS)
        _, logit, carried, _ = self.answer(self.module(learner.model), few)
        layers = (few.alpha, torch.sigmoid(logit), enlarged(0.5 + 0.5 * carried[:, -1:], logit.shape[-2:])[:, 0])
        return table([[grey(to_u8(layer[i].cpu().numpy())) for layer in layers] for i in range(len(few.names))])

    def preview(self, counter: int) -> tuple[str, list[ImageU8]]:
        """A picture whose tokens are read, and its alpha."""
        item = self.shown[counter % len(self.shown)]
        scene = self.maker.view(item, np.random.default_rng((self.settings.train.seed, counter)))
        return f"{item.group} {item.name}", [scene.rgb, grey(scene.alpha)]

    def batch(self, counters: Sequence[int]) -> MosaicBatch:
        """Samples number ``counters``: the same for every run of a seed. All of them have one layout.

        Raises TrainingError where the pictures do not suffice for a mosaic.
        """
        rng = np.random.default_rng((self.settings.train.seed, 1, counters[0]))
        rows, columns = LAYOUTS[_drawn_index(self.settings.train.match.layout_shares, rng)]
        shown = self.large_views if self.large_views and (rows, columns) == (1, 1) else self.views
        shown_beside = self.large_views if self.large_views and rng.random() < 0.5 else self.views
        references = _drawn_index(self.settings.train.match.reference_shares, rng) + 1
        samples = [self._sample(rows * columns, references, shown, shown_beside, rng) for _ in counters]
        feature, alpha, valid = (
            torch.stack([_laid_out([getattr(view, name) for view in each.tiles], rows, columns) for each in samples])
            for name in ("feature", "alpha", "valid")
        )
        scales = tuple(
            torch.stack([_laid_out([view.scales[level] for view in each.tiles], rows, columns) for each in samples])
            for level in range(len(samples[0].references[0].scales))
        )
        wanted = torch.stack(
            [
                _laid_out(
                    [torch.full_like(view.alpha, float(i == each.place)) for i, view in enumerate(each.tiles)],
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
        names = tuple(each.name for each in samples)
        return MosaicBatch(
            names,
            tuple(counters),
            (),
            feature,
            scales,
            (alpha * wanted).float(),
            valid,
            reference_feature,
            inside,
            outside,
        )

    def _sample(self, tiles: int, references: int, shown: Views, beside: Views, rng: np.random.Generator) -> _Mosaic:
        """A mosaic of ``tiles`` shown views, its references some of ``beside``."""
        config = self.settings.train.match
        for _ in range(ATTEMPTS):
            item = self._drawn(shown, rng)
            partner = self.pool.partner(item, rng, config.same_image_share)
            target, guides = _view(shown, item, rng), [_view(beside, partner, rng)]
            guides += [
                _view(beside, self.pool.partner(item, rng, config.same_image_share), rng) for _ in range(1, references)
            ]
            usable = [view for view in guides if view is not None and view is not target and view.alpha.max() > 0.5]
            if target is None or len(usable) < references:
                continue
            others = [self._stranger(shown, item, rng) for _ in range(tiles)]
            place = -1 if rng.random() < config.negative_share else int(rng.integers(tiles))
            if place >= 0:
                others[place] = target
            return _Mosaic(f"{item.name} by {partner.name}", usable, others, place)
        raise TrainingError("no group has two views that can be read; raise train.match.views, or give more pictures")

    def _drawn(self, views: Views, rng: np.random.Generator) -> Item:
        for _ in range(ATTEMPTS):
            item = self.pool.draw(rng)
            if views.get(item):
                return item
        raise TrainingError("hardly any picture could be read; mend the data, or leave files out with 'exclude'")

    def _stranger(self, views: Views, shown: Item, rng: np.random.Generator) -> View:
        for _ in range(ATTEMPTS):
            item = self._drawn(views, rng)
            if item.is_alien_to(shown):
                return views[item][int(rng.integers(len(views[item])))]
        raise TrainingError(f"there is no picture without the thing of {shown.image}; give more groups")

    def _read(
        self, learner: Learner, maker: SampleMaker, shown: Sequence[Item], listener: TrainingListener
    ) -> list[View | None]:
        """Show the backbone a picture after the other; None where one cannot be read."""
        views: list[View | None] = [None] * len(shown)
        loader = DataLoader(
            _Scenes(maker, shown, self.settings.train.seed),
            batch_size=AT_A_TIME,
            collate_fn=list,
            num_workers=learner.workers,
            worker_init_fn=start_worker if learner.workers else None,
            multiprocessing_context="spawn" if learner.workers else None,
        )
        told = time.monotonic()
        for batch in loader:
            found = [each for each in batch if isinstance(each, _Scene)]
            for each in batch:
                if isinstance(each, str):
                    listener.notice(f"skipped: {each}")
            if found:
                for each, view in zip(found, _seen(learner, found), strict=True):
                    views[each.index] = view
            if time.monotonic() - told > TOLD_EVERY_S:
                told = time.monotonic()
                listener.notice(f"{sum(view is not None for view in views)} of {len(views)} pictures are read")
        return views


@dataclass(frozen=True)
class _Mosaic:
    name: str
    references: Sequence[View]
    tiles: Sequence[View]
    place: int
    """Index of the tile that shows the reference's thing; -1: none."""


@dataclass(frozen=True)
class _Scene:
    index: int
    rgb: ImageU8
    alpha: ImageU8
    valid: np.ndarray


class _Scenes(Dataset["_Scene | str"]):
    """Picture number ``index``: an item's scene, with other things in it at times; a str says why it has none."""

    def __init__(self, maker: SampleMaker, shown: Sequence[Item], seed: int) -> None:
        self.maker, self.shown, self.seed = maker, shown, seed

    def __len__(self) -> int:
        return len(self.shown)

    def __getitem__(self, index: int) -> _Scene | str:
        try:
            scene = self.maker.view(self.shown[index], np.random.default_rng((self.seed, index)))
        except ImageError as error:
            return str(error)
        return _Scene(index, scene.rgb, scene.alpha, scene.valid)


def to_show(pool: Pool, views: int, most_views: int, seed: int) -> list[Item]:
    """Draw about ``views`` items of every group with ``seed``, each at most ``most_views`` times."""
    rng = np.random.default_rng((seed, 2))
    shown: list[Item] = []
    for items in pool.groups.values():
        count = min(views, most_views * len(items))
        shown += [items[index] for index in np.resize(rng.permutation(len(items)), count)]
    return shown


def views_digest(settings: Settings, shown: Sequence[Item], weights_digest: str) -> str:
    """Hash of what decides the views: the backbone, what the decoder takes, the recipe of the scenes, which items, and
    the seed."""
    model, train = settings.model.as_dict(), settings.as_dict()["train"]
    decoder = [len(model["head"][name]) for name in ("skip_channels", "decoder_channels")]
    recipe = [
        *(model["backbone"], decoder, weights_digest),
        *(train[name] for name in ("canvas_px", "pairs", "augment", "seed")),
        train["match"]["large_views"],
    ]
    return digest_of(json.dumps(recipe, sort_keys=True), *(f"{item.group} {item.name}" for item in shown))


def keep_views(path: Path, digest: str, views: Sequence[View | None]) -> None:
    """Write views, whole or not at all. Raises OutputError."""
    tensors = [tuple(getattr(view, each.name) for each in fields(View)) if view else None for view in views]
    with atomic_write(path) as file:
        torch.save({"digest": digest, "views": tensors}, file)


def kept_views(path: Path, digest: str) -> list[View | None] | None:
    """Read what :func:`keep_views` wrote, None where nothing is there or it was made of other pictures or settings."""
    try:
        stored: dict[str, Any] = torch.load(path, weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError):
        return None
    return [View(*view) if view else None for view in stored["views"]] if stored["digest"] == digest else None


def _by_item(shown: Sequence[Item], views: Sequence[View | None]) -> dict[Item, list[View]]:
    """The views of each item that has any."""
    found: dict[Item, list[View]] = {}
    for item, view in zip(shown, views, strict=True):
        if view is not None:
            found.setdefault(item, []).append(view)
    return found


def _drawn_index(shares: Sequence[float], rng: np.random.Generator) -> int:
    """An index drawn by its share."""
    return int(rng.choice(len(shares), p=np.asarray(shares) / sum(shares)))


def _view(views: Views, item: Item, rng: np.random.Generator) -> View | None:
    of_item = views.get(item)
    return of_item[int(rng.integers(len(of_item)))] if of_item else None


def _entropy(logit: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Mean cross-entropy [B] over the valid cells of [B,H,W]."""
    each = F.binary_cross_entropy_with_logits(logit, truth, reduction="none")
    return (each * valid).sum(dim=(1, 2)) / valid.sum(dim=(1, 2))


@torch.no_grad()
def _seen(learner: Learner, scenes: Sequence[_Scene]) -> Iterator[View]:
    place = learner.device.place
    image = torch.from_numpy(np.stack([each.rgb for each in scenes])).to(place).permute(0, 3, 1, 2).float() / 255.0
    alpha = torch.from_numpy(np.stack([each.alpha for each in scenes])).to(place)[:, None].float() / 255.0
    valid = torch.from_numpy(np.stack([each.valid for each in scenes])).to(place)
    head = learner.model.head
    assert isinstance(head, TokenMatchHead)
    features = learner.model.backbone.target(image, valid, [""] * len(scenes))
    stride = image.shape[-1] // features.correspondence.shape[-1]
    share = F.avg_pool2d(alpha, stride >> len(head.config.decoder_channels))[:, 0]
    scales = [features.scales[stride >> level + 1] for level in range(len(head.config.skip_channels))]
    guidance = (alpha > 0.5).float()
    for i in range(len(scenes)):
        one = slice(i, i + 1)
        yield View(
            features.correspondence[i].half().cpu(),
            tuple(scale[i].half().cpu() for scale in scales),
            share[i].half().cpu(),
            foreground_tokens(guidance[one], valid[one], stride)[0][0].cpu(),
            background_tokens(guidance[one], valid[one], stride)[0].cpu(),
            features.valid[i].cpu(),
        )


def _laid_out(tiles: Sequence[Tensor], rows: int, columns: int) -> Tensor:
    """Tiles [...,h,w], row by row, side by side."""
    lines = [torch.cat(list(tiles[row * columns : (row + 1) * columns]), dim=-1) for row in range(rows)]
    return torch.cat(lines, dim=-2)


def _some_tokens(views: Sequence[View], seed: int) -> Tensor:
    """Tokens [N,C] float32 of pictures drawn with ``seed``."""
    drawn = np.random.default_rng(seed).permutation(len(views))[:BEGIN_VIEWS]
    return torch.cat([views[index].feature.flatten(1).T.float() for index in drawn])


STAGE = MatchStage
