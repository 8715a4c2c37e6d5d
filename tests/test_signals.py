"""Ctrl-C and SIGTERM during imports, in callbacks of numba, and during training."""

from __future__ import annotations

import importlib
import signal
import threading
import time
from pathlib import Path

import numba
import pytest

from icm_cli.signals import Interrupt, StopSignals


class TestStopSignals:
    def test_signal_is_delayed_to_the_end(self) -> None:
        heard: list[int] = []
        before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
        try:
            with StopSignals() as stop:
                assert stop.received is None
                signal.raise_signal(signal.SIGTERM)
                assert stop.received == signal.SIGTERM
                assert not heard
                signal.raise_signal(signal.SIGTERM)  # the second signal has an immediate effect
                assert heard == [signal.SIGTERM]
            assert heard == [signal.SIGTERM] * 2
        finally:
            signal.signal(signal.SIGTERM, before)

    def test_signal_handling_is_disabled_in_other_threads(self) -> None:
        def run() -> None:
            with StopSignals() as stop:
                results.append(stop.received)

        results: list[object] = []
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert results == [None]


def test_interrupt_waits_for_the_end_of_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some libraries, such as torch, continue without numpy after an exception in its import."""
    (tmp_path / "half_imported.py").write_text(
        "import signal, time\n"
        "try:\n    signal.raise_signal(signal.SIGINT)\n    time.sleep(0.2)\n    is_complete = True\n"
        "except KeyboardInterrupt:\n    is_complete = False\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with Interrupt() as interrupt:
        module = importlib.import_module("half_imported")
        assert module.is_complete
        with pytest.raises(KeyboardInterrupt):
            time.sleep(10)
    assert interrupt.exit_code == 130


def test_interrupt_waits_for_the_end_of_a_callback_of_numba() -> None:
    """In such a callback, which C calls, a KeyboardInterrupt would become a SystemError."""
    source = "signal.raise_signal(signal.SIGINT)\ntime.sleep(0.2)\nis_complete = True"
    names = {"signal": signal, "time": time}
    with Interrupt():
        exec(compile(source, numba.core.serialize.__file__, "exec"), names)
        assert names["is_complete"]
        with pytest.raises(KeyboardInterrupt):
            time.sleep(10)
