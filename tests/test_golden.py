"""The model reproduces values recorded from the published code (absolute tolerance 1e-4,
float32)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_sd import write_tiny_sd
from torch import Tensor

from icm_cli.model.checkpoint import convert_published_tensors, load_strict
from icm_cli.model.contracts import Features, ReferenceFeatures
from icm_cli.model.similarity import AttentionMatrix
from icm_cli.model.stable_diffusion.backbone import StableDiffusion, StableDiffusionConfig
from icm_cli.model.stable_diffusion.detail_head import FUSION_STRIDES, DetailConfig, DetailHead
from icm_cli.model.stable_diffusion.unet import MeanAttention

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-4
DECODER = DetailConfig(
    canvas_px=192, feature_channels=16, intra_channels=8, fusion_channels=8, decoder_channels=(8, 6, 4, 4)
)


def load(name: str) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / name).items()}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def decoder() -> tuple[DetailHead, dict[str, Tensor]]:
    golden = load("decoder.npz")
    state = {key.removeprefix("state."): value for key, value in golden.items() if key.startswith("state.")}
    head = DetailHead(DECODER).eval()
    load_strict(
        head, {k.removeprefix("head."): v for k, v in convert_published_tensors(state, "golden").items()}, "golden"
    )
    return head, golden


def target_features(golden: dict[str, Tensor]) -> Features:
    matrices = {
        stride: AttentionMatrix(golden[key].flatten(1, 2), golden[key].shape[1:3])
        for stride, key in zip(FUSION_STRIDES, ("attn_24", "attn_48"), strict=True)
    }
    valid = torch.ones(len(golden["src_cor"]), 12, 12, dtype=torch.bool)
    scales = {stride: golden[key] for stride, key in zip(FUSION_STRIDES, ("src_24", "src_48"), strict=True)}
    return Features(golden["src_cor"], valid, scales, matrices)


def one(golden: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {key: value[i : i + 1] for key, value in golden.items() if not key.startswith("state.")}


@torch.no_grad()
def test_detail_head(decoder: tuple[DetailHead, dict[str, Tensor]]) -> None:
    head, golden = decoder
    valid = torch.ones(1, 192, 192, dtype=torch.bool)
    for pair in (one(golden, 0), one(golden, 1)):
        feature = Features(pair["ref_feature"], torch.ones(1, 12, 12, dtype=torch.bool), {}, {})
        guidance = (pair["guidance"] > 0.5).float()
        prepared = head.prepare_references([ReferenceFeatures(feature, guidance, valid)])
        target = target_features(pair)
        similarity = head.inter_similarity([prepared], target.correspondence_features, target.valid)
        assert_close(similarity, pair["inter_similarity"])
        inter, intra = head.similarity_maps(target, [prepared])
        assert_close(inter, similarity)
        assert_close(intra, pair["intra_similarity"])
        assert_close(head(target, [prepared], (pair["image"] + 1) / 2, valid).alpha, pair["alpha"])


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> tuple[StableDiffusion, dict[str, Tensor]]:
    """A backbone with the recorded weights; the decoder of the VAE is not recorded and random."""
    golden, settings = load("extractor.npz"), json.loads((GOLDEN / "extractor.json").read_text())
    folder = write_tiny_sd(tmp_path_factory.mktemp("golden-sd"))
    for part in ("unet", "vae"):
        _overwrite(folder / part, settings[part], golden, f"{part}.")
    config = StableDiffusionConfig(canvas_px=128, timestep=settings["timestep"], ensemble=settings["ensemble"])
    backbone = StableDiffusion.load(config, str(folder), offline=True, seed=0)
    backbone.prompt_embedding.copy_(golden["prompt_embeds"])
    return backbone, golden


def _overwrite(folder: Path, config: dict[str, Any], golden: dict[str, Tensor], prefix: str) -> None:
    from safetensors.torch import load_file

    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "diffusion_pytorch_model.safetensors"
    recorded = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    save_file({**load_file(path), **recorded}, path)


@torch.no_grad()
def test_moments(extractor: tuple[StableDiffusion, dict[str, Tensor]]) -> None:
    backbone, golden = extractor
    assert_close(backbone.encode_moments((golden["image"] + 1) / 2), golden["moments"])


@torch.no_grad()
def test_noise_schedule(extractor: tuple[StableDiffusion, dict[str, Tensor]]) -> None:
    backbone, golden = extractor
    assert_close(backbone.add_noise(golden["src_latents"], golden["src_noise"]), golden["src_noisy"])


@torch.no_grad()
@pytest.mark.parametrize("i", [0, 1])
def test_reference_feature(extractor: tuple[StableDiffusion, dict[str, Tensor]], i: int) -> None:
    backbone, golden = extractor
    feature = backbone.mean_features(golden["ref_noisy"].unflatten(0, (2, 4))[i])[16]
    assert_close(feature[0], golden["ref_feature"][i])


@torch.no_grad()
@pytest.mark.parametrize("i", [0, 1])
def test_target_features_and_maps(extractor: tuple[StableDiffusion, dict[str, Tensor]], i: int) -> None:
    backbone, golden = extractor
    maps = {
        stride: MeanAttention(torch.ones(128 // stride, 128 // stride, dtype=torch.bool)) for stride in FUSION_STRIDES
    }
    features = backbone.mean_features(golden["src_noisy"].unflatten(0, (2, 4))[i], maps)
    for stride, size in zip(FUSION_STRIDES, ("24", "48"), strict=True):
        assert_close(features[stride][0], golden[f"src_{size}"][i])
        assert_close(maps[stride].mean(), golden[f"attn_{size}"][i].flatten(0, 1))
    assert_close(features[16][0], golden["src_cor"][i])
