"""The ``icm`` command: its options and exit codes. The commands themselves are functions of the API,
``icm_cli.matte``, ``icm_cli.evaluate`` and ``icm_cli.train``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperGroup

from icm_cli.errors import IcmError
from icm_cli.signals import Interrupt
from icm_cli.terminal import write_line

OF_A_MODEL = (
    *("model", "checkpoint", "weights", "edges", "edges_weights", "device", "dtype", "batch_size", "seed", "offline"),
    *("refs_per_group", "write_references", "save_alphas", "shot", "learn_steps"),
)
"""Options of ``icm eval`` that only a model reads."""


class Commands(TyperGroup):
    """Commands whose every failure, of Typer's parser too, has its line for farms and programs."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        ctx.meta["icm"] = given
        with _told(given):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _told(ctx.meta["icm"]):
            return super().invoke(ctx)


@contextlib.contextmanager
def _told(arguments: Sequence[str]) -> Iterator[None]:
    """Tell farms and programs of what ends the command unsaid: wrong usage, or a fault of icm."""
    try:
        yield
    except (typer.Exit, typer.Abort):  # said already
        raise
    except Exception as error:
        from icm_cli.progress import tell_failure

        if "unexpected extra argument" in getattr(error, "message", ""):
            error.message += '. Quote globs and patterns, as --src "imgs/*.jpg", or the shell takes them apart.'  # type: ignore[attr-defined]
        is_usage = hasattr(error, "format_message")
        text = error.format_message() if is_usage else f"{type(error).__name__}: {error}"  # type: ignore[attr-defined]
        tell_failure(arguments, text, 2 if is_usage else 1)
        raise


app = typer.Typer(
    cls=Commands,
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

    from icm_cli.device import available_devices
    from icm_cli.environment import __version__

    print(f"icm {__version__} (torch {torch.__version__}); devices: {', '.join(available_devices())}")
    raise typer.Exit


def _list_models(wanted: bool) -> None:
    if not wanted:
        return
    with _exit_codes(verbose=False):
        from icm_cli.model.hub.catalogue import list_models
        from icm_cli.terminal import print_models

        print_models(list_models())
    raise typer.Exit


@app.callback()
def icm(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and the devices."),
    ] = False,
) -> None:
    pass


Model = Annotated[
    Optional[str],
    typer.Option(
        help="A model that --list-models names, such as lite, or a .yaml file.",
        show_default="the checkpoint's, or lite",
    ),
]
Checkpoint = Annotated[
    Optional[Path], typer.Option(help="Trained weights: the published .ckpt, or .safetensors of icm.")
]
Weights = Annotated[
    Optional[str], typer.Option(help="Folder or hub id of the backbone's weights.", show_default="the model's")
]
Edges = Annotated[
    str, typer.Option(help="How the coarse alpha gets its edges: model (its own), closed-form or vitmatte.")
]
EdgesWeights = Annotated[
    Optional[str],
    typer.Option(help="Folder or hub id of ViTMatte's weights.", show_default="hustvl/vitmatte-small-composition-1k"),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Devices = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:N or mps; or several of one kind: cuda:0,cuda:1 or cuda:all.")
]
LearnSteps = Annotated[
    Optional[int],
    typer.Option(
        help="Steps in which the head learns the references before it mattes: for a shot, or pictures of one place.",
        show_default="140 with --shot, else 0",
    ),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
BatchSize = Annotated[str, typer.Option(help="Images at a time; auto suits the device. Halved where memory runs out.")]
Seed = Annotated[int, typer.Option(help="Seed of Stable Diffusion's noise.")]
Workers = Annotated[
    Optional[int], typer.Option(min=1, help="Threads that read, that write, processes that score.", show_default="auto")
]
Offline = Annotated[bool, typer.Option("--offline", help="Never reach for the network.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print details and one line per image.")]
Reports = Annotated[
    Optional[list[Path]],
    typer.Option(
        help="Write a report: .csv with one row per image, .json with everything, .html to look at; repeatable."
    ),
]


@app.command()
def matte(
    ref: Annotated[
        list[Path], typer.Option(help="Reference image; repeat for several. An RGBA cut-out needs no mask.")
    ],
    src: Annotated[
        str,
        typer.Option(
            help="Folder (recursive), image, quoted glob, frames such as shot.####.exr, text file of paths, or - for "
            "paths on stdin."
        ),
    ],
    out: Annotated[
        str,
        typer.Option(help="Folder for the alphas, the source tree is mirrored; or frames such as out/matte.####.exr."),
    ],
    list_models: Annotated[  # noqa: ARG001 (its callback reads it)
        bool,
        typer.Option(
            "--list-models",
            callback=_list_models,
            is_eager=True,
            help="List the models, what they need, its licence, whether it is here; and stop.",
        ),
    ] = False,
    mask: Annotated[
        Optional[list[Path]], typer.Option(help="Mask of the reference, the thing in white; one for each --ref.")
    ] = None,
    mask_label: Annotated[
        Optional[str],
        typer.Option(help="Which label of the mask is the thing, where it has several: a number, or a colour #rrggbb."),
    ] = None,
    mask_orientation: Annotated[
        str,
        typer.Option(
            help="How the masks of references that EXIF turns lie: upright as these are seen, stored as they lie in "
            "their files, or auto, by size."
        ),
    ] = "auto",
    model: Model = None,
    checkpoint: Checkpoint = None,
    weights: Weights = None,
    edges: Edges = "model",
    edges_weights: EdgesWeights = None,
    device: Devices = "auto",
    ray: Annotated[
        Optional[str],
        typer.Option(
            help="Matte on a Ray cluster, one model on each GPU: auto (the one there is, else one started here), or "
            "its address. Needs the extra 'ray'.",
            show_default="none",
        ),
    ] = None,
    ray_cpus: Annotated[
        Optional[int],
        typer.Option(help="With --ray: so many models, on a core each, in the place of GPUs.", show_default="none"),
    ] = None,
    dtype: Dtype = "auto",
    batch_size: BatchSize = "auto",
    seed: Seed = 0,
    workers: Workers = None,
    colorspace: Annotated[
        str,
        typer.Option(
            help="Colour space of the sources: auto (the file's own label; else sRGB, and linear Rec.709 for EXR and "
            "HDR), or any name of the OpenColorIO configuration, such as ACEScg."
        ),
    ] = "auto",
    ref_colorspace: Annotated[
        Optional[str], typer.Option(help="Colour space of the references.", show_default="that of the sources")
    ] = None,
    layer: Annotated[
        str,
        typer.Option(
            help="Layer of the EXR sources: the name of a part, or the prefix of channels, as beauty of beauty.R.",
            show_default="R,G,B of the first part that has them",
        ),
    ] = "",
    ref_layer: Annotated[
        Optional[str], typer.Option(help="Layer of EXR references.", show_default="that of the sources")
    ] = None,
    ocio: Annotated[
        Optional[Path],
        typer.Option(help="OpenColorIO configuration.", show_default="$OCIO, or the built-in studio one"),
    ] = None,
    view: Annotated[
        Optional[str],
        typer.Option(help="View that shows scene-referred pictures to the model.", show_default="Un-tone-mapped"),
    ] = None,
    exposure: Annotated[float, typer.Option(help="Stops added before the view, for dark or bright plates.")] = 0.0,
    root: Annotated[
        Optional[Path],
        typer.Option(
            help="Folder that the alphas' tree mirrors from.",
            show_default="the folder given, of a glob its fixed part, of a list the working directory",
        ),
    ] = None,
    white: Annotated[
        Optional[float],
        typer.Option(
            help="Value of white in sources and references of more than 8 bits, such as 255 in floats of 0..255.",
            show_default="that of their type; 1 in floats",
        ),
    ] = None,
    include: Annotated[
        Optional[list[str]], typer.Option(help="Only images whose path or name matches; repeatable.")
    ] = None,
    exclude: Annotated[
        Optional[list[str]], typer.Option(help="No images whose path or name matches; repeatable.")
    ] = None,
    frames: Annotated[Optional[str], typer.Option(help="Frames such as 1001-1100 or 1001-1100x2.")] = None,
    missing: Annotated[
        str,
        typer.Option(help="Frames that are not there: skip (a notice), report (as failed), or error (do nothing)."),
    ] = "skip",
    shard: Annotated[
        Optional[str],
        typer.Option(help="What machine i of n does, as i/n: the same images every time."),
    ] = None,
    shot: Annotated[
        bool,
        typer.Option(
            "--shot",
            help="The sources are frames of one shot: the references are learned first, the thing is followed from "
            "near by, and what is found in a frame is carried into the next along its motion.",
        ),
    ] = False,
    learn_steps: LearnSteps = None,
    name: Annotated[
        Optional[str],
        typer.Option(
            help="Names of the alphas, with {stem}, {frame} and {suffix}: {stem}_matte{frame}.",
            show_default="{stem}{frame}",
        ),
    ] = None,
    keep_suffix: Annotated[
        bool, typer.Option("--keep-suffix", help="Keep the image's ending in its alpha's name: a.jpg.png.")
    ] = False,
    format: Annotated[
        Optional[str], typer.Option(help="png, tiff or exr.", show_default="png, or as the ending of --out says")
    ] = None,
    depth: Annotated[
        Optional[str],
        typer.Option(
            help="8, 16, half or float, as the format has it.",
            show_default="8, exr half; a foreground has its source's",
        ),
    ] = None,
    channel: Annotated[str, typer.Option(help="Name of an EXR's alpha channel.")] = "A",
    foreground: Annotated[
        str,
        typer.Option(
            help="Write RGBA, the thing's own colours without a halo of the background: straight, premultiplied, or "
            "auto (premultiplied in EXR)."
        ),
    ] = "none",
    invert: Annotated[bool, typer.Option("--invert", help="Write the hold-out matte, 1 - alpha.")] = False,
    trimap: Annotated[
        str, typer.Option(help="Write a trimap, beside (name.trimap.png) or instead of the alpha.")
    ] = "none",
    trimap_band: Annotated[int, typer.Option(help="Distance from the edge, in px, that a trimap leaves unknown.")] = 10,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make alphas again that are there already.")] = False,
    gt: Annotated[
        Optional[str],
        typer.Option(help="True alphas, a folder or frames gt.####.png; adds MSE, SAD, GRAD, CONN and MAD per image."),
    ] = None,
    report: Reports = None,
    contact_sheet: Annotated[
        Optional[Path], typer.Option(help="Write source, alpha and cut-out on grey to this .png.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List source -> output and stop.")] = False,
    offline: Offline = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first image that fails.")] = False,
    progress: Annotated[
        str,
        typer.Option(
            help="auto (a bar in a terminal, else lines), plain, none, json (an object per event), or openjd "
            "(lines for Deadline Cloud and other workers)."
        ),
    ] = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Pull the thing that the reference shows out of every image: one uint8 alpha PNG per image, same size.

    Run the same command again to go on after a stop: alphas that are there already are kept.

    Exit codes: 0 all done; 1 some images failed; 2 wrong usage or input; 3 model, weights, device or output;
    130 Ctrl-C; 143 SIGTERM.
    """
    with _exit_codes(verbose) as ending:
        from icm_cli.environment import DEFAULT_WORKERS
        from icm_cli.matting import matte as matting
        from icm_cli.progress import make_terminal
        from icm_cli.terminal import print_plan

        terminal = make_terminal(progress, quiet=quiet, verbose=verbose)
        ending.tell = terminal.error
        done = matting.matte(
            ref=ref,
            mask=mask or [],
            mask_label=mask_label,
            mask_orientation=mask_orientation,
            src=src,
            out=out,
            model=model,
            checkpoint=checkpoint,
            weights=weights,
            edges=edges,
            edges_weights=edges_weights,
            device=device,
            ray=ray,
            ray_cpus=ray_cpus,
            dtype=dtype,
            batch_size=_number_or_auto(batch_size),
            seed=seed,
            workers=workers or DEFAULT_WORKERS,
            colorspace=colorspace,
            ref_colorspace=ref_colorspace,
            layer=layer,
            ref_layer=ref_layer,
            ocio=ocio,
            view=view,
            exposure=exposure,
            root=root,
            white=white,
            include=include or [],
            exclude=exclude or [],
            frames=frames,
            missing=missing,
            shard=shard,
            shot=shot,
            learn_steps=learn_steps,
            name=name,
            keep_suffix=keep_suffix,
            format=format,
            depth=depth,
            channel=channel,
            foreground=foreground,
            invert=invert,
            trimap=trimap,
            trimap_band=trimap_band,
            overwrite=overwrite,
            gt=gt,
            report=report or [],
            contact_sheet=contact_sheet,
            dry_run=dry_run,
            offline=offline,
            fail_fast=fail_fast,
            listener=terminal,
        )
        if dry_run:
            print_plan(done)
        raise typer.Exit(done.exit_code)


@app.command("eval")
def evaluate(
    ctx: typer.Context,
    dataset: Annotated[
        Optional[str],
        typer.Option(
            help="aim500, icm57, am2k, p3m500np, p3m500p, ppm100, rwp636, rw100, composition1k, d646, transparent460, "
            "davis16, openimages, or folder for your own."
        ),
    ] = None,
    data_root: Annotated[Optional[Path], typer.Option(help="Folder that the dataset was unpacked into.")] = None,
    images: Annotated[Optional[str], typer.Option(help="folder: images, a folder or quoted glob.")] = None,
    alphas: Annotated[Optional[str], typer.Option(help="folder: true alphas, named like the images.")] = None,
    trimaps: Annotated[Optional[str], typer.Option(help="folder: trimaps, named like the images.")] = None,
    groups: Annotated[
        Optional[Path], typer.Option(help="JSON in the published schema that says which images show the same thing.")
    ] = None,
    backgrounds: Annotated[
        Optional[Path], typer.Option(help="Images to put behind datasets that are only foregrounds.")
    ] = None,
    split: Annotated[str, typer.Option(help="test or train.")] = "test",
    video: Annotated[bool, typer.Option("--video", help="Groups are videos; adds dtSSD.")] = False,
    pred: Annotated[
        Optional[Path], typer.Option(help="Score these alphas, made by any tool, and load no model.")
    ] = None,
    references: Annotated[
        Optional[Path], typer.Option(help="References of an earlier run: its JSON report or its references file.")
    ] = None,
    write_references: Annotated[Optional[Path], typer.Option(help="Write the references to this .json.")] = None,
    rounds: Annotated[
        Optional[int], typer.Option(help="Rounds, each with other references; gives mean and spread.", show_default="1")
    ] = None,
    refs_per_group: Annotated[Optional[int], typer.Option(help="References of a group.", show_default="1")] = None,
    region: Annotated[
        Optional[list[str]], typer.Option(help="whole or unknown; repeatable.", show_default="the dataset's")
    ] = None,
    size: Annotated[
        Optional[str], typer.Option(help="original, long1024 or square768.", show_default="the dataset's")
    ] = None,
    lineage: Annotated[
        Optional[str], typer.Option(help="Lineage of GRAD and CONN: composition or aim.", show_default="the dataset's")
    ] = None,
    trimap_kernel: Annotated[
        Optional[int],
        typer.Option(
            help="Side in px of the square that dilates 0 < alpha < 1 where no trimap is published.", show_default="25"
        ),
    ] = None,
    model: Model = None,
    checkpoint: Checkpoint = None,
    weights: Weights = None,
    edges: Edges = "model",
    edges_weights: EdgesWeights = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = "auto",
    seed: Seed = 0,
    workers: Workers = None,
    save_alphas: Annotated[Optional[Path], typer.Option(help="Keep the alphas in this folder.")] = None,
    shot: Annotated[bool, typer.Option("--shot", help="Groups are shots, matted as by icm matte --shot.")] = False,
    learn_steps: LearnSteps = None,
    note: Annotated[
        Optional[str], typer.Option(help="A sentence that every report repeats, such as what the alphas are worth.")
    ] = None,
    report: Reports = None,
    allow: Annotated[
        Optional[list[str]],
        typer.Option(help="A kind of bad data that is no failure, such as empty-alpha; repeatable."),
    ] = None,
    offline: Offline = False,
    compare: Annotated[
        Optional[tuple[Path, Path]],
        typer.Option(help="Two JSON reports: print what changed, image by image, and stop.", metavar="A.json B.json"),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Matte a published dataset in context and score it, or score alphas that any tool made (--pred).

    Run the same command again to go on after a stop.

    Exit codes: 0 all scored; 1 some data were bad or images failed, the rest is scored; 2 wrong usage or input;
    3 model, weights, device or output; 130 Ctrl-C; 143 SIGTERM.
    """
    with _exit_codes(verbose):
        from icm_cli.errors import UsageError

        if compare is not None:
            _refuse(ctx, "--compare only prints what changed between two reports", but=("compare", "verbose"))
            from icm_cli.reports.comparison import compare_reports
            from icm_cli.terminal import print_comparison

            comparison = compare_reports(*compare)
            print_comparison(comparison, *compare)
            raise typer.Exit(0 if comparison.images else 1)
        if pred is not None:
            _refuse(ctx, "--pred scores alphas that are there already", only=OF_A_MODEL)
        if dataset is None:
            raise UsageError(
                "no dataset was given; give --dataset NAME (folder for your own), or --compare A.json B.json"
            )
        from icm_cli.evaluation import evaluate as evaluating
        from icm_cli.terminal import Terminal

        done = evaluating.evaluate(
            dataset,
            data_root,
            images=images,
            alphas=alphas,
            trimaps=trimaps,
            groups=groups,
            backgrounds=backgrounds,
            split=split,
            video=video,
            pred=pred,
            references=references,
            write_references=write_references,
            rounds=rounds,
            refs_per_group=refs_per_group,
            region=region or [],
            size=size,
            lineage=lineage,
            trimap_kernel=trimap_kernel,
            model=model,
            checkpoint=checkpoint,
            weights=weights,
            edges=edges,
            edges_weights=edges_weights,
            device=device,
            dtype=dtype,
            batch_size=_number_or_auto(batch_size),
            seed=seed,
            workers=workers,
            save_alphas=save_alphas,
            shot=shot,
            learn_steps=learn_steps,
            note=note,
            report=report or [],
            allow=allow or [],
            offline=offline,
            listener=Terminal(quiet=quiet, verbose=verbose),
        )
        raise typer.Exit(done.exit_code)


@app.command()
def train(
    ctx: typer.Context,
    config: Annotated[str, typer.Option(help="Model and recipe: a .yaml file, or a preset such as lite or icm-sd21.")],
    data: Annotated[
        Optional[Path], typer.Option(help=".yaml file of sources, backgrounds and validation, for the config's 'data'.")
    ] = None,
    out: Annotated[
        Optional[str], typer.Option(help="Folder for checkpoints and logs.", show_default="runs/CONFIG")
    ] = None,
    checkpoint: Annotated[Optional[Path], typer.Option(help="Start from these weights instead of random ones.")] = None,
    weights: Weights = None,
    device: Device = "auto",
    workers: Annotated[
        Optional[int],
        typer.Option(min=0, help="Processes that make samples; 0 makes them in this one.", show_default="auto"),
    ] = None,
    set_: Annotated[
        Optional[list[str]],
        typer.Option("--set", help="Override a setting, as train.steps=500; repeatable.", metavar="KEY=VALUE"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, if there is one.")] = False,
    preview: Annotated[
        int, typer.Option(min=0, help="Write a contact sheet of so many training samples, and train nothing.")
    ] = 0,
    pack: Annotated[
        Optional[Path],
        typer.Option(help="Also write the result with its backbone into one small .safetensors file, to give away."),
    ] = None,
    offline: Offline = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a model: the paper's decoder on frozen Stable Diffusion features, or the small model whole.

    Ctrl-C and SIGTERM save the step in hand; the same command with --resume goes on with the next one. On several GPUs:
    torchrun --nproc-per-node N -m icm_cli.cli train ...

    Exit codes: 0 trained; 1 training cannot go on (a NaN or infinite loss, unreadable data); 2 wrong usage or input;
    3 configuration, weights, device or output; 130 Ctrl-C; 143 SIGTERM.
    """
    with _exit_codes(verbose, go_on="run the same command with --resume to go on"):
        from icm_cli.environment import DEFAULT_WORKERS
        from icm_cli.terminal import TrainingTerminal
        from icm_cli.training.train import train as run

        if preview:
            _refuse(ctx, "--preview trains nothing", only=("resume", "pack"))
        run(
            config,
            data=data,
            out=out,
            checkpoint=checkpoint,
            weights=weights,
            device=device,
            workers=DEFAULT_WORKERS if workers is None else workers,
            overrides=set_ or [],
            resume=resume,
            preview=preview,
            pack=pack,
            offline=offline,
            listener=TrainingTerminal(quiet=quiet, verbose=verbose),
        )


def _refuse(ctx: typer.Context, why: str, *, only: Sequence[str] = (), but: Sequence[str] = ()) -> None:
    """Raise UsageError for an option that was given and that nothing would read: one of ``only``, or any ``but`` these.

    ``why``: the beginning of the sentence, which says what the command does instead.
    """
    from icm_cli.errors import UsageError

    for option in ctx.command.params:
        name = option.name or ""
        source = ctx.get_parameter_source(name)
        is_given = source is not None and source.name == "COMMANDLINE"
        if is_given and (name in only if only else name not in but):
            raise UsageError(f"{why}, so {option.opts[0]} has no effect; leave it out")


def _number_or_auto(text: str) -> int | str:
    return int(text) if text.isdigit() else text


@dataclass
class Ending:
    """Manner in which the end of a run that cannot go on is told."""

    tell: Callable[[str, int], None] = lambda text, _: write_line(sys.stderr, f"icm: {text}")
    """Takes the sentence and the exit code."""


@contextlib.contextmanager
def _exit_codes(verbose: bool, go_on: str = "run the same command again to go on") -> Iterator[Ending]:
    """Turn errors and signals into one sentence and an exit code; --verbose shows the traceback too."""
    ending = Ending()
    with Interrupt() as interrupt:
        try:
            yield ending
        except IcmError as error:
            if verbose:
                import traceback

                traceback.print_exc()
            ending.tell(str(error), error.exit_code)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            ending.tell(f"interrupted; {go_on}", interrupt.exit_code)
            raise typer.Exit(interrupt.exit_code) from None


if __name__ == "__main__":
    main()
