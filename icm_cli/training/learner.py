"""The learner: the model on its devices, its optimiser, and the running mean of its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from icm_cli.device import is_out_of_memory, make_accelerator, process_count
from icm_cli.errors import ConfigError, TrainingError
from icm_cli.geometry import CanvasRule
from icm_cli.matting.predictor import Predictor
from icm_cli.model.core import InContextMatting
from icm_cli.model.loading import backbone_digest, load_model_for_training
from icm_cli.training.batches import StepSampler
from icm_cli.training.optimisation import Ema, rate_factor
from icm_cli.training.settings import Settings, TrainConfig
from icm_cli.training.stages.contract import AnyStage
from icm_cli.training.state import to_cpu


class Learner:
    """A model in training, alone or as one of several processes whose gradients are averaged."""

    def __init__(
        self,
        settings: Settings,
        stage: AnyStage,
        *,
        checkpoint: Path | None,
        weights: str | None,
        device: str,
        offline: bool,
        workers: int,
    ) -> None:
        """Load the model and make everything ready for the first step. Raises ConfigError."""
        config = self.config = settings.train
        self.workers = workers
        """Processes that make samples."""
        self.is_from_checkpoint = checkpoint is not None
        processes, micro_batch = micro_batches(config)
        self.micro_batch = micro_batch
        self.accumulation = config.batch_size // (processes * micro_batch)
        """Micro-batches of this process in a step."""
        self.accelerator, self.device = make_accelerator(device, config.precision, self.accumulation)
        self.model = load_model_for_training(
            settings.model, checkpoint=checkpoint, weights=weights, offline=offline, seed=config.seed
        )
        _check_canvas(self.model.backbone.canvas, config.canvas_px)
        module = stage.module(self.model)
        may_learn = "backbone" in stage.learns and self.model.backbone.is_trainable
        self.trains_backbone = bool(config.backbone_rate) and may_learn
        if config.backbone_rate and not self.trains_backbone:
            raise ConfigError(
                f"train: backbone_rate is {config.backbone_rate}, but the backbone is frozen here; set it to 0"
            )
        self.weights_digest = backbone_digest(settings.model, checkpoint, weights, offline=offline)
        """Digest of the weights that the backbone began with."""
        if not self.trains_backbone:
            self.model.backbone.requires_grad_(False)
            self.model.backbone.set_dtype(self.device.dtype, self.device.transformer_dtype)
            self.model.backbone.optimise_for_inference()
        for name in ("head", "objects", "edges"):
            if (part := getattr(self.model, name)) is not None and name not in stage.learns:
                part.requires_grad_(False)
        self._learned = {name for name in stage.learns if name != "backbone" or self.trains_backbone}
        if self.device.torch_device.type != "mps":
            self.model.use_channels_last()
        optimiser = _optimiser(self.model, config)
        self.forward, self.optimiser = self.accelerator.prepare(module, optimiser)
        self.tensors = self._trained_tensors()
        self.ema = Ema(self.tensors, config.ema)
        self.learn()

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and speaks to the user."""
        return bool(self.accelerator.is_main_process)

    def sampler(self, first_step: int) -> StepSampler:
        """The samples of this process from a step on."""
        accelerator, config = self.accelerator, self.config
        return StepSampler(
            config.batch_size,
            self.micro_batch,
            accelerator.process_index,
            accelerator.num_processes,
            first_step,
            None if config.minutes else config.steps,
        )

    def learn(self) -> None:
        """Training mode: of BatchNorm none of the backbone's learns statistics, and of the others those whose weights
        learn, where the configuration says so."""
        self.model.train()
        self.model.backbone.eval()
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d) and (self.config.batch_norm == "fixed" or is_frozen(module)):
                module.eval()

    @contextlib.contextmanager
    def inference_mode(self) -> Iterator[Predictor]:
        """The model as it would be used, with the mean of its weights, to matte and to save."""
        with self.ema.swapped(), self.accelerator.autocast():
            self.model.eval()
            try:
                yield Predictor(self.model, self.device, is_in_training=True)
            finally:
                self.learn()

    def accumulate(self) -> AbstractContextManager[None]:
        """Around a micro-batch: gradients are shared with other processes only at the last of a step."""
        around: AbstractContextManager[None] = self.accelerator.accumulate(self.forward)
        return around

    def backward(self, loss: Tensor) -> None:
        """Gradients of a micro-batch's summed loss.

        They are averaged over micro-batches and processes, so the loss is multiplied by their number: the mean of
        gradients equals the published sum over the batch.
        """
        self.accelerator.backward(loss * (self.accumulation * self.accelerator.num_processes))

    def step(self) -> None:
        """Take the optimiser's step where the gradients are complete."""
        self.optimiser.step()
        self.optimiser.zero_grad()

    @property
    def has_scaler(self) -> bool:
        """Whether losses are scaled, as float16 needs; it takes care of gradients that overflow."""
        return self.accelerator.scaler is not None

    def set_rates(self, step: int, elapsed: float | None) -> float:
        """Set every group's learning rate for a step (from 0), of a run ``elapsed`` (0..1) of whose minutes have
        passed; returns the rate of what is not backbone."""
        factor = rate_factor(step, self.config, elapsed)
        for group in self.optimiser.param_groups:
            group["lr"] = group["full_rate"] * factor
        return self.config.rate * factor

    def clip(self) -> float:
        """Clip the gradients, where they are complete and it is wanted; returns their norm before, else 0."""
        if not self.accelerator.sync_gradients:
            return 0.0
        parameters = [each for each in self.model.parameters() if each.requires_grad]
        return float(self.accelerator.clip_grad_norm_(parameters, self.config.clip_norm or float("inf")))

    def any_process(self, wants: bool) -> bool:
        """Whether any process wants it."""
        if self.accelerator.num_processes == 1:
            return wants
        if wants:
            self.accelerator.set_trigger()
        return bool(self.accelerator.check_trigger())

    def mean(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Figures averaged over processes."""
        if self.accelerator.num_processes == 1:
            return dict(figures)
        values = torch.tensor(list(figures.values()), dtype=torch.float32, device=self.device.torch_device)
        return dict(zip(figures, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, beside its number."""
        scaler = self.accelerator.scaler
        return {
            "model": to_cpu(self.tensors),
            "mean": to_cpu(self.ema.mean),
            "optimiser": self.optimiser.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        for here, there in ((self.tensors, state["model"]), (self.ema.mean, state["mean"])):
            for name, tensor in here.items():
                tensor.copy_(there[name])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    @contextlib.contextmanager
    def explain_errors(self) -> Iterator[None]:
        """Turn running out of memory, here or in a worker, into a sentence that says what to do."""
        try:
            yield
        except (RuntimeError, MemoryError, ConnectionError, EOFError) as error:
            # From a signal handler, so it may come anywhere; or a tensor was on its way.
            if isinstance(error, (ConnectionError, EOFError)) or "DataLoader worker" in str(error):
                raise TrainingError(
                    "a process that makes samples died, perhaps of too little memory; go on from the last saved state "
                    "with --resume and fewer --workers"
                ) from error
            if not is_out_of_memory(error):
                raise
            raise ConfigError(
                f"out of memory on {self.device.description} with {self.micro_batch} samples at a time; set "
                "train.micro_batch_size lower (gradients are accumulated, so the batch stays the same) or "
                "train.canvas_px"
            ) from error

    def _trained_tensors(self) -> dict[str, Tensor]:
        """Weights and statistics that training changes, by their names in the model."""
        return {name: tensor for name, tensor in self.model.state_dict().items() if name.split(".")[0] in self._learned}


def is_frozen(module: nn.Module) -> bool:
    """Whether none of its weights learns."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def micro_batches(config: TrainConfig) -> tuple[int, int]:
    """Number of processes, and of samples that each takes at a time. Raises ConfigError."""
    processes = process_count()
    micro_batch = config.micro_batch_size or max(1, config.batch_size // processes)
    if config.batch_size % (processes * micro_batch):
        raise ConfigError(
            f"train: batch_size is {config.batch_size}, which {processes} process(es) with {micro_batch} samples at a "
            "time cannot make; expected a multiple of their product"
        )
    return processes, micro_batch


def _check_canvas(rule: CanvasRule, canvas_px: int) -> None:
    if rule.square and canvas_px != rule.long_side_px:
        raise ConfigError(f"train: canvas_px is {canvas_px}, and the backbone's canvas has {rule.long_side_px} px")
    if canvas_px % rule.multiple_px:
        raise ConfigError(f"train: canvas_px is {canvas_px}; expected a multiple of {rule.multiple_px}")


def _optimiser(model: InContextMatting, config: TrainConfig) -> torch.optim.Optimizer:
    """Groups by part and by whether weights decay: those of norms, and biases, do not."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = config.backbone_rate if name.startswith("backbone.") else config.rate
            groups.setdefault((rate, config.weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    kind = torch.optim.Adam if config.optimiser == "adam" else torch.optim.AdamW
    return kind(
        [
            {"params": parameters, "full_rate": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
        ],
        lr=config.rate,
    )
