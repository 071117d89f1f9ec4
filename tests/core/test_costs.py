"""Cost tables: files that are read as they were written, and times between the measured ones."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from qcompile.core.capabilities import Capability
from qcompile.core.costs import OVERHEAD, CostTable, kernel_key, kernel_size
from qcompile.core.errors import UsageError
from qcompile.core.execution import Kernel

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "backends/ort/costs").glob("*.json"))


def product(rows: int, time: float = 0.0, dtype: str = "float") -> Kernel:
    return Kernel("", "MatMul", "", (dtype, dtype), ((rows, 8), (8, 4)), ((rows, 4),), time)


TABLE = CostTable.measured(
    "toy 1", "a toy", 3.14159, [product(1, 1.0), product(1, 3.0), product(1, 1.5), product(64, 10.0)],
    [Capability("Conv", zero_point="middle", kernel="QLinearConv", integer=True, reads="uint8")],
)  # fmt: skip


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_what_is_shipped_fits_the_schema_and_reads_as_it_stands(path: Path) -> None:
    schema = json.loads((ROOT / "docs/schemas/costs.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(path.read_text()), schema)
    assert CostTable.from_json(path).to_json() == path.read_text()


def test_the_structure_is_shipped_for_other_processors_without_times() -> None:
    """Emulation tells what the optimizer does there, and nothing of what it takes."""
    tables = {path.stem: CostTable.from_json(path) for path in SHIPPED}
    assert {name for name, table in tables.items() if not table.entries} == {"avx2", "aarch64"}
    patterns = {name: {row.pattern for row in table.capabilities} for name, table in tables.items()}
    assert patterns["avx2"] == patterns["aarch64"] == patterns["avx512-vnni"] != set()
    assert all("structure only" in tables[name].processor for name in ("avx2", "aarch64"))


def test_the_structure_differs_in_what_becomes_of_signed_codes() -> None:
    """ARM has kernels for them; on x86 the optimizer makes unsigned ones of them in front of a convolution."""
    for path, reads in (("avx2", "uint8"), ("avx512-vnni", "uint8"), ("aarch64", "int8")):
        rows = CostTable.from_json(ROOT / f"backends/ort/costs/{path}.json").capabilities
        (found,) = (r for r in rows if (r.op, r.activation, r.behind, r.output) == ("Conv", "int8", "", "quantized"))
        assert (found.kernel, found.reads) == ("QLinearConv", reads)


def test_a_table_reads_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_text(TABLE.to_json())
    assert CostTable.from_json(tmp_path / "costs.json") == TABLE
    schema = json.loads((ROOT / "docs/schemas/costs.schema.json").read_text())
    jsonschema.validate(json.loads(TABLE.to_json()), schema)


def test_of_one_size_the_median_counts() -> None:
    assert TABLE.price(product(1)) == 1.5 and TABLE.price(product(64)) == 10.0
    assert TABLE.run == 3.14


def test_between_sizes_the_price_lies_between() -> None:
    rates = [(TABLE.price(product(rows)) - OVERHEAD) / kernel_size(product(rows))[1] for rows in (1, 8, 64)]
    assert rates[0] > rates[1] > rates[2]
    assert TABLE.total([product(1), product(64)]) == 3.14 + 11.5


def test_a_view_takes_no_longer_however_large() -> None:
    def reshape(length: int, time: float = 0.0) -> Kernel:
        return Kernel("", "Reshape", "", ("float", "int64"), ((length,), (2,)), ((1, length),), time)

    table = CostTable.measured("toy 1", "a toy", 0.0, [reshape(8, 2.0), reshape(64, 1.0), reshape(512, 3.0)])
    assert table.price(reshape(10**6)) == 2.0 and table.price(reshape(512)) == 3.0


def test_types_and_layouts_are_keys() -> None:
    assert kernel_key(product(1)) == "MatMul[float,float]" != kernel_key(product(1, dtype="uint8"))


GOOD = json.loads(TABLE.to_json())


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"schema_version": 2}, "has schema version 2, this release reads 1"),
        ({"kernels": 3}, "is not a cost table"),
        ({"kernels": {"MatMul[float,float]": [[1, 8, 4, 32.0, -1.0]]}}, "-1.0 is no time"),
        ({"kernels": {"MatMul[float,float]": [[1, 8, 4, 32.0, 0]]}}, "0 is no time"),
        ({"run": -1}, "-1 is no time"),
        ({"run": "fast"}, "'fast' is no time"),
        ({"capabilities": [{"op": "Conv", "kernal": "Conv"}]}, "kernal"),
        ({"capabilities": [{"op": 3}]}, "3 is no op"),
        ({"capabilities": 3}, "is not a cost table"),
    ],
)
def test_a_file_that_is_none_is_refused(change: dict[str, object], fact: str, tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_text(json.dumps(GOOD | change))
    with pytest.raises(UsageError, match=r"costs\.json: ") as raised:
        CostTable.from_json(tmp_path / "costs.json")
    assert fact in str(raised.value) and "qcompile probe" in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"[" * 100_000], ids=["empty", "list", "bytes", "deep"])
def test_neither_is_what_is_no_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_bytes(content)
    with pytest.raises(UsageError, match="is not a cost table"):
        CostTable.from_json(tmp_path / "costs.json")


def test_a_table_moves_to_where_some_kernels_were_measured() -> None:
    """Those take what they took there; others of their key by its median ratio, other keys by the median of all."""
    here = CostTable.measured(
        "toy 1", "a toy", 3.0, [product(1, 2.0), product(64, 10.0), product(8, 4.0, "uint8"), product(1, 2.0, "uint8")],
        TABLE.capabilities,
    )  # fmt: skip
    seen = CostTable.measured("toy 2", "a phone", 9.0, [product(1, 8.0), product(64, 20.0), product(7, 5.0, "int8")])
    moved = here.moved(seen)
    assert (moved.runtime, moved.processor, moved.run) == ("toy 2", "a phone", 9.0)
    assert moved.capabilities == TABLE.capabilities
    assert [moved.price(product(rows)) for rows in (1, 64)] == [8.0, 20.0]
    # The ratios seen are 4 and 2, and so their median 3.
    assert [moved.price(product(rows, dtype="uint8")) for rows in (8, 1)] == [12.0, 6.0]
    assert moved.price(product(7, dtype="int8")) == 5.0
    assert here.moved(here) == here
    alone = CostTable("toy 1", "a toy", 0.0).moved(seen)
    assert alone.entries == seen.entries and not alone.capabilities


def test_a_size_between_measured_ones_moves_with_its_key() -> None:
    here = CostTable.measured("toy", "here", 1.0, [product(rows, 2.0 * rows) for rows in (4, 16, 64, 256)])
    seen = CostTable.measured("toy", "there", 1.0, [product(rows, 10.0 * rows) for rows in (4, 16, 64)])
    moved = here.moved(seen)
    assert moved.price(product(256)) == pytest.approx(5.0 * here.price(product(256)), rel=1e-2)
    assert moved.price(product(32)) == pytest.approx(5.0 * here.price(product(32)), rel=0.1)
