"""What a person at a terminal sees: progress and tables. Plain text where the output is no terminal."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from qcompile.comparison import Compared
from qcompile.core.plan import Role
from qcompile.core.target import Target
from qcompile.driver import CompileResult
from qcompile.explanation import Explanation
from qcompile.inspection import by_fate
from qcompile.regression import Checked, text
from qcompile.report import warnings
from qcompile.stages import Planned, Written
from qcompile.tables import lengths_table, new_table, segments_table

if TYPE_CHECKING:
    from qcompile.backends.mcu.emulated_run import EmulatedRun

T = TypeVar("T")

#: Progress is shown for what takes longer than this, in seconds.
PATIENCE = 2.0
#: Tensors in a table of outliers; --json has all.
MOST_OUTLIERS = 20


class ProgressBars:
    """Shows a bar on a terminal for each loop that lasts longer than `PATIENCE`; silent in a pipe."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def track(self, items: Iterable[T], total: int, what: str) -> Iterable[T]:
        """Yield the items, and show how many are done."""
        if not self.console.is_terminal:
            yield from items
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        start, shown = time.monotonic(), False
        with Progress(*columns, console=self.console, transient=True, disable=False, auto_refresh=False) as progress:
            task = progress.add_task(what, total=total, visible=False)
            for done, item in enumerate(items, 1):
                yield item
                if shown or time.monotonic() - start > PATIENCE:
                    shown = True
                    progress.update(task, completed=done, visible=True)
                    progress.refresh()


def show_result(console: Console, result: CompileResult) -> None:
    """Print warnings first, then what was gained, then which operators became what and why."""
    report, measurements = result.report, result.measurements
    for warning in warnings(report, measurements):
        console.print(f"[yellow]warning:[/] {_plain(warning)}", highlight=False)
    console.print(_gains(report, measurements))
    if report["lengths"] is not None:
        console.print(lengths_table(report["lengths"]))
    if report["segments"] is not None:
        console.print(segments_table(report["segments"]))
    console.print(_operators(report))
    if report["refusals"]:
        console.print(_refusals(report))
    if result.front is not None:
        console.print(_front(result.front))
    console.print(f"wrote {_plain(str(result.output))}/", highlight=False, soft_wrap=True)


def _add_device(table: Table, placement: Mapping[str, Any] | None, measurements: Mapping[str, Any]) -> None:
    """Tell what runs on a device, if there is one, and what it takes there once that was measured."""
    if placement is None:
        return
    on_device, host = sum(placement["on_device"].values()), placement["on_host"]
    reasons = "; ".join(sorted({one["reason"] for one in host}))
    table.add_row("nodes on the device", "", f"{on_device} of {on_device + len(host)}", reasons)
    if (seen := measurements.get("on_device")) is None:
        table.add_row("latency there", "", "not measured here", "")
    else:
        reference = "" if seen["float_ms"] is None else f"{seen['float_ms']:.3g} ms"
        ratio = "" if seen["ratio"] is None else f"{seen['ratio']:.2f}x"
        table.add_row("latency there", reference, f"{seen['artifact_ms']:.3g} ms", ratio)


def _gains(report: Mapping[str, Any], measurements: Mapping[str, Any]) -> Table:
    table = new_table(f"{report['target']}, against the float model", "", "float", "artifact", "")
    size, latency, fidelity = report["size"], measurements["latency"], report["fidelity"]
    table.add_row("size", _bytes(size["float_bytes"]), _bytes(size["artifact_bytes"]), f"{size['ratio']:.2f}x")
    if (allocation := report["allocation"]) is not None:
        counts = sorted(Counter(allocation["bits"].values()).items(), reverse=True)
        run = f"best of {allocation['tried']} run" if allocation["tried"] else ""
        table.add_row("weights", "", ", ".join(f"{count} in {bits} bits" for bits, count in counts), run)
        if (pairs := allocation.get("pairs")) is not None:
            without = "" if pairs["sqnr_without"] is None else f"{pairs['sqnr_without']} dB without"
            table.add_row("pairs", "", f"{pairs['measured']}: {len(pairs['changed'])} weights changed", without)
    if (maps := report["maps"]) is not None:
        table.add_row("activations", "", f"{len(maps['bits'])} in 4 bits", "")
    if latency is not None:
        times = (f"{latency['float_ms']:.3g} ms", f"{latency['artifact_ms']:.3g} ms", f"{latency['ratio']:.2f}x")
        table.add_row("latency, one thread", *times)
    _add_device(table, report.get("placement"), measurements)
    if (device := measurements["device"]) is not None and device["compiler"]:
        stack = f"{device['stack_bytes']:,} of stack, by {device['compiler']}"
        table.add_row("code", "", _bytes(device["code_bytes"]), "")
        table.add_row("SRAM", "", _bytes(device["sram_bytes"]), stack)
    if (expected := report["predicted_latency"]) is not None:
        reference, artifact = (f"{expected[key] / 1e3:.3g} ms" for key in ("float_us", "artifact_us"))
        table.add_row("latency predicted", reference, artifact, f"{expected['ratio']:.2f}x")
    if (accuracy := fidelity["accuracy"]) is not None:
        of = accuracy["labelled"]
        table.add_row("accuracy", f"{accuracy['float_correct']}/{of}", f"{accuracy['artifact_correct']}/{of}", "")
    for name, measures in fidelity["outputs"].items():
        label = "" if len(fidelity["outputs"]) == 1 else f" of {name}"
        if measures["equal"] is not None:
            table.add_row(f"equal{label}", "", f"{measures['equal']:.1%}", "")
            continue
        ratio = "exact" if measures["exact"] else f"{_number(measures['sqnr'], '.1f')} dB"
        table.add_row(f"SQNR{label}", "", ratio, "")
        table.add_row(f"cosine{label}", "", _number(measures["cosine"], ".5f"), "")
        if measures["top1"] is not None:
            agreeing = round(measures["top1"] * fidelity["samples"])
            table.add_row(f"same argmax{label}", "", f"{agreeing}/{fidelity['samples']}", "")
    table.caption = f"on {report['data']['evaluated_on']}"
    table.caption_justify = "left"
    return table


def _operators(report: Mapping[str, Any]) -> Table:
    """Group operators that share a fate."""
    groups: dict[tuple[str, str, str], int] = Counter()
    worst: dict[tuple[str, str, str], float] = defaultdict(lambda: float("inf"))
    refused = {refusal["node"] for refusal in report["refusals"] if refusal["stage"] == "backend"}
    for op in report["operators"]:
        fallback = "runs in float all the same" if op["name"] in refused else "moves codes"
        fate = op["kernel"] or op["reason"] or (fallback if op["precision"] == "integer" else "")
        if fate.startswith("absorbed by"):
            fate = "absorbed by the operator in front of it"
        key = (op["precision"], op["op_type"], fate)
        groups[key] += 1
        if op["sqnr"] is not None:
            worst[key] = min(worst[key], op["sqnr"])
    table = new_table("operators", "precision", "operator", "count", "worst SQNR, dB", "kernel, or why not integer")
    order = {"integer": 0, "weight_only": 1, "float": 2}
    for key, count in sorted(groups.items(), key=lambda item: (order[item[0][0]], -item[1], item[0])):
        precision, op_type, fate = key
        least = f"{worst[key]:.1f}" if key in worst else ""
        table.add_row(_word(precision), op_type, str(count), least, _plain(fate))
    return table


def _refusals(report: Mapping[str, Any]) -> Table:
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for refusal in report["refusals"]:
        groups[refusal["stage"], refusal["reason"]].append(refusal["node"])
    table = new_table("left alone", "stage", "where", "why")
    for (stage, reason), nodes in groups.items():
        more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
        table.add_row(stage, _plain(nodes[0] + more), _plain(reason))
    return table


def show_run(console: Console, seen: EmulatedRun) -> None:
    """Print what a package did under emulation."""
    table = new_table(
        f"{seen.processor}, emulated", "layer", "operation", "multiply-accumulates", "instructions", "each"
    )
    for layer in seen.layers:
        each = f"{layer['instructions'] / layer['macs']:.2f}" if layer["macs"] else ""
        counts = f"{layer['macs']:,}", f"{layer['instructions']:,}"
        table.add_row(_plain(layer["name"]), layer["operation"], *counts, each)
    console.print(table)
    equal = f"{seen.samples} inputs: every output equals the integer program's"
    console.print(f"{equal}; {seen.instructions:,} instructions each, which are no time", highlight=False)


def show_check(console: Console, found: Checked) -> None:
    """Print an artifact's figures beside those of an earlier report, what makes them hard to compare first."""
    for note in found.notes:
        console.print(f"[yellow]note:[/] {_plain(note)}", highlight=False, soft_wrap=True)
    table = new_table(f"{found.output}, against the earlier report", "", "earlier", "now", "worse by", "")
    for one in found.figures:
        values = text(one.before, one.unit), text(one.now, one.unit)
        table.add_row(
            _plain(one.name),
            *values,
            f"{one.worse_by:+.1%}" if isfinite(one.worse_by) else "",
            "too much" if one in found.worse else "",
        )
    console.print(table)


def show_comparison(console: Console, found: Compared) -> None:
    """Print artifacts side by side, then why some rows are not whole."""
    threads = "one thread" if found.threads == 1 else f"{found.threads} threads"
    title = f"on {found.samples} samples, {threads}, {found.device}"
    counted = any(row.energy_mj is not None for row in found.rows)
    table = new_table(title, "", "size", "SQNR\ndB", "acc.", "median\nms", "p90\nms",
                   "of\nfloat", *(["mJ"] if counted else []), "load\nms", "memory", "in-\nstruc-\ntions")  # fmt: skip
    table.padding, table.show_edge, table.pad_edge = (0, 1, 0, 0), False, False
    for column in table.columns:
        column.no_wrap = True
    reference = next((row.latency.median for row in found.rows if row.target == "float" and row.latency), None)
    targets = Counter(row.target for row in found.rows)
    for row in found.rows:
        latency, times = row.latency, ("", "", "")
        if latency is not None:
            ratio = f"{latency.median / reference:.2f}x" if reference else ""
            times = (f"{latency.median:.3g}", f"{latency.p90:.3g}", ratio)
        table.add_row(
            _plain(row.target if row.target and targets[row.target] == 1 else Path(row.output).name),
            _short(row.bytes) if row.bytes else "",
            "" if row.sqnr is None else "exact" if row.decibels == float("inf") else f"{row.decibels:.1f}",
            "" if row.accuracy is None else f"{row.accuracy:.0%}",
            *times,
            *([_number(row.energy_mj, ".3g").strip("-")] if counted else []),
            _number(row.load_ms, ".3g").strip("-"),
            "" if row.peak_bytes is None else _short(row.peak_bytes),
            "" if row.instructions is None else f"{row.instructions / 1e6:.3g}M",
        )
    console.print(table)
    for row in found.rows:
        if row.failure:
            console.print(f"{_plain(row.output)}: {_plain(row.failure)}", highlight=False, soft_wrap=True)


def show_explanations(console: Console, found: Iterable[Explanation]) -> None:
    """Print what became of operators, a paragraph each."""
    for one in found:
        console.print(f"[bold]{_plain(one.name)}[/], {one.op_type}", highlight=False, soft_wrap=True)
        for fact in one.facts:
            console.print(f"  {_plain(fact)}", highlight=False, soft_wrap=True)


def show_targets(console: Console, targets: Iterable[tuple[Target, bool]]) -> None:
    """Print the targets and whether each can run on this machine."""
    table = new_table("targets", "name", "backend", "here", "what it is")
    for target, available in targets:
        table.add_row(target.name, target.backend, "yes" if available else "no runtime", _plain(target.summary))
    console.print(table)


def show_inspection(console: Console, content: Mapping[str, Any], ops: bool) -> None:
    """Print what a model is, what was recognised in it, and what the target would make of it, by operator if asked."""
    table = new_table(content["model"], "", "")
    for key in ("opset", "nodes", "nodes_after_canonicalize", "weight_bytes"):
        value = content[key]
        table.add_row(key.replace("_", " "), _bytes(value) if key.endswith("bytes") else str(value))
    for key in ("inputs", "outputs"):
        table.add_row(key, _plain("\n".join(content[key])))
    console.print(table)
    _show_structure(console, content)
    console.print(_fates(f"operators on {content['target']}", content["operators"]))
    if content["outliers"]:
        console.print(_outliers(content["outliers"]))
    if ops:
        names = new_table("operators by name", "name", "operator", "precision", "why not integer")
        for op in content["ops"]:
            names.add_row(_plain(op["name"]), op["op_type"], _word(op["precision"]), _plain(op["reason"]))
        console.print(names)


def show_calibration(console: Console, done: Written) -> None:
    """Print what a calibration rests on and which observers serve."""
    if done.caveat:
        console.print(f"[yellow]warning:[/] {_plain(done.caveat)}", highlight=False)
    statistics = done.calibration.statistics
    table = new_table("activations", "observer", "tensors")
    for observer, count in done.calibration.chosen.items():
        table.add_row(observer, str(count))
    console.print(table)
    measured = f"{len(statistics.histograms)} tensors measured on {statistics.samples} samples"
    console.print(f"{measured}; wrote {_plain(str(done.output))}", highlight=False, soft_wrap=True)


def show_plan(console: Console, done: Planned, output: Path, folder: Path | None) -> None:
    """Print what was decided, and why."""
    plan = done.plan
    console.print(_fates("operators", by_fate(plan.ops)))
    if done.front is not None:
        console.print(_front(done.front))
    roles = Counter(quant.role for quant in plan.tensors.values())
    scales = f"scales for {roles[Role.ACTIVATION]} activations and {roles[Role.WEIGHT]} weights"
    where = f"{output} and {folder}/" if folder is not None else str(output)
    console.print(f"{scales}; wrote {_plain(where)}", highlight=False, soft_wrap=True)


def _front(content: Mapping[str, Any]) -> Table:
    table = new_table("best bits for every size", "size", "SQNR expected, dB", "weights in 4 bits", "plan")
    rows = [(row, row["plan"]) for row in content["points"]]
    rows += [(row, f"all in {bits} bits") for bits, row in content["uniform"].items()]
    for row, name in (*rows, (content["chosen"], "chosen")):
        few = f"{row['in_four_bits']} of {row['weights']}"
        table.add_row(f"{row['size']:.3f}x", _number(row["sqnr"], ".1f"), few, name)
    return table


def _fates(title: str, rows: Iterable[Mapping[str, Any]]) -> Table:
    fates = new_table(title, "precision", "operator", "count", "why not integer")
    for row in rows:
        fates.add_row(_word(row["precision"]), row["op_type"], str(row["count"]), _plain(row["reason"]))
    return fates


def _word(precision: str) -> str:
    return precision.replace("_", "-")


def _outliers(rows: Sequence[Mapping[str, Any]]) -> Table:
    keys = ("channels", "largest", "of the median", "SQNR, dB", "with a scale each")
    table = new_table("activations by what their outliers cost", "tensor", *keys)
    for row in rows[:MOST_OUTLIERS]:
        numbers = (f"{row['ratio']:.1f}x", f"{row['per_tensor']:.1f}", f"{row['per_channel']:.1f}")
        table.add_row(_plain(row["tensor"]), str(row["channels"]), str(row["worst"]), *numbers)
    return table


def _show_structure(console: Console, content: Mapping[str, Any]) -> None:
    if content["patterns"]:
        patterns = new_table("recognised", "pattern", "count", "details")
        for row in content["patterns"]:
            patterns.add_row(row["pattern"], str(row["count"]), _plain(row["detail"]))
        console.print(patterns)
    if content["not_recognised"]:
        missed = new_table("not recognised", "where", "why")
        for row in content["not_recognised"]:
            missed.add_row(_plain(row["node"]), _plain(row["reason"]))
        console.print(missed)
    if content["streams"]:
        keys = ("kind", "width", "segments", "sums", "writers", "readers")
        streams = new_table("residual streams", "kind", "count", *keys[1:], "against folding a rotation")
        alike = Counter((*(row[key] for key in keys), _against(row["obstacles"])) for row in content["streams"])
        for (kind, *numbers, against), count in alike.items():
            streams.add_row(kind, str(count), *map(str, numbers), _plain(against))
        console.print(streams)
    if "stream_members" in content:
        _show_members(console, content)


def _show_members(console: Console, content: Mapping[str, Any]) -> None:
    for stream in content["stream_members"]:
        for segment in stream["segments"]:
            table = new_table(f"{stream['kind']}, {stream['width']} channels", "role", "name", "what")
            for member in segment["members"]:
                table.add_row(member["role"], _plain(member["name"]), member["what"])
            for refusal in segment["obstacles"]:
                table.add_row("against", _plain(refusal["node"]), _plain(refusal["reason"]))
            console.print(table)
    if not content["stream_members"]:
        console.print("no residual streams: nothing is summed with what passes by")
    console.print(f"drawn in {content['picture']}", highlight=False)


def _against(obstacles: list[dict[str, str]]) -> str:
    return "\n".join(dict.fromkeys(obstacle["reason"] for obstacle in obstacles))


def _plain(text: str) -> str:
    """Keep rich from reading brackets in names as markup."""
    return text.replace("[", r"\[")


def _number(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)


def _bytes(count: int) -> str:
    if count < 1024:
        return f"{count} B"
    return f"{count / 1024:.1f} KB" if count < 1024**2 else f"{count / 1024**2:.2f} MB"


def _short(count: int) -> str:
    """Return bytes in three digits."""
    amount, unit = (count / 1024, "KB") if count < 1000 * 1024 else (count / 1024**2, "MB")
    return f"{amount:.3g} {unit}"
