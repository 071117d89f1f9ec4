"""The bugs that `planted_bugs.py` plants: one line of a pass each, as it stands and as it is changed to."""

from __future__ import annotations

from dataclasses import dataclass

AFFINE = "qcompile.passes.canonicalize.fold_affine"
BATCH_NORM = "onnxscript.rewriter.rules.common._fuse_batchnorm"
PADS = "onnxscript.rewriter.rules.common._fuse_pad_into_conv"
RULES = "qcompile.passes.canonicalize"
PASSES = "qcompile.passes"
ORT = "qcompile.backends.ort"
INTEGER = "qcompile.backends.integer"


@dataclass(frozen=True)
class Bug:
    """One planted bug.

    Parameters
    ----------
    stage : str
        The pass, or what stands for one.
    what : str
        In words.
    model : str
        By its name in `planted_models.SUBJECTS`.
    place : str
        The function, as ``module:name``.
    old, new : str
        A part of its source, and what that becomes; ``planted`` counts that it runs.
    applied : bool
        It is planted only while the pipeline applies the pass.
    """

    stage: str
    what: str
    model: str
    place: str
    old: str
    new: str
    applied: bool = False


def _of(stage: str, model: str, place: str, *bugs: tuple[str, str, str, str], applied: bool = False) -> list[Bug]:
    return [Bug(stage, what, model, f"{place}{name}", old, new, applied) for what, name, old, new in bugs]


CANONICALIZE = [
    *_of(
        "Canonicalize", "images", AFFINE,
        ("a shift in front of a Conv, with the other sign", ":_response",
         "wide.sum(", "planted(-wide).sum("),
        ("a factor along the input channels instead of the output's", ":_spread",
         "axis = structure.weight_axis(node)", "axis = planted(1 - structure.weight_axis(node))"),
        ("a factor that the bias does not get", ":_fold_behind",
         "_bias(node, channels) * (1.0 if factor is None else factor)", "planted(_bias(node, channels))"),
        ("division read as multiplication", ":_affine", "1.0 / wide", "planted(wide)"),
        ("subtraction read as addition", ":_affine",
         "Affine(source, None, -wide)", "Affine(source, None, planted(wide))"),
    ),
    *_of(
        "Canonicalize", "images", BATCH_NORM,
        ("the variance without its root", ":_FuseBatchNormBase.rewrite",
         "np.sqrt(input_var + eps)", "planted(input_var + eps)"),
        ("the mean added instead of taken off", ":_FuseBatchNormBase.rewrite",
         "gemm_beta * original_bias - input_mean", "gemm_beta * original_bias + planted(input_mean)"),
    ),
    *_of(
        "Canonicalize", "images", "",
        ("padding of rows and columns exchanged", f"{PADS}:_FuseConvPadBase.rewrite",
         "pad_pads[2:x_rank] + pad_pads[x_rank + 2 :]",
         "planted(pad_pads[2:x_rank][::-1] + pad_pads[x_rank + 2 :][::-1])"),
        ("the outer of two Clips dropped", f"{RULES}.join_clips:_joined",
         "min(max(bound, outer[0]), outer[1])", "planted(bound)"),
        ("factors added instead of multiplied", f"{RULES}.join_factors:JoinFactors.call",
         "inner[2] * outer[2]", "planted(inner[2] + outer[2])"),
        ("weights of a Gemm transposed", f"{RULES}.join_matmul_add:JoinMatMulAdd.call",
         "[*node.inputs, bias], name", "[*node.inputs, planted(bias)], {'transB': 1}, name"),
        ("alpha divided by", f"{RULES}.plain_gemm:_fold_alpha",
         "weights.astype(np.float64) * alpha", "planted(weights.astype(np.float64) / alpha)"),
        ("beta dropped", f"{RULES}.plain_gemm:_flatten_bias",
         "bias.astype(np.float64) * beta", "planted(bias.astype(np.float64))"),
        ("a constant permuted the wrong way round", f"{RULES}.permute:_constants",
         "full.transpose(back)", "planted(full.transpose(p))"),
        ("a Transpose taken for a view", f"{RULES}.merge_views:_is_view",
         "return order == sorted(order)", "return planted(True)"),
        ("the inner of two Slices dropped", f"{RULES}.remove_trivial_moves:_join_slices",
         "joined = inner | outer", "joined = planted(outer)"),
        ("parts of a Concat in the other order", f"{RULES}.remove_trivial_moves:_join_concats",
         "parts.extend(inner.inputs if", "parts.extend(planted(inner.inputs[::-1]) if"),
        ("operators with other attributes taken for equal", f"{RULES}.share_results:_key",
         "tuple(attributes)", "planted(())"),
    ),
    *_of(
        "Canonicalize", "images in float16", f"{RULES}.widen_float16",
        ("bits of float16 read as whole numbers", ":_widen_value",
         "tensor.numpy().astype(np.float32)", "planted(tensor.numpy().view(np.int16)).astype(np.float32)"),
    ),
]  # fmt: skip
EQUIVALENCES = [
    *_of(
        "Rotate", "encoder", f"{PASSES}.rotate",
        ("a matrix not transposed for who reads the stream", ":_rotate_stream",
         "inverse = r.T * _absorb(behind, r)", "inverse = planted(r) * _absorb(behind, r)"),
        ("γ of a norm lost", ":_absorb", "return gamma", "return planted(np.ones(len(r)))"),
        ("β of a norm left where it was", ":_absorb", "_set(norm, norm.beta, left)", "planted(left)"),
        ("biases of what writes the stream not rotated", ":_rotate_stream",
         "multiply_constant(node, index, axis, r)", "multiply_constant(node, index, axis, planted(np.eye(len(r))))"),
        ("values of heads not rotated back", ":_rotate_values",
         "outward[np.ix_(row, row)] = r.T", "outward[np.ix_(row, row)] = planted(r)"),
        applied=True,
    ),
    *_of(
        "RotateInputs", "encoder, rotated at run time", f"{PASSES}.rotate_inputs",
        ("a Hadamard matrix not transposed", ":_rotate",
         "np.kron(np.eye(blocks), r.T)", "planted(np.kron(np.eye(blocks), r))"),
        ("one matrix for all blocks spread over them", ":_rotate",
         "np.kron(np.eye(blocks), r.T)", "planted(np.kron(r.T, np.eye(blocks)))"),
        applied=True,
    ),
    *_of(
        "Smooth", "post-norm", f"{PASSES}.smooth",
        ("factors multiplied where they are to divide", ":_fold",
         "factors**fold.exponent", "planted(factors)"),
        ("the reciprocal restored", ":_multiply",
         "exact = (factors if restores else 1.0 / factors)", "exact = planted(1.0 / factors)"),
        ("nobody reads what is restored", ":_multiply",
         "takers = set(group.spared)", "takers = planted(set())"),
        applied=True,
    ),
    *_of(
        "Smooth", "post-norm, branched", f"{PASSES}.smooth",
        ("a branch that multiplies where it is to divide", ":_multiply",
         "exact = (factors if restores else 1.0 / factors)", "exact = planted(factors)"),
        applied=True,
    ),
    *_of(
        "Smooth", "post-norm, shifted", f"{PASSES}.shift",
        ("the sign of a shift where the tensor is made", ":Shift.obstacle",
         "self.addends = [(place, -self.z)]", "self.addends = [(place, planted(self.z))]"),
        ("a shift through the weights' rows instead of columns", ":Shift._behind_product",
         "lack @ weight.astype(np.float64)", "planted(weight.astype(np.float64) @ lack)"),
        ("a residual that is not given back", ":Shift._behind_sum",
         "self.addends.append((place, lack))", "self.addends.append((place, planted(0.0 * lack)))"),
        applied=True,
    ),
    *_of(
        "Smooth", "post-norm, set aside", f"{PASSES}.set_aside",
        ("channels that are set aside counted twice", ":_read_beside",
         "rest[channels] = 0.0", "rest[channels] *= planted(1.0)"),
        applied=True,
    ),
    *_of(
        "Split", "feed-forward, split", f"{PASSES}.split",
        ("copies that begin where the first one does", ":Splittable.split",
         "(1.0 + rank / steep)", "planted(rank / steep)"),
        ("copies read as steep as they are written", ":Splittable.split",
         "rows, 1.0 / steep)", "rows, planted(steep))"),
        ("the second copy of a channel begins where the first does", ":Splittable.split",
         "(1.0 + rank / steep)", "planted(1.0 + 0.0 * rank / steep)"),
        applied=True,
    ),
]  # fmt: skip
QUANTIZE = [
    *_of(
        "allocate bits", "images", "",
        ("a zero point one too high", "qcompile.core.numerics:affine_scale",
         "np.rint(qmin - least / scale.astype(np.float64))",
         "np.rint(qmin - least / scale.astype(np.float64)) + planted(1)"),
        ("weights' scales from the mean instead of the largest", f"{PASSES}.allocate_bits:_weight_quant",
         "absmax = np.max(np.abs(weight),", "absmax = planted(np.mean)(np.abs(weight),"),
        ("weights' scales for codes of nine bits", "qcompile.core.numerics:symmetric_scale",
         "code_range(dtype)[1]", "(planted(2) * code_range(dtype)[1])"),
        ("ranges twice as wide", "qcompile.core.numerics:affine_scale",
         "_usable((most - least) / (qmax - qmin))", "_usable(planted(2) * (most - least) / (qmax - qmin))"),
    ),
    *_of(
        "InsertQdq", "images", "",
        ("a zero point one too high", f"{PASSES}.insert_qdq:_Writer._parameters",
         "zero_point = quant.zero_points.astype(quant.dtype)",
         "zero_point = planted(quant.zero_points + 1).astype(quant.dtype)"),
        ("scales of channels in the other order", f"{PASSES}.insert_qdq:_Writer._parameters",
         "quant.scales.reshape(shape)", "planted(quant.scales[::-1]).reshape(shape)"),
        ("scales of weights along the wrong axis", f"{PASSES}.insert_qdq:_Writer.store_weights",
         "value.shape, quant.axis)", "value.shape, planted(1))"),
        ("a bias in steps twice as long", f"{PASSES}.insert_qdq:QdqWriter.write_bias",
         "numerics.quantize(bias, scale,", "numerics.quantize(bias, planted(2 * scale),"),
        ("codes read as another input", f"{PASSES}.insert_qdq:_Writer.wrap_activation",
         "node.replace_input_with(index, real)", "node.replace_input_with(planted(0), real)"),
        ("rounding towards zero", "qcompile.core.numerics:quantize",
         "codes = np.rint(", "codes = planted(np.trunc)("),
        applied=True,
    ),
    *_of(
        "InsertQdq", "images", f"{PASSES}.insert_qdq",
        ("what leaves as codes read in float by some", ":_Writer.wrap_activation",
         "name in self.leaving or", "planted(False) and name in self.leaving or"),
        applied=True,
    ),
    *_of(
        "RoundWeights", "feed-forward", f"{PASSES}.round_weights",
        ("codes of the other sign", ":RoundWeights.call",
         "scratch.tensor(codes, name)", "scratch.tensor(planted(-codes), name)"),
        applied=True,
    ),
    *_of(
        "RoundWeights", "feed-forward", "qcompile.calib.rounding",
        ("errors handed on with the wrong sign", ":_in_turn",
         "left[..., row + 1 : stop, :] -= upper[", "left[..., row + 1 : stop, :] += planted(upper)["),
    ),
    *_of(
        "CorrectBias", "images", f"{PASSES}.correct_bias",
        ("a correction of the other sign", ":_correct",
         "_constant(codes) + steps", "_constant(codes) - planted(steps)"),
        ("a correction that is not in steps", ":_correct",
         "correction / _constant(dequantize.inputs[1]).astype(np.float64)", "planted(correction)"),
        applied=True,
    ),
    *_of(
        "CorrectBias", "images", f"{PASSES}.correct_bias",
        ("a correction of the other sign, in the trial as well", ":_correct",
         "_constant(codes) + steps", "_constant(codes) - planted(steps)"),
    ),
]  # fmt: skip
LOWER = [
    *_of(
        "Halve", "images for cuda", f"{ORT}.half",
        ("constants rounded to eight steps", ":_Writer._constant",
         "array.astype(np.float16)", "planted(np.rint(8 * array) / 8).astype(np.float16)"),
    ),
    *_of(
        "lower, ONNX Runtime", "feed-forward", f"{ORT}.legalize",
        ("a factor multiplied into a quantizer's scale", ".sink_factors:_new_scale",
         "exact / factor if divides else exact * factor", "planted(exact * factor)"),
        ("the bias of a product lost", ".join_matmul_bias:_join",
         "operands[: 7 if bias is not None else 6]", "operands[: planted(6)]"),
        ("halves scaled by the reciprocal power", ".store_halves:_unpack",
         "np.array(2.0**power, np.float32)", "np.array(planted(2.0**-power), np.float32)"),
    ),
    *_of(
        "lower, ONNX Runtime", "images", f"{ORT}.legalize",
        ("biases without their sign", ".unpack_biases:_unpack",
         "codes.astype(np.float64) * numerics", "planted(np.abs(codes.astype(np.float64))) * numerics"),
    ),
    *_of(
        "lower, ONNX Runtime", "feed-forward", f"{PASSES}.join_activations",
        ("the factor of GELU lost", ":_join", "if one.factor != 1.0:", "if planted(False):"),
    ),
    *_of(
        "lower, ONNX Runtime", "feed-forward in four bits", f"{ORT}.legalize",
        ("multiples of packed weights one too high", ".pack_weights:_unpack",
         "multiples.astype(ml_dtypes.uint4)", "planted(np.minimum(multiples + 1, 15)).astype(ml_dtypes.uint4)"),
    ),
    *_of(
        "lower, CUDA", "feed-forward for cuda", f"{ORT}.legalize",
        ("blocks of codes with a zero point one too low", ".block_matmuls:_packed",
         "numbers.astype(np.int16) + ZERO[bits]", "planted(numbers.astype(np.int16)) + ZERO[bits] - 1"),
    ),
    *_of(
        "lower, microcontroller", "sensor", f"{INTEGER}",
        ("the zero point not taken off a convolution", ".lower_linear:lower_conv",
         "- x.grid.zero_point * kernel.astype(np.int64).sum((1, 2, 3))", "+ planted(0)"),
        ("padding with code 0 instead of the zero point", ".lower_linear:lower_conv",
         "shape[2:], x.grid.zero_point)", "shape[2:], planted(0))"),
        ("padding before and after exchanged", ".lower_windows:window_of",
         "(before[0], before[1], after[0], after[1])", "planted((after[0], after[1], before[0], before[1]))"),
        ("one zero point of a sum forgotten", ".lower_elementwise:_sum",
         "- grids[0].zero_point * first", "- planted(0) * first"),
        ("results one code too high", ".lower_linear:requantize",
         "grid.zero_point, low, high)", "grid.zero_point + planted(1), low, high)"),
        ("weights of a Gemm transposed", ".lower_linear:lower_gemm",
         "matrix = weights.codes if transposed else weights.codes.T",
         "matrix = planted(weights.codes[::-1])"),
    ),
]  # fmt: skip
BUGS: tuple[Bug, ...] = tuple(bug for bug in (*CANONICALIZE, *EQUIVALENCES, *QUANTIZE, *LOWER) if bug.old != bug.new)
