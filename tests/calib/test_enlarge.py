from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.calib.data import Dataset, Sample, input_specs
from qcompile.calib.enlarge import Enlarger, spliced, token_input
from qcompile.core import runtime
from qcompile.core.errors import UsageError

TEXT = """
(int64[1,T] ids, int64[1,T] mask, int64[1,T] types) => (float[1,T,4] y) {
    words = Gather (w, ids)
    small = Cast <to = 6> (types)
    kinds = Gather (t, small)
    m = Cast <to = 1> (mask)
    axes = Constant <value_ints = [2]> ()
    wide = Unsqueeze (m, axes)
    sum = Add (words, kinds)
    y = Mul (sum, wide)
}
"""
START, STOP, PAD = 1, 2, 0


@pytest.fixture
def reader(model_of: Callable[..., ir.Model]) -> ir.Model:
    return model_of(TEXT, w=np.zeros((50, 4), "f4"), t=np.zeros((2, 4), "f4"))


def text(words: list[int], second: int = 0, pads: int = 0) -> Sample:
    """One text between START and STOP, of which the last tokens are of the second kind, and padding behind it."""
    ids = [START, *words, STOP, *[PAD] * pads]
    count = len(words) + 2
    mask = [1] * count + [0] * pads
    types = [0] * (count - second) + [1] * second + [0] * pads
    return {name: np.array([row]) for name, row in zip(("ids", "mask", "types"), (ids, mask, types), strict=True)}


def dataset(model: ir.Model, *samples: Sample) -> Dataset:
    return Dataset("samples", lambda: samples, input_specs(model))


def made(model: ir.Model, count: int, *samples: Sample) -> list[Sample]:
    data = dataset(model, *samples)
    return list(Enlarger.of(model, data, count)(data))


def pictures(count: int, shape: tuple[int, ...] = (1, 3, 8, 6), dtype: str = "f4") -> list[Sample]:
    generator = np.random.default_rng(0)
    return [{"x": generator.uniform(0.0, 200.0, shape).astype(dtype)} for _ in range(count)]


def test_real_samples_stay_and_each_has_its_share(reader: ir.Model) -> None:
    real = [text(list(range(10 * i, 10 * i + 10))) for i in range(1, 5)]
    found, given = made(reader, 10, *real), {feeds["ids"].tobytes() for feeds in real}
    assert len(found) == 10
    at = [index for index, feeds in enumerate(found) if feeds["ids"].tobytes() in given]
    assert at == [0, 3, 5, 7], "so that any part of them has as many of both kinds"


def test_the_same_samples_are_made_every_time_and_others_of_others(reader: ir.Model) -> None:
    real = [text(list(range(10 * i, 10 * i + 10))) for i in range(1, 4)]
    first, second = (made(reader, 9, *real) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_equal(one, other)
    assert len({feeds["ids"].tobytes() for feeds in first}) == 9


def test_made_texts_are_texts(reader: ir.Model) -> None:
    """They begin and end as the given ones do, hold their words, and masks and types fit them."""
    real = [text([10, 11, 12, 13], 2, 4), text([20, 21, 22, 23, 24, 25], 2, 2), text([30, 31, 30], 0, 5)]
    words = {int(token) for feeds in real for token in feeds["ids"].flat} - {START, STOP, PAD}
    for feeds in made(reader, 60, *real):
        ids, mask, types = (feeds[name][0] for name in ("ids", "mask", "types"))
        length = int(mask.sum())
        assert ids.shape == (10,) and feeds["ids"].dtype == np.int64
        assert (mask == [1] * length + [0] * (10 - length)).all()
        assert ids[0] == START and ids[length - 1] == STOP and (ids[length:] == PAD).all()
        assert {*ids[1 : length - 1]} <= words
        assert (np.diff(types[:length]) >= 0).all() and (types[length:] == 0).all()


def test_a_single_text_is_varied(reader: ir.Model) -> None:
    assert len({feeds["ids"].tobytes() for feeds in made(reader, 8, text(list(range(10, 30))))}) == 8


def test_texts_are_cut_where_all_beside_the_tokens_agrees(reader: ir.Model) -> None:
    first, second = text([10, 11, 12, 13, 14], 3), text([20, 21, 22, 23, 24, 25], 2)
    agreed = {1, 2, 3, 6}  # types are 0 0 0 0 1 1 1 and 0 0 0 0 0 0 1 1: of both sides of position 4 and 5 they differ
    cuts = set()
    for seed in range(50):
        found = spliced(first, second, "ids", np.random.default_rng(seed))
        assert found["ids"].shape == second["ids"].shape
        cuts.add(int((found["ids"] != second["ids"]).sum() + 1))
        np.testing.assert_array_equal(found["types"], second["types"])
    assert cuts <= agreed and len(cuts) > 1


def test_texts_that_agree_nowhere_are_not_spliced(reader: ir.Model) -> None:
    first, second = text([10, 11], 4), text([20, 21])
    np.testing.assert_equal(spliced(first, second, "ids", np.random.default_rng(0)), dict(second))


def test_tokens_are_what_indexes_the_largest_table(reader: ir.Model, model_of: Callable[..., ir.Model]) -> None:
    assert token_input(reader) == "ids"
    other = model_of("(float[2,4] x, int64[1,2] i) => (float[1,2,4] y) { y = Gather (x, i) }")
    assert token_input(other) is None, "the table is no constant"


@pytest.mark.parametrize("shape", [(1, 3, 8, 6), (1, 8, 6, 1), (2, 1, 5, 7)])
@pytest.mark.parametrize("dtype", ["f4", "u1"])
def test_made_pictures_have_shape_type_and_range_of_the_given_ones(
    shape: tuple[int, ...], dtype: str, model_of: Callable[..., ir.Model]
) -> None:
    kind = {"f4": "float", "u1": "uint8"}[dtype]
    sizes = ",".join(map(str, shape))
    model = model_of(f"({kind}[{sizes}] x) => (float[{sizes}] y) {{ y = Cast <to = 1> (x) }}")
    real = pictures(3, shape, dtype)
    low, high = min(feeds["x"].min() for feeds in real), max(feeds["x"].max() for feeds in real)
    found = [feeds["x"] for feeds in made(model, 12, *real)]
    assert {(array.shape, array.dtype) for array in found} == {(shape, np.dtype(dtype))}
    assert all(array.min() >= low and array.max() <= high for array in found)
    assert len({array.tobytes() for array in found}) == 12


def test_pictures_of_several_sizes_are_not_mixed_and_keep_theirs(model_of: Callable[..., ir.Model]) -> None:
    model = model_of("(float[1,3,8,W] x) => (float[1,3,8,W] y) { y = Relu (x) }")
    real = [*pictures(1, (1, 3, 8, 6)), *pictures(1, (1, 3, 8, 9))]
    assert {feeds["x"].shape for feeds in made(model, 12, *real)} == {(1, 3, 8, 6), (1, 3, 8, 9)}


@pytest.mark.parametrize("text", [
    "(float[1,16] x) => (float[1,16] y) { y = Relu (x) }",
    "(float[1,64,8,8] x) => (float[1,64,8,8] y) { y = Relu (x) }",
    "(float[1,3,8,8] x, float[1,3,8,8] z) => (float[1,3,8,8] y) { y = Add (x, z) }",
])  # fmt: skip
def test_what_is_neither_is_refused(text: str, model_of: Callable[..., ir.Model]) -> None:
    model = model_of(text)
    with pytest.raises(UsageError, match="neither"):
        Enlarger.of(model, dataset(model, *(runtime.synthetic_feeds(model, seed) for seed in range(2))), 8)
