"""Select devices and dtypes, and recognise errors of a device."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from icm_cli import environment
from icm_cli.errors import ConfigError, DeviceError, UsageError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CUDA_BATCH_SIZE = 8
"""Initial automatic batch size on a GPU. It is halved when memory runs out."""


@dataclass(frozen=True)
class Device:
    """Device of a model, and the dtypes of its convolutions and projections, and of its transformers."""

    torch_device: torch.device
    dtype: torch.dtype
    transformer_dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """The dtypes as text, for example "float16" or "float32, transformers bfloat16"."""
        name = str(self.dtype).removeprefix("torch.")
        if self.transformer_dtype == self.dtype:
            return name
        return f"{name}, transformers {str(self.transformer_dtype).removeprefix('torch.')}"

    @property
    def auto_batch_size(self) -> int:
        """Batch size if none is given: larger batches are faster on a GPU, but not on a CPU."""
        return CUDA_BATCH_SIZE if self.torch_device.type == "cuda" else 1

    @property
    def description(self) -> str:
        """Device and dtypes as text, for example "cuda:0 (NVIDIA H200), float16"."""
        has_gpu = self.torch_device.type == "cuda" and torch.cuda.is_available()
        gpu_name = f" ({torch.cuda.get_device_name(self.torch_device)})" if has_gpu else ""
        return f"{self.torch_device}{gpu_name}, {self.dtype_name}"

    def peak_memory_bytes(self) -> int:
        """Return the peak memory so far, of the GPU on CUDA, else of the process."""
        if self.torch_device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.torch_device)
        return environment.peak_memory_bytes()


def resolve_device(device: str = "auto", dtype: str = "auto", *, transformer_dtype: str = "auto") -> Device:
    """Return the device for values of the options ``--device`` (not "cuda:all") and ``--dtype``.

    ``transformer_dtype``: dtype that the model's transformers prefer if ``dtype`` is "auto". Raises ConfigError if the
    machine has no such device.
    """
    target = _best_device() if device == "auto" else _named_device(device)
    if dtype != "auto":
        return Device(target, DTYPES[dtype], DTYPES[dtype])
    convolutions = transformers = torch.float16 if target.type == "cuda" else torch.float32
    if transformer_dtype != "auto":
        transformers = DTYPES[transformer_dtype]
    elif target.type == "cpu" and _cpu_is_faster_in_bfloat16():
        transformers = torch.bfloat16
    return Device(target, convolutions, transformers)


@contextlib.contextmanager
def device_errors(device: Device, action: str) -> Iterator[None]:
    """Convert errors of the device: ConfigError if memory ran out during ``action``, DeviceError if it was lost."""
    try:
        yield
    except Exception as error:
        if environment.is_out_of_memory(error):
            free = "" if device.torch_device.type == "cuda" else f"; {environment.measure_free_memory()}"
            raise ConfigError(
                f"memory ran out on {device.description} while {action}{free}; end other programs on it, or choose "
                "another --device, a smaller --dtype or a smaller model"
            ) from error
        if is_device_lost(error):
            raise DeviceError(f"device {device.torch_device} was lost: {str(error).splitlines()[0]}") from error
        raise


def parse_devices(text: str) -> list[str]:
    """Return the names of the devices in a list such as "cuda:0,cuda:1".

    "cuda:all" stands for every GPU. "cpu,cpu" means two processes on the CPU. A single name is not checked.

    Raises ConfigError if the machine has no such device, UsageError if the devices are of several types or a GPU is
    given twice.
    """
    if text == "cuda:all":
        gpu_count = torch.cuda.device_count()
        if gpu_count == 0:
            raise ConfigError(
                "--device is 'cuda:all', but this machine has no GPU; available devices: "
                f"{', '.join(available_devices())}"
            )
        return [f"cuda:{number}" for number in range(gpu_count)]
    names = [name.strip() for name in text.split(",")]
    if len(names) == 1:
        return names
    devices = [_named_device(name) for name in names]
    if len({device.type for device in devices}) > 1:
        raise UsageError(
            f"--device {text} mixes types of devices, whose alphas differ slightly; give devices of one type"
        )
    if devices[0].type != "cpu" and len(set(devices)) < len(devices):
        raise UsageError(
            f"--device {text} contains a device twice, but a GPU can only be used by one model; give each once"
        )
    return names


def _cpu_is_faster_in_bfloat16() -> bool:
    """Return whether the CPU has AMX, or is an AMD CPU with the bfloat16 instructions of AVX-512.

    On other CPUs, bfloat16 is slower than float32 (measured). Only the type of the CPU decides, so that all processes
    on one machine agree.
    """
    has_amx, has_avx512_bf16 = (
        getattr(torch.cpu, name, lambda: False) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    return bool(has_amx() or (has_avx512_bf16() and "AuthenticAMD" in environment.processor_property("vendor_id")))


PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names of mixed precision in accelerate -> dtype of a frozen backbone."""


def process_count() -> int:
    """Return the number of processes of a data-parallel run (torchrun, accelerate launch), else 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this process writes the files of a data-parallel run."""
    return os.environ.get("RANK", "0") == "0"


def make_accelerator(device: str, precision: str, accumulation: int) -> tuple[Any, Device]:
    """Return an ``accelerate.Accelerator`` for training on a device of the type ``device``, and its device.

    In a data-parallel run (torchrun, accelerate launch), every process has its own device. On a CPU that is not faster
    in bfloat16, training uses float32, and the accelerator's ``mixed_precision`` is "no". ``precision``: a name in
    :data:`PRECISIONS`. ``accumulation``: number of batches whose gradients are accumulated per step.

    Raises ConfigError if the device is not available, or does not support the precision.
    """
    from datetime import timedelta

    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    target = resolve_device(device).torch_device
    if precision == "fp16" and target.type == "cpu":
        raise ConfigError(
            "train.precision is fp16, which needs a GPU, but this run is on the CPU; set it to bf16 or no"
        )
    if precision == "bf16" and target.type == "cpu" and not _cpu_is_faster_in_bfloat16():
        precision = "no"
    if process_count() == 1:
        # An earlier run in this process may have had other settings.
        AcceleratorState._reset_state(reset_partial_state=True)
        if target.type == "cuda":
            torch.cuda.set_device(target)
    accelerator = Accelerator(
        cpu=target.type == "cpu",
        mixed_precision=precision,
        gradient_accumulation_steps=accumulation,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],  # the others wait while one validates
    )
    dtype = PRECISIONS[precision]
    # On a CPU, convolutions in bfloat16 are many times slower.
    is_slow = accelerator.device.type == "cpu" and dtype == torch.bfloat16
    return accelerator, Device(accelerator.device, torch.float32 if is_slow else dtype, dtype)


def available_devices() -> list[str]:
    """Return the devices of this machine, best first, for example ["cuda:0 (NVIDIA H200)", "cpu (2 threads)"]."""
    gpus = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return [*gpus, *mps, f"cpu ({torch.get_num_threads()} threads)"]


def is_device_lost(error: Exception) -> bool:
    """Return whether an error means that this process can no longer use the device."""
    accelerator_error = getattr(torch, "AcceleratorError", None)  # not in every version of torch
    if accelerator_error is not None and isinstance(error, accelerator_error):
        return True
    return str(error).startswith("CUDA error")


def release_memory(device: Device) -> None:
    """Release cached GPU memory."""
    if device.torch_device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.torch_device.type == "mps":
        torch.mps.empty_cache()


def _best_device() -> torch.device:
    """Return the first GPU (CUDA or MPS), or the CPU of a machine without one."""
    if torch.cuda.is_available():
        return torch.device("cuda:0")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _named_device(name: str) -> torch.device:
    """Return the device for a value of --device, such as "cuda:1". Raises ConfigError if this machine lacks it."""
    kind, _, number = name.partition(":")
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if int(number or 0) >= counts.get(kind, 0):
        raise ConfigError(f"this machine has no device {name!r}; available devices: {', '.join(available_devices())}")
    return torch.device("cuda:0") if name == "cuda" else torch.device(name)
