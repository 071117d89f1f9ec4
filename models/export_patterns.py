"""Small modules with random weights, written by both of PyTorch's exporters: what the queries over a graph must know.

The files stand in tests/passes/exports/ and are made anew by ``python models/export_patterns.py FOLDER``.
"""
# mypy: disallow-subclassing-any=False
# (PyTorch is optional: where it is not installed, nn.Module is unknown to the type checker.)

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, TOKENS = 16, 4, 5
#: Exporter and opset. TorchScript decomposes LayerNorm below 17 and GELU below 20; dynamo starts at 18.
EXPORTERS = (("script", 11), ("script", 14), ("script", 17), ("script", 20), ("dynamo", 18), ("dynamo", 20))
#: The larger modules are written by fewer, so that the files stay small together.
FEWER = {
    **dict.fromkeys(("mha_by_hand", "mha_fused", "gqa_rope"), (("script", 11), ("script", 17), ("dynamo", 18))),
    # TorchScript has no form of these at opset 11.
    **dict.fromkeys(("mha_module", "sdpa"), (("script", 14), ("script", 17), ("dynamo", 18), ("dynamo", 20))),
    **dict.fromkeys(("pre_norm", "post_norm", "llama", "vit"), (("script", 14), ("dynamo", 20))),
}


class RmsNorm(nn.Module):
    """RMSNorm as Llama's reference code has it."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the root mean square of the last axis."""
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class QuickGelu(nn.Module):
    """GELU as CLIP approximates it."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by a sigmoid."""
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Attention written by hand, with an additive mask that is an input."""

    def __init__(self, shared_heads: int = HEADS, rotary: bool = False, kernel: bool = False) -> None:
        super().__init__()
        self.shared_heads, self.rotary, self.kernel = shared_heads, rotary, kernel
        self.size = WIDTH // HEADS
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key, self.value = (nn.Linear(WIDTH, shared_heads * self.size) for _ in range(2))
        self.output = nn.Linear(WIDTH, WIDTH)
        frequencies = 1 / 100 ** (torch.arange(0, self.size, 2) / self.size)
        angles = torch.outer(torch.arange(TOKENS).float(), frequencies).repeat(1, 2)
        self.register_buffer("cosine", angles.cos())
        self.register_buffer("sine", angles.sin())

    def split(self, x: Tensor, heads: int) -> Tensor:
        """Give each head an axis."""
        return x.view(x.shape[0], x.shape[1], heads, self.size).transpose(1, 2)

    def rotate(self, x: Tensor) -> Tensor:
        """Turn pairs of channels that stand half a head apart."""
        half = self.size // 2
        return x * self.cosine + torch.cat([-x[..., half:], x[..., :half]], -1) * self.sine

    def repeat(self, x: Tensor) -> Tensor:
        """Let several query heads share one of these."""
        if self.shared_heads == HEADS:
            return x
        batch, heads, tokens, size = x.shape
        times = HEADS // heads
        return x[:, :, None].expand(batch, heads, times, tokens, size).reshape(batch, HEADS, tokens, size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix tokens `[B, T, C]`."""
        query = self.split(self.query(x), HEADS)
        key, value = (self.split(layer(x), self.shared_heads) for layer in (self.key, self.value))
        if self.rotary:
            query, key = self.rotate(query), self.rotate(key)
        key, value = self.repeat(key), self.repeat(value)
        if self.kernel:
            mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            scores = query @ key.transpose(-1, -2) / self.size**0.5
            mixed = torch.softmax(scores if mask is None else scores + mask, -1) @ value
        y: Tensor = self.output(mixed.transpose(1, 2).reshape(x.shape))
        return y


class FusedAttention(nn.Module):
    """Attention whose queries, keys and values come out of one Linear, as in timm's ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens `[B, T, C]`."""
        batch, tokens, _ = x.shape
        query, key, value = self.qkv(x).reshape(batch, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4).unbind()
        scores = (query * (WIDTH // HEADS) ** -0.5) @ key.transpose(-2, -1)
        y: Tensor = self.output((scores.softmax(-1) @ value).transpose(1, 2).reshape(x.shape))
        return y


class MultiheadAttention(nn.Module):
    """PyTorch's own module, on the way that an export takes."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens `[B, T, C]`."""
        y: Tensor = self.attention(x, x, x, need_weights=True)[0]
        return y


class Swiglu(nn.Module):
    """The gated feed-forward part of Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, 32, bias=False) for _ in range(2))
        self.down = nn.Linear(32, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, T, C]` to the same shape."""
        y: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return y


def feed_forward() -> nn.Module:
    """Return the feed-forward part of an encoder."""
    return nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))


class Block(nn.Module):
    """Norms in front of both parts, or behind both sums."""

    def __init__(self, norm: Callable[[], nn.Module], attention: nn.Module, feed: nn.Module, behind: bool) -> None:
        super().__init__()
        self.first, self.second, self.attention, self.feed = norm(), norm(), attention, feed
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, T, C]` to the same shape."""
        if self.behind:
            x = self.first(x + self.attention(x))
            y: Tensor = self.second(x + self.feed(x))
            return y
        x = x + self.attention(self.first(x))
        return x + self.feed(self.second(x))


def layer_norm() -> nn.Module:
    """Return a LayerNorm whose parameters are no ones and zeros."""
    norm = nn.LayerNorm(WIDTH, eps=1e-6)
    norm.weight.data += 0.1 * torch.randn(WIDTH)
    norm.bias.data += 0.1 * torch.randn(WIDTH)
    return norm


class Encoder(nn.Module):
    """An embedding, a block, and a head behind a last norm if the norms stand in front."""

    def __init__(self, block: Callable[[], Block], norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, WIDTH)
        self.block = block()
        self.norm = nn.Identity() if self.block.behind else norm()
        self.head = nn.Linear(WIDTH, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens `[B, T]` to logits."""
        y: Tensor = self.head(self.norm(self.block(self.embedding(tokens))))
        return y


class Vit(nn.Module):
    """A vision transformer: patches by a Conv, a class token, positions, one block."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.block = Block(layer_norm, FusedAttention(), feed_forward(), behind=False)
        self.norm, self.head = layer_norm(), nn.Linear(WIDTH, 7)

    def forward(self, image: Tensor) -> Tensor:
        """Map images `[B, 3, 8, 8]` to logits."""
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        y: Tensor = self.head(self.norm(self.block(x))[:, 0])
        return y


class Bottleneck(nn.Module):
    """MobileNetV2's inverted residual with its linear end."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.project = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, 8, H, W]` to the same shape."""
        y: Tensor = x + self.project(functional.relu6(self.depthwise(functional.relu6(self.expand(x)))))
        return y


def stage() -> nn.Module:
    """Return a stage of two bottlenecks between a stem and a head."""
    last = nn.Conv2d(8, 16, 1)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Bottleneck(), Bottleneck(), last, nn.ReLU6())


def modules() -> dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]]:
    """Return by name what builds each module, and example inputs."""
    tokens, mask = torch.randn(2, TOKENS, WIDTH), torch.zeros(1, 1, TOKENS, TOKENS)
    words, image = torch.arange(2 * TOKENS).view(2, TOKENS), torch.randn(2, 3, 8, 8)

    def pre() -> Block:
        return Block(layer_norm, Attention(), feed_forward(), behind=False)

    def post() -> Block:
        return Block(layer_norm, Attention(), feed_forward(), behind=True)

    def llama() -> Block:
        return Block(RmsNorm, Attention(HEADS // 2, rotary=True), Swiglu(), behind=False)

    return {
        "layer_norm": (layer_norm, (tokens,)),
        "rms_norm": (RmsNorm, (tokens,)),
        "gelu": (nn.GELU, (tokens,)),
        "gelu_tanh": (lambda: nn.GELU(approximate="tanh"), (tokens,)),
        "silu": (nn.SiLU, (tokens,)),
        "quick_gelu": (QuickGelu, (tokens,)),
        "hard_swish": (nn.Hardswish, (tokens,)),
        "mha_module": (MultiheadAttention, (tokens,)),
        "mha_by_hand": (Attention, (tokens, mask)),
        "mha_fused": (FusedAttention, (tokens,)),
        "sdpa": (lambda: Attention(kernel=True), (tokens, mask)),
        "gqa_rope": (lambda: Attention(HEADS // 2, rotary=True), (tokens, mask)),
        "pre_norm": (lambda: Encoder(pre, layer_norm), (words,)),
        "post_norm": (lambda: Encoder(post, layer_norm), (words,)),
        "llama": (lambda: Encoder(llama, RmsNorm), (words,)),
        "vit": (Vit, (image,)),
        "bottlenecks": (stage, (image,)),
    }


def export(module: nn.Module, inputs: tuple[Tensor, ...], exporter: str, opset: int) -> onnx.ModelProto:
    """Return what an exporter makes of a module whose batch stays open."""
    buffer = io.BytesIO()
    names = ["x", "mask"][: len(inputs)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations and traced shapes, which is what this is about
        if exporter == "script":
            axes = {"x": {0: "B"}}
            torch.onnx.export(
                module, inputs, buffer, input_names=names, dynamic_axes=axes, opset_version=opset, dynamo=False
            )
            return onnx.load_from_string(buffer.getvalue())
        shapes = ({0: torch.export.Dim("B")}, *({} for _ in inputs[1:]))
        program = torch.onnx.export(
            module, inputs, input_names=names, dynamic_shapes=shapes, opset_version=opset, dynamo=True, verbose=False
        )
    return onnx.load_from_string(program.model_proto.SerializeToString())


def stripped(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Remove where in which source file each node came from."""
    proto.graph.ClearField("metadata_props")
    for node in proto.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        value.ClearField("metadata_props")
    return proto


def main(folder: Path) -> None:
    """Write each module as each exporter has it."""
    for name, (build, inputs) in modules().items():
        for exporter, opset in FEWER.get(name, EXPORTERS):
            torch.manual_seed(7)
            proto = export(build().eval(), inputs, exporter, opset)
            onnx.save(stripped(proto), folder / f"{name}.{exporter}{opset}.onnx")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
