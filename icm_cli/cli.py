"""The ``icm`` command: its options, signals and exit codes. What the commands do stands in ``icm_cli.matting``."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Optional, Self

import typer

from icm_cli.errors import IcmError

SIGNAL_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Batch matting: show it ONE reference image with a mask of the thing you want, and it pulls that thing "
    "out of every image of a folder as an alpha matte.",
)


def main() -> None:
    """Entry point of the ``icm`` script."""
    app()


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    import torch

    from icm_cli import __version__
    from icm_cli.device import available_devices

    print(f"icm {__version__} (torch {torch.__version__}); devices: {', '.join(available_devices())}")
    raise typer.Exit


@app.callback()
def icm(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and the devices."),
    ] = False,
) -> None:
    pass


@app.command()
def matte(
    ref: Annotated[
        list[Path], typer.Option(help="Reference image; repeat for several. An RGBA cut-out needs no mask.")
    ],
    src: Annotated[
        str, typer.Option(help="Folder (recursive), image, quoted glob, text file of paths, or - for paths on stdin.")
    ],
    out: Annotated[str, typer.Option(help="Folder for the alphas; the source tree is mirrored.")],
    mask: Annotated[
        Optional[list[Path]], typer.Option(help="Mask of the reference, the thing in white; one for each --ref.")
    ] = None,
    model: Annotated[
        Optional[str],
        typer.Option(
            help="lite, icm-sd21, sd21-training-free, or a .yaml file.", show_default="the checkpoint's, or lite"
        ),
    ] = None,
    checkpoint: Annotated[
        Optional[Path], typer.Option(help="Trained weights: the published .ckpt, or .safetensors of icm.")
    ] = None,
    weights: Annotated[
        Optional[str], typer.Option(help="Stable Diffusion folder or hub id.", show_default="the model's")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    batch_size: Annotated[
        str, typer.Option(help="Images at a time; auto suits the device. Halved where memory runs out.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of the noise that Stable Diffusion is shown.")] = 0,
    workers: Annotated[
        Optional[int], typer.Option(min=1, help="Threads that read, and that write.", show_default="auto")
    ] = None,
    include: Annotated[
        Optional[list[str]], typer.Option(help="Only images whose path or name matches; repeatable.")
    ] = None,
    exclude: Annotated[
        Optional[list[str]], typer.Option(help="No images whose path or name matches; repeatable.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make alphas again that are there already.")] = False,
    gt: Annotated[Optional[Path], typer.Option(help="Folder of true alphas; adds MSE and SAD per image.")] = None,
    report: Annotated[Optional[Path], typer.Option(help="Write a line per image to this .csv or .json.")] = None,
    contact_sheet: Annotated[
        Optional[Path], typer.Option(help="Write source, alpha and cut-out on grey to this .png.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List source -> output and stop.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never reach for the network.")] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first image that fails.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print details and a line per image.")] = False,
) -> None:
    """Pull the thing that the reference shows out of every image: one uint8 alpha PNG per image, same size.

    Run the same command again to go on after a stop: alphas that are there already are kept.

    Exit codes: 0 all done; 1 some images failed; 2 wrong usage or input; 3 model, weights, device or output;
    130 Ctrl-C; 143 SIGTERM.
    """
    with _exit_codes(verbose):
        from icm_cli import matting
        from icm_cli.terminal import Terminal, print_plan

        terminal = Terminal(quiet=quiet, verbose=verbose)
        done = matting.matte(
            ref=ref,
            mask=mask or [],
            src=src,
            out=out,
            model=model,
            checkpoint=checkpoint,
            weights=weights,
            device=device,
            dtype=dtype,
            batch_size=int(batch_size) if batch_size.isdigit() else batch_size,
            seed=seed,
            workers=workers or matting.DEFAULT_WORKERS,
            include=include or [],
            exclude=exclude or [],
            overwrite=overwrite,
            gt=gt,
            report=report,
            contact_sheet=contact_sheet,
            dry_run=dry_run,
            offline=offline,
            fail_fast=fail_fast,
            listener=terminal,
        )
        if dry_run:
            print_plan(done)
        raise typer.Exit(done.exit_code)


@contextlib.contextmanager
def _exit_codes(verbose: bool) -> Iterator[None]:
    """Turn errors and signals into one sentence and an exit code; --verbose shows the traceback too."""
    with Interrupt() as interrupt:
        try:
            yield
        except IcmError as error:
            if verbose:
                import traceback

                traceback.print_exc()
            print(f"icm: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            print("icm: interrupted; run the same command again to go on", file=sys.stderr)
            raise typer.Exit(interrupt.exit_code) from None


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a KeyboardInterrupt; later ones let the writes in hand finish."""

    def __init__(self) -> None:
        self.exit_code = SIGNAL_EXIT_CODES[signal.SIGINT]
        self._is_raised = False

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._receive) for number in SIGNAL_EXIT_CODES}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self._is_raised:
            return
        self._is_raised = True
        self.exit_code = SIGNAL_EXIT_CODES[signal.Signals(number)]
        raise KeyboardInterrupt


if __name__ == "__main__":
    main()
