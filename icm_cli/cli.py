"""The ``icm`` command: options, exit codes and error messages.

The commands themselves are functions of the API: ``icm_cli.matte``, ``icm_cli.evaluate`` and ``icm_cli.train``. Their
options are defined in :mod:`icm_cli.options`.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperCommand, TyperGroup

from icm_cli.environment import resource_errors
from icm_cli.errors import IcmError, UsageError
from icm_cli.files.system_errors import describe_os_error, is_system_error
from icm_cli.options import EvaluateOptions, MatteOptions, ReviewOptions, TrainOptions
from icm_cli.options.definition import OptionField, Options, Panel
from icm_cli.signals import Interrupt

Callback = Callable[[bool], None]
GLOB_HINT = 'quote globs and patterns, such as --src "imgs/*.jpg", so that the shell does not expand them'
COORDINATES_HINT = "write coordinates as one word, such as --point 640,360"
SINGLE_INPUTS = ("src", "hints", "garbage", "keep")
"""Options that name one input. A second one is an error, because the parser would use only the last one."""
ARGUMENTS, IS_VERBOSE = "icm.arguments", "icm.is_verbose"
"""Keys of ``Context.meta``: the words of the command line, and whether ``--verbose`` is among them."""


class ReportingGroup(TyperGroup):
    """Group of commands that reports every error as one message, to farms as well."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = list(args)
        with _exit_codes(ctx):
            options, words, _ = self.make_parser(ctx).parse_args(list(args))
            options.pop("help", None)
            if options and words:  # the options of the group itself, such as --version, print something and exit
                flag = next(iter(options)).replace("_", "-")
                raise UsageError(f"--{flag} exits at once, so {words[0]!r} has no effect; remove it")
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _exit_codes(ctx):
            return super().invoke(ctx)


class StrictCommand(TyperCommand):
    """Command that names all missing options, all unexpected words, or a repeated option, in one message."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # completion in a shell
            return super().parse_args(ctx, args)
        values, words, given = self.make_parser(ctx).parse_args(list(args))
        for option in given:
            if option.name in SINGLE_INPUTS and given.count(option) > 1:
                advice = "give one folder, one glob or one list of files" if option.name == "src" else "give one"
                raise UsageError(
                    f"{_parameter_name(option)} is given {given.count(option)} times, but takes one value; {advice}"
                )
        if words and "help" not in values:
            are_numbers = all(re.fullmatch("[-+0-9.,]+", word) for word in words)
            hint = COORDINATES_HINT if are_numbers else GLOB_HINT
            raise UsageError(f"unexpected words: {' '.join(words)}; {hint}")
        required = [option for option in self.params if option.required]
        missing = [_parameter_name(option) for option in required if values.get(option.name) is None]
        exits_at_once = any(option.is_eager and option.name in values for option in self.get_params(ctx))
        if missing and not exits_at_once:
            plural = "s" if len(missing) > 1 else ""
            raise UsageError(f"missing option{plural}: {', '.join(missing)}; see {ctx.command_path} --help")
        return super().parse_args(ctx, args)


def _parameter_name(parameter: Any) -> str:
    """Return the flag of an option, or the metavar of an argument."""
    return str(parameter.metavar if parameter.param_type_name == "argument" else parameter.opts[0])


@contextlib.contextmanager
def _exit_codes(ctx: Any) -> Iterator[None]:
    """Context that turns interrupts and known errors into one message and an exit code."""
    from icm_cli.progress import find_progress_mode, print_error, report_error_to_farm

    progress = find_progress_mode(ctx.meta[ARGUMENTS])
    with Interrupt() as interrupt:
        try:
            with resource_errors():
                yield
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            remedies = {"train": "with --resume to continue", "review": "again to continue the review"}
            remedy = remedies.get(ctx.invoked_subcommand, "again to resume")
            message, exit_code = f"interrupted; run the same command {remedy}", interrupt.exit_code
        except Exception as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                typer.echo(str(error), err=True, nl=False)
                report_error_to_farm(progress, "no command was given", 2)
                raise typer.Exit(2) from None
            message_and_code = _describe_error(ctx, error)
            if message_and_code is None:
                report_error_to_farm(progress, f"{type(error).__name__}: {error}", 1)
                raise
            message, exit_code = message_and_code
            if ctx.meta.get(IS_VERBOSE) and exit_code != UsageError.exit_code:
                import traceback

                traceback.print_exc()
        else:
            return
    print_error(progress, message, exit_code)
    raise typer.Exit(exit_code)


def _describe_error(ctx: Any, error: Exception) -> tuple[str, int] | None:
    """Return message and exit code of an expected error; None for one that is a fault of icm."""
    if isinstance(error, IcmError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.filename and is_system_error(error):
        return f"{error.filename} cannot be accessed: {describe_os_error(error)}", IcmError.exit_code
    if hasattr(error, "format_message"):  # of the parser
        text = error.format_message().rstrip(".")
        command = " ".join(filter(None, (ctx.command_path, ctx.invoked_subcommand)))
        return f"{text[0].lower()}{text[1:]}; see {command} --help", UsageError.exit_code
    return None


app = typer.Typer(
    cls=ReportingGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Batch matting by example: give ONE reference image with a mask of an object, and icm extracts that object "
    "from every image of a folder as an alpha matte.",
)


def main() -> None:
    """Run the ``icm`` script. Raises KeyboardInterrupt for a Ctrl-C before a command has begun."""
    try:
        sys.exit(app(standalone_mode=False))
    except typer.Abort:
        raise KeyboardInterrupt from None


def _with_options(
    options_class: type[Options], callbacks: Mapping[str, Callback] | None = None
) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Return a decorator for the function of a command, which takes one options object.

    The decorator returns a function with one parameter for each option, which is what Typer reads. ``callbacks``: name
    of a flag, such as ``list_models`` -> function that Typer calls instead of the command if the flag is given.
    """

    def decorate(body: Callable[[Options], None]) -> Callable[..., None]:
        def command(ctx: typer.Context, **values: Any) -> None:
            ctx.meta[IS_VERBOSE] = values["verbose"]
            given = [name for name in values if _is_given(ctx, name)]
            parsed = {field.name: field.parse_text(values[field.name]) for field in options_class.option_fields()}
            body(options_class.from_values(parsed, given))

        # Typer lists the options in this order, everyday options first.
        fields = sorted(options_class.option_fields(), key=lambda field: field.panel is not Panel.EVERYDAY)
        context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        parameters = [context, *(_typer_parameter(field, (callbacks or {}).get(field.name)) for field in fields)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__name__, command.__doc__ = body.__name__, body.__doc__
        return command

    return decorate


def _typer_parameter(field: OptionField, callback: Callback | None) -> inspect.Parameter:
    """Return the parameter of a Typer command for an option. ``callback``: see :func:`_with_options`."""
    properties = field.properties
    if properties.is_positional:
        info: Any = typer.Argument(help=properties.help, metavar=field.flag)
    else:
        suggestions = properties.suggestions or ((lambda: field.choices) if field.choices else None)
        info = typer.Option(
            *(properties.flags or (field.flag,)),
            help=properties.help,
            metavar=field.metavar or "|".join(field.choices) or None,
            show_default=properties.shown_default or True,
            rich_help_panel=None if field.panel is Panel.EVERYDAY else field.panel.value,
            autocompletion=(lambda: list(suggestions())) if suggestions else None,
            callback=callback,
            is_eager=callback is not None,
        )
    default = None if field.is_repeatable else field.default
    if field.is_required:
        default = inspect.Parameter.empty
    annotation = Annotated[_typer_type(field), info]  # type: ignore[valid-type]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _typer_type(field: OptionField) -> Any:
    """Return the type that Typer parses. For most options it is text, which icm converts with its own messages."""
    value_type: Any = field.value_type if field.value_type in (bool, tuple[Path, Path]) else str
    if field.is_repeatable:
        value_type = list[value_type]
    return Optional[value_type] if field.default in (None, ()) else value_type


def _is_given(ctx: typer.Context, name: str) -> bool:
    """Return whether an option is on the command line."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _print_version(is_given: bool) -> None:
    """Print the version and the devices, and exit."""
    if not is_given:
        return
    import torch

    from icm_cli.device import available_devices
    from icm_cli.environment import __version__

    print(f"icm {__version__} (torch {torch.__version__}); devices: {', '.join(available_devices())}")
    raise typer.Exit


def _print_models(is_given: bool) -> None:
    """Print all models, and exit."""
    if not is_given:
        return
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


@app.command(cls=StrictCommand)
@_with_options(MatteOptions, callbacks={"list_models": _print_models})
def matte(options: MatteOptions) -> None:
    """Extract the object of the reference from every image, as one alpha matte per image.

    Example: icm matte --ref ref.png --mask mask.png --src imgs/ --out alphas/

    Run the same command again to resume. Alphas that are up to date are kept.

    Exit codes: 0 success; 1 some images failed; 2 wrong option or input;
    3 model, weights, device or output cannot be used; 130 Ctrl-C; 143 SIGTERM.
    """
    from icm_cli.matting.matte import matte as run_matte
    from icm_cli.progress import make_terminal
    from icm_cli.terminal import print_plan

    report = run_matte(options, listener=make_terminal(options.display))
    if options.reports.dry_run:
        print_plan(report)
    raise typer.Exit(report.exit_code)


@app.command("eval", cls=StrictCommand)
@_with_options(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> None:
    """Score a model on a dataset, or score finished alphas of any tool (--pred).

    Example: icm eval --dataset aim500 --data-root AIM-500/ --report aim500.html

    Run the same command again to resume.

    Exit codes: 0 success; 1 bad data or failed images (the others are scored);
    2 wrong option or input; 3 model, weights, device or output cannot be used;
    130 Ctrl-C; 143 SIGTERM.
    """
    if options.reports.compare is not None:
        other_options = {field.name for field in options.option_fields()} - {"compare", "verbose"}
        options.refuse_given(other_options, "--compare only prints the differences between two reports")
        from icm_cli.reports.comparison import compare_reports
        from icm_cli.terminal import print_comparison

        comparison = compare_reports(*options.reports.compare)
        print_comparison(comparison, *options.reports.compare)
        raise typer.Exit(0 if comparison.images else 1)
    from icm_cli.evaluation.evaluate import evaluate as run_evaluate
    from icm_cli.terminal import Terminal

    display = options.display
    report = run_evaluate(options, listener=Terminal(quiet=display.quiet, verbose=display.verbose))
    raise typer.Exit(report.exit_code)


@app.command(cls=StrictCommand)
@_with_options(TrainOptions)
def train(options: TrainOptions) -> None:
    """Train a model: lite, or the paper's decoder on frozen Stable Diffusion features.

    Example: icm train --config lite --data data.yaml

    Ctrl-C and SIGTERM save the current step. Run the same command with --resume
    to continue. On several GPUs, start the command with torchrun:
    torchrun --nproc-per-node N -m icm_cli.cli train ...

    Exit codes: 0 success; 1 training failed (NaN loss, unreadable data);
    2 wrong option or input; 3 configuration, weights, device or output cannot
    be used; 130 Ctrl-C; 143 SIGTERM.
    """
    from icm_cli.terminal import TrainingTerminal
    from icm_cli.training.train import train as run_train

    if options.training.preview:
        options.refuse_given(["resume", "pack"], "--preview trains nothing")
    display = options.display
    run_train(options, listener=TrainingTerminal(quiet=display.quiet, verbose=display.verbose))


@app.command(cls=StrictCommand)
@_with_options(ReviewOptions)
def review(options: ReviewOptions) -> None:
    """Check the alphas of a run in the browser, and correct those that are wrong.

    Prints the link to the page on a line of its own. Ctrl-C ends the server; everything is saved at once.

    Exit codes: 2 wrong usage or input; 3 model, weights, device or output; 130 Ctrl-C; 143 SIGTERM.
    """
    from icm_cli.review.server import review as run_review
    from icm_cli.terminal import ReviewTerminal

    run_review(options, ReviewTerminal(quiet=options.display.quiet, verbose=options.display.verbose))


if __name__ == "__main__":
    main()
