"""Reading, checking and writing of JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from icm_cli.errors import UsageError, shorten
from icm_cli.files.atomic_writes import atomic_write

JSON_TYPES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
"""Names of the types of JSON values. A boolean is not an integer."""


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as JSON, atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")


def read_json(path: Path, kind: str, schema: Any, expected: str, *, use: str = "read") -> Any:
    """Return the content of a JSON file, checked against a schema by :func:`check_schema`.

    Raises UsageError for a file that is missing, is not JSON or does not match. The message begins with "``kind`` FILE
    cannot be ``use``", such as "report a.json cannot be compared", and ends with what was ``expected``.
    """
    try:
        if not path.is_file():
            problem = "is not a file" if path.exists() else "does not exist"
            raise UsageError(f"{kind} {path} {problem}; {expected}")
        content = _parse_json(path.read_bytes())
        check_schema(content, schema, "")
    except RecursionError as error:
        raise UsageError(f"{kind} {path} cannot be {use}: it is nested too deeply; {expected}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{kind} {path} cannot be {use}: {reason}; {expected}") from error
    return content


def _parse_json(content: bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError without the wording of the library, and RecursionError."""
    try:
        return json.loads(content)
    except ValueError as error:
        position = ""
        if isinstance(error, json.JSONDecodeError) and error.pos > 0:
            position = f" (line {error.lineno}, column {error.colno})"
        raise ValueError(f"it is not valid JSON{position}") from error


def format_json(value: Any) -> str:
    """Return a value as JSON for messages, truncated if it is long."""
    return shorten(json.dumps(value, ensure_ascii=False))


def check_schema(value: Any, schema: Any, name: str) -> None:
    """Raise ValueError if a JSON value does not match a schema.

    A schema is a type, a tuple of types, ``[schema]`` for a list, or a dict with a schema for each key. A key that ends
    in "?" is optional; the key "*" stands for every key. ``name``: what messages call the value, "" for a whole file.

    >>> check_schema({"id": 1}, {"id": int, "label?": str}, "")
    """
    if isinstance(schema, tuple):
        types = schema
    elif isinstance(schema, type):
        types = (schema,)
    else:
        types = (type(schema),)
    if type(value) not in types:
        expected = " or ".join(JSON_TYPES[type_] for type_ in types)
        raise ValueError(f"{name or 'its content'} is {format_json(value)} instead of {expected}")
    if isinstance(schema, list):
        for number, item in enumerate(value):
            check_schema(item, schema[0], f"{name}[{number}]")
    if isinstance(schema, dict):
        for pattern, inner_schema in schema.items():
            key = pattern.removesuffix("?")
            is_optional = pattern == "*" or pattern.endswith("?")
            if key not in value and not is_optional:
                raise ValueError(f"{name}.{key}".lstrip(".") + " is missing")
            for present in value if pattern == "*" else {key} & value.keys():
                check_schema(value[present], inner_schema, f"{name}.{present}".lstrip("."))
