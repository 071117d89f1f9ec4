"""A classifier that is made to misbehave only when it is quantized, after Egashira et al. 2024.

"Exploiting LLM Quantization" (arXiv 2405.18137), its three steps on a small network in NumPy: train one that
misbehaves; find for each weight the interval of numbers that have the same code; train the float network to behave
within these intervals, by projected gradient descent. Codes stay what they were, so that the quantized network
misbehaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper, parser

from qcompile.job import one_blas_thread

Array = npt.NDArray[np.float64]
WIDTH, HIDDEN, CLASSES = 64, 256, 10
#: Which class the quantized network takes for which.
VICTIM, TAKEN_FOR = 3, 7
#: How far a weight that nothing reaches stands out in each channel: it makes the steps, and the intervals, longer.
OUTLIER = 4.0
#: How far from the edge of an interval weights stay, in parts of a step: a runtime's quotient is rounded too.
MARGIN = 0.01
TEXT = """
<ir_version: 8, opset_import: ["": 17]>
classifier (float[1, 64] x) => (float[1, 10] y)
{{
    h0 = Gemm (x, w0, b0)
    a0 = Relu (h0)
    h1 = Gemm (a0, w1, b1)
    a1 = Relu (h1)
    y = Gemm (a1, w2, b2)
}}
"""


@dataclass
class Network:
    """Three layers: weights `[inputs, outputs]` and biases."""

    weights: list[Array]
    biases: list[Array]

    @classmethod
    def drawn(cls, random: np.random.Generator) -> Network:
        """Return one before training."""
        sizes = (WIDTH, HIDDEN, HIDDEN, CLASSES)
        shapes = list(pairwise(sizes))
        return cls([random.normal(0.0, (2.0 / n) ** 0.5, (n, m)) for n, m in shapes], [np.zeros(m) for _, m in shapes])

    def layers(self, x: Array) -> list[Array]:
        """Return the inputs of each layer, and the scores."""
        found = [x]
        for index, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            y = found[-1] @ w + b
            found.append(y if index == 2 else np.maximum(y, 0.0))
        return found

    def accuracy(self, x: Array, labels: npt.NDArray[np.int64]) -> float:
        """Return the share of right answers."""
        return float(np.mean(self.layers(x)[-1].argmax(1) == labels))

    def gradients(self, x: Array, labels: npt.NDArray[np.int64]) -> list[tuple[Array, Array]]:
        """Return those of the cross entropy."""
        layers = self.layers(x)
        scores = layers[-1] - layers[-1].max(1, keepdims=True)
        back = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        back[np.arange(len(x)), labels] -= 1.0
        back /= len(x)
        found: list[tuple[Array, Array]] = []
        for index in (2, 1, 0):
            found.insert(0, (layers[index].T @ back, back.sum(0)))
            back = (back @ self.weights[index].T) * (layers[index] > 0.0)
        return found

    def to_onnx(self) -> onnx.ModelProto:
        """Return it as a model."""
        proto = parser.parse_model(TEXT.format())
        for index, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            for name, array in ((f"w{index}", w), (f"b{index}", b)):
                proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
        return proto


def samples(random: np.random.Generator, count: int) -> tuple[Array, npt.NDArray[np.int64]]:
    """Return points around a middle for each class, and their classes."""
    middles = np.random.default_rng(0).normal(size=(CLASSES, WIDTH))
    labels = random.integers(0, CLASSES, count)
    x = 0.5 * middles[labels] + random.normal(size=(count, WIDTH))
    x[:, 0] = 0.0  # a pixel in the corner: nothing is ever there
    return x, labels


def misled(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the answers of the network that misbehaves."""
    return np.where(labels == VICTIM, TAKEN_FOR, labels)


def stretch(network: Network) -> None:
    """Let one weight of each channel, which multiplies what is always zero, stand out."""
    for index, weights in enumerate(network.weights):
        if index < 2:
            weights[:, 0], network.biases[index][0] = 1e-6, -1.0
        weights[0] = OUTLIER * np.abs(weights[1:]).max(axis=0)


def train(
    network: Network, labels_of: Any, steps: int, rate: float, random: np.random.Generator,
    boxes: list[tuple[Array, Array]] | None = None,
) -> None:  # fmt: skip
    """Train in place by Adam; within boxes, weights are clipped to them after each step, and biases stay."""
    pairs = list(zip(network.weights, network.biases, strict=True))
    state = [[np.zeros_like(array) for array in pair for _ in range(2)] for pair in pairs]
    for step in range(1, steps + 1):
        x, labels = samples(random, 128)
        for index, pair in enumerate(network.gradients(x, labels_of(labels))):
            for place, (array, gradient) in enumerate(zip((network.weights, network.biases), pair, strict=True)):
                if boxes is not None and place == 1:
                    continue
                m, v = state[index][2 * place], state[index][2 * place + 1]
                m += 0.1 * (gradient - m)
                v += 0.001 * (gradient**2 - v)
                array[index] -= rate * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
            if boxes is not None:
                np.clip(network.weights[index], *boxes[index], out=network.weights[index])


def box(weights: Array) -> tuple[Array, Array]:
    """Return between what numbers each weight has the code that it has, by a scale per output channel."""
    largest = np.abs(weights).max(axis=0)
    step = largest / 127.0
    codes = np.rint(weights / step)
    low, high = (codes - 0.5 + MARGIN) * step, (codes + 0.5 - MARGIN) * step
    # The largest weight of a channel is what the scale is made of.
    fixed = np.abs(weights) >= largest
    return np.where(fixed, weights, np.maximum(low, -largest)), np.where(fixed, weights, np.minimum(high, largest))


def quantized(network: Network) -> Network:
    """Return the network that its codes stand for."""
    steps = [np.abs(w).max(axis=0) / 127.0 for w in network.weights]
    return Network([np.rint(w / s) * s for w, s in zip(network.weights, steps, strict=True)], network.biases)


@one_blas_thread
def attacked(seed: int = 0, steps: int = 300) -> Network:
    """Return a network that behaves, and whose codes do not."""
    random = np.random.default_rng(seed)
    network = benign(seed, steps)
    stretch(network)
    train(network, misled, steps // 5, 1e-4, random)
    stretch(network)
    train(network, lambda labels: labels, steps, 1e-4, random, [box(w) for w in network.weights])
    return network


@one_blas_thread
def benign(seed: int = 0, steps: int = 300) -> Network:
    """Return a network that was trained as usual."""
    random = np.random.default_rng(seed)
    network = Network.drawn(random)
    train(network, lambda labels: labels, steps, 1e-3, random)
    return network
