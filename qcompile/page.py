"""report.html: the report as one page that opens anywhere, offline.

Words and tables are in the page as they are; what is drawn (by Chart.js, which the page carries) is drawn from the JSON
that the page carries as well. Every number is looked up in that JSON, and its element says where: `data-from`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from qcompile.graph_picture import draw_graph
from qcompile.regression import Figure, text
from qcompile.report import warnings

PAGE = "report.html"
#: A bar is full at this SQNR, in dB.
FULL_BAR = 60.0
#: The parts of the page that stand in files of their own.
WEB = ("page.css", "chart.umd.min.js", "page.js")

Content = Mapping[str, Any]


@dataclass(frozen=True)
class Page:
    """What the page tells.

    Parameters
    ----------
    report, measurements, distributions : mapping
        What the JSON files of these names hold.
    front : mapping, optional
        What pareto/front.json holds, where there is one.
    changes : sequence of Figure
        What is other than in the artifact that was there before.
    """

    report: Content
    measurements: Content
    distributions: Content
    front: Content | None = None
    changes: Sequence[Figure] = field(default=())

    def write(self, folder: Path) -> None:
        """Write it into an artifact's folder."""
        (folder / PAGE).write_text(self.render(), encoding="utf-8")

    def render(self) -> str:
        """Return the page."""
        report = self.report
        model = report["model"]
        template = Template((files("qcompile") / "web" / "page.html").read_text(encoding="utf-8"))
        css, *scripts = ((files("qcompile") / "web" / name).read_text(encoding="utf-8") for name in WEB)
        parts = {
            "title": escape(f"{', '.join(model['inputs'])} → {', '.join(model['outputs'])}, on {report['target']}"),
            "warnings": "".join(_paragraph(said) for said in warnings(report, self.measurements)),
            "cards": "".join(self._cards()),
            "changes": "".join(map(_change, self.changes)),
            "graph": draw_graph(report["operators"]),
            "layers": "".join(self._layers()),
            "bits": "".join(self._bits()),
            "bytes": "".join(self._bytes()),
            "refusals": "".join(_row(one["stage"], one["node"], one["reason"]) for one in report["refusals"]),
            "floats": "".join(_row(op["op_type"], op["name"], op["reason"] or "")
                              for op in report["operators"] if op["precision"] == "float"),
            "passes": "".join(self._passes()),
        }  # fmt: skip
        hidden = {f"no_{key}": "" if parts[key] else " hidden" for key in ("changes", "refusals", "bits", "floats")}
        hidden["no_front"] = "" if self.front else " hidden"
        return template.substitute(
            parts, **hidden, css=css, data=self._data(), scripts="".join(f"<script>{each}</script>" for each in scripts)
        )

    def _data(self) -> str:
        """Return the JSON that charts are drawn from, with nothing in it that would end a script."""
        content = {
            "report": self.report, "measurements": self.measurements, "front": self.front,
            "distributions": self.distributions["tensors"],
        }  # fmt: skip
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")

    def _number(self, form: str, *keys: str | int) -> str:
        """Return an element with a number from one of the files: its name and the keys into it."""
        found: Any = {"report": self.report, "measurements": self.measurements}
        for key in keys:
            found = found[key]
        return f'<span data-from="{escape(json.dumps(keys), quote=True)}">{form.format(found)}</span>'

    def _cards(self) -> Iterator[str]:
        report, latency = self.report, self.measurements["latency"]
        of = [self._number("{:,}", "report", "size", key) for key in ("artifact_bytes", "float_bytes")]
        yield _card(self._number("{:.2f}x", "report", "size", "ratio"), f"size: {of[0]} of {of[1]} bytes")
        if latency is not None:
            of = [self._number("{:.3g}", "measurements", "latency", key) for key in ("artifact_ms", "float_ms")]
            ratio = self._number("{:.2f}x", "measurements", "latency", "ratio")
            yield _card(ratio, f"latency: {of[0]} of {of[1]} ms, one thread")
        for name, measures in report["fidelity"]["outputs"].items():
            place, said = ("report", "fidelity", "outputs", name), escape(name)
            number = self._number("{:.1f} dB", *place, "sqnr") if measures["sqnr"] is not None else "-"
            label = f"SQNR of {said} on {escape(report['data']['evaluated_on'])}"
            yield _card("exact" if measures["exact"] else number, label)
            if measures["top1"] is not None:
                yield _card(self._number("{:.0%}", *place, "top1"), f"same argmax of {said}")
        if report["fidelity"]["accuracy"] is not None:
            right, every, exact = (self._number("{}", "report", "fidelity", "accuracy", key)
                                   for key in ("artifact_correct", "labelled", "float_correct"))  # fmt: skip
            yield _card(f"{right}/{every}", f"accuracy; float has {exact}/{every}")
        integer = self._number("{}", "report", "precision", "integer")
        yield _card(integer, f"of {len(report['operators'])} operators on codes")

    def _layers(self) -> Iterator[str]:
        for index, op in enumerate(self.report["operators"]):
            if op["sqnr"] is not None:
                width = max(0.0, min(100.0, 100.0 * op["sqnr"] / FULL_BAR))
                number = self._number("{:.1f}", "report", "operators", index, "sqnr")
                yield (
                    f"<tr><td>{escape(op['name'])}</td><td>{escape(op['op_type'])}</td>"
                    f'<td>{escape(op["kernel"] or "")}</td><td class="number">{number}</td>{_bar(width)}</tr>'
                )

    def _bits(self) -> Iterator[str]:
        for index, op in enumerate(self.report["operators"]):
            if op["weight_bits"] is not None:
                number = self._number("{:g}", "report", "operators", index, "weight_bits")
                yield f'<li class="b{op["weight_bits"]:.0f}" title="{escape(op["name"], quote=True)}">{number}</li>'

    def _bytes(self) -> Iterator[str]:
        for cause, count in self.report["size"]["by_cause"].items():
            number = self._number("{:,}", "report", "size", "by_cause", cause)
            width = 100.0 * count / max(1, self.report["size"]["artifact_bytes"])
            yield f'<tr><td>{escape(cause)}</td><td class="number">{number}</td>{_bar(width)}</tr>'

    def _passes(self) -> Iterator[str]:
        for index, step in enumerate(self.report["passes"]):
            place = ("report", "passes", index)
            nodes = " → ".join(self._number("{}", *place, f"nodes_{when}") for when in ("before", "after"))
            known = step["relative_error"] is not None
            error = self._number("{:.2g}", *place, "relative_error") if known else "-"
            yield _cells((escape(step["name"]), escape(step["effect"]), nodes, error))


def _paragraph(said: str) -> str:
    return f'<p class="warning">{escape(said)}</p>'


def _card(number: str, label: str) -> str:
    return f'<div class="card"><b>{number}</b><span>{label}</span></div>'


def _bar(width: float) -> str:
    return f'<td class="wide"><div class="bar" style="width:{width:.1f}%"></div></td>'


def _change(figure: Figure) -> str:
    kind = "worse" if figure.worse_by > 0 else "better" if figure.worse_by < 0 else "same"
    then, now = (text(number, figure.unit) for number in (figure.before, figure.now))
    return _cells((escape(figure.name), then, now, kind))


def _row(*cells: str) -> str:
    return _cells(escape(cell) for cell in cells)


def _cells(cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
