"""Engine setups that fail, for tests of worker processes and Ray actors."""

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


class LostDeviceSetup(EngineSetup):
    """Setup that simulates the loss of a device, at the second image and in one process only.

    That process creates the file named by the environment variable LOST; the others then do not fail.
    """

    def create_engine(self, on_result: Callable[[ImageResult], None], notice: Callable[[str], None]) -> Engine:
        engine = super().create_engine(on_result, notice)
        real, seen = engine.predictor.matte_frames, []

        def matte_frames(*given: Any) -> Any:
            seen.append(given)
            if len(seen) == 2:
                try:
                    Path(os.environ["LOST"]).open("x").close()
                except FileExistsError:
                    return real(*given)
                raise RuntimeError("CUDA error: unspecified launch failure\nadditional lines")
            return real(*given)

        engine.predictor.matte_frames = matte_frames  # type: ignore[method-assign]
        return engine


class FullDiskSetup(EngineSetup):
    """Setup that cannot write any file."""

    def create_engine(self, on_result: Callable[[ImageResult], None], notice: Callable[[str], None]) -> Engine:
        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        os.fsync = full
        return super().create_engine(on_result, notice)


class UnloadableSetup(EngineSetup):
    """Setup whose model cannot be loaded."""

    def create_engine(self, on_result: Callable[[ImageResult], None], notice: Callable[[str], None]) -> Engine:
        del on_result, notice
        raise ConfigError("there is no such model")


class KilledSetup(EngineSetup):
    """Setup whose process is killed at the second image.

    If the environment variable DIED names a file, the first killed process creates it, and no other is killed.
    """

    def create_engine(self, on_result: Callable[[ImageResult], None], notice: Callable[[str], None]) -> Engine:
        engine = super().create_engine(on_result, notice)
        real, seen = engine.predictor.matte_frames, []

        def matte_frames(*given: Any) -> Any:
            seen.append(given)
            if len(seen) == 2 and not ("DIED" in os.environ and Path(os.environ["DIED"]).exists()):
                if "DIED" in os.environ:
                    Path(os.environ["DIED"]).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given)

        engine.predictor.matte_frames = matte_frames  # type: ignore[method-assign]
        return engine
