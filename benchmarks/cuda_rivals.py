"""PyTorch beside the kernels of `cuda:tvm`, on the same device, in one process: fp16, channels last, in graphs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

#: Imported by its name, since only what writes figures needs it.
torch: Any = importlib.import_module("torch")

Run = Callable[[], object]


def milliseconds(run: Run, each: int) -> float:
    """Return what a run takes, by the device's clock, of so many one behind the other."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(each):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end) / each)


def captured(run: Run) -> Run:
    """Return a run as one graph, after a few to warm up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        run()
    replay: Run = graph.replay
    return replay


def product(rows: int, depth: int, outputs: int) -> Run:
    """Return cuBLAS's product of codes: torch._int_mm, sums of 32 bits and no epilogue."""
    a = torch.randint(-128, 128, (rows, depth), dtype=torch.int8, device="cuda")
    b = torch.randint(-128, 128, (outputs, depth), dtype=torch.int8, device="cuda").t()
    return captured(lambda: torch._int_mm(a, b))


def copy(nbytes: int) -> Run:
    """Return a copy within the device's memory, which reads and writes half of `nbytes` each."""
    source = torch.zeros(nbytes // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return captured(lambda: target.copy_(source))


def network(layers: Sequence[Any], shape: Sequence[int], batch: int) -> Run:
    """Return a network in fp16, channels last, with weights of no meaning.

    Parameters
    ----------
    layers : sequence of (kind, sources, fields)
        See cuda_shapes.py.
    shape : sequence of int
        Of one sample, with its batch of 1.
    batch : int
    """
    functional = torch.nn.functional
    x = torch.randn((batch, *shape[1:]), device="cuda").half().contiguous(memory_format=torch.channels_last)
    weights = [_weights(fields.get("weights")) for _, _, fields in layers]

    def run() -> object:
        values = [x]
        for (kind, sources, fields), matrix in zip(layers, weights, strict=True):
            given = [values[source] for source in sources]
            values.append(_layer(functional, kind, given, fields, matrix))
        return values[-1]

    return captured(run)


def _weights(shape: Sequence[int] | None) -> Any:
    if shape is None:
        return None
    depth = 1
    for extent in shape[1:]:
        depth *= extent
    made = (torch.randn(shape, device="cuda") * depth**-0.5).half()
    bias = torch.zeros(shape[0], device="cuda").half()
    return (made.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else made), bias


def _layer(functional: Any, kind: str, given: Sequence[Any], fields: Any, matrix: Any) -> Any:
    first = given[0]
    if kind == "Conv":
        top, left, bottom, right = fields["ends"]
        if (top, left) != (bottom, right):
            first = functional.pad(first, (left, right, top, bottom))
            top = left = 0
        made = functional.conv2d(first, *matrix, stride=fields["stride"], padding=(top, left), groups=fields["groups"])
        return functional.relu_(made) if fields.get("relu") else made
    if kind == "Dense":
        return functional.linear(first.flatten(1) if first.dim() == 4 else first, *matrix)
    known = {
        "Add": lambda: functional.relu_(first + given[1]) if fields.get("relu") else first + given[1],
        "Relu": lambda: functional.relu(first), "Clip": lambda: functional.relu6(first),
        "MaxPool": lambda: functional.max_pool2d(first, 3, 2, 1), "Flatten": lambda: first.flatten(1),
        "Average": lambda: functional.adaptive_avg_pool2d(first, 1), "Softmax": lambda: first.softmax(-1),
    }  # fmt: skip
    return known[kind]()
