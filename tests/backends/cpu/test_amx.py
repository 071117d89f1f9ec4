"""Kernels on the tiles of AMX: exact in every shape of tile, by tdpbusd alone, refused where there are none."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest
from float_programs import codes, floats, product
from random_programs import random_codes, random_program, wide, with_table

from qcompile.backends.cpu import library, session
from qcompile.backends.cpu.backend import write
from qcompile.backends.integer import float_operations as ops
from qcompile.backends.integer.interpret import interpret
from qcompile.backends.integer.operations import Requantize
from qcompile.core import numerics

pytest.importorskip("tvm")

from qcompile.backends.tvm.schedules import x86_amx, x86_cycles
from qcompile.backends.tvm.schedules.x86 import PROCESSORS

AMX = PROCESSORS["amx"]


@pytest.fixture
def tiles_always(monkeypatch):
    """Take tiles for all layers, however small."""
    monkeypatch.setattr(x86_cycles, "cycles", lambda shape, tile, vectors: float("inf"))
    monkeypatch.setattr(x86_amx, "FEW", 1)


@pytest.mark.parametrize("seed", range(300, 330))
def test_tiles_equal_the_interpreter_on_random_programs(load, tiles_always, seed):
    program = random_program(seed, wide=False)
    codes = random_codes(program, 0)
    np.testing.assert_array_equal(load(program, "amx").run_codes([codes["x"]])[0], interpret(program, codes)["y"])


@pytest.mark.parametrize("outputs", [1, 16, 33, 81])
@pytest.mark.parametrize("side", [(2, 7), (3, 17), (1, 50)])
@pytest.mark.parametrize(("channels", "size", "stride"), [(70, 3, 1), (13, 3, 2)])
def test_edges_of_tiles_equal_the_interpreter(load, tiles_always, outputs, side, channels, size, stride):
    random = np.random.default_rng(outputs)
    program = wide(random, channels, outputs, size, stride, side=side)
    if outputs % 2:
        program = with_table(program, random)
    codes = random_codes(program, 0)
    made = load(program, "amx")
    np.testing.assert_array_equal(made.run_codes([codes["x"]])[0], interpret(program, codes)["y"])


@pytest.mark.parametrize("deep", [64, 65, 1030, 4200])
def test_every_depth_equals_the_interpreter(load, tiles_always, deep):
    program = wide(np.random.default_rng(deep), deep, 40, 1, side=(4, 9))
    codes = random_codes(program, 0)
    np.testing.assert_array_equal(load(program, "amx").run_codes([codes["x"]])[0], interpret(program, codes)["y"])


@pytest.mark.parametrize(("channels", "outputs", "size"), [(4096, 64, 1), (4096, 32, 3)])
def test_the_inner_loop_is_tdpbusd_without_spills(channels, outputs, size):
    network = library.network_of(wide(np.random.default_rng(0), channels, outputs, size, side=(14, 14)), AMX)
    text = "".join(each.assembly for each in library.compiled(network, "net")[:-2])
    (body,) = re.findall(r"^tiles_\d+:\n(.*?)^\.Lfunc_end", text, re.MULTILINE | re.DOTALL)
    loops = re.findall(r"^(\.LBB\w+):\n((?:(?!^\.LBB).)*?)\tj\w+\t\1$", body, re.MULTILINE | re.DOTALL)
    products = [loop for _, loop in loops if "tdpbusd" in loop]
    assert products and min(loop.count("tdpbusd") for loop in products) >= 4
    for loop in products:
        assert loop.count("tdpbusd") == loop.count("tileloadd"), "two by two: as many products as tiles read"
        assert "rsp" not in loop and not re.search(r"%[xyz]mm", loop), "nothing but tiles"


def test_tiles_are_for_many_outputs_and_deep_sums():
    def kind(*layer, side):
        network = library.network_of(wide(np.random.default_rng(0), *layer, side=side), AMX)
        return network.calls[-1].kernel.split("_")[0]

    assert kind(384, 384, 1, side=(1, 128)) == kind(64, 64, 3, side=(14, 14)) == "tiles"
    assert kind(4, 32, 1, side=(14, 14)) == "linear", "one group of four codes"
    assert kind(64, 64, 3, 1, 64, side=(14, 14)) == "depthwise"


@pytest.mark.parametrize(("m", "real"), [(128, True), (128, False), (4, True)])
def test_products_of_activations_are_of_tiles_where_these_are_high(m, real):
    step = ops.Dequantize(np.ones(1, np.float32)) if real else Requantize(*numerics.fixed_point([0.001]), 0, -128, 127)
    target = (lambda shape: floats("y", *shape)) if real else (lambda shape: codes("y", *shape))
    network = library.network_of(product((2,), m, 32, 128, step, target, False, True), AMX)
    (call,) = network.calls
    text = "".join(each.assembly for each in library.compiled(network, "net")[:-2])
    assert call.kernel.startswith("product") and call.shared == (2 if m == 128 else 0)
    assert ("tdpbusd" in text) == (m == 128) and ("quads" in vars(network.tiles[call.kernel])) == (m == 128)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_a_program_in_c_asks_the_system_by_the_header(load, tmp_path):
    program = wide(np.random.default_rng(1), 64, 64, 3)
    made = load(program, "amx")
    (tmp_path / "main.c").write_text(
        '#include "net.h"\n#include <stdio.h>\n'
        "static int8_t in[NET_INPUT_BYTES], out[NET_OUTPUT_BYTES];\n"
        "int main(void) { net *one = net_create(2); if (!one) return 2;\n"
        "fread(in, 1, sizeof in, stdin); net_run(one, in, out); fwrite(out, 1, sizeof out, stdout);\n"
        "net_destroy(one); return 0; }\n"
    )
    words = ["gcc", "-std=c11", "-Wall", "-Wextra", "-Wno-unused-result", "-Werror", "main.c", "-L.", "-lnet"]
    subprocess.run([*words, "-Wl,-rpath,$ORIGIN", "-o", "main"], cwd=tmp_path, check=True)
    codes = random_codes(program, 0)["x"]
    done = subprocess.run([tmp_path / "main"], input=codes.tobytes(), capture_output=True, check=True)
    assert done.stdout == made.run_codes([codes])[0].tobytes()


def test_a_system_that_keeps_the_tiles_to_itself_is_named(tmp_path, monkeypatch):
    write(library.network_of(wide(np.random.default_rng(1), 64, 64, 3), AMX), "net", tmp_path)
    monkeypatch.setattr(session, "absent", lambda flags: [])
    monkeypatch.setattr(session, "tiles_allowed", lambda: False)
    with pytest.raises(OSError, match=r"does not let this process use the tiles of AMX"):
        session.InferenceSession(tmp_path)
