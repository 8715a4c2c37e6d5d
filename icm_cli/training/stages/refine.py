"""The stage "refine": edges are learned from pictures with a mask or alpha, and coarse alphas made from it.

It needs no pairs: every picture with a mask or an alpha trains it. Alphas of composites are exact, and every pixel of
them counts; outlines drawn by hand say where the edge is but not how soft it is, so there their band counts little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from icm_cli.errors import ConfigError, ImageError, TrainingError
from icm_cli.geometry import Float, ImageU8, alpha_to_u8
from icm_cli.model.core import InContextMatting
from icm_cli.model.lite.refiner import RefineConfig as EdgesConfig
from icm_cli.training.batches import Batch, StepSampler, load_batches
from icm_cli.training.data.pool import Item, Pool
from icm_cli.training.data.samples import MOST_ATTEMPTS
from icm_cli.training.data.scenes import Scene, SceneMaker
from icm_cli.training.data.spoiling import by_objects, by_outline, by_tokens, with_doubted_parts
from icm_cli.training.losses import laplacian
from icm_cli.training.panels import MOST_ROWS, grey, table
from icm_cli.training.settings import REFINE_TERMS, RefineConfig, Settings, TrainConfig
from icm_cli.training.stages.contract import Answer, Stage

if TYPE_CHECKING:
    from icm_cli.training.learner import Learner

OTHER_PHOTOGRAPH_SHARE = 0.7
"""Share of composites on another item's photograph; the others lie on a background."""
AT_EDGE_SHARE = 0.85
"""Share of crops about an edge or an error of the coarse alpha; the others lie anywhere."""
BAND = (0.1, 0.9)
"""Alphas between these belong to the band of an edge."""
AGAIN = 0xA6A1
"""Tells the generator that draws between first and second looks from others of the same seed and sample."""
OPEN = 0.05
"""Pixels whose coarse or true alpha is further than this from 0 and 1, or whose two differ by more, are the ones to be
decided."""


@dataclass(frozen=True)
class EdgeSample:
    """Crops of one scene: rgb uint8 [n,S,S,3]; coarse, truth and weight float16 [n,S,S]."""

    name: str
    counter: int
    skipped: tuple[str, ...]
    rgb: ImageU8
    coarse: NDArray[np.float16]
    truth: NDArray[np.float16]
    weight: NDArray[np.float16]


@dataclass(frozen=True)
class EdgeBatch(Batch):
    """Crops of scenes: rgb uint8 [B,n,S,S,3]; coarse and true alpha and weight float16 [B,n,S,S]."""

    rgb: Tensor
    coarse: Tensor
    truth: Tensor
    weight: Tensor


class EdgeMaker(Dataset["EdgeSample | str"]):
    """Makes sample number ``counter``: the same for every run, process and worker of a seed; a str says why not."""

    def __init__(self, pool: Pool, config: TrainConfig) -> None:
        self.pool = pool
        self.config = config
        self._scenes = SceneMaker(config.canvas_px, config.augment)

    def __getitem__(self, counter: int) -> EdgeSample | str:
        skipped: list[str] = []
        for attempt in range(MOST_ATTEMPTS):
            rng = np.random.default_rng((self.config.seed, counter, attempt))
            try:
                item = self.pool.draw(rng)
                scene, is_exact = self._scene(item, rng)
            except ImageError as error:
                skipped.append(str(error))
                continue
            return self._sample(item.name, counter, tuple(skipped), self._scenes.finished(scene, rng), rng, is_exact)
        return (
            f"sample {counter} could not be made in {MOST_ATTEMPTS} draws, the last because {skipped[-1]}; mend the "
            "data, or leave files out with 'exclude'"
        )

    def _scene(self, item: Item, rng: np.random.Generator) -> tuple[Scene, bool]:
        """A scene, and whether its alpha is exact."""
        as_it_is = rng.random() < self.config.refine.photograph_share
        backgrounds = self.pool.backgrounds
        if item.is_binary or (as_it_is and not item.is_foreground) or not (backgrounds or item.is_foreground):
            return self._scenes.photograph(item, rng), False
        others = [each for each in (self.pool.draw(rng) for _ in range(8)) if not each.is_foreground]
        if others and (rng.random() < OTHER_PHOTOGRAPH_SHARE or not backgrounds):
            behind = self._scenes.photograph(others[0], rng)
            behind = Scene(behind.rgb, np.zeros_like(behind.alpha), np.ones_like(behind.valid))
        else:
            behind = self._scenes.backdrop(backgrounds[rng.integers(len(backgrounds))], rng)
        return self._scenes.composite(item, behind, rng), True

    def _sample(
        self,
        name: str,
        counter: int,
        skipped: tuple[str, ...],
        scene: Scene,
        rng: np.random.Generator,
        is_exact: bool,
    ) -> EdgeSample:
        config = self.config.refine
        truth = scene.alpha.astype(np.float32) / 255.0
        if scene.coarse is not None and rng.random() < config.made_share:
            coarse = scene.coarse.astype(np.float32) / 255.0
        else:
            coarse = _spoiling(config, rng)(truth, rng)
        if rng.random() < config.doubt_share:
            coarse = with_doubted_parts(coarse, scene.rgb, truth, rng)
        weight = scene.valid.astype(np.float32)
        if not is_exact:
            band = ((truth > BAND[0]) & (truth < BAND[1])).astype(np.uint8)
            weight[cv2.dilate(band, np.ones((3, 3), np.uint8)) > 0] *= config.band_weight
        boxes = [_box(truth, coarse, config.crop_px, rng) for _ in range(config.crops)]
        half = [np.stack([layer[box] for box in boxes]).astype(np.float16) for layer in (coarse, truth, weight)]
        return EdgeSample(
            name, counter, skipped, np.stack([scene.rgb[box] for box in boxes]), half[0], half[1], half[2]
        )


class RefineStage(Stage[EdgeBatch]):
    """A picture and a coarse alpha in, the alpha with its edges out."""

    learns = ("edges",)
    terms = REFINE_TERMS

    def __init__(self, settings: Settings, pool: Pool) -> None:
        super().__init__(settings, pool)
        self.maker = EdgeMaker(pool, settings.train)

    def module(self, model: InContextMatting) -> nn.Module:
        if model.edges is None:
            raise ConfigError("train: stage is refine, and the model has no edges to learn; add a section 'edges'")
        if not model.edges.is_trained:
            raise ConfigError("train: stage is refine, and the model's edges have nothing to learn; name: refine has")
        return model.edges

    def batches(self, sampler: StepSampler, *, workers: int, pin: bool) -> Iterator[EdgeBatch]:
        return load_batches(self.maker, sampler, collated, workers=workers, pin=pin)

    def answer(self, forward: nn.Module, batch: EdgeBatch) -> Answer:
        """The logit of the alpha, [B,n,S,S] float32: that of a first look, or in a share of the batches of a second one
        at the first one's answer."""
        image = batch.rgb.flatten(0, 1).permute(0, 3, 1, 2).float() / 255.0
        image = image.contiguous(memory_format=torch.channels_last)
        coarse = batch.coarse.flatten(0, 1)[:, None].float()
        rng = np.random.default_rng((self.settings.train.seed, batch.counters[0], AGAIN))
        if rng.random() < self.settings.train.refine.again_share:
            with torch.no_grad():
                first = torch.sigmoid(forward(image, coarse))
            logit = self._second_look(forward, image, first)
        else:
            logit = forward(image, coarse)
        return (logit[:, 0].float().reshape(batch.coarse.shape),)

    def _second_look(self, forward: nn.Module, image: Tensor, alpha: Tensor) -> Tensor:
        """The logit [N,1,S,S] of a second look at pictures [N,3,S,S] and the first one's alpha [N,1,S,S], both enlarged
        as in use."""
        part = self.settings.model.edges
        assert part is not None
        assert isinstance(part.settings, EdgesConfig)
        config = part.settings
        side = image.shape[-1]
        grown = round(config.again * side / config.multiple) * config.multiple
        if grown == side:
            return forward(image, alpha)
        image = F.interpolate(image, (grown, grown), mode="bicubic").clamp(0.0, 1.0)
        logit = forward(image, F.interpolate(alpha, (grown, grown), mode="bilinear"))
        return F.interpolate(logit, (side, side), mode="bilinear", antialias=True)

    def losses(self, answer: Answer, batch: EdgeBatch) -> dict[str, Tensor]:
        logit, truth, coarse = answer[0], batch.truth.float(), batch.coarse.float()
        config = self.settings.train.refine
        is_soft = torch.minimum((coarse - 0.5).abs(), (truth - 0.5).abs()) < 0.5 - OPEN
        open_ = is_soft | ((coarse - truth).abs() > OPEN)
        weight = batch.weight.float() * (1.0 + (config.open_weight - 1.0) * open_)
        alpha = torch.sigmoid(logit)
        size = weight.mean(dim=(1, 2, 3)).clamp(min=1e-3)
        entropy = F.binary_cross_entropy_with_logits(logit, truth, reduction="none")
        steps = torch.stack([_steps(alpha - truth, weight, axis) for axis in (2, 3)]).sum(dim=0)
        # A pyramid has no weights; where a pixel counts less, its error is made less.
        blended = (truth + (alpha - truth) * batch.weight.float()).flatten(0, 1)[:, None]
        pyramid = laplacian(blended, truth.flatten(0, 1)[:, None], blended).reshape(truth.shape[:2]).mean(dim=1)
        values = {
            "l1": ((alpha - truth).abs() * weight).mean(dim=(1, 2, 3)) / size,
            "cross_entropy": (entropy * weight).mean(dim=(1, 2, 3)) / size,
            "gradient": steps / size,
            "laplacian": pyramid,
        }
        terms = {name: getattr(config, name) * value for name, value in values.items() if getattr(config, name)}
        return {**terms, "total": torch.stack(list(terms.values())).sum(dim=0)}

    @torch.no_grad()
    def panel(self, learner: Learner, batch: EdgeBatch) -> ImageU8:
        """For the first crop of each scene: picture, coarse alpha, true alpha, and the refined one."""
        few = batch.first(MOST_ROWS)
        (logit,) = self.answer(self.module(learner.model), few)
        layers = (few.coarse, few.truth, torch.sigmoid(logit))
        return table(
            [
                [
                    few.rgb[i, 0].cpu().numpy(),
                    *(grey(alpha_to_u8(layer[i, 0].float().cpu().numpy())) for layer in layers),
                ]
                for i in range(len(few.names))
            ]
        )

    def preview(self, counter: int) -> tuple[str, list[ImageU8]]:
        """The first crop of a scene: picture, coarse and true alpha, and what of it counts."""
        sample = self.maker[counter]
        if isinstance(sample, str):
            raise TrainingError(sample)
        layers = (sample.coarse, sample.truth, sample.weight)
        return sample.name, [sample.rgb[0], *(grey(alpha_to_u8(layer[0].astype(np.float32))) for layer in layers)]


def collated(samples: list[EdgeSample | str]) -> EdgeBatch | str:
    """Join samples, or say why one of them could not be made."""
    if failure := next((each for each in samples if isinstance(each, str)), None):
        return failure
    made = [each for each in samples if isinstance(each, EdgeSample)]
    rgb, coarse, truth, weight = (
        torch.from_numpy(np.stack([getattr(each, name) for each in made]))
        for name in ("rgb", "coarse", "truth", "weight")
    )
    return EdgeBatch(
        tuple(each.name for each in made),
        tuple(each.counter for each in made),
        tuple(reason for each in made for reason in each.skipped),
        rgb,
        coarse,
        truth,
        weight,
    )


def _spoiling(config: RefineConfig, rng: np.random.Generator) -> Callable[[Float, np.random.Generator], Float]:
    """Draw one of the ways to make a coarse alpha of a true one, by their shares."""
    drawn = rng.random()
    if drawn < config.token_share:
        return by_tokens
    return by_objects if drawn < config.token_share + config.object_share else by_outline


def _box(truth: Float, coarse: Float, crop_px: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """A square that mostly lies about an edge, or about what the coarse alpha has wrong."""
    interesting = (truth > 0.05) & (truth < 0.95) if rng.random() < 0.6 else np.abs(truth - coarse) > 0.2
    found: Sequence[int] = np.flatnonzero(interesting).tolist()
    side = len(truth)
    spare = side - crop_px
    if len(found) and rng.random() < AT_EDGE_SHARE:
        at = divmod(found[int(rng.integers(len(found)))], side)
        top, left = (int(np.clip(each - rng.integers(crop_px // 4, 3 * crop_px // 4), 0, spare)) for each in at)
    else:
        top, left = (int(rng.integers(spare + 1)) for _ in range(2))
    return slice(top, top + crop_px), slice(left, left + crop_px)


def _steps(error: Tensor, weight: Tensor, axis: int) -> Tensor:
    """Weighted mean L1 [B] between neighbours' differences, of an error [B,n,S,S] along an axis."""
    count = error.shape[axis] - 1
    return (error.diff(dim=axis).abs() * weight.narrow(axis, 1, count)).mean(dim=(1, 2, 3))


STAGE = RefineStage
