"""Settings of training: frozen dataclasses, read from the YAML file of the model. Unknown keys are errors."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from icm_cli.config import (
    MODEL_KEYS,
    MODEL_SECTIONS,
    ModelConfig,
    Section,
    limited,
    parse_dataclass,
    parse_model_config,
    parse_yaml,
    read_config_mapping,
    reject_unknown_keys,
    require_mapping,
)
from icm_cli.datasets.registry import DATASETS
from icm_cli.errors import ConfigError, UsageError, did_you_mean, find_similar_name
from icm_cli.options import ScoredSize, Split

BinaryRule = Literal["binary", "constant"]
CUTOUTS = "cutouts"
"""Name of the dataset that is a folder of RGBA foregrounds."""
LAYOUTS = ((1, 1), (1, 2), (2, 1), (2, 2))
"""Rows and columns of the mosaics that the stages "match", "end-to-end" and "objects" train on."""
EXPECTED_DATA = "expected a YAML file with 'sources', given by --data FILE (docs/train.md shows one)"
MIN_CROP_PX = 64
STAGE_SETTINGS = {
    "train.loss": ("matte",),
    "train.match": ("match", "end-to-end", "objects"),
    "train.clicks": ("objects",),
    "train.refine": ("refine",),
}
"""Section of settings -> the stages that read it. A run of another stage can be resumed with changes in the section."""
REFINE_LOSS_NAMES = ("l1", "cross_entropy", "gradient", "laplacian")
"""Losses of the stage "refine", named like the settings of their weights."""
MAX_SEED = 1 << 62
"""Largest seed. The sum of seed and step must fit into 64 bits."""


@dataclass(frozen=True)
class TrainSection(Section, title="train:"):
    """Base class of the settings below ``train``."""

    def check_weights(self, name: str) -> None:
        """Check that a setting is a tuple of sampling weights. Raises ConfigError."""
        weights = getattr(self, name)
        is_valid = bool(weights) and min(weights) >= 0 and sum(weights) > 0
        self.check(name, is_valid, "numbers of 0 or more that are not all 0")

    def check_total_probability(self, first: str, second: str) -> None:
        """Check that two probabilities of exclusive events have a sum of at most 1. Raises ConfigError."""
        first_value, second_value = getattr(self, first), getattr(self, second)
        if first_value + second_value > 1:
            raise ConfigError(
                f"{self.title} {first} and {second} are {first_value} and {second_value}; expected a sum of at most 1"
            )


@dataclass(frozen=True)
class DatasetConfig:
    """A dataset. The fields are options of ``icm eval``; paths are relative to the working directory."""

    dataset: str = "folder"
    """A dataset of ``icm eval``, whose folder is ``root``, or ``folder``, with ``images`` and ``alphas``."""
    root: str | None = None
    images: str | None = None
    alphas: str | None = None
    trimaps: str | None = None
    groups: str | None = None
    """JSON file that says which images show the same object."""

    @property
    def path_options(self) -> dict[str, Any]:
        """Further arguments of ``find_dataset`` and ``icm_cli.evaluate``, in addition to dataset and root."""
        return {"images": self.images, "alphas": self.alphas, "trimaps": self.trimaps, "groups": self.groups}

    def _check_dataset(self, where: str, known: Iterable[str]) -> None:
        """Raise UsageError if the dataset is not a known one. ``where``: section of the settings, for the message."""
        if self.dataset not in known:
            raise UsageError(f"{where}: unknown dataset {self.dataset!r}. {did_you_mean(self.dataset, known)}")


@dataclass(frozen=True)
class SourceConfig(DatasetConfig):
    """Images to train on.

    ``dataset`` may also be ``cutouts``: a folder of RGBA foregrounds in which each subfolder is a group.
    """

    split: Split | None = None
    """Default: the train split, or the only split of the dataset."""
    group_by: Literal["group", "image"] = "group"
    """"group": target and reference are images of one group. "image": they are two views of one image."""
    binary: bool = False
    """The alphas are masks of 0 and 255 and stay binary under every augmentation."""
    exclude: tuple[str, ...] = ()
    """Globs of image names that are excluded."""
    classes: str | None = None
    """JSON file with the class, or a list of classes, of each folder of images.

    A folder may be named by the last parts of its path. An image is used as a negative only if none of its classes is a
    class of the reference.
    """
    coarse: str | None = None
    """Folder of alphas of these images that another model computed (``icm eval --save-alphas``). The stage "refine"
    uses them as coarse alphas, in addition to degraded true alphas."""
    soften_px: float = 0.0
    """Standard deviation, in px of the file, of the blur that softens hard masks."""
    weight: float = 1.0
    """Sampling weight relative to the other sources."""
    licence: str = ""
    """Recorded in every checkpoint."""

    def __post_init__(self) -> None:
        self._check_dataset("data", {*DATASETS, CUTOUTS})
        if self.soften_px < 0 or (self.soften_px and self.binary):
            raise UsageError(
                f"data: soften_px of {self.title} is {self.soften_px}; expected 0 or more, and 0 for binary masks"
            )
        if not self.weight > 0:  # also true for NaN
            raise UsageError(f"data: weight of {self.title} is {self.weight}; expected more than 0")

    @property
    def title(self) -> str:
        """Name of the source in messages."""
        where = self.root or self.images
        return f"{self.dataset} ({where})" if where else self.dataset


@dataclass(frozen=True)
class ValidationConfig(DatasetConfig):
    """Dataset that is scored during training, as ``icm eval`` would score it."""

    split: Split = "test"
    size: ScoredSize | None = None
    rounds: int = 1

    def __post_init__(self) -> None:
        self._check_dataset("data: validation", DATASETS)
        if self.rounds < 1:
            raise UsageError(f"data: validation: rounds is {self.rounds}; expected 1 or more")


@dataclass(frozen=True)
class DataConfig:
    """Sources to train on, backgrounds for composites, and validation data."""

    sources: tuple[SourceConfig, ...] = ()
    backgrounds: tuple[str, ...] = ()
    """Folders of images that foregrounds are composited onto."""
    validation: ValidationConfig | None = None
    copies_of: str | None = None
    """JSON list of the SHA-256 digests of the original files, if the data are reduced copies.

    Checkpoints record the originals as trained on, too.
    """


@dataclass(frozen=True)
class PairConfig(TrainSection, title="train: pairs:"):
    """How target and reference of a training sample are composed. Probabilities are in 0..1."""

    composite_probability: float = limited(0.5, 0, 1)
    """Probability that a photograph with an alpha is composited onto another background. Foregrounds always are."""
    same_image_probability: float = limited(0.2, 0, 1)
    """Probability that the reference is another view of the target's own image, although its group has other images."""
    distractor_probability: float = limited(0.5, 0, 1)
    """Probability that distractors (other objects) are pasted into the target.

    Then only the reference shows which object is meant.
    """
    max_distractors: int = limited(2)
    """Largest number of distractors."""
    reference_distractor_probability: float = limited(0.5, 0, 1)
    """Probability, in samples with distractors, that the first one is pasted into the reference too."""
    negative_probability: float = limited(0.1, 0, 1)
    """Probability that the target does not show the reference's object, so that its alpha is 0."""
    scribble_probability: float = limited(0.0, 0, 1)
    """Probability that a stroke inside the object replaces the mask of the reference."""
    point_probability: float = limited(0.0, 0, 1)
    """Probability that a spot inside the object replaces the mask of the reference."""
    mask_jitter_probability: float = limited(0.2, 0, 1)
    """Probability that the mask of the reference is slightly dilated, eroded or shifted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_total_probability("scribble_probability", "point_probability")

    @property
    def changes_pixels(self) -> bool:
        """Whether a sample's images may differ from the files."""
        return bool(self.composite_probability or self.distractor_probability or self.negative_probability)


@dataclass(frozen=True)
class AugmentConfig(TrainSection, title="train: augment:"):
    """Augmentation of reference and target, drawn independently. With all values 0 and zoom 1 images are unchanged."""

    flip: float = limited(0.5, 0, 1)
    """Probability of mirroring."""
    zoom: float = limited(1.6, 1)
    """Images are enlarged by up to this factor and cropped to the canvas; 1 keeps the whole image."""
    rotate_degrees: float = limited(10.0, 0, 180)
    """Largest rotation in either direction."""
    stretch: float = limited(0.1, 0, 0.9)
    """Largest relative change of aspect ratio and shear."""
    colour: float = limited(0.2, 0, 0.9)
    """Largest relative change of brightness, contrast, saturation and white balance."""
    jpeg: float = limited(0.3, 0, 1)
    """Probability of JPEG compression."""
    blur: float = limited(0.1, 0, 1)
    """Probability of blur."""
    noise: float = limited(0.2, 0, 1)
    """Probability of sensor noise."""

    @property
    def moves_pixels(self) -> bool:
        return bool(self.flip or self.zoom > 1 or self.rotate_degrees or self.stretch)

    @property
    def changes_pixels(self) -> bool:
        return self.moves_pixels or bool(self.colour or self.jpeg or self.blur or self.noise)


@dataclass(frozen=True)
class LossConfig(TrainSection, title="train: loss:"):
    """Weights of the losses of the stage "matte". A loss of weight 0 is not computed.

    The defaults are the published recipe.
    """

    unknown_l1: float = limited(1.0)
    """L1 over the trimap's unknown pixels."""
    known_l1: float = limited(1.0)
    """L1 over all other pixels."""
    known_smooth_l1: float = limited(1.0)
    """Smooth L1 over the known pixels of a binary sample. The edge of such a sample is not learned."""
    laplacian: float = limited(1.0)
    """L1 between Laplacian pyramids of five levels; needs images of 64 px or more."""
    gradient_penalty: float = limited(1.0)
    """L1 between Sobel gradients over the unknown pixels, and smoothness there."""
    cross_entropy: float = limited(0.0)
    """Binary cross-entropy, mean over the image; for binary samples, too."""
    dice: float = limited(0.0)
    """1 - Dice coefficient of the soft masks; for binary samples, too. 0 if nothing is foreground."""
    l1: float = limited(0.0)
    """L1, mean over the image; for binary samples, too."""
    binary_rule: BinaryRule = "binary"
    """Which samples count as binary. "binary": those in which each pixel is 0 or 1 (the paper). "constant": those in
    which all pixels are 0, or all are 1 (the released code). Of the published losses, only known_smooth_l1 applies to
    binary samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = [getattr(self, setting.name) for setting in dataclasses.fields(self) if "limits" in setting.metadata]
        if not any(weights):
            raise ConfigError("train: loss: all weights are 0, so nothing would be learned; expected one above 0")


@dataclass(frozen=True)
class MatchStageConfig(TrainSection, title="train: match:"):
    """Samples of the stages "match", "end-to-end" and "objects": mosaics of images.

    The reference's object is in one tile of a mosaic, in several, or in none. The stage "end-to-end" stores no views.
    For it, ``large_views_per_group`` only decides whether there are large images (0: none).
    """

    views_per_group: int = limited(12, 1)
    """Number of views of each group. A view is a random crop of an image, of canvas size. Its tokens are stored."""
    large_views_per_group: int = limited(0)
    """Number of further views of twice that size; 0: none.

    They are used for mosaics of one image and for half of the references, so that all mosaics have about the same
    number of tokens.
    """
    max_views_per_image: int = limited(3, 1)
    """Largest number of views of one image, for groups with few images."""
    rotate_every: int = limited(0)
    """Number of steps after which "match" and "objects" replace a part of every group's views. The new views show the
    next images of the group, and are encoded gradually during these steps. 0: views are never replaced."""
    rotation_parts: int = limited(4, 1)
    """Number of parts of the views; each rotation replaces one of them."""
    negative_probability: float = limited(0.2, 0, 1)
    """Probability that no tile shows the reference's object."""
    multiple_probability: float = limited(0.0, 0, 1)
    """Probability, if one of several tiles shows the object, that further tiles may show it too."""
    same_image_probability: float = limited(0.1, 0, 1)
    """Probability that the reference is another view of the target's own image, although its group has other images."""
    reference_count_weights: tuple[float, ...] = (1.0,)
    """Sampling weights of batches with one reference per mosaic, two, and so on."""
    layout_weights: tuple[float, ...] = (0.3, 0.4, 0.25, 0.05)
    """Sampling weights of mosaics of one image, two in a row, two in a column, and two by two."""
    presence_weight: float = limited(0.3)
    """Weight of the loss (cross-entropy) of the prediction whether the object is present."""
    feature_noise: float = limited(0.0)
    """Largest standard deviation of the noise added to the features that "match" and "objects" compare. The features
    themselves have a standard deviation of 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("layout_weights", len(self.layout_weights) == len(LAYOUTS), f"{len(LAYOUTS)} numbers")
        self.check_weights("layout_weights")
        self.check_weights("reference_count_weights")


@dataclass(frozen=True)
class ClickConfig(TrainSection, title="train: clicks:"):
    """Simulated clicks of the stage "objects". Probabilities are in 0..1."""

    count_weights: tuple[float, ...] = (0.2, 0.25, 0.2, 0.2, 0.15)
    """Sampling weights of batches without clicks, with one click, two, and so on. (1.0,) trains without clicks."""
    alone_probability: float = limited(0.3, 0, 1)
    """Probability, in batches with clicks, that there is no coarse alpha, so that the clicks alone select the object.
    """
    box_probability: float = limited(0.2, 0, 1)
    """Probability, in batches without a coarse alpha, that a box around the object precedes the clicks."""
    other_object_probability: float = limited(0.35, 0, 1)
    """Probability that the clicks select another object than the reference, in mosaics of several tiles."""
    corruption_probability: float = limited(0.5, 0, 1)
    """Probability that the alpha that the clicks correct is made worse: regions are added and removed."""
    corruption_logit: float = limited(5.0)
    """Strength of this corruption: the largest standard deviation of the noise that is added to the logit of an alpha.
    """
    centre_probability: float = limited(0.7, 0, 1)
    """Probability that a click is at the centre of the largest error, as in benchmarks, not anywhere in an error."""
    redundant_probability: float = limited(0.1, 0, 1)
    """Probability that a click is where the alpha is right already."""
    jitter: float = limited(0.01)
    """Standard deviation of a click's displacement, as a fraction of the long side."""
    miss_probability: float = limited(0.2, 0, 1)
    """Probability that a displaced click may miss the error that it corrects. Its label (object or not) stays."""
    stroke_probability: float = limited(0.15, 0, 1)
    """Probability that there is a stroke in place of a click: several points in the errors of the same prediction."""
    iou_weight: float = limited(0.5)
    """Weight of the squared error of the predicted IoU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weights("count_weights")


@dataclass(frozen=True)
class RefineStageConfig(TrainSection, title="train: refine:"):
    """Samples and losses of the stage "refine": crops of scenes with degraded true alphas as coarse alphas."""

    crop_px: int = limited(160, MIN_CROP_PX)
    """Side of a crop, in px of the canvas."""
    crops_per_image: int = limited(4, 1)
    token_probability: float = limited(0.35, 0, 1)
    """Probability that the coarse alpha is degraded like the output of a head that works on a grid of tokens."""
    object_probability: float = limited(0.0, 0, 1)
    """Probability that the coarse alpha is degraded like an object mask: a smooth outline without hair.

    All other coarse alphas have an outline that is displaced or blurred.
    """
    uncertain_probability: float = limited(0.5, 0, 1)
    """Probability that, in addition, the coarse alpha is uncertain in some regions, inside and outside the object."""
    predicted_probability: float = limited(0.7, 0, 1)
    """Probability, for sources with ``coarse``, that the alpha of the other model is used as the coarse alpha."""
    photograph_probability: float = limited(0.5, 0, 1)
    """Probability that an image with a soft alpha is used as it is, instead of a composite of its object."""
    edge_weight: float = limited(0.5, 0, 1)
    """Weight of pixels at the edge of an alpha that is not exact. Only alphas of composites are exact."""
    unknown_weight: float = limited(4.0, 1)
    """Weight of unknown pixels: those at edges, and those where the coarse alpha is wrong. Other pixels have weight 1.
    """
    l1: float = limited(1.0)
    cross_entropy: float = limited(0.5)
    gradient: float = limited(2.0)
    """Weight of the L1 between differences of neighbouring pixels."""
    laplacian: float = limited(0.05)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_total_probability("token_probability", "object_probability")
        if not any(getattr(self, name) for name in REFINE_LOSS_NAMES):
            raise ConfigError("train: refine: the weights of all losses are 0; expected one above 0")


@dataclass(frozen=True)
class TrainConfig(TrainSection, title="train:"):
    """The recipe. The defaults are those of the released code (Guo et al. 2024), with the paper's batch and steps."""

    stage: Literal["matte", "match", "end-to-end", "objects", "refine"] = "matte"
    """What is trained. "matte": the head, and the backbone if it is trainable, on pairs of images. "match": a
    token-match head on precomputed tokens, which is hundreds of times faster per sample. "end-to-end" (experimental,
    for GPUs): the token-match head and the backbone, on images. "objects": the object model, on the predictions of a
    trained head. "refine": the edges, which need no pairs."""
    minutes: float | None = limited(None, above=0)
    """If given, the run and its cosine schedule end after this many minutes of steps, instead of after ``steps``."""
    steps: int = limited(20_000, 1)
    batch_size: int = limited(8, 1)
    """Samples per step, over all processes."""
    micro_batch_size: int | None = limited(None, 1)
    """Samples that a process takes at a time; gradients are accumulated. Default: its whole part of the batch."""
    canvas_px: int = limited(768, 64)
    """Side of the square canvas to which reference and target are resized."""
    optimiser: Literal["adam", "adamw"] = "adam"
    learning_rate: float = limited(4e-4, above=0)
    """Learning rate of all parts except the backbone."""
    backbone_learning_rate: float = limited(0.0)
    """Learning rate of the backbone; 0 keeps it frozen."""
    weight_decay: float = limited(0.0)
    warmup_steps: int = limited(250)
    """Number of steps in which the learning rate grows linearly, from one millionth to its full value."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up; "cosine" falls to 0 at the end of the run."""
    clip_norm: float | None = limited(None, above=0)
    """Largest norm of the gradients of all weights together; larger gradients are scaled down."""
    ema_decay: float | None = limited(None, above=0, below=1)
    """Decay per step of the exponential moving average of the weights, which is validated and saved."""
    batch_norm: Literal["batch", "fixed"] = "batch"
    """Statistics that the head's BatchNorm layers use. "batch": those of each process's micro-batch, as published.
    "fixed": their running averages. The backbone always uses its running averages."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision."""
    seed: int = limited(0, 0, MAX_SEED)
    # Intervals in steps: lines of log.csv, images in TensorBoard, validation, saving of checkpoint and state.
    log_every: int = limited(10, 1)
    image_every: int = limited(500, 1)
    validate_every: int = limited(1000, 1)
    save_every: int = limited(500, 1)
    feature_cache_gb: float = limited(20.0)
    """Disk space for the features of a frozen backbone, if no augmentation changes pixels; 0: no cache."""
    loss: LossConfig = field(default_factory=LossConfig)
    pairs: PairConfig = field(default_factory=PairConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    match: MatchStageConfig = field(default_factory=MatchStageConfig)
    clicks: ClickConfig = field(default_factory=ClickConfig)
    refine: RefineStageConfig = field(default_factory=RefineStageConfig)
    trimap_kernel_px: int = limited(25, 1)
    """If the data have no trimaps, the unknown region is 0 < alpha < 1, dilated by a square of this side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        is_valid = self.stage != "refine" or self.refine.crop_px <= self.canvas_px
        self.refine.check("crop_px", is_valid, f"at most canvas_px, {self.canvas_px}")

    @property
    def unused_sections(self) -> list[str]:
        """The sections of the settings that this stage does not read."""
        return [section for section, stages in STAGE_SETTINGS.items() if self.stage not in stages]

    @property
    def changes_pixels(self) -> bool:
        """Whether the images of any sample may differ from the files."""
        return self.augment.changes_pixels or self.pairs.changes_pixels


@dataclass(frozen=True)
class Settings:
    """All settings that decide the result of a training run."""

    model: ModelConfig
    train: TrainConfig
    data: DataConfig

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-compatible mappings, which :func:`read_settings` reads back."""
        train, data = dataclasses.asdict(self.train), dataclasses.asdict(self.data)
        return json.loads(json.dumps({**self.model.as_dict(), "train": train, "data": data}))


def read_settings(config: str | Path, data: str | Path | None = None, overrides: Sequence[str] = ()) -> Settings:
    """Read settings from a YAML file (or a preset's name); ``--data`` and ``--set key=value`` take precedence.

    Keys of overrides are paths such as ``train.loss.dice``. An override of ``train.steps`` removes ``train.minutes`` of
    the file. Raises ConfigError, also for an override that the stage does not read, or UsageError for the data.
    """
    where, mapping = read_config_mapping(str(config))
    fields = dict(require_mapping(mapping, where))
    data_title = f"{where}: data"
    if data is not None:
        fields["data"] = _read_data_file(Path(data))
        data_title = f"data file {data}"
    names = [override.partition("=")[0] for override in overrides]
    _check_sections(names, {**fields, "train": dataclasses.asdict(TrainConfig())})
    if "train.steps" in names and "train.minutes" not in names:
        overrides = ["train.minutes=null", *overrides]
    for override in overrides:
        fields = _apply_override(fields, override)
    if names:
        where = f"{where} with --set"
    reject_unknown_keys(fields, MODEL_KEYS, where)
    model = parse_model_config({key: fields[key] for key in MODEL_SECTIONS if key in fields}, where)
    train = parse_dataclass(TrainConfig, fields.get("train") or {}, f"{where}: train")
    _check_overrides_are_read(names, train)
    return Settings(model, train, _parse_data(fields.get("data"), data_title))


def _check_sections(names: Sequence[str], known: Mapping[str, Any]) -> None:
    """Raise ConfigError for an overridden setting whose first section is unknown, such as "steps".

    ``known``: nested mappings with the settings to suggest.
    """
    paths = {path.partition(".")[2]: path for path in _list_paths(known)}
    for name in names:
        section = name.split(".")[0]
        if section in {*MODEL_KEYS, ""}:
            continue
        similar = next((path for path in paths if path == name or path.endswith(f".{name}")), "")
        if not similar and not find_similar_name(section, MODEL_KEYS):  # else the section is misspelt
            similar = find_similar_name(name, paths)
        suggestion = f"Did you mean {paths[similar]!r}?" if similar else did_you_mean(section, MODEL_KEYS)
        raise ConfigError(f"--set {name}: unknown key. {suggestion}")


def _list_paths(settings: Mapping[str, Any], start: str = "") -> Iterator[str]:
    """Yield the paths of all settings and sections of nested mappings, such as "train.steps"."""
    for key, value in settings.items():
        yield f"{start}{key}"
        if isinstance(value, Mapping):
            yield from _list_paths(value, f"{start}{key}.")


def _check_overrides_are_read(names: Sequence[str], train: TrainConfig) -> None:
    """Raise ConfigError for an overridden setting that the stage does not read."""
    for name, section in itertools.product(names, train.unused_sections):
        if name == section or name.startswith(f"{section}."):
            stages = " and ".join(STAGE_SETTINGS[section])
            raise ConfigError(
                f"--set {name} has no effect: train.stage is {train.stage}, and {section} is only for {stages}; omit it"
            )


def read_data(path: str | Path) -> DataConfig:
    """Read a data file, as ``--data`` takes it. Raises UsageError."""
    return _parse_data(_read_data_file(Path(path)), f"data file {path}")


def _read_data_file(path: Path) -> object:
    """Return the content of a data file. Raises UsageError."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), f"data file {path}")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"data file {path} cannot be read: {reason}; {EXPECTED_DATA}") from error
    except ConfigError as error:
        raise UsageError(f"{error}; docs/train.md shows a data file") from error


def _parse_data(content: object, where: str) -> DataConfig:
    """Convert the section "data". Raises UsageError."""
    try:
        return parse_dataclass(DataConfig, {} if content is None else content, where)
    except ConfigError as error:
        raise UsageError(str(error)) from error


def list_differences(before: Mapping[str, Any], after: Mapping[str, Any], path: str = "") -> list[str]:
    """Return the differences of two mappings of settings, one line each: "train.steps: 100 -> 200"."""
    lines = []
    for key in dict.fromkeys((*before, *after)):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += list_differences(old, new, f"{path}{key}.")
        elif old != new:
            lines.append(f"{path}{key}: {old!r} -> {new!r}")
    return lines


def _apply_override(fields: Mapping[str, Any], override: str) -> dict[str, Any]:
    """Return a copy of nested mappings with one "a.b=value" applied."""
    path, equals, text = override.partition("=")
    *sections, name = path.split(".")
    if not equals or not all([*sections, name]):
        raise ConfigError(f"--set {override} cannot be parsed; expected key=value, as in --set train.steps=500")
    value = parse_yaml(text, f"--set {override}: the value")
    if isinstance(value, str) and value.isascii():  # float() also reads digits of other scripts
        with contextlib.suppress(ValueError):  # YAML reads 1e-3 as text
            value = float(value)
    changed: dict[str, Any] = dict(fields)
    target = changed
    for section in sections:
        settings = target.get(section) or {}
        if not isinstance(settings, Mapping):
            raise ConfigError(f"--set {override}: {section!r} has no settings below it")
        target[section] = dict(settings)
        target = target[section]
    target[name] = value
    return changed
