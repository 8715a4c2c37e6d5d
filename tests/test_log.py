"""Log of a training run."""

from __future__ import annotations

from pathlib import Path

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
