"""Small Keras models: from an .h5 file to ONNX, without TensorFlow.

The graph is left as a converter leaves it: BatchNormalization unfolded, `auto_pad` instead of explicit pads, and a
Transpose wherever the channels-last model meets the channels-first operators. Simplifying it is the compiler's work.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from wheels import FetchError

_OPSET = 17
_IR_VERSION = 8  # the one that came with opset 17

_ACTIVATIONS = {"relu": "Relu", "softmax": "Softmax", "linear": None}
_AUTO_PAD = {"same": "SAME_UPPER", "valid": "VALID"}  # Keras puts the odd pixel of "same" at the end

Layer = dict[str, Any]
"""The configuration of one Keras layer."""

Weights = dict[str, dict[str, npt.NDArray[Any]]]
"""Arrays by layer name and by their own name: `kernel`, `bias`, `gamma`, ..."""


def read_h5(content: bytes) -> tuple[list[Layer], Weights]:
    """Read the layers, in the order of the graph, and their weights out of a Keras .h5 file."""
    import h5py

    with h5py.File(io.BytesIO(content), "r") as file:
        layers: list[Layer] = json.loads(file.attrs["model_config"])["config"]["layers"]
        weights: Weights = {}
        for name, group in file["model_weights"].items():
            paths = [path.decode() if isinstance(path, bytes) else str(path) for path in group.attrs["weight_names"]]
            weights[name] = {path.rsplit("/", 1)[-1].removesuffix(":0"): np.asarray(group[path]) for path in paths}
    return layers, weights


class KerasToOnnx:
    """Convert a Keras functional model, layer by layer.

    Parameters
    ----------
    layers, weights
        As `read_h5` returns them.

    Notes
    -----
    Only the layers that the networks of MLPerf Tiny use are known; any other raises `FetchError`.
    """

    def __init__(self, layers: list[Layer], weights: Weights) -> None:
        self._layers = layers
        self._weights = weights
        # Without a convolution nothing asks for channels first, and a converter leaves the order as it is.
        self._channels_first = any(layer["class_name"].endswith("Conv2D") for layer in layers)
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._convert: dict[str, Callable[[Layer, list[str]], str]] = {
            "Conv2D": self._conv,
            "DepthwiseConv2D": self._depthwise_conv,
            "BatchNormalization": self._batch_normalization,
            "Activation": lambda layer, inputs: self._activation(layer, inputs[0]),
            "Add": lambda layer, inputs: self._node("Add", inputs, layer["name"]),
            "AveragePooling2D": self._average_pool,
            "Flatten": self._flatten,
            "Dense": self._dense,
            "Dropout": lambda layer, inputs: inputs[0],
            "Reshape": self._reshape,
        }

    def convert(self, graph_name: str, input_name: str, output_name: str) -> onnx.ModelProto:
        """Return the ONNX model, its batch axis named `N`.

        Parameters
        ----------
        graph_name
            Name of the graph.
        input_name
            Name of the input, float32, shaped as in Keras.
        output_name
            Name of the output, float32, shaped as in Keras.
        """
        values: dict[str, str] = {}
        graph_inputs = []
        for layer in self._layers:
            config, kind = layer["config"], layer["class_name"]
            if kind == "InputLayer":
                shape = ["N", *config["batch_input_shape"][1:]]
                graph_inputs.append(helper.make_tensor_value_info(input_name, TensorProto.FLOAT, shape))
                values[config["name"]] = self._to_channels_first(input_name)
            elif kind in self._convert:
                inputs = [values[source[0]] for source in layer["inbound_nodes"][0]]
                values[config["name"]] = self._convert[kind](config, inputs)
            else:
                raise FetchError(f"{config['name']}: Keras layer {kind} cannot be converted; extend keras_h5.py")
        last = self._layers[-1]["config"]
        shape = ["N", *(last["target_shape"] if "target_shape" in last else [last["units"]])]
        self._nodes[-1].output[0] = output_name
        graph_output = helper.make_tensor_value_info(output_name, TensorProto.FLOAT, shape)
        graph = helper.make_graph(self._nodes, graph_name, graph_inputs, [graph_output], self._initializers)
        opset = helper.make_opsetid("", _OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION)

    def _node(self, operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Append a node with one output, called like the node, and return that name."""
        self._nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def _initializer(self, name: str, array: npt.NDArray[Any]) -> str:
        self._initializers.append(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name))
        return name

    def _to_channels_first(self, value: str) -> str:
        if not self._channels_first:
            return value
        return self._node("Transpose", [value], "to_channels_first", perm=[0, 3, 1, 2])

    def _conv(self, layer: Layer, inputs: list[str]) -> str:
        kernel = self._weights[layer["name"]]["kernel"].transpose(3, 2, 0, 1)  # HWIO to OIHW
        return self._convolution(layer, inputs, kernel)

    def _depthwise_conv(self, layer: Layer, inputs: list[str]) -> str:
        if layer["depth_multiplier"] != 1:
            raise FetchError(f"{layer['name']}: depth multiplier {layer['depth_multiplier']}; extend keras_h5.py")
        kernel = self._weights[layer["name"]]["depthwise_kernel"].transpose(2, 3, 0, 1)  # HWC1 to C1HW
        return self._convolution(layer, inputs, kernel, group=kernel.shape[0])

    def _convolution(self, layer: Layer, inputs: list[str], kernel: npt.NDArray[Any], **attributes: Any) -> str:
        name, weights = layer["name"], self._weights[layer["name"]]
        inputs = [*inputs, self._initializer(f"{name}_kernel", kernel)]
        if "bias" in weights:
            inputs.append(self._initializer(f"{name}_bias", weights["bias"]))
        output = self._node(
            "Conv",
            inputs,
            name,
            auto_pad=_AUTO_PAD[layer["padding"]],
            dilations=layer["dilation_rate"],
            kernel_shape=list(kernel.shape[2:]),
            strides=layer["strides"],
            **attributes,
        )
        return self._activation(layer, output)

    def _batch_normalization(self, layer: Layer, inputs: list[str]) -> str:
        weights = self._weights[layer["name"]]
        order = ("gamma", "beta", "moving_mean", "moving_variance")
        constants = [self._initializer(f"{layer['name']}_{key}", weights[key]) for key in order]
        return self._node("BatchNormalization", [*inputs, *constants], layer["name"], epsilon=layer["epsilon"])

    def _average_pool(self, layer: Layer, inputs: list[str]) -> str:
        return self._node(
            "AveragePool",
            inputs,
            layer["name"],
            auto_pad=_AUTO_PAD[layer["padding"]],
            kernel_shape=layer["pool_size"],
            strides=layer["strides"],
        )

    def _flatten(self, layer: Layer, inputs: list[str]) -> str:
        if self._channels_first:
            # Keras flattens in channels-last order, which the rows of the Dense kernel follow.
            inputs = [self._node("Transpose", inputs, f"{layer['name']}_to_channels_last", perm=[0, 2, 3, 1])]
        return self._node("Flatten", inputs, layer["name"], axis=1)

    def _reshape(self, layer: Layer, inputs: list[str]) -> str:
        if self._channels_first:
            raise FetchError(f"{layer['name']}: Reshape behind a convolution; extend keras_h5.py")
        shape = np.array([-1, *layer["target_shape"]], np.int64)
        self._initializers.append(numpy_helper.from_array(shape, f"{layer['name']}_shape"))
        return self._node("Reshape", [*inputs, f"{layer['name']}_shape"], layer["name"])

    def _dense(self, layer: Layer, inputs: list[str]) -> str:
        name, weights = layer["name"], self._weights[layer["name"]]
        constants = [self._initializer(f"{name}_{key}", weights[key]) for key in ("kernel", "bias")]
        return self._activation(layer, self._node("Gemm", [*inputs, *constants], name))

    def _activation(self, layer: Layer, value: str) -> str:
        """Append the activation of a layer, if it has one: a layer of its own or the last step of another."""
        operator = _ACTIVATIONS[layer["activation"]]
        if operator is None:
            return value
        own_layer = layer["name"].startswith("activation")
        name = layer["name"] if own_layer else f"{layer['name']}_{layer['activation']}"
        return self._node(operator, [value], name, **({"axis": -1} if operator == "Softmax" else {}))
