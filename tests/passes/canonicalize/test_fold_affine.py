from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qcompile.passes.canonicalize.fold_affine import FoldAffine
from qcompile.passes.canonicalize.infer_shapes import InferShapes

Build = Callable[..., Any]
BEHIND = "(float[1,4,6,6] x) => (float[1,4,N,M] y) { [conv] c = Conv <group = %d> (x, w) y = %s (c, k) }"
FRONT = "(float[1,4,6,6] x) => (float[1,4,N,M] y) { m = %s (x, k) [conv] y = Conv <%s> (m, w) }"


@pytest.fixture
def w(random: np.random.Generator) -> np.ndarray:
    return random.standard_normal((4, 4, 3, 3)).astype(np.float32)


@pytest.fixture
def k(random: np.random.Generator) -> np.ndarray:
    return (0.5 + random.random((4, 1, 1))).astype(np.float32)


@pytest.mark.parametrize("op_type", ["Mul", "Div", "Add", "Sub"])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_behind_a_conv(
    op_type: str, group: int, w: np.ndarray, k: np.ndarray, model_of: Build, rewritten: Build, types: Build
) -> None:
    model, _ = rewritten(FoldAffine(), model_of(BEHIND % (group, op_type), w=w[:, : 4 // group], k=k))
    assert types(model) == ["Conv"] and model.graph[0].name == "conv"


@pytest.mark.parametrize("op_type", ["Mul", "Div"])
def test_a_factor_in_front_folds_whatever_the_padding(
    op_type: str, w: np.ndarray, k: np.ndarray, model_of: Build, rewritten: Build, types: Build
) -> None:
    model, _ = rewritten(FoldAffine(), model_of(FRONT % (op_type, "pads = [1,1,1,1]"), w=w, k=k))
    assert types(model) == ["Conv"]


@pytest.mark.parametrize(
    ("attributes", "left"), [("group = 1", 1), ("pads = [1,1,1,1]", 2), ('auto_pad = "SAME_UPPER"', 2)]
)
def test_a_shift_in_front_folds_only_without_padding(
    attributes: str, left: int, w: np.ndarray, k: np.ndarray, model_of: Build, rewritten: Build, types: Build
) -> None:
    model, _ = rewritten(FoldAffine(), model_of(FRONT % ("Add", attributes), w=w, k=k))
    assert len(types(model)) == left


@pytest.mark.parametrize("shape", [(6,), (6, 1), (4, 6, 6), (2, 1, 1, 1)])
def test_what_is_not_per_channel_stays(
    shape: tuple[int, ...], w: np.ndarray, model_of: Build, rewritten: Build
) -> None:
    text = (BEHIND % (1, "Mul")).replace("float[1,4,N,M] y", "float[K,4,N,M] y").replace("(x, w)", "(x, w1)")
    number = np.full(shape, 2, np.float32) + np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    model, _ = rewritten(FoldAffine(), model_of(text, w1=w[:, :, :1, :1], k=number))
    assert [node.op_type for node in model.graph] == ["Conv", "Mul"]


def test_a_single_channel_is_not_broadcast_away(
    w: np.ndarray, k: np.ndarray, model_of: Build, rewritten: Build
) -> None:
    text = "(float[1,4,6,6] x) => (float[1,4,N,M] y) { c = Conv (x, w) y = Mul (c, k) }"
    model, _ = rewritten(FoldAffine(), model_of(text, w=w[:1], k=k))
    assert [node.op_type for node in model.graph] == ["Conv", "Mul"]


def test_a_result_that_is_read_twice_or_is_an_output_stays(
    w: np.ndarray, k: np.ndarray, model_of: Build, rewritten: Build, types: Build
) -> None:
    twice = "(float[1,4,6,6] x) => (float[1,4,N,M] y, float[1,4,N,M] z) { c = Conv (x, w) y = Mul (c, k) z = Relu (c) }"
    output = "(float[1,4,6,6] x) => (float[1,4,N,M] y, float[1,4,N,M] c) { c = Conv (x, w) y = Mul (c, k) }"
    for text in (twice, output):
        assert "Mul" in types(rewritten(FoldAffine(), model_of(text, w=w, k=k))[0])


def test_weights_that_others_read_and_overflow_stay(
    w: np.ndarray, k: np.ndarray, model_of: Build, rewritten: Build, types: Build
) -> None:
    shared = """(float[1,4,6,6] x) => (float[1,4,N,M] y, float[1,4,N,M] z) {
        c = Conv (x, w) y = Mul (c, k) d = Conv (x, w) z = Relu (d) }"""
    assert "Mul" in types(rewritten(FoldAffine(), model_of(shared, w=w, k=k))[0])
    divided = "(float[1,4,6,6] x) => (float[1,4,N,M] y) { c = Conv (x, w) y = Div (c, k) }"
    model = model_of(divided, w=w, k=np.zeros((4, 1, 1), np.float32))
    FoldAffine()(model)
    assert types(model) == ["Conv", "Div"]


def test_batch_normalization_written_out(w: np.ndarray, model_of: Build, rewritten: Build, types: Build) -> None:
    text = """(float[1,4,6,6] x) => (float[1,4,N,M] y) {
        c = Conv (x, w, b) s = Sub (c, m) f = Mul (s, g) y = Add (f, h) }"""
    constants = {name: np.linspace(0.5, 2, 4, dtype=np.float32).reshape(4, 1, 1) for name in "mgh"}
    model, _ = rewritten(FoldAffine(), model_of(text, w=w, b=np.ones(4, np.float32), **constants))
    assert types(model) == ["Conv"]


def test_gemm_and_matmul(w: np.ndarray, model_of: Build, rewritten: Build, types: Build) -> None:
    flat, row = w[:, :, 0, 0], np.linspace(0.5, 2, 4, dtype=np.float32)
    gemm = "(float[2,4] x) => (float[2,4] y) { a = Add (x, k) m = Mul (a, k) g = Gemm (m, w) y = Sub (g, k) }"
    model = model_of(gemm, w=flat, k=row)
    InferShapes()(model)
    assert types(rewritten(FoldAffine(), model)[0]) == ["Gemm"]
    matmul = "(float[2,3,4] x) => (float[2,3,4] y) { m = Mul (x, k) g = MatMul (m, w) y = Div (g, k) }"
    model = model_of(matmul, w=flat, k=row)
    InferShapes()(model)
    assert types(rewritten(FoldAffine(), model)[0]) == ["MatMul"]
    bias = "(float[2,3,4] x) => (float[2,3,4] y) { g = MatMul (x, w) y = Add (g, k) }"
    assert types(rewritten(FoldAffine(), model_of(bias, w=flat, k=row))[0]) == ["MatMul", "Add"]


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("where", ["behind", "front"])
def test_transposed_convolutions(
    where: str, group: int, w: np.ndarray, k: np.ndarray, model_of: Build, rewritten: Build, types: Build
) -> None:
    nodes = {
        "behind": "c = ConvTranspose <group = %d> (x, w) m = Mul (c, k) y = Add (m, k)",
        "front": "m = Div (x, k) y = ConvTranspose <group = %d, pads = [1,1,1,1]> (m, w)",
    }[where]
    text = f"(float[1,4,6,6] x) => (float[1,4,N,M] y) {{ {nodes % group} }}"
    assert types(rewritten(FoldAffine(), model_of(text, w=w[:, : 4 // group], k=k))[0]) == ["ConvTranspose"]


def test_a_shift_in_front_of_a_transposed_convolution_stays(
    w: np.ndarray, k: np.ndarray, model_of: Build, rewritten: Build, types: Build
) -> None:
    text = "(float[1,4,6,6] x) => (float[1,4,N,M] y) { m = Add (x, k) y = ConvTranspose (m, w) }"
    assert types(rewritten(FoldAffine(), model_of(text, w=w, k=k))[0]) == ["Add", "ConvTranspose"]


@pytest.mark.parametrize(
    ("nodes", "left"),
    [
        ("m = Mul (x, row) y = Gemm <transA = 1> (m, w)", ["Mul", "Gemm"]),
        ("g = Gemm <transA = 1> (x, w) y = Mul (g, row)", ["Gemm"]),
        ("g = Gemm <alpha = 0.5> (x, w) y = Mul (g, row)", ["Gemm", "Mul"]),
        ("g = Gemm (x, w, square) y = Mul (g, row)", ["Gemm", "Mul"]),
        ("g = Gemm (x, w, one) y = Sub (row, g)", ["Gemm"]),
        ("g = Gemm (x, w) y = Mul (g, column)", ["Gemm", "Mul"]),
        ("g = Gemm (x, w) y = Div (row, g)", ["Gemm", "Div"]),
        ("g = Gemm (x, w) y = Mul (g, g)", ["Gemm", "Mul"]),
        ("m = Mul (row, x) y = Gemm <transB = 1> (m, w)", ["Gemm"]),
        ("m = Mul (column, x) y = Gemm (m, w)", ["Mul", "Gemm"]),
        ("g = MatMul (x, w) y = Mul (g, deep)", ["MatMul", "Mul"]),
    ],
)
def test_forms_of_gemm(
    nodes: str, left: list[str], w: np.ndarray, model_of: Build, rewritten: Build, types: Build
) -> None:
    row = np.linspace(0.5, 2, 4, dtype=np.float32)
    constants = {
        "row": row, "column": row.reshape(4, 1), "square": np.outer(row, row), "one": row[:1],
        "deep": row.reshape(1, 1, 4), "w": w[:, :, 0, 0],
    }  # fmt: skip
    words = set(nodes.replace(",", " ").replace("(", " ").replace(")", " ").split())
    rank = "A,B,C" if "deep" in nodes else "A,B"
    used = {name: array for name, array in constants.items() if name in words}
    model = model_of(f"(float[4,4] x) => (float[{rank}] y) {{ {nodes} }}", **used)
    InferShapes()(model)
    assert types(rewritten(FoldAffine(), model)[0]) == left


@pytest.mark.parametrize(("kind", "dtype"), [("float16", np.float16), ("double", np.float64)])
def test_other_floats(kind: str, dtype: type, w: np.ndarray, model_of: Build, rewritten: Build, types: Build) -> None:
    text = f"({kind}[2,4] x) => ({kind}[2,4] y) {{ g = MatMul (x, w) y = Div (g, k) }}"
    model = model_of(text, w=w[:, :, 0, 0].astype(dtype), k=np.asarray(3, dtype))
    InferShapes()(model)
    model, _ = rewritten(FoldAffine(), model)
    assert types(model) == ["MatMul"] and model.graph[0].inputs[1].const_value.numpy().dtype == dtype


@pytest.mark.parametrize("factor", [1e-6, 6e4])
def test_weights_that_float16_could_not_hold_stay(factor: float, w: np.ndarray, model_of: Build, types: Build) -> None:
    text = "(float16[2,4] x) => (float16[2,4] y) { g = MatMul (x, w) y = Mul (g, k) }"
    model = model_of(text, w=(w[:, :, 0, 0] * 4).astype(np.float16), k=np.float16(factor))
    InferShapes()(model)
    FoldAffine()(model)
    assert types(model) == ["MatMul", "Mul"]


def test_what_a_branch_reads_stays(
    w: np.ndarray, k: np.ndarray, model_of: Build, rewritten: Build, types: Build
) -> None:
    text = """(float[1,4,6,6] x, bool f) => (float[1,4,4,4] y, float[1,4,4,4] z) {
        c = Conv (x, w) y = Mul (c, k)
        z = If (f) <then_branch = t () => (float[1,4,4,4] p) { p = Neg (c) },
                    else_branch = e () => (float[1,4,4,4] q) { q = Abs (c) }> }"""
    assert "Mul" in types(rewritten(FoldAffine(), model_of(text, w=w, k=k))[0])


SCALED = "(float[B,3,4] x) => (float[B,3,N] y%s) { p = MatMul (x, m) b = %s y = Mul (b, s) %s }"


@pytest.fixture
def parts(random: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {"m": (4, 5), "b0": 5, "s": 5, "m1": (3, 4), "tokens": (3, 1)}
    return {name: (1 + random.random(shape)).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("bias", ["Add (p, b0)", "Add (b0, p)"])
def test_a_factor_behind_the_bias_of_a_matmul(
    bias: str, parts: dict[str, np.ndarray], model_of: Build, rewritten: Build, types: Build
) -> None:
    """LayerScale, as vision transformers have it."""
    used = {name: parts[name] for name in ("m", "b0", "s")}
    model, _ = rewritten(FoldAffine(), model_of(SCALED % ("", bias, ""), **used))
    assert types(model) == ["MatMul", "Add"]


@pytest.mark.parametrize(
    ("outputs", "bias", "more", "names"),
    [
        (", float[B,3,N] z", "Add (p, b0)", "z = Exp (b)", ("m", "b0", "s")),
        (", float[B,3,N] p", "Add (p, b0)", "", ("m", "b0", "s")),
        (", float[B,3,N] b", "Add (p, b0)", "", ("m", "b0", "s")),
        ("", "Sub (b0, p)", "", ("m", "b0", "s")),
        ("", "Add (p, tokens)", "", ("m", "tokens", "s")),
        (", float[B,3,N] z", "Add (p, b0)", "z = MatMul (x, m)", ("m", "b0", "s")),
    ],
)
def test_a_factor_behind_a_bias_stays_where_others_read(
    outputs: str,
    bias: str,
    more: str,
    names: tuple[str, ...],
    parts: dict[str, np.ndarray],
    model_of: Build,
    rewritten: Build,
    types: Build,
) -> None:
    model, _ = rewritten(
        FoldAffine(), model_of(SCALED % (outputs, bias, more), **{name: parts[name] for name in names})
    )
    assert "Mul" in types(model)


def test_gamma_of_a_norm_stays_where_smoothing_needs_it(
    w: np.ndarray, model_of: Build, rewritten: Build, types: Build
) -> None:
    """A factor behind γ that belongs to no norm folds all the same."""
    text = """(float[2,3,4] x) => (float[2,3,4] y) {
        square = Mul (x, x) mean = ReduceMean <axes = [-1]> (square) shifted = Add (mean, epsilon)
        root = Sqrt (shifted) ratio = Div (x, root) norm = Mul (ratio, g) %s y = MatMul (%s, w) }"""
    numbers = {"g": np.linspace(0.5, 2, 4, dtype=np.float32), "w": w[:, :, 0, 0]}
    numbers |= {"epsilon": np.array(1e-5, np.float32), "k": np.linspace(1, 2, 4, dtype=np.float32)}
    for more, read in (("", "norm"), ("more = Mul (norm, k)", "more")):
        model = model_of(text % (more, read), **{name: numbers[name] for name in numbers if name != "k" or more})
        InferShapes()(model)
        model, _ = rewritten(FoldAffine(), model)
        assert types(model) == ["Mul", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "MatMul"]
