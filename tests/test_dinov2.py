"""The dinov2-lite backbone: pretrained weights, tokens, scales and padding."""

from __future__ import annotations

import importlib.metadata
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from icm_cli.errors import ConfigError
from icm_cli.model.lite.backbone import (
    DinoV2Lite,
    DinoV2LiteConfig,
    VisionTransformer,
    _onnx_path,
    _resize_to_grid,
    _transformer_weights,
)

CONFIG = DinoV2LiteConfig(long_side_px=192, layers=(2, 3))


@pytest.fixture(scope="module")
def backbone() -> DinoV2Lite:
    return DinoV2Lite.load(CONFIG, None, offline=True, seed=0)


def test_the_transformer_equals_the_onnx_graph_of_the_package() -> None:
    """The outputs of two blocks equal those of onnxruntime with the file of the weights."""
    path = _onnx_path(None)
    model = onnx.load(str(path))
    wanted = {f"/backbone/encoder/layer.{layer}/Add_1" for layer in (0, 2)}
    names = [node.output[0] for node in model.graph.node if node.name in wanted]
    del model.graph.output[:]
    for name in names:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    image = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    theirs = onnxruntime.InferenceSession(model.SerializeToString()).run(names, {"input_image": image})
    transformer = VisionTransformer(384, 6, depth=3)
    transformer.load_state_dict(_transformer_weights(path, 3))
    with torch.inference_mode():
        ours = transformer(torch.from_numpy(image), (1, 3))
    for expected, found in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(found.flatten(2).transpose(1, 2).numpy(), expected[:, 1:], atol=1e-4)


def test_grids_and_channels(backbone: DinoV2Lite) -> None:
    image, valid = torch.rand(2, 3, 128, 192), torch.ones(2, 128, 192, dtype=torch.bool)
    with torch.inference_mode():
        target = backbone.target_features(image, valid, ["", ""])
        reference = backbone.reference_features(image, valid, ["", ""])
    assert target.correspondence_features.shape == (2, 2 * 384 + 120 + 208 + 352, 4, 6)
    assert {stride: scale.shape[1:] for stride, scale in target.scale_features.items()} == {
        16: (48, 8, 12),
        8: (24, 16, 24),
        4: (16, 32, 48),
    }
    assert not reference.scale_features
    torch.testing.assert_close(reference.correspondence_features, target.correspondence_features)


@pytest.mark.parametrize(("cells", "grid"), [(6, 12), (7, 13), (12, 12), (1, 1)])
def test_coarse_cells_are_aligned_with_the_tokens(cells: int, grid: int) -> None:
    """A ramp remains a ramp with the slope of the tokens."""
    ramp = torch.arange(cells, dtype=torch.float32).expand(1, 1, cells, cells)
    found = _resize_to_grid(ramp, (grid, grid))
    assert found.shape == (1, 1, grid, grid)
    factor = 2 if cells < grid else 1
    expected = ((torch.arange(grid) + 0.5) / factor - 0.5).clamp(0, cells - 1)
    torch.testing.assert_close(found[0, 0, 0], expected)


def test_features_do_not_depend_on_the_batch(backbone: DinoV2Lite) -> None:
    image, valid = torch.rand(2, 3, 96, 96), torch.ones(2, 96, 96, dtype=torch.bool)
    with torch.inference_mode():
        together = backbone.target_features(image, valid, ["", ""])
        alone = backbone.target_features(image[1:], valid[1:], [""])
    torch.testing.assert_close(
        together.correspondence_features[1:], alone.correspondence_features, atol=1e-4, rtol=1e-4
    )
    for stride, scale in alone.scale_features.items():
        torch.testing.assert_close(together.scale_features[stride][1:], scale, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"long_side_px": 100}, "multiple of 32"),
        ({"layers": ()}, "numbers from 1 to 12"),
        ({"layers": (13,)}, "numbers from 1 to 12"),
        ({"convolution_blocks": (21,)}, "numbers from 0 to 20"),
    ],
)
def test_invalid_settings_are_reported(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DinoV2LiteConfig(**settings)  # type: ignore[arg-type]


class TestWeights:
    def test_weights_option_is_an_error(self) -> None:
        with pytest.raises(ConfigError, match="omit --weights"):
            DinoV2Lite.load(CONFIG, "somewhere", offline=True, seed=0)

    def test_missing_package_is_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> None:
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "distribution", missing)
        with pytest.raises(ConfigError, match=r"pip install 'icm-cli\[train\]'"):
            DinoV2Lite.load(CONFIG, None, offline=True, seed=0)

    def test_missing_onnx_is_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnx", None)
        with pytest.raises(ConfigError, match="needs onnx"):
            DinoV2Lite.load(CONFIG, None, offline=True, seed=0)

    def test_digest_depends_on_the_content(self) -> None:
        digests = {DinoV2Lite.weights_digest(CONFIG, None, offline=True) for _ in range(2)}
        assert [len(digest) for digest in digests] == [64]
