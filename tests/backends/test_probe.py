"""Measuring here: kernels with times that add up, the grid's shapes, and a table made of both."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from qcompile.backends.base import Subject
from qcompile.backends.ort import capabilities, grid, probe
from qcompile.core import runtime
from qcompile.core.capabilities import Capability
from qcompile.core.target import Target
from qcompile.passes.canonicalize import Canonicalize


def silent(items, total, what):
    return items


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times do not matter here."""
    monkeypatch.setattr(probe, "BUDGET", 0.0)
    monkeypatch.setattr(probe, "GRID_BUDGET", 0.0)
    monkeypatch.setattr(probe, "EMPTY_RUNS", 20)


def small(task: grid.Convolution | grid.Product) -> tuple[ir.Model, list[runtime.Feeds]]:
    model = task.model()
    Canonicalize(21)(model)
    return model, [runtime.synthetic_feeds(model, 0)]


def test_what_timing_takes_is_taken_off_each_kernel_alike() -> None:
    model, samples = small(grid.Product(4, 8, 8))
    kernel = probe.execute(model, samples)[0][0]
    kernels = [probe.replace(kernel, microseconds=time) for time in (10.0, 20.0, 3.0)]
    assert [k.microseconds for k in probe.without_timing(kernels, 27.0)] == [8.0, 18.0, 1.0]
    assert probe.without_timing(kernels, 40.0) == kernels, "the run took longer: that is no kernel's"


def test_every_kernel_of_a_model_has_a_time() -> None:
    model, samples = small(grid.Convolution(32, 64, 56))
    ((run,),) = probe.timed([model], samples, beside=2.0, budget=0.05)
    assert "nchwc.Conv" in {kernel.op_type for kernel in run.kernels}
    assert min(kernel.microseconds for kernel in run.kernels) > 0.0 and run.microseconds > 0.0


def test_a_kernel_takes_the_median_over_sessions_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = small(grid.Product(4, 8, 8))
    times = iter((5.0, 50.0, 1.0, 10.0, 3.0, 30.0))
    monkeypatch.setattr(probe, "_in_turns", lambda *_: [[time] for time in (12.0, 60.0, 32.0, 90.0, 22.0, 120.0)])
    kernel = probe.execute(model, samples)[0][0]

    def session_runs(*_: object) -> list[probe.Run]:
        time = next(times)
        return [probe.Run((probe.replace(kernel, microseconds=time),), 10.0 * time)]

    monkeypatch.setattr(probe, "_session_runs", session_runs)
    runs = [run for (run,) in probe.timed([model, model], samples, beside=2.0)]
    kernels = [run.kernels[0].microseconds for run in runs]
    assert kernels == pytest.approx([3.0 * 20.0 / 28.0, 10.0 * 88.0 / 98.0]), "of 50, 10 and 30 µs, 2 are no kernel's"
    assert [run.microseconds for run in runs] == [22.0, 90.0]


def test_a_run_takes_time_beside_its_kernels() -> None:
    assert 0.1 < probe.time_beside_kernels() < 1000.0


def test_the_grid_has_what_networks_have() -> None:
    shapes = grid.convolutions()
    assert len(shapes) + len(grid.products()) >= 150 and len(set(shapes)) == len(shapes)
    for kernel, stride, depthwise in [(1, 1, False), (3, 1, False), (3, 2, False), (3, 1, True), (3, 2, True)]:
        assert any((s.kernel, s.stride, s.groups > 1) == (kernel, stride, depthwise) for s in shapes)


@pytest.mark.parametrize(
    "task", [grid.Convolution(16, 32, 8), grid.Convolution(16, 16, 8, 3, 2, groups=16), grid.Product(4, 64, 64)]
)
def test_a_shape_of_the_grid_runs_in_float_and_in_integers(task, cpu: Target) -> None:
    found = {kernel.op_type for kernel in probe._measure_task(task, cpu, 1.0)}
    assert found & {"QLinearConv", "MatMulIntegerToFloat"} and found & {"nchwc.Conv", "Conv", "MatMulNBits"}


def test_what_stands_between_is_there_in_float_and_on_codes() -> None:
    models = dict(grid.between())
    assert {name.partition(" ")[0] for name in models} == {*grid.BETWEEN, *grid.IN_FLOAT}
    name, model = next((name, model) for name, model in models.items() if name.startswith("Add") and "codes" in name)
    kernels = [kernel.op_type for kernel in probe._grid_kernels([model], 1.0)]
    assert "QLinearAdd" in kernels, name


def test_a_table_of_this_machine(cpu: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    few = (
        Capability("Conv", weights="int8", per_channel=True, zero_point="middle"),
        Capability("Conv", weights="int8", per_channel=True, output="float"),
        Capability("MatMul", weights="int8", per_channel=True, output="float"),
    )
    assert set(few) <= set(capabilities.patterns())
    monkeypatch.setattr(capabilities, "patterns", lambda: few)
    monkeypatch.setattr(grid, "convolutions", lambda: [grid.Convolution(16, 16, 8)])
    for name in ("products", "signed", "between"):
        monkeypatch.setattr(grid, name, lambda: [])
    model, samples = small(grid.Product(4, 96, 64))
    table = probe.measure(cpu, [Subject("product", model, model, samples)], "a toy", silent)
    assert [row.kernel for row in table.capabilities] == ["QLinearConv", "Conv", "MatMulIntegerToFloat"]
    assert table.processor == "a toy" and table.runtime == runtime.name() and table.run > 0
    assert {"QLinearConv[uint8,int8]", "MatMulIntegerToFloat[uint8,int8]"} <= set(table.entries)
    # A model counts as it came, with its weights in integers, and with all in integers.
    assert (4, 96, 64) in table.entries["MatMulIntegerToFloat[uint8,int8]"]
    assert (4, 96, 64) in table.entries["MatMulNBits[float,uint8]"]
    assert cpu.with_costs(table).costs == table


def test_a_table_without_times_has_the_structure_alone(cpu: Target) -> None:
    rows = list(capabilities.measure([Capability("Conv", weights="int8", per_channel=True, output="float")]))
    table = probe.untimed(rows, "a toy")
    assert not table.entries and cpu.with_costs(table).costs is None


def test_the_weights_of_patterns_are_codes_of_their_type() -> None:
    model = capabilities.model_of(Capability("MatMul", "float", "int4", output="float"))
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    assert weights["w"].data_type == onnx.TensorProto.INT4
    assert list(weights["w_scale"].dims) == [2, 64], "64 rows in blocks of 32"
