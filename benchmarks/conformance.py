"""Compile onnx's backend tests, every node case and the nine light networks, and write what came of it to docs/ops.md.

    python benchmarks/conformance.py [--jobs 2]

Each goes through `--weights none --activations none`, where outputs must stay equal, and through W8A8. In a node case
all that an operator reads is an input, so nothing is a weight; for W8A8 all inputs but the first are stored in the
model. The light networks' weights are constants of one value, which quantize without error; they go through W8A8 once
as they are shipped and once with random weights in their place, without the Softmax at the end.
"""

from __future__ import annotations

import argparse
import functools
import re
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from qcompile import Options, QcompileError, compile
from qcompile.backends.base import find_target
from qcompile.options import NO_COSTS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/ops.md"
LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"
MODES: Mapping[str, Mapping[str, str]] = {"none": {"weights": "none", "activations": "none"}, "W8A8": {}}
#: How a case ends: the first two in `none`, the next two in W8A8, the last in both.
EQUAL, MOVED, INTEGER, FLOAT, REFUSED = "equal", "moved", "integer", "float", "refused"
SAMPLES = 6
Report = Mapping[str, Any]
#: What of a reason only holds in one case, and what stands for it, so that equal reasons count together.
GENERAL = (
    (r"( node with name| \(node:)? ?'[^']*'( ep:\S+)?", " …"),
    (r"Node \(\w*\)", "Node"),
    (r" at index \(.*\)", ""),
    (r"its \d+ weights", "its weights"),
    (r"weights have \d+ axes", "weights do not have two axes"),
    (r"^is [A-Z0-9]+, which NumPy does not have", "an input or output is of a type that NumPy does not have"),
    (r"^(holds strings|is no tensor)", r"an input \1"),
    (r"cannot express its .*", "cannot express it"),
    (r"^cpu has no integer \w+", "cpu has no integer kernel"),
    (r"(\(…)? ?[\w.]+:\w+\(-1\) is not", "it is not"),
    (r"a node of type \w+ is in QOperator", "it is in QOperator"),
)


@dataclass(frozen=True)
class Case:
    """A node case: the operator that it is about, its model, and its inputs as tensors, None where one is none."""

    name: str
    domain: str
    op_type: str
    version: int
    model: onnx.ModelProto
    inputs: tuple[onnx.TensorProto | None, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of a case in one mode, and why: the refusal's fact, or what keeps the operator in float."""

    result: str
    reason: str = ""
    exit_code: int = 0


@functools.cache
def node_cases() -> tuple[Case, ...]:
    """Return onnx's node cases by name. What is written out as a function's body counts for the function."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnx's own cases divide by zero and overflow on purpose
        loaded = load_model_tests(kind="node")
    models = {case.name: case.model for case in loaded if case.model is not None}
    cases = []
    for case in sorted(loaded, key=lambda case: case.name):
        original, model, data = models[case.name.partition("_expanded")[0]], models[case.name], case.data_sets
        assert data is not None
        node = original.graph.node[0]
        version = max(entry.version for entry in original.opset_import if entry.domain == node.domain)
        inputs = tuple(map(_tensor, data[0][0], model.graph.input))
        cases.append(Case(case.name, node.domain, node.op_type, version, model, inputs))
    return tuple(cases)


def _tensor(content: Any, value: onnx.ValueInfoProto) -> onnx.TensorProto | None:
    if value.type.WhichOneof("value") != "tensor_type":
        return None
    if not isinstance(content, onnx.TensorProto):
        return onnx.numpy_helper.from_array(np.asarray(content), value.name)
    tensor = onnx.TensorProto()
    tensor.CopyFrom(content)
    tensor.name = value.name
    return tensor


def outcome(case: Case, mode: str, folder: Path) -> Outcome:
    """Compile a case.

    Raises
    ------
    Exception
        Whatever is not an error that qcompile words itself: a defect.
    """
    model, inputs = case.model, case.inputs
    if mode != "none":
        model, inputs = _with_weights(model, inputs)
    data = None
    if inputs and None not in inputs:
        (folder / "test_data_set_0").mkdir(parents=True)
        for index, tensor in enumerate(inputs):
            assert tensor is not None
            (folder / f"test_data_set_0/input_{index}.pb").write_bytes(tensor.SerializeToString())
        data = str(folder)
    options: Any = {"observer": "mse", "threads": 1, "costs": NO_COSTS, **MODES[mode]}
    try:
        report = compile(model, Options("cpu", data=data, output=folder / "out", **options)).report
    except QcompileError as error:
        assert not (folder / "out").exists()
        return Outcome(REFUSED, _general(error.fact), error.exit_code)
    if mode == "none":
        exact = all(measures["exact"] for measures in report["fidelity"]["outputs"].values())
        return Outcome(EQUAL if exact else MOVED)
    if report["precision"]["float"] < sum(report["precision"].values()):
        return Outcome(INTEGER)
    reasons = {operator["reason"] for operator in report["operators"] if operator["op_type"] == case.op_type}
    return Outcome(FLOAT, "; ".join(sorted(_general(reason) for reason in reasons if reason)))


def _with_weights(
    model: onnx.ModelProto, inputs: Sequence[onnx.TensorProto | None]
) -> tuple[onnx.ModelProto, tuple[onnx.TensorProto | None, ...]]:
    """Return the model with all inputs but the first stored in it, and what remains to be fed."""
    if len(inputs) < 2 or None in inputs:
        return model, tuple(inputs)
    stored = onnx.ModelProto()
    stored.CopyFrom(model)
    stored.graph.initializer.extend(tensor for tensor in inputs[1:] if tensor is not None)
    del stored.graph.input[1:]
    return stored, (inputs[0],)


def _general(reason: str) -> str:
    for pattern, general in GENERAL:
        reason = re.sub(pattern, general, reason)
    return " ".join(reason.split())


def node_outcome(task: tuple[int, str]) -> Outcome:
    """Compile one of `node_cases`, by its place, in a folder of its own."""
    index, mode = task
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return outcome(node_cases()[index], mode, Path(folder) / "case")


def light_names() -> list[str]:
    """Return the names of the light networks."""
    return sorted(path.stem.removeprefix("light_") for path in LIGHT.glob("light_*.onnx"))


def light_report(name: str, mode: str, random_weights: bool = False) -> Report:
    """Compile a light network with random images and return the report."""
    model = onnx.load(LIGHT / f"light_{name}.onnx")
    generator = np.random.default_rng(5)
    stored = {tensor.name for tensor in model.graph.initializer}
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.input if value.name not in stored
    }  # fmt: skip
    if random_weights:
        _randomize(model, generator)
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "data.npz")
        arrays = {name: generator.random((SAMPLES, *shape), np.float32) for name, shape in shapes.items()}
        np.savez(data, allow_pickle=False, **arrays)
        options: Any = {"observer": "mse", "threads": 1, "costs": NO_COSTS, **MODES[mode]}
        return compile(model, Options("cpu", data=data, output=Path(folder) / "out", **options)).report


def _randomize(model: onnx.ModelProto, generator: np.random.Generator) -> None:
    """Put random weights, by He et al. 2015, where a light network has ConstantOfShape, so that no signal dies.

    A Softmax at the end goes: it would make one of the scores 1 and hide the others' errors.
    """
    graph = model.graph
    if graph.node[-1].op_type == "Softmax":
        graph.output[0].name = graph.node.pop().input[0]
    shapes = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made = {node.output[0]: node for node in graph.node if node.op_type == "ConstantOfShape"}
    factors = {name for node in graph.node if node.op_type == "BatchNormalization" for name in node.input[1:5:3]}
    widened = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Unsqueeze"}
    factors |= {widened[name] for node in graph.node if node.op_type == "Mul" for name in node.input if name in widened}
    for name, node in made.items():
        shape = shapes[node.input[0]]
        values: npt.NDArray[Any]
        if len(shape) > 1:
            values = generator.standard_normal(shape, np.float32) * np.float32(np.sqrt(2.0 / np.prod(shape[1:])))
        elif name in factors:
            values = generator.uniform(0.5, 1.5, shape).astype(np.float32)
        else:
            values = generator.standard_normal(shape, np.float32) * np.float32(0.1)
        graph.node.remove(node)
        graph.initializer.append(onnx.numpy_helper.from_array(values, name))
        graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, values.shape))


Tasks = Sequence[tuple[Case, Outcome, Outcome]]
NODE_HEAD = """
## By operator

`by design` is what `--target cpu` may do with the operator (docs/targets/cpu.md). In W8A8, a case is `integer` if an
operator in it got integer weights or kernels, verified, and `float` if it was verified without: one operator alone
has no neighbours whose codes it could take, so that is the rule for all that is not linear.

| operator | opset | cases | none: equal | refused | W8A8: integer | float | refused | by design |
|---|---|---|---|---|---|---|---|---|
"""
REASON_HEAD = """
## Why cases are refused

| exit code | fact | cases | operators |
|---|---|---|---|
"""
FLOAT_HEAD = """
## Why W8A8 stays in float

| reason | cases | operators |
|---|---|---|
"""
LIGHT_HEAD = """
## Light networks

On {samples} random images, `--observer mse`. As they are shipped all weights are 0.02, and those above 1 MB are not
stored but made by the graph, so that they stay in float. With random weights, all stored, the SQNR in dB says what
W8A8 costs the scores in front of the Softmax.

| network | nodes → canonical | none: error | W8A8 as shipped: on codes | SQNR | random weights: on codes | SQNR |
|---|---|---|---|---|---|---|
"""


def node_outcomes(jobs: int) -> Tasks:
    """Compile every node case in both modes."""
    cases = node_cases()
    tasks = [(index, mode) for index in range(len(cases)) for mode in MODES]
    with ProcessPoolExecutor(jobs) as pool:
        results = list(pool.map(node_outcome, tasks, chunksize=16))
    return [(case, results[2 * index], results[2 * index + 1]) for index, case in enumerate(cases)]


def node_page(outcomes: Tasks) -> str:
    """Return the page's head and its tables of node cases."""
    fed = sum(bool(case.inputs) and None not in case.inputs for case, _, _ in outcomes)
    none, codes = Counter(one.result for _, one, _ in outcomes), Counter(other.result for _, _, other in outcomes)
    head = f"""# Operators

Written by `python benchmarks/conformance.py`; do not edit. All {len(outcomes):,} node cases of the backend tests of
onnx {onnx.__version__} go through `--target cpu`, {fed:,} of them with their own inputs as data; of the others an input
is a sequence or an optional, or there is none. With `--weights none --activations none` the outputs of {none[EQUAL]:,}
are equal to the last bit, those of {none[MOVED]:,} moved, and {none[REFUSED]:,} are refused in one line. In W8A8, with
all inputs but the first stored in the model, {codes[INTEGER]:,} are verified with integers, {codes[FLOAT]:,} in float,
and {codes[REFUSED]:,} are refused.
"""
    return head + NODE_HEAD + _by_operator(outcomes) + _refusals(outcomes) + _floats(outcomes)


def _by_operator(outcomes: Tasks) -> str:
    target, _ = find_target("cpu")
    absorbed = {kind for rule in target.ops.values() for kind in rule.fuses}
    groups: dict[tuple[str, str], list[tuple[Case, Outcome, Outcome]]] = defaultdict(list)
    for row in outcomes:
        groups[row[0].domain, row[0].op_type].append(row)
    lines = []
    for (domain, op_type), rows in sorted(groups.items()):
        rule = None if domain else target.ops.get(op_type)
        design = rule.kind.value if rule else "absorbed" if op_type in absorbed and not domain else "float"
        none, codes = Counter(one.result for _, one, _ in rows), Counter(other.result for _, _, other in rows)
        versions = ", ".join(map(str, sorted({case.version for case, _, _ in rows})))
        counts = [none[EQUAL], none[REFUSED], codes[INTEGER], codes[FLOAT], codes[REFUSED]]
        lines.append(_row(f"{domain}.{op_type}".lstrip("."), versions, len(rows), *(c or "" for c in counts), design))
    return "".join(lines)


def _refusals(outcomes: Tasks) -> str:
    """Return the table of refusals; a case that is refused in both modes for one reason counts once."""
    refused = {
        (found.exit_code, found.reason, case.name, case.op_type)
        for case, one, other in outcomes for found in (one, other) if found.result == REFUSED
    }  # fmt: skip
    return REASON_HEAD + _grouped(((str(code), reason), op_type) for code, reason, _, op_type in refused)


def _floats(outcomes: Tasks) -> str:
    gone = "the operator is written out as others, computed at compile time, or removed"
    floats = [(case.op_type, other.reason or gone) for case, _, other in outcomes if other.result == FLOAT]
    return FLOAT_HEAD + _grouped(((reason,), op_type) for op_type, reason in floats)


def _grouped(entries: Iterable[tuple[tuple[str, ...], str]]) -> str:
    groups: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for key, op_type in entries:
        groups[key][op_type] += 1
    ordered = sorted(groups.items(), key=lambda item: (-item[1].total(), item[0]))
    return "".join(_row(*key, types.total(), ", ".join(sorted(types))) for key, types in ordered)


def light_row(name: str, none: Report, shipped: Report, filled: Report) -> str:
    """Return a light network's row: unquantized, quantized as it is shipped, quantized with random weights."""
    moved = max(measures["relative_error"] for measures in none["fidelity"]["outputs"].values())
    nodes = f"{none['passes'][0]['nodes_before']} → {none['passes'][0]['nodes_after']}"
    return _row(name, nodes, f"{moved:.1g}" if moved else "equal", *_coded(shipped), *_coded(filled))


def _coded(report: Report) -> tuple[str, str]:
    ratios = [measures["sqnr"] for measures in report["fidelity"]["outputs"].values() if measures["sqnr"] is not None]
    precision = report["precision"]
    return f"{precision['integer']} of {sum(precision.values())}", f"{min(ratios):.0f}" if ratios else "equal"


def _row(*cells: object) -> str:
    return f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in cells)} |\n"


def main() -> None:
    """Run everything and write the page."""
    parser = argparse.ArgumentParser(description="Compile onnx's backend tests and write docs/ops.md.")
    parser.add_argument("--jobs", type=int, default=2, help="processes for the node cases")
    nodes = node_page(node_outcomes(parser.parse_args().jobs))
    print(nodes[: nodes.index(NODE_HEAD)])
    light = LIGHT_HEAD.format(samples=SAMPLES)
    for name in light_names():
        reports = light_report(name, "none"), light_report(name, "W8A8"), light_report(name, "W8A8", True)
        line = light_row(name, *reports)
        print(line, end="", flush=True)
        light += line
    PAGE.write_text(nodes + light, encoding="utf-8")


if __name__ == "__main__":
    main()
