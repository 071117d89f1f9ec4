"""What has no weights, for CUDA devices: a thread for each code. Products of weights are in backends/cuda/kernels.

The definitions are those of microcontrollers: a kernel that computes one row of its output takes the row from the grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.program import Operation, Port, Tensor
from qcompile.backends.tvm import define_elementwise as elementwise
from qcompile.backends.tvm import define_maps as maps
from qcompile.backends.tvm.emit import Function, load_tvm
from qcompile.backends.tvm.emit_cuda import emit_cuda

#: Threads of a block.
THREADS = 256


@dataclass(frozen=True, eq=False)
class MapKernel:
    """A generated kernel.

    Parameters
    ----------
    function : tvm.tirx.PrimFunc
        Scheduled.
    arguments : tuple of str
        What it takes, in order: ``input``, ``other``, ``table``, ``rows``, ``output``.
    offsets : mapping of str to str
        See `emit_cuda`.
    grid : tuple of int
        Blocks along x, and rows along y; samples go along z.
    threads : int
    constants : mapping of str to ndarray
        Of ``table`` and ``rows``.
    """

    function: Function
    arguments: tuple[str, ...]
    offsets: Mapping[str, str]
    grid: tuple[int, int]
    threads: int
    constants: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)

    def source(self, name: str) -> str:
        """Return its CUDA C++."""
        return emit_cuda(self.function, name, self.offsets, self.arguments)


def map_kernel(operation: Operation, tensors: Mapping[str, Tensor]) -> MapKernel:
    """Return the kernel of an operation of `GENERATORS`."""
    made: MapKernel = GENERATORS[type(operation)](operation, tensors)
    return made


def take_kernel(port: Port, tensor: Tensor) -> MapKernel:
    """Return what quantizes an input: from the model's floats, in its order, to codes as stored."""
    te = load_tvm().te
    real = te.placeholder(port.shape, "float32", name="input")
    shape = tuple(port.shape[axis] for axis in port.axes)

    def code(*place: Any) -> Any:
        return _called("int32", "qc_quantize", real[_of_model(port, place)], tensor).astype("int8")

    return _by_elements([real], te.compute(shape, code, name="output"), ("input",), {"input": real})


def give_kernel(port: Port, tensor: Tensor) -> MapKernel:
    """Return what dequantizes an output: from codes as stored to the model's floats, in its order."""
    te = load_tvm().te
    codes = te.placeholder(tuple(port.shape[axis] for axis in port.axes), "int8", name="input")

    def real(*place: Any) -> Any:
        stored = tuple(place[axis] for axis in port.axes)
        return _called("float32", "qc_dequantize", codes[stored].astype("int32"), tensor)

    return _by_elements([codes], te.compute(port.shape, real, name="output"), ("input",), {"input": codes})


def _of_model(port: Port, place: tuple[Any, ...]) -> tuple[Any, ...]:
    at = dict(zip(port.axes, place, strict=True))
    return tuple(at[axis] for axis in range(len(at)))


def _called(dtype: str, name: str, value: Any, tensor: Tensor) -> Any:
    tirx = load_tvm().tirx
    numbers = tirx.const(float(np.float32(tensor.scale)), "float32"), tirx.const(tensor.zero_point, "int32")
    return tirx.call_pure_extern(dtype, name, value, *numbers)


def _by_elements(inputs: list[Any], output: Any, names: tuple[str, ...], batched: Mapping[str, Any]) -> MapKernel:
    """Return a kernel without rows, whose `batched` inputs and output have so many elements a sample."""
    function = load_tvm().te.create_prim_func([*inputs, output])
    sizes = {name: _size(value) for name, value in batched.items()} | {"output": _size(output)}
    offsets = {name: f"(wide_t)blockIdx.z * {size}" for name, size in sizes.items()}
    return _bound(function, (*names, "output"), offsets)


def _size(value: Any) -> int:
    return int(np.prod([int(extent) for extent in value.shape], dtype=np.int64))


def _bound(
    function: Function, arguments: tuple[str, ...], offsets: Mapping[str, str], rows: int = 1,
    constants: Mapping[str, npt.NDArray[Any]] | None = None,
) -> MapKernel:  # fmt: skip
    """Return a kernel with a thread for each element of `output`; what it is the sum or maximum of is in a register."""
    schedule = load_tvm().s_tir.Schedule(function)
    output = schedule.get_sblock("output")
    count = int(np.prod([int(schedule.get(loop).extent) for loop in schedule.get_loops(output)], dtype=np.int64))
    threads = min(THREADS, -(-count // 32) * 32)
    blocks, each = schedule.split(schedule.fuse(*schedule.get_loops(output)), [None, threads])
    schedule.bind(blocks, "blockIdx.x")
    schedule.bind(each, "threadIdx.x")
    names = [str(child.name_hint) for child in _blocks(schedule)]
    for name in [name for name in ("total", "peak", "acc") if name in names]:
        sums = schedule.get_sblock(name)
        schedule.compute_at(sums, each, preserve_unit_loops=True)
        schedule.set_scope(sums, 0, "local")
        schedule.decompose_reduction(sums, schedule.get_loops(sums)[2])
    grid = -(-count // threads), rows
    return MapKernel(schedule.mod["main"], arguments, offsets, grid, threads, constants or {})


def _blocks(schedule: Any) -> list[Any]:
    return [schedule.get(block) for block in schedule.get_child_blocks(schedule.get_sblock("root"))]


def _per_code(function: Function, count: int) -> Function:
    """Return a function of `count` codes, where it left open of how many."""
    return function.specialize({function.params[-1]: load_tvm().tirx.const(count, "int32")})


def _samples(operation: Operation, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return where a sample begins in each tensor."""
    named = {**dict(zip(("input", "other"), operation.inputs, strict=False)), "output": operation.output}
    return {argument: f"(wide_t)blockIdx.z * {tensors[name].size}" for argument, name in named.items()}


def _add(operation: ops.Add, tensors: Mapping[str, Tensor]) -> MapKernel:
    function = elementwise.define_add(operation, ("int8", "int8", "int8"))
    count = tensors[operation.output].size
    return _bound(_per_code(function, count), ("input", "other", "output"), _samples(operation, tensors))


def _mul(operation: ops.Mul, tensors: Mapping[str, Tensor]) -> MapKernel:
    first, second = (tensors[name] for name in operation.inputs)
    function = elementwise.define_mul(operation, second.size if second.size != first.size else 0)
    return _bound(_per_code(function, first.size), ("input", "other", "output"), _samples(operation, tensors))


def _lookup(operation: ops.Lookup, tensors: Mapping[str, Tensor]) -> MapKernel:
    function = _per_code(elementwise.define_lookup("int8"), tensors[operation.output].size)
    constants = {"table": operation.table}
    return _bound(function, ("input", "table", "output"), _samples(operation, tensors), constants=constants)


def _softmax(operation: ops.Softmax, tensors: Mapping[str, Tensor]) -> MapKernel:
    source, target = (tensors[name] for name in (operation.inputs[0], operation.output))
    function, constants = elementwise.define_softmax(operation, source, target), {"table": operation.table}
    return _bound(function, ("input", "table", "output"), _samples(operation, tensors), constants=constants)


def _pool(operation: Any, tensors: Mapping[str, Tensor]) -> MapKernel:
    source, target = (tensors[name] for name in (operation.inputs[0], operation.output))
    average = isinstance(operation, ops.AveragePool)
    define: Any = maps.define_average_pool if average else maps.define_max_pool
    offsets = {"y": "blockIdx.y"} | _samples(operation, tensors) | {"output": _row(target)}
    return _bound(define(operation, source, target), ("input", "output"), offsets, rows=target.rows)


def _row(target: Tensor) -> str:
    return f"((wide_t)blockIdx.z * {target.rows} + blockIdx.y) * {target.row_codes}"


def _resize(operation: ops.Resize, tensors: Mapping[str, Tensor]) -> MapKernel:
    source, target = (tensors[name] for name in (operation.inputs[0], operation.output))
    offsets = {"input": f"((wide_t)blockIdx.z * {source.rows} + rows[blockIdx.y]) * {source.row_codes}",
               "output": _row(target)}  # fmt: skip
    constants = {"table": np.array(operation.columns, np.int32), "rows": np.array(operation.rows, np.int32)}
    names = ("input", "table", "rows", "output")
    return _bound(maps.define_resize(source, target), names, offsets, target.rows, constants)


def _moved(define: Any) -> Any:
    def generated(operation: Operation, tensors: Mapping[str, Tensor]) -> MapKernel:
        function = define(operation, tensors[operation.inputs[0]], tensors[operation.output])
        return _bound(function, ("input", "output"), _samples(operation, tensors))

    return generated


GENERATORS: Mapping[type[Operation], Any] = {
    ops.Add: _add,
    ops.AveragePool: _pool,
    ops.Lookup: _lookup,
    ops.MaxPool: _pool,
    ops.Mul: _mul,
    ops.Pad: _moved(maps.define_pad),
    ops.Resize: _resize,
    ops.Slice: _moved(maps.define_slice),
    ops.Softmax: _softmax,
    ops.Transpose: _moved(maps.define_transpose),
}
