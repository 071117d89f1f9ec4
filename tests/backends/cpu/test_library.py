"""What a library is made of: the right instructions, nothing of TVM, a header that C reads, one set of bytes."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from random_programs import random_program, wide, with_table

from qcompile.backends.cpu import library
from qcompile.backends.cpu.backend import write
from qcompile.backends.cpu.layout import lay_out
from qcompile.backends.cpu.session import InferenceSession
from qcompile.backends.integer import operations as ops
from qcompile.core.errors import TargetError

pytest.importorskip("tvm")

from qcompile.backends.tvm import native
from qcompile.backends.tvm.schedules import linear
from qcompile.backends.tvm.schedules.vectors import Rounding
from qcompile.backends.tvm.schedules.x86 import PROCESSORS

VNNI = PROCESSORS["avx512-vnni"]


def assembly(program, processor=VNNI):
    """Return the text of a program's kernels by name."""
    text = "".join(each.assembly for each in library.compiled(library.network_of(program, processor), "net")[:-2])
    return dict(re.findall(r"^(\w+):\n(.*?)^\.Lfunc_end", text, re.MULTILINE | re.DOTALL))


def innermost(body):
    """Return the loops that hold no other: what lies between a label and a jump back to it."""
    found = re.findall(r"^(\.LBB\w+):\n((?:(?!^\.LBB).)*?)\tj\w+\t\1$", body, re.MULTILINE | re.DOTALL)
    return [inner for _, inner in found]


@pytest.mark.parametrize(("channels", "outputs", "size"), [(64, 64, 3), (64, 128, 1)])
def test_the_inner_loop_is_vpdpbusd_without_spills(channels, outputs, size):
    bodies = assembly(wide(np.random.default_rng(0), channels, outputs, size, side=(14, 14)))
    loops = [loop for name, body in bodies.items() if name.startswith("linear") for loop in innermost(body)]
    products = [loop for loop in loops if "vpdpbusd" in loop]
    assert products and max(loop.count("vpdpbusd") for loop in products) >= 8
    for loop in products:
        assert "rsp" not in loop and not re.search(r"%zmm\d+, [^%\n]*\(", loop), "sums stay in registers"
        assert "zmm" in loop and loop.count("vpdpbusd") >= loop.count("vpbroadcastd")


@pytest.mark.parametrize("seed", range(4))
def test_nothing_of_tvm_is_needed_and_only_the_header_s_functions_are_seen(tmp_path, seed):
    write(library.network_of(random_program(seed, wide=False), VNNI), "net", tmp_path)
    listed = subprocess.run(["nm", "-D", tmp_path / "libnet.so"], capture_output=True, text=True, check=True).stdout
    symbols = [line.split() for line in listed.splitlines()]
    assert {words[-1] for words in symbols if "T" in words[:-1]} == {
        "net_run",
        "net_run_floats",
        "net_start",
        "net_stop",
    }
    assert {words[-1].split("@")[0] for words in symbols if "U" in words[:-1]} <= {"memcpy", "memset", "memmove"}


def test_the_same_program_gives_the_same_bytes(tmp_path):
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        written = write(library.network_of(random_program(3, wide=False), VNNI), "net", tmp_path / name)
        made.append([(tmp_path / name / file).read_bytes() for file in written])
    assert made[0] == made[1]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_a_program_in_c_runs_it_by_its_header(tmp_path):
    program = wide(np.random.default_rng(1), 16, 16, 3)
    write(library.network_of(program, VNNI), "net", tmp_path)
    (tmp_path / "main.c").write_text(
        '#include "net.h"\n#include <stdio.h>\n'
        "static int8_t in[NET_INPUT_BYTES], out[NET_OUTPUT_BYTES];\n"
        "int main(void) { net *one = net_create(1); if (!one) return 2;\n"
        "fread(in, 1, sizeof in, stdin); net_run(one, in, out); fwrite(out, 1, sizeof out, stdout);\n"
        "net_destroy(one); return 0; }\n"
    )
    words = ["gcc", "-std=c11", "-Wall", "-Wextra", "-Wno-unused-result", "-Werror", "main.c", "-L.", "-lnet"]
    subprocess.run([*words, "-Wl,-rpath,$ORIGIN", "-o", "main"], cwd=tmp_path, check=True)
    codes = np.random.default_rng(0).integers(-128, 128, program.tensors["t0"].shape).astype(np.int8)
    done = subprocess.run([tmp_path / "main"], input=codes.tobytes(), capture_output=True, check=True)
    assert done.stdout == InferenceSession(tmp_path).run_codes([codes])[0].tobytes()


def test_padding_is_written_around_the_map_rather_than_copied():
    network = library.network_of(wide(np.random.default_rng(1), 16, 16, 3), VNNI)
    assert not [call for call in network.calls if call.kernel.startswith("gather")]
    kinds = [call.kernel.split("_")[0] for call in network.calls]
    assert kinds[:3] == ["fill"] * 3 and kinds[3:] in (["linear"], ["nibbles"])


def test_a_table_is_part_of_the_layer_in_front_unless_that_is_read_otherwise_too():
    random = np.random.default_rng(0)
    program = with_table(wide(random, 16, 16, 1), random)
    assert [call.kernel.split("_")[0] for call in library.network_of(program, VNNI).calls] == ["linear"]
    both = replace(program, outputs=(*program.outputs, replace(program.outputs[0], name="z", tensor="t1")))
    kernels = [call.kernel.split("_")[0] for call in library.network_of(both, VNNI).calls]
    assert kernels == ["linear", "lookup"]


def test_two_readers_with_other_padding_each_see_their_own(load):
    random = np.random.default_rng(5)
    program = wide(random, 16, 16, 3)
    conv = program.operations[0]
    other = replace(conv, name="other", output="t2", window=replace(conv.window, outside=-conv.window.outside - 1))
    tensors = {**program.tensors, "t2": replace(program.tensors["t1"], name="t2"),
               "t3": replace(program.tensors["t1"], name="t3")}  # fmt: skip
    total = ops.Add("sum", ("t1", "t2"), "t3", (1 << 18, -(1 << 18)), 0, 19, -128, 127)
    ports = (replace(program.outputs[0], tensor="t3"),)
    both = replace(program, tensors=tensors, operations=(conv, other, total), outputs=ports)
    from qcompile.backends.integer.interpret import interpret

    codes = {"x": random.integers(-128, 128, program.tensors["t0"].shape).astype(np.int8)}
    expected = interpret(both, codes)["y"]
    assert len(np.unique(expected)) > 4, "the two differ at the border"
    np.testing.assert_array_equal(load(both).run_codes([codes["x"]])[0], expected)


@pytest.mark.parametrize("seed", range(20))
def test_what_lives_at_one_time_lies_apart(seed):
    layout = lay_out(random_program(seed, wide=False))
    program, where = layout.program, layout.places
    for part in program.operations:
        if isinstance(part, ops.View):
            continue
        base = where[part.output].base
        first = layout.offsets[base]
        for name in part.inputs:
            other = layout.offsets[where[name].base]
            size = program.tensors[where[name].base].nbytes
            assert other >= first + program.tensors[base].nbytes or first >= other + size, (seed, part.name, name)


def test_activations_of_sixteen_bits_are_refused_by_name():
    program = random_program(1, wide=False)
    tensors = {name: replace(tensor, dtype="int16") for name, tensor in program.tensors.items()}
    with pytest.raises(TargetError, match="int16 activations") as caught:
        library.network_of(replace(program, tensors=tensors), VNNI)
    assert caught.value.exit_code == 7


def test_a_machine_without_a_linker_is_told_so(monkeypatch):
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    with pytest.raises(TargetError, match="needs a linker"):
        library.linker("x86_64")


def test_a_processor_without_the_instructions_is_told_so(load, tmp_path, monkeypatch):
    from qcompile.backends.cpu import session

    load(random_program(1, wide=False))
    monkeypatch.setattr(session, "absent", lambda flags: ["avx512_vnni"])
    with pytest.raises(OSError, match="no avx512_vnni"):
        InferenceSession(tmp_path)


def test_inputs_that_do_not_fit_are_told_so(load):
    session = load(wide(np.random.default_rng(1), 16, 16, 3))
    with pytest.raises(ValueError, match="'x' is missing"):
        session.run(None, {})
    with pytest.raises(ValueError, match=r"shape \(1, 2\), not \(1, 9, 11, 16\)"):
        session.run(None, {"x": np.zeros((1, 2), np.float32)})


def test_pairs_of_products_saturate_beyond_sixteen_bits_and_not_below():
    from qcompile.backends.tvm.schedules.x86 import saturates

    random = np.random.default_rng(0)
    pairs = random.integers(-128, 128, (4000, 2)).astype(np.int8)
    codes = np.array([(a, b) for a in (0, 255) for b in (0, 255)])
    sums = pairs.astype(np.int64) @ codes.T
    expected = (sums.max(axis=1) > 32767) | (sums.min(axis=1) < -32768)
    assert 0 < expected.sum() < len(pairs)
    assert [saturates(pair) for pair in pairs] == expected.tolist()
    assert not saturates(np.array([64, 64, -64, -64, 127, -127], np.int8))
    assert saturates(np.array([1, 0, 65, 64], np.int8))


@pytest.mark.parametrize(("limit", "products"), [(64, 1), (127, 2)])
def test_without_the_instruction_weights_are_split_where_sums_saturate(limit, products):
    program = wide(np.random.default_rng(0), 32, 32, 1)
    np.clip(program.operations[0].weights, -limit, limit, out=program.operations[0].weights)
    (body,) = [body for name, body in assembly(program, PROCESSORS["avx2"]).items() if name.startswith("linear")]
    assert "vpmaddubsw" in body and "vpdpbusd" not in body and "zmm" not in body
    assert ("vpand" in body) == (products == 2)
    assert body.count("vpmaddubsw") == body.count("vpmaddwd")


def test_avx_vnni_has_the_instruction_on_short_vectors():
    bodies = assembly(wide(np.random.default_rng(0), 64, 64, 3), PROCESSORS["avx-vnni"])
    loops = [loop for body in bodies.values() for loop in innermost(body) if "vpdpbusd" in loop]
    assert loops and all("ymm" in loop and "zmm" not in loop for loop in loops)


@pytest.mark.parametrize(("side", "fetched"), [((7, 7), True), ((20, 20), False), ((1, 1), False)])
def test_weights_are_asked_for_ahead_where_few_outputs_wait_for_many(side, fetched):
    bodies = assembly(wide(np.random.default_rng(0), 256, 128, 1, side=side))
    (body,) = [body for name, body in bodies.items() if name.startswith("linear")]
    assert ("prefetch" in body) == fetched


@pytest.mark.parametrize("low, high", [(1, 255), (0, 200), (1, 200)])
@pytest.mark.parametrize("outputs", [8, 40])
def test_bounds_of_codes_that_are_stored_in_part_are_compiled(outputs, low, high):
    """LLVM 22 never ended on either bound of codes of 8 bits of which some lanes are stored."""
    shape = linear.Linear(1, 5, outputs, ((1, 0), (1, 0)), 32, 0, 32, 0, outputs, Rounding(True, 128, low, high))
    kernel = linear.linear_kernel("bounded", shape, linear.Tile(1, 5, 2), VNNI)
    assert "vpdpbusd" in native.compile_object({"bounded": kernel}, VNNI.machine).assembly
