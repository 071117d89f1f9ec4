"""Perplexity of causal language models over the same token ids, each beside the first.

    python benchmarks/perplexity.py MODEL... --data eval.npz [--length 512] [--threads 2]

MODEL is an .onnx file or the folder that a compile wrote; the data have one array of token ids `[S, 1, T]`, as
models/fetch.py writes them. With --length the sequences are joined and cut anew. Each sequence is read without what is
before it; what is averaged is -log p of every token but the first of each. Beside the perplexity stands its ratio to
that of the first model, with the standard error that follows from what the two differ by at each token.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qcompile.core import runtime
from qcompile.core.runtime import Session

Tokens = npt.NDArray[np.int64]


def sequences(path: Path, length: int | None = None) -> tuple[str, Tokens]:
    """Return the name of the input and its sequences `[S, T]`.

    Parameters
    ----------
    path
        An .npz with one array of token ids.
    length
        Join all and cut them into sequences of so many tokens; what is left over goes.
    """
    with np.load(path, allow_pickle=False) as archive:
        [name] = archive.files
        tokens = np.asarray(archive[name], np.int64)
    tokens = tokens.reshape(-1, tokens.shape[-1])
    if length is not None:
        flat = tokens.reshape(-1)
        tokens = flat[: len(flat) // length * length].reshape(-1, length)
    return name, tokens


def losses(session: Session, name: str, tokens: Tokens) -> Iterator[npt.NDArray[np.float64]]:
    """Yield -log p `[T - 1]` of what follows in each sequence, in nats; the model's first output is its logits."""
    for sequence in tokens:
        logits = session.run({name: sequence[None]})[session.output_names[0]][0, :-1].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = np.take_along_axis(logits, sequence[1:, None], axis=-1)[:, 0]
        yield np.log(np.exp(logits).sum(axis=-1)) - chosen


def perplexity(every: Iterable[npt.NDArray[np.float64]]) -> float:
    """Return exp of the mean loss over all tokens."""
    return float(np.exp(np.mean(np.concatenate(list(every)))))


def ratio_of(every: list[npt.NDArray[np.float64]], first: list[npt.NDArray[np.float64]]) -> tuple[float, float]:
    """Return a perplexity over that of the first model, and the standard error of that, tokens taken as independent."""
    differences = np.concatenate(every) - np.concatenate(first)
    ratio = float(np.exp(differences.mean()))
    return ratio, ratio * float(differences.std(ddof=1)) / float(np.sqrt(differences.size))


def main() -> None:
    """Print a line a model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--length", type=int)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    name, tokens = sequences(arguments.data, arguments.length)
    print(f"{tokens.shape[0]} sequences of {tokens.shape[1]} tokens, {runtime.name()}")
    first: list[npt.NDArray[np.float64]] = []
    for path in arguments.models:
        session = Session(path / "model.onnx" if path.is_dir() else path, threads=arguments.threads)
        every = list(losses(session, name, tokens))
        first = first or every
        ratio, uncertain = ratio_of(every, first)
        print(f"{perplexity(every):9.3f}  {ratio:.4f}x ± {uncertain:.4f}  {path}", flush=True)


if __name__ == "__main__":
    main()
