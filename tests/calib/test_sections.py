"""What a model's outputs are compared by: scores rather than probabilities, and of a language model its divergence."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from conftest import proto_from_text

from qcompile.calib.output_error import OutputError
from qcompile.calib.sections import at_scores, is_language
from qcompile.calib.trials import Trials
from qcompile.core import model as models
from qcompile.core import runtime

LANGUAGE = "(int64[B,T] ids) => (float[B,T,50] logits) { e = Gather(table, ids) h = Tanh(e) logits = MatMul(h, w) }"
CODES = LANGUAGE.replace("e = Gather(table, ids)", "c = Gather(codes, ids) e = DequantizeLinear(c, s, z)")
TABLE = LANGUAGE.replace("e = Gather(table, ids)", "t = DequantizeLinear(codes, s, z) e = Gather(t, ids)")


def built(text: str, random: np.random.Generator, width: int = 50) -> ir.Model:
    weights = {"table": random.normal(size=(50, 16)), "w": random.normal(size=(16, width)), "s": np.array(0.02)}
    given = {name: array.astype(np.float32) for name, array in weights.items()}
    given |= {"codes": random.integers(-128, 128, (50, 16)).astype(np.int8), "z": np.array(0, np.int8)}
    kept = {name: array for name, array in given.items() if f"({name}," in text or f" {name}" in text}
    return models.from_proto(proto_from_text(text, 21, **kept))


def test_the_error_of_a_language_model_is_half_the_divergence(random: np.random.Generator) -> None:
    """Kullback and Leibler 1951; to second order in what the logits are moved by."""
    model = built(LANGUAGE, random)
    [name] = [value.name for value in at_scores(model).graph.outputs]
    feeds = {"ids": random.integers(0, 50, (1, 64))}
    logits = runtime.Session(model).run(feeds)["logits"].astype(np.float64)
    other = model.clone()
    weight = other.graph.initializers["w"]
    moved = weight.const_value.numpy() + random.normal(0, 0.01, (16, 50)).astype(np.float32)
    weight.const_value = ir.tensor(moved, name="w")
    near = runtime.Session(other).run(feeds)["logits"].astype(np.float64)
    p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (logits, near))
    divergence = np.mean(np.sum(p * np.log(p / q), -1))
    error = OutputError()
    error.add(*(runtime.Session(at_scores(each)).run(feeds) for each in (model, other)))
    assert set(error.noise) == {name}
    assert error.total == pytest.approx(divergence / 2.0, rel=0.02)
    assert [value.name for value in model.graph.outputs] == ["logits"] and len(model.graph) == 3


@pytest.mark.parametrize("text", [LANGUAGE, CODES, TABLE])
def test_tables_in_codes_are_tables(random: np.random.Generator, text: str) -> None:
    """Else a quantized model would have other outputs than its reference, and no noise."""
    assert [value.name for value in at_scores(built(text, random)).graph.outputs] == ["logits/roots"]


EMBEDDED = "e = Gather(table, ids) h = Tanh(e)"
FED = LANGUAGE.replace("int64[B,T] ids", "float[B,T,16] x").replace(EMBEDDED, "h = Tanh(x)")
COLUMNS = "c = Gather <axis: int = 1> (w, ids) f = Transpose <perm: ints = [1, 2, 0]> (c) h = Tanh(f)"


@pytest.mark.parametrize(
    ("text", "width"),
    [
        (LANGUAGE.replace("T,50]", "T,40]"), 40),
        (FED, 50),
        (LANGUAGE.replace("[B,T", "[T"), 50),
        (LANGUAGE.replace(EMBEDDED, COLUMNS), 50),
    ],
)
def test_other_outputs_stay_as_they_are(random: np.random.Generator, text: str, width: int) -> None:
    assert [value.name for value in at_scores(built(text, random, width)).graph.outputs] == ["logits"]


def test_a_sample_of_a_language_model_counts_as_blocks_of_positions(random: np.random.Generator) -> None:
    """As many as there are, each with its own noise, and together what the whole sample has."""
    model = at_scores(built(LANGUAGE, random))
    rounded = model.clone()
    weight = rounded.graph.initializers["w"]
    weight.const_value = ir.tensor(np.round(weight.const_value.numpy(), 1), name="w")
    samples = [{"ids": random.integers(0, 50, (1, length))} for length in (96, 96, 7)]
    trials = Trials(model, rounded, [], "uint8", {}, samples[0])
    error = trials.together(samples, {"all": {}}, 1, lambda items, *_: items, 1)["all"]
    [noise], at = error.noise.values(), 0
    before, after = (runtime.Session(each) for each in (model, rounded))
    for feeds in samples:
        expected, found = (next(iter(session.run(feeds).values())).astype(np.float64) for session in (before, after))
        for start in range(0, expected.shape[1], 32):
            block = (expected - found)[:, start : start + 32]
            assert noise[at] == pytest.approx(np.mean(block**2), rel=1e-9)
            at += 1
    assert at == len(noise) == 7


def test_what_is_no_language_model_counts_by_samples(random: np.random.Generator) -> None:
    assert is_language(built(LANGUAGE, random)) and is_language(at_scores(built(TABLE, random)))
    assert not is_language(built(FED, random))
    two = LANGUAGE.replace("logits) {", "logits, float[B,T,16] h) {")
    assert not is_language(built(two, random))
