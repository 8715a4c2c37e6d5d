"""Training data: sources, pairs, distractors, negatives, augmentation, and settings."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from train_data import MODEL

from icm_cli.errors import ConfigError, ImageError, TrainingError, UsageError
from icm_cli.training.batches import assign_sample_numbers
from icm_cli.training.data import scenes as scene_module
from icm_cli.training.data.augment import draw_guidance
from icm_cli.training.data.pool import TrainingItem, TrainingPool, read_pool
from icm_cli.training.data.samples import PairMaker
from icm_cli.training.data.scenes import SceneMaker, read_cutout
from icm_cli.training.settings import (
    AugmentConfig,
    DataConfig,
    PairConfig,
    SourceConfig,
    TrainConfig,
    list_differences,
    read_settings,
)
from icm_cli.training.stages.matte import MatteStage

SIDE = 96
STILL = AugmentConfig(flip=0, zoom=1, rotate_degrees=0, stretch=0, colour=0, jpeg=0, blur=0, noise=0)
ALONE = PairConfig(
    composite_probability=0,
    same_image_probability=0,
    distractor_probability=0,
    negative_probability=0,
    mask_jitter_probability=0,
)
RED, GREEN, BLUE = (220, 30, 30), (30, 200, 30), (30, 30, 220)


def disc(colour: tuple[int, int, int], ground: tuple[int, int, int], size: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """Return a soft disc on a background, uint8 [size,size,3], and its exact alpha, uint8 [size,size]."""
    y, x = np.mgrid[:size, :size]
    distance = np.hypot(y - size / 2, x - size / 2)
    alpha = np.clip((size / 3 - distance) / 6 + 0.5, 0, 1)
    image = alpha[..., None] * np.array(colour) + (1 - alpha[..., None]) * np.array(ground)
    return image.round().astype(np.uint8), (alpha * 255).round().astype(np.uint8)


def write(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image[..., ::-1] if image.ndim == 3 and image.shape[2] == 3 else image)
    return path


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photographs of red and green discs (three each), blue backgrounds, and yellow RGBA cut-outs."""
    root = tmp_path_factory.mktemp("discs")
    for group, colour in (("red", RED), ("green", GREEN)):
        for number in range(3):
            image, alpha = disc(colour, (40 * number + 60,) * 3)
            write(root / "images" / group / f"{number}.png", image)
            write(root / "alphas" / group / f"{number}.png", alpha)
    for number in range(2):
        write(root / "backgrounds" / f"{number}.png", np.full((140, 200, 3), (20 * number + 20, 20, 200), np.uint8))
    for number in range(2):
        _, alpha = disc(RED, RED)
        rgba = np.dstack([np.full((120, 120, 3), (0, 220, 220), np.uint8), alpha])
        rgba[alpha == 0] = 0
        write(root / "cutouts" / "yellow" / f"{number}.png", rgba)
    return root


def source(root: Path, **change: object) -> SourceConfig:
    return replace(SourceConfig(images=str(root / "images"), alphas=str(root / "alphas")), **change)  # type: ignore[arg-type]


def maker(
    root: Path, pairs: PairConfig = ALONE, augment: AugmentConfig = STILL, *more: SourceConfig, **change: object
) -> PairMaker:
    data = DataConfig((source(root), *more), (str(root / "backgrounds"),))
    config = replace(TrainConfig(canvas_px=SIDE, pairs=pairs, augment=augment), **change)  # type: ignore[arg-type]
    return PairMaker(read_pool(data), config)


def make_sample(maker: PairMaker, counter: int) -> SimpleNamespace:
    """Return the name and the arrays of a sample."""
    batch = maker.make_batch([counter])
    arrays = {name: tensor[0].numpy() for name, tensor in batch.named_tensors().items()}
    return SimpleNamespace(name=batch.names[0], **arrays)


def main_colour(sample: SimpleNamespace) -> str:
    """Return the colour of the reference object."""
    return ("red", "green", "blue")[int(sample.reference_rgb[sample.guidance].mean(axis=0).argmax())]


def equal(one: SimpleNamespace, other: SimpleNamespace) -> bool:
    return all(np.array_equal(layer, getattr(other, name)) for name, layer in vars(one).items())


@given(seed=st.integers(0, 99), counter=st.integers(0, 10_000))
@settings(max_examples=25)
def test_sample_depends_on_seed_and_counter_only(discs: Path, seed: int, counter: int) -> None:
    busy = PairConfig(scribble_probability=0.3, point_probability=0.2, negative_probability=0.2)
    first, second = (maker(discs, busy, AugmentConfig(), seed=seed) for _ in range(2))
    make_sample(second, counter + 1)  # earlier samples have no influence
    assert equal(make_sample(first, counter), make_sample(second, counter))
    sample = make_sample(first, counter)
    assert sample.rgb.shape == (SIDE, SIDE, 3)
    assert sample.alpha.dtype == sample.rgb.dtype == sample.trimap.dtype == np.uint8
    assert sample.guidance.any()
    assert set(np.unique(sample.trimap)) <= {0, 128, 255}
    assert (sample.trimap[(sample.alpha > 0) & (sample.alpha < 255)] == 128).all()


def test_other_seeds_and_counters_give_other_samples(discs: Path) -> None:
    samples = [
        make_sample(maker(discs, PairConfig(), AugmentConfig(), seed=seed), n) for seed in range(2) for n in range(2)
    ]
    assert len({sample.rgb.tobytes() for sample in samples}) == 4


def test_without_augmentation_pairs_equal_the_files(discs: Path) -> None:
    for counter in range(6):
        sample = make_sample(maker(discs), counter)
        target, shown = sample.name.split(" by ")
        assert target.split("/")[0] == shown.split("/")[0]
        assert target != shown
        image = cv2.imread(str(discs / "images" / f"{target}.png"))[..., ::-1]
        expected = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        assert np.array_equal(sample.rgb, expected)
        assert sample.valid.all()


def test_alpha_is_that_of_the_reference_object(discs: Path) -> None:
    """With distractors the image shows both discs; the alpha belongs to the one of the reference's colour."""
    pairs = replace(ALONE, distractor_probability=1.0, max_distractors=1, reference_distractor_probability=1.0)
    seen = Counter()
    for counter in range(30):
        sample = make_sample(maker(discs, pairs, replace(STILL, flip=0.5)), counter)
        wanted = main_colour(sample)
        inside = sample.rgb[sample.alpha > 250].mean(axis=0)
        assert ("red", "green", "blue")[int(inside.argmax())] == wanted
        other = 1 if wanted == "red" else 0
        strong = (sample.rgb[..., other] > 150) & (sample.rgb[..., 1 - other] < 90)
        seen["target"] += bool(strong.any())
        assert (sample.alpha[strong] < 100).all()
        of_reference = (sample.reference_rgb[..., other] > 150) & (sample.reference_rgb[..., 1 - other] < 90)
        seen["reference"] += bool(of_reference.any())
        assert not sample.guidance[of_reference].any()
    assert seen["target"] >= 25
    assert seen["reference"] >= 20


def test_negatives_do_not_show_the_object(discs: Path) -> None:
    pairs = replace(ALONE, negative_probability=1.0)
    kinds = Counter()
    for counter in range(30):
        sample = make_sample(maker(discs, pairs), counter)
        assert not sample.alpha.any()
        assert not sample.trimap.any()
        wanted = 0 if main_colour(sample) == "red" else 1
        assert not ((sample.rgb[..., wanted] > 150) & (sample.rgb[..., 1 - wanted] < 90)).any()
        kinds["backdrop" if sample.rgb[..., 2].mean() > 150 else "other"] += 1
    assert min(kinds["backdrop"], kinds["other"]) >= 3


def test_single_image_is_paired_with_another_view_of_itself(discs: Path) -> None:
    pairs = replace(ALONE, composite_probability=1.0)
    alone = source(discs, group_by="image")
    single = PairMaker(
        read_pool(DataConfig((alone,), (str(discs / "backgrounds"),))),
        TrainConfig(canvas_px=SIDE, pairs=pairs, augment=STILL),
    )
    made = make_sample(single, 0)
    target, shown = made.name.split(" by ")
    assert target == shown
    assert not np.array_equal(made.rgb, made.reference_rgb)


@given(counter=st.integers(0, 1000))
@settings(max_examples=20)
def test_composites_have_no_halo(discs: Path, counter: int) -> None:
    """The old background (grey, 60 to 140) is not visible at soft edges on the new one (blue)."""
    sample = make_sample(maker(discs, replace(ALONE, composite_probability=1.0)), counter)
    soft = (sample.alpha > 30) & (sample.alpha < 225)
    assert soft.any()
    weight = sample.alpha[soft][:, None] / 255
    ground = np.median(sample.rgb[sample.alpha == 0], axis=0)
    colour = np.array(RED if sample.name.startswith("red") else GREEN)
    expected = weight * colour + (1 - weight) * ground
    assert np.abs(sample.rgb[soft] - expected).mean() < 12


def test_cutouts_have_foreground_colours(discs: Path) -> None:
    item = next(iter(read_pool(DataConfig((source(discs),)))))
    layer = read_cutout(item, SIDE)
    soft = (layer.alpha > 0.1) & (layer.alpha < 0.9)
    straight = layer.colour[soft] / layer.alpha[soft][:, None]
    assert np.abs(straight - np.array(GREEN)).mean() < 10  # "green" comes first


def test_rgba_cutouts_are_composited_onto_backgrounds(discs: Path) -> None:
    cutouts = SourceConfig(dataset="cutouts", root=str(discs / "cutouts"))
    pool = read_pool(DataConfig((cutouts,), (str(discs / "backgrounds"),)))
    assert [(item.group, item.is_foreground) for item in pool] == [("0:yellow", True)] * 2
    sample = make_sample(PairMaker(pool, TrainConfig(canvas_px=SIDE, pairs=ALONE, augment=STILL)), 0)
    inside = sample.rgb[sample.alpha == 255]
    assert np.abs(inside - np.array((220, 220, 0))).max() <= 3
    dark = sample.rgb.astype(int).sum(axis=-1) < 100
    assert not dark.any()  # black transparent pixels would appear as a halo


def test_sources_are_drawn_by_weight(discs: Path) -> None:
    rare = replace(SourceConfig(dataset="cutouts", root=str(discs / "cutouts")), weight=0.25)
    pool = read_pool(DataConfig((source(discs), rare), (str(discs / "backgrounds"),)))
    rng = np.random.default_rng(0)
    drawn = Counter(pool.draw_item(rng).is_foreground for _ in range(4000))
    assert drawn[True] / 4000 == pytest.approx(0.2, abs=0.03)


def test_open_images_masks_stay_binary(discs: Path, tmp_path: Path) -> None:
    for number in range(2):
        image, alpha = disc(RED, (90, 90, 90))
        write(tmp_path / "images" / f"00a{number}.jpg", image)
        small = cv2.resize(alpha, (77, 77), interpolation=cv2.INTER_NEAREST)
        write(tmp_path / "masks" / f"00a{number}_m01bjv_77fe.png", (small > 127).astype(np.uint8) * 255)
    masks = SourceConfig(dataset="openimages", root=str(tmp_path))
    pool = read_pool(DataConfig((masks,), (str(discs / "backgrounds"),)))
    assert [item.group for item in pool] == ["0:m01bjv"] * 2
    busy = replace(ALONE, composite_probability=1.0, distractor_probability=1.0)
    made = PairMaker(pool, TrainConfig(canvas_px=SIDE, pairs=busy, augment=AugmentConfig()))
    for counter in range(8):
        sample = make_sample(made, counter)
        assert set(np.unique(sample.alpha)) == {0, 255}
        assert sample.rgb[..., 2].mean() < 130  # masks with hard edges are not composited onto blue


def test_published_trimaps_are_transformed_with_their_images(discs: Path, tmp_path: Path) -> None:
    trimap = np.zeros((120, 120), np.uint8)
    trimap[20:100, 20:100] = 128
    trimap[50:70, 50:70] = 255
    for group in ("red", "green"):
        for number in range(3):
            write(tmp_path / group / f"{number}.png", trimap)
    data = DataConfig((source(discs, trimaps=str(tmp_path)),))
    config = TrainConfig(canvas_px=SIDE, pairs=ALONE, augment=replace(STILL, zoom=1.5, rotate_degrees=20))
    made = PairMaker(read_pool(data), config)
    for counter in range(5):
        sample = make_sample(made, counter)
        assert set(np.unique(sample.trimap)) == {0, 128, 255}
        inside = sample.trimap == 255
        assert (sample.alpha[inside] == 255).all()
        assert 0.02 < inside.mean() < 0.12
    whole = make_sample(PairMaker(read_pool(data), replace(config, augment=STILL)), 0)
    assert (whole.trimap == 255).mean() == pytest.approx((20 / 120) ** 2, rel=0.15)


def test_composition_datasets_provide_foregrounds(discs: Path, tmp_path: Path) -> None:
    for number in range(2):
        image, alpha = disc(RED, RED)
        write(tmp_path / "Train" / "FG" / f"{number}.png", image)
        write(tmp_path / "Train" / "GT" / f"{number}.png", alpha)
    pool = read_pool(DataConfig((SourceConfig(dataset="d646", root=str(tmp_path)),), (str(discs / "backgrounds"),)))
    assert [(item.name, item.group, item.is_foreground) for item in pool] == [("0", "0:0", True), ("1", "0:1", True)]


@pytest.mark.parametrize(
    ("share", "least", "most"), [("scribble_probability", 0.005, 0.2), ("point_probability", 0.0005, 0.01)]
)
def test_scribbles_and_points_are_inside_the_object(share: str, least: float, most: float) -> None:
    _, alpha = disc(RED, GREEN, SIDE)
    config = replace(ALONE, **{share: 1.0})
    shown = [draw_guidance(alpha, config, np.random.default_rng(seed)) for seed in range(20)]
    for mark in shown:
        assert mark.any()
        assert (alpha[mark] > 127).all()
        assert least < mark.mean() < most
    assert len({mark.tobytes() for mark in shown}) > 15


def test_jittered_masks_are_similar_to_the_mask() -> None:
    _, alpha = disc(RED, GREEN, SIDE)
    mask = alpha > 127
    changed = 0
    for seed in range(20):
        jittered = draw_guidance(alpha, replace(ALONE, mask_jitter_probability=1.0), np.random.default_rng(seed))
        iou = (jittered & mask).sum() / (jittered | mask).sum()
        assert 0.8 < iou <= 1
        changed += not np.array_equal(jittered, mask)
    assert changed > 10


def test_zoomed_view_shows_enough_of_the_object(discs: Path) -> None:
    pool = read_pool(DataConfig((source(discs),)))
    scenes = SceneMaker(pool, TrainConfig(canvas_px=SIDE, augment=replace(AugmentConfig(), zoom=4.0)))
    item = next(iter(pool))
    for seed in range(20):
        scene = scenes.make_photograph(item, np.random.default_rng(seed))
        assert (scene.alpha > 127).mean() > 0.1
        assert not scene.alpha[~scene.valid].any()


class TestUnreadable:
    @pytest.fixture
    def torn(self, discs: Path, tmp_path: Path) -> tuple[PairMaker, Path]:
        """A dataset of six images, one of which is cut off."""
        import shutil

        shutil.copytree(discs, tmp_path / "discs")
        bad = tmp_path / "discs" / "images" / "red" / "1.png"
        bad.write_bytes(bad.read_bytes()[:100])
        return maker(tmp_path / "discs"), bad

    def test_unreadable_draw_is_replaced_and_reported(self, torn: tuple[PairMaker, Path]) -> None:
        batch = torn[0].make_batch(range(20))
        assert len(batch.names) == len(batch.rgb) == 20
        assert 2 <= len(batch.skipped) < 20
        assert all(str(torn[1]) in reason and "cut short" in reason for reason in batch.skipped)
        assert not any("red/1" in name for name in batch.names)

    def test_unreadable_data_raise_an_error(self, torn: tuple[PairMaker, Path]) -> None:
        for path in torn[1].parents[1].rglob("*.png"):
            path.write_bytes(b"")
        with pytest.raises(TrainingError, match="could not be made in 10 draws"):
            maker(torn[1].parents[2]).make_batch([0])

    def test_alpha_of_another_size_is_refused(self, discs: Path) -> None:
        pool = read_pool(DataConfig((source(discs),)))
        item = next(iter(pool))
        wrong = replace(item, image=next((discs / "backgrounds").iterdir()))
        with pytest.raises(ImageError, match=r"200x140 .* 120x120; expected the same size"):
            SceneMaker(pool, TrainConfig(canvas_px=SIDE, augment=STILL)).make_photograph(
                wrong, np.random.default_rng(0)
            )


@given(
    batch=st.sampled_from([4, 8, 12]),
    micro=st.sampled_from([1, 2]),
    processes=st.sampled_from([1, 2]),
    first=st.integers(0, 3),
)
def test_samples_of_a_step_do_not_depend_on_processes_and_micro_batches(
    batch: int, micro: int, processes: int, first: int
) -> None:
    parts = [list(assign_sample_numbers(batch, micro, process, processes, first, 5)) for process in range(processes)]
    assert {len(part) for part in parts} == {(5 - first) * batch // (micro * processes)}
    per_step = len(parts[0]) // (5 - first)
    for step in range(first, 5):
        at = (step - first) * per_step
        drawn = [counter for part in parts for each in part[at : at + per_step] for counter in each]
        assert sorted(drawn) == list(range(step * batch, (step + 1) * batch))


def write_dataset(root: Path, **groups: int) -> Path:
    """Write a dataset with this number of small images in each group."""
    for group, count in groups.items():
        for number in range(count):
            for kind in ("images", "alphas"):
                path = root / kind / group / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), np.full((24, 24), 255 * (number % 2), np.uint8))
    return root


class TestGroups:
    def pool(self, root: Path, **source: object) -> TrainingPool:
        sources = (SourceConfig(images=str(root / "images"), alphas=str(root / "alphas"), **source),)  # type: ignore[arg-type]
        return read_pool(DataConfig(sources))

    def test_groups_are_drawn_evenly(self, tmp_path: Path) -> None:
        pool = self.pool(write_dataset(tmp_path, small=1, large=9))
        rng = np.random.default_rng(0)
        drawn = Counter(pool.draw_item(rng).name for _ in range(4000))
        assert drawn["small/0"] / 4000 == pytest.approx(0.5, abs=0.05)
        assert all(drawn[f"large/{i}"] / 4000 == pytest.approx(0.5 / 9, abs=0.02) for i in range(9))

    def test_items_with_a_common_class_are_no_negatives(self, tmp_path: Path) -> None:
        classes = tmp_path / "classes.json"
        classes.write_text(json.dumps({"cat1": "cat", "images/cat2": ["cat", "chair"], "chair": "chair", "sun": "sun"}))
        pool = self.pool(write_dataset(tmp_path, cat1=1, cat2=1, chair=1, sun=1), classes=str(classes))
        items = {item.group.partition(":")[2]: item for item in pool}
        rng = np.random.default_rng(0)

        def draw_negatives(group: str) -> set[str]:
            drawn = (pool.draw_negative(items[group], rng, for_cutout=False) for _ in range(200))
            return {item.group.partition(":")[2] for item in drawn if item is not None}

        assert draw_negatives("cat1") == {"chair", "sun"}
        assert draw_negatives("cat2") == {"sun"}
        assert draw_negatives("sun") == {"cat1", "cat2", "chair"}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "it is not JSON"),
            ("[]", "expected a JSON object"),
            ('{"a": [1]}', "expected a JSON object"),
            ('{"a": "x"}', "no entry for"),
        ],
    )
    def test_invalid_class_files_are_refused(self, tmp_path: Path, content: str, message: str) -> None:
        classes = tmp_path / "classes.json"
        classes.write_text(content)
        with pytest.raises(UsageError, match=message):
            self.pool(write_dataset(tmp_path, a=1, b=1), classes=str(classes))

    def test_hard_masks_are_softened(self, tmp_path: Path) -> None:
        root = write_dataset(tmp_path, a=2)
        mask = np.zeros((24, 24), np.uint8)
        mask[:, 12:] = 255
        cv2.imwrite(str(root / "alphas" / "a" / "1.png"), mask)
        plain, soft = (self.pool(root, soften_px=px).sources[0][1] for px in (0.0, 0.8))
        assert set(np.unique(scene_module.read_photograph(plain).alpha)) == {0, 255}
        alpha = scene_module.read_photograph(soft).alpha
        assert 0 < alpha[12, 11] < 128 < alpha[12, 12] < 255
        assert alpha[12, 0] == 0
        with pytest.raises(UsageError, match="0 for binary masks"):
            SourceConfig(soften_px=1.0, binary=True)


class TestSettings:
    def config(self, path: Path, **sections: object) -> Path:
        path.write_text(json.dumps({**MODEL, **sections}))
        return path

    def test_settings_round_trip_through_json(self, tmp_path: Path) -> None:
        train = {"loss": {"dice": 1}, "pairs": {"max_distractors": 3}, "steps": 7, "clip_norm": 2}
        data = {"sources": [{"images": "a", "alphas": "b", "exclude": ["x*"]}], "validation": {"images": "c"}}
        settings = read_settings(self.config(tmp_path / "a.yaml", train=train, data=data))
        again = read_settings(self.config(tmp_path / "b.yaml", **settings.as_dict()))
        assert again == settings
        assert settings.train.loss.dice == 1.0
        assert settings.data.sources[0].exclude == ("x*",)

    def test_overrides_of_nested_settings(self, tmp_path: Path) -> None:
        path = self.config(tmp_path / "a.yaml")
        lines = [
            "train.learning_rate=1e-4",
            "train.loss.l1=2",
            "head.width=16",
            "train.ema_decay=null",
            "data.backgrounds=[a, b]",
        ]
        settings = read_settings(path, overrides=lines)
        assert settings.train.learning_rate == 1e-4
        assert settings.train.loss.l1 == 2.0
        assert settings.model.head.settings.width == 16
        assert settings.data.backgrounds == ("a", "b")
        before = read_settings(path).as_dict()
        assert "head.width: 8 -> 16" in list_differences(before, settings.as_dict())

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("steps=3", "--set steps: unknown key. Did you mean 'train.steps'?"),
            ("width=1", "Did you mean 'head.width'?"),
            ("loss.dise=1", "Did you mean 'train.loss.dice'?"),
            ("max_distractors=1", "Did you mean 'train.pairs.max_distractors'?"),
            ("trian.loss.dice=1", "Did you mean 'train'?"),
            ("zzz=1", "Known: backbone, "),
            ("backbon.layers=[1]", "Did you mean 'backbone'?"),
            ("=3", "cannot be parsed"),
            ("train.stepps=3", "with --set: train: unknown key 'stepps'. Did you mean 'steps'"),
            ("train.steps=many", "steps is 'many'; expected an integer"),
            ("train.steps", "expected key=value"),
            ("train.steps=[", "is not YAML"),
            ("train.pairs.negative_probability=2", "expected 0 to 1"),
            ("train.loss.binary_rule=both", "binary_rule is 'both'"),
            ("train.steps.more=1", "steps is {'more': 1}"),
            ("train.clip_norm=0", "more than 0"),
            ("train.learning_rate=0", "learning_rate is 0.0; expected more than 0"),
            ("train.learning_rate=-1", "learning_rate is -1.0; expected more than 0"),
            ("train.learning_rate=.nan", "rate is nan; expected a number"),
            ("train.learning_rate=.inf", "rate is inf; expected a number"),
            ("train.optimiser=sgd", "expected 'adam' or 'adamw'"),
            ("train.seed=99999999999999999999", "expected 0 to"),
            ("data.sources=im", "sources is 'im'; expected a list"),
            ("data.sources=[null]", "sources 1 is empty; expected keys with values"),
            ("data.validation={rounds: 0}", "rounds is 0; expected 1 or more"),
            ("train.augment.zoom=0.5", "1 or more"),
            ("data.sources=[{dataset: aim501}]", "Did you mean 'aim500'"),
            ("data.sources=[{weight: 0}]", "expected more than 0"),
        ],
    )
    def test_invalid_settings_are_refused(self, tmp_path: Path, override: str, message: str) -> None:
        with pytest.raises(UsageError if override.startswith("data.") else ConfigError) as error:
            read_settings(self.config(tmp_path / "a.yaml"), overrides=[override])
        assert message in str(error.value)

    def test_presets_contain_recipes(self) -> None:
        assert read_settings("icm-sd21").train.steps == 20_000
        lite = read_settings("lite").train
        assert (lite.stage, lite.minutes) == ("match", 60)

    def test_incomplete_data_are_refused(self, discs: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="nothing to train on"):
            read_pool(DataConfig())
        with pytest.raises(UsageError, match="no backgrounds to put them on"):
            read_pool(DataConfig((SourceConfig(dataset="cutouts", root=str(discs / "cutouts")),)))
        one = SourceConfig(images=str(discs / "images" / "red"), alphas=str(discs / "alphas" / "red"))
        settings = read_settings(self.config(tmp_path / "a.yaml"))
        with pytest.raises(UsageError, match="negative_probability"):
            MatteStage(settings, read_pool(DataConfig((one,))))
        MatteStage(settings, read_pool(DataConfig((one,), (str(discs / "backgrounds"),))))
        with pytest.raises(UsageError, match="no image left"):
            read_pool(DataConfig((source(discs, exclude=("*",)),)))
        with pytest.raises(UsageError, match="does not exist"):
            read_pool(DataConfig((source(discs),), (str(tmp_path / "none"),)))


def test_excluded_images_are_not_in_the_pool(discs: Path) -> None:
    pool: TrainingPool = read_pool(DataConfig((source(discs, exclude=("red/*",)),)))
    names: list[TrainingItem] = list(pool)
    assert [item.name for item in names] == ["green/0", "green/1", "green/2"]


def test_decoded_images_are_cached(tmp_path: Path) -> None:
    """An image is decoded once, and the size of the cache is counted in bytes."""
    rgb, alpha = disc(RED, GREEN)
    for name, image in (("a.png", rgb), ("b.png", rgb), ("alpha.png", alpha)):
        cv2.imwrite(str(tmp_path / name), image)
    items = [
        TrainingItem(name, tmp_path / name, tmp_path / "alpha.png", None, "group", is_foreground=False, is_binary=False)
        for name in ("a.png", "b.png")
    ]
    scene_module.read_cached_photograph.cache.clear()
    first, second = (scene_module.read_cached_photograph(item, 64) for item in items)
    assert scene_module.read_cached_photograph(items[0], 64) is first
    assert scene_module.read_cached_photograph(items[1], 64) is second
    size = first.rgb.nbytes + first.alpha.nbytes + first.valid.nbytes
    assert scene_module.read_cached_photograph.cache.currsize == 2 * size
    assert scene_module.read_cached_photograph.cache.maxsize == scene_module.CACHE_BYTES
