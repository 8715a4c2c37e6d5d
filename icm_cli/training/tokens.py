"""Learning which thing is meant: the token-match head, on tokens alone.

    python -m icm_cli.training.tokens --config lite --data data.yaml --checkpoint A.safetensors --out B.safetensors

The backbone is frozen, so every picture is seen by it once or twice and its tokens are kept in memory. A sample is
then a mosaic of one to four pictures' tokens, of which at most one shows the reference's thing: hundreds of times
cheaper than a sample of ``icm train``, and it asks nothing but which thing is meant.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from icm_cli.errors import ConfigError, ImageError
from icm_cli.files import atomic_write, content_digest, digest_of
from icm_cli.guidance import ReferenceTokens, background_tokens, foreground_tokens
from icm_cli.model.checkpoint import TRAINED_ON_KEY, read_trained_on, save_checkpoint
from icm_cli.model.contracts import Features
from icm_cli.model.heads.token_match import CARRIED, EVIDENCE_NUMBERS, TokenMatchHead
from icm_cli.model.in_context_matting import InContextMatting
from icm_cli.model.loading import model_to_train
from icm_cli.training.items import Item, Pool, read_pool
from icm_cli.training.samples import SampleMaker, start_worker
from icm_cli.training.settings import Settings, read_settings

LAYOUTS = ((1, 1), (1, 2), (2, 1), (2, 2))
LAYOUT_SHARES = (0.3, 0.4, 0.25, 0.05)
NEGATIVE_SHARE = 0.2
SAME_IMAGE_SHARE = 0.1
EMA = 0.998
PRESENCE_WEIGHT = 0.3
WARMUP_STEPS = 100
WEIGHT_DECAY = 1e-2
CLIP_NORM = 5.0
HELD_OUT = 0.1
"""Share of the groups that ``--held-out`` keeps for measuring."""
TEST_BATCHES = 12
TEST_EVERY = 250
LOG_EVERY = 50
BEGIN_VIEWS = 400
"""Pictures whose tokens give the principal components that the projections begin with."""
MOST_VIEWS = 3
"""Of one picture."""
AT_A_TIME = 8
"""Pictures that the backbone sees together."""


@dataclass(frozen=True)
class View:
    """A picture's tokens: feature float16 [C,h,w]; alpha float32 [h,w], each cell's mean; which tokens lie inside and
    outside the guidance, and which hold the frame, bool [h,w]."""

    feature: Tensor
    alpha: Tensor
    inside: Tensor
    outside: Tensor
    valid: Tensor


class Views(Dataset[tuple[int, "np.ndarray | None", "np.ndarray | None", "np.ndarray | None"]]):
    """Picture number ``index``: an item's scene, with other things in it at times; None if unreadable."""

    def __init__(self, maker: SampleMaker, shown: Sequence[Item], seed: int) -> None:
        self.maker, self.shown, self.seed = maker, shown, seed

    def __len__(self) -> int:
        return len(self.shown)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        rng = np.random.default_rng((self.seed, index))
        try:
            scene = self.maker.view(self.shown[index], rng)
        except ImageError:
            return index, None, None, None
        return index, scene.rgb, scene.alpha, scene.valid


def to_show(pool: Pool, views: int, seed: int) -> list[Item]:
    """Of every group about ``views`` items, drawn with ``seed``; each at most ``MOST_VIEWS`` times."""
    rng = np.random.default_rng((seed, 2))
    shown = []
    for items in pool.groups.values():
        count = min(views, MOST_VIEWS * len(items))
        shown += [items[index] for index in np.resize(rng.permutation(len(items)), count)]
    return shown


def read_views(
    model: InContextMatting, maker: SampleMaker, shown: Sequence[Item], seed: int, workers: int
) -> list[View | None]:
    """Show the backbone an item after the other; None where one cannot be read."""
    kept: list[View | None] = [None] * len(shown)
    loader = DataLoader(
        Views(maker, shown, seed),
        batch_size=AT_A_TIME,
        collate_fn=list,
        num_workers=workers,
        worker_init_fn=start_worker if workers else None,
        multiprocessing_context="spawn" if workers else None,
    )
    began = time.monotonic()
    for count, batch in enumerate(loader):
        readable = [each for each in batch if each[1] is not None]
        if not readable:
            continue
        for (index, *_), view in zip(readable, _seen(model, readable), strict=True):
            kept[index] = view
        if count % 50 == 0:
            print(f"{count * AT_A_TIME}/{len(shown)} views, {time.monotonic() - began:.0f} s", flush=True)
    return kept


def views_digest(settings: Settings, shown: Sequence[Item], seed: int) -> str:
    """Hash of what decides the tokens: the backbone, the recipe of the scenes, which items, and their seed."""
    backbone, train = settings.model.as_dict()["backbone"], settings.as_dict()["train"]
    recipe = [backbone, *(train[name] for name in ("canvas_px", "pairs", "augment")), seed]
    return digest_of(json.dumps(recipe, sort_keys=True), *(f"{item.group} {item.name}" for item in shown))


def kept_views(path: Path | None, digest: str, read: Callable[[], list[View | None]]) -> list[View | None]:
    """What ``path`` holds, else what ``read`` gives, which is then kept there under :func:`views_digest`.

    Raises ConfigError where it was made for other pictures or with other settings.
    """
    if path is not None and path.exists():
        stored = torch.load(path, weights_only=True, mmap=True)
        if stored["digest"] != digest:
            raise ConfigError(
                f"{path} holds the tokens of other pictures, or with other settings; delete it, or give another --keep"
            )
        return [View(*view) if view else None for view in stored["views"]]
    views = read()
    if path is not None:
        tensors = [tuple(getattr(view, each.name) for each in fields(View)) if view else None for view in views]
        with atomic_write(path) as file:
            torch.save({"digest": digest, "views": tensors}, file)
    return views


@torch.no_grad()
def _seen(model: InContextMatting, batch: Sequence[tuple[int, np.ndarray, np.ndarray, np.ndarray]]) -> Iterator[View]:
    image = torch.from_numpy(np.stack([rgb for _, rgb, _, _ in batch])).permute(0, 3, 1, 2).float() / 255.0
    alpha = torch.from_numpy(np.stack([each for _, _, each, _ in batch]))[:, None].float() / 255.0
    valid = torch.from_numpy(np.stack([each for _, _, _, each in batch]))
    features = model.backbone.reference(image, valid, [""] * len(batch))
    stride = image.shape[-1] // features.correspondence.shape[-1]
    share = F.avg_pool2d(alpha, stride)[:, 0]
    guidance = (alpha > 0.5).float()
    for i in range(len(batch)):
        one = slice(i, i + 1)
        yield View(
            features.correspondence[i].half(),
            share[i],
            foreground_tokens(guidance[one], valid[one], stride)[0][0],
            background_tokens(guidance[one], valid[one], stride)[0],
            features.valid[i],
        )


class Mosaics:
    """Draws samples from views; all of a batch have one layout."""

    def __init__(self, pool: Pool, views: dict[Item, list[View]], seed: int) -> None:
        self.pool, self.views = pool, views
        self.rng = np.random.default_rng((seed, 1))

    def batch(self, count: int) -> tuple[Features, list[View], Tensor]:
        """Targets, the view that is each one's reference, and the true alpha of their tokens [B,h,w]."""
        rows, columns = LAYOUTS[self.rng.choice(len(LAYOUTS), p=LAYOUT_SHARES)]
        samples = [self._sample(rows * columns) for _ in range(count)]
        feature, alpha, valid = (
            torch.stack([_laid_out([getattr(view, name) for view in tiles], rows, columns) for _, tiles, _ in samples])
            for name in ("feature", "alpha", "valid")
        )
        wanted = torch.stack(
            [
                _laid_out(
                    [torch.full_like(view.alpha, float(i == place)) for i, view in enumerate(tiles)], rows, columns
                )
                for _, tiles, place in samples
            ]
        )
        return Features(feature.float(), valid, {}, {}), [shown for shown, _, _ in samples], alpha * wanted

    def _sample(self, tiles: int) -> tuple[View, list[View], int]:
        """The reference, the tiles, and which of them shows its thing (-1: none)."""
        while True:
            item = self._drawn()
            partner = self.pool.partner(item, self.rng, SAME_IMAGE_SHARE)
            shown, target = self._view(partner), self._view(item)
            if shown is not None and target is not None and shown is not target and shown.alpha.max() > 0.5:
                break
        others = [self._stranger(item) for _ in range(tiles)]
        if self.rng.random() < NEGATIVE_SHARE:
            return shown, others, -1
        place = int(self.rng.integers(tiles))
        others[place] = target
        return shown, others, place

    def _drawn(self) -> Item:
        while True:
            item = self.pool.draw(self.rng)
            if self.views.get(item):
                return item

    def _stranger(self, shown: Item) -> View:
        while True:
            item = self._drawn()
            if item.is_alien_to(shown):
                return self.views[item][self.rng.integers(len(self.views[item]))]

    def _view(self, item: Item) -> View | None:
        views = self.views.get(item)
        return views[self.rng.integers(len(views))] if views else None


def _laid_out(tiles: Sequence[Tensor], rows: int, columns: int) -> Tensor:
    """Tiles [...,h,w], row by row, side by side."""
    lines = [torch.cat(list(tiles[row * columns : (row + 1) * columns]), dim=-1) for row in range(rows)]
    return torch.cat(lines, dim=-2)


def _some_tokens(views: Sequence[View], seed: int) -> Tensor:
    """Tokens [N,C] float32 of pictures drawn with ``seed``."""
    drawn = np.random.default_rng(seed).permutation(len(views))[:BEGIN_VIEWS]
    return torch.cat([views[index].feature.flatten(1).T.float() for index in drawn])


def _references(head: TokenMatchHead, shown: Sequence[View]) -> list[ReferenceTokens]:
    tokens = head.projected(torch.stack([view.feature for view in shown]).float())
    return [
        ReferenceTokens(each[view.inside.flatten()], each[view.outside.flatten()])
        for each, view in zip(tokens, shown, strict=True)
    ]


def _loss(logit: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy and Dice of tokens [B,h,w]; Dice where the thing is there."""
    entropy = F.binary_cross_entropy_with_logits(logit, truth, reduction="none")
    there = truth.sum(dim=(1, 2)) > 1
    alpha = torch.sigmoid(logit) * valid
    dice = 1 - (2 * (alpha * truth).sum(dim=(1, 2)) + 1) / (alpha.sum(dim=(1, 2)) + truth.sum(dim=(1, 2)) + 1)
    return (entropy * valid).sum() / valid.sum() + (dice * there).sum() / there.sum().clamp(min=1)


def _evidence_loss(evidence: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy of what every comparison carries over by itself: that is what makes like things alike."""
    carried = evidence[:, CARRIED::EVIDENCE_NUMBERS]
    alpha = (0.5 + 0.5 * carried).clamp(1e-4, 1 - 1e-4)
    entropy = F.binary_cross_entropy(alpha, truth[:, None].expand_as(alpha), reduction="none").mean(dim=1)
    return (entropy * valid).sum() / valid.sum()


def learn(
    head: TokenMatchHead,
    mosaics: Mosaics,
    held_out: Mosaics,
    *,
    minutes: float,
    batch_size: int,
    rate: float,
    save: Callable[[], None],
) -> None:
    """Train the head in place; ends with the running mean of its weights."""
    head.train()
    parameters = list(head.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=WEIGHT_DECAY)
    mean = [parameter.detach().clone() for parameter in parameters]
    tests = [held_out.batch(batch_size) for _ in range(TEST_BATCHES)]
    began = time.monotonic()
    seen: list[tuple[float, ...]] = []
    for step in itertools.count(1):
        elapsed = min(1.0, (time.monotonic() - began) / (60.0 * minutes))
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, step / WARMUP_STEPS) * 0.5 * (1.0 + math.cos(math.pi * elapsed))
        loss, *figures = _judged(head, *mosaics.batch(batch_size))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimiser.step()
        with torch.no_grad():
            decay = min(EMA, step / (step + 10))
            for kept, parameter in zip(mean, parameters, strict=True):
                kept.lerp_(parameter, 1 - decay)
        seen.append((loss.item(), *figures))
        is_last = elapsed >= 1.0
        if step % LOG_EVERY == 0:
            speed = step * batch_size / (time.monotonic() - began)
            print(f"[{step}] {elapsed:.3f} {_told(seen[-LOG_EVERY:])}, samples/s {speed:.1f}", flush=True)
        if step % TEST_EVERY == 0 or is_last:
            live = [parameter.detach().clone() for parameter in parameters]
            _assign(parameters, mean)
            with torch.no_grad():
                head.eval()
                told = _told([(loss.item(), *figures) for loss, *figures in (_judged(head, *test) for test in tests)])
                head.train()
            print(f"[{step}] held out: {told}", flush=True)
            save()
            if is_last:
                break
            _assign(parameters, live)


@torch.no_grad()
def _assign(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _told(figures: Sequence[tuple[float, ...]]) -> str:
    loss, overlap, presence = np.mean(figures, axis=0)
    return f"loss {loss:.4f}, IoU of tokens {overlap:.3f}, presence right {presence:.3f}"


def _judged(
    head: TokenMatchHead, target: Features, shown: Sequence[View], truth: Tensor
) -> tuple[Tensor, float, float]:
    """The loss of a batch, the mean overlap with the truth where the thing is, and how often presence is right."""
    references, projected = _references(head, shown), head.projected(target.correspondence)
    evidence = head.evidence(projected, target.valid, references)
    fused = head.fused(target, evidence)
    logit = head.coarse(fused)[:, 0]
    presence = head.presence(fused, projected, evidence, target.valid, references)
    is_there = (truth.amax(dim=(1, 2)) > 0.5).float()
    loss = (
        _loss(logit, truth, target.valid)
        + _evidence_loss(evidence, truth, target.valid)
        + PRESENCE_WEIGHT * F.binary_cross_entropy_with_logits(presence, is_there)
    )
    with torch.no_grad():
        found, there = logit > 0, truth > 0.5
        overlaps = (found & there).sum((1, 2)) / (found | there).sum((1, 2)).clamp(min=1)
        overlap = float((overlaps * is_there).sum() / is_there.sum().clamp(min=1))
        right = float(((presence > 0) == (is_there > 0.5)).float().mean())
    return loss, overlap, right


def main(
    out: Annotated[Path, typer.Option(help="The checkpoint to write.")],
    data: Annotated[Path, typer.Option(help="As of icm train.")],
    config: Annotated[str, typer.Option(help="As of icm train.")] = "lite",
    checkpoint: Annotated[Path | None, typer.Option(help="Start from these weights instead of random ones.")] = None,
    minutes: Annotated[float, typer.Option(min=0, help="The rate falls to 0 at their end.")] = 60.0,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    rate: Annotated[float, typer.Option(min=0)] = 1e-3,
    views: Annotated[int, typer.Option(min=1, help="Of a group.")] = 12,
    canvas_px: Annotated[int, typer.Option(min=64, help="A multiple of 32.")] = 512,
    keep: Annotated[
        Path | None, typer.Option(help="A file for the tokens: written, or read instead of making them anew.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0)] = 1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    held_out: Annotated[bool, typer.Option(help="Keep a tenth of the groups for measuring only.")] = False,
    bf16: Annotated[bool, typer.Option(help="The transformer in bfloat16.")] = False,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="As of icm train.")] = None,
) -> None:
    """Train a token-match head on tokens alone."""
    settings = read_settings(config, data, [*(overrides or ()), f"train.canvas_px={canvas_px}"])
    model = model_to_train(settings.model, checkpoint=checkpoint, weights=None, offline=True, seed=seed)
    head = model.head
    if not isinstance(head, TokenMatchHead):
        raise ConfigError(f"--config {config} has another head; learning on tokens is for the token-match head")
    model.eval().requires_grad_(False)
    model.backbone.optimise_for_inference()
    model.convolve_channels_last()
    if bf16:
        model.backbone.transformer.to(torch.bfloat16)
    pool = read_pool(settings.data, settings.train.pairs)
    shown = to_show(pool, views, seed)
    maker = SampleMaker(pool, settings.train)
    seen = kept_views(keep, views_digest(settings, shown, seed), lambda: read_views(model, maker, shown, seed, workers))
    kept: dict[Item, list[View]] = {item: [] for item in pool}
    for item, view in zip(shown, seen, strict=True):
        if view is not None:
            kept[item].append(view)
    if checkpoint is None:
        head.begin(_some_tokens([view for view in seen if view is not None], seed))
    head.requires_grad_(True)
    torch.manual_seed(seed)
    groups = sorted(pool.groups)
    apart = set(np.random.default_rng(seed).permutation(groups)[: round(HELD_OUT * len(groups))]) if held_out else set()
    learned = {item: found for item, found in kept.items() if item.group not in apart}
    tested = {item: found for item, found in kept.items() if item.group in apart} or learned
    earlier = read_trained_on(checkpoint) if checkpoint else None
    trained_on = sorted({*(earlier or ()), *map(content_digest, pool.images)})
    metadata = {TRAINED_ON_KEY: json.dumps(trained_on), "icm.training": json.dumps(settings.as_dict())}
    learn(
        head,
        Mosaics(pool, learned, seed),
        Mosaics(pool, tested, seed + 1),
        minutes=minutes,
        batch_size=batch_size,
        rate=rate,
        save=lambda: save_checkpoint(out, model, settings.model, with_backbone=False, metadata=metadata),
    )


if __name__ == "__main__":
    typer.run(main)
