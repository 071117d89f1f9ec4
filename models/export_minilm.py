"""all-MiniLM-L6-v2, a sentence encoder: from safetensors to ONNX."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from samples import write_npz_folder
from wheels import Archive, FetchError

_OPSET = 17
_LAYERS, _HEADS = 6, 12
_MAX_TOKENS = 128
_CALIBRATION_SENTENCES, _EVALUATION_SENTENCES = 64, 100
_SEED = 0


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


def sentences(text: str, seed: int) -> list[str]:
    """Draw one sentence from every document, documents in random order.

    Parameters
    ----------
    text
        One document per line.
    seed
        Seed of the draw.

    Returns
    -------
    list of str
        Sentences that all differ.
    """
    rng = np.random.default_rng(seed)
    documents = [line.strip() for line in text.splitlines() if line.strip()]
    drawn: dict[str, None] = {}
    for index in rng.permutation(len(documents)):
        candidates = re.split(r"(?<=[.!?])\s+(?=[A-Z\"])", documents[index])
        drawn.setdefault(candidates[rng.integers(len(candidates))])
    return list(drawn)


def tokenize(tokenizer_json: str, texts: Sequence[str]) -> Iterator[dict[str, npt.NDArray[np.int64]]]:
    """Yield the model's inputs for each text: `[1, T]` each, at most 128 tokens, no padding."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_padding()
    tokenizer.enable_truncation(_MAX_TOKENS)
    for text in texts:
        encoding = tokenizer.encode(text)
        yield {
            "input_ids": np.array([encoding.ids], np.int64),
            "attention_mask": np.array([encoding.attention_mask], np.int64),
        }


def build(archive: Archive, folder: Path) -> None:
    """Write `model.onnx` and the folders `calib` and `eval`, one sentence per file.

    Parameters
    ----------
    archive
        Sources `weights`, `tokenizer` and `text`.
    folder
        An existing folder.
    """
    drawn = sentences(archive.read("text").decode(), _SEED)
    wanted = _CALIBRATION_SENTENCES + _EVALUATION_SENTENCES
    if len(drawn) < wanted:
        raise FetchError(f"text: {len(drawn)} documents, {wanted} needed; check the path in catalog.toml")
    tokenizer_json = archive.read("tokenizer").decode()
    write_npz_folder(folder / "calib", tokenize(tokenizer_json, drawn[:_CALIBRATION_SENTENCES]))
    write_npz_folder(folder / "eval", tokenize(tokenizer_json, drawn[_CALIBRATION_SENTENCES:wanted]))
    export(archive.read("weights"), folder / "model.onnx")
