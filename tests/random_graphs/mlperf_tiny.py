"""Networks shaped as those of MLPerf Tiny, with random weights: a memory plan depends on shapes alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Network:
    """A network that grows behind its last value. Maps are channels first, behind an input that is channels last."""

    def __init__(self, *shape: int) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.shape = shape
        self.last = "x"

    def add(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=f"{op_type}_{len(self.nodes)}", **attributes))
        self.last = name
        return name

    def constant(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        scale = float(np.prod(shape[1:]) or 1) ** -0.5
        array = (self.random.standard_normal(shape) * scale).astype(np.float32)
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def conv(self, channels: int, arriving: int, size: int | tuple[int, int], stride: int = 1, relu: bool = True,
             groups: int = 1, pads: tuple[int, ...] | None = None) -> str:  # fmt: skip
        """Add a convolution; padded as Keras' "same" does unless told."""
        kernel = (size, size) if isinstance(size, int) else size
        inputs = self.last, self.constant(channels, arriving // groups, *kernel), self.constant(channels)
        padding = {"pads": pads} if pads else {"auto_pad": "SAME_UPPER"}
        self.add("Conv", *inputs, group=groups, strides=[stride, stride], **padding)
        return self.add("Relu", self.last) if relu else self.last

    def dense(self, leaving: int, arriving: int) -> str:
        return self.add("Gemm", self.last, self.constant(leaving, arriving), self.constant(leaving), transB=1)

    def proto(self) -> onnx.ModelProto:
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("N", *self.shape))]
        output = helper.make_empty_tensor_value_info(self.last)
        output.type.tensor_type.elem_type = TensorProto.FLOAT
        graph = helper.make_graph(self.nodes, "tiny", inputs, [output], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
        return onnx.shape_inference.infer_shapes(model)

    def classify(self, pool: tuple[int, int], channels: int, classes: int) -> onnx.ModelProto:
        self.add("AveragePool", self.last, kernel_shape=list(pool), strides=list(pool))
        self.add("Flatten", self.last)
        self.dense(classes, channels)
        self.add("Softmax", self.last)
        return self.proto()


def ds_cnn() -> onnx.ModelProto:
    """Keyword spotting."""
    network = Network(49, 10, 1)
    network.add("Transpose", "x", perm=[0, 3, 1, 2])
    network.conv(64, 1, (10, 4), 2)
    for _ in range(4):
        network.conv(64, 64, 3, groups=64)
        network.conv(64, 64, 1)
    return network.classify((25, 5), 64, 12)


def resnet8() -> onnx.ModelProto:
    """Image classification."""
    network = Network(32, 32, 3)
    network.add("Transpose", "x", perm=[0, 3, 1, 2])
    network.conv(16, 3, 3)
    for arriving, channels, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
        before = network.last
        network.conv(channels, arriving, 3, stride)
        inside = network.conv(channels, channels, 3, relu=False)
        if stride > 1:
            network.last = before
            before = network.conv(channels, arriving, 1, stride, relu=False)
        network.add("Add", before, inside)
        network.add("Relu", network.last)
    return network.classify((8, 8), 64, 10)


def mobilenet() -> onnx.ModelProto:
    """Visual wake words: MobileNetV1, a quarter as wide."""
    network = Network(96, 96, 3)
    network.add("Transpose", "x", perm=[0, 3, 1, 2])
    network.conv(8, 3, 3, 2)
    arriving = 8
    for channels, stride in (
        (16, 1),
        (32, 2),
        (32, 1),
        (64, 2),
        (64, 1),
        (128, 2),
        *((128, 1),) * 5,
        (256, 2),
        (256, 1),
    ):
        network.conv(arriving, arriving, 3, stride, groups=arriving)
        network.conv(channels, arriving, 1)
        arriving = channels
    return network.classify((3, 3), 256, 2)


def autoencoder() -> onnx.ModelProto:
    """Anomaly detection."""
    network = Network(5, 128, 1)
    network.add("Flatten", "x")
    arriving = 640
    for leaving in (128, 128, 128, 128, 8, 128, 128, 128, 128):
        network.dense(leaving, arriving)
        network.add("Relu", network.last)
        arriving = leaving
    network.dense(640, arriving)
    return network.proto()
