"""The flags of commands that take a model, by name: one flag is one field of `Options` and one key of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from qcompile.calib.observers import Observer


def _targets(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the targets that a shell may complete what was typed to."""
    from qcompile.backends.base import backends

    names = (target.name for backend in backends().values() for target in backend.targets())
    return sorted(name for name in names if name.startswith(incomplete))


#: Flags by name. None of them has a default here: what is not given may stand in a recipe, else `Options` knows it.
FLAGS = {
    "recipe": click.option("--recipe", type=click.Path(path_type=Path), help="Options from a TOML file; flags win."),
    "target": click.option(
        "--target", shell_complete=_targets, help="Device to compile for; 'qcompile targets' lists them."
    ),
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
        help="Bits that weights are stored in; 'mixed' chooses per tensor, 'auto' does for a budget.",
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
    "shape": click.option(
        "--shape",
        multiple=True,
        metavar="NAME=1x128",
        help="Fix an input's open axes; a library may have several lengths, 1x32,128. Repeatable.",
    ),
    "allow_ort_segments": click.option(
        "--allow-ort-segments",
        is_flag=True,
        default=None,
        help="Of a library: let ONNX Runtime run what has no form there, for Python alone.",
    ),
    "max_size": click.option("--max-size", metavar="0.2x|5MB", help="Bytes at most; weights get the bits for it."),
    "max_bops": click.option(
        "--max-bops", metavar="0.05x|20G", help="Bit operations at most, bits of weights by those of activations."
    ),
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
    "pairs": click.option(
        "--pairs",
        type=int,
        metavar="N",
        show_default="0",
        help="Choose bits by what each weight loses together with the N that follow it, too.",
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
    "max_memory": click.option(
        "--max-memory", metavar="4GB", help="Memory of this process at most; weights are kept in files for it."
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
