"""A bound on memory changes no byte of the artifact, and is refused where it cannot be held."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from end_to_end.outcomes import settled

from qcompile import Options, compile, memory
from qcompile.core import mapped, runtime, scratch
from qcompile.core import model as models
from qcompile.core.errors import BudgetError

ROOT = Path(__file__).parents[2]
RESNET, CALIBRATION = ROOT / "models/resnet8.onnx", ROOT / "models/resnet8_calib.npz"


@pytest.mark.parametrize("weights, activations", [("8", "8"), ("4", "none")])
def test_a_bound_changes_no_byte(weights: str, activations: str, tmp_path: Path, monkeypatch) -> None:
    """From a model whose weights are in a file, with what is rewritten in files too."""
    monkeypatch.setattr(scratch, "LEAST", models.LAZY_ELEMENTS + 1)
    few = tmp_path / "few.npz"
    with np.load(CALIBRATION) as archive:
        np.savez(few, **{name: archive[name][:4] for name in archive})
    ir.save(ir.load(RESNET), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    options = Options(
        "cpu", data=str(few), weights=weights, activations=activations, costs="none", smoothing="none", rotation="none"
    )
    left: list[str] = []
    put = scratch.Scratch.put
    monkeypatch.setattr(scratch.Scratch, "put", lambda self, *given: left.append(given[1]) or put(self, *given))
    free = compile(tmp_path / "m.onnx", replace(options, output=tmp_path / "free"))
    assert not left
    bound = compile(tmp_path / "m.onnx", replace(options, output=tmp_path / "bound", max_memory="64GB"))
    assert len(left) >= 4, "weights left memory"
    assert settled(free.output) == settled(bound.output)
    assert bound.measurements["memory"]["bound_bytes"] == 64 << 30
    assert free.measurements["memory"]["bound_bytes"] is None


def test_one_model_is_held_where_there_is_no_room_for_two(tmp_path: Path, monkeypatch) -> None:
    """What the float model makes of the samples is kept then, and no latency is measured."""
    monkeypatch.setattr(scratch, "LEAST", models.LAZY_ELEMENTS + 1)
    room = memory.least(models.load(RESNET), data=True) + 1
    monkeypatch.setattr(memory, "peak", lambda: room)
    options = Options("cpu", data=str(CALIBRATION), activations="none", weights="8")
    free = compile(RESNET, replace(options, output=tmp_path / "free"))
    bound = compile(RESNET, replace(options, output=tmp_path / "bound", max_memory=f"{room}B"))
    assert settled(free.output) == settled(bound.output)
    assert bound.measurements["latency"] is None and "no room for two models" in bound.measurements["warnings"][0]


def test_a_bound_that_was_not_held_is_an_error(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(memory, "peak", lambda: (1 << 30) + 1)
    options = Options("cpu", data=str(CALIBRATION), activations="none", output=tmp_path / "out", max_memory="1GB")
    with pytest.raises(BudgetError, match=r"--max-memory 1GB: was not held: the compile took 1025MB; give 1025MB"):
        compile(RESNET, options)
    assert not (tmp_path / "out").exists()


def test_a_bound_that_cannot_be_held_says_what_can(qcompile, small) -> None:
    done = qcompile(
        small.model, "--target", "cpu", "--data", small.data, "-o", small.folder / "out", "--max-memory", "9MB"
    )
    assert done.code == 5 and not (small.folder / "out").exists()
    assert done.err.startswith("error: --max-memory 9MB: has no room for a model whose compile takes 3")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("text", ["4", "0GB", "0.5x", "much"])
def test_a_bound_that_is_no_size_is_refused(text: str, qcompile, small) -> None:
    done = qcompile(small.model, "--target", "cpu", "--max-memory", text)
    assert done.code == 2 and done.err.startswith(
        f"error: --max-memory {text}: is not a budget; give a number of bytes"
    )


def test_the_process_says_what_it_took(qcompile, small) -> None:
    done = qcompile(
        small.model, "--target", "cpu", "--data", small.data, "-o", small.folder / "out", "--max-memory", "4GB"
    )
    assert done.code == 0, done.err
    taken = json.loads((small.folder / "out/measurements.json").read_text())["memory"]
    assert taken["bound_bytes"] == 4 << 30
    if Path("/proc/self/status").exists():
        assert 64 << 20 < taken["peak_bytes"] < 4 << 30


def test_threads_are_as_many_as_models_fit(model_of, monkeypatch) -> None:
    model = model_of("(float[1,4] x) => (float[1,4] y) { y = MatMul (x, w) }", w=np.zeros((4, 4), np.float32))
    options = Options("cpu", threads=8)
    assert memory.threads(options, model) == 8
    monkeypatch.setattr(memory, "BASE", 0)
    monkeypatch.setattr(memory, "MEMORY", 0)
    monkeypatch.setattr(memory, "HELD", 2.0)
    monkeypatch.setattr(memory, "ROUNDED", 0.0)
    assert memory.least(model) == 2 * 64
    assert memory.least(model, data=True) == (2 + memory.LEFT) * 64
    with pytest.raises(BudgetError, match="has no room for a model whose compile takes 1MB at least"):
        memory.threads(replace(options, data="calib.npz", max_memory="143B"), model)
    assert memory.threads(replace(options, data="calib.npz", max_memory="144B"), model) == 1
    assert [memory.threads(replace(options, max_memory=f"{bound}B"), model) for bound in (128, 255, 256, 9999)] == [
        1,
        1,
        2,
        8,
    ]
    with pytest.raises(BudgetError):
        memory.threads(replace(options, max_memory="127B"), model)


def test_weights_beyond_what_protobuf_holds(small, qcompile, tmp_path: Path, monkeypatch) -> None:
    """With its limit set low: what is in memory goes beside the model, what is in files stays there."""
    monkeypatch.setattr(models, "INLINE_LIMIT", 64 << 10)
    ir.save(ir.load(RESNET), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    model = models.load(tmp_path / "m.onnx")
    assert any(isinstance(one.const_value, mapped.MappedTensor) for one in model.graph.initializers.values())
    assert models.held_bytes(model) < 64 << 10 < models.initializer_bytes(model)
    serialize, asked = models.serialize, []
    monkeypatch.setattr(
        models, "serialize", lambda model: asked.append(models.initializer_bytes(model)) or serialize(model)
    )
    feeds = runtime.synthetic_feeds(model, 0)
    np.testing.assert_array_equal(*(next(iter(runtime.Session(one).run(feeds).values())) for one in (model, RESNET)))
    assert max(asked, default=0) < 64 << 10, "nothing was made into one message that does not fit into one"


@pytest.mark.parametrize("bound", [(), ("--max-memory", "64GB")])
def test_from_external_data_to_external_data(bound: tuple[str, ...], qcompile, tmp_path: Path, monkeypatch) -> None:
    """With the limit set low: the artifact has weights beside it, and is the same as one that has them inside."""
    ir.save(ir.load(RESNET), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    few = tmp_path / "few.npz"
    with np.load(CALIBRATION) as archive:
        np.savez(few, **{name: archive[name][:4] for name in archive})
    words = ("--target", "cpu", "--data", few, "--activations", "none", "--quiet")
    inside, beside = tmp_path / "inside", tmp_path / "beside"
    assert qcompile(RESNET, *words, "-o", inside).code == 0
    monkeypatch.setattr(models, "INLINE_LIMIT", 16 << 10)
    monkeypatch.setattr(scratch, "LEAST", models.LAZY_ELEMENTS + 1)
    done = qcompile(tmp_path / "m.onnx", *words, "-o", beside, *bound)
    assert done.code == 0, done.err
    assert sorted(json.loads((beside / "manifest.json").read_text())["files"])[:2] == ["model.onnx", "model.onnx.data"]
    one, other = (models.load(folder / "model.onnx") for folder in (inside, beside))
    assert models.content_hash(one) == models.content_hash(other)
    compared = qcompile("compare", beside, "--model", tmp_path / "m.onnx", "--data", few, "--json")
    assert compared.code == 0, compared.err
    rows = {Path(row["output"]).name: row for row in json.loads(compared.out)["rows"]}
    assert len(rows) == 2 and min(rows["beside"]["sqnr"].values()) > 20.0
    assert qcompile("check", beside, "--against", beside / "report.json").code == 0
