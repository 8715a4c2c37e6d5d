"""Engine setups with failures, for tests of worker processes and actors."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from icm_cli.errors import ConfigError
from icm_cli.matting.devices import EngineSetup
from icm_cli.matting.engine import Engine
from icm_cli.reports.result import ImageResult


class LosingSetup(EngineSetup):
    """Its device is lost in the first process that gets to a second image, as a GPU is that falls off its bus.

    The environment variable LOST names a file that this process makes.
    """

    def create_engine(self, on_result: Callable[[ImageResult], None], notice: Callable[[str], None]) -> Engine:
        engine = super().create_engine(on_result, notice)
        real, seen = engine.predictor.infer, []

        def infer(*given: Any) -> Any:
            seen.append(given)
            if len(seen) == 2:
                try:
                    Path(os.environ["LOST"]).open("x").close()
                except FileExistsError:
                    return real(*given)
                raise RuntimeError("CUDA error: unspecified launch failure\nmore lines that nobody reads")
            return real(*given)

        engine.predictor.infer = infer  # type: ignore[method-assign]
        return engine


class FullDisk(EngineSetup):
    """No file can be written."""

    def create_engine(self, on_result: Callable[[ImageResult], None], notice: Callable[[str], None]) -> Engine:
        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        os.fsync = full
        return super().create_engine(on_result, notice)


class Unloadable(EngineSetup):
    """The model cannot be loaded."""

    def create_engine(self, on_result: Callable[[ImageResult], None], notice: Callable[[str], None]) -> Engine:
        del on_result, notice
        raise ConfigError("there is no such model")


class Dying(EngineSetup):
    """Its process dies at a second image: always, or once where the environment names a file, DIED, to remember it."""

    def create_engine(self, on_result: Callable[[ImageResult], None], notice: Callable[[str], None]) -> Engine:
        engine = super().create_engine(on_result, notice)
        real, seen = engine.predictor.infer, []

        def infer(*given: Any) -> Any:
            seen.append(given)
            if len(seen) == 2 and not ("DIED" in os.environ and Path(os.environ["DIED"]).exists()):
                if "DIED" in os.environ:
                    Path(os.environ["DIED"]).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given)

        engine.predictor.infer = infer  # type: ignore[method-assign]
        return engine
