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
    """Setup whose device is lost at the second image of the first process.

    That process creates the file named by the environment variable LOST.
    """

    def create_engine(self, on_result: Callable[[ImageResult], None], notice: Callable[[str], None]) -> Engine:
        engine = super().create_engine(on_result, notice)
        real, seen = engine.predictor.matte_frames, []

        def infer(*given: Any) -> Any:
            seen.append(given)
            if len(seen) == 2:
                try:
                    Path(os.environ["LOST"]).open("x").close()
                except FileExistsError:
                    return real(*given)
                raise RuntimeError("CUDA error: unspecified launch failure\nadditional lines")
            return real(*given)

        engine.predictor.matte_frames = infer  # type: ignore[method-assign]
        return engine


class FullDisk(EngineSetup):
    """Setup that cannot write any file."""

    def create_engine(self, on_result: Callable[[ImageResult], None], notice: Callable[[str], None]) -> Engine:
        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        os.fsync = full
        return super().create_engine(on_result, notice)


class Unloadable(EngineSetup):
    """Setup whose model cannot be loaded."""

    def create_engine(self, on_result: Callable[[ImageResult], None], notice: Callable[[str], None]) -> Engine:
        del on_result, notice
        raise ConfigError("there is no such model")


class Dying(EngineSetup):
    """Setup whose process is killed at the second image.

    If the environment variable DIED names a file, this happens only once; the file records it.
    """

    def create_engine(self, on_result: Callable[[ImageResult], None], notice: Callable[[str], None]) -> Engine:
        engine = super().create_engine(on_result, notice)
        real, seen = engine.predictor.matte_frames, []

        def infer(*given: Any) -> Any:
            seen.append(given)
            if len(seen) == 2 and not ("DIED" in os.environ and Path(os.environ["DIED"]).exists()):
                if "DIED" in os.environ:
                    Path(os.environ["DIED"]).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given)

        engine.predictor.matte_frames = infer  # type: ignore[method-assign]
        return engine
