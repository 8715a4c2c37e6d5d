"""Settings of training: frozen dataclasses, read strictly from the same YAML file as the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from icm_cli.config import (
    COMPONENT_KEYS,
    MODEL_KEYS,
    ModelConfig,
    parse_dataclass,
    parse_model_config,
    read_config_mapping,
    read_yaml,
    reject_unknown_keys,
    require_mapping,
)
from icm_cli.datasets.registry import DATASETS, Size, Split
from icm_cli.errors import ConfigError, did_you_mean
from icm_cli.training.losses import LossConfig

CUTOUTS = "cutouts"
"""A source that is a folder of RGBA foregrounds."""
LAYOUTS = 4
"""Mosaics that the stage "match" knows."""
LEAST_CROP_PX = 64
REFINE_TERMS = ("l1", "cross_entropy", "gradient", "laplacian")
"""Losses of the stage "refine", by the names of their weights."""
LARGEST_SEED = 1 << 62
"""Largest seed of a random generator, with room for the step to be added."""


@dataclass(frozen=True)
class FilesConfig:
    """A place of images with alphas; fields as the options of ``icm eval``, paths relative to the working directory."""

    dataset: str = "folder"
    """A dataset of ``icm eval`` (``root`` is its folder), or ``folder`` (``images`` and ``alphas``)."""
    root: str | None = None
    images: str | None = None
    alphas: str | None = None
    trimaps: str | None = None
    groups: str | None = None
    """JSON file that says which images show the same thing."""

    @property
    def patterns(self) -> dict[str, Any]:
        """Arguments of ``datasets.registry.find`` and ``icm_cli.evaluate`` beside the dataset's name and root."""
        return {"images": self.images, "alphas": self.alphas, "trimaps": self.trimaps, "groups": self.groups}


@dataclass(frozen=True)
class SourceConfig(FilesConfig):
    """Some images to train on; ``dataset`` may also be ``cutouts``: RGBA foregrounds, those of a subfolder a group."""

    split: Split | None = None
    """Without it the train split, or the only one."""
    group_by: Literal["group", "image"] = "group"
    """"image": every image is a group of its own, so its pairs are two views of it."""
    binary: bool = False
    """The alphas are masks of 0 and 255, and stay so whatever is done to the images."""
    exclude: tuple[str, ...] = ()
    """Globs of names that are left out."""
    classes: str | None = None
    """JSON file that says what each group shows: the folder of its pictures (its last parts will do) to one class or a
    list of them. A picture that is to show something else has no class of the reference's group, across all sources."""
    coarse: str | None = None
    """Folder of the alphas that a first stage made of these images, as ``icm eval --save-alphas`` writes them: the
    stage "refine" learns to mend them, beside those it makes from the true ones."""
    soften_px: float = 0.0
    """Standard deviation of the blur that hard masks get, in px of the file; half-way values become part of an edge."""
    weight: float = 1.0
    """Share of the samples, in proportion to the other sources' weights."""
    licence: str = ""
    """Recorded in every checkpoint."""

    def __post_init__(self) -> None:
        known = {*DATASETS, CUTOUTS}
        if self.dataset not in known:
            raise ConfigError(f"data: unknown dataset {self.dataset!r}. {did_you_mean(self.dataset, known)}")
        if self.soften_px < 0 or (self.soften_px and self.binary):
            raise ConfigError(
                f"data: soften_px of {self.title} is {self.soften_px}; expected 0 or more, and 0 for binary masks"
            )
        if not self.weight > 0:
            raise ConfigError(f"data: weight of {self.title} is {self.weight}; expected more than 0")

    @property
    def title(self) -> str:
        """Name in messages."""
        where = self.root or self.images
        return f"{self.dataset} ({where})" if where else self.dataset


@dataclass(frozen=True)
class ValidationConfig(FilesConfig):
    """Dataset that ``icm eval`` scores while the model learns."""

    split: Split = "test"
    size: Size | None = None
    rounds: int = 1

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise ConfigError(
                f"data: validation: unknown dataset {self.dataset!r}. {did_you_mean(self.dataset, DATASETS)}"
            )
        if self.rounds < 1:
            raise ConfigError(f"data: validation: rounds is {self.rounds}; expected 1 or more")


@dataclass(frozen=True)
class DataConfig:
    """A mixture of sources, backgrounds for foregrounds, and what to validate on."""

    sources: tuple[SourceConfig, ...] = ()
    backgrounds: tuple[str, ...] = ()
    """Folders of pictures to put foregrounds on."""
    validation: ValidationConfig | None = None
    copies_of: str | None = None
    """JSON list of the SHA-256 of the files that these are copies of; checkpoints record them as seen, too."""


@dataclass(frozen=True)
class PairConfig:
    """Composition of a training sample; shares are 0..1."""

    composite_share: float = 0.5
    """Share of photographs with alphas whose thing is put on another background. Foregrounds always are."""
    same_image_share: float = 0.2
    """The reference is another view of the target's own image, though the group has others."""
    distractor_share: float = 0.5
    """Other things are pasted into the target, so that only the reference tells what is wanted."""
    distractors: int = 2
    """At most so many."""
    reference_distractor_share: float = 0.5
    """Share of samples with distractors whose first one is pasted into the reference too."""
    negative_share: float = 0.1
    """The reference's thing is not in the target, whose alpha is 0."""
    scribble_share: float = 0.0
    """The guidance is a stroke inside the thing instead of its mask."""
    point_share: float = 0.0
    """The guidance is a spot inside the thing."""
    mask_jitter: float = 0.2
    """Guidance masks that are grown, shrunk or shifted by a little."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if name != "distractors" and not 0 <= value <= 1:
                raise ConfigError(f"train: pairs: {name} is {value}; expected 0 to 1")
        if self.scribble_share + self.point_share > 1:
            raise ConfigError("train: pairs: scribble_share and point_share are above 1 together; expected at most 1")
        if self.distractors < 0:
            raise ConfigError(f"train: pairs: distractors is {self.distractors}; expected 0 or more")

    @property
    def changes_pixels(self) -> bool:
        """Whether a sample's pictures may be anything but the files' own."""
        return bool(self.composite_share or self.distractor_share or self.negative_share)


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of reference and target, independently; all 0 leaves the pictures as they are."""

    flip: float = 0.5
    """Share that is mirrored."""
    zoom: float = 1.6
    """Pictures are enlarged by up to this factor over the canvas and a part of it is taken; 1 takes the whole."""
    rotate_degrees: float = 10.0
    """Turned by up to this much either way."""
    stretch: float = 0.1
    """Aspect ratio and shear are changed by up to this share."""
    colour: float = 0.2
    """Brightness, contrast, saturation and white balance are changed by up to this share."""
    jpeg: float = 0.3
    """Share that is compressed."""
    blur: float = 0.1
    """Share that is blurred."""
    noise: float = 0.2
    """Share that gets sensor noise."""

    def __post_init__(self) -> None:
        for name in ("flip", "jpeg", "blur", "noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"train: augment: {name} is {getattr(self, name)}; expected 0 to 1")
        for name, most in (("rotate_degrees", 180.0), ("stretch", 0.9), ("colour", 0.9)):
            if not 0 <= getattr(self, name) <= most:
                raise ConfigError(f"train: augment: {name} is {getattr(self, name)}; expected 0 to {most:g}")
        if self.zoom < 1:
            raise ConfigError(f"train: augment: zoom is {self.zoom}; expected 1 or more")

    @property
    def moves_pixels(self) -> bool:
        return bool(self.flip or self.zoom > 1 or self.rotate_degrees or self.stretch)

    @property
    def changes_pixels(self) -> bool:
        return self.moves_pixels or bool(self.colour or self.jpeg or self.blur or self.noise)


@dataclass(frozen=True)
class MatchConfig:
    """Samples of the stages "match", "joint" and "objects": mosaics of pictures, of which one has the reference's
    thing, or none, or several have.

    "joint" keeps no views: of their numbers it only asks whether ``large_views`` is 0.
    """

    views: int = 12
    """Pictures of a group whose tokens are read, at the canvas' size; drawn by the seed."""
    large_views: int = 0
    """Pictures of a group whose tokens are read at twice that size as well: they are the mosaics of one picture and
    half of the references, so that all mosaics have about as many tokens. 0: none."""
    most_views: int = 3
    """Most views of one picture, where a group has few."""
    rotate_every: int = 0
    """Steps after which "match" and "objects" replace a part of every group's views by views of its next images, so
    that in time all images are used. The next part is read bit by bit during these steps. 0: never."""
    rotation_parts: int = 4
    """Number of parts of the views: each rotation replaces one of them."""
    negative_share: float = 0.2
    """The reference's thing is in none of the pictures."""
    several_share: float = 0.0
    """In mosaics of several pictures where one shows the thing, others may show it too."""
    same_image_share: float = 0.1
    """The reference is another view of the target's own picture, though its group has others."""
    reference_shares: tuple[float, ...] = (1.0,)
    """Shares of batches whose mosaics have one reference, two, and so on."""
    layout_shares: tuple[float, ...] = (0.3, 0.4, 0.25, 0.05)
    """Shares of mosaics of one picture, of two side by side, of two one above the other, and of four."""
    presence: float = 0.3
    """Weight of the cross-entropy of whether the thing is there."""
    live_blocks: int = 0
    """Last blocks of the backbone's transformer that learn with the head in the stage "match", at ``backbone_rate``,
    from the tokens that enter them; 0: none. For the dinov2-lite backbone."""
    feature_noise: float = 0.0
    """Largest standard deviation of noise on the features that "match" and "objects" compare, whose own is 1."""
    kept_px: int = 512
    """Long side, at most, at which "joint" keeps every picture on the training device."""

    def __post_init__(self) -> None:
        for name in ("views", "most_views", "rotation_parts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train: match: {name} is {getattr(self, name)}; expected 1 or more")
        for name in ("large_views", "rotate_every", "live_blocks", "presence", "feature_noise"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train: match: {name} is {getattr(self, name)}; expected 0 or more")
        for name in ("negative_share", "several_share", "same_image_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"train: match: {name} is {getattr(self, name)}; expected 0 to 1")
        if len(self.layout_shares) != LAYOUTS or min(self.layout_shares) < 0 or not sum(self.layout_shares):
            raise ConfigError(
                f"train: match: layout_shares is {list(self.layout_shares)}; expected {LAYOUTS} numbers, none below 0 "
                "and not all 0"
            )
        if not self.reference_shares or min(self.reference_shares) < 0 or not sum(self.reference_shares):
            raise ConfigError(
                f"train: match: reference_shares is {list(self.reference_shares)}; expected one number or more, none "
                "below 0 and not all 0"
            )
        if self.kept_px < LEAST_CROP_PX or self.kept_px % 4:
            raise ConfigError(
                f"train: match: kept_px is {self.kept_px}; expected a multiple of 4 of at least {LEAST_CROP_PX}"
            )


@dataclass(frozen=True)
class RefineConfig:
    """Samples of the stage "refine": crops of scenes on the canvas, with coarse alphas made from the true ones."""

    crop_px: int = 160
    """Side of a crop, in px of the canvas."""
    crops: int = 4
    """Crops of a scene."""
    token_share: float = 0.35
    """Share of the coarse alphas that are as a grid of tokens tells them."""
    object_share: float = 0.0
    """Share of the coarse alphas that are smooth outlines of whole things, without their hair, as objects tell them;
    what is left of both shares are outlines nearly right."""
    doubt_share: float = 0.5
    """Share of the coarse alphas that are unsure of whole parts besides, in the thing and beside it."""
    made_share: float = 0.7
    """Share of the first stage's own alphas as coarse ones, where a source has them (``coarse``)."""
    again_share: float = 0.0
    """Share of the batches that are a second look, at the network's own answer, enlarged as the edges' ``again``."""
    photograph_share: float = 0.5
    """Share of pictures with soft alphas that are shown as they are, not as composites."""
    band_weight: float = 0.5
    """Weight of pixels at the edge of an alpha that is not exact: any but a composite's."""
    open_weight: float = 4.0
    """Weight of pixels that are to be decided, at edges and where the coarse alpha is wrong, beside 1 of the others."""
    l1: float = 1.0
    cross_entropy: float = 0.5
    gradient: float = 2.0
    """Weight of the L1 between differences of neighbouring pixels."""
    laplacian: float = 0.05

    def __post_init__(self) -> None:
        if self.crop_px < LEAST_CROP_PX:
            raise ConfigError(f"train: refine: crop_px is {self.crop_px}; expected {LEAST_CROP_PX} or more")
        if self.crops < 1:
            raise ConfigError(f"train: refine: crops is {self.crops}; expected 1 or more")
        shares = ("token_share", "object_share", "doubt_share", "made_share", "again_share", "photograph_share")
        for name in (*shares, "band_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"train: refine: {name} is {getattr(self, name)}; expected 0 to 1")
        if self.token_share + self.object_share > 1:
            raise ConfigError(
                f"train: refine: token_share and object_share are {self.token_share} and {self.object_share}; expected "
                "at most 1 together"
            )
        if self.open_weight < 1:
            raise ConfigError(f"train: refine: open_weight is {self.open_weight}; expected 1 or more")
        weights = [getattr(self, name) for name in REFINE_TERMS]
        if min(weights) < 0 or not any(weights):
            raise ConfigError(f"train: refine: the losses' weights are {weights}; expected 0 or more, and not all 0")


@dataclass(frozen=True)
class TrainConfig:
    """The recipe; the defaults are the released code's (Guo et al. 2024), with the paper's batch and steps."""

    stage: Literal["matte", "match", "joint", "objects", "refine"] = "matte"
    """Part that learns: "matte", head and, where it may, backbone, on pairs of pictures; "match", a token-match head
    on the tokens of pictures, hundreds of times cheaper a sample; "joint", such a head and, where it may, the backbone,
    on the same mosaics, of pictures made anew on the training device; "objects", what makes things whole, by what a
    trained head answers on the mosaics of "match"; "refine", the edges, which need no pairs."""
    minutes: float | None = None
    """The run ends, and a cosine with it, when so many minutes of steps have passed, instead of after ``steps``."""
    steps: int = 20_000
    batch_size: int = 8
    """Samples a step, over all processes."""
    micro_batch_size: int | None = None
    """Samples that a process takes at a time; gradients are accumulated over as many as make a batch."""
    canvas_px: int = 768
    """Side of the square canvas that reference and target are brought to."""
    optimiser: Literal["adam", "adamw"] = "adam"
    rate: float = 4e-4
    """Learning rate of the head."""
    backbone_rate: float = 0.0
    """Learning rate of the backbone; 0 keeps it frozen."""
    weight_decay: float = 0.0
    warmup_steps: int = 250
    """The rate grows linearly from 1e-6 of itself."""
    decay: Literal["constant", "cosine"] = "constant"
    """After the warm-up; "cosine" falls to 0 at the last step."""
    clip_norm: float | None = None
    """Largest norm of all gradients together."""
    ema: float | None = None
    """Decay a step of the running mean of the weights, which is then what is validated and saved."""
    batch_norm: Literal["batch", "fixed"] = "batch"
    """"batch": the head's BatchNorm takes the statistics of each process's micro-batch, as published; "fixed": its
    running ones. A backbone's are always fixed."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision."""
    seed: int = 0
    log_every: int = 10
    image_every: int = 500
    validate_every: int = 1000
    save_every: int = 500
    feature_cache_gb: float = 20.0
    """Room on disk for a frozen backbone's features, where no augmentation changes pixels; 0 keeps none."""
    loss: LossConfig = field(default_factory=LossConfig)
    pairs: PairConfig = field(default_factory=PairConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    match: MatchConfig = field(default_factory=MatchConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    trimap_kernel: int = 25
    """Side in px of the square that dilates 0 < alpha < 1 to the unknown region where no trimap is given."""

    def __post_init__(self) -> None:
        at_least = {"steps": 1, "batch_size": 1, "canvas_px": 64, "log_every": 1, "image_every": 1, "trimap_kernel": 1}
        at_least |= {"validate_every": 1, "save_every": 1, "warmup_steps": 0, "rate": 0, "backbone_rate": 0}
        at_least |= {"weight_decay": 0, "feature_cache_gb": 0, "seed": 0}
        if self.seed >= LARGEST_SEED:
            raise ConfigError(f"train: seed is {self.seed}; expected less than {LARGEST_SEED}")
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ConfigError(f"train: {name} is {getattr(self, name)}; expected {least} or more")
        if self.minutes is not None and self.minutes <= 0:
            raise ConfigError(f"train: minutes is {self.minutes}; expected more than 0")
        if self.stage == "refine" and self.refine.crop_px > self.canvas_px:
            raise ConfigError(
                f"train: refine: crop_px is {self.refine.crop_px}; expected at most canvas_px, {self.canvas_px}"
            )
        if self.stage == "match" and bool(self.match.live_blocks) != bool(self.backbone_rate):
            raise ConfigError(
                f"train: backbone_rate is {self.backbone_rate} and match: live_blocks {self.match.live_blocks}; "
                "expected both above 0, or both 0"
            )
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ConfigError(f"train: micro_batch_size is {self.micro_batch_size}; expected 1 or more")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError(f"train: clip_norm is {self.clip_norm}; expected more than 0")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"train: ema is {self.ema}; expected between 0 and 1")

    @property
    def changes_pixels(self) -> bool:
        """Whether any sample's pictures may be anything but the files' own."""
        return self.augment.changes_pixels or self.pairs.changes_pixels


@dataclass(frozen=True)
class Settings:
    """All of a training run that decides its result."""

    model: ModelConfig
    train: TrainConfig
    data: DataConfig

    def as_dict(self) -> dict[str, Any]:
        """The mapping that :func:`read_settings` reads back to equal settings, as JSON takes it."""
        plain: dict[str, Any] = _plain(
            {**self.model.as_dict(), "train": dataclasses.asdict(self.train), "data": dataclasses.asdict(self.data)}
        )
        return plain


def read_settings(config: str | Path, data: str | Path | None = None, overrides: Sequence[str] = ()) -> Settings:
    """Settings of a YAML file (or a preset's name), with ``--data`` and ``--set key=value`` laid over it.

    Keys of overrides are paths such as ``train.loss.dice``. Raises ConfigError.
    """
    where, mapping = read_config_mapping(str(config))
    fields = dict(require_mapping(mapping, where))
    if data is not None:
        fields["data"] = read_yaml(Path(data))
    for override in overrides:
        fields = _overridden(fields, override)
    reject_unknown_keys(fields, MODEL_KEYS, where)
    model = parse_model_config({key: fields[key] for key in COMPONENT_KEYS if key in fields}, where)
    return Settings(
        model,
        parse_dataclass(TrainConfig, fields.get("train") or {}, f"{where}: train"),
        parse_dataclass(DataConfig, fields.get("data") or {}, f"{data or where}: data" if data is None else str(data)),
    )


def read_data(path: str | Path) -> DataConfig:
    """The data of a YAML file, as ``--data`` takes it. Raises ConfigError."""
    return parse_dataclass(DataConfig, read_yaml(Path(path)), str(path))


def differences(before: Mapping[str, Any], after: Mapping[str, Any], path: str = "") -> list[str]:
    """Differences of two mappings of settings, one line each: "train.rate: 0.001 -> 0.002"."""
    lines = []
    for key in dict.fromkeys((*before, *after)):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{path}{key}.")
        elif old != new:
            lines.append(f"{path}{key}: {old!r} -> {new!r}")
    return lines


def _overridden(fields: Mapping[str, Any], override: str) -> dict[str, Any]:
    """A copy of nested mappings with one "a.b=value" laid over it."""
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(f"--set {override} is not understood; expected key=value, as in --set train.steps=500")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: its value is not YAML ({' '.join(str(error).split())})") from error
    if isinstance(value, str) and _is_number(value):
        value = float(value)  # YAML takes 1e-3 for text
    keys = path.split(".")
    changed: dict[str, Any] = dict(fields)
    inner = changed
    for key in keys[:-1]:
        below = inner.get(key) or {}
        if not isinstance(below, Mapping):
            raise ConfigError(f"--set {override}: {key!r} has no settings below it")
        inner[key] = inner = dict(below)  # (assigned left to right: the entry, then the place)
    inner[keys[-1]] = value
    return changed


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
