"""Ctrl-C and SIGTERM during training."""

from __future__ import annotations

import signal
import threading

from icm_cli.signals import StopSignals


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
