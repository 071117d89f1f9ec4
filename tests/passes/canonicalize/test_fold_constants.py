from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

from qcompile.core import model as models
from qcompile.passes.canonicalize.fold_constants import SIZE_LIMIT, FoldConstants

Build = Callable[..., Any]


def test_arithmetic_on_constants_is_done(model_of: Build, rewritten: Build, types: Build) -> None:
    text = """(float[2,3] x) => (float[2,3] y) {
        a = Add (u, v)
        b = Sqrt (a)
        y = Mul (x, b)
    }"""
    model, _ = rewritten(FoldConstants(), model_of(text, u=np.float32([1, 2, 3]), v=np.float32([3, 7, 13])))
    assert types(model) == ["Mul"]
    [value] = model.graph.initializers.values()
    assert value.const_value.numpy().tolist() == [2, 3, 4]


def test_constant_nodes_become_initializers(model_of: Build, rewritten: Build, types: Build) -> None:
    text = "(float[2] x) => (float[2] y) { c = Constant <value = float[2] {1, 2}> () y = Add (x, c) }"
    model, _ = rewritten(FoldConstants(), model_of(text))
    assert types(model) == ["Add"]
    assert model.graph[0].inputs[1].is_initializer()


@pytest.mark.parametrize("form", ["value_float = 2.0", "value_floats = [2.0]"])
def test_other_forms_of_constant_nodes(form: str, model_of: Build, rewritten: Build, types: Build) -> None:
    model, _ = rewritten(
        FoldConstants(), model_of(f"(float[1] x) => (float[1] y) {{ c = Constant <{form}> () y = Mul (x, c) }}")
    )
    assert types(model) == ["Mul"]


def test_a_shape_computation_that_exporters_write_disappears(model_of: Build, rewritten: Build, types: Build) -> None:
    text = """(float[2,3,4] x) => (float[2,12] y) {
        s = Shape (x)
        n = Gather <axis = 0> (s, zero)
        u = Unsqueeze (n, axes)
        shape = Concat <axis = 0> (u, rest)
        y = Reshape (x, shape)
    }"""
    weights = {"zero": np.int64(0), "axes": np.int64([0]), "rest": np.int64([-1])}
    model, _ = rewritten(FoldConstants(), model_of(text, **weights))
    assert types(model) == ["Reshape"]


def test_an_open_axis_keeps_its_shape_computation(model_of: Build, rewritten: Build, types: Build) -> None:
    text = """(float[N,3,4] x) => (float[N,12] y) {
        s = Shape (x)
        n = Gather <axis = 0> (s, zero)
        u = Unsqueeze (n, axes)
        shape = Concat <axis = 0> (u, rest)
        y = Reshape (x, shape)
    }"""
    weights = {"zero": np.int64(0), "axes": np.int64([0]), "rest": np.int64([-1])}
    model, _ = rewritten(FoldConstants(), model_of(text, **weights), {"x": np.ones((5, 3, 4), np.float32)})
    assert "Reshape" in types(model)


@pytest.mark.parametrize("inputs", ["x", "x, ratio", "x, ratio, training"])
def test_dropout_disappears(inputs: str, model_of: Build, rewritten: Build, types: Build) -> None:
    text = f"(float[2,3] x) => (float[2,3] y) {{ d = Dropout ({inputs}) y = Neg (d) }}"
    model = model_of(text, ratio=np.float32(0.5), training=np.array(False))
    assert types(rewritten(FoldConstants(), model)[0]) == ["Neg"]


def test_dropout_whose_mask_is_read_keeps_its_function(model_of: Build, rewritten: Build) -> None:
    rewritten(
        FoldConstants(),
        model_of("(float[2,3] x) => (float[2,3] y, bool[2,3] mask) { d, mask = Dropout (x) y = Neg (d) }"),
    )


def test_a_dropout_that_trains_stays(model_of: Build, types: Build) -> None:
    text = "(float[2,3] x) => (float[2,3] y) { y = Dropout (x, ratio, training) }"
    model = model_of(text, ratio=np.float32(0.5), training=np.array(True))
    FoldConstants()(model)
    assert types(model) == ["Dropout"]


def test_quantize_and_dequantize_of_constants_stay(model_of: Build, rewritten: Build, types: Build) -> None:
    text = """(float[1,4] x) => (float[1,4] y) {
        q = QuantizeLinear (w, s, z)
        d = DequantizeLinear (q, s, z)
        e = DequantizeLinear (codes, s, z)
        t = MatMul (x, d)
        y = MatMul (t, e)
    }"""
    weights = {"w": np.eye(4, dtype=np.float32), "codes": np.eye(4, dtype=np.int8)}
    model, _ = rewritten(FoldConstants(), model_of(text, s=np.float32(0.5), z=np.int8(0), **weights))
    assert sorted(types(model)) == ["DequantizeLinear", "DequantizeLinear", "MatMul", "MatMul", "QuantizeLinear"]


def large(text: str, model_of: Build) -> Any:
    rows = SIZE_LIMIT // 4 // 64 + 1
    return model_of(text, w=np.random.default_rng(0).standard_normal((rows, 64)).astype(np.float32))


def test_a_large_weight_is_transposed_for_it_stays_as_large(model_of: Build, types: Build) -> None:
    model = large("(float[1,64] x) => (float[1,N] y) { t = Transpose <perm = [1,0]> (w) y = MatMul (x, t) }", model_of)
    before = models.initializer_bytes(model)
    assert before > SIZE_LIMIT
    FoldConstants()(model)
    assert types(model) == ["MatMul"]
    assert models.initializer_bytes(model) == before


def test_a_large_weight_is_not_expanded(model_of: Build, rewritten: Build, types: Build) -> None:
    text = f"""(float[2,{SIZE_LIMIT}] x) => (float[2,{SIZE_LIMIT}] y) {{ e = Expand (one, shape) y = Add (x, e) }}"""
    model = model_of(text, one=np.float32([1]), shape=np.int64([2, SIZE_LIMIT]))
    FoldConstants()(model)
    assert models.initializer_bytes(model) < 100
    assert types(model) in (["Expand", "Add"], ["Add"])


def test_chains_from_constant_of_shape_are_folded(model_of: Build, rewritten: Build, types: Build) -> None:
    text = """(float[1,2,4,4] x) => (float[1,2,N,M] y) {
        zeros = ConstantOfShape <value = int64[1] {0}> (two)
        half = Concat <axis = 0> (zeros, ends)
        pads = Concat <axis = 0> (half, half)
        y = Pad (x, pads)
    }"""
    model, _ = rewritten(FoldConstants(), model_of(text, two=np.int64([2]), ends=np.int64([1, 1])))
    assert types(model) == ["Pad"]
    assert model.graph[0].inputs[1].const_value.numpy().tolist() == [0, 0, 1, 1, 0, 0, 1, 1]


def test_a_huge_constant_of_shape_is_not_folded(model_of: Build, types: Build) -> None:
    text = "(float[1] x) => (float[N] y) { big = ConstantOfShape (shape) y = Add (x, big) }"
    for elements, expected in ((SIZE_LIMIT // 8, ["Add"]), (SIZE_LIMIT // 8 + 1, ["ConstantOfShape", "Add"])):
        model = model_of(text, shape=np.int64([elements]))
        FoldConstants()(model)
        assert types(model) == expected


def test_a_constant_of_shape_of_an_input_stays(model_of: Build, rewritten: Build, types: Build) -> None:
    text = "(int64[1] shape, float[1] x) => (float[N] y) { zeros = ConstantOfShape (shape) y = Add (x, zeros) }"
    model, _ = rewritten(FoldConstants(), model_of(text), {"shape": np.int64([3])})
    assert types(model) == ["ConstantOfShape", "Add"]


def test_a_default_that_a_caller_may_replace_is_not_folded(model_of: Build, rewritten: Build, types: Build) -> None:
    text = "(float[2] x, float[2] k) => (float[2] y) { e = Exp (k) y = Mul (x, e) }"
    model, _ = rewritten(FoldConstants(), model_of(text, k=np.float32([1, 2])), {"k": np.float32([3, -1])})
    assert types(model) == ["Exp", "Mul"]


def test_random_numbers_are_not_folded(model_of: Build, types: Build) -> None:
    model = model_of("(float[2] x) => (float[2] y) { r = RandomNormal <shape = [2]> () y = Add (x, r) }")
    FoldConstants()(model)
    assert types(model) == ["RandomNormal", "Add"]


def test_a_constant_that_is_a_graph_output(model_of: Build, rewritten: Build) -> None:
    text = "(float[2] x) => (float[2] y, float[2] c) { c = Exp (k) y = Add (x, c) }"
    model, _ = rewritten(FoldConstants(), model_of(text, k=np.float32([1, 2])))
    assert [value.name for value in model.graph.outputs] == ["y", "c"]


def test_a_constant_that_is_read_by_two(model_of: Build, rewritten: Build, types: Build) -> None:
    text = "(float[2] x) => (float[2] y, float[2] z) { c = Exp (k) y = Add (x, c) z = Mul (x, c) }"
    model, _ = rewritten(FoldConstants(), model_of(text, k=np.float32([1, 2])))
    assert types(model) == ["Add", "Mul"]
    assert model.graph[0].inputs[1] is model.graph[1].inputs[1]


def test_functions_are_inlined(proto_of: Build, rewritten: Build, types: Build) -> None:
    text = """<ir_version: 10, opset_import: ["" : 17, "local" : 1]>
    g (float[2] x) => (float[2] y) { y = local.twice (x) }
    <domain: "local", opset_import: ["" : 17]> twice (a) => (b) { b = Add (a, a) }"""
    model = models.from_proto(onnx.parser.parse_model(text))
    assert types(rewritten(FoldConstants(), model)[0]) == ["Add"]
    assert not model.clone().functions or types(model) == ["twice"]


def test_an_if_on_an_input_stays_and_one_on_a_constant_does_not(
    model_of: Build, rewritten: Build, types: Build
) -> None:
    text = """(bool c, float[2] x) => (float[2] y) {
        y = If (c) <then_branch = t () => (float[2] a) { e = Exp (k) a = Add (x, e) },
                    else_branch = f () => (float[2] b) { b = Neg (x) }>
    }"""
    for branch in (True, False):
        model, _ = rewritten(FoldConstants(), model_of(text, k=np.float32([1, 2])), {"c": np.array(branch)})
        assert types(model)[0] == "If" and {"Add", "Neg"} <= set(types(model))
    text = text.replace("bool c, ", "").replace("If (c)", "If (always)")
    model, _ = rewritten(FoldConstants(), model_of(text, k=np.float32([1, 2]), always=np.array(True)))
    assert types(model) == ["Add"]


def test_what_is_removed_with_a_branch_reads_nothing_any_more(model_of: Build) -> None:
    text = """(float[2] x) => (float[2] y) {
        h = Exp (x)
        y = If (always) <then_branch = t () => (float[2] a) { a = Neg (x) },
                         else_branch = e () => (float[2] b) { k = Mul (h, w) b = Add (k, x) }>
    }"""
    model = model_of(text, always=np.array(True), w=np.ones(2, np.float32))
    FoldConstants()(model)
    assert [node.op_type for node in model.graph] == ["Neg"]
    assert [reader.op_type for reader in model.graph.inputs[0].consumers()] == ["Neg"]


@pytest.mark.parametrize("opset", [9, 11, 13])
def test_older_opsets(opset: int, model_of: Build, rewritten: Build, types: Build) -> None:
    text = "(float[2,2] x) => (float[2,2] y) { a = Transpose <perm = [1,0]> (w) b = Add (a, a) y = MatMul (x, b) }"
    model, _ = rewritten(FoldConstants(), model_of(text, opset, w=np.float32([[1, 2], [3, 4]])))
    assert types(model) == ["MatMul"]


def test_a_value_that_only_a_removed_branch_read_goes_with_it(model_of: Build, types: Build) -> None:
    text = """(float[2] x, bool f) => (float[2] y) {
        a = Exp (x)
        b = If (f) <then_branch = t () => (float[2] p) { p = Relu (a) },
                    else_branch = e () => (float[2] q) { q = Neg (a) }>
        y = Abs (x)
    }"""
    model = model_of(text)
    FoldConstants()(model)
    assert types(model) == ["Abs"]
    assert [use.node.op_type for use in model.graph.inputs[0].uses()] == ["Abs"]
