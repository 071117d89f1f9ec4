"""all-MiniLM-L6-v2, a sentence encoder: from safetensors to ONNX."""

from __future__ import annotations

import warnings
from pathlib import Path

from sentences import write_sentences
from wheels import Archive

_OPSET = 17
_LAYERS, _HEADS = 6, 12


def export(weights: bytes, path: Path) -> None:
    """Export the encoder with dynamic batch and length.

    Parameters
    ----------
    weights
        Content of the safetensors file.
    path
        Where to write the model: `input_ids` and `attention_mask`, int64 `[B, T]`, to `hidden` `[B, T, 384]` and
        `embedding` `[B, 384]`.
    """
    import torch
    from bert import SentenceEncoder
    from safetensors.torch import load

    torch.set_num_threads(1)  # constant folding in one order, so that the same bytes come out
    tensors = {name.removeprefix("bert."): tensor for name, tensor in load(weights).items()}
    encoder = SentenceEncoder(tensors, _LAYERS, _HEADS).eval()
    example = torch.ones(2, 8, dtype=torch.long)
    tokens = {0: "B", 1: "T"}
    with warnings.catch_warnings():
        # The exporter over TorchScript is deprecated, but its successor starts at opset 18.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            encoder,
            (example, example),
            str(path),
            opset_version=_OPSET,
            input_names=["input_ids", "attention_mask"],
            output_names=["hidden", "embedding"],
            dynamic_axes={
                "input_ids": tokens,
                "attention_mask": tokens,
                "hidden": tokens,
                "embedding": {0: "B"},
            },
            dynamo=False,
        )


def build(archive: Archive, folder: Path) -> None:
    """Write `model.onnx` and the folders `calib` and `eval`, one sentence per file.

    Parameters
    ----------
    archive
        Sources `weights`, `tokenizer` and `text`.
    folder
        An existing folder.
    """
    write_sentences(archive.read("text").decode(), archive.read("tokenizer").decode(), folder)
    export(archive.read("weights"), folder / "model.onnx")
