"""Model configurations: frozen dataclasses that are read from YAML, and the presets of the package."""

from __future__ import annotations

import dataclasses
import importlib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml

from icm_cli.errors import ConfigError, UsageError, did_you_mean, quote_value

ComponentKind = Literal["backbone", "head", "objects", "edges"]
T = TypeVar("T")
TRAINING_KEYS = ("train", "data")
"""Sections of a configuration file that only ``icm train`` reads."""
COMPONENT_KEYS: tuple[ComponentKind, ...] = ("backbone", "head", "objects", "edges")
"""Sections of a configuration file that define the model."""
PASS_KEYS = ("second_pass", "match", "guided_filter")
"""Optional sections of a configuration file for the passes around the components."""
MODEL_SECTIONS = (*COMPONENT_KEYS, *PASS_KEYS)
"""Sections of a configuration file that :func:`parse_model_config` reads."""
MODEL_KEYS = {*MODEL_SECTIONS, *TRAINING_KEYS}
"""All sections of a configuration file."""
MERGE_TAG = "tag:yaml.org,2002:merge"
"""Tag of the YAML key ``<<``, which copies the keys of another mapping."""
COMPONENTS: dict[ComponentKind, dict[str, str]] = {
    "backbone": {
        "dinov2-lite": "lite.backbone:DinoV2Lite",
        "efficientnet-lite": "lite.efficientnet:EfficientNetLite",
        "dino": "hub.dino:Dino",
        "stable-diffusion": "stable_diffusion.backbone:StableDiffusion",
    },
    "head": {
        "token-match": "lite.head:TokenMatchHead",
        "detail": "stable_diffusion.detail_head:DetailHead",
        "training-free": "training_free.head:TrainingFree",
    },
    "objects": {"mobile-sam": "lite.mobile_sam:MobileSam"},
    "edges": {
        "refine": "lite.refiner:Refine",
        "vitmatte": "hub.vitmatte:VitMatteEdges",
        "closed-form": "training_free.closed_form:ClosedForm",
    },
}
"""Registry of model components: section -> ``name`` in a configuration -> ``module:Class`` below ``icm_cli.model``.

A new component is a module there with a subclass of its contract (see ``icm_cli.model.contracts``), and a line here.
"""


@dataclass(frozen=True)
class Limits:
    """Range of a setting. ``least`` and ``most`` are allowed values, ``above`` and ``below`` are not.

    With ``multiple``, only its multiples from ``multiple`` on are allowed.
    """

    least: float
    most: float
    above: float | None = None
    below: float | None = None
    multiple: int | None = None

    def contains(self, value: float) -> bool:
        if self.multiple is not None and (value < self.multiple or value % self.multiple):
            return False
        if (self.above is not None and not value > self.above) or (self.below is not None and not value < self.below):
            return False
        return self.least <= value <= self.most

    @property
    def description(self) -> str:
        """The allowed values, such as "0 to 1" or "more than 0"."""
        if self.multiple is not None:
            return f"a multiple of {self.multiple}" + (f", at most {self.most:g}" if self.most < math.inf else "")
        if self.above is not None and self.below is not None:
            return f"between {self.above:g} and {self.below:g}"
        if self.above is not None:
            return f"more than {self.above:g}" + (f" and at most {self.most:g}" if self.most < math.inf else "")
        if self.below is not None:
            return f"{self.least:g} to below {self.below:g}"
        return f"{self.least:g} to {self.most:g}" if self.most < math.inf else f"{self.least:g} or more"


def limited(
    default: Any,
    least: float = 0,
    most: float = math.inf,
    *,
    above: float | None = None,
    below: float | None = None,
    multiple: int | None = None,
) -> Any:
    """Define a field of a :class:`Section` whose value must be None or inside the :class:`Limits`."""
    return dataclasses.field(default=default, metadata={"limits": Limits(least, most, above, below, multiple)})


@dataclass(frozen=True)
class Section:
    """Base class of settings. Values outside the limits of their field raise ConfigError."""

    def __init_subclass__(cls, title: str) -> None:
        """``title``: start of the messages about a setting of the section."""
        cls.title = title

    title: ClassVar[str]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, limits = getattr(self, field.name), field.metadata.get("limits")
            if limits is not None and value is not None:
                self.check(field.name, limits.contains(value), limits.description)

    def check(self, name: str, is_valid: bool, expected: str) -> None:
        """Raise ConfigError that names the setting and the expected values, unless ``is_valid``."""
        if not is_valid:
            value = getattr(self, name)
            shown = list(value) if isinstance(value, tuple) else value
            raise ConfigError(f"{self.title} {name} is {shown}; expected {expected}")


def require_mapping(value: object, where: str) -> Mapping[str, Any]:
    """Return a section of a configuration; raise ConfigError if it is not a mapping."""
    if isinstance(value, Mapping):
        return value
    shown = "empty" if value is None else repr(value)
    raise ConfigError(f"{where} is {shown}; expected keys with values")


def reject_unknown_keys(fields: Mapping[str, object], known: set[str], where: str) -> None:
    """Raise ConfigError for the first key that is not in ``known``, and suggest the nearest known key."""
    for key in fields:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}. {did_you_mean(str(key), known)}")


@dataclass(frozen=True)
class ComponentConfig:
    """A component of the model: a backbone, head, objects or edges."""

    name: str
    """Name of the component in :data:`COMPONENTS`."""
    settings: Any
    """Settings of the component, an instance of its class's ``Config``."""


@dataclass(frozen=True)
class CropSettings:
    """Rules for a crop around an object. If the crop cuts the object, a larger crop is matted."""

    margin: float = 0.175
    """Margin around the object, as a fraction of the object's longer side."""
    min_side: float = 0.2
    """Smallest height and width of a crop, as fractions of the frame's height and width."""
    cut_fraction: float = 0.02
    """A side of a crop cuts the object if at least this fraction of its pixels belongs to the object."""
    growth: float = 0.5
    """Enlargement at a side that cuts the object, as a fraction of the crop's height or width."""
    max_crops: int = 4
    """Largest number of crops per frame, each larger than the one before."""


@dataclass(frozen=True)
class SecondPassConfig:
    """Second pass over a crop, for targets in which the presence of the object is uncertain."""

    crop: CropSettings = CropSettings(margin=0.25, min_side=0.1, max_crops=3)
    max_area: float = 0.9
    """Largest area of a crop, as a fraction of the frame's: a larger crop shows no more than the frame does."""
    fade: float = 0.05
    """The alpha of a crop fades to 0 over this fraction of the crop's side, so that no border is visible."""


@dataclass(frozen=True)
class MatchConfig(Section, title="match"):
    """How similar an object must be to the object of the references."""

    rule: Literal["kind", "same"] = "kind"
    """``kind``: objects of the same kind are matted. ``same``: of these, only objects that look like the same
    instance: the same species, model or individual. It needs a head with ``can_compare_objects``."""
    min_similarity: float = limited(0.7, -1, 1)
    """For ``same``: smallest similarity to a reference, see ``icm_cli.model.contracts.ObjectTokens``."""
    max_difference: float = limited(0.1, 0, 2)
    """For ``same``: largest difference from the most similar object in the image."""


@dataclass(frozen=True)
class GuidedFilterConfig:
    """Guided filter that enlarges alphas to the size of their source, along the edges of the image."""

    radius_px: int = 2
    """Radius of the window, in pixels of the alpha before it is enlarged."""
    epsilon: float = 1e-4
    """Regularisation: variance of a colour channel in 0..1 above which a window counts as an edge."""


@dataclass(frozen=True)
class ModelConfig:
    """Components of a :class:`~icm_cli.model.core.InContextMatting`."""

    backbone: ComponentConfig
    head: ComponentConfig
    edges: ComponentConfig | None = None
    """Component that refines the edges at the size of the source; without it, a guided filter is used."""
    objects: ComponentConfig | None = None
    """Component that completes the objects of a coarse alpha before their edges are refined."""
    second_pass: SecondPassConfig = SecondPassConfig()
    """Second pass where the presence of the object is uncertain; used by models with edges."""
    match: MatchConfig = MatchConfig()
    """Which of the completed objects are kept."""
    guided_filter: GuidedFilterConfig = GuidedFilterConfig()
    """Enlarges the head's alpha to the size of the source; used by models without edges."""

    @property
    def title(self) -> str:
        """Names of all components, such as "dinov2-lite + token-match + mobile-sam + refine"."""
        parts = (self.backbone, self.head, self.objects, self.edges)
        return " + ".join(part.name for part in parts if part is not None)

    def has_components_of(self, other: ModelConfig) -> bool:
        """Return whether weights of ``other`` fit: its components are equal. The sections PASS_KEYS may differ."""
        return all(getattr(self, kind) == getattr(other, kind) for kind in COMPONENT_KEYS)

    def as_dict(self) -> dict[str, Any]:
        """Return a mapping that :func:`parse_model_config` converts back to an equal configuration."""
        components = {
            kind: {"name": part.name, **dataclasses.asdict(part.settings)}
            for kind in COMPONENT_KEYS
            if (part := getattr(self, kind)) is not None
        }
        return components | {key: dataclasses.asdict(getattr(self, key)) for key in PASS_KEYS}


def component_class(kind: ComponentKind, name: str) -> Any:
    """Import and return the class of a component, such as ``component_class("head", "token-match")``.

    Raises ConfigError.
    """
    registered = COMPONENTS[kind]
    if name not in registered:
        raise ConfigError(
            f"{kind} {name!r} is unknown. {did_you_mean(name, registered)} A new {kind} needs an entry in COMPONENTS "
            f"in {__file__}, see CONTRIBUTING.md"
        )
    module_name, _, class_name = registered[name].partition(":")
    module = f"icm_cli.model.{module_name}"
    try:
        component = getattr(importlib.import_module(module), class_name, None)
    except ImportError as error:
        problem = f"{module} cannot be imported ({error})"
    else:
        problem = f"{module} has no class {class_name!r}" if component is None else _describe_defect(component)
    if problem:
        raise ConfigError(
            f"{kind} {name!r} is registered as {registered[name]!r}, but {problem}; correct the class, or its entry in "
            f"COMPONENTS in {__file__}"
        )
    return component


def _describe_defect(component: type) -> str:
    """Return what the class of a component lacks; "" if it is complete."""
    missing_methods = ", ".join(sorted(getattr(component, "__abstractmethods__", ())))
    if missing_methods:
        return f"the class does not define {missing_methods}"
    if not dataclasses.is_dataclass(getattr(component, "Config", None)):
        return "the class has no dataclass 'Config' for its settings"
    return ""


def parse_model_config(mapping: object, where: str) -> ModelConfig:
    """Convert a mapping with the sections of a model, from the file or checkpoint ``where``.

    Raises ConfigError for a section or key that is missing, unknown or invalid.
    """
    fields = require_mapping(mapping, where)
    reject_unknown_keys(fields, set(MODEL_SECTIONS), where)
    edges, objects = fields.get("edges"), fields.get("objects")
    if objects is not None and edges is None:
        raise ConfigError(f"{where}: section 'objects' needs a section 'edges'; add one, or remove 'objects'")
    return ModelConfig(
        backbone=_parse_component("backbone", fields.get("backbone"), f"{where}: backbone"),
        head=_parse_component("head", fields.get("head"), f"{where}: head"),
        edges=None if edges is None else _parse_component("edges", edges, f"{where}: edges"),
        objects=None if objects is None else _parse_component("objects", objects, f"{where}: objects"),
        second_pass=parse_dataclass(SecondPassConfig, fields.get("second_pass", {}), f"{where}: second_pass"),
        match=parse_dataclass(MatchConfig, fields.get("match", {}), f"{where}: match"),
        guided_filter=parse_dataclass(GuidedFilterConfig, fields.get("guided_filter", {}), f"{where}: guided_filter"),
    )


def load_model_config(model: str) -> ModelConfig:
    """Load the model of a preset or YAML file, without the sections for training. Raises UsageError or ConfigError."""
    where, mapping = read_config_mapping(model)
    fields = require_mapping(mapping, where)
    reject_unknown_keys(fields, MODEL_KEYS, where)
    return parse_model_config({key: value for key, value in fields.items() if key not in TRAINING_KEYS}, where)


def read_config_mapping(config: str) -> tuple[str, object]:
    """Read a preset or YAML file. Return its path and its content.

    Raises UsageError for an unknown preset, and ConfigError for a file that cannot be read.
    """
    presets = preset_paths()
    path = presets.get(config, Path(config))
    if path.suffix not in {".yaml", ".yml"}:
        raise UsageError(
            f"model {quote_value(config)} is neither a preset nor a .yaml file. {did_you_mean(config, presets)}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"configuration {path} cannot be read: {error.strerror}; give a preset or an existing file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"configuration {path} is not YAML; save it as UTF-8 text") from error
    return str(path), parse_yaml(text, f"configuration {path}")


def parse_yaml(text: str, where: str) -> object:
    """Parse a YAML document from the file or option ``where``. Raises ConfigError, also for a key given twice."""
    try:
        return yaml.load(text, _StrictLoader)  # a subclass of SafeLoader
    except _DuplicateKeyError as error:
        raise ConfigError(f"{where} {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        position = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        expected = "expected lines 'key: value', indented by spaces, with all brackets and quotes closed"
        raise ConfigError(f"{where} is not YAML{position}; {expected}") from error


class _DuplicateKeyError(yaml.YAMLError):
    """A mapping has a key twice."""


class _StrictLoader(yaml.SafeLoader):
    """Loader that refuses a key that a mapping has twice. ``yaml.SafeLoader`` keeps the later value."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping, and check its keys before ``<<`` merges those of other mappings."""
        node = super().compose_mapping_node(anchor)
        lines: dict[object, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            key = key_node.value if key_node.tag == MERGE_TAG else self.construct_object(key_node)
            line = key_node.start_mark.line + 1
            if key in lines:
                raise _DuplicateKeyError(
                    f"has the key {key!r} twice, in line {lines[key]} and in line {line}; "
                    "expected each key once in a section; remove or rename one of the two"
                )
            lines[key] = line
        return node


def preset_paths() -> dict[str, Path]:
    """Return the presets: name -> file.

    They are in ``configs/``, inside an installed package or next to the package in a source tree.
    """
    here = Path(__file__).parent
    folder = here / "configs" if (here / "configs").is_dir() else here.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _parse_component(kind: ComponentKind, mapping: object, where: str) -> ComponentConfig:
    """Convert the section of a component: its name, and the settings of its class. Raises ConfigError."""
    fields = require_mapping(mapping, where)
    name = fields.get("name")
    if not isinstance(name, str):
        raise ConfigError(f"{where} has no name; expected a key 'name' with one of: {', '.join(COMPONENTS[kind])}")
    part = component_class(kind, name)
    settings = {key: value for key, value in fields.items() if key != "name"}
    return ComponentConfig(name, parse_dataclass(part.Config, settings, where))


def parse_dataclass(cls: type[T], mapping: object, where: str) -> T:
    """Convert a mapping to a dataclass.

    Raises ConfigError for a key that is not a field of the dataclass, and for a value of another type than its field.
    """
    fields = require_mapping(mapping, where)
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    reject_unknown_keys(fields, known, where)
    return cls(**{key: _convert_value(value, hints[key], f"{where}: {key}") for key, value in fields.items()})


def _convert_value(value: object, hint: Any, where: str) -> Any:
    """Convert a value of YAML to the type hint of a field. Raises ConfigError.

    A hint is a class, a Literal, a tuple of items of one type, or "X | None" with one of these as X.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (alternative,) = (argument for argument in arguments if argument is not type(None))
        return _convert_value(value, alternative, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return parse_dataclass(hint, value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert_value(item, arguments[0], f"{where} {number}") for number, item in enumerate(value, 1))
    if origin is Literal:
        value = "no" if value is False else value  # YAML reads the word "no" as False
        is_valid = value in arguments
    elif hint is float:
        is_valid = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    else:
        is_valid = type(value) is hint
    if not is_valid:
        raise ConfigError(f"{where} is {value!r}; expected {_describe_type(hint)}")
    return float(value) if hint is float else value  # type: ignore[arg-type]


def _describe_type(hint: Any) -> str:
    """Describe a type hint for an error message."""
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return "a list"
    return {int: "an integer", float: "a number", str: "text", bool: "true or false"}.get(hint, str(hint))
