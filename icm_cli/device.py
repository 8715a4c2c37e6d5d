"""The one place that decides on device and dtype, and knows what running out of memory looks like."""

from __future__ import annotations

import contextlib
import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from icm_cli import environment
from icm_cli.errors import ConfigError, UsageError, did_you_mean

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CUDA_BATCH_SIZE = 8
"""First automatic batch size on a GPU; running out of memory halves it."""


@dataclass(frozen=True)
class Device:
    """Device of the model, dtype of its convolutions and projections, and dtype of its transformers."""

    torch_device: torch.device
    dtype: torch.dtype
    transformer_dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """For example "float16", or "float32, transformers bfloat16"."""
        name = _name(self.dtype)
        return name if self.transformer_dtype == self.dtype else f"{name}, transformers {_name(self.transformer_dtype)}"

    @property
    def auto_batch_size(self) -> int:
        """Batches pay on a GPU; on a CPU they only cost memory."""
        return CUDA_BATCH_SIZE if self.torch_device.type == "cuda" else 1

    @property
    def description(self) -> str:
        """For example "cuda:0 (NVIDIA H200), float16"."""
        is_gpu_here = self.torch_device.type == "cuda" and torch.cuda.is_available()
        kind = f" ({torch.cuda.get_device_name(self.torch_device)})" if is_gpu_here else ""
        return f"{self.torch_device}{kind}, {self.dtype_name}"

    def peak_memory_bytes(self) -> int:
        """The most memory held so far: the GPU's on CUDA, else the process's."""
        if self.torch_device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.torch_device)
        return environment.peak_memory_bytes()


def resolve_device(device: str = "auto", dtype: str = "auto", *, transformer_dtype: str = "auto") -> Device:
    """Names as given on the command line -> a device that is here. Raises ConfigError.

    ``transformer_dtype``: name of the dtype that a model's transformers want where ``dtype`` is "auto".
    """
    target = _best_device() if device == "auto" else _named_device(device)
    if dtype == "auto" and transformer_dtype != "auto":
        return replace(resolve_device(device), transformer_dtype=DTYPES[transformer_dtype])
    if dtype == "auto":
        if target.type == "cuda":
            return Device(target, torch.float16, torch.float16)
        return Device(target, torch.float32, _fast_transformer_dtype(target))
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not known. {did_you_mean(dtype, ['auto', *DTYPES])}")
    return Device(target, DTYPES[dtype], DTYPES[dtype])


def parse_devices(text: str) -> list[str]:
    """Names of the devices in a list: "cpu", "cuda:0,cuda:1", "cpu,cpu"; "cuda:all" stands for every GPU.

    Raises ConfigError for one that is not here, UsageError for several that cannot work together.
    """
    if text == "cuda:all":
        if not (count := torch.cuda.device_count()):
            raise ConfigError(f"device 'cuda:all' finds no GPU on this machine; {_here()}")
        return [f"cuda:{number}" for number in range(count)]
    names = [name.strip() for name in text.split(",")]
    if len(names) == 1:
        return names
    places = [_named_device(name) for name in names]
    if len({place.type for place in places}) > 1:
        raise UsageError(
            f"--device {text} mixes kinds of devices, whose alphas differ in their last bits; give devices of one kind"
        )
    if places[0].type != "cpu" and len(set(places)) < len(places):
        raise UsageError(f"--device {text} names a device twice, and a model on it takes all of it; name each once")
    return names


def _fast_transformer_dtype(place: torch.device) -> torch.dtype:
    """bfloat16 on CPUs whose matrix products are faster in it."""
    return torch.bfloat16 if place.type == "cpu" and _cpu_is_faster_in_bfloat16() else torch.float32


def _cpu_is_faster_in_bfloat16() -> bool:
    """Whether it has AMX, or is AMD's with AVX-512's bfloat16.

    One of Intel's with that but without AMX took twice as long as in float32, one with AVX2 alone ten times (measured);
    AMD's are taken for faster by what their instructions can do. It goes by what the CPU is and not by a measurement,
    so that all processes of a run on one machine agree.
    """
    has_matrices, has_products = (
        getattr(torch.cpu, name, lambda: False) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    return bool(has_matrices() or (has_products() and "AuthenticAMD" in _cpu_vendor()))


def _cpu_vendor() -> str:
    """The line of the CPU's maker where Linux gives it, else what the platform says of the processor."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        return next((line for line in lines if line.startswith("vendor_id")), "")
    return platform.processor()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names of accelerate's mixed precision -> dtype of a frozen backbone."""


def process_count() -> int:
    """Number of processes of a data-parallel run (torchrun, accelerate launch), else 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process of such a run writes the files."""
    return os.environ.get("RANK", "0") == "0"


def make_accelerator(device: str, precision: str, accumulation: int) -> tuple[Any, Device]:
    """An ``accelerate.Accelerator`` for training on a device as named on the command line, and that device.

    In a data-parallel run (torchrun, accelerate launch) every process has a device of its own of the kind named. On a
    CPU that is not faster in bfloat16 training is in float32, and the accelerator's ``mixed_precision`` says so.
    Raises ConfigError.
    """
    from datetime import timedelta

    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    place = resolve_device(device).torch_device
    if precision == "fp16" and place.type == "cpu":
        raise ConfigError("precision fp16 needs a GPU, and this run is on the CPU; set train.precision to bf16 or no")
    if precision == "bf16" and place.type == "cpu" and not _cpu_is_faster_in_bfloat16():
        precision = "no"
    if process_count() == 1:
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run in this process may have been another
        if place.type == "cuda":
            torch.cuda.set_device(place)
    accelerator = Accelerator(
        cpu=place.type == "cpu",
        mixed_precision=precision,
        gradient_accumulation_steps=accumulation,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],  # others wait while one validates
    )
    place, dtype = accelerator.device, PRECISIONS[precision]
    if place.type == "cpu" and dtype == torch.bfloat16:  # convolutions are many times slower in it there
        return accelerator, Device(place, torch.float32, dtype)
    return accelerator, Device(place, dtype, dtype)


def available_devices() -> list[str]:
    """Every device of this machine, best first, for example ["cuda:0 (NVIDIA H200)", "cpu (2 threads)"]."""
    gpus = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return [*gpus, *mps, f"cpu ({torch.get_num_threads()} threads)"]


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether an error of the model means that memory ran out, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text


def is_device_lost(error: RuntimeError | MemoryError) -> bool:
    """Whether an error of the model means that its device will do no more work for this process."""
    lost = getattr(torch, "AcceleratorError", None)
    return (lost is not None and isinstance(error, lost)) or str(error).startswith("CUDA error")


def release_memory(device: Device) -> None:
    """Give cached GPU memory back after running out of it."""
    if device.torch_device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.torch_device.type == "mps":
        torch.mps.empty_cache()


def _best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda:0")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _here() -> str:
    return f"here are: {', '.join(available_devices())}"


def _named_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is not known; expected auto, cpu, cuda, cuda:N or mps") from None
    present = {
        "cpu": True,
        "cuda": (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if device.type not in present:
        raise ConfigError(f"device {name!r} is not supported; expected auto, cpu, cuda, cuda:N or mps")
    if not present[device.type]:
        raise ConfigError(f"device {name!r} is not on this machine; {_here()}")
    return torch.device("cuda:0") if name == "cuda" else device
