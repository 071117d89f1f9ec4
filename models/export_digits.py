"""Small networks trained here on 1,797 handwritten digits: a pre-norm ViT and a MobileNetV2, to rotate what they hold.

No package carries a pre-norm ViT or linear bottlenecks in a size that a table of experiments can be made of.
"""

# mypy: disallow-subclassing-any=False

from __future__ import annotations

import gzip
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from samples import write_npz
from torch import nn
from wheels import Archive

_OPSET = 17
_HELD_OUT = 400  # the last digits, of other writers than most before
_CALIBRATION = 128
_EPOCHS, _BATCH, _RATE = 40, 32, 1e-3

Images = npt.NDArray[np.float32]


class Attention(nn.Module):
    """Attention over all tokens, with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend: `[B, T, width]` to the same."""
        count, tokens, width = x.shape
        split = self.qkv(x).reshape(count, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = split[0], split[1], split[2]
        scores = (query @ key.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(-1)
        joined: torch.Tensor = self.output((scores @ value).transpose(1, 2).reshape(count, tokens, width))
        return joined


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.behind, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add attention and feed-forward to the stream."""
        x = x + self.attention(self.before(x))
        return x + self.down(nn.functional.gelu(self.up(self.behind(x))))


class VisionTransformer(nn.Module):
    """A pre-norm ViT: patches of 2 x 2, a class token, positions (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int = 64, heads: int = 4, blocks: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Classify: `[B, 1, 8, 8]` to logits `[B, 10]`."""
        patches = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(patches.shape[0], -1, -1), patches], 1) + self.positions
        logits: torch.Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outputs)]


class Bottleneck(nn.Module):
    """Expand by 1 x 1, depthwise 3 x 3, and project by a linear 1 x 1 (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 4 * inputs
        self.adds = stride == 1 and inputs == outputs
        layers = [*_convolution(inputs, wide, 1), nn.ReLU6(), *_convolution(wide, wide, 3, stride, wide), nn.ReLU6()]
        self.layers = nn.Sequential(*layers, *_convolution(wide, outputs, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add to the stream where shapes allow it."""
        made: torch.Tensor = self.layers(x)
        return x + made if self.adds else made


class MobileNetV2(nn.Module):
    """Inverted residuals with linear bottlenecks, for 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        stages = [(16, 24, 1), (24, 24, 1), (24, 24, 1), (24, 48, 2), (48, 48, 1), (48, 48, 1)]
        blocks = [Bottleneck(*stage) for stage in stages]
        self.layers = nn.Sequential(*_convolution(1, 16, 3), nn.ReLU6(), *blocks, *_convolution(48, 128, 1), nn.ReLU6())
        self.head = nn.Linear(128, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Classify: `[B, 1, 8, 8]` to logits `[B, 10]`."""
        logits: torch.Tensor = self.head(self.layers(image).mean((2, 3)))
        return logits


def read_digits(content: bytes) -> tuple[Images, npt.NDArray[np.int64]]:
    """Return images `[S, 1, 8, 8]` between 0 and 1, and what they show."""
    table = np.array([line.split(",") for line in gzip.decompress(content).decode().split()], np.float64)
    return (table[:, :64].reshape(-1, 1, 8, 8) / 16).astype(np.float32), table[:, 64].astype(np.int64)


def train(network: nn.Module, images: Images, labels: npt.NDArray[np.int64]) -> None:
    """Train by AdamW, with images moved by up to a pixel."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), _RATE, weight_decay=0.05)
    count = len(images) // _BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=_EPOCHS * count)
    draw = np.random.default_rng(0)
    for _ in range(_EPOCHS):
        order = draw.permutation(len(images))
        for chosen in order[: count * _BATCH].reshape(count, _BATCH):
            moved = np.stack([np.roll(image, tuple(draw.integers(-1, 2, 2)), (1, 2)) for image in images[chosen]])
            loss = nn.functional.cross_entropy(network(torch.from_numpy(moved)), torch.from_numpy(labels[chosen]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()


def build_vit(archive: Archive, folder: Path) -> None:
    """Train the ViT and write it with its data."""
    _build(archive, folder, VisionTransformer)


def build_mobilenet(archive: Archive, folder: Path) -> None:
    """Train the MobileNetV2 and write it with its data."""
    _build(archive, folder, MobileNetV2)


def _build(archive: Archive, folder: Path, make: Callable[[], nn.Module]) -> None:
    torch.set_num_threads(1)  # sums in one order, so that the same bytes come out
    torch.manual_seed(0)
    images, labels = read_digits(archive.read("digits"))
    network = make()
    train(network, images[:-_HELD_OUT], labels[:-_HELD_OUT])
    with warnings.catch_warnings():
        # The exporter over TorchScript is deprecated, but its successor starts at opset 18.
        warnings.simplefilter("ignore", DeprecationWarning)
        example: Any = (torch.from_numpy(images[:1]),)
        torch.onnx.export(
            network, example, str(folder / "model.onnx"), opset_version=_OPSET, input_names=["image"],
            output_names=["logits"], dynamo=False,
        )  # fmt: skip
    write_npz(folder / "calib.npz", {"image": images[:_CALIBRATION, None]})
    write_npz(folder / "eval.npz", {"image": images[-_HELD_OUT:, None], "labels": labels[-_HELD_OUT:]})
