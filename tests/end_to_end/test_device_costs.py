"""`qcompile compare --costs-out`: what kernels took on a device becomes the table that the next compile decides by."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path

import jsonschema
import pytest

from qcompile import bundle, comparison, device_costs
from qcompile.backends.base import find_target
from qcompile.core.costs import CostTable
from qcompile.core.errors import TargetError, UsageError
from qcompile.devices import Local

SCHEMA = Path(__file__).parents[2] / "docs/schemas/costs.schema.json"


@pytest.fixture
def compared(small, small_artifact, tmp_path):
    """A comparison of the small model's artifact whose kernels were timed, and the bundle that it ran."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    content, failed = bundle.fill(folder, [small_artifact], small.model, str(small.data), 8)
    device_costs.pack(folder, content, small.model, str(small.data))
    return folder, content, comparison.compare(folder, content, failed, Local(), 1, "latency", 60.0, profile=True)


def slowed(told: dict, kernels: tuple[str, ...], factor: float) -> dict:
    """Make some kernels slower, and with them the runs that they are part of."""
    found = {}
    for index, one in told.items():
        profile = dict(one["profile"])
        content = json.loads(zlib.decompress(base64.b64decode(profile["content"])))
        before = sum(event["dur"] for event in content["events"])
        for event in content["events"]:
            if event["args"]["op_name"] in kernels:
                event["dur"] = int(factor * (1 + event["dur"]))
        after = sum(event["dur"] for event in content["events"])
        profile["content"] = base64.b64encode(zlib.compress(json.dumps(content).encode())).decode()
        times = [time * after / max(1, before) for time in one["times_ms"]]
        found[index] = {**one, "profile": profile, "times_ms": times}
    return found


def test_kernels_of_all_forms_are_in_the_table(compared):
    folder, content, seen = compared
    table = device_costs.measured(folder, content, seen.told)
    jsonschema.validate(json.loads(table.to_json()), json.loads(SCHEMA.read_text()))
    target, _ = find_target("cpu")
    assert target.costs is not None and table.capabilities == target.costs.capabilities
    here = {key: set(sizes) for key, sizes in target.costs.entries.items()}
    measured = [key for key, sizes in table.entries.items() if set(sizes) - here.get(key, set())]
    # Both forms of the convolution, of which the artifact has one only: 3 channels of 8x8 become 4.
    assert any(key.startswith("QLinearConv[") for key in measured)
    assert any("Conv[float" in key for key in measured)
    assert table.run > 0.0 and table.runtime.startswith("onnxruntime ")
    assert [row.target for row in seen.rows if row.target != "float"] == ["cpu"]


def test_kernels_add_up_to_the_run_that_was_timed_undisturbed(compared):
    _, content, seen = compared
    beside = device_costs._beside(content["artifacts"], seen.told)
    told = dict(seen.told[1])
    told["times_ms"] = [5.0] * len(told["times_ms"])
    kernels = device_costs._kernels(told["profile"], told["times_ms"], [0] * 8, beside)
    assert sum(kernel.microseconds for kernel in kernels) == pytest.approx(5000.0 - beside, rel=1e-6)


def test_the_next_compile_decides_by_what_was_measured(qcompile, small, compared, tmp_path):
    folder, content, seen = compared

    def integers(kernels: tuple[str, ...]) -> int:
        table = device_costs.measured(folder, content, slowed(dict(seen.told), kernels, 1e4))
        (tmp_path / "costs.json").write_text(table.to_json())
        words = ("--target", "cpu", "--data", small.data, "-o", tmp_path / "out", "--json")
        done = qcompile(small.model, *words, "--costs", tmp_path / "costs.json")
        assert done.code == 0, done.err
        return int(json.loads(done.out)["report"]["precision"]["integer"])

    assert integers(("QLinearConv",)) == 0 < integers(("Conv", "FusedConv"))


def test_a_table_is_written_and_read_from_the_command_line(qcompile, small, small_artifact, tmp_path):
    words, file = ("--model", small.model, "--data", small.data), tmp_path / "device.json"
    done = qcompile("compare", small_artifact, *words, "--costs-out", file, "--json")
    assert done.code == 0, done.err
    assert len(json.loads(done.out)["rows"]) == 2  # the forms have none
    first = CostTable.from_json(file)
    packed = tmp_path / "small.qbundle"
    assert qcompile("bundle", small_artifact, *words, "--forms", "-o", packed).code == 0
    assert qcompile("compare", packed, "--costs-out", file).code == 0
    again = CostTable.from_json(file)
    assert {key: set(sizes) for key, sizes in again.entries.items()} == {
        key: set(sizes) for key, sizes in first.entries.items()
    }


def test_a_bundle_without_forms_gives_what_ran(qcompile, small, small_artifact, tmp_path):
    words, file = ("--model", small.model, "--data", small.data), tmp_path / "device.json"
    assert qcompile("bundle", small_artifact, *words, "-o", tmp_path / "b.qbundle").code == 0
    assert qcompile("compare", tmp_path / "b.qbundle", "--costs-out", file).code == 0
    assert CostTable.from_json(file).entries


def test_what_lies_there_and_is_no_table_stays(qcompile, small, small_artifact, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    words = ("--model", small.model, "--data", small.data, "--costs-out", tmp_path / "notes.txt")
    done = qcompile("compare", small_artifact, *words)
    assert done.code == 2 and "is not what would be written there" in done.err
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_no_table_prices_is_refused():
    rows = [{"kind": "onnx", "target": "float"}, {"kind": "library", "target": "cpu:tvm"}]
    with pytest.raises(UsageError, match="libraries are not"):
        device_costs.priced_target(rows)


def test_a_device_that_timed_no_kernel_says_why(compared):
    folder, content, seen = compared
    told = {index: {**one, "unprofiled": "no space left on device"} for index, one in seen.told.items()}
    for one in told.values():
        del one["profile"]
    with pytest.raises(TargetError, match="no space left on device"):
        device_costs.measured(folder, content, told)
