"""The command line: parse, compile, print. `qcompile MODEL …` is `qcompile compile MODEL …`."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import click
from rich.console import Console

import qcompile
from qcompile.calib.observers import Observer
from qcompile.core.errors import QcompileError, first_line
from qcompile.options import Options, parse_bound, parse_shape

INTERRUPTED = 130


class DefaultToCompile(click.Group):
    """A group whose first word may be left out when it is ``compile``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put ``compile`` in front of what starts with neither a command nor one of the group's own options."""
        own = {name for parameter in self.params for name in parameter.opts} | set(ctx.help_option_names)
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["compile", *args]
        return super().parse_args(ctx, args)


@click.group(cls=DefaultToCompile, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(qcompile.__version__, "--version", message="qcompile %(version)s")
def cli() -> None:
    r"""Compile an ONNX model for an edge device: quantized, verified, and with its reasons.

    \b
    qcompile MODEL.onnx --target cpu --data calib.npz -o build/model

    Exit codes: 0 done, 2 usage, 3 bad input model, 4 bad data, 5 budget or fidelity not met,
    6 verification failed, 7 the target is not available here.
    """


@cli.command("compile")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--target", required=True, help="Device to compile for; 'qcompile targets' lists them.")
@click.option("--data", help="Calibration data: .npz, folder of samples, or module:function. See docs/data.md.")
@click.option("--eval", "eval_", help="Evaluation data; without it a fifth of the calibration data is held out.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder for the artifact.")
@click.option("--weights", type=click.Choice(["8", "none"]), default="8", show_default=True, help="Bits of weights.")
@click.option(
    "--activations",
    type=click.Choice(["8", "none"]),
    default="8",
    show_default=True,
    help="Bits of activations; 'none' stores weights as integers and computes in float.",
)
@click.option(
    "--observer",
    type=click.Choice(["auto", *(observer.value for observer in Observer)]),
    default="auto",
    show_default=True,
    help="How an activation's range is chosen; 'auto' measures which is best, per tensor.",
)
@click.option("--shape", multiple=True, metavar="NAME=1x128", help="Fix the open axes of an input. Repeatable.")
@click.option(
    "--min-fidelity",
    multiple=True,
    metavar="MEASURE=NUMBER",
    help="Fail below this: sqnr=20 (dB), cosine=0.99, top1=0.95. Repeatable.",
)
@click.option("--cache", type=click.Path(path_type=Path), help="Keep finished stages here and go on from them.")
@click.option("--seed", type=int, default=0, show_default=True, help="For the random inputs used without data.")
@click.option(
    "--threads",
    type=int,
    default=lambda: os.cpu_count() or 1,
    show_default="all cores",
    help="Threads of the compile; changes no result.",
)
@click.option("--json", "as_json", is_flag=True, help="Print report and measurements as JSON.")
@click.option("--quiet", "-q", is_flag=True, help="Print warnings and errors only.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def compile_command(model: Path, **flags: Any) -> None:
    """Compile MODEL (an .onnx file) for a target."""
    from qcompile import report, terminal
    from qcompile.driver import compile as compile_model

    printing = {name: flags.pop(name) for name in ("as_json", "quiet", "debug")}
    result = compile_model(model, _options(flags), terminal.ProgressBars(Console(stderr=True)).track)
    if printing["as_json"]:
        click.echo(json.dumps({"output": str(result.output), "report": result.report,
                               "measurements": result.measurements}, indent=1))  # fmt: skip
    elif printing["quiet"]:
        for warning in report.warnings(result.report, result.measurements):
            click.echo(f"warning: {warning}", err=True)
    else:
        terminal.show_result(Console(), result)


def _options(flags: dict[str, Any]) -> Options:
    shape = dict(parse_shape(text) for text in flags.pop("shape"))
    bounds = dict(parse_bound(text) for text in flags.pop("min_fidelity"))
    return Options(eval=flags.pop("eval_"), shape=shape, min_fidelity=bounds, **flags)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def targets(as_json: bool) -> None:
    """List the targets, and which of them can run here."""
    from qcompile import terminal
    from qcompile.backends.base import backends
    from qcompile.core import runtime

    found = [(t, bool(runtime.distributions())) for b in backends().values() for t in b.targets()]
    if as_json:
        rows = [{"name": t.name, "backend": t.backend, "summary": t.summary, "here": here} for t, here in found]
        click.echo(json.dumps(rows, indent=1))
    else:
        terminal.show_targets(Console(), found)


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--target", default="cpu", show_default=True, help="Device to judge the operators for.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(model: Path, target: str, as_json: bool) -> None:
    """Show what MODEL is made of and what a target would make of it; nothing is run."""
    from qcompile import terminal
    from qcompile.inspection import inspect as inspect_model

    content = inspect_model(model, target)
    if as_json:
        click.echo(json.dumps(content, indent=1))
    else:
        terminal.show_inspection(Console(), content)


def main() -> None:
    """Run the command line and leave with the exit code of the error, if there is one."""
    debug = "--debug" in sys.argv[1:]
    if not debug:
        # Libraries talk about their inner workings; what a user needs to know is in the report.
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        # A group without a command shows its help in place of a message.
        message = error.format_message().rstrip(".")
        one_line = f"error: {message}; 'qcompile compile --help' lists the options"
        click.echo(message if isinstance(error, click.exceptions.NoArgsIsHelpError) else one_line, err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted: nothing was written; run it again, with --cache to go on from here", err=True)
        sys.exit(INTERRUPTED)
    except QcompileError as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except MemoryError:
        click.echo("error: out of memory: the model or a sample is too large for this machine", err=True)
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        kind = f"{type(error).__name__}: {first_line(error)}"
        click.echo(f"error: internal error: {kind}; this is a bug, run again with --debug and report it", err=True)
        sys.exit(1)
