"""Draw sentences from running text and give them to a sentence encoder as tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from samples import write_npz_folder
from wheels import FetchError

_MAX_TOKENS = 128
_CALIBRATION_SENTENCES, _EVALUATION_SENTENCES = 64, 100
_SEED = 0


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


def write_sentences(text: str, tokenizer_json: str, folder: Path) -> None:
    """Write the folders `calib` and `eval`, one sentence per file, no sentence twice.

    Parameters
    ----------
    text
        One document per line.
    tokenizer_json
        Content of the tokenizer's file.
    folder
        An existing folder.
    """
    drawn = sentences(text, _SEED)
    wanted = _CALIBRATION_SENTENCES + _EVALUATION_SENTENCES
    if len(drawn) < wanted:
        raise FetchError(f"text: {len(drawn)} documents, {wanted} needed; check the path in catalog.toml")
    write_npz_folder(folder / "calib", tokenize(tokenizer_json, drawn[:_CALIBRATION_SENTENCES]))
    write_npz_folder(folder / "eval", tokenize(tokenizer_json, drawn[_CALIBRATION_SENTENCES:wanted]))
