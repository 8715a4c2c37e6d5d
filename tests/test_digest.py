"""The digest that decides resume: whatever decides an alpha changes it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import model_choice

from icm_cli.config import component_class, parse_model_config, preset_paths, read_yaml
from icm_cli.errors import ConfigError
from icm_cli.matting.model_choice import ModelChoice

Place = tuple[str | int, ...]
MODEL_KEYS = ("backbone", "head", "edges")


@pytest.fixture(autouse=True)
def without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most weights cannot be had here; their digest is another matter."""
    for kind in ("stable-diffusion", "dinov2-lite", "efficientnet-lite", "dino"):
        monkeypatch.setattr(component_class("backbone", kind), "weights_digest", lambda *_, **__: "weights")
    monkeypatch.setattr(component_class("edges", "vitmatte"), "weights_digest", lambda *_, **__: "weights")


def digest(model: Any, device: str = "cpu", dtype: str = "float32") -> str:
    config = parse_model_config(model, "test")
    choice = model_choice(device=device, dtype=dtype)
    return ModelChoice(config, None, None, True, 0, choice.where, 1).digester()(["reference"])


def numbers(value: Any, place: Place = ()) -> Iterator[Place]:
    """Where the numbers of a nested configuration are."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, (*place, key))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from numbers(inner, (*place, index))
    elif isinstance(value, (bool, int, float)):
        yield place


def changed(model: Any, place: Place, value: Any) -> Any:
    model = copy.deepcopy(model)
    inner = model
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return model


def listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: listed(inner) for key, inner in value.items()}
    return [listed(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def value_at(model: Any, place: Place) -> Any:
    for key in place:
        model = model[key]
    return model


def others(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1, value * 2, value // 2, value + 32, value + 64]
    return [value + 0.01, value * 0.9, value * 1.1]


@pytest.mark.parametrize("preset", sorted(preset_paths()))
def test_digest_depends_on_every_setting_of_a_preset(preset: str) -> None:
    mapping: Any = read_yaml(preset_paths()[preset])
    given = {key: mapping[key] for key in MODEL_KEYS if key in mapping}
    whole = listed(parse_model_config(given, "test").as_dict())  # with the defaults
    before = digest(whole)
    places = list(numbers(whole))
    assert len(places) > 4
    for place in places:
        for value in others(value_at(whole, place)):
            try:
                after = digest(changed(whole, place, value))
            except ConfigError:
                continue  # not every number is allowed there
            assert after != before, place
            break
        else:
            pytest.fail(f"no other number is allowed at {place}")


def test_digest_depends_on_the_dtype() -> None:
    model = {"backbone": {"name": "efficientnet-lite"}, "head": {"name": "training-free"}}
    assert digest(model) != digest(model, dtype="bfloat16")
