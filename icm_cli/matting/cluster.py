"""Matting on a Ray cluster. Ray Data sends blocks of jobs to actors, which have a model each, and returns results."""

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

from icm_cli.errors import ConfigError, DeviceError, IcmError, UsageError, format_count
from icm_cli.files.atomic_writes import remove_stale_temporaries, temporary_name
from icm_cli.files.system_errors import error_for_failed_write
from icm_cli.matting.devices import EngineSetup, WorkerIdle
from icm_cli.matting.digest import describe_build
from icm_cli.matting.engine import Engine
from icm_cli.matting.jobs import Job
from icm_cli.matting.model_choice import ModelChoice
from icm_cli.reports.result import ImageResult

BATCHES_PER_BLOCK = 8
"""Number of model batches in a block of jobs. If an actor dies, its whole block is repeated."""
CONNECT_TIMEOUT_S = 10.0
"""Seconds to wait for the head node of a cluster."""
MAX_RESTARTS = 3
"""Largest number of restarts of an actor, and of retries of a block of jobs."""


@dataclass(frozen=True)
class ProcessContext:
    """Working directory and $OCIO of the process that runs ``icm``.

    An actor needs both, because relative paths and the conversion of colours depend on them.
    """

    folder: str
    ocio: str

    @classmethod
    def current(cls) -> Self:
        return cls(str(Path.cwd()), os.environ.get("OCIO", ""))

    def apply(self) -> None:
        """Give this process the same working directory and $OCIO."""
        os.chdir(self.folder)
        if self.ocio:
            os.environ["OCIO"] = self.ocio


class RayCluster:
    """Connection to a Ray cluster with one actor per GPU, or ``cpus`` actors with one core each.

    If this process is already connected to Ray, that connection is used and stays open. Otherwise the connection is
    closed at the end of the ``with`` block.
    """

    def __init__(self, address: str, cpus: int | None) -> None:
        """Connect; "auto" starts Ray on this machine if no cluster is running. Raises ConfigError."""
        self._owns_connection = _connect(address)
        import ray

        kind = "GPU" if cpus is None else "CPU"
        available = int(ray.cluster_resources().get(kind, 0))
        if available < (cpus or 1):
            self.__exit__()
            if cpus is None:
                raise ConfigError("the Ray cluster has no GPU; give --ray-cpus N to matte on N of its cores")
            cores = format_count(available, "core")
            raise ConfigError(f"--ray-cpus is {cpus}, and the Ray cluster has {cores}; give {available} or fewer")
        self._actor_count = cpus or available
        self._device = "cpu" if cpus else "cuda"
        self._resources: dict[str, Any] = {"num_cpus": 1} if cpus else {"num_gpus": 1}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        if self._owns_connection:
            ray.shutdown()

    @classmethod
    def from_options(cls, address: str | None, cpus: int | None, device: str) -> RayCluster | None:
        """Connect to the cluster of ``--ray``, if it is given. Raises UsageError or ConfigError."""
        if address is None:
            if cpus is not None:
                raise UsageError(f"--ray-cpus is {cpus}, and --ray is not given; give --ray too, or omit --ray-cpus")
            return None
        if device != "auto":
            raise UsageError(
                f"--ray uses the devices of the cluster, and --device is {device}; omit --device or omit --ray"
            )
        if cpus is not None and cpus < 1:
            raise UsageError(f"--ray-cpus is {cpus}; expected 1 or more")
        return cls(address, cpus)

    def choose_model(self, select_model: Callable[..., ModelChoice]) -> ModelChoice:
        """Call ``select_model(device=...)`` on a node of the cluster and return its result."""
        import ray

        remote = ray.remote(**self._resources)(_select_model_on_node)
        try:
            choice: ModelChoice = ray.get(remote.remote(ProcessContext.current(), select_model, self._device))
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, IcmError) else error) from None
        return choice

    def describe(self) -> str:
        return format_count(self._actor_count, "Ray actor")

    def create_runner(
        self, setup: EngineSetup, folder: Path, on_result: Callable[[ImageResult], None], notice: Callable[[str], None]
    ) -> RayRunner:
        """Return a runner. Raises UsageError if a node cannot see the output ``folder``."""
        self._check_nodes(folder)
        return RayRunner(setup, self._actor_count, self._resources, on_result, notice)

    def _check_nodes(self, folder: Path) -> None:
        """Check that every node has the same icm and sees the files, by a probe file in the output folder.

        Raises UsageError for a node with another icm or without the file, and ConfigError for one without icm.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        probe = Path(os.path.abspath(folder)) / temporary_name()  # noqa: PTH100
        token = secrets.token_hex()  # random, so that an older file of the same name is not accepted
        nodes = [node for node in ray.nodes() if node["Alive"]]
        try:
            probe.write_text(token)
            check = ray.remote(num_cpus=0)(_find_node_problem)
            arguments = ProcessContext.current(), str(probe), token, describe_build()
            pending = []
            for node in nodes:
                on_this_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                pending.append(check.options(scheduling_strategy=on_this_node).remote(*arguments))
            problems = ray.get(pending)
        except ray.exceptions.RayTaskError as error:
            raise ConfigError(
                f"a node of the Ray cluster cannot run icm: {error.cause}; install icm on every node"
            ) from None
        except OSError as error:
            raise error_for_failed_write(folder, error) from error
        finally:
            probe.unlink(missing_ok=True)
        for node, problem in zip(nodes, problems, strict=True):
            if problem:
                raise UsageError(f"node {node['NodeManagerAddress']} of the Ray cluster {problem}")


@dataclass
class RayRunner:
    """Runs jobs on Ray actors, which write the alphas. Results are reported in the caller's thread."""

    setup: EngineSetup
    actor_count: int
    resources: dict[str, Any]
    on_result: Callable[[ImageResult], None]
    notice: Callable[[str], None]
    _peak_memory_bytes: int = 0

    def run(self, jobs: Sequence[Job]) -> None:
        """Matte every image. An image that fails is reported, and the run continues unless ``fail_fast`` is set.

        Raises OutputError if no more output can be written, DeviceError if the actors die repeatedly.
        """
        from ray.exceptions import RayActorError

        try:
            for row in self._message_rows(jobs).iter_rows():
                message = pickle.loads(row["message"])  # noqa: S301  our own actor wrote it
                self._handle_message(message)
                is_failed = isinstance(message, ImageResult) and message.status == "failed"
                if is_failed and self.setup.options.fail_fast:
                    return
        except RayActorError as error:
            reason = str(error).splitlines()[0]
            raise DeviceError(f"Ray actors died repeatedly on the same images: {reason}") from error

    def peak_memory_bytes(self) -> int:
        """Largest peak memory of any actor."""
        return self._peak_memory_bytes

    def _message_rows(self, jobs: Sequence[Job]) -> Any:
        """Return a dataset of the pickled messages of all actors. It is lazy: reading its rows runs the actors.

        Each call of an actor processes one block of jobs.
        """
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised as well
        block_size = min(BATCHES_PER_BLOCK * self.setup.choice.batch_size, math.ceil(len(jobs) / self.actor_count))
        blocks = ray.data.from_items(
            [{"job": pickle.dumps(job)} for job in jobs], override_num_blocks=math.ceil(len(jobs) / block_size)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Ray has no other way to bound restarts
            return blocks.map_batches(
                MattingActor,
                fn_constructor_args=(ProcessContext.current(), self.setup),
                batch_size=None,
                compute=ray.data.ActorPoolStrategy(size=self.actor_count),
                max_restarts=MAX_RESTARTS,
                max_task_retries=MAX_RESTARTS,
                **self.resources,
            )

    def _handle_message(self, message: Any) -> None:
        match message:
            case ImageResult():
                self.on_result(message)
            case WorkerIdle():
                self._peak_memory_bytes = max(self._peak_memory_bytes, message.peak_memory_bytes)
            case IcmError():
                raise message
            case str():
                self.notice(message)


class MattingActor:
    """Ray actor that holds a model and mattes one block of jobs per call."""

    def __init__(self, context: ProcessContext, setup: EngineSetup) -> None:
        context.apply()
        cv2.setNumThreads(1)
        self._setup = setup
        self._engine: Engine | None = None
        self._messages: list[Any] = []

    def __call__(self, block: dict[str, Any]) -> dict[str, list[bytes]]:
        """Matte the jobs of column "job", and return results and notices in column "message"."""
        self._messages = []
        try:
            jobs = [pickle.loads(job) for job in block["job"]]  # noqa: S301  our own parent wrote it
            if self._engine is None:
                self._clean_up_after_restart(jobs)
                self._engine = self._setup.create_engine(self._add_message, self._add_message)
            self._engine.run(jobs)
            self._add_message(WorkerIdle(self._engine.peak_memory_bytes()))
        except DeviceError:
            os._exit(1)  # Ray restarts the actor, possibly on another node, and repeats these jobs there
        except IcmError as error:
            self._add_message(error)
        return {"message": [pickle.dumps(message) for message in self._messages]}

    def _add_message(self, message: Any) -> None:
        self._messages.append(message)

    def _clean_up_after_restart(self, jobs: Sequence[Job]) -> None:
        """If this actor replaces one that died, report that and remove its temporary files."""
        import ray

        if ray.get_runtime_context().was_current_actor_reconstructed:
            for folder in {job.output.parent for job in jobs}:
                remove_stale_temporaries(folder)
            node = ray.util.get_node_ip_address()
            self._add_message(f"a Ray actor died and was restarted on {node}; its block of images is repeated")


def _connect(address: str) -> bool:
    """Connect this process to Ray; return False if it was connected already. Raises ConfigError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"--ray needs Ray, which is not installed ({error}); run: pip install 'icm-cli[ray]'"
        ) from error
    if ray.is_initialized():
        return False
    before = signal.getsignal(signal.SIGTERM)
    try:
        if address != "auto":
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()  # Ray would retry for minutes
        ray.init(address=None if address == "auto" else address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, OverflowError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--ray {address}: no cluster answers there ({reason}); expected auto or an address such as 10.0.0.1:6379"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's handler would end the run without a report
    return True


def _select_model_on_node(
    context: ProcessContext, select_model: Callable[..., ModelChoice], device: str
) -> ModelChoice:
    """Select the model on a node of the cluster, in the context of the driver."""
    context.apply()
    return select_model(device=device)


def _find_node_problem(context: ProcessContext, probe: str, token: str, build: str) -> str:
    """Return why this node cannot matte; "" if it can. ``probe``: a file that must contain ``token``."""
    if describe_build() != build:
        return f"has icm {describe_build()}, and this machine has {build}; install the same version on both"
    content = None
    with contextlib.suppress(OSError):
        Path(context.folder).stat()
        content = Path(probe).read_text()
    if content != token:
        return (
            f"does not see {Path(probe).parent} and {context.folder} as this machine does; put sources, alphas and "
            "the working directory on a file system that all nodes share"
        )
    return ""
