"""Weights of four bits and activations of sixteen: sums at their limits, and what a package says of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from random_programs import Growing, random_codes

from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.interpret import interpret
from qcompile.backends.integer.program import Program
from qcompile.backends.mcu.backend import McuBackend
from qcompile.backends.mcu.emulate import emulate
from qcompile.backends.mcu.emulated_run import driver
from qcompile.backends.mcu.host import HostNetwork
from qcompile.backends.tvm.kernels import constant_bytes
from qcompile.core import numerics

#: Weights of a row: parts of a word, several rounds of 504 codes, and what is left over of them.
LENGTHS = (8, 64, 67, 70, 504, 512, 1008, 1203)


def linear(length: int, outputs: int, dtype: str, bits: int, pixels: int = 1) -> Program:
    """Return a layer whose every product is the largest that there is."""
    shape = (1, 1, pixels, length)
    grown = Growing(np.random.default_rng(length), shape, dtype)
    fields = grown.weights(outputs, 1, 1, length, bits=bits, dtype=dtype)
    lowest = -8 if bits == 4 else -min(127, 60000 // length)
    codes = np.full((outputs, 1, 1, length), lowest, np.int8)
    codes[1::2] = -lowest - 1
    kept = replace(
        fields["requantize"], zero_point=0, low=-(2 ** (grown.last.bits - 1)), high=2 ** (grown.last.bits - 1) - 1
    )
    fields |= {"weights": codes, "requantize": kept}
    grown.add(ops.Conv, (1, 1, pixels, outputs), (grown.last,), dtype, **fields, window=ops.Window((1, 1)))
    return grown.program()


def extremes(program: Program) -> list[dict[str, np.ndarray]]:
    """Return inputs at the lowest and the highest code, and random ones."""
    (port,) = program.inputs
    tensor = program.tensors[port.tensor]
    codes = numerics.code_range(tensor.dtype)
    filled = [{port.name: np.full(tensor.shape, code, tensor.dtype)} for code in codes]
    return [*filled, random_codes(program, 0)]


CASES = [(length, 4, "int8", 4, pixels) for length in LENGTHS for pixels in (1, 2)]
CASES += [(length, 4, "int16", 8, pixels) for length in LENGTHS for pixels in (1, 2)]
CASES += [(64, 2, "int8", 4, 1), (70, 2, "int16", 8, 1), (64, 3, "int8", 4, 2), (64, 3, "int16", 8, 2)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_at_their_limits_are_the_interpreters(pack, tmp_path, case):
    program = linear(*case)
    network = HostNetwork(tmp_path, pack(program).name, program)
    for codes in extremes(program):
        expected = interpret(program, codes)["y"]
        np.testing.assert_array_equal(network.run(codes)["y"], expected)
    assert len(np.unique(expected)) > 1, "an output that says something"


def check_on_device(pack, tmp_path, processor, case, *flags):
    program = linear(*case)
    source, inputs = pack(program), extremes(program)
    (tmp_path / "main.c").write_text(driver(program, source.name, len(inputs)))
    compiler = next(t for t in McuBackend().targets() if t.name == processor).settings["compiler"]
    given = b"".join(codes["x"].tobytes() for codes in inputs)
    seen = emulate([tmp_path / "model.c", tmp_path / "main.c"], processor, {"in.bin": given}, [*compiler, *flags])
    wanted = b"".join(interpret(program, codes)["y"].tobytes() for codes in inputs)
    assert (seen.status, seen.files["out.bin"]) == (0, wanted)


@pytest.mark.qemu
@pytest.mark.parametrize("processor", ["cortex-m4", "cortex-m55", "cortex-m0plus"])
@pytest.mark.parametrize("case", CASES[4::5], ids=str)
def test_sums_at_their_limits_are_the_interpreters_on_a_device(pack, tmp_path, processor, case):
    check_on_device(pack, tmp_path, processor, case)


@pytest.mark.qemu
@pytest.mark.parametrize("case", [(70, 4, dtype, bits, pixels) for dtype, bits in (("int8", 4), ("int8", 8))
                                  for pixels in (1, 2)], ids=str)  # fmt: skip
def test_tiles_without_assembly_are_the_interpreters(pack, tmp_path, case):
    check_on_device(pack, tmp_path, "cortex-m4", case, "-U__OPTIMIZE__")


def test_packed_weights_take_half_the_bytes_where_kernels_take_them(pack):
    layers = {bits: pack(linear(64, 4, "int8", bits)).layers.layers[0] for bits in (4, 8)}
    assert [layers[bits].constants["weights"].nbytes for bits in (4, 8)] == [4 * 32, 4 * 64]
    assert [layers[bits].weight_bits for bits in (4, 8)] == [4, 8]
    odd = pack(linear(64, 3, "int8", 4)).layers.layers[0]
    assert odd.weight_bits == 8, "an odd number of channels has no tile"


@pytest.mark.parametrize("case", CASES[::6], ids=str)
def test_bytes_of_constants_are_known_before_kernels_are(pack, case):
    program = linear(*case)
    layer = pack(program).layers.layers[0]
    found = sum(array.nbytes for array in layer.constants.values())
    assert constant_bytes(program.operations[0], program.tensors) == found


def test_the_interface_has_the_types_of_the_ports_and_only_the_headers_it_needs(pack, tmp_path):
    pack(linear(64, 4, "int16", 8), tmp_path / "wide")
    header = (tmp_path / "wide" / "model.h").read_text()
    assert "int random_net_run(const int16_t *in, int16_t *out);" in header
    assert "#define RANDOM_NET_INPUT_BYTES 128\n" in header
    pack(linear(64, 4, "int8", 4), tmp_path / "narrow")
    names = {folder: {path.name for path in (tmp_path / folder).glob("qc_*")} for folder in ("wide", "narrow")}
    assert names == {"wide": {"qc_kernels.h", "qc_codes16.h"}, "narrow": {"qc_kernels.h", "qc_weights4.h"}}
