"""The command line: parse, compile, print. `qcompile MODEL …` is `qcompile compile MODEL …`."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

import qcompile
from qcompile.calib.observers import Observer
from qcompile.core.errors import QcompileError, first_line
from qcompile.options import Options, parse_bound, parse_shape

if TYPE_CHECKING:
    from qcompile.core.contract import Track
    from qcompile.driver import CompileResult

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


#: Flags by name. None of them has a default here: what is not given may stand in a recipe, else `Options` knows it.
FLAGS = {
    "recipe": click.option("--recipe", type=click.Path(path_type=Path), help="Options from a TOML file; flags win."),
    "target": click.option("--target", help="Device to compile for; 'qcompile targets' lists them."),
    "data": click.option("--data", help="Calibration data: .npz, folder of samples, or module:function."),
    "eval": click.option("--eval", help="Evaluation data; without it a fifth of the calibration data is held out."),
    "output": click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder for the artifact."),
    "enlarge": click.option(
        "--enlarge", type=int, metavar="N", help="Make calibration samples of those given, until there are N."
    ),
    "weights": click.option(
        "--weights",
        type=click.Choice(["auto", "8", "4", "mixed", "none"]),
        show_default="auto",
        help="Bits that weights are stored in; 'mixed' chooses per tensor, 'auto' does for a budget of bytes.",
    ),
    "activations": click.option(
        "--activations",
        type=click.Choice(["8", "16", "none"]),
        show_default="8",
        help="Bits of activations, 16 for microcontrollers; 'none' stores weights as integers and computes in float.",
    ),
    "observer": click.option(
        "--observer",
        type=click.Choice(["auto", *(observer.value for observer in Observer)]),
        show_default="auto",
        help="How an activation's range is chosen; 'auto' measures which is best, per tensor.",
    ),
    "smoothing": click.option(
        "--smoothing",
        type=click.Choice(["auto", "none"]),
        show_default="auto",
        help="Even out the channels of activations against the weights behind them, where that loses less.",
    ),
    "rotation": click.option(
        "--rotation",
        type=click.Choice(["auto", "none"]),
        show_default="auto",
        help="Rotate channels by matrices that weights take back, where that loses less.",
    ),
    "no_added_nodes": click.option(
        "--no-added-nodes", is_flag=True, default=None, help="Smooth and rotate only where no node is added for it."
    ),
    "costs": click.option(
        "--costs", type=click.Path(path_type=Path), help="Cost table of 'qcompile probe', or 'none'."
    ),
    "shape": click.option("--shape", multiple=True, metavar="NAME=1x128", help="Fix an input's open axes. Repeatable."),
    "max_size": click.option("--max-size", metavar="0.2x|5MB", help="Bytes at most; weights get the bits for it."),
    "max_latency": click.option(
        "--max-latency", metavar="0.6x|12ms", help="Time of a run at most, by the cost table; the rest buys fidelity."
    ),
    "board": click.option("--board", help="Microcontroller's board, whose SRAM and flash the artifact must fit."),
    "max_sram": click.option("--max-sram", metavar="64KB", help="SRAM at most, of arena and stack together."),
    "max_flash": click.option("--max-flash", metavar="512KB", help="Flash at most, of weights and code together."),
    "min_fidelity": click.option(
        "--min-fidelity",
        multiple=True,
        metavar="MEASURE=NUMBER",
        help="Fail below this: sqnr=20 (dB), cosine=0.99, top1=0.95. Repeatable.",
    ),
    "pareto": click.option(
        "--pareto",
        is_flag=True,
        default=None,
        help="Write the best bits for every size, each as a plan.",
    ),
    "cache": click.option(
        "--cache", type=click.Path(path_type=Path), help="Keep finished stages here and go on from them."
    ),
    "seed": click.option("--seed", type=int, show_default="0", help="For the random inputs used without data."),
    "threads": click.option(
        "--threads", type=int, show_default="all cores", help="Threads of the compile; changes no result."
    ),
    "workers": click.option(
        "--workers", metavar="N|tcp://HOST:PORT", help="Processes, or a Dask cluster, that measure losses."
    ),
    "as_json": click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON."),
    "quiet": click.option("--quiet", "-q", is_flag=True, help="Print warnings and errors only."),
    "debug": click.option("--debug", is_flag=True, help="Show the traceback of an error."),
}
PRINTING = ("as_json", "quiet", "debug")
MODEL = click.argument("model", type=click.Path(path_type=Path))

Command = Callable[..., None]


def takes(*names: str) -> Callable[[Command], Command]:
    """Give a command a model, some of `FLAGS`, and those that say what is printed."""

    def decorate(command: Command) -> Command:
        for name in reversed((*names, *PRINTING)):
            command = FLAGS[name](command)
        return MODEL(command)

    return decorate


def written_to(name: str, what: str) -> Callable[[Command], Command]:
    """Give a command the file that it writes."""
    kind = click.Path(path_type=Path)
    return click.option("--output", "-o", "file", type=kind, default=name, show_default=True, help=f"File for {what}.")


@cli.command("compile")
@takes(
    "target", "data", "enlarge", "eval", "output", "weights", "activations", "observer", "smoothing", "rotation",
    "no_added_nodes", "costs", "shape", "max_size", "max_latency", "board", "max_sram", "max_flash",
    "min_fidelity", "pareto", "recipe", "cache", "seed", "threads", "workers",
)  # fmt: skip
def compile_command(model: Path, as_json: bool, quiet: bool, debug: bool, **flags: Any) -> None:
    """Compile MODEL (an .onnx file) for a target."""
    from qcompile.driver import compile as compile_model

    show(compile_model(model, options(given(flags)), progress()), as_json, quiet)


@cli.command("calibrate")
@takes(
    "target", "data", "enlarge", "eval", "weights", "activations", "observer", "smoothing", "rotation",
    "no_added_nodes", "costs", "shape", "max_size", "max_latency", "recipe", "cache", "threads", "workers",
)  # fmt: skip
@written_to("calibration.npz", "the measurements")
def calibrate_command(model: Path, file: Path, as_json: bool, quiet: bool, debug: bool, **flags: Any) -> None:
    """Measure what a plan needs to know of MODEL: the first stage of a compile."""
    from qcompile import stages, terminal

    done = stages.calibrate(model, options(given(flags)), file, progress())
    if as_json:
        click.echo(json.dumps(done.summary(), indent=1))
    elif not quiet:
        terminal.show_calibration(Console(), done)
    elif done.caveat:
        click.echo(f"warning: {done.caveat}", err=True)


@cli.command("plan")
@takes("target", "costs", "max_size", "min_fidelity", "recipe")
@click.option("--calibration", required=True, type=click.Path(path_type=Path), help="What 'qcompile calibrate' wrote.")
@click.option("--pareto", type=click.Path(path_type=Path), help="Folder for the best bits for every size, as plans.")
@written_to("plan.json", "the plan")
def plan_command(
    model: Path, calibration: Path, pareto: Path | None, file: Path, as_json: bool, quiet: bool, debug: bool,
    **flags: Any,
) -> None:  # fmt: skip
    """Decide what becomes of each operator of MODEL, and with which scales: the second stage of a compile."""
    from qcompile import stages, terminal
    from qcompile.calibration import Calibration

    earlier = Calibration.read(calibration).options
    chosen = options(stages.settled(given(flags), earlier, calibration, free=("overrides", "weights", "max_size")))
    done = stages.plan(model, chosen, calibration, file, pareto)
    if as_json:
        content = {"output": str(file), "plan": json.loads(done.plan.to_json())}
        click.echo(json.dumps(content | ({"front": done.front} if done.front else {}), indent=1))
    elif not quiet:
        terminal.show_plan(Console(), done, file, pareto)


@cli.command("apply")
@takes(
    "target", "data", "eval", "output", "costs", "board", "max_sram", "max_flash", "min_fidelity", "recipe", "cache",
    "seed", "threads",
)  # fmt: skip
@click.option("--plan", required=True, type=click.Path(path_type=Path), help="What 'qcompile plan' wrote; edit it.")
def apply_command(model: Path, plan: Path, as_json: bool, quiet: bool, debug: bool, **flags: Any) -> None:
    """Quantize MODEL as a plan says and write the artifact: the last stage of a compile."""
    from qcompile import stages

    chosen = options(stages.settled(given(flags), stages.read_plan(plan).options, plan))
    show(stages.apply(model, chosen, plan, progress()), as_json, quiet)


@cli.command("probe")
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("--target", default="cpu", show_default=True, help="Device to measure for.")
@click.option("--data", help="Inputs of MODEL; the shapes of the first ones count.")
@click.option("--shape", multiple=True, metavar="NAME=1x128", help="Fix an input's open axes. Repeatable.")
@written_to("costs.json", "the cost table")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
@click.option("--quiet", "-q", is_flag=True, help="Print warnings and errors only.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def probe_command(
    model: Path | None, target: str, data: str | None, shape: tuple[str, ...], file: Path, as_json: bool, quiet: bool,
    debug: bool,
) -> None:  # fmt: skip
    """Measure here what the target's kernels take, those of MODEL too, into a table for --costs."""
    from qcompile.probing import probe

    done = probe(model, Options(target, data=data, shape=dict(map(parse_shape, shape))), file, progress())
    if as_json:
        click.echo(json.dumps(done, indent=1))
    elif not quiet:
        click.echo(f"{done['runtime']} on {done['processor']}: {done['patterns']} patterns, {done['kernels']} kernels")
        click.echo(f"wrote {file}")


@cli.command("run")
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--on", type=click.Choice(["qemu"]), default="qemu", show_default=True, help="Where to run it.")
@click.option("--data", help="Inputs to run, as of a compile; without them random ones.")
@click.option("--samples", type=click.IntRange(min=1), default=1, show_default=True, help="How many of them.")
@click.option("--json", "as_json", is_flag=True, help="Print what was seen as JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def run_command(package: Path, on: str, data: str | None, samples: int, as_json: bool, debug: bool) -> None:
    """Run PACKAGE, a microcontroller's artifact, under emulation: check its outputs, count its instructions."""
    from dataclasses import asdict

    from qcompile import terminal
    from qcompile.emulation import run

    seen = run(package, data, samples)
    if as_json:
        click.echo(json.dumps(asdict(seen), indent=1))
    else:
        terminal.show_run(Console(), seen)


def given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `Options` that flags and recipe give; flags count more."""
    from qcompile import recipe

    path = flags["recipe"]
    fields = {name: value for name, value in flags.items() if name != "recipe" and value not in (None, ())}
    for name, parse in (("shape", parse_shape), ("min_fidelity", parse_bound)):
        if name in fields:
            fields[name] = dict(parse(text) for text in fields[name])
    return (recipe.read(path) if path is not None else {}) | fields


def options(fields: Mapping[str, Any]) -> Options:
    """Return the options, which cannot do without a target."""
    if "target" not in fields:
        raise click.UsageError("Missing option '--target', and no recipe names one", click.get_current_context())
    return Options(**fields)


def show(result: CompileResult, as_json: bool, quiet: bool) -> None:
    """Print what a compile did."""
    from qcompile import report, terminal

    if as_json:
        content = {"output": str(result.output), "report": result.report, "measurements": result.measurements}
        click.echo(json.dumps(content | ({"front": result.front} if result.front else {}), indent=1))
    elif quiet:
        for warning in report.warnings(result.report, result.measurements):
            click.echo(f"warning: {warning}", err=True)
    else:
        terminal.show_result(Console(), result)


def progress() -> Track[Any]:
    """Show progress on the terminal, if there is one."""
    from qcompile import terminal

    return terminal.ProgressBars(Console(stderr=True)).track


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def targets(as_json: bool) -> None:
    """List the targets, and which of them can run here."""
    from qcompile import terminal
    from qcompile.backends.base import backends

    found = [(t, b.available()) for b in backends().values() for t in b.targets()]
    if as_json:
        rows = [{"name": t.name, "backend": t.backend, "summary": t.summary, "here": here} for t, here in found]
        click.echo(json.dumps(rows, indent=1))
    else:
        terminal.show_targets(Console(), found)


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--target", default="cpu", show_default=True, help="Device to judge the operators for.")
@click.option("--ops", is_flag=True, help="List every operator by the name that overrides match; JSON always does.")
@click.option("--data", help="Calibration data: show which channels of which activations are outliers.")
@click.option("--streams", is_flag=True, help="Name who writes and reads residual streams; draw MODEL-streams.svg.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(model: Path, target: str, ops: bool, data: str | None, streams: bool, as_json: bool) -> None:
    """Show what MODEL is made of and what a target would make of it; without --data nothing is run."""
    from qcompile import terminal
    from qcompile.inspection import inspect as inspect_model

    content = inspect_model(model, target, data, progress(), streams)
    if streams:
        from qcompile.artifact import write_file
        from qcompile.stream_picture import draw_streams

        content["picture"] = f"{model.stem}-streams.svg"
        write_file(Path(content["picture"]), draw_streams(str(model), content["stream_members"]).encode())
    if as_json:
        click.echo(json.dumps(content, indent=1))
    else:
        terminal.show_inspection(Console(), content, ops)


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
        context = getattr(error, "ctx", None)
        command = context.info_name if context is not None and context.parent is not None else "compile"
        one_line = f"error: {message}; 'qcompile {command} --help' lists the options"
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
