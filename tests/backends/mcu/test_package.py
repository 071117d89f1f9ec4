"""What stands in a package: C that needs nothing, a self-test that notices, memory as it was planned."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from random_programs import Growing, random_codes, random_program

from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.interpret import interpret
from qcompile.backends.integer.program import Strips
from qcompile.backends.integer.strips import plan_memory
from qcompile.backends.mcu import write_c
from qcompile.backends.mcu.boards import Limits
from qcompile.backends.mcu.compiler import Compiled
from qcompile.backends.mcu.footprint import Footprint, instructions_by_layer, measured
from qcompile.backends.mcu.host import HostNetwork
from qcompile.backends.mcu.layers import Layers, macs
from qcompile.backends.mcu.package import Example
from qcompile.core.errors import BudgetError, VerificationError

STRICT = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Wshadow", "-Wstrict-prototypes", "-Werror", "-O2"]


def tall(channels=8, convolutions=3):
    """Return a chain of 3x3 convolutions over a map of many rows, which runs in strips where memory is short."""
    grown = Growing(np.random.default_rng(0), (1, 24, 8, 2), "int8")
    for index in range(convolutions):
        fields = grown.weights(channels, 3, 3, grown.last.shape[3] if index % 2 == 0 else 1, bits=8)
        fields["requantize"] = replace(fields["requantize"], zero_point=3, low=-128, high=127)
        window = ops.Window((3, 3), pads=(1, 1, 1, 1), outside=7)
        groups = 1 if index % 2 == 0 else channels
        grown.add(ops.Conv, (1, 24, 8, channels), (grown.last,), **fields, window=window, groups=groups)
    window = ops.Window((4, 4), (4, 4))
    grown.add(ops.AveragePool, (1, 6, 2, channels), (grown.last,), window=window,
              bias=-16 * grown.last.zero_point, requantize=grown.requantize(1, 1000))  # fmt: skip
    return grown.program()


@pytest.mark.parametrize("seed", range(4))
def test_the_c_is_strict_c99_without_float_or_allocation(pack, tmp_path, seed):
    pack(random_program(seed))
    subprocess.run(["gcc", *STRICT, "-c", "model.c", "-o", "model.o"], cwd=tmp_path, check=True)
    listed = subprocess.run(["nm", "--undefined-only", "model.o"], cwd=tmp_path, capture_output=True, text=True)
    undefined = {line.split()[-1] for line in listed.stdout.splitlines()}
    assert undefined <= {"memcpy", "memset", "memmove", "__stack_chk_fail", "_GLOBAL_OFFSET_TABLE_"}
    assert not re.search(r"\b(float|double|malloc|TVM\w*)\b", (tmp_path / "model.c").read_text())


def test_the_self_test_succeeds_and_notices_a_changed_weight(pack, tmp_path):
    source = pack(tall())
    expected = Example.of(source).outputs["y"]
    assert len(np.unique(expected)) > 8, "an output that says something"

    def passes():
        subprocess.run(["gcc", *STRICT, "model.c", "selftest.c", "-o", "selftest"], cwd=tmp_path, check=True)
        return subprocess.run(["./selftest"], cwd=tmp_path, check=False).returncode == 0

    assert passes()
    weights = tmp_path / "model_weights.h"
    text = weights.read_text()
    multiplier = re.search(r"channels_1\[\d+\] = \{\n    -?\d+, (\d+)", text)
    weights.write_text(text[: multiplier.start(1)] + "0" + text[multiplier.end(1) :])
    assert not passes()


def test_equal_programs_give_equal_bytes(pack, tmp_path):
    for name in ("one", "two"):
        pack(random_program(7), tmp_path / name)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two and len(one) == 8


def test_kernels_of_equal_shape_are_one_function(pack):
    source = pack(tall(convolutions=5))
    names = [layer.names for layer in source.layers.layers if isinstance(layer.operation, ops.Conv)]
    assert names[2] == names[4] and names[1] == names[3] and len(set(names)) == 3


@pytest.mark.parametrize("share", [0.72, 0.8, 0.95])
def test_strips_give_the_same_codes_in_less_memory(pack, tmp_path, share):
    program = tall()
    whole = plan_memory(program).arena_bytes
    source = pack(program, max_sram=int(whole * share))
    assert source.arena_bytes <= whole * share
    assert any(isinstance(operation, Strips) for operation in source.program.operations)
    network = HostNetwork(tmp_path, source.name, program)
    for draw in range(3):
        codes = random_codes(program, draw)
        np.testing.assert_array_equal(network.run(codes)["y"], interpret(program, codes)["y"])


def test_the_header_tells_sizes_scales_and_zero_points(pack, tmp_path):
    program = tall()
    source = pack(program)
    header = (tmp_path / "model.h").read_text()
    assert f"#define RANDOM_NET_ARENA_BYTES {source.arena_bytes}\n" in header
    assert f"#define RANDOM_NET_INPUT_BYTES {24 * 8 * 2}\n" in header
    assert "int random_net_run(const int8_t *in, int8_t *out);" in header
    zero_point = program.tensors[program.inputs[0].tensor].zero_point
    assert f"#define RANDOM_NET_INPUT_ZERO_POINT ({zero_point})\n" in header
    scale = re.search(r"INPUT_SCALE (\S+)f\n", header)
    assert np.float32(scale[1]) == np.float32(0.05)


@pytest.mark.parametrize(
    ("text", "name"), [("Net-1/x", "net_1_x"), ("8bit", "model_8bit"), ("", "model"), ("größe", "gr_e")]
)
def test_names_become_identifiers(text, name):
    found = write_c.identifier(text)
    assert found == name or re.fullmatch(r"[a-z_][a-z0-9_]*", found)


def test_the_least_int32_is_a_valid_literal():
    text = write_c.constant("c", np.array([-(2**31), 5], np.int32))
    assert "(-2147483647 - 1), 5" in text


def test_c_that_no_compiler_takes_is_an_error(pack, tmp_path):
    program = tall()
    source = pack(program)
    (tmp_path / "model.c").write_text("int x = ;")
    with pytest.raises(VerificationError, match=r"model\.c"):
        HostNetwork(tmp_path, source.name, program)


def footprint_of(program):
    plan = plan_memory(program)
    return Footprint.of("n", "cortex-m4", plan, Layers.of(plan.program, plan.offsets))


def test_the_footprint_adds_up():
    program = tall()
    found = footprint_of(program)
    assert found.weight_bytes == sum(row.weight_bytes for row in found.layers)
    assert [row.macs for row in found.layers] == [macs(part, program.tensors) for part in program.operations]
    assert found.layers[0].weight_bytes == 8 * 9 * 2 + 8 * 12 and found.layers[1].macs == 24 * 8 * 9 * 8
    assert "| 0 | op0 | Conv | 1x24x8x8 |" in found.as_markdown()


def test_what_does_not_fit_is_refused_with_the_bytes_and_the_layer():
    found = footprint_of(tall())
    compiled = Compiled("cc", code_bytes=1000, stack_bytes=100)
    flash, sram = found.weight_bytes + 1000, found.arena_bytes + 100
    found.require(Limits(sram, flash), compiled)
    with pytest.raises(BudgetError, match=r"1 more than there are.*'op") as raised:
        found.require(Limits(sram, flash - 1, flash_place="--max-flash"), compiled)
    assert raised.value.place == "--max-flash"
    with pytest.raises(BudgetError, match="1 more than there are"):
        found.require(Limits(sram - 1, flash, sram_place="--board x"), compiled)
    assert measured(found, compiled, Limits(sram + 5, None))["sram_left"] == 5
    assert measured(found, None, Limits()) == {"compiler": None}


def test_layers_share_a_kernels_instructions_equally():
    layers = [
        {"function": "layer_0", "kernels": ["conv_0"]},
        {"function": "layer_1", "kernels": ["conv_0", "conv_1"]},
    ]
    counted = {"layer_0": 3, "layer_1.constprop.0": 4, "conv_0.isra.0": 10, "conv_1": 7, "memcpy": 99}
    assert instructions_by_layer(layers, counted) == [8, 16]
