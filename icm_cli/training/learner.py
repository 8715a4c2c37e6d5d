"""The learner: the model on its device, its optimiser, and the moving average of its weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from icm_cli.config import COMPONENT_KEYS
from icm_cli.device import make_accelerator, process_count
from icm_cli.environment import DEFAULT_WORKERS, is_out_of_memory
from icm_cli.errors import ConfigError, TrainingError
from icm_cli.model.core import InContextMatting
from icm_cli.model.loading import backbone_digest, load_model_for_training
from icm_cli.options import TrainingDeviceOptions
from icm_cli.training.batches import assign_sample_numbers
from icm_cli.training.settings import Settings, TrainConfig

START_FACTOR = 1e-6
"""Factor of the learning rate at step 0 of the warm-up, as in the code released with the paper."""


class Learner:
    """A model in training, in one process or in one of several whose gradients are averaged."""

    def __init__(
        self,
        settings: Settings,
        trainable_parts: Collection[str],
        select_module: Callable[[InContextMatting], nn.Module],
        checkpoint: Path | None,
        options: TrainingDeviceOptions,
    ) -> None:
        """Load the model. Raises ConfigError.

        The weights of ``trainable_parts`` may change; ``select_module`` returns the module with gradients.
        """
        config = self.config = settings.train
        weights = options.weights
        self.workers = DEFAULT_WORKERS if options.workers is None else options.workers
        """Number of processes that make samples."""
        self.offline = options.offline
        self.is_from_checkpoint = checkpoint is not None
        processes, self.micro_batch = split_batch(config)
        self.accumulation = config.batch_size // (processes * self.micro_batch)
        """Number of micro-batches that this process takes in a step."""
        self.accelerator, self.device = make_accelerator(options.device, config.precision, self.accumulation)
        self.model = load_model_for_training(
            settings.model, checkpoint=checkpoint, weights=weights, offline=self.offline, seed=config.seed
        )
        self.trained_parts = self._select_trained_parts(trainable_parts)
        self._check_backbone_settings()
        self.weights_digest = backbone_digest(settings.model, checkpoint, weights, offline=self.offline)
        """Digest of the backbone's initial weights."""
        saves_backbone = self.trains_backbone and self.model.backbone.is_self_contained
        self.separate_weights = None if saves_backbone else weights
        """Option ``--weights`` for the checkpoints of this run; None if they contain the backbone."""
        module = select_module(self.model)
        self._freeze_other_parts()
        if self.device.torch_device.type != "mps":
            self.model.use_channels_last()
        self.forward, self.optimiser = self.accelerator.prepare(module, _make_optimiser(self.model, config))
        """The module with gradients, and its optimiser, as Accelerate has wrapped them."""
        self.tensors = {
            name: tensor
            for name, tensor in self.model.state_dict().items()
            if name.partition(".")[0] in self.trained_parts
        }
        """The weights and statistics that training changes, by their names in the model, such as "head.norm.weight"."""
        self.ema = MovingAverage(self.tensors, config.ema_decay)
        self.set_training_mode()

    def _select_trained_parts(self, trainable_parts: Collection[str]) -> set[str]:
        """Return the parts whose weights change: the backbone only if it has a learning rate and can be trained."""
        parts = set(trainable_parts)
        if not (self.config.backbone_learning_rate and self.model.backbone.is_trainable):
            parts.discard("backbone")
        return parts

    @property
    def trains_backbone(self) -> bool:
        """Whether the weights of the backbone change."""
        return "backbone" in self.trained_parts

    def _check_backbone_settings(self) -> None:
        """Raise ConfigError for settings that do not suit the backbone of the model."""
        config, rule = self.config, self.model.backbone.canvas
        if rule.square and config.canvas_px != rule.long_side_px:
            raise ConfigError(f"train: canvas_px is {config.canvas_px}, and the backbone needs {rule.long_side_px} px")
        is_multiple = config.canvas_px % rule.multiple_px == 0
        config.check("canvas_px", is_multiple, f"a multiple of {rule.multiple_px}")
        if config.backbone_learning_rate and not self.trains_backbone:
            raise ConfigError(
                f"train: backbone_learning_rate is {config.backbone_learning_rate}, but the backbone is frozen in this "
                "run; expected 0"
            )

    def _freeze_other_parts(self) -> None:
        """Freeze all parts of the model that are not trained. A frozen backbone gets the dtypes of inference."""
        for name in COMPONENT_KEYS:
            part = getattr(self.model, name)
            if part is not None and name not in self.trained_parts:
                part.requires_grad_(False)
        if not self.trains_backbone:
            self.model.backbone.set_dtype(self.device.dtype, self.device.transformer_dtype)
            self.model.backbone.optimise_for_inference()

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and reports to the user."""
        return bool(self.accelerator.is_main_process)

    def sample_numbers(self, first_step: int) -> Iterator[list[int]]:
        """Yield the numbers of the samples of this process, one micro-batch at a time, starting at a step."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        steps = None if self.config.minutes else self.config.steps
        return assign_sample_numbers(self.config.batch_size, self.micro_batch, process, processes, first_step, steps)

    def set_training_mode(self) -> None:
        """Set the model to training mode.

        BatchNorm layers keep their statistics if they are in the backbone or if their weights are frozen. With
        ``batch_norm: fixed``, all of them do.
        """
        self.model.train()
        self.model.backbone.eval()
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                is_frozen = not any(parameter.requires_grad for parameter in module.parameters())
                if is_frozen or self.config.batch_norm == "fixed":
                    module.eval()

    @contextlib.contextmanager
    def inference_mode(self) -> Iterator[None]:
        """Context in which the model has the moving average of its weights and is in evaluation mode."""
        with self.ema.swap_into_model(), self.accelerator.autocast():
            self.model.eval()
            try:
                yield
            finally:
                self.set_training_mode()

    def accumulate_gradients(self) -> AbstractContextManager[None]:
        """Return the context for a micro-batch. Processes exchange gradients only in the last micro-batch of a step."""
        return self.accelerator.accumulate(self.forward)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a micro-batch's summed loss.

        Accelerate averages gradients over micro-batches and processes. The loss is multiplied by their number, so that
        the result is the gradient of the sum over the batch, as in the paper.
        """
        self.accelerator.backward(loss * (self.accumulation * self.accelerator.num_processes))

    def step_optimiser(self) -> None:
        """Take the optimiser's step, if the gradients of the whole batch are accumulated."""
        self.optimiser.step()
        self.optimiser.zero_grad()

    def set_learning_rates(self, step: int, elapsed_fraction: float | None) -> float:
        """Set every group's learning rate for a step (from 0) and return the rate of the parts other than the backbone.

        ``elapsed_fraction`` (0..1) is the fraction of the run's time limit that has passed, None without a limit.
        """
        factor = learning_rate_factor(step, self.config, elapsed_fraction)
        for group in self.optimiser.param_groups:
            group["lr"] = group["full_rate"] * factor
        return self.config.learning_rate * factor

    def clip_gradients(self) -> float:
        """Clip the gradients to ``clip_norm`` and return their norm before clipping.

        Returns 0 if the gradients of the whole batch are not accumulated yet.
        """
        if not self.accelerator.sync_gradients:
            return 0.0
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        max_norm = math.inf if self.config.clip_norm is None else self.config.clip_norm
        return float(self.accelerator.clip_grad_norm_(parameters, max_norm))

    def is_true_anywhere(self, condition: bool) -> bool:
        """Return whether a condition is true in any of the processes."""
        if self.accelerator.num_processes == 1:
            return condition
        if condition:
            self.accelerator.set_trigger()
        return bool(self.accelerator.check_trigger())

    def average_over_processes(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return each metric's mean over the processes."""
        if self.accelerator.num_processes == 1:
            return dict(metrics)
        values = torch.tensor(list(metrics.values()), dtype=torch.float32, device=self.device.torch_device)
        return dict(zip(metrics, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    def export_state(self) -> dict[str, Any]:
        """Return everything that the next step depends on, except its number."""
        scaler = self.accelerator.scaler
        return {
            "model": _copy_to_cpu(self.tensors),
            "mean": _copy_to_cpu(self.ema.average),
            "optimiser": self.optimiser.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`export_state` returned."""
        for current, saved in ((self.tensors, state["model"]), (self.ema.average, state["mean"])):
            for name, tensor in current.items():
                tensor.copy_(saved[name])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    @contextlib.contextmanager
    def explain_errors(self) -> Iterator[None]:
        """Context that converts out-of-memory errors, of this or of a worker process, to errors that say what to do."""
        try:
            yield
        except (RuntimeError, MemoryError, ConnectionError, EOFError) as error:
            # If a worker dies, torch's signal handler raises RuntimeError at any place in this process, or the
            # connection breaks while a tensor is received.
            has_worker_died = isinstance(error, (ConnectionError, EOFError)) or "DataLoader worker" in str(error)
            if has_worker_died:
                raise TrainingError(
                    "a process that makes samples died, possibly because memory ran out; continue from the last saved "
                    "state with --resume and fewer --workers"
                ) from error
            if not is_out_of_memory(error):
                raise
            raise ConfigError(
                f"out of memory on {self.device.description} with {self.micro_batch} samples at a time; reduce "
                "train.micro_batch_size (gradients are accumulated, so the batch stays the same) or train.canvas_px"
            ) from error


def split_batch(config: TrainConfig) -> tuple[int, int]:
    """Return the number of processes, and of samples that each takes at a time. Raises ConfigError."""
    processes = process_count()
    micro_batch = config.micro_batch_size or max(1, config.batch_size // processes)
    if config.batch_size % (processes * micro_batch):
        raise ConfigError(
            f"train: batch_size is {config.batch_size}, with {processes} process(es) and {micro_batch} samples at a "
            "time; expected a multiple of their product"
        )
    return processes, micro_batch


def _make_optimiser(model: InContextMatting, config: TrainConfig) -> torch.optim.Optimizer:
    """Create the optimiser. Parameters are grouped by learning rate and weight decay; norms and biases do not decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = config.backbone_learning_rate if name.startswith("backbone.") else config.learning_rate
            decay = config.weight_decay if parameter.ndim > 1 else 0.0  # norms and biases have one axis
            groups.setdefault((rate, decay), []).append(parameter)
    optimiser_class = torch.optim.Adam if config.optimiser == "adam" else torch.optim.AdamW
    return optimiser_class(
        [
            {"params": parameters, "full_rate": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
        ],
        lr=config.learning_rate,
    )


def _copy_to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU; later training does not change the copies."""
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def learning_rate_factor(step: int, config: TrainConfig, elapsed_fraction: float | None = None) -> float:
    """Return the factor of the learning rates at ``step`` (from 0): linear warm-up, then constant or cosine.

    The cosine reaches 0 at the last step, or at the end of the time limit if there is one. ``elapsed_fraction``: part
    of that time that has passed, 0..1.
    """
    if step < config.warmup_steps:
        return START_FACTOR + (1.0 - START_FACTOR) * step / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = elapsed_fraction
    if progress is None:
        progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


class MovingAverage:
    """Exponential moving average (EMA) of tensors. If ``decay`` is None, the tensors themselves are used instead.

    At step n the decay is at most (1 + n) / (10 + n), so that the average soon forgets the initial weights. Integer
    tensors, such as BatchNorm's counters, are copied.
    """

    def __init__(self, tensors: Mapping[str, Tensor], decay: float | None) -> None:
        self._tensors = tensors
        self._decay = decay
        self.average = {} if decay is None else {name: tensor.detach().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the current tensors, those after ``step`` (from 0), to the average."""
        if self._decay is None:
            return
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, average in self.average.items():
            if average.is_floating_point():
                average.lerp_(self._tensors[name].detach(), 1 - decay)
            else:
                average.copy_(self._tensors[name])

    @contextlib.contextmanager
    def swap_into_model(self) -> Iterator[None]:
        """Context in which the model's tensors have the values of the average."""
        self._swap_tensors()
        try:
            yield
        finally:
            self._swap_tensors()

    @torch.no_grad()
    def _swap_tensors(self) -> None:
        """Exchange the values of the model's tensors and of their averages."""
        for name, average in self.average.items():
            current = self._tensors[name].detach().clone()
            self._tensors[name].copy_(average)
            average.copy_(current)
