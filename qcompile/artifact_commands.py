"""The commands that take an artifact instead of a model: run it, check it, explain it."""

from __future__ import annotations

import contextlib
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console

from qcompile.core.errors import UsageError

JSON = click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
DEBUG = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
RANKS = ("latency", "fidelity", "size")
FLOAT_MODEL = click.option("--model", type=click.Path(path_type=Path), help="The float model that they were made from.")
INPUTS = click.option("--data", help="Inputs, as of a compile; labels beside them give accuracy.")
SAMPLES = click.option(
    "--samples", type=click.IntRange(min=1), default=100, show_default=True, help="How many of them at most."
)
FOLDER = click.argument("output", metavar="OUT", type=click.Path(path_type=Path))


@click.command("run")
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--on", type=click.Choice(["qemu"]), default="qemu", show_default=True, help="Where to run it.")
@click.option("--data", help="Inputs to run, as of a compile; without them random ones.")
@click.option("--samples", type=click.IntRange(min=1), default=1, show_default=True, help="How many of them.")
@FLOAT_MODEL
@click.option("--fallback", is_flag=True, help="Let the host run what the device has no kernel for.")
@click.option("--json", "as_json", is_flag=True, help="Print what was seen as JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def run_command(
    package: Path, on: str, data: str | None, samples: int, model: Path | None, fallback: bool, as_json: bool,
    debug: bool,
) -> None:  # fmt: skip
    """Run PACKAGE, an artifact: a microcontroller's under emulation, one for a GPU on that.

    The former checks outputs and counts instructions; the latter times it, beside the float model where that is given.
    """
    from qcompile import device_run, emulation, terminal

    if device_run.device_target(package) is not None:
        timed = device_run.run(package, model, data, samples, fallback)
        content, lines = asdict(timed), timed.lines()
    else:
        seen = emulation.run(package, data, samples)
        content, lines = asdict(seen), []
        if not as_json:
            terminal.show_run(Console(), seen)
    if as_json:
        click.echo(json.dumps(content, indent=1))
    for line in () if as_json else lines:
        click.echo(line)


def _part(_: click.Context, __: click.Parameter, text: str) -> float:
    """Read `2%` or `0.02`."""
    try:
        part = float(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
    except ValueError:
        part = -1.0
    if not 0.0 <= part < 1.0:
        raise click.BadParameter(f"'{text}' is no part of a figure, such as 2%")
    return part


def _occupied(path: Path) -> None:
    raise UsageError(path, "is there already", "name another file")


@click.command("check")
@FOLDER
@click.option("--against", type=click.Path(path_type=Path), help="Earlier report.json, or its folder.")
@click.option(
    "--max-regression",
    "allowed",
    default="2%",
    show_default=True,
    callback=_part,
    metavar="2%",
    help="By what part of itself a figure may be worse.",
)
@click.option("--screen", is_flag=True, help="Look for behaviour that quantization brings out; wants --model.")
@FLOAT_MODEL
@INPUTS
@click.option("--samples", type=click.IntRange(min=1), default=16, show_default=True, help="How many to screen with.")
@click.option("--seed", default=0, show_default=True, help="Draws what a screening draws.")
@click.option(
    "--reround", type=click.Path(path_type=Path), help="File for the float model with weights to be rounded otherwise."
)
@JSON
@DEBUG
def check_command(
    output: Path, against: Path | None, allowed: float, screen: bool, model: Path | None, data: str | None,
    samples: int, seed: int, reround: Path | None, as_json: bool, debug: bool,
) -> None:  # fmt: skip
    """Hold OUT, an artifact's folder, to the report of an earlier one: size, predicted latency, fidelity. Or screen it.

    Exit code 5 where a figure got worse by more than is allowed, 6 where a screening found what is unusual.
    """
    from qcompile import artifact, screening, terminal
    from qcompile.core import model as models
    from qcompile.regression import check
    from qcompile.tables import screening_table

    context = click.get_current_context()
    if against is None and not screen and reround is None:
        raise click.UsageError("give --against REPORT, --screen, or both", context)
    if (screen or reround is not None) and model is None:
        raise click.UsageError("--screen and --reround need --model, the float model", context)
    if reround is not None:
        artifact.check_own(reround, _occupied)
    checked = check(output, against, allowed) if against is not None else None
    screened = screening.screen(output, model, data, samples, seed) if screen and model is not None else None
    if reround is not None and model is not None:
        artifact.write_file(reround, models.serialize(screening.reround(output, model, seed)))
    if as_json:
        content = {"output": str(output)} if checked is None else checked.as_json()
        click.echo(json.dumps(content if screened is None else content | {"screening": screened.as_json()}, indent=1))
    elif checked is not None:
        terminal.show_check(Console(), checked)
    if screened is not None and not as_json:
        Console().print(screening_table(screened))
        for line in screened.lines():
            click.echo(line)
    for one in (checked, screened):
        if one is not None:
            one.require()


@click.command("explain")
@FOLDER
@click.option("--layer", "layers", multiple=True, metavar="NAME", help="Operator, or a pattern of names. Repeatable.")
@JSON
@DEBUG
def explain_command(output: Path, layers: tuple[str, ...], as_json: bool, debug: bool) -> None:
    """Tell why operators of OUT, an artifact's folder, have the precision they have; without --layer, of the worst."""
    from qcompile import terminal
    from qcompile.explanation import explain

    found = explain(output, layers)
    if as_json:
        click.echo(json.dumps([asdict(one) for one in found], indent=1))
    else:
        terminal.show_explanations(Console(), found)


@click.command("bundle")
@click.argument("outputs", metavar="OUT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@FLOAT_MODEL
@INPUTS
@SAMPLES
@click.option("--forms", is_flag=True, help="Add the forms of the model that --costs-out of a comparison measures.")
@click.option("--output", "-o", "file", type=click.Path(path_type=Path), required=True, help="File, NAME.qbundle.")
@DEBUG
def bundle_command(
    outputs: tuple[Path, ...], model: Path | None, data: str | None, samples: int, forms: bool, file: Path, debug: bool
) -> None:
    """Pack artifacts OUT... of one model, with inputs and what runs them, into one file for a device."""
    from qcompile import bundle, device_costs

    if model is None or data is None:
        raise click.UsageError("a bundle needs --model and --data", click.get_current_context())
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        content, failed = bundle.fill(Path(folder), outputs, model, data, samples)
        if failed:
            raise UsageError(failed[0].output, *failed[0].reason.split("; ", 1))
        if forms:
            device_costs.pack(Path(folder), content, model, data)
        bundle.write(file, Path(folder))


@click.command("compare")
@click.argument("outputs", metavar="OUT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@FLOAT_MODEL
@INPUTS
@SAMPLES
@click.option(
    "--on", default="local", show_default=True, metavar="local|qemu-aarch64|adb|ssh://USER@HOST", help="Where to run."
)
@click.option("--python", default="python3", show_default=True, help="Command of a device's Python.")
@click.option("--launcher", default="", help="Command in front of static executables, such as 'taskset f0'.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of each run.")
@click.option("--rank", type=click.Choice(RANKS), default=RANKS[0], show_default=True, help="What comes first.")
@click.option(
    "--timeout", type=click.FloatRange(min=1.0), default=600.0, show_default=True, help="Seconds for a device."
)
@click.option("--costs-out", type=click.Path(path_type=Path), help="File for the device's cost table, for --costs.")
@click.option("--history", type=click.Path(path_type=Path), help="File to append what was seen to, a line of JSON.")
@JSON
@DEBUG
def compare_command(
    outputs: tuple[Path, ...], model: Path | None, data: str | None, samples: int, on: str, python: str, launcher: str,
    threads: int, rank: str, timeout: float, costs_out: Path | None, history: Path | None, as_json: bool, debug: bool,
) -> None:  # fmt: skip
    """Run artifacts OUT... of one model, or one bundle of them, side by side: fidelity, size, latency, memory.

    What cannot run is named in its row, and the exit code is 7.
    """
    from qcompile import artifact, bundle, device_costs, terminal
    from qcompile.comparison import append, compare
    from qcompile.core.costs import CostTable
    from qcompile.devices import parse_device

    device, priced = parse_device(on, python, launcher), costs_out is not None
    if costs_out is not None:
        artifact.check_own(costs_out, CostTable.from_json)
    with contextlib.ExitStack() as stack:
        if [output.suffix for output in outputs] == [bundle.SUFFIX]:
            folder, content = stack.enter_context(bundle.opened(outputs[0]))
            failed = list[bundle.Failed]()
        elif model is None or data is None:
            raise click.UsageError("folders need --model and --data; a bundle has both", click.get_current_context())
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qcompile-")))
            content, failed = bundle.fill(folder, outputs, model, data, samples)
            if priced:
                device_costs.pack(folder, content, model, data)
        compared = compare(folder, content, failed, device, threads, rank, timeout, priced)
        if history is not None:
            append(history, compared)
        if as_json:
            click.echo(json.dumps(compared.as_json(), indent=1))
        else:
            terminal.show_comparison(Console(), compared)
        if costs_out is not None:
            table = device_costs.measured(folder, content, compared.told)
            artifact.write_file(costs_out, table.to_json().encode())
    compared.require()


COMMANDS = (bundle_command, compare_command, run_command, check_command, explain_command)
