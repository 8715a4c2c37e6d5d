"""The registry of model components: every entry exists, and wrong names and entries are
reported."""

from __future__ import annotations

import dataclasses

import pytest

from icm_cli.config import COMPONENTS, component_class, parse_model_config
from icm_cli.errors import ConfigError
from icm_cli.model.contracts import Backbone, Edges, Head, Objects

INTERFACES = {"backbone": Backbone, "head": Head, "objects": Objects, "edges": Edges}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in COMPONENTS.items() for name in names])
def test_registered_components_implement_their_interface(kind: str, name: str) -> None:
    component = component_class(kind, name)  # type: ignore[arg-type]
    assert issubclass(component, INTERFACES[kind])
    assert not component.__abstractmethods__
    assert dataclasses.is_dataclass(component.Config())


def test_unknown_name_is_reported() -> None:
    with pytest.raises(ConfigError, match=r"head 'token-mach' is unknown\. Did you mean 'token-match'"):
        component_class("head", "token-mach")
    with pytest.raises(ConfigError, match="test: backbone has no name; expected a key 'name' with one of: dinov2-lite"):
        parse_model_config({"backbone": {}, "head": {"name": "token-match"}}, "test")


def test_missing_class_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMPONENTS["head"], "mine", "lite.head:Mine")
    with pytest.raises(ConfigError, match=r"'lite\.head:Mine', but icm_cli\.model\.lite\.head has no class 'Mine'"):
        component_class("head", "mine")
