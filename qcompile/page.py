"""report.html: the report as one page that opens anywhere, offline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from qcompile.report import warnings

#: A bar is full at this SQNR, in dB.
FULL_BAR = 60.0


def render(report: Mapping[str, Any], measurements: Mapping[str, Any]) -> str:
    """Return the page; every number in it is one of `report` or `measurements`."""
    template = Template((files("qcompile") / "page.html").read_text(encoding="utf-8"))
    operators = report["operators"]
    passes = [(step, step["relative_error"]) for step in report["passes"]]
    return template.substitute(
        title=escape(f"{_values(report, 'inputs')} → {_values(report, 'outputs')}, on {report['target']}"),
        warnings="".join(f'<p class="warning">{escape(text)}</p>' for text in warnings(report, measurements)),
        cards="".join(_cards(report, measurements)),
        layers="".join(_layer(op) for op in operators if op["sqnr"] is not None),
        bytes="".join(_share(cause, count, report) for cause, count in report["size"]["by_cause"].items()),
        floats="".join(
            _row(op["op_type"], op["name"], op["reason"] or "") for op in operators if op["precision"] == "float"
        ),
        passes="".join(
            _row(step["name"], step["effect"], f"{step['nodes_before']} → {step['nodes_after']}",
                 "-" if error is None else f"{error:.2g}") for step, error in passes
        ),
    )  # fmt: skip


def _values(report: Mapping[str, Any], which: str) -> str:
    return ", ".join(report["model"][which])


def _cards(report: Mapping[str, Any], measurements: Mapping[str, Any]) -> Iterable[str]:
    size, latency, fidelity = report["size"], measurements["latency"], report["fidelity"]
    yield _card(f"{size['ratio']:.2f}x", f"size: {size['artifact_bytes']:,} of {size['float_bytes']:,} bytes")
    if latency is not None:
        label = f"latency: {latency['artifact_ms']:.3g} of {latency['float_ms']:.3g} ms, one thread"
        yield _card(f"{latency['ratio']:.2f}x", label)
    for name, measures in fidelity["outputs"].items():
        number = "exact" if measures["exact"] else f"{measures['sqnr']:.1f} dB" if measures["sqnr"] else "-"
        yield _card(number, f"SQNR of {name} on {report['data']['evaluated_on']}")
        if measures["top1"] is not None:
            yield _card(f"{measures['top1']:.0%}", f"same argmax of {name}")
    if (accuracy := fidelity["accuracy"]) is not None:
        label = f"accuracy; float has {accuracy['float_correct']}/{accuracy['labelled']}"
        yield _card(f"{accuracy['artifact_correct']}/{accuracy['labelled']}", label)
    precision = report["precision"]
    yield _card(f"{precision['integer']}/{sum(precision.values())}", "operators on codes")


def _card(number: str, label: str) -> str:
    return f'<div class="card"><b>{escape(number)}</b><span>{escape(label)}</span></div>'


def _layer(op: Mapping[str, Any]) -> str:
    width = max(0.0, min(100.0, 100.0 * op["sqnr"] / FULL_BAR))
    return (
        f"<tr><td>{escape(op['name'])}</td><td>{escape(op['op_type'])}</td><td>{escape(op['kernel'] or '')}</td>"
        f'<td class="number">{op["sqnr"]:.1f}</td>'
        f'<td class="wide"><div class="bar" style="width:{width:.1f}%"></div></td></tr>'
    )


def _share(cause: str, count: int, report: Mapping[str, Any]) -> str:
    width = 100.0 * count / max(1, report["size"]["artifact_bytes"])
    return (
        f'<tr><td>{escape(cause)}</td><td class="number">{count:,}</td>'
        f'<td class="wide"><div class="bar" style="width:{width:.1f}%"></div></td></tr>'
    )


def _row(*cells: str) -> str:
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
