"""A grid of small models whose kernels a cost table begins with: shapes as they are in networks for images and text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from qcompile.backends.ort.capabilities import MATRIX, SKETCHES, Sketch, model_of
from qcompile.core.capabilities import Capability

#: Sides of images that each number of channels comes with.
SIDES = {16: (112, 56, 28), 32: (112, 56, 28, 14), 64: (56, 28, 14), 128: (56, 28, 14, 7), 256: (28, 14, 7),
         512: (14, 7)}  # fmt: skip
#: A bottleneck has so many times the channels, on images of no more than this side, up to so many.
WIDER, WIDE_SIDE, WIDEST = 4, 28, 2048
#: The same for channels that fill no register: kernels take up to five times as long per multiply-accumulate there.
NARROW = {8: (96, 48), 24: (48, 24), 40: (24, 12), 72: (24, 12), 120: (12,), 184: (12, 6)}
#: How many times wider MobileNets are between their bottlenecks, and wider than what squeezes them.
EXPANDED, SQUEEZED = 3, 4
#: Of a network's first convolution: channels in and out, side, kernel, stride.
STEMS = ((3, 16, 224, 3, 2), (3, 32, 224, 3, 2), (3, 64, 224, 7, 2), (3, 16, 96, 3, 2), (1, 64, 48, 5, 2))
#: Depth and columns of the weights of products, and rows of what they multiply.
WEIGHTS = ((64, 64), (128, 128), (256, 256), (384, 384), (384, 1536), (1536, 384), (768, 768), (768, 3072), (3072, 768),
           (1024, 1024), (576, 576), (576, 1536))  # fmt: skip
ROWS = (1, 16, 64, 256)
SHARED = ((64, 64), (384, 384), (768, 768), (1536, 384))
#: What stands between linear operators, on codes and in float, or in float alone.
BETWEEN = ("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "MaxPool", "Sigmoid", "Softmax")
IN_FLOAT = ("LayerNormalization", "Gelu", "HardSwish")
IMAGES = ((1, 32, 56, 56), (1, 128, 28, 28), (1, 256, 7, 7))
MATRICES = ((16, 384), (128, 384), (128, 1536))


@dataclass(frozen=True)
class Convolution:
    """A Conv with a Relu behind it, on a square image that keeps its size but for the stride."""

    channels: int
    filters: int
    side: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1

    def model(self) -> ir.Model:
        """Return it in float."""
        shape = (self.filters, self.channels // self.groups, self.kernel, self.kernel)
        pads = [self.kernel // 2] * 4
        strides = [self.stride] * 2
        nodes = [
            helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv", strides=strides, pads=pads, group=self.groups),
            helper.make_node("Relu", ["c"], ["y"], "relu"),
        ]
        return _model(nodes, (1, self.channels, self.side, self.side), _weights(shape, self.filters))


@dataclass(frozen=True)
class Product:
    """A MatMul with a bias behind it, or several that read one matrix and are added up."""

    rows: int
    depth: int
    columns: int
    count: int = 1

    def model(self) -> ir.Model:
        """Return it in float."""
        results = [f"m{index}" for index in range(self.count)]
        nodes = [helper.make_node("MatMul", ["x", f"w{index}"], [result], f"matmul{index}")
                 for index, result in enumerate(results)]  # fmt: skip
        nodes.append(helper.make_node("Add" if self.count == 1 else "Sum", [*results, "b"], ["y"], "add"))
        constants = _weights((self.depth, self.columns), self.columns)
        # Each of other weights: the runtime computes what is the same only once.
        constants |= {f"w{index}": (1.0 + index) * constants["w"] for index in range(self.count)}
        del constants["w"]
        return _model(nodes, (1, self.rows, self.depth), constants)


def convolutions() -> list[Convolution]:
    """Return the convolutions: 3x3, 1x1, bottlenecks, depthwise, strided, stems, and narrow ones."""
    found = [Convolution(*stem) for stem in STEMS]
    for channels, sides in SIDES.items():
        wide = min(WIDER * channels, WIDEST)
        for side in sides:
            narrow = min(side, WIDE_SIDE)
            found += [
                Convolution(channels, channels, side),
                Convolution(channels, channels, side, 1),
                Convolution(channels, wide, narrow, 1),
                Convolution(wide, channels, narrow, 1),
                Convolution(channels, channels, side, groups=channels),
            ]
        found += [
            Convolution(channels, 2 * channels, sides[0], 3, 2),
            Convolution(channels, 2 * channels, sides[0], 1, 2),
            Convolution(channels, channels, sides[0], 3, 2, groups=channels),
            Convolution(channels, channels, sides[-1], 5, groups=channels),
        ]
    for channels, sides in NARROW.items():
        for side in sides:
            found += [
                Convolution(channels, channels, side, 1),
                Convolution(channels, EXPANDED * channels, side, 1),
                Convolution(EXPANDED * channels, channels, side, 1),
                Convolution(channels, channels, side, groups=channels),
            ]
        wide = SQUEEZED * channels
        found += [Convolution(wide, channels, 1, 1), Convolution(channels, wide, 1, 1)]
    return list(dict.fromkeys(found))


def products() -> list[Product]:
    """Return the products of matrices."""
    return [Product(rows, depth, columns) for depth, columns in WEIGHTS for rows in ROWS]


def shared() -> list[Product]:
    """Return products of which several read one matrix, so that this becomes codes once for all of them."""
    return [Product(rows, depth, columns, 2) for depth, columns in SHARED for rows in ROWS]


def signed() -> list[Product]:
    """Return the few shapes that are measured with signed activations too, to show what those cost."""
    return [Product(16, 384, 384), Product(64, 256, 256), Product(128, 64, 64), Product(1, 768, 768)]


def between() -> Iterator[tuple[str, ir.Model]]:
    """Yield a name and a model, as it is to be run, for each operator between the linear ones and each form of it."""
    for op in (*BETWEEN, *IN_FLOAT):
        sketch = SKETCHES[op, ""]
        for shape in MATRICES if sketch.inputs[0] == MATRIX else IMAGES:
            larger = _enlarged(sketch, shape)
            yield f"{op} {shape}", ir.from_proto(model_of(Capability(op, "float", output="float"), larger))
            if op in BETWEEN:
                same = op == "MaxPool"
                codes = Capability(op, zero_point="" if same else "middle")
                yield f"{op} {shape} on codes", ir.from_proto(model_of(codes, larger))


def _enlarged(sketch: Sketch, shape: tuple[int, ...]) -> Sketch:
    scale = tuple(np.ones(shape[-1], np.float32) for _ in sketch.constants)
    return replace(sketch, inputs=(shape,) * len(sketch.inputs), constants=scale)


def _weights(shape: tuple[int, ...], filters: int) -> dict[str, npt.NDArray[np.float32]]:
    generator = np.random.default_rng(0)
    w, b = generator.standard_normal(shape, np.float32) * 0.1, generator.standard_normal(filters, np.float32)
    return {"w": w.astype(np.float32), "b": b}


def _model(nodes: list[onnx.NodeProto], shape: tuple[int, ...], constants: dict[str, Any]) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "task",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))
