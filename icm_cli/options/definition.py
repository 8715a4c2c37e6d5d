"""Definition of options: a field of a frozen dataclass has type, default, help and checks.

Commands, the Python API and the reference in ``docs/options.md`` are generated from these definitions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import numbers
import os
import re
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from icm_cli.environment import resource_errors
from icm_cli.errors import IcmError, UsageError, did_you_mean, join_words, quote_value
from icm_cli.files.paths import check_path
from icm_cli.values import is_number

Returned = TypeVar("Returned")
NO_LIMIT = math.inf
MAX_TEXT_LENGTH = 4096
"""Maximum number of characters of a text other than a path."""
_WHOLE_NUMBER = re.compile("[+-]?[0-9]{1,4000}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)


class Panel(StrEnum):
    """Titles of the groups in ``--help`` and in the option reference, in their order."""

    EVERYDAY = "Options"
    REFERENCES = "References"
    SOURCES = "Sources"
    HINTS = "Hints"
    OUTPUT = "Output"
    MODEL = "Model and device"
    COLOUR = "Colour"
    SEQUENCES = "Sequences and farms"
    DATASET = "Dataset"
    PROTOCOL = "Protocol"
    TRAINING = "Training"
    REPORTS = "Reports"
    REVIEW = "Review"
    DISPLAY = "Display"


class DigestPart(StrEnum):
    """Parts of an alpha's digest through which an option decides pixels."""

    VALUE = "value"
    """The option's own value is hashed."""
    REFERENCES = "references"
    """The pixels of the references and masks are hashed."""
    MODEL = "model"
    """The configuration of the model and the content of its weights are hashed."""
    DTYPE = "dtype"
    """The data type that the device resolves to is hashed."""
    LEARN_STEPS = "learn_steps"
    """The number of steps that the model resolves to is hashed."""
    PROPAGATION = "propagation"
    """The settings of the propagation in shots are hashed."""
    FORMAT = "format"
    """The resolved file format is hashed."""
    COLOUR_CONFIG = "colour_config"
    """The identity of the OpenColorIO configuration is hashed."""
    IMAGE = "image"
    """What the option says about an image is hashed for this image only."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """Properties of an option, except its name, type and default."""

    help: str
    flags: tuple[str, ...] = ()
    """Names on the command line; empty: derived from the field's name."""
    metavar: str | None = None
    shown_default: str | None = None
    """Default as help texts show it, where the value itself says too little."""
    choices: tuple[str, ...] = ()
    """Allowed values, where the type is not a Literal."""
    pattern: str = ""
    """Regular expression that a text must match; empty: any text is allowed."""
    expected: str = ""
    """What a value is, for error messages; empty: derived from the type."""
    suggestions: Callable[[], Sequence[str]] | None = None
    """Values that shell completion offers; others are allowed too."""
    minimum: float = -NO_LIMIT
    maximum: float = NO_LIMIT
    digest: DigestPart | None = None
    """Part of the alpha's digest that the option decides; None: it does not decide pixels."""
    is_everyday: bool = False
    """Shown in the first panel."""
    is_in_api: bool = True
    """Whether it is an argument in Python too."""
    is_positional: bool = False
    """Whether it is given on the command line without a flag, by its position."""


def option(default: Any = MISSING, properties: Option | None = None, **keywords: Any) -> Any:
    """Define an option as a dataclass field.

    ``properties`` are shared by several commands; ``keywords`` are those of :class:`Option`.
    """
    return dataclasses.field(default=default, metadata={"option": properties or Option(**keywords)})


@dataclass(frozen=True)
class OptionField:
    """An option of a command, with everything that its definition says."""

    name: str
    group: str
    """Name of the attribute of the command's options that holds the option's group."""
    panel: Panel
    hint: Any
    """Type, as an object."""
    annotation: str
    """Type, as text in the source code."""
    default: Any
    properties: Option

    @property
    def is_required(self) -> bool:
        return self.default is MISSING

    @property
    def flags(self) -> tuple[str, ...]:
        """Names on the command line. A positional option has none; messages call it by its name in capitals."""
        if self.properties.is_positional:
            return (self.name.upper(),)
        return self.properties.flags or (f"--{self.name.replace('_', '-')}",)

    @property
    def flag(self) -> str:
        """First name on the command line."""
        return self.flags[0]

    @property
    def value_type(self) -> Any:
        """Type of one value: without ``None``, and of a tuple of any length that of its items."""
        hint = _without_none(self.hint)
        return typing.get_args(hint)[0] if self.is_repeatable else hint

    @property
    def is_repeatable(self) -> bool:
        hint = _without_none(self.hint)
        return typing.get_origin(hint) is tuple and typing.get_args(hint)[-1] is ...

    @property
    def choices(self) -> tuple[str, ...]:
        """Allowed values, empty where any is."""
        is_literal = typing.get_origin(self.value_type) is Literal
        return typing.get_args(self.value_type) if is_literal else self.properties.choices

    @property
    def metavar(self) -> str:
        """Placeholder for a value in help texts, such as PATH; empty for choices and flags."""
        default = {int: "N", Path: "FILE"}.get(self.value_type, "")
        return self.properties.metavar or default

    @property
    def is_path(self) -> bool:
        is_text_path = re.search("FILE|DIR|PATH", self.metavar) is not None
        return is_text_path or Path in (self.value_type, *typing.get_args(self.value_type))

    @property
    def expected(self) -> str:
        """What a value is, for error messages."""
        if self.properties.expected:
            return self.properties.expected
        if self.choices:
            return join_words(self.choices)
        least, most = self.properties.minimum, self.properties.maximum
        limits = "" if least == -NO_LIMIT else f" from {least} to {most}"
        if typing.get_origin(self.value_type) is typing.Union:  # a number, or a word in its place
            return f"{join_words(_words(self.value_type))}, or a whole number{limits}"
        descriptions = {int: "a whole number", float: "a number", bool: "True or False"}
        if self.value_type in descriptions:
            return descriptions[self.value_type] + limits
        return "a path" if self.is_path else f"text of 1 to {MAX_TEXT_LENGTH} printable characters"

    def parse_text(self, text: object) -> object:
        """Return a text of the command line as the number, or the comma-separated numbers, that the option needs.

        Text that is no such number is returned as it is, for :meth:`convert_value` to check. Of a list, every item is
        parsed.
        """
        if isinstance(text, list):
            return [self.parse_text(item) for item in text]
        if not isinstance(text, str):
            return text
        member_types = typing.get_args(self.value_type) or (self.value_type,)
        if typing.get_origin(self.value_type) is tuple:
            parts = [part.strip() for part in text.split(",")]
            is_complete = len(parts) == len(member_types) and all(map(_NUMBER.fullmatch, parts))
            return tuple(map(float, parts)) if is_complete else text
        if int in member_types and _WHOLE_NUMBER.fullmatch(text):
            return int(text)
        if float in member_types and _NUMBER.fullmatch(text):
            return float(text)
        return text

    def convert_value(self, value: object) -> Any:
        """Convert a value to the option's type; None means the default.

        Raises UsageError for a value that the option does not allow.
        """
        if value is None and not self.is_required:
            return self.default
        if self.is_repeatable and value is not None:
            values = [value] if self._is_single(value) else typing.cast(Iterable[object], value)
            return tuple(self._convert_one(item) for item in values)
        return self._convert_one(value)

    def _is_single(self, value: object) -> bool:
        """Return whether a value of a repeatable option is one value and not a list of values."""
        if isinstance(value, (str, os.PathLike)) or not isinstance(value, Iterable):
            return True
        # A tuple of numbers, such as (640, 360), is one point and not a list of points.
        return typing.get_origin(self.value_type) is tuple and _is_flat_tuple(value)

    def _convert_one(self, value: object) -> Any:
        """Convert and check one value. Raises UsageError."""
        try:
            is_number_choice = is_number(value, int) and str(value) in self.choices  # depth=16 is depth="16"
            converted = _convert(str(value) if is_number_choice else value, self.value_type)
            parts = converted if isinstance(converted, tuple) else [converted]
            if not all(map(self._is_allowed, parts)):
                raise ValueError
        except (ValueError, TypeError, OverflowError):
            parsed = self.parse_text(value)
            is_text_of_tuple = isinstance(value, str) and isinstance(parsed, tuple)  # only the command parses text
            expected = f"the tuple {parsed} instead of text" if is_text_of_tuple else self.expected
            raise UsageError(f"{self.flag} is {quote_value(value)}; expected {expected}") from None
        return converted

    def _is_allowed(self, value: object) -> bool:
        """Return whether a converted value is in the range, the choices or the pattern of the option.

        Raises UsageError if the option is a path, and the value cannot be one.
        """
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return self.properties.minimum <= value <= self.properties.maximum
        if isinstance(value, str) and self.choices:
            return value in self.choices
        if self.is_path:
            check_path(str(value), self.flag)
            return value != ""
        if isinstance(value, str):
            is_text = value.isprintable() and not value.isspace() and 0 < len(value) <= MAX_TEXT_LENGTH
            return is_text and re.fullmatch(self.properties.pattern or ".*", value, re.ASCII) is not None
        return True


@dataclass(frozen=True, kw_only=True)
class OptionGroup:
    """Base of the groups of options; a group's fields are made by :func:`option`."""

    panel: ClassVar[Panel]

    def check_conflicts(self) -> None:
        """Raise UsageError for options of this group that exclude one another."""


@dataclass(frozen=True)
class CommandOptions:
    """Base of the options of a command: every field is a group."""

    positional: ClassVar[tuple[str, ...]] = ()
    """Names of the options that may be given by position in Python."""
    given: frozenset[str]
    """Names of the options that were given, rather than left at their default."""

    @classmethod
    @functools.cache
    def option_fields(cls) -> tuple[OptionField, ...]:
        """All options, in the order of their groups."""
        fields = []
        for name, group in cls._group_classes().items():
            hints = typing.get_type_hints(group)
            for field in dataclasses.fields(group):
                properties: Option = field.metadata["option"]
                panel = Panel.EVERYDAY if properties.is_everyday else group.panel
                hint, annotation = hints[field.name], str(field.type)
                fields.append(OptionField(field.name, name, panel, hint, annotation, field.default, properties))
        return tuple(fields)

    @classmethod
    def from_values(cls, values: Mapping[str, object], given: Iterable[str] | None = None) -> Self:
        """Convert and check values by option name. Other options keep their default.

        ``given``: names of the options that were given; by default those whose value is not the default. Raises
        UsageError for a wrong value, TypeError for an unknown name.
        """
        converted = {option.name: option.convert_value(values.get(option.name)) for option in cls.option_fields()}
        if unknown := values.keys() - converted.keys():
            name = min(unknown)
            raise TypeError(f"{name!r} is not an option. {did_you_mean(name, converted)}")
        if given is None:
            given = [option.name for option in cls.option_fields() if converted[option.name] != option.default]
        groups = {}
        for name, group in cls._group_classes().items():
            groups[name] = group(**{field.name: converted[field.name] for field in dataclasses.fields(group)})
            groups[name].check_conflicts()
        return cls(given=frozenset(given), **groups)

    @classmethod
    def api_fields(cls) -> list[OptionField]:
        """Options that are arguments in Python, those that may be given by position first."""
        fields = [field for field in cls.option_fields() if field.properties.is_in_api]
        by_position = [field for field in fields if field.name in cls.positional]
        return by_position + [field for field in fields if field.name not in cls.positional]

    def get_value(self, name: str) -> Any:
        """Value of an option by its name."""
        group = next(field.group for field in self.option_fields() if field.name == name)
        return getattr(getattr(self, group), name)

    def as_settings(self, without: Iterable[str] = ()) -> dict[str, Any]:
        """Return the options that decide outputs, as values of JSON, for reports."""
        fields = [field for field in self.api_fields() if field.group not in ("reports", "display")]
        values = {field.name: self.get_value(field.name) for field in fields if field.name not in without}
        return {name: _to_plain(value) for name, value in values.items()}

    def refuse_given(self, names: Iterable[str], why: str) -> None:
        """Raise UsageError if any of these options was given. ``why``: the reason, with which the message begins."""
        for field in self.option_fields():
            if field.name in names and field.name in self.given:
                raise UsageError(f"{why}, so {field.flag} has no effect; remove it")

    def digest_values(self, parts: Mapping[DigestPart, str]) -> dict[str, str]:
        """Return everything that decides pixels, by name.

        ``parts`` replace the values of the options that decide pixels through their content.
        """
        digested: dict[str, str] = {}
        for field in self.option_fields():
            part = field.properties.digest
            if part is DigestPart.VALUE:
                digested[field.name] = repr(self.get_value(field.name))
            elif part is not None:
                digested[part] = parts[part]
        return digested

    def given_by_part(self) -> dict[str, str]:
        """Return the options that decide pixels through their content and have another value than their default.

        Keys are the part and the flag, such as "model--edges"; values are texts. Options of the references are not
        returned, so that a mask gives equal files from wherever it is read, and also if it is made from prompts.
        """
        unrecorded = (None, DigestPart.VALUE, DigestPart.IMAGE, DigestPart.REFERENCES)
        return {
            f"{field.properties.digest}{field.flag}": repr(value)
            for field in self.option_fields()
            if field.properties.digest not in unrecorded and (value := self.get_value(field.name)) != field.default
        }

    @classmethod
    def _group_classes(cls) -> dict[str, type[OptionGroup]]:
        hints = typing.get_type_hints(cls)
        return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.name != "given"}


Options = TypeVar("Options", bound=CommandOptions)


def keyword_arguments(options_class: type[Options]) -> Callable[[Callable[..., Returned]], Callable[..., Returned]]:
    """Decorate a function whose first argument is an options object, so that it takes each option as an argument.

    The options object itself is accepted too, as the only positional argument. Other keyword-only parameters of the
    function stay as they are. If options are given as arguments, messages of errors name the arguments, not the flags
    of the command.
    """

    def decorate(function: Callable[..., Returned]) -> Callable[..., Returned]:
        signature = _make_signature(function, options_class)
        option_names = {field.name for field in options_class.api_fields()}

        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Returned:
            if len(arguments) == 1 and isinstance(arguments[0], options_class):
                return function(*arguments, **keywords)
            values = signature.bind(*arguments, **keywords).arguments
            other_values = {name: values.pop(name) for name in list(values) if name not in option_names}
            with (
                name_arguments_in_errors(options_class),
                resource_errors(),
                warnings.catch_warnings(),
                _restore_environment(),
            ):
                return function(options_class.from_values(values), **other_values)

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__doc__ = f"{inspect.getdoc(function)}\n\n{describe_arguments(options_class)}"
        return call

    return decorate


def _make_signature(function: Callable[..., Any], options_class: type[CommandOptions]) -> inspect.Signature:
    """Return the signature of a function with each option as an argument, instead of the options object."""
    parameters = []
    for field in options_class.api_fields():
        is_positional = field.name in options_class.positional
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if is_positional else inspect.Parameter.KEYWORD_ONLY
        default = inspect.Parameter.empty if field.is_required else field.default
        parameters.append(inspect.Parameter(field.name, kind, default=default, annotation=field.annotation))
    others = inspect.signature(function).parameters.values()
    parameters += [parameter for parameter in others if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    return inspect.Signature(parameters, return_annotation=function.__annotations__.get("return"))


@contextlib.contextmanager
def name_arguments_in_errors(options_class: type[CommandOptions]) -> Iterator[None]:
    """Name arguments in the messages of errors, such as ``depth=``, instead of the flags of the command."""
    try:
        yield
    except IcmError as error:
        names = {flag: field.name for field in options_class.option_fields() for flag in field.flags}
        pattern = re.compile(f"(?<![\\w-])({'|'.join(names)})(?![\\w-])")
        error.args = tuple(pattern.sub(lambda match: f"{names[match[0]]}=", str(part)) for part in error.args)
        raise


@contextlib.contextmanager
def _restore_environment() -> Iterator[None]:
    """At the end of the context, restore the environment variables that libraries set when they are first used."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in {**before, **os.environ}:
            if name not in before:
                del os.environ[name]
            elif os.environ.get(name) != before[name]:
                os.environ[name] = before[name]


def describe_arguments(options_class: type[CommandOptions]) -> str:
    """Section "Args" of a docstring: every option that is an argument in Python, with its help."""
    lines = [f"    {field.name}: {field.properties.help}" for field in options_class.api_fields()]
    return "\n".join(["Args:", *lines])


def _without_none(hint: Any) -> Any:
    """Return a type without ``None``: ``str`` for ``str | None``, ``str | int`` for ``str | int | None``."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return hint
    members = tuple(member for member in typing.get_args(hint) if member is not type(None))
    return members[0] if len(members) == 1 else typing.Union[members]  # noqa: UP007 (a runtime value)


def _convert(value: object, hint: Any) -> Any:
    """Convert one value to a type. Raises ValueError for another kind of value."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Union:  # of a number and a word
        return value if value in _words(hint) else _convert_number(value, int)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise ValueError
        return tuple(_convert(item, item_type) for item, item_type in zip(value, members, strict=True))
    if hint in (int, float):
        return _convert_number(value, hint)
    if hint is Path:
        if not isinstance(value, (str, os.PathLike)) or str(value) == "":
            raise ValueError
        return Path(value)
    if hint is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, bool if hint is bool else str):  # all other types are text, such as a Literal
        raise ValueError
    return value


def _convert_number(value: object, hint: type[int] | type[float]) -> int | float:
    """Convert a number, which may be of NumPy, to an int or a finite float. Raises ValueError for another value."""
    if not is_number(value, numbers.Integral if hint is int else numbers.Real):
        raise ValueError
    number = typing.cast(float, value)
    if hint is float and not math.isfinite(number):
        raise ValueError
    return hint(number)


def _to_plain(value: object) -> object:
    """Return a value as JSON can store it."""
    if isinstance(value, tuple):
        return [_to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _is_flat_tuple(value: object) -> bool:
    return isinstance(value, tuple) and bool(value) and not any(isinstance(item, Iterable) for item in value)


def _words(hint: Any) -> list[str]:
    """Words that a union of a number and a Literal allows."""
    return [word for member in typing.get_args(hint) for word in typing.get_args(member)]
