"""What ``icm train`` prints: progress on stderr, the summary on stdout."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping

from icm_cli.evaluation.metrics import TITLES
from icm_cli.evaluation.summary import number_text
from icm_cli.printing import write_line
from icm_cli.terminal import Terminal, show
from icm_cli.training.listening import Summary, TrainingListener


class TrainingTerminal(Terminal, TrainingListener):
    """A bar with loss, rate and samples a second; plain lines where stderr is no terminal."""

    def training_started(self, first_step: int, steps: int | None, samples: int) -> None:
        self._last = "" if steps is None else f"/{steps}"
        end = "the end of its minutes" if steps is None else steps
        self.notice(f"training from step {first_step + 1} to {end}, {samples} samples each")
        if sys.stderr and sys.stderr.isatty() and not (self.quiet or self.verbose):
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True, smoothing=0.1)

    def stepped(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def logged(self, step: int, figures: Mapping[str, float]) -> None:
        shown = {
            "loss": f"{figures['loss']:.4f}",
            "rate": f"{figures['rate']:.2e}",
            "samples/s": f"{figures['samples_per_second']:.2f}",
            "waiting": f"{figures['waiting_share']:.0%}",
        }
        if self._bar is not None:
            self._bar.set_postfix(shown)
        elif not self.quiet:
            self._print(f"[{step}{self._last}] " + ", ".join(f"{name} {value}" for name, value in shown.items()))

    def validated(self, step: int, figures: Mapping[str, float], *, is_best: bool) -> None:
        scores = {name.removeprefix("validation_"): value for name, value in figures.items()}
        text = ", ".join(f"{TITLES[name]} {number_text(value, name)}" for name, value in scores.items())
        self.notice(f"step {step}: validation {text}{' (the best so far)' if is_best else ''}")

    def training_ended(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def training_finished(self, summary: Summary) -> None:
        """Say how the run ended, and the command to matte with its result."""
        if summary.preview is not None:
            write_line(sys.stdout, f"samples are in {summary.preview}; nothing was trained")
        if self.quiet or summary.preview is not None:
            return
        show(_rows(summary))
        if summary.pack is not None:
            write_line(sys.stdout, f"packed with its backbone: {summary.pack}")
        if summary.checkpoint is not None:
            options = "--ref ref.png --mask mask.png --src imgs/ --out alphas/"
            write_line(sys.stdout, f"icm matte --checkpoint {shlex.quote(str(summary.checkpoint))} {options}")


def _rows(summary: Summary) -> list[tuple[str, str]]:
    best = "nothing was validated; the last model is the result"
    if summary.best_step is not None:
        best = f"{summary.best_step}, validation MSE {summary.best_mse:.5f}"
    rows = [
        ("steps", f"{summary.steps}"),
        ("loss", "-" if summary.loss is None else f"{summary.loss:.4f}"),
        ("best step", best),
        ("time", f"{summary.seconds:.1f} s of steps, {summary.samples_per_second:.2f} samples/s"),
        ("waiting for data", f"{summary.waiting_share:.1%} of it"),
        ("peak memory", f"{summary.peak_memory_bytes / 1e6:.0f} MB"),
        ("folder", str(summary.folder)),
    ]
    return rows + ([("unreadable", f"{summary.skipped} draws were skipped")] if summary.skipped else [])
