"""A token-match head learns the thing of the references that it is given, before it mattes the frames of a shot.

After one-shot video object segmentation (Caelles et al., CVPR 2017): the first frame with its mask, turned, scaled and
recoloured, says what belongs to the thing when it moves, and what about it does not. The backbone stays as it is, so
each view is seen by it once, and the steps are those of a small head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.model.contracts import Backbone, Features, ReferenceFeatures
from icm_cli.model.lite.head import CARRIED, EVIDENCE_NUMBERS, TokenMatchHead
from icm_cli.model.similarity import ReferenceTokens, background_token_mask, foreground_token_mask

STEPS = 140
"""Steps of learning where nothing else is said."""
VIEWS = 16
"""Views of the references that show the thing, beside the references themselves."""
ABSENT_VIEWS = 4
"""Views of what is about the thing, without it."""
ABSENT_SHARE = 0.15
"""Share of steps whose view is one of these."""
ITSELF_SHARE = 0.7
"""Share of steps in which a reference as it is given is the reference, and not a view of one."""
RATE = 3e-4
WARMUP_STEPS = 10
CLIP_NORM = 5.0
SCALE, ANGLE, SHEAR, PLACE = 0.4, 15.0, 0.15, 0.25
"""Limits of what is done to views: logarithm of the scale, degrees, shear, distance of the thing from the borders."""
CLOSER = 0.7
"""Logarithm of the largest scale of views without the thing."""
GAIN, OFFSET = 0.2, 0.06
"""Limits of how much brighter or darker views get, the channels and the whole, and of what is added to them."""
ATTEMPTS = 100
"""Draws of a view without the thing before there is none."""
ABSENT_BELOW = 0.25
"""Most guidance of a view without the thing."""
GLANCE_PX = 16
"""Side in px of the squares at whose middles a view is first looked at for the thing."""
LEAST_ALPHA = 1e-4
"""Least distance of an alpha from 0 and 1 before its logarithm is taken."""
TERMS = ("cross_entropy", "dice", "coarse", "comparisons", "presence")
"""Names of the losses."""
SEED = 0


def finetuning_digest_text(steps: int) -> str:
    """All numbers that decide what is learned, for the digest of a run; empty for no steps."""
    numbers = (VIEWS, ABSENT_VIEWS, ABSENT_SHARE, ITSELF_SHARE, RATE, WARMUP_STEPS, CLIP_NORM, SCALE, ANGLE, SHEAR)
    more = (PLACE, CLOSER, GAIN, OFFSET, SEED)
    return f"learned {steps} {' '.join(str(each) for each in (*numbers, *more))}" if steps else ""


@dataclass(frozen=True)
class Learned:
    """References as a head prepared them that has learned them, and that head."""

    head: TokenMatchHead
    prepared: ReferenceTokens

    @property
    def notices(self) -> Sequence[str]:
        return self.prepared.notices


@dataclass(frozen=True)
class _Scene:
    """A picture on the canvas: image [1,3,H,W] sRGB 0..1, guidance float32 [1,1,H,W] 0..1, known float32 [1,1,H,W],
    0 where the guidance does not say, valid bool [1,H,W]."""

    image: Tensor
    guidance: Tensor
    known: Tensor
    valid: Tensor


@dataclass(frozen=True)
class _View:
    """A scene as the backbone sees it: a reference, by its tokens inside and outside of the guidance, bool [1,h,w]; and
    a target, by its alpha float32 [1,nh,nw] 0..1, as fine as the decoder goes, and the tokens, bool [1,h,w], where that
    is known. ``image`` [1,3,H,W] where the decoder takes it in."""

    features: Features
    inside: Tensor
    outside: Tensor
    alpha: Tensor
    known: Tensor
    image: Tensor | None


def learned(
    backbone: Backbone,
    head: TokenMatchHead,
    references: Sequence[tuple[Tensor, Tensor, Tensor]],
    steps: int,
) -> Learned:
    """A copy of a head that has learned the references in ``steps`` steps; the head itself stays as it is.

    ``references``: image [1,3,H,W] sRGB 0..1, guidance [1,1,H,W] (0 outside, 0.5 unknown, 1 inside), valid [1,H,W].
    The same references give the same head on a CPU with the same number of threads.
    """
    rng = np.random.default_rng(SEED)
    with torch.no_grad():
        scenes = [
            _Scene(image, guidance, ((guidance - 0.5).abs() > 0.25).float(), valid)
            for image, guidance, valid in references
        ]
        given = [_seen(backbone, head, each) for each in scenes]
        views = [_seen(backbone, head, _moved(scenes[i % len(scenes)], rng)) for i in range(VIEWS)]
        apart = [_apart(scenes[i % len(scenes)], rng) for i in range(ABSENT_VIEWS)]
        absent = [_seen(backbone, head, each) for each in apart if each is not None]
    pupil = copy.deepcopy(head).float().eval()
    with torch.enable_grad():
        _learn(pupil, given, views, absent, steps, rng)
    dtypes = {name: each.dtype for name, each in head.state_dict(keep_vars=True).items()}
    for name, each in pupil.state_dict(keep_vars=True).items():
        each.requires_grad_(False)
        each.data = each.data.to(dtypes[name])
    shown = [
        ReferenceFeatures(each.features, guidance, valid)
        for each, (_, guidance, valid) in zip(given, references, strict=True)
    ]
    return Learned(pupil, pupil.prepare_references(shown))


def asked(
    head: TokenMatchHead, target: Features, references: Sequence[ReferenceTokens], image: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logit of the coarse alpha [B,h,w] and of the decoder's [B,nh,nw], what each comparison carries over
    [B,comparisons,h,w] in -1..1, and the logit of whether the thing is there [B].

    ``image`` [B,3,H,W] may be left out where the decoder takes none in.
    """
    projected = head.projected(target.correspondence)
    evidence = head.evidence(projected, target.valid, references)
    fused = head.fused(target, evidence)
    presence = head.presence(fused, projected, evidence, target.valid, references)
    fine = head.decoded(fused, target, image)[:, 0]
    return head.coarse(fused)[:, 0].float(), fine, evidence[:, CARRIED::EVIDENCE_NUMBERS], presence


def losses(answer: Sequence[Tensor], fine_truth: Tensor, valid: Tensor, presence_weight: float) -> dict[str, Tensor]:
    """The losses by :data:`TERMS`, [B] each, and their sum under "total".

    ``answer`` as :func:`asked` gives it, ``fine_truth`` float32 [B,nH,nW] 0..1, ``valid`` bool [B,H,W].
    """
    coarse, logit, carried, presence = answer
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
        "presence": presence_weight * F.binary_cross_entropy_with_logits(presence, is_there, reduction="none"),
    }
    return {**terms, "total": torch.stack(list(terms.values())).sum(dim=0)}


def _entropy(logit: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Mean cross-entropy [B] over the valid cells of [B,H,W]."""
    each = F.binary_cross_entropy_with_logits(logit, truth, reduction="none")
    return (each * valid).sum(dim=(1, 2)) / valid.sum(dim=(1, 2))


def _learn(
    head: TokenMatchHead,
    given: Sequence[_View],
    views: Sequence[_View],
    absent: Sequence[_View],
    steps: int,
    rng: np.random.Generator,
) -> None:
    """Statistics of norms stay, and so does what says whether a thing is there: it is, in almost every frame."""
    head.requires_grad_(True)
    head.present.requires_grad_(False)
    weights = [each for each in head.parameters() if each.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        shown = _drawn(given if rng.random() < ITSELF_SHARE else views, rng)
        target = _drawn(absent if absent and rng.random() < ABSENT_SHARE else [*given, *views], rng)
        loss = _loss(head, shown, target)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, CLIP_NORM)
        optimiser.step()


def _loss(head: TokenMatchHead, shown: _View, target: _View) -> Tensor:
    tokens = head.projected(shown.features.correspondence)
    reference = ReferenceTokens(tokens[shown.inside.flatten(1)], tokens[shown.outside.flatten(1)])
    answer = asked(head, target.features, [reference], target.image)
    return losses(answer, target.alpha, target.known, presence_weight=0.0)["total"].mean()


def _drawn(views: Sequence[_View], rng: np.random.Generator) -> _View:
    return views[int(rng.integers(len(views)))]


def _seen(backbone: Backbone, head: TokenMatchHead, scene: _Scene) -> _View:
    features = backbone.target_features(scene.image, scene.valid, [""])
    token = scene.image.shape[-1] // features.correspondence.shape[-1]
    known = features.valid & (F.avg_pool2d(scene.known, token)[:, 0] > 0.5)
    levels = scene.guidance * scene.known + 0.5 * (1.0 - scene.known)
    decoder = head.config.decoder_channels
    takes_image = len(decoder) > len(head.config.skip_channels)
    return _View(
        Features(
            features.correspondence,
            features.valid,
            {each: scale.float() for each, scale in features.scales.items()},
            {},
        ),
        foreground_token_mask(levels, scene.valid, token)[0],
        background_token_mask(levels, scene.valid, token),
        F.avg_pool2d(scene.guidance, token >> len(decoder))[:, 0],
        known if bool(known.any()) else features.valid,
        scene.image if takes_image else None,
    )


def _moved(given: _Scene, rng: np.random.Generator) -> _Scene:
    """A reference whose thing lies, leans and is lit in another way; at its borders the picture is mirrored."""
    scale = math.exp(rng.uniform(-SCALE, SCALE))
    width_height = _size(given)
    change = _Change.drawn(scale, _middle(given), width_height * rng.uniform(PLACE, 1.0 - PLACE, 2), rng)
    return _changed(given, change)


def _apart(given: _Scene, rng: np.random.Generator) -> _Scene | None:
    """A piece of a reference without its thing, enlarged; None where there is none."""
    width_height = _size(given)
    for _ in range(ATTEMPTS):
        change = _Change.drawn(
            math.exp(rng.uniform(0.0, CLOSER)), width_height * rng.uniform(0.0, 1.0, 2), width_height / 2, rng
        )
        if float(_sampled(given, [given.guidance], change.grid(given, GLANCE_PX)).max()) >= ABSENT_BELOW:
            continue
        found = _changed(given, change)
        if float(found.guidance.max()) < ABSENT_BELOW:
            return found
    return None


@dataclass(frozen=True)
class _Change:
    """Scale, turn, shear and perhaps mirroring of a view, ``turn`` [2,2], about a point ``at`` (x, y) of the reference,
    which comes to lie at ``to``; colours are multiplied by ``gain`` [3,1,1], then ``offset`` is added."""

    turn: np.ndarray
    at: np.ndarray
    to: np.ndarray
    gain: np.ndarray
    offset: float

    @classmethod
    def drawn(cls, scale: float, at: np.ndarray, to: np.ndarray, rng: np.random.Generator) -> _Change:
        angle, flip = math.radians(rng.uniform(-ANGLE, ANGLE)), rng.choice([-1.0, 1.0])
        cos, sin, shear = math.cos(angle), math.sin(angle), rng.uniform(-SHEAR, SHEAR)
        turn = np.array([[scale * flip * cos, shear - scale * sin], [scale * flip * sin, scale * cos]])
        gain = rng.uniform(1.0 - GAIN, 1.0 + GAIN, (3, 1, 1)) * rng.uniform(1.0 - GAIN, 1.0 + GAIN)
        return cls(turn, at, to, gain, float(rng.uniform(-OFFSET, OFFSET)))

    def grid(self, given: _Scene, px: int = 1) -> Tensor:
        """Places in the reference of the squares of ``px`` of the view, [1,h,w,2], as ``F.grid_sample`` takes them."""
        there = np.eye(3)
        there[:2, :2], there[:2, 2] = self.turn, self.to - self.turn @ self.at
        width, height = (int(each) for each in _size(given))
        pixels = [[2.0 / width, 0.0, 1.0 / width - 1.0], [0.0, 2.0 / height, 1.0 / height - 1.0], [0.0, 0.0, 1.0]]
        back = (np.array(pixels) @ np.linalg.inv(there) @ np.linalg.inv(np.array(pixels)))[:2]
        back = torch.from_numpy(back[None]).float().to(given.image.device)
        return F.affine_grid(back, [1, 1, -(-height // px), -(-width // px)], align_corners=False)


def _changed(given: _Scene, change: _Change) -> _Scene:
    """The view that a change makes of a reference."""
    layers = _sampled(given, [given.image, given.guidance, given.known], change.grid(given))
    below, beside = (given.image.shape[-2:][n] - layers.shape[-2:][n] for n in (0, 1))
    layers = F.pad(layers, (0, beside, 0, below), mode="replicate")
    image = (layers[:, :3] * torch.from_numpy(change.gain).float().to(layers.device) + change.offset).clamp(0.0, 1.0)
    return _Scene(image, layers[:, 3:4] * given.valid[:, None], layers[:, 4:], given.valid)


def _sampled(given: _Scene, layers: Sequence[Tensor], grid: Tensor) -> Tensor:
    """Layers [1,C,H,W] of a reference at the places of a grid, [1,C,h,w]; the picture is mirrored at its borders."""
    width, height = (int(each) for each in _size(given))
    frame = torch.cat(list(layers), dim=1)[..., :height, :width]
    return F.grid_sample(frame, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _size(scene: _Scene) -> np.ndarray:
    """Width and height of the frame on its canvas."""
    valid = scene.valid[0]
    return np.array([float(valid[0].sum()), float(valid[:, 0].sum())])


def _middle(scene: _Scene) -> np.ndarray:
    """The middle (x, y) of the thing."""
    rows, columns = torch.nonzero(scene.guidance[0, 0] > 0.75, as_tuple=True)
    return np.array([float(columns.float().mean()), float(rows.float().mean())])
