"""SmolLM2-135M-Instruct, a language model: from a GGUF file to ONNX, its Q4_1 weights dequantized."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from samples import write_npz
from wheels import Archive, FetchError

_OPSET = 17
_POSITIONS = 512  # of the 2048 it was trained for: the mask is stored in the model
_TOKENS = 128
_SEQUENCES = {"calib": 32, "eval": 16}


def read_gguf(content: bytes) -> Any:
    """Open a GGUF file; the reader maps it into memory, so it goes through a temporary file."""
    from gguf import GGUFReader

    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(content)
        file.flush()
        return GGUFReader(file.name)


def export(reader: Any, path: Path) -> None:
    """Export the decoder with dynamic batch and length: `input_ids` `[B, T]` to `logits` `[B, T, 49152]`."""
    import torch
    from gguf import dequantize
    from llama import Decoder, Shape

    torch.set_num_threads(1)  # constant folding in one order, so that the same bytes come out
    tensors = {
        tensor.name: torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), np.float32))
        for tensor in reader.tensors
    }

    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    shape = Shape(
        layers=field("block_count"),
        heads=field("attention.head_count"),
        shared_heads=field("attention.head_count_kv"),
        epsilon=field("attention.layer_norm_rms_epsilon"),
        rotation_base=field("rope.freq_base"),
        positions=_POSITIONS,
    )
    with warnings.catch_warnings():
        # The exporter over TorchScript is deprecated, but its successor starts at opset 18.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            Decoder(tensors, shape).eval(),
            (torch.ones(1, 16, dtype=torch.long),),
            str(path),
            opset_version=_OPSET,
            input_names=["input_ids"],
            output_names=["logits"],
            dynamic_axes={"input_ids": {0: "B", 1: "T"}, "logits": {0: "B", 1: "T"}},
            dynamo=False,
        )


def read_tokenizer(reader: Any) -> Any:
    """Build the byte-level tokenizer whose vocabulary and merges the GGUF file holds."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def sequences(tokenizer: Any, text: str, count: int) -> npt.NDArray[np.int64]:
    """Return the first `count` runs of 128 tokens, `[count, 1, 128]`."""
    tokens = tokenizer.encode(text).ids[: count * _TOKENS]
    if len(tokens) < count * _TOKENS:
        raise FetchError(f"text: {len(tokens)} tokens, {count * _TOKENS} needed; check the path in catalog.toml")
    return np.array(tokens, np.int64).reshape(count, 1, _TOKENS)


def build(archive: Archive, folder: Path) -> None:
    """Write `model.onnx`, `calib.npz` and `eval.npz`.

    Parameters
    ----------
    archive
        Sources `weights` and `text`, of which the first half is for calibration and the second for evaluation.
    folder
        An existing folder.
    """
    reader = read_gguf(archive.read("weights"))
    tokenizer, lines = read_tokenizer(reader), archive.read("text").decode().splitlines()
    halves = {"calib": lines[: len(lines) // 2], "eval": lines[len(lines) // 2 :]}
    for kind, count in _SEQUENCES.items():
        write_npz(folder / f"{kind}.npz", {"input_ids": sequences(tokenizer, "\n".join(halves[kind]), count)})
    export(reader, folder / "model.onnx")
