"""Log of a training run."""

from __future__ import annotations

from pathlib import Path

import pytest

from icm_cli.training.log import RunLog


def test_failing_log_is_reported_once(tmp_path: Path) -> None:
    messages: list[str] = []
    with RunLog(tmp_path, ("l1",), 0, messages.append, is_main=True) as log:
        log.write_metrics(1, {"loss": 0.5})
        (tmp_path / "log.csv").unlink()
        (tmp_path / "log.csv").mkdir()
        log.write_metrics(2, {"loss": 0.4})
        log.write_metrics(3, {"loss": 0.3})
    assert len(messages) == 1
    assert "training continues without it" in messages[0]


@pytest.mark.parametrize("damage", ["²,1", "9" * 5000 + ",1", "\0,1", "3," + "x" * 200_000, "4"])
def test_rows_before_a_damaged_row_are_kept(tmp_path: Path, damage: str) -> None:
    (tmp_path / "log.csv").write_text(f"step,loss\n1,0.5\n2,0.25\n{damage}\n")
    with RunLog(tmp_path, (), 2, pytest.fail, is_main=True):
        pass
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [["1", "0.5"], ["2", "0.25"]]
