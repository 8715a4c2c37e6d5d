"""``icm eval --compare``, and other files that icm wrote and reads again: no damage ends in a traceback."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from icm_cli.cli import app
from icm_cli.datasets.groups import GroupMetadata, Sample
from icm_cli.errors import UsageError
from icm_cli.evaluation.rounds import read_references_file
from icm_cli.reports.report import Report
from icm_cli.reports.result import METRICS, ImageEvaluation, ImageResult, Scores

PROTOCOL = {
    "dataset": "folder",
    "title": "imgs",
    "split": "test",
    "regions": ["whole"],
    "size": "original",
    "metric_variant": "composition",
    "unknown_region": "not scored",
    "rounds": 1,
    "refs_per_group": 1,
}


def make_report(mse: float = 0.1) -> dict[str, Any]:
    """Return the JSON values of a report with the scores of two images."""
    results = [
        ImageResult(
            f"imgs/{name}.jpg",
            f"out/{name}.png",
            "done",
            name=name,
            group="g",
            round=1,
            evaluation=ImageEvaluation({"whole": Scores(mse, 1.0, 2.0, 3.0, 0.2)}),
        )
        for name in ("a", "b")
    ]
    report = Report({"title": "imgs", "protocol": PROTOCOL}, results, references=[{"g": ["c"]}])
    return dict(json.loads(json.dumps(report.as_dict())))


def compare(before: Path, after: Path) -> Result:
    return CliRunner().invoke(app, ["eval", "--compare", str(before), str(after)], catch_exceptions=False)


def assert_refused(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("icm: ")
    assert result.stdout == ""
    for part in parts:
        assert part in line


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.json"
    path.write_text(json.dumps(make_report()))
    return path


def change(report: dict[str, Any], path: str, value: Any) -> str:
    """Return the JSON text of a report with one value replaced; parts of ``path`` are keys or indices."""
    target: Any = report
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        target = target[part]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return json.dumps(report)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("settings", ..., "settings is missing"),
        ("settings.protocol", [1], "settings.protocol is [1] instead of an object"),
        ("settings.protocol.rounds", {"a": 1}, "settings.protocol.rounds is"),
        ("settings.protocol.regions", [3], "settings.protocol.regions[0] is 3 instead of a string"),
        ("settings.learn_steps", "abc", 'learn_steps is "abc" instead of an integer'),
        ("settings.shot", 3, "settings.shot is 3"),
        ("summary", None, "summary is null instead of an object"),
        ("summary.complete", "yes", 'summary.complete is "yes" instead of true or false'),
        ("references", 3, "references is 3 instead of a list"),
        ("references", [{"g": "c"}], 'references[0].g is "c" instead of a list'),
        ("images", {"a": 1}, 'images is {"a": 1} instead of a list'),
        ("images.1", 3, "images[1] is 3"),
        ("images.1.name", ["x"], 'images[1].name is ["x"]'),
        ("images.1.round", 2.5, "images[1].round is 2.5 instead of an integer"),
        ("images.1.round", True, "images[1].round is true"),
        ("images.1.round", -1, "images[1].round is -1"),
        ("images.1.name", "a", 'images[1] repeats image "a"'),
        ("images.1.scores", [], "images[1].scores is []"),
        ("images.1.scores.whole", None, "images[1].scores.whole is null"),
        ("images.1.scores.hole", dict.fromkeys(METRICS, 0), 'has the region "hole"; expected whole or unknown'),
        ("images.1.scores.whole.mse", "0", 'images[1].scores.whole.mse is "0" instead of an integer or a number'),
        ("images.1.scores.whole.mse", float("nan"), "images[1].scores.whole.mse is NaN"),
        ("images.1.scores.whole.mse", 10**400, "images[1].scores.whole.mse is 1000"),
        ("images.1.scores.whole.sad", -1.0, "images[1].scores.whole.sad is -1.0"),
        ("images.1.scores.whole.conn", ..., "images[1].scores.whole.conn is missing"),
        ("schema_version", 99, "schema_version is 99"),
        ("schema_version", "2", 'schema_version is "2"'),
    ],
)
def test_wrong_value_is_named(good: Path, tmp_path: Path, path: str, value: Any, message: str) -> None:
    (tmp_path / "bad.json").write_text(change(make_report(), path, value))
    for pair in ((good, tmp_path / "bad.json"), (tmp_path / "bad.json", good)):
        assert_refused(
            compare(*pair),
            "bad.json cannot be compared: ",
            message,
            "; expected a JSON report of icm eval; write it again",
        )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"3",
        b"\xff\xfe\x00",
        b'{"images": ' + b"[" * 100_000,
        b'{"images": []}',
        json.dumps(make_report()).encode()[:-40],
        json.dumps(make_report()).replace("0.1,", "1" * 5000 + ",").encode(),
        json.dumps(make_report()).replace("0.1,", "1e999,").encode(),
        b"name,round,whole_mse\na,1,0.1\n",
        b"\x00" * 4096,
    ],
    ids=range(11),
)
def test_file_that_is_no_report_is_refused(good: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    assert_refused(compare(good, tmp_path / "bad.json"), "bad.json", "expected a JSON report of icm eval")


@pytest.mark.parametrize("content", [b"", b"<html>", b"\xff\xfe\x00", b'{"images": [', b"[1" + b"1" * 5000 + b"]"])
def test_file_that_is_not_json_is_refused_without_the_wording_of_python(
    good: Path, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    refused = compare(good, tmp_path / "bad.json")
    assert_refused(refused, "bad.json cannot be compared: it is not valid JSON")
    assert not re.search("Expecting|char|codec|sys", refused.stderr)
    assert ("(line 1, column 13)" in refused.stderr) == content.startswith(b"{")


def test_report_of_icm_matte_without_scores_is_refused(good: Path, tmp_path: Path) -> None:
    (tmp_path / "matte.json").write_text(change(make_report(), "settings.protocol", ...))
    assert_refused(compare(good, tmp_path / "matte.json"), "of icm matte without --gt", "again with icm matte ... --gt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.json", "none.json does not exist; expected a JSON report of icm eval"),
        ("folder", "folder is not a file; expected a JSON report of icm eval"),
        ("x" * 300, "too long"),
    ],
)
def test_path_without_a_report_is_refused(good: Path, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    assert_refused(compare(good, tmp_path / name), message)


def test_report_of_another_command_is_refused(good: Path, tmp_path: Path) -> None:
    matte = make_report()
    matte["settings"]["protocol"] = {"title": "imgs", "regions": ["whole"], "size": "original"}
    (tmp_path / "matte.json").write_text(json.dumps(matte))
    assert_refused(compare(tmp_path / "matte.json", good), "matte.json is a report of icm matte", "icm eval")
    assert compare(tmp_path / "matte.json", tmp_path / "matte.json").exit_code == 0


def test_reports_in_other_encodings_and_of_version_0_1_are_compared(good: Path, tmp_path: Path) -> None:
    report = make_report(0.3)
    del report["schema_version"]
    protocol = report["settings"]["protocol"]
    protocol["lineage"] = protocol.pop("metric_variant")  # its name in version 0.1
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "other.json").write_text(json.dumps(report), encoding=encoding)
        done = compare(good, tmp_path / "other.json")
        assert done.exit_code == 0, done.output
        assert done.stderr == ""
        assert "+0.20000" in done.stdout


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from([10**400, -(10**400), 1e308, "\ud800", "\n\x1b[31m", [], {}, [[]], [{}], {"": None}]),
    st.lists(st.one_of(st.none(), st.integers(), st.text(max_size=2)), max_size=3),
)


@st.composite
def damaged(draw: st.DrawFn, content: Any) -> bytes:
    """Return JSON with some values replaced, removed or renamed, sometimes also with damaged bytes."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(0, 3))):
        places = list(_places(content))
        if not places:
            break
        parent, key = draw(st.sampled_from(places))
        action = draw(st.sampled_from(["replace", "remove", "duplicate"]))
        if action == "replace":
            parent[key] = copy.deepcopy(draw(VALUES))
        elif action == "remove":
            del parent[key]
        elif isinstance(parent, list):
            parent.append(parent[key])
        else:
            parent[draw(st.text(max_size=4))] = parent[key]
    data = json.dumps(content).encode()
    if draw(st.integers(0, 3)) == 0:
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, len(data)))
        data = data[:start] + draw(st.binary(max_size=4)) + data[end:]
    return data


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container inside a value with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


@pytest.mark.slow
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damaged(make_report()))
def test_damaged_report_is_compared_or_refused_with_one_message(good: Path, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad.json").write_bytes(data)
    for pair in ((good, tmp_path / "bad.json"), (tmp_path / "bad.json", good)):
        result = compare(*pair)
        assert result.exit_code in (0, 1, 2), result.output
        if result.exit_code == 2:
            assert_refused(result, "bad.json")


SAMPLES = [Sample(name, Path(f"{name}.jpg"), Path(f"{name}.png"), group="g") for name in ("a", "b", "c")]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damaged({"references": [{"g": ["a"]}, {"g": ["b", "c"]}]}), damaged({"a": {"class": "x", "sub_class": None}}))
def test_damaged_references_and_groups_are_read_or_refused(tmp_path: Path, references: bytes, groups: bytes) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(references)
    with contextlib.suppress(UsageError):
        rounds, _ = read_references_file(path, {"g": SAMPLES})
        assert {name for each in rounds for names in each.values() for name in names} <= {"a", "b", "c"}
    path.write_bytes(groups)
    with contextlib.suppress(UsageError):
        samples, _ = GroupMetadata.read_file(path).assign_groups(SAMPLES)
        assert [sample.name for sample in samples] == ["a", "b", "c"]
