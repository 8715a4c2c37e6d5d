"""The layers of the code: a module imports from its own package or from lower layers, without cycles."""

from __future__ import annotations

import ast
import graphlib
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "icm_cli"
LAYERS = (
    ("errors", "signals", "values"),
    ("config", "environment", "files"),
    ("options",),
    ("geometry", "device"),
    ("guided_filter", "images"),
    ("guidance",),
    ("model", "reports"),
    ("quality",),
    ("events",),
    ("datasets",),
    ("scoring",),
    ("matting",),
    ("evaluation",),
    ("training",),
    ("review",),
    ("terminal",),
    ("progress",),
    ("cli", "__init__"),
    ("__main__",),
)
"""From the lowest to the highest layer. Packages of the same layer do not import each other."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imported_modules(path: Path, known: set[str]) -> Iterator[str]:
    """Yield the modules of icm that a file imports: at its top, within functions, or for type checkers only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "icm_cli":
            base = (node.module or "").removeprefix("icm_cli").lstrip(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                if name in known or base:
                    yield name if name in known else base
        if isinstance(node, ast.Import):
            yield from (each.name.removeprefix("icm_cli.") for each in node.names if each.name.startswith("icm_cli."))


GRAPH = {name: set(imported_modules(path, set(modules()))) - {name} for name, path in modules().items()}


def test_every_module_belongs_to_a_layer() -> None:
    assert {name.split(".")[0] for name in GRAPH} == set(LEVEL)
    assert len(list(PACKAGE.glob("*.py"))) <= 14


def test_modules_import_from_lower_layers_only() -> None:
    up = [
        f"{name} -> {other}"
        for name, others in GRAPH.items()
        for other in others
        if name.split(".")[0] != other.split(".")[0] and LEVEL[name.split(".")[0]] <= LEVEL[other.split(".")[0]]
    ]
    assert not up


def test_imports_have_no_cycle() -> None:
    list(graphlib.TopologicalSorter(GRAPH).static_order())  # raises CycleError, which names it


def test_shared_model_modules_import_no_family() -> None:
    """The core knows components by their interfaces only; ``icm_cli.config.COMPONENTS`` names the classes."""
    families = ("model.lite", "model.stable_diffusion", "model.training_free")
    shared = {name: others for name, others in GRAPH.items() if name.startswith("model.") and name.count(".") == 1}
    assert "model.core" in shared
    assert not [
        f"{name} -> {other}" for name, others in shared.items() for other in others if other.startswith(families)
    ]


def test_matting_does_not_import_training_or_evaluation() -> None:
    code = "import icm_cli.matting.matte, sys; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {name.split(".")[1] for name in ended.stdout.split() if name.startswith("icm_cli.")}
    assert "matting" in imported
    assert not imported & {"datasets", "evaluation", "scoring", "training"}


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1


def test_functions_are_short() -> None:
    lengths = [
        body_lines(node)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    assert statistics.median(lengths) <= 8
    assert max(lengths) <= 70
