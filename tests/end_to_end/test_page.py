"""report.html: its numbers are those of the JSON files, it loads nothing, and a browser shows it without complaint."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qcompile.page import Page

WINDOWS = {"desktop": "1280,900", "phone": "390,844"}
chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    """ResNet-8 compiled twice into one folder, with other bits of weights, and with its front."""
    models = Path(__file__).parents[2] / "models"
    output = tmp_path_factory.mktemp("page") / "out"
    words = [
        sys.executable, "-m", "qcompile", str(models / "resnet8.onnx"), "--target", "cpu", "--costs", "none", "-q",
        "-o", str(output), "--data", str(models / "resnet8_calib.npz"), "--eval", str(models / "resnet8_eval.npz"),
        "--smoothing", "none", "--rotation", "none",
    ]  # fmt: skip
    subprocess.run(words, check=True)
    subprocess.run([*words, "--weights", "4", "--pareto"], check=True)
    return output


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


class Elements(HTMLParser):
    """What a page has: each number and where it says that it is from, and whatever would be loaded."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.numbers: list[tuple[list[Any], str]] = []
        self.loaded: list[str] = []
        self.open: list[Any] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        if "data-from" in known:
            self.open = json.loads(known["data-from"] or "")
        self.loaded += [value or "" for key, value in attrs if key in ("src", "href") and value != "data:,"]

    def handle_data(self, data: str) -> None:
        if self.open is not None:
            self.numbers.append((self.open, data))
            self.open = None


def test_every_number_is_one_of_the_files(artifact):
    page = Elements((artifact / "report.html").read_text())
    assert len(page.numbers) > 40
    for (file, *keys), shown in page.numbers:
        value = read(artifact, f"{file}.json")
        for key in keys:
            value = value[key]
        digits = re.sub(r"[^0-9.e+-]", "", shown)
        exact = float(value) * (100 if "%" in shown else 1)
        # To half of the last place that is shown.
        mantissa, _, exponent = digits.partition("e")
        places = len(mantissa.partition(".")[2]) - int(exponent or 0)
        assert abs(float(digits) - exact) <= 0.5000001 * 10.0**-places, (keys, shown)


def test_the_cards_say_what_matters_first(artifact):
    page, report = (artifact / "report.html").read_text(), read(artifact, "report.json")
    shown = {tuple(keys): text for keys, text in Elements(page).numbers}
    assert shown[("report", "size", "ratio")] == f"{report['size']['ratio']:.2f}x"
    assert ("report", "fidelity", "outputs", "probabilities", "sqnr") in shown
    assert ("measurements", "latency", "ratio") in shown
    for warning in report["warnings"]:
        assert warning.replace("'", "&#x27;") in page


def test_what_changed_since_the_last_artifact(artifact):
    page = (artifact / "report.html").read_text()
    table = page.split("Since the artifact")[1].split("</section>")[0]
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", table)
    kinds = {name: kind for name, _, _, kind in rows}
    assert kinds["size"] == "better" and kinds["SQNR of probabilities"] == "worse"


def test_it_loads_nothing(artifact):
    page = (artifact / "report.html").read_text()
    assert Elements(page).loaded == []
    assert "default-src 'none'" in page


def page_of(folder: Path, **other: Any) -> Page:
    names = ("report", "measurements", "distributions")
    return Page(**{name: read(folder, f"{name}.json") for name in names} | other)


def test_names_are_shown_as_they_are(artifact):
    hostile = "</script><b onclick='x'>\"&"
    report = json.loads(json.dumps(read(artifact, "report.json")).replace('"activation"', json.dumps(hostile)))
    page = page_of(artifact, report=report).render()
    assert hostile not in page
    assert "&lt;/script&gt;&lt;b onclick=" in page


def shown_by_chromium(page: Path, window: str, *flags: str) -> tuple[str, str]:
    """Return what the page has become, and what the console said."""
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={window}", "--enable-logging=stderr",
        f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=5000", *flags, "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@chromium
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_a_browser_shows_it_without_complaint(artifact, tmp_path, window):
    page = shutil.copy(artifact / "report.html", tmp_path / "report.html")
    shown, console = shown_by_chromium(page, window)
    assert console == ""
    tensors = read(artifact, "distributions.json")["tensors"]
    assert shown.count("<option ") == len(tensors)
    assert "codes." in shown.split('id="outside"')[1][:80]
    for chart in ("layers", "distribution", "front"):  # a canvas that nothing is drawn on has no size of its own
        assert "width=" in shown.split(f'<canvas id="{chart}"')[1].split(">")[0]


@chromium
def test_what_a_browser_complains_of_is_seen(artifact, tmp_path):
    page = tmp_path / "report.html"
    page.write_text((artifact / "report.html").read_text().replace("drawAll();", "drawNothing();"))
    assert "drawNothing is not defined" in shown_by_chromium(page, WINDOWS["desktop"])[1]


@chromium
def test_an_operator_that_is_touched_says_what_became_of_it(artifact, tmp_path):
    page, report = tmp_path / "report.html", read(artifact, "report.json")
    conv = next(op for op in report["operators"] if op["sqnr"] is not None and op["reads"])
    touch = f"<script>document.querySelector('[data-op=\"{conv['name']}\"]').dispatchEvent(new Event('click'))</script>"
    page.write_text((artifact / "report.html").read_text().replace("</body>", f"{touch}</body>"))
    shown, console = shown_by_chromium(page, WINDOWS["desktop"])
    said = shown.split('id="operator">')[1].split("</p>")[0]
    assert console == "" and f"'{conv['name']}'" in said and f"{conv['sqnr']} dB against float" in said
