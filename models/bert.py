"""A BERT encoder with mean pooling in PyTorch, as sentence encoders use it.

It needs PyTorch at import and is imported when an export runs.
"""
# mypy: disallow-subclassing-any=False
# (PyTorch is optional: where it is not installed, nn.Module is unknown to the type checker.)

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

_LAYER_NORM_EPSILON = 1e-12
_MASKED = -1e4  # added to the scores of padding: far below any score, and still finite in float16


@dataclass(frozen=True)
class Checkpoint:
    """Builds layers from the tensors of a BERT checkpoint.

    Attributes
    ----------
    tensors
        Tensors by name, such as `encoder.layer.0.attention.self.query.weight`.
    """

    tensors: Mapping[str, torch.Tensor]

    def linear(self, prefix: str) -> nn.Linear:
        """Return the linear layer stored under `prefix`."""
        weight, bias = self._weight_and_bias(prefix)
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        return layer

    def embedding(self, prefix: str) -> nn.Embedding:
        """Return the embedding table stored under `prefix`."""
        weight = self.tensors[f"{prefix}.weight"]
        layer = nn.Embedding(weight.shape[0], weight.shape[1])
        layer.load_state_dict({"weight": weight})
        return layer

    def layer_norm(self, prefix: str) -> nn.LayerNorm:
        """Return the layer normalisation stored under `prefix`."""
        weight, bias = self._weight_and_bias(prefix)
        layer = nn.LayerNorm(weight.shape[0], eps=_LAYER_NORM_EPSILON)
        layer.load_state_dict({"weight": weight, "bias": bias})
        return layer

    def _weight_and_bias(self, prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tensors[f"{prefix}.weight"], self.tensors[f"{prefix}.bias"]


class Attention(nn.Module):
    """Multi-head self-attention with its output projection."""

    def __init__(self, checkpoint: Checkpoint, prefix: str, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = checkpoint.linear(f"{prefix}.self.query")
        # A plain number: read off x.shape instead, the exported graph would compute it anew at every inference.
        self.head_width = self.query.out_features // heads
        self.key = checkpoint.linear(f"{prefix}.self.key")
        self.value = checkpoint.linear(f"{prefix}.self.value")
        self.output = checkpoint.linear(f"{prefix}.output.dense")

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Attend; `bias` `[B, 1, 1, T]` is added to the scores."""
        batch, tokens, _ = x.shape

        def split(y: torch.Tensor) -> torch.Tensor:
            return y.view(batch, tokens, self.heads, self.head_width).transpose(1, 2)

        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        scores = query @ key.transpose(-1, -2) / math.sqrt(self.head_width)
        mixed = torch.softmax(scores + bias, -1) @ value
        merged = mixed.transpose(1, 2).reshape(batch, tokens, self.heads * self.head_width)
        y: torch.Tensor = self.output(merged)
        return y


class Block(nn.Module):
    """One encoder layer: attention and feed-forward, each followed by residual addition and normalisation."""

    def __init__(self, checkpoint: Checkpoint, prefix: str, heads: int) -> None:
        super().__init__()
        self.attention = Attention(checkpoint, f"{prefix}.attention", heads)
        self.attention_norm = checkpoint.layer_norm(f"{prefix}.attention.output.LayerNorm")
        self.intermediate = checkpoint.linear(f"{prefix}.intermediate.dense")
        self.output = checkpoint.linear(f"{prefix}.output.dense")
        self.output_norm = checkpoint.layer_norm(f"{prefix}.output.LayerNorm")

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Map hidden states `[B, T, width]` to the next layer's."""
        x = self.attention_norm(x + self.attention(x, bias))
        y: torch.Tensor = self.output_norm(x + self.output(nn.functional.gelu(self.intermediate(x))))
        return y


class SentenceEncoder(nn.Module):
    """Token ids and mask in; last hidden states and one embedding of length 1 per sentence out.

    Parameters
    ----------
    tensors
        The checkpoint's tensors by name, without a leading `bert.`.
    layers, heads
        Depth of the encoder and attention heads per layer.

    References
    ----------
    J. Devlin et al., "BERT", NAACL 2019; N. Reimers and I. Gurevych, "Sentence-BERT", EMNLP 2019.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], layers: int, heads: int) -> None:
        super().__init__()
        checkpoint = Checkpoint(tensors)
        self.word = checkpoint.embedding("embeddings.word_embeddings")
        self.position = nn.Parameter(tensors["embeddings.position_embeddings.weight"])
        # A single sentence has token type 0 throughout.
        self.token_type = nn.Parameter(tensors["embeddings.token_type_embeddings.weight"][0])
        self.norm = checkpoint.layer_norm("embeddings.LayerNorm")
        self.layer = nn.ModuleList(Block(checkpoint, f"encoder.layer.{index}", heads) for index in range(layers))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode `[B, T]` ids and mask, int64, to hidden states `[B, T, width]` and embeddings `[B, width]`."""
        x = self.norm(self.word(input_ids) + self.position[: input_ids.shape[1]] + self.token_type)
        mask = attention_mask.float()
        bias = (1 - mask)[:, None, None, :] * _MASKED
        for block in self.layer:
            x = block(x, bias)
        mean = (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1e-9)
        return x, mean / mean.norm(dim=1, keepdim=True)
