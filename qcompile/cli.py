"""The command line: parse, compile, print. `qcompile MODEL …` is `qcompile compile MODEL …`."""

from __future__ import annotations

import json
import logging
import signal
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

import qcompile
from qcompile import artifact
from qcompile.artifact_commands import COMMANDS
from qcompile.core.errors import QcompileError, first_line
from qcompile.flags import takes, written_to
from qcompile.options import Options, parse_bound, parse_shape

if TYPE_CHECKING:
    from qcompile.core.contract import Track
    from qcompile.driver import CompileResult

#: Exit codes of a process that was ended by a signal: Ctrl-C's, and the one that build systems send.
INTERRUPTED, TERMINATED = 130, 143


class DefaultToCompile(click.Group):
    """A group whose first word may be left out when it is ``compile``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put ``compile`` in front of what starts with neither a command nor one of the group's own options."""
        own = {name for parameter in self.params for name in parameter.opts} | set(ctx.help_option_names)
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["compile", *args]
        return super().parse_args(ctx, args)


def cmake_dir(context: click.Context, _: click.Parameter, asked: bool) -> None:
    """Print where `find_package(qcompile)` looks."""
    if asked:
        click.echo(Path(qcompile.__file__).parent / "cmake")
        context.exit()


@click.group(cls=DefaultToCompile, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(qcompile.__version__, "--version", message="qcompile %(version)s")
@click.option(
    "--cmake-dir",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=cmake_dir,
    help="Print the folder of the CMake package and exit.",
)
def cli() -> None:
    """Compile an ONNX model for an edge device: quantized, verified, and with its reasons.

    For example: qcompile MODEL.onnx --target cpu --data calib.npz -o build/model

    Exit codes: 0 done, 2 usage, 3 bad input model, 4 bad data, 5 budget or fidelity not met,
    6 verification failed, 7 the target is not available here.
    """


@cli.command("compile")
@takes(
    "target", "data", "enlarge", "eval", "output", "weights", "activations", "observer", "smoothing", "rotation",
    "no_added_nodes", "costs", "shape", "allow_ort_segments", "max_size", "max_bops", "max_latency", "board",
    "max_sram", "max_flash", "min_fidelity", "pairs", "pareto", "recipe", "cache", "seed", "threads", "workers",
    "max_memory",
)  # fmt: skip
@click.option("--depfile", type=click.Path(path_type=Path), help="Write what was read, as make and ninja read it.")
@click.option(
    "--lock", type=click.Path(path_type=Path), help="Compile only if something changed since this was written."
)
@click.option("--locked", is_flag=True, help="Compile nothing but what --lock says, to the same bytes.")
def compile_command(
    model: Path, depfile: Path | None, lock: Path | None, locked: bool, as_json: bool, quiet: bool, debug: bool,
    **flags: Any,
) -> None:  # fmt: skip
    """Compile MODEL (an .onnx file) for a target."""
    from qcompile.depfile import write_depfile
    from qcompile.driver import compile as compile_model
    from qcompile.lock import compile_locked

    chosen, result = options(given(flags)), None
    if lock is not None:
        result = compile_locked(model, chosen, lock, locked, progress())
    elif locked:
        raise click.UsageError("--locked needs --lock", click.get_current_context())
    else:
        result = compile_model(model, chosen, progress())
    if depfile is not None:
        write_depfile(depfile, artifact.place(model, chosen), model, chosen, flags["recipe"])
    if result is not None:
        show(result, as_json, quiet)
    elif not quiet:
        click.echo("up to date: nothing that it is made from changed", err=as_json)


@cli.command("calibrate")
@takes(
    "target", "data", "enlarge", "eval", "weights", "activations", "observer", "smoothing", "rotation",
    "no_added_nodes", "costs", "shape", "max_size", "max_bops", "max_latency", "board", "max_sram", "pairs",
    "recipe", "cache", "threads",
    "workers", "max_memory",
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
@takes("target", "costs", "max_size", "max_bops", "board", "max_sram", "min_fidelity", "recipe")
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
    free = ("overrides", "weights", "max_size", "max_bops")
    chosen = options(stages.settled(given(flags), earlier, calibration, free))
    done = stages.plan(model, chosen, calibration, file, pareto)
    if as_json:
        content = {"output": str(file), "plan": json.loads(done.plan.to_json())}
        click.echo(json.dumps(content | ({"front": done.front} if done.front else {}), indent=1))
    elif not quiet:
        terminal.show_plan(Console(), done, file, pareto)


@cli.command("apply")
@takes(
    "target", "data", "eval", "output", "costs", "allow_ort_segments", "board", "max_sram", "max_flash", "min_fidelity",
    "recipe", "cache", "seed", "threads", "max_memory",
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


for command in COMMANDS:
    cli.add_command(command)


def main() -> None:
    """Run the command line and leave with the exit code of the error, if there is one."""
    debug = "--debug" in sys.argv[1:]
    if not debug:
        # Libraries talk about their inner workings; what a user needs to know is in the report.
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, _terminated)
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


def _terminated(number: int, frame: object) -> None:
    """End as Ctrl-C does, so that what was begun is taken away."""
    click.echo("terminated: nothing was written; run it again, with --cache to go on from here", err=True)
    sys.exit(TERMINATED)
