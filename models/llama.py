"""A decoder of the Llama family in PyTorch, built from the tensors of a GGUF file.

Like `bert.py`, it needs PyTorch at import and is imported when an export runs.
"""
# mypy: disallow-subclassing-any=False
# (PyTorch is optional: where it is not installed, nn.Module is unknown to the type checker.)

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ATTENTION = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output")
_FEED_FORWARD = ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Shape:
    """The numbers that a decoder's tensors do not tell.

    Attributes
    ----------
    layers, heads, shared_heads
        How many blocks, query heads, and heads of keys and values, each of which several query heads share.
    epsilon
        Added to the mean square in the normalizations.
    rotation_base
        Base of the wave lengths by which queries and keys are rotated.
    positions
        The longest sequence that can be run.
    """

    layers: int
    heads: int
    shared_heads: int
    epsilon: float
    rotation_base: float
    positions: int


class RmsNorm(nn.Module):
    """Divide by the root mean square over the last axis, then scale each channel."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `[B, T, C]`."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.weight


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.contiguous())
    return layer


def _unpermuted(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of the rows, which suits rotations of neighbours instead of halves."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


class Block(nn.Module):
    """Attention and a gated feed-forward part, each behind a normalization and beside a shortcut."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, shape: Shape) -> None:
        super().__init__()
        self.heads, self.shared_heads = shape.heads, shape.shared_heads
        weight = {name: tensors[f"{prefix}.{name}.weight"] for name in (*_ATTENTION, *_FEED_FORWARD)}
        self.size = weight["attn_q"].shape[0] // shape.heads
        self.attention_norm = RmsNorm(weight["attn_norm"], shape.epsilon)
        self.query = _linear(_unpermuted(weight["attn_q"], shape.heads))
        self.key = _linear(_unpermuted(weight["attn_k"], shape.shared_heads))
        self.value, self.output = _linear(weight["attn_v"]), _linear(weight["attn_output"])
        self.feed_norm = RmsNorm(weight["ffn_norm"], shape.epsilon)
        self.gate, self.up, self.down = (_linear(weight[f"ffn_{name}"]) for name in ("gate", "up", "down"))

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, mask: Tensor) -> Tensor:
        """Map `[B, T, C]` to the same shape."""
        x = x + self._attend(self.attention_norm(x), cosine, sine, mask)
        h = self.feed_norm(x)
        result: Tensor = x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        return result

    def _attend(self, h: Tensor, cosine: Tensor, sine: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = h.shape
        query = self.query(h).view(batch, length, self.heads, self.size).transpose(1, 2)
        key, value = (
            layer(h).view(batch, length, self.shared_heads, self.size).transpose(1, 2)
            for layer in (self.key, self.value)
        )
        query, key = (part * cosine + _turned(part) * sine for part in (query, key))
        key, value = (
            part.unsqueeze(2)
            .expand(-1, -1, self.heads // self.shared_heads, -1, -1)
            .reshape(batch, self.heads, length, self.size)
            for part in (key, value)
        )
        weights = torch.softmax(query @ key.transpose(-1, -2) / math.sqrt(self.size) + mask, -1)
        result: Tensor = self.output((weights @ value).transpose(1, 2).reshape(batch, length, width))
        return result


class Decoder(nn.Module):
    """The whole network, whose embedding serves as its output layer too.

    Parameters
    ----------
    tensors
        Float tensors by their names in the GGUF file.
    shape
        The numbers that the tensors do not tell.
    """

    cosine: Tensor
    sine: Tensor
    mask: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(tensors["token_embd.weight"])
        self.blocks = nn.ModuleList(Block(tensors, f"blk.{index}", shape) for index in range(shape.layers))
        self.norm = RmsNorm(tensors["output_norm.weight"], shape.epsilon)
        size = tensors["token_embd.weight"].shape[1] // shape.heads
        frequencies = 1 / shape.rotation_base ** (torch.arange(0, size, 2).float() / size)
        angles = torch.outer(torch.arange(shape.positions).float(), frequencies).repeat(1, 2)
        self.register_buffer("cosine", angles.cos())
        self.register_buffer("sine", angles.sin())
        self.register_buffer("mask", torch.full((shape.positions, shape.positions), -1e9).triu(1))

    def forward(self, input_ids: Tensor) -> Any:
        """Map token ids `[B, T]` to the logits of the next token `[B, T, V]`."""
        length = input_ids.shape[1]
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, self.cosine[:length], self.sine[:length], self.mask[:length, :length])
        return self.norm(x) @ self.embedding.weight.T
