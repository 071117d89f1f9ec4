"""What the end-to-end tests share: the command line in this process, and the models that they hand to it."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

#: Commands that take options of a compile whether they name a target or not.
STAGES = (("calibrate",), ("plan",), ("apply",), ("compile",))
MODELS = Path(__file__).parents[2] / "models"


@dataclass(frozen=True)
class Finished:
    """What a command left behind: exit code, standard output and standard error."""

    code: int
    out: str
    err: str


@pytest.fixture
def qcompile(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Finished]]:
    """Run `qcompile` with the given words, as its entry point does.

    Unless a test asks for costs, whatever can be integers becomes integers: models as small as these gain nothing.
    """
    from qcompile.cli import main

    def run(*words: object, costs: str | None = "none") -> Finished:
        if (
            costs is not None
            and "--costs" not in words
            and ("--target" in words or "--recipe" in words or words[:1] in STAGES)
        ):
            words = (*words, "--costs", costs)
        monkeypatch.setattr(sys, "argv", ["qcompile", *map(str, words)])
        code = 0
        with warnings.catch_warnings():
            try:
                main()
            except SystemExit as stop:
                code = int(stop.code or 0)
        captured = capfd.readouterr()
        return Finished(code, captured.out, captured.err)

    yield run
    logging.disable(logging.NOTSET)


@pytest.fixture
def resnet8() -> tuple[Path, Path, Path]:
    """The model of the repository, its calibration and its evaluation data."""
    return MODELS / "resnet8.onnx", MODELS / "resnet8_calib.npz", MODELS / "resnet8_eval.npz"


@dataclass(frozen=True)
class Small:
    """A Conv with a Relu and a Gemm behind it, small enough to be built anew for each test, with data that fit it."""

    folder: Path
    proto: onnx.ModelProto
    samples: np.ndarray

    @property
    def model(self) -> Path:
        return self.save(self.proto)

    @property
    def data(self) -> Path:
        return self.feed(x=self.samples)

    def save(self, proto: onnx.ModelProto, name: str = "small.onnx", **options: object) -> Path:
        onnx.save(proto, self.folder / name, **options)
        return self.folder / name

    def feed(self, **arrays: np.ndarray) -> Path:
        np.savez(self.folder / "data.npz", **arrays)
        return self.folder / "data.npz"


TEXT = """
<ir_version: 10, opset_import: ["": 21]>
small (float[1, 3, 8, 8] x) => (float[1, 5] y)
<float[4, 3, 3, 3] w, float[4] b, float[4, 5] g, float[5] c>
{
    conv = Conv <pads = [1, 1, 1, 1]> (x, w, b)
    relu = Relu (conv)
    pooled = GlobalAveragePool (relu)
    flat = Flatten (pooled)
    y = Gemm (flat, g, c)
}
"""


@pytest.fixture
def small(tmp_path: Path) -> Small:
    """A small model with seeded weights, and eight samples for it."""
    return _small(tmp_path)


@pytest.fixture(scope="session")
def small_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the small model became, for those that only read it."""
    from qcompile import Options, compile
    from qcompile.options import NO_COSTS

    found = _small(tmp_path_factory.mktemp("small"))
    output = found.folder / "artifact"
    compile(found.model, Options("cpu", data=str(found.data), output=output, costs=NO_COSTS))
    return output


def _small(folder: Path) -> Small:
    generator = np.random.default_rng(7)
    proto = onnx.parser.parse_model(TEXT)
    for name, shape in {"w": (4, 3, 3, 3), "b": (4,), "g": (4, 5), "c": (5,)}.items():
        array = generator.normal(size=shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    samples = generator.normal(size=(8, 1, 3, 8, 8)).astype(np.float32)
    return Small(folder, proto, samples)


@pytest.fixture
def stacked(small: Small, proto_of: Callable[..., onnx.ModelProto], random: np.random.Generator) -> Small:
    """Four products behind one another, each with weights enough to be stored in four bits."""
    text = """(float[2,64] x) => (float[2,64] y) {
        a = MatMul (x, p) b = Relu (a) c = MatMul (b, q) d = Relu (c)
        e = MatMul (d, r) f = Relu (e) y = MatMul (f, s) }"""
    shapes = {"p": (64, 96), "q": (96, 128), "r": (128, 80), "s": (80, 64)}
    weights = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return Small(small.folder, proto_of(text, 21, **weights), random.normal(size=(16, 2, 64)).astype(np.float32))
