"""Fine-tuning of a head on the references of a run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_HEAD, Icm, model_choice
from torch import Tensor, nn

from icm_cli.errors import UsageError
from icm_cli.geometry import CanvasRule
from icm_cli.matting.model_choice import ModelChoice
from icm_cli.matting.predictor import check_learn_steps
from icm_cli.model.contracts import Features, LearnedReferences
from icm_cli.model.core import InContextMatting
from icm_cli.model.lite.finetuning import DEFAULT_STEPS, FINETUNING
from icm_cli.model.lite.head import TokenMatchConfig, TokenMatchHead
from icm_cli.model.similarity import SelfSimilarity, valid_token_mask
from icm_cli.model.training_free.head import TrainingFree

HEIGHT, WIDTH = 96, 128
PADDED = 128


class Colours(nn.Module):
    """A backbone whose tokens of 16 px are mean colours and their squares; it counts the images."""

    is_trainable = False
    has_attention_matrix = False
    canvas = CanvasRule(PADDED, 16, 2.0)

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def target_features(self, image: Tensor, valid: Tensor, noise: Sequence[str]) -> Features:
        assert len(image) == len(noise)
        self.seen += len(image)
        both = torch.cat([image, image.square()], dim=1)
        alive = valid_token_mask(valid, 16)
        feature = F.avg_pool2d(both, 16)
        return Features(feature, alive, {8: F.avg_pool2d(both, 8)}, {16: SelfSimilarity(feature, alive, 0.1)})

    reference_features = target_features


def scene(shift: int = 0, *, unknown: bool = False, decoy: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return a reference: a red and blue object on green, next to a blue object; 96 of 128 rows are
    the frame."""
    rng = torch.Generator().manual_seed(shift)
    image = torch.zeros(1, 3, PADDED, WIDTH)
    image[:, 1] = 0.5
    if decoy:
        image[:, :, 8:40, 80:112] = torch.tensor([0.1, 0.1, 0.9])[:, None, None]
    image[:, :, 48:80, 16 + shift : 48 + shift] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    image[:, :, 48:80, 48 + shift : 80 + shift] = torch.tensor([0.2, 0.2, 0.8])[:, None, None]
    image = (image + 0.02 * torch.randn(image.shape, generator=rng)).clamp(0, 1)
    guidance = torch.zeros(1, 1, PADDED, WIDTH)
    guidance[:, :, 48:80, 16 + shift : 80 + shift] = 1.0
    if unknown:
        guidance[:, :, 48:80, 48 + shift : 80 + shift] = 0.5
    valid = torch.zeros(1, PADDED, WIDTH, dtype=torch.bool)
    valid[:, :HEIGHT] = True
    return image, guidance, valid


@pytest.fixture
def head() -> TokenMatchHead:
    torch.manual_seed(0)
    return TokenMatchHead(TokenMatchConfig(**TINY_HEAD)).eval()


def error(model: InContextMatting, prepared: object, shift: int) -> float:
    """Return the mean absolute error of the alpha of a shifted scene."""
    image, guidance, valid = scene(shift)
    found = model.infer(image, valid, prepared).alpha[:, :, :HEIGHT]  # type: ignore[arg-type]
    return float((found - guidance[:, :, :HEIGHT]).abs().mean())


def test_moving_object_is_learned(head: TokenMatchHead) -> None:
    model = InContextMatting(Colours(), head)  # type: ignore[arg-type]
    before = copy.deepcopy(head.state_dict())
    plain, tuned = (model.prepare_references([scene()], learn_steps=steps) for steps in (0, 150))
    assert isinstance(tuned, LearnedReferences)
    assert error(model, tuned, 24) < 0.5 * error(model, plain, 24)
    assert all(torch.equal(each, before[name]) for name, each in head.state_dict().items())
    present = tuned.head.presence_mlp.state_dict()
    assert all(torch.equal(each, before[f"presence_mlp.{name}"]) for name, each in present.items())
    assert not any(each.requires_grad for each in tuned.head.parameters())


def test_backbone_processes_every_view_once(head: TokenMatchHead) -> None:
    backbone = Colours()
    head.learn_references(backbone, [scene(), scene(8)], 3)  # type: ignore[arg-type]
    assert FINETUNING.views + 2 < backbone.seen <= FINETUNING.views + FINETUNING.negative_views + 2


def test_same_references_give_the_same_head(head: TokenMatchHead) -> None:
    first, again, other = (
        head.learn_references(Colours(), [scene(shift)], 4).head.state_dict()  # type: ignore[arg-type]
        for shift in (0, 0, 8)
    )
    assert all(torch.equal(each, again[name]) for name, each in first.items())
    assert any(not torch.equal(each, other[name]) for name, each in first.items())


def test_unknown_pixels_are_not_learned(head: TokenMatchHead) -> None:
    """A blue half that is unknown is not learned as background."""
    backbone = Colours()
    image, _, valid = scene(24, decoy=False)

    def blue(shown: tuple[Tensor, Tensor, Tensor]) -> float:
        tuned = head.learn_references(backbone, [shown], 150)  # type: ignore[arg-type]
        fine = tuned.head.predict_match(backbone.target_features(image, valid, [""]), [tuned.prepared], None).fine_logit  # type: ignore[attr-defined]
        return float(torch.sigmoid(fine[:, 7:9, 10:12]).mean())

    assert blue(scene(unknown=True, decoy=False)) > blue(_without_blue()) + 0.1


def _without_blue() -> tuple[Tensor, Tensor, Tensor]:
    image, guidance, valid = scene(unknown=True, decoy=False)
    return image, (guidance > 0.75).float(), valid


def test_half_precision_is_restored(head: TokenMatchHead) -> None:
    """Fine-tuning runs in float32 whatever the dtype of the head."""
    model = InContextMatting(Colours(), head)  # type: ignore[arg-type]
    for module in head.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.to(torch.bfloat16)
    tuned = model.prepare_references([scene()], learn_steps=2)
    assert isinstance(tuned, LearnedReferences)
    types = {name: each.dtype for name, each in head.state_dict().items()}
    assert {name: each.dtype for name, each in tuned.head.state_dict().items()} == types
    assert error(model, tuned, 0) < 1.0


def test_object_that_fills_the_image_has_no_views_without_it(head: TokenMatchHead) -> None:
    image, guidance, valid = scene()
    full = (image, torch.ones_like(guidance) * valid[:, None], valid)
    backbone = Colours()
    assert head.learn_references(backbone, [full], 2).prepared.background.shape[0] == 0  # type: ignore[arg-type]
    assert backbone.seen == FINETUNING.views + 1


@pytest.mark.parametrize(
    ("steps", "shot", "expected"), [(None, True, DEFAULT_STEPS), (None, False, 0), (7, False, 7), (0, True, 0)]
)
def test_default_steps_of_a_shot(steps: int | None, shot: bool, expected: int) -> None:
    assert _choice("lite").resolve_learn_steps(steps, is_shot=shot) == expected


def test_head_without_weights_cannot_learn() -> None:
    choice = _choice("lite-training-free")
    assert choice.resolve_learn_steps(None, is_shot=True) == 0
    with pytest.raises(UsageError, match="the head of this model cannot learn references"):
        choice.resolve_learn_steps(5, is_shot=False)
    with pytest.raises(UsageError, match="--learn-steps is -1; expected a whole number from 0 to 100000"):
        check_learn_steps(-1, TrainingFree)


def _choice(model: str) -> ModelChoice:
    return model_choice(model, "auto")


def test_several_devices_cannot_learn(icm: Icm, scene: Path) -> None:
    del scene
    done = icm(device="cpu,cpu", learn_steps=2)
    assert done.exit_code == 2
    assert done.stderr.strip() == (
        "icm: --learn-steps works on one device, and several were given; give one --device, or "
        "divide the images with --shard"
    )


@pytest.mark.slow
def test_alphas_with_other_steps_are_recomputed(icm: Icm, scene: Path) -> None:
    """Uses the model of the package, whose alpha of the second half of the object changes by
    fine-tuning."""
    out = scene / "out"

    def run(steps: int) -> tuple[str, dict[Path, bytes]]:
        done = icm(model="lite", learn_steps=steps)
        assert done.exit_code == 0, done.output
        return done.stderr, {path: path.read_bytes() for path in out.rglob("*.png")}

    (plain_text, plain), (text, tuned), (kept_text, kept) = run(0), run(3), run(3)
    assert "learning" not in plain_text
    assert "learning the references in 3 steps; --learn-steps 0 omits this" in text
    assert all(tuned[path] != plain[path] for path in plain)
    assert "learning" not in kept_text  # nothing is left to matte
    assert kept == tuned


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            "memory ran out on cpu, float32 while the references were learned",
        ),
        (
            RuntimeError("CUDA error: an illegal memory access"),
            "device cpu was lost: CUDA error: an illegal memory access",
        ),
    ],
)
def test_device_errors_while_learning_are_reported(
    icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("icm_cli.model.lite.head.TokenMatchHead.learn_references", fail)
    done = icm(model="lite", dtype="float32", learn_steps=3)
    assert done.exit_code == 3
    assert said in done.stderr
    assert not list((scene / "out").rglob("*.png"))
