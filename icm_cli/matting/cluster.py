"""A Ray cluster: Ray Data hands images, as paths, to actors that hold the model; their results come back as rows."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pickle
import secrets
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import cv2

from icm_cli.environment import __version__
from icm_cli.errors import ConfigError, DeviceError, IcmError, UsageError
from icm_cli.files import remove_stale_temporaries, temporary_name, write_error
from icm_cli.matting.engine import Engine
from icm_cli.matting.jobs import Job
from icm_cli.matting.model_choice import ModelChoice
from icm_cli.matting.work import Idle, Work
from icm_cli.reports.result import ImageResult

BATCHES_AT_A_TIME = 8
"""Batches of the model that an actor is handed at a time; as many are done again where it dies."""
ANSWER_S = 10.0
"""Seconds that the head of a cluster has to answer."""
MOST_DEATHS = 3
"""Times that an actor, or the images in its hands, may be tried again."""


@dataclass(frozen=True)
class Surroundings:
    """Surroundings of this process that decide what the actors read."""

    folder: str
    ocio: str

    @classmethod
    def here(cls) -> Self:
        return cls(str(Path.cwd()), os.environ.get("OCIO", ""))

    def enter(self) -> None:
        """Make them those of this process."""
        os.chdir(self.folder)
        if self.ocio:
            os.environ["OCIO"] = self.ocio


class Cluster:
    """Mattes images by actors of a Ray cluster: one on each GPU, or ``cpus`` of them with a core each.

    A connection to Ray that this process has already is taken, and left as it is; one of its own ends with the block.
    """

    def __init__(self, address: str, cpus: int | None) -> None:
        """Connect; "auto" starts Ray here where none runs. Raises ConfigError."""
        self._is_ours = _connect(address)
        import ray

        kind = "GPU" if cpus is None else "CPU"
        there = int(ray.cluster_resources().get(kind, 0))
        if there < (cpus or 1):
            self.__exit__()
            raise ConfigError(
                "the Ray cluster has no GPU; give --ray-cpus N to matte on N of its cores"
                if cpus is None
                else f"--ray-cpus is {cpus}, and the Ray cluster has {there} core(s); give so many at most"
            )
        self._actors = cpus or there
        self._device = "cpu" if cpus else "cuda"
        self._needs: dict[str, Any] = {"num_cpus": 1} if cpus else {"num_gpus": 1}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        if self._is_ours:
            ray.shutdown()

    @classmethod
    def wanted(cls, address: str | None, cpus: int | None, device: str) -> Cluster | None:
        """The cluster that ``--ray`` names, None where there is none. Raises UsageError or ConfigError."""
        if address is None:
            if cpus is not None:
                raise UsageError(
                    "--ray-cpus says how many cores of a Ray cluster are taken; give --ray, or leave it out"
                )
            return None
        if device != "auto":
            raise UsageError(
                f"--ray takes the cluster's own devices, so --device {device} has nothing to do; leave it out"
            )
        if cpus is not None and cpus < 1:
            raise UsageError(f"--ray-cpus is {cpus}; expected 1 or more")
        return cls(address, cpus)

    def choice(self, checked: Callable[..., ModelChoice]) -> ModelChoice:
        """The model's choice as ``checked(device=...)`` makes it on a node of the cluster. Raises what that raises."""
        import ray

        make = ray.remote(**self._needs)(_choice_there)
        try:
            choice: ModelChoice = ray.get(make.remote(Surroundings.here(), checked, self._device))
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, IcmError) else error) from None
        return choice

    def describe(self) -> str:
        return f"{self._actors} actor(s) of Ray"

    def crew(
        self, work: Work, folder: Path, on_result: Callable[[ImageResult], None], notice: Callable[[str], None]
    ) -> Actors:
        """Check that every node sees ``folder``, where the alphas go; then what mattes. Raises UsageError."""
        self._check(folder)
        return Actors(work, self._actors, self._needs, on_result, notice)

    def _check(self, folder: Path) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        probe, token = Path(os.path.abspath(folder)) / temporary_name(), secrets.token_hex()  # noqa: PTH100
        nodes = [node for node in ray.nodes() if node["Alive"]]
        try:
            probe.write_text(token)
            look = ray.remote(num_cpus=0)(_lacking)
            asked = [
                look.options(scheduling_strategy=On(node["NodeID"], soft=False)).remote(
                    Surroundings.here(), str(probe), token, __version__
                )
                for node in nodes
            ]
            lacks = ray.get(asked)
        except ray.exceptions.RayTaskError as error:
            raise ConfigError(
                f"a node of the Ray cluster cannot run icm: {error.cause}; install it there too"
            ) from None
        except OSError as error:
            raise write_error(folder, error) from error
        finally:
            probe.unlink(missing_ok=True)
        for node, lack in zip(nodes, lacks, strict=True):
            if lack:
                raise UsageError(f"node {node['NodeManagerAddress']} of the Ray cluster {lack}")


class Actors:
    """The actors of a run; they write the alphas, and their results are heard of in the caller's thread."""

    def __init__(
        self,
        work: Work,
        actors: int,
        needs: dict[str, Any],
        on_result: Callable[[ImageResult], None],
        notice: Callable[[str], None],
    ) -> None:
        self._work = work
        self._actors = actors
        self._needs = needs
        self._on_result = on_result
        self._notice = notice
        self._peak_memory_bytes = 0

    def run(self, jobs: Sequence[Job]) -> None:
        """Matte every image. An image that fails is reported and the others go on.

        Raises OutputError when nothing more can be written, DeviceError when the actors die again and again.
        """
        from ray.exceptions import RayActorError

        try:
            for row in self._rows(jobs).iter_rows():
                message = pickle.loads(row["said"])  # noqa: S301  our own actor wrote it
                self._take(message)
                is_failed = isinstance(message, ImageResult) and message.status == "failed"
                if is_failed and self._work.options.fail_fast:
                    return
        except RayActorError as error:
            reason = str(error).splitlines()[0]
            raise DeviceError(f"actors of Ray died again and again over the same images: {reason}") from error

    def peak_memory_bytes(self) -> int:
        """The most memory that any of the actors held."""
        return self._peak_memory_bytes

    def _rows(self, jobs: Sequence[Job]) -> Any:
        """A dataset: one block of pickled jobs for each call of an actor -> all that they say, pickled."""
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised as well
        at_a_time = min(BATCHES_AT_A_TIME * self._work.choice.batch_size, math.ceil(len(jobs) / self._actors))
        paths = ray.data.from_items(
            [{"job": pickle.dumps(job)} for job in jobs], override_num_blocks=math.ceil(len(jobs) / at_a_time)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # bounds on deaths have no other place yet
            return paths.map_batches(
                Actor,
                fn_constructor_args=(Surroundings.here(), self._work),
                batch_size=None,
                compute=ray.data.ActorPoolStrategy(size=self._actors),
                max_restarts=MOST_DEATHS,
                max_task_retries=MOST_DEATHS,
                **self._needs,
            )

    def _take(self, message: Any) -> None:
        match message:
            case ImageResult():
                self._on_result(message)
            case Idle():
                self._peak_memory_bytes = max(self._peak_memory_bytes, message.peak_memory_bytes)
            case IcmError():
                raise message
            case str():
                self._notice(message)


class Actor:
    """An actor of Ray: holds the model, and mattes a block of images at a time."""

    def __init__(self, surroundings: Surroundings, work: Work) -> None:
        surroundings.enter()
        cv2.setNumThreads(1)
        self._work = work
        self._engine: Engine | None = None
        self._said: list[Any] = []

    def __call__(self, block: dict[str, Any]) -> dict[str, list[bytes]]:
        """Matte the images of column "job"; gives all that is to be said of them in column "said"."""
        self._said = []
        try:
            jobs = [pickle.loads(job) for job in block["job"]]  # noqa: S301  our own parent wrote it
            if self._engine is None:
                self._clean_after_a_death(jobs)
                self._engine = self._work.engine(self._said_of, self._said_of)
            self._engine.run(jobs)
            self._said_of(Idle(self._engine.peak_memory_bytes()))
        except DeviceError:
            os._exit(1)  # Ray starts another, perhaps elsewhere, and gives it these images
        except IcmError as error:
            self._said_of(error)
        return {"said": [pickle.dumps(each) for each in self._said]}

    def _said_of(self, message: Any) -> None:
        self._said.append(message)

    def _clean_after_a_death(self, jobs: Sequence[Job]) -> None:
        """Tell of an actor that died in the middle of these jobs, and remove the temporary files of its last moment."""
        import ray

        if ray.get_runtime_context().was_current_actor_reconstructed:
            for folder in {job.output.parent for job in jobs}:
                remove_stale_temporaries(folder)
            node = ray.util.get_node_ip_address()
            self._said_of(
                f"an actor of Ray died and was started again on {node}; the images in its hands are done again"
            )


def _connect(address: str) -> bool:
    """Connect this process with Ray; returns whether it was not before. Raises ConfigError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
    except ImportError as error:
        raise ConfigError(f"--ray needs Ray, which is not here ({error}); pip install 'icm-cli[ray]'") from error
    if ray.is_initialized():
        return False
    before = signal.getsignal(signal.SIGTERM)
    try:
        if address != "auto":
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=ANSWER_S).close()  # Ray itself would try for minutes
        ray.init(address=None if address == "auto" else address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, OverflowError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--ray {address}: no cluster answers there ({reason}); expected auto or an address such as 10.0.0.1:6379"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's own would end the run without its report
    return True


def _choice_there(surroundings: Surroundings, checked: Callable[..., ModelChoice], device: str) -> ModelChoice:
    """Runs on a node."""
    surroundings.enter()
    return checked(device=device)


def _lacking(surroundings: Surroundings, probe: str, token: str, version: str) -> str:
    """Say in words what a node lacks of what it needs, "" where it has all; runs there."""
    if __version__ != version:
        return f"has icm {__version__}, and here is {version}; install the same there"
    seen = None
    with contextlib.suppress(OSError):
        Path(surroundings.folder).stat()
        seen = Path(probe).read_text()
    if seen != token:
        return (
            f"does not see {Path(probe).parent} and {surroundings.folder} as they are here; put sources, alphas and "
            "the working directory on a file system that all nodes share"
        )
    return ""
