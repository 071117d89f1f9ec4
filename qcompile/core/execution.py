"""What ONNX Runtime executes for a model: the kernels that its optimizer chose, with shapes and times."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from qcompile.core import runtime

#: Axes of a tensor, () for a number.
Shape = tuple[int, ...]
#: Element type and axes.
Typed = tuple[str, Shape]


@dataclass(frozen=True)
class Kernel:
    """One node as the runtime executes it.

    Parameters
    ----------
    name : str
        The node's, as the optimizer left it; empty where the optimizer made the node up.
    op_type : str
        With ``nchwc.`` in front where it works on blocked layouts.
    activation : str
        What was fused into it.
    dtypes : tuple of str
        Element types of the inputs that are there, as the runtime names them.
    inputs, outputs : tuple of Shape
    microseconds : float
        Mean over all runs but the first, without the slowest quarter.
    reads, results : tuple of str
        Names of what it reads and makes; empty for a node that the optimizer made up.
    """

    name: str
    op_type: str
    activation: str
    dtypes: tuple[str, ...]
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    microseconds: float = 0.0
    reads: tuple[str, ...] = ()
    results: tuple[str, ...] = ()


def execute(
    model: ir.Model | Path,
    samples: Sequence[runtime.Feeds],
    rounds: int = 1,
    beside: Callable[[runtime.Feeds], object] = len,
) -> list[list[Kernel]]:
    """Run a model and tell, for each sample, which kernels were executed, in their order.

    Parameters
    ----------
    model : onnx_ir.Model or Path
    samples : sequence of Feeds
    rounds : int
        How often each sample is run behind a first time. Shapes need one round; times want many.
    beside : callable
        Called with each sample in turn with the runs, so that what else the machine does falls on both alike.
    """
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        session = runtime.Session(model, optimized_path=optimized, profile_prefix=Path(folder) / "profile")
        for _ in range(rounds + 1):
            for feeds in samples:
                session.run(feeds)
                beside(feeds)
        events = json.loads(session.end_profiling().read_text(encoding="utf-8"))
        graph = onnx.load(optimized, load_external_data=False).graph
    timed = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    return kernels_of(graph, timed, len(samples))


def kernels_of(graph: onnx.GraphProto, events: Sequence[Mapping[str, Any]], samples: int) -> list[list[Kernel]]:
    """Match what a profile tells of kernels with the nodes of the optimized graph, by their names.

    Parameters
    ----------
    graph : onnx.GraphProto
        As the runtime wrote it.
    events : sequence of mapping
        Those that time a kernel, of all samples in turn, round by round.
    samples : int
        How many there are in a round.
    """
    nodes: dict[str, onnx.NodeProto | None] = {}
    for node in graph.node:
        # What the optimizer made up has no name of its own, and no weights either: its event tells all.
        nodes[node.name] = None if node.name in nodes else node
    constants = {
        tensor.name: (onnx.TensorProto.DataType.Name(tensor.data_type).lower(), tuple(tensor.dims))
        for tensor in graph.initializer
    }
    runs: defaultdict[tuple[str, int], list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        runs[event["name"].removesuffix("_kernel_time"), int(event["args"]["node_index"])].append(event)
    found: list[list[Kernel]] = [[] for _ in range(samples)]
    for (name, _), timed in runs.items():
        if len(timed) % samples:
            continue  # inside a loop, whose time counts as a whole
        for place in range(samples):
            found[place].append(_kernel(name, nodes.get(name), timed[place::samples], constants))
    return found


def _kernel(
    name: str, node: onnx.NodeProto | None, timed: Sequence[Mapping[str, Any]], constants: dict[str, Typed]
) -> Kernel:
    facts = timed[-1]["args"]
    read = [(str(dtype), tuple(shape)) for entry in facts["input_type_shape"] for dtype, shape in entry.items()]
    op_type, activation = facts["op_name"], ""
    names: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    if node is not None and node.op_type == op_type:
        op_type = f"{node.domain.rpartition('.')[2]}.{op_type}" if node.domain.endswith("nchwc") else op_type
        read = _with_packed(node, read, constants)
        names = tuple(node.input), tuple(node.output)
        activation = next((a.s.decode() for a in node.attribute if a.name == "activation"), "")
    times = np.sort([float(event["dur"]) for event in timed[1:] or timed])
    kept = times[: max(1, len(times) - len(times) // 4)]
    outputs = tuple(tuple(shape) for entry in facts["output_type_shape"] for shape in entry.values())
    dtypes, inputs = tuple(dtype for dtype, _ in read), tuple(shape for _, shape in read)
    return Kernel(name, op_type, activation, dtypes, inputs, outputs, float(kept.mean()), *names)


def _with_packed(node: onnx.NodeProto, read: Sequence[Typed], constants: dict[str, Typed]) -> list[Typed]:
    """Put the weights in that a kernel has packed away when it was loaded, of which the events tell nothing."""
    present, found = list(read), []
    for name in filter(None, node.input):
        constant = constants.get(name)
        if present and constant in (None, present[0]):
            found.append(present.pop(0))
        elif constant is not None:
            found.append(constant)
    return found
