"""What providers of phones document, rule by rule, and the forms that they take."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.backends.base import find_target
from qcompile.backends.ort.phones import coreml, qnn, xnnpack
from qcompile.backends.ort.phones.drop_absorbed import DropAbsorbed
from qcompile.backends.ort.phones.lower import PROVIDERS
from qcompile.backends.ort.phones.qnn_forms import FixRanges, UnsignMatrices
from qcompile.backends.ort.phones.quantize_constants import QuantizeConstants
from qcompile.backends.ort.phones.units import first_broken, units
from qcompile.core import runtime
from qcompile.core.errors import TargetError
from qcompile.passes.canonicalize.infer_shapes import InferShapes

Build = Callable[..., Any]

#: A quantized operator: what stands between DequantizeLinear and QuantizeLinear is each test's own.
AROUND = """(float[{shape}] x) => (float[{left}] y) {{
    q = QuantizeLinear (x, s, z) a = DequantizeLinear (q, s, z)
    {operator}
    e = QuantizeLinear (d, u, v) y = DequantizeLinear (e, u, v) }}"""
CONV = """c = DequantizeLinear <axis = 0> (w, t, o) b = DequantizeLinear <axis = 0> (k, n, m)
    d = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (a, c, b)"""
PRODUCT = "c = DequantizeLinear <axis = {axis}> (w, t, o) d = MatMul (a, c)"


@pytest.fixture
def built(model_of: Build) -> Callable[..., ir.Model]:
    """Build a quantized operator in codes of a type, with the constants that it needs."""

    def build(
        operator: str, shape: str = "1,2,4,4", left: str = "", dtype: str = "uint8", **constants: Any
    ) -> ir.Model:
        zero = np.array(0 if dtype.startswith("int") else np.iinfo(dtype).max // 2 + 1, dtype)
        given = {"s": np.float32(0.05), "z": zero, "u": np.float32(0.1), "v": zero} | constants
        text = AROUND.format(shape=shape, left=left or shape, operator=operator)
        return InferShapes()(model_of(text, 21, **given)).model

    return build


def convolution(built: Build, dtype: str = "uint8", weights: str = "int8", **changes: Any) -> ir.Model:
    steps = np.array([0.01, 0.02, 0.03], np.float32)
    given = {"w": np.ones((3, 2, 3, 3), weights), "t": steps, "o": np.zeros(3, weights)}
    given |= {"k": np.array([5, -6, 7], np.int32), "n": np.float32(0.05) * steps, "m": np.zeros(3, np.int32)}
    return built(CONV, left="1,3,4,4", dtype=dtype, **(given | changes))


def product(built: Build, dtype: str = "uint8", weights: str = "uint8", axis: int = 0, channels: int = 1) -> ir.Model:
    shape = () if channels == 1 else (channels,)
    given = {"w": np.ones((4, 3), weights), "t": np.full(shape, 0.01, np.float32), "o": np.zeros(shape, weights)}
    return built(PRODUCT.format(axis=axis), "2,4", "2,3", dtype, **given)


def broken(model: ir.Model, rules: tuple[Any, ...]) -> list[tuple[str, str]]:
    """Return what the units of a model break, in their order."""
    return [found for unit in units(model) if (found := first_broken(unit, rules))[0]]


class TestQnn:
    """The rules of Qualcomm's provider, one by one."""

    def rule(self, model: ir.Model) -> str:
        found = broken(model, qnn.RULES)
        return found[0][0] if found else ""

    def test_a_convolution_with_a_scale_per_channel_is_taken(self, built: Build) -> None:
        assert self.rule(convolution(built)) == ""

    def test_an_operator_that_is_not_listed(self, built: Build) -> None:
        assert self.rule(built("d = Erf (a)")) == "operator"
        assert self.rule(built("d = Sigmoid (a)")) == ""

    def test_control_flow(self, model_of: Build) -> None:
        text = """(bool c, float[2] x) => (float[2] y) {
            y = If (c) <then_branch = t () => (float[2] a) { a = Neg (x) },
                        else_branch = e () => (float[2] b) { b = Abs (x) }> }"""
        rules = [rule for rule in qnn.RULES if rule.name == "no subgraphs"]
        assert broken(model_of(text, 21), tuple(rules)) == [("no subgraphs", "it has a subgraph")]

    def test_open_shapes(self, built: Build) -> None:
        model = built("d = Sigmoid (a)", "N,4")
        [(rule, why)] = broken(model, qnn.RULES)
        assert rule == "static shapes" and "'a' has the open shape" in why

    def test_floats_beside_codes(self, model_of: Build) -> None:
        text = """(float[2,4] x) => (float[2,4] y) { q = QuantizeLinear (x, s, z) a = DequantizeLinear (q, s, z)
            y = Sigmoid (a) }"""
        model = InferShapes()(model_of(text, 21, s=np.float32(0.1), z=np.uint8(3))).model
        assert broken(model, qnn.RULES) == [("all in codes", "it leaves 'y' in float")]
        plain = InferShapes()(model_of("(float[2,4] x) => (float[2,4] y) { y = Sigmoid (x) }", 21)).model
        assert broken(plain, qnn.RULES) == [("all in codes", "it reads 'x' in float")]

    @pytest.mark.parametrize(("dtype", "rule"), [("uint8", ""), ("uint16", ""), ("int8", "activations")])
    def test_the_type_of_activations(self, built: Build, dtype: str, rule: str) -> None:
        assert self.rule(built("d = Add (a, a)", dtype=dtype)) == rule

    def test_an_activation_with_a_scale_per_channel(self, built: Build) -> None:
        scale, zero = np.array([0.1, 0.2], np.float32), np.zeros(2, np.uint8)
        model = built("p = QuantizeLinear <axis = 1> (a, f, g) r = DequantizeLinear <axis = 1> (p, f, g) d = Relu (r)",
                      f=scale, g=zero)  # fmt: skip
        assert self.rule(model) == "activations"

    def test_weights_with_a_scale_per_channel_are_around_zero(self, built: Build) -> None:
        assert self.rule(convolution(built, o=np.ones(3, np.int8))) == "weights"
        assert self.rule(convolution(built, weights="uint8", o=np.zeros(3, np.uint8))) == "weights"

    def test_a_matrix_has_one_scale(self, built: Build) -> None:
        assert self.rule(product(built)) == ""
        assert self.rule(product(built, axis=1, channels=3)) == "weights"

    @pytest.mark.parametrize(
        ("dtype", "weights", "rule"),
        [("uint8", "uint8", ""), ("uint16", "uint8", ""), ("uint8", "uint16", ""), ("uint8", "int8", "products"),
         ("uint16", "uint16", "products")],
    )  # fmt: skip
    def test_what_a_product_multiplies(self, built: Build, dtype: str, weights: str, rule: str) -> None:
        assert self.rule(product(built, dtype, weights)) == rule

    def test_the_steps_of_a_bias(self, built: Build) -> None:
        assert self.rule(convolution(built, n=np.full(3, 0.001, np.float32))) == "bias"
        assert self.rule(convolution(built, m=np.ones(3, np.int32))) == "bias"

    @pytest.mark.parametrize(("operator", "scale", "zero"), [("Sigmoid", 1 / 65536, 0), ("Tanh", 1 / 32768, 32768)])
    def test_ranges_of_16_bits_that_are_fixed(self, built: Build, operator: str, scale: float, zero: int) -> None:
        text = f"d = {operator} (a)"
        right = {"u": np.float32(scale), "v": np.uint16(zero)}
        assert self.rule(built(text, dtype="uint16", **right)) == ""
        assert self.rule(built(text, dtype="uint16")) == "fixed ranges"
        assert self.rule(built(text)) == ""

    def test_what_moves_codes_leaves_them(self, built: Build) -> None:
        text = "d = Transpose <perm = [1, 0]> (a)"
        assert self.rule(built(text, "2,4", "4,2")) == "same codes"
        assert self.rule(built(text, "2,4", "4,2", u=np.float32(0.05))) == ""

    @pytest.mark.parametrize(("index", "rule"), [(-1, "indices"), (1, "")])
    def test_indices_from_the_end(self, built: Build, index: int, rule: str) -> None:
        model = built("d = Gather <axis = 0> (a, i)", "4,3", "1,3", i=np.array([index], np.int64))
        assert self.rule(model) == rule


class TestXnnpack:
    """The rules of the XNNPACK provider, one by one."""

    def rule(self, model: ir.Model) -> str:
        found = broken(model, xnnpack.RULES)
        return found[0][0] if found else ""

    def test_an_operator_that_is_not_listed(self, built: Build) -> None:
        assert self.rule(built("d = Add (a, a)", dtype="int8")) == "operator"

    @pytest.mark.parametrize(
        ("dtype", "weights", "rule"),
        [("int8", "int8", ""), ("uint8", "int8", "products"), ("int8", "uint8", "products")],
    )
    def test_what_a_convolution_multiplies(self, built: Build, dtype: str, weights: str, rule: str) -> None:
        assert self.rule(convolution(built, dtype, weights, o=np.zeros(3, weights))) == rule

    def test_scales_per_channel_are_of_signed_codes_around_zero(self, built: Build) -> None:
        assert self.rule(convolution(built, "int8", o=np.ones(3, np.int8))) == "products"
        unsigned = {"t": np.float32(0.01), "o": np.uint8(3), "n": np.float32(0.05) * np.full(3, 0.01, np.float32)}
        assert self.rule(convolution(built, "uint8", "uint8", **unsigned)) == ""
        assert self.rule(convolution(built, "uint8", "uint8")) == "products"

    def test_the_steps_of_a_bias(self, built: Build) -> None:
        assert self.rule(convolution(built, "int8", n=np.full(3, 0.001, np.float32))) == "bias"

    @pytest.mark.parametrize(
        ("shape", "rule"), [("float[1,2,8]", "images"), ("float[1,2,H,8]", "images"), ("float[N,2,8,8]", "")]
    )
    def test_images_have_two_sides_that_are_known(self, model_of: Build, shape: str, rule: str) -> None:
        window = "[2]" if shape.count(",") == 2 else "[2, 2]"
        left = shape.replace("8", "7").replace("H", "G")
        text = f"({shape} x) => ({left} y) {{ y = MaxPool <kernel_shape = {window}> (x) }}"
        assert self.rule(InferShapes()(model_of(text, 21)).model) == rule

    @pytest.mark.parametrize(
        ("attributes", "rule"),
        [("kernel_shape = [2, 2]", ""), ("kernel_shape = [1, 1]", "pools"),
         ("kernel_shape = [2, 2], ceil_mode = 1", "pools"),
         ("kernel_shape = [2, 2], auto_pad = \"SAME_LOWER\"", "padding")],
    )  # fmt: skip
    def test_pools(self, model_of: Build, attributes: str, rule: str) -> None:
        text = f"(float[1,2,8,8] x) => (float[1,2,G,H] y) {{ y = MaxPool <{attributes}> (x) }}"
        assert self.rule(InferShapes()(model_of(text, 21)).model) == rule

    @pytest.mark.parametrize(
        ("dtype", "count", "rule"),
        [("uint8", 1, ""), ("uint8", 0, "average"), ("int8", 1, "average"), ("", 0, ""), ("", 1, "average")],
    )
    def test_averages(self, built: Build, model_of: Build, dtype: str, count: int, rule: str) -> None:
        pool = f"AveragePool <kernel_shape = [2, 2], count_include_pad = {count}>"
        if dtype:
            assert self.rule(built(f"d = {pool} (a)", left="1,2,3,3", dtype=dtype)) == rule
        else:
            text = f"(float[1,2,4,4] x) => (float[1,2,3,3] y) {{ y = {pool} (x) }}"
            assert self.rule(InferShapes()(model_of(text, 21)).model) == rule

    @pytest.mark.parametrize(("text", "rule"), [
        ("(float[2,4] x) => (float[2,3] y) { y = MatMul (x, w) }", ""),
        ("(float[5,2,4] x) => (float[5,2,3] y) { y = MatMul (x, w) }", "matrices"),
        ("(float[2,4] x, float[4,3] v) => (float[2,3] y) { y = MatMul (x, v) }", "matrices"),
    ])  # fmt: skip
    def test_matrices(self, model_of: Build, text: str, rule: str) -> None:
        model = model_of(text, 21, w=np.ones((4, 3), np.float32))
        assert self.rule(InferShapes()(model).model) == rule

    def test_matrices_in_codes(self, built: Build) -> None:
        assert self.rule(product(built, "int8", "int8")) == "matrices"

    def test_weights_that_are_not_constant(self, model_of: Build) -> None:
        text = "(float[1,2,4,4] x, float[3,2,1,1] w) => (float[1,3,4,4] y) { y = Conv (x, w) }"
        assert self.rule(InferShapes()(model_of(text, 21)).model) == "constants"

    @pytest.mark.parametrize(("axis", "rule"), [(-1, ""), (1, ""), (0, "softmax")])
    def test_the_axis_of_a_softmax(self, model_of: Build, axis: int, rule: str) -> None:
        text = f"(float[2,4] x) => (float[2,4] y) {{ y = Softmax <axis = {axis}> (x) }}"
        assert self.rule(InferShapes()(model_of(text, 21)).model) == rule

    def test_a_pool_leaves_the_codes_that_it_reads(self, built: Build) -> None:
        text = "d = MaxPool <kernel_shape = [2, 2]> (a)"
        assert self.rule(built(text, left="1,2,3,3", dtype="int8")) == "same codes"
        assert self.rule(built(text, left="1,2,3,3", dtype="int8", u=np.float32(0.05))) == ""


class TestCoreml:
    """The rules of Apple's provider, one by one."""

    def rule(self, model: ir.Model) -> str:
        found = broken(InferShapes()(model).model, coreml.RULES)
        return found[0][0] if found else ""

    def test_what_is_listed_is_what_onnxruntime_ships_as_a_list(self) -> None:
        import onnxruntime.tools.mobile_helpers as shipped

        text = (Path(shipped.__file__).parent / "coreml_supported_mlprogram_ops.md").read_text(encoding="utf-8")
        listed = set(re.findall(r"ai\.onnx:(\w+)", text)) - {"Argmax"} | {"ArgMax"}
        assert set(coreml.OPERATORS) <= listed

    @pytest.mark.parametrize(("operator", "rule"), [("Erf", ""), ("HardSwish", "operator"), ("Sigmoid", "")])
    def test_an_operator_that_is_not_listed(self, model_of: Build, operator: str, rule: str) -> None:
        assert self.rule(model_of(f"(float[4] x) => (float[4] y) {{ y = {operator} (x) }}", 21)) == rule

    @pytest.mark.parametrize(("axes", "rule"), [("1,2,8", "ranks"), ("1,2,8,8", ""), ("1,2,8,8,8", "ranks")])
    def test_pools_are_of_images(self, model_of: Build, axes: str, rule: str) -> None:
        ones = ",".join(["1"] * (axes.count(",") - 1))
        text = f"(float[{axes}] x) => (float[1,2,{ones}] y) {{ y = GlobalAveragePool (x) }}"
        assert self.rule(model_of(text, 21)) == rule

    @pytest.mark.parametrize(("text", "rule"), [
        ("(float[2,4] x) => (float[2,3] y) { y = Gemm (x, w) }", ""),
        ("(float[2,4] x, float[4,3] v) => (float[2,3] y) { y = Gemm (x, v) }", "constants"),
        ("(float[2,4] x) => (float[2,3] y) { c = Cast <to = 1> (q) d = Mul (c, f) y = Gemm (x, d) }", ""),
    ])  # fmt: skip
    def test_matrices_are_constant_or_unpacked_when_the_model_is_loaded(
        self, model_of: Build, text: str, rule: str
    ) -> None:
        given = {"w": np.ones((4, 3), np.float32), "q": np.ones((4, 3), np.int8), "f": np.ones(3, np.float32)}
        model = model_of(
            text, 21, **{name: array for name, array in given.items() if f"{name})" in text or f"({name}" in text}
        )
        units_of = [unit for unit in units(InferShapes()(model).model) if unit.node.op_type == "Gemm"]
        assert first_broken(units_of[0], coreml.RULES)[0] == rule

    def test_a_power_is_of_float32(self, model_of: Build) -> None:
        half = model_of("(float16[4] x, float16[4] e) => (float16[4] y) { y = Pow (x, e) }", 21)
        assert self.rule(half) == "types"
        assert self.rule(model_of("(float[4] x, float[4] e) => (float[4] y) { y = Pow (x, e) }", 21)) == ""

    @pytest.mark.parametrize(("dtype", "rule"), [("float", ""), ("int64", "types")])
    def test_the_branches_of_where(self, model_of: Build, dtype: str, rule: str) -> None:
        text = f"(bool[4] c, {dtype}[4] a, {dtype}[4] b) => ({dtype}[4] y) {{ y = Where (c, a, b) }}"
        assert self.rule(model_of(text, 21)) == rule

    @pytest.mark.parametrize(("batches", "left", "rule"), [(0, "2,3,4", ""), (1, "2,4", "batch_dims")])
    def test_gathering_in_batches(self, model_of: Build, batches: int, left: str, rule: str) -> None:
        text = f"(float[2,3,4] x, int64[2,1] i) => (float[{left}] y) {{ y = GatherND <batch_dims = {batches}> (x, i) }}"
        assert self.rule(model_of(text, 21)) == rule

    @pytest.mark.parametrize(("attributes", "rule"), [
        ("", ""), ("auto_pad = \"SAME_UPPER\"", "transposed"),
        ("output_padding = [1, 1], strides = [2, 2]", "transposed"),
    ])  # fmt: skip
    def test_transposed_convolutions(self, model_of: Build, attributes: str, rule: str) -> None:
        text = f"(float[1,2,4,4] x) => (float[1,3,A,B] y) {{ y = ConvTranspose <{attributes}> (x, w) }}"
        text = text.replace("<>", "")
        assert self.rule(model_of(text, 21, w=np.ones((2, 3, 2, 2), np.float32))) == rule

    def test_only_what_it_has_is_halved(self) -> None:
        target, backend = find_target("coreml")
        halvable = {name: backend.halvable(ir.node(name, []), target) for name in ("Conv", "Pow", "HardSwish")}
        assert halvable == {"Conv": True, "Pow": False, "HardSwish": False}


def run(model: ir.Model, seed: int = 0) -> np.ndarray:
    feeds = runtime.synthetic_feeds(model, seed)
    return runtime.Session(model, optimize=False).run(feeds)["y"]


class TestForms:
    """Each form computes what the model did, and leaves alone what it must not touch."""

    @pytest.mark.parametrize(
        ("text", "zero", "drops"),
        [("c = Abs (a) d = Relu (c)", 0, True), ("c = Abs (a) d = Relu (c)", 9, False), ("d = Relu (a)", 0, False),
         ("c = Abs (a) d = Clip (c, low, high)", 0, True), ("c = Abs (a) d = Clip (c, low, less)", 0, False)],
    )  # fmt: skip
    def test_an_activation_is_dropped_where_codes_end(self, built: Build, text: str, zero: int, drops: bool) -> None:
        bounds = {"low": np.float32(0.0), "high": np.float32(25.5), "less": np.float32(6.0)}
        model = built(text, v=np.uint8(zero), **{name: bounds[name] for name in bounds if name in text})
        before = run(model)
        assert DropAbsorbed()(model).modified is drops
        assert not DropAbsorbed()(model).modified and np.array_equal(run(model), before)

    def test_an_activation_that_others_read_stays(self, model_of: Build) -> None:
        text = """(float[4] x) => (float[4] y, float[4] r) {
            c = Abs (x) r = Relu (c) e = QuantizeLinear (r, u, v) y = DequantizeLinear (e, u, v) }"""
        assert not DropAbsorbed()(model_of(text, 21, u=np.float32(0.1), v=np.uint8(0))).modified

    def test_a_constant_of_a_quantized_operator_gets_codes(self, built: Build, random: np.random.Generator) -> None:
        constant = random.normal(size=(1, 2, 1, 1)).astype(np.float32)
        model = built("d = Mul (a, f)", f=constant)
        before = run(model)
        assert QuantizeConstants()(model).modified and not QuantizeConstants()(model).modified
        [unit] = units(model)
        codes = unit.inputs[1]
        assert codes is not None and codes.constant is not None and codes.dtype == "uint8"
        step = float(codes.scale[0])
        real = step * (codes.constant.astype(np.float64) - codes.zero_point)
        assert np.abs(real - constant).max() <= step / 2 * 1.001 and step == pytest.approx(
            np.ptp([*constant.ravel(), 0]) / 255
        )
        assert np.abs(run(model) - before).max() <= 0.05 * 128 * step / 2 + 0.1001
        assert broken(model, qnn.RULES) == []

    @pytest.mark.parametrize("text", ["d = Clip (a, low, high)", "d = Pad (a, pads, low)"])
    def test_bounds_and_settings_stay(self, built: Build, text: str) -> None:
        given = {"low": np.float32(0.0), "high": np.float32(3.0), "pads": np.zeros(8, np.int64)}
        model = built(text, **{name: given[name] for name in given if name in text})
        assert not QuantizeConstants()(model).modified

    def test_constants_of_floats_stay(self, model_of: Build) -> None:
        model = model_of("(float[4] x) => (float[4] y) { y = Mul (x, f) }", 21, f=np.ones(4, np.float32))
        assert not QuantizeConstants()(model).modified

    def test_matrices_lose_their_sign_and_nothing_else(self, built: Build, random: np.random.Generator) -> None:
        model = product(built, weights="int8")
        value = model.graph.initializers["w"]
        value.const_value = ir.tensor(random.integers(-127, 128, (4, 3)).astype(np.int8))
        before = run(model)
        assert UnsignMatrices()(model).modified and not UnsignMatrices()(model).modified
        assert np.array_equal(run(model), before) and broken(model, qnn.RULES) == []
        assert not UnsignMatrices()(convolution(built)).modified
        assert not UnsignMatrices()(product(built, weights="int8", axis=1, channels=3)).modified

    def test_fixed_ranges_reach_what_moves_them(self, built: Build) -> None:
        text = """b = Sigmoid (a) f = QuantizeLinear (b, u, v) g = DequantizeLinear (f, u, v)
            d = Transpose <perm = [1, 0]> (g)"""
        model = built(text, "2,4", "4,2", dtype="uint16", u=np.float32(2e-5), v=np.uint16(7))
        before = run(model)
        assert FixRanges()(model).modified and broken(model, qnn.RULES) == []
        assert np.abs(run(model) - before).max() <= 2e-5
        assert not FixRanges()(built("d = Sigmoid (a)")).modified


def test_a_model_with_open_shapes_is_refused(model_of: Build) -> None:
    model = model_of("(float[N,T] x) => (float[N,T] y) { y = Sigmoid (x) }", 21)
    with pytest.raises(TargetError, match=r"'x'.*--shape x=1x"):
        PROVIDERS["qnn"].legalized(model)
    batch = InferShapes()(model_of("(float[N,4] x) => (float[N,4] y) { y = Sigmoid (x) }", 21)).model
    assert list(PROVIDERS["qnn"].legalized(batch).graph.outputs[0].shape or ()) == [1, 4]
    assert list(PROVIDERS["xnnpack"].legalized(model).graph.inputs[0].shape or ())[1] != 1


@pytest.mark.parametrize("name", ["qnn", "xnnpack"])
def test_what_a_target_quantizes_its_provider_has(name: str) -> None:
    """XNNPACK leaves what stands between convolutions to the runtime's own kernels for CPUs."""
    target, _ = find_target(name)
    if name == "qnn":
        assert set(target.ops) <= set(qnn.OPERATORS)
    else:
        assert {op for op, rule in target.ops.items() if rule.kind in ("linear", "packed")} <= set(xnnpack.OPERATORS)
