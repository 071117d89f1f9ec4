"""The commands that take an artifact instead of a model: run it, check it, explain it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console

JSON = click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
DEBUG = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
FOLDER = click.argument("output", metavar="OUT", type=click.Path(path_type=Path))


@click.command("run")
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--on", type=click.Choice(["qemu"]), default="qemu", show_default=True, help="Where to run it.")
@click.option("--data", help="Inputs to run, as of a compile; without them random ones.")
@click.option("--samples", type=click.IntRange(min=1), default=1, show_default=True, help="How many of them.")
@click.option("--json", "as_json", is_flag=True, help="Print what was seen as JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def run_command(package: Path, on: str, data: str | None, samples: int, as_json: bool, debug: bool) -> None:
    """Run PACKAGE, a microcontroller's artifact, under emulation: check its outputs, count its instructions."""
    from qcompile import terminal
    from qcompile.emulation import run

    seen = run(package, data, samples)
    if as_json:
        click.echo(json.dumps(asdict(seen), indent=1))
    else:
        terminal.show_run(Console(), seen)


def _part(_: click.Context, __: click.Parameter, text: str) -> float:
    """Read `2%` or `0.02`."""
    try:
        part = float(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
    except ValueError:
        part = -1.0
    if not 0.0 <= part < 1.0:
        raise click.BadParameter(f"'{text}' is no part of a figure, such as 2%")
    return part


@click.command("check")
@FOLDER
@click.option("--against", required=True, type=click.Path(path_type=Path), help="Earlier report.json, or its folder.")
@click.option(
    "--max-regression",
    "allowed",
    default="2%",
    show_default=True,
    callback=_part,
    metavar="2%",
    help="By what part of itself a figure may be worse.",
)
@JSON
@DEBUG
def check_command(output: Path, against: Path, allowed: float, as_json: bool, debug: bool) -> None:
    """Hold OUT, an artifact's folder, to the report of an earlier one: size, predicted latency, fidelity.

    Exit code 5 where one of them got worse by more than is allowed.
    """
    from qcompile import terminal
    from qcompile.regression import compare

    comparison = compare(output, against, allowed)
    if as_json:
        click.echo(json.dumps(comparison.as_json(), indent=1))
    else:
        terminal.show_comparison(Console(), comparison)
    comparison.require()


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


COMMANDS = (run_command, check_command, explain_command)
