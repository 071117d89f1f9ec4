"""docs/peers.md: the verdicts, and per model a plot and a table."""

from __future__ import annotations

from collections.abc import Sequence

from peer_results import FASTER, MORE_FAITHFUL, Result, Row, Verdict, judge

HEAD = f"""# Beside other quantizers

Written by `python benchmarks/peers.py`; do not edit. qcompile with all defaults, and under budgets, beside settings of
[benchmarks/peers.toml](../benchmarks/peers.toml), each model quantized with the same calibration samples by all, each
result run by ONNX Runtime with its default optimizations and held against the float model on evaluation samples by the
same function. SQNR is that of the output that loses most; argmax is how often the model still says what float says, if
it classifies. Latency is over float's, batch 1, one thread: in each round every contender of the model runs twice on
one sample, the second run counts, and the order changes; of the ratios to float's time in each round it is the median.
Size is the file's over float's; seconds are those of the whole process, Python's start included.

**Faster** means by more than {1 - FASTER:.0%}, **more faithful** by more than {MORE_FAITHFUL:g} dB. qcompile's default
holds on a model if no setting is both faster and more faithful, and if float is not faster than it.

What users do where a tool asks for it was done: models below opset 13, which has scales per channel, are raised to it
with onnx's converter; onnxruntime's quantizers run behind its `quant_pre_process`, without symbolic shapes where that
fails; onnxsim's behind its `simplify`, in opset 21, below which they return the float model. Nothing else was repaired:
a setting that fails says with which words.
"""
TABLE = """
| | quantizer | SQNR, dB | argmax | latency | size | seconds |
|---|---|---|---|---|---|---|
"""


def page(results: Sequence[Result]) -> str:
    """Return the whole page."""
    lines = [
        "",
        "## Verdicts",
        "",
        "| model | qcompile | holds | faster and more faithful |",
        "|---|---|---|---|",
    ]
    lines += [verdict_row(result, judge(result)) for result in results]
    return HEAD + "\n".join(lines) + "\n" + "".join(section(result) for result in results)


def verdict_row(result: Result, verdict: Verdict) -> str:
    """Return one line of the table of verdicts."""
    ours = result.ours
    if ours.latency is None:
        return f"| {result.model} | {cell(ours.failure or '')} | no | |"
    holds = "no: slower than float" if verdict.slower else "yes" if verdict.holds else "no"
    figures = f"{decibel(ours)}, {ours.ratio:.2f}x"
    better = "; ".join(row.name for row in verdict.better)
    return f"| [{result.model}](#{result.model}) | {figures} | {holds} | {better} |"


def sentence(result: Result, verdict: Verdict) -> str:
    """Return the verdict for a terminal."""
    if verdict.failure:
        return f"fails: {verdict.failure}"
    ours = result.ours
    found = f"{decibel(ours)} dB at {ours.ratio:.2f}x of float: {'holds' if verdict.holds else 'does not hold'}"
    found += ", slower than float" if verdict.slower else ""
    better = ", ".join(f"{row.name} ({decibel(row)} dB, {row.ratio:.2f}x)" for row in verdict.better)
    return found + (f"; better: {better}" if better else "")


def section(result: Result) -> str:
    """Return what the page says of one model."""
    measured = sorted((row for row in result.rows if row.latency is not None), key=lambda row: row.ratio)
    failed = [row for row in result.rows if row.latency is None]
    rows = [table_row(result, row, numbers(result)[row.name]) for row in (*measured, *failed)]
    facts = (
        f"{result.calibrated} calibration and {result.evaluated} evaluation samples, {result.rounds} rounds; float "
        f"takes {result.float_ms:.2f} ms and {result.float_bytes / 2**20:.2f} MB. Measured on: {result.machine}, with "
        f"{', '.join(dict.fromkeys(result.versions))}."
    )
    plot = f"![{result.model}: SQNR over latency](peers/{result.model}.svg)"
    head = f"\n## {result.model}\n\n{plot}\n\n{facts} ([PNG](peers/{result.model}.png))\n"
    return head + TABLE + "\n".join(rows) + "\n"


def numbers(result: Result) -> dict[str, str]:
    """Return what each row is called in plot and table: a star for qcompile, a number for the others."""
    return {row.name: "★" if row is result.ours else str(index) for index, row in enumerate(result.rows)}


def table_row(result: Result, row: Row, number: str) -> str:
    """Return one line of a model's table."""
    name = f"**{row.name}**" if row is result.ours else row.name
    if row.latency is None:
        return f"| {number} | {name} | fails: {cell(row.failure or '')} | | | | {row.seconds:.0f} |"
    agreement = "" if row.agreement is None else f"{row.agreement:.0%}"
    size = "" if row.size is None else f"{row.size / result.float_bytes:.2f}x"
    cells = [number, name, decibel(row), agreement, f"{row.ratio:.2f}x", size, f"{row.seconds:.0f}"]
    return f"| {' | '.join(cells)} |"


def decibel(row: Row) -> str:
    """Return a row's SQNR as text."""
    return "exact" if row.sqnr is None else f"{row.sqnr:.1f}"


def cell(text: str) -> str:
    """Return a text as a cell of a table can hold it."""
    return " ".join(text.split()).replace("|", "/")
