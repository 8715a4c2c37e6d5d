"""Learning edges: the refining network, on pictures with a mask or alpha and coarse alphas made from it.

    python -m icm_cli.training.refining --data configs/data/refine.yaml --out refiner.safetensors --minutes 60

It needs no pairs: every picture with a mask or an alpha trains it. Alphas of composites are exact, and all of them
counts; outlines drawn by hand say where the edge is but not how soft it is, so there their band counts little.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
import torch.nn.functional as F
import typer
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from icm_cli.errors import ImageError
from icm_cli.geometry import Float, ImageU8
from icm_cli.model.edges.refine import Refine, RefineConfig
from icm_cli.training.items import Item, Pool, read_pool
from icm_cli.training.losses import laplacian
from icm_cli.training.samples import start_worker
from icm_cli.training.scenes import Scene, SceneMaker
from icm_cli.training.settings import AugmentConfig, PairConfig, read_settings
from icm_cli.training.spoiling import by_outline, by_tokens

SCENE_PX = 448
CROP_PX = 224
CROPS = 2
"""Crops of a scene."""
TOKEN_SHARE = 0.6
"""Coarse alphas as a first stage gives them; the others are outlines that are nearly right."""
BAND_WEIGHT = 0.3
"""Of pixels in the band of an outline drawn by hand."""
OWN_PICTURE_SHARE = 0.5
"""Of things with a soft alpha: the photograph itself rather than a composite."""
HELD_OUT = 20
"""One item of so many is kept for measuring."""


@dataclass(frozen=True)
class EdgeSample:
    """rgb uint8 [CROPS,S,S,3]; coarse, truth, weight float16 [CROPS,S,S]."""

    rgb: ImageU8
    coarse: NDArray[np.float16]
    truth: NDArray[np.float16]
    weight: NDArray[np.float16]


class EdgeMaker(Dataset[EdgeSample]):
    """Makes sample number ``counter`` of a seed: crops of a scene with a coarse alpha beside the true one."""

    def __init__(self, pool: Pool, augment: AugmentConfig, seed: int, *, held_out: bool = False) -> None:
        self.pool, self.seed, self.held_out = pool, seed, held_out
        self._scenes = SceneMaker(SCENE_PX, augment)
        self._kept = {item for number, item in enumerate(pool) if (number % HELD_OUT == 0) == held_out}

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, counter: int) -> EdgeSample:
        for attempt in range(100):
            rng = np.random.default_rng((self.seed, counter, attempt, int(self.held_out)))
            item = self.pool.draw(rng)
            if item not in self._kept:
                continue
            try:
                scene, is_exact = self._scene(item, rng)
            except ImageError:
                continue
            return self._sample(self._scenes.finished(scene, rng), rng, is_exact=is_exact)
        raise RuntimeError("no item can be read")

    def _scene(self, item: Item, rng: np.random.Generator) -> tuple[Scene, bool]:
        """A scene, and whether its alpha is exact."""
        by_hand = item.soften_px > 0
        if by_hand or (not item.is_foreground and rng.random() < OWN_PICTURE_SHARE):
            return self._scenes.photograph(item, rng), False
        others = [each for each in (self.pool.draw(rng) for _ in range(8)) if not each.is_foreground]
        if others and rng.random() < 0.7:
            behind = self._scenes.photograph(others[0], rng)
            behind = Scene(behind.rgb, np.zeros_like(behind.alpha), np.ones_like(behind.valid))
        else:
            behind = self._scenes.backdrop(self.pool.backgrounds[rng.integers(len(self.pool.backgrounds))], rng)
        return self._scenes.composite(item, behind, rng), True

    def _sample(self, scene: Scene, rng: np.random.Generator, *, is_exact: bool) -> EdgeSample:
        truth = scene.alpha.astype(np.float32) / 255.0
        spoil = by_tokens if rng.random() < TOKEN_SHARE else by_outline
        coarse = spoil(truth, rng)
        weight = scene.valid.astype(np.float32)
        if not is_exact:
            band = ((truth > 0.1) & (truth < 0.9)).astype(np.uint8)
            weight[cv2.dilate(band, np.ones((3, 3), np.uint8)) > 0] *= BAND_WEIGHT
        boxes = [_box(truth, coarse, rng) for _ in range(CROPS)]
        half = [np.stack([layer[box] for box in boxes]).astype(np.float16) for layer in (coarse, truth, weight)]
        return EdgeSample(np.stack([scene.rgb[box] for box in boxes]), half[0], half[1], half[2])


def _box(truth: Float, coarse: Float, rng: np.random.Generator) -> tuple[slice, slice]:
    """A square that mostly lies about an edge, or about what the coarse alpha has wrong."""
    interesting = (truth > 0.05) & (truth < 0.95) if rng.random() < 0.6 else np.abs(truth - coarse) > 0.2
    found: NDArray[np.intp] = np.flatnonzero(interesting)
    spare = SCENE_PX - CROP_PX
    if len(found) and rng.random() < 0.85:
        row, column = divmod(int(found[rng.integers(len(found))]), SCENE_PX)
        top, left = (int(np.clip(at - rng.integers(CROP_PX // 4, 3 * CROP_PX // 4), 0, spare)) for at in (row, column))
    else:
        top, left = (int(rng.integers(spare + 1)) for _ in range(2))
    return slice(top, top + CROP_PX), slice(left, left + CROP_PX)


def refining_loss(logit: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """L1, cross-entropy, gradient and Laplacian of alphas [B,1,S,S], one number."""
    alpha = torch.sigmoid(logit)
    size = weight.mean().clamp(min=1e-3)
    l1 = ((alpha - truth).abs() * weight).mean() / size
    entropy = (F.binary_cross_entropy_with_logits(logit, truth, reduction="none") * weight).mean() / size
    steps = [
        ((alpha.diff(dim=axis) - truth.diff(dim=axis)).abs() * weight.narrow(axis, 1, weight.shape[axis] - 1)).mean()
        for axis in (2, 3)
    ]
    blended = truth + (alpha - truth) * weight
    return l1 + 0.3 * entropy + 2.0 * (steps[0] + steps[1]) / size + 0.05 * laplacian(blended, truth, truth).mean()


def _tensors(samples: list[EdgeSample]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rgb = torch.from_numpy(np.concatenate([each.rgb for each in samples]))
    layers = (
        torch.from_numpy(np.concatenate([getattr(each, name) for each in samples]))[:, None]
        for name in ("coarse", "truth", "weight")
    )
    coarse, truth, weight = layers
    return rgb, coarse, truth, weight


def _loader(maker: EdgeMaker, first: int, scenes: int, workers: int) -> DataLoader[EdgeSample]:
    return DataLoader(
        maker,
        batch_size=scenes,
        sampler=range(first * scenes, 1 << 40),
        collate_fn=_tensors,
        num_workers=workers,
        worker_init_fn=start_worker if workers else None,
        multiprocessing_context="spawn" if workers else None,
        prefetch_factor=6 if workers else None,
    )


@torch.no_grad()
def measure(refiner: Refine, batches: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> dict[str, float]:
    """Weighted MSE and gradient error of coarse and of refined alphas, times 1000."""
    refiner.eval()
    sums = np.zeros(5)
    for rgb, coarse, truth, weight in batches:
        image = rgb.permute(0, 3, 1, 2).float() / 255.0
        with torch.autocast("cpu", torch.bfloat16):
            refined = torch.sigmoid(refiner(image, coarse))
        for at, alpha in enumerate((coarse.float(), refined.float())):
            error = (alpha - truth.float()) * weight.float()
            sums[2 * at] += float(error.square().sum())
            sums[2 * at + 1] += float(error.diff(dim=2).abs().sum() + error.diff(dim=3).abs().sum())
        sums[4] += float(weight.float().sum())
    refiner.train()
    names = ("coarse_mse", "coarse_gradient", "mse", "gradient")
    return {name: 1000.0 * value / sums[4] for name, value in zip(names, sums[:4], strict=True)}


def main(
    out: Annotated[Path, typer.Option(help="The weights to write.")],
    data: Annotated[Path, typer.Option(help="As of icm train.")],
    minutes: Annotated[float, typer.Option(min=0, help="The rate falls to 0 at their end.")] = 60.0,
    start: Annotated[Path | None, typer.Option(help="Weights to begin with.")] = None,
    rate: Annotated[float, typer.Option(min=0)] = 2e-3,
    scenes: Annotated[int, typer.Option(min=1, help="Of a step; two crops of each.")] = 3,
    workers: Annotated[int, typer.Option(min=0)] = 1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train the refining network."""
    settings = read_settings("lite", data)
    pool = read_pool(settings.data, PairConfig())
    torch.manual_seed(seed)
    refiner = Refine(RefineConfig()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if start is not None:
        refiner.load_state_dict(load_file(start))
    optimiser = torch.optim.AdamW(refiner.parameters(), lr=rate, weight_decay=1e-2)
    mean = {name: value.detach().clone() for name, value in refiner.state_dict().items()}
    held = EdgeMaker(pool, AugmentConfig(), seed, held_out=True)
    test = [_tensors([held[4 * n + i] for i in range(4)]) for n in range(12)]
    maker = EdgeMaker(pool, AugmentConfig(), seed)
    began, losses = time.monotonic(), []
    for step, (rgb, coarse, truth, weight) in enumerate(_loader(maker, 0, scenes, workers), start=1):
        elapsed = (time.monotonic() - began) / (60.0 * minutes)
        factor = min(1.0, step / 200) * 0.5 * (1 + np.cos(np.pi * min(1.0, elapsed)))
        for group in optimiser.param_groups:
            group["lr"] = rate * factor
        image = (rgb.permute(0, 3, 1, 2).float() / 255.0).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logit = refiner(image, coarse)
        loss = refining_loss(logit, truth.float(), weight.float())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(refiner.parameters(), 2.0)
        optimiser.step()
        losses.append(loss.item())
        with torch.no_grad():
            decay = min(0.998, step / (step + 10))
            for name, value in refiner.state_dict().items():
                if value.dtype.is_floating_point:
                    mean[name].lerp_(value, 1 - decay)
        if step % 50 == 0:
            speed = step / (time.monotonic() - began)
            print(f"[{step}] {elapsed:.3f} loss {np.mean(losses[-50:]):.4f}, {speed:.2f} steps/s", flush=True)
        if step % 400 == 0 or elapsed >= 1.0:
            live = {name: value.clone() for name, value in refiner.state_dict().items()}
            refiner.load_state_dict(mean)
            print(" ".join(f"{name} {value:.3f}" for name, value in measure(refiner, test).items()), flush=True)
            save_file({name: value.contiguous() for name, value in mean.items()}, out)
            refiner.load_state_dict(live)
        if elapsed >= 1.0:
            break


if __name__ == "__main__":
    typer.run(main)
