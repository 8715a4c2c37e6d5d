"""The efficientnet-lite backbone: published weights, folded norms and grids."""

from __future__ import annotations

import cv2
import torch
import torch.nn.functional as F
from conftest import COMPOSITES

from icm_cli.model.lite.efficientnet import EfficientNetLite, EfficientNetLiteConfig, _package_weights_path

CATS = range(281, 286)
"""ImageNet classes of domestic cats."""


def test_imagenet_classification() -> None:
    """With the published classifier, the cat of the demo is classified as a cat, so padding, names
    and scaling are right."""
    last = EfficientNetLite.load(
        EfficientNetLiteConfig(correspondence_blocks=(20,), correspondence_reductions=(1,), scale_blocks=(14,)),
        None,
        offline=True,
        seed=0,
    )
    rgb = cv2.imread(str(COMPOSITES / "imgs" / "cat.jpg"))[:500, :500, ::-1].copy()
    image = torch.from_numpy(cv2.resize(rgb, (256, 256), interpolation=cv2.INTER_AREA)).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        outputs = last.run_blocks(image, (20,))[20]
        published = torch.load(_package_weights_path(None), weights_only=True)
        statistics = [published[f"_bn1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        head = F.batch_norm(F.conv2d(outputs, published["_conv_head.weight"]), *statistics, eps=1e-3)
        scores = F.relu6(head).mean((2, 3)) @ published["_fc.weight"].T + published["_fc.bias"]
    assert int(scores.argmax()) in CATS


def test_folding_batch_norm_does_not_change_the_features() -> None:
    backbone = EfficientNetLite.load(EfficientNetLiteConfig(long_side_px=96), None, offline=True, seed=0)
    image = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(1, 96, 64, dtype=torch.bool)
    with torch.inference_mode():
        plain = backbone.target_features(image, valid, ["target"]).correspondence_features
        backbone.optimise_for_inference()
        folded = backbone.target_features(image, valid, ["target"]).correspondence_features
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in backbone.modules())
    torch.testing.assert_close(folded, plain, atol=1e-4, rtol=1e-3)


def test_grids_of_a_canvas_that_is_padded_after_reduction() -> None:
    """96 x 160 is reduced to 48 x 80 and padded to 64 x 96; tokens must stay aligned with their
    pixels."""
    backbone = EfficientNetLite.load(EfficientNetLiteConfig(long_side_px=160), None, offline=True, seed=0)
    valid = torch.ones(2, 96, 160, dtype=torch.bool)
    valid[1, 80:] = False
    features = backbone.target_features(
        torch.rand(2, 3, 96, 160, generator=torch.Generator().manual_seed(1)), valid, ["target"] * 2
    )
    assert features.correspondence_features.shape[2:] == (6, 10)
    assert features.valid.shape == (2, 6, 10)
    assert not features.valid[1, 5:].any()
    assert {stride: tuple(scale.shape[2:]) for stride, scale in features.scale_features.items()} == {
        8: (12, 20),
        16: (6, 10),
    }
    assert features.intra_similarity[16].grid == (6, 10)
