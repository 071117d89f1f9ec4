"""One library for several lengths: the same codes as a library of each, weights once, and shapes that are no length."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from random_programs import wide

from qcompile.backends.cpu import library
from qcompile.backends.cpu.backend import PROCESSORS, opened, write
from qcompile.backends.cpu.session import InferenceSession, absent
from qcompile.backends.integer.interpret import interpret
from qcompile.core.lengths import Lengths, Padding

SIZES = (1, 8, 28)
LENGTHS = Lengths(SIZES, {"x": (1, SIZES, SIZES, 64)})


def programs(channels=64, outputs=96, size=3):
    """Return one convolution over maps of several sizes."""
    made = {side: wide(np.random.default_rng(7), channels, outputs, size, side=(side, side)) for side in SIZES}
    weights = [program.operations[0].weights for program in made.values()]
    assert all(np.array_equal(weights[0], other) for other in weights)
    return made


def written(folder, processor="avx512-vnni", lengths=LENGTHS):
    if not PROCESSORS[processor].emulated and (missing := absent(PROCESSORS[processor].flags)):
        pytest.skip(f"the processor has no {missing[0]}")
    network = library.network_of_lengths(programs(), PROCESSORS[processor])
    write(network, "net", folder, lengths)
    return network


def codes_of(side, draw=0):
    return np.random.default_rng(draw).integers(-128, 128, (1, side, side, 64)).astype(np.int8)


def check(session, draw=0):
    for side, program in programs().items():
        codes = codes_of(side, draw)
        np.testing.assert_array_equal(session.run_codes([codes])[0], interpret(program, {"x": codes})["y"])


@pytest.mark.parametrize("processor", ["avx512-vnni", "avx2", "amx"])
def test_each_length_gives_the_interpreter_s_codes(tmp_path, processor):
    written(tmp_path, processor)
    session = InferenceSession(tmp_path)
    assert [at.size for at in session.lengths] == list(SIZES)
    check(session)


def test_emulated_processors_have_them_too(tmp_path, emulation):
    written(tmp_path, "sdot")
    check(opened(tmp_path))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_go_from_one_length_to_the_other(tmp_path, threads):
    network = written(tmp_path)
    shared = [max(call.shared for call in each.calls) for each in network.all]
    assert shared[0] == 0 < shared[-1], "a step that is shared at one length is one thread's at another"
    session = InferenceSession(tmp_path, threads)
    for draw in range(20):
        check(session, draw)


@pytest.mark.parametrize("processor", ["avx512-vnni", "amx", "sdot"])
def test_weights_are_stored_once(processor):
    made = programs()
    alone = [len(library.network_of(program, PROCESSORS[processor]).constants) for program in made.values()]
    together = len(library.network_of_lengths(made, PROCESSORS[processor]).constants)
    assert together <= max(alone) + 1024 < sum(alone)


def test_a_length_that_would_store_weights_in_another_way_takes_the_longest_one_s(monkeypatch, tmp_path):
    from qcompile.backends.cpu import layer_forms

    choose = layer_forms.choose_tile

    def contrary(shape, processor):
        tile = choose(shape, processor)
        return replace(tile, rows=1, columns=1, vectors=4 if shape.columns > 8 else 1)

    monkeypatch.setattr(layer_forms, "choose_tile", contrary)
    network = written(tmp_path)
    assert len(network.constants) <= len(library.network_of(programs()[28], PROCESSORS["avx512-vnni"]).constants) + 64
    assert {tile.vectors for tile in network.tiles.values()} == {4}
    check(InferenceSession(tmp_path))


def test_what_begins_a_longer_constant_is_a_part_of_it():
    network = library.network_of(programs()[1], PROCESSORS["avx512-vnni"])
    rows = np.random.default_rng(0).normal(size=(8, 40)).astype(np.float32)
    kind, at = network.constant(rows, 64)
    count = len(network.constants)
    assert network.constant(rows[:3], 64) == (kind, at) and len(network.constants) == count
    # The last constant has no more behind it that could be read.
    assert network.constant(rows, 128) != (kind, at)
    assert network.constant(rows[3:], 64) not in ((kind, at), (kind, at + rows[:3].nbytes))


def test_an_input_of_no_length_is_refused_with_those_that_there_are(tmp_path):
    written(tmp_path)
    session = InferenceSession(tmp_path)
    with pytest.raises(ValueError, match="inputs have length 4: the network has 1, 8, 28, and there is no mask"):
        session.run(None, {"x": np.zeros((1, 4, 4, 64), np.float32)})
    with pytest.raises(ValueError, match="inputs have length 29: the network has 1, 8, 28, and this one is longer"):
        session.run(None, {"x": np.zeros((1, 29, 29, 64), np.float32)})
    with pytest.raises(ValueError, match=r"inputs have the lengths \[1, 8\]; they must have one, of 1, 8, 28"):
        session.run(None, {"x": np.zeros((1, 1, 8, 64), np.float32)})
    with pytest.raises(ValueError, match="codes of shape"):
        session.run_codes([np.zeros((1, 4, 4, 64), np.int8)])


def test_padding_takes_the_least_length_that_holds_an_input_and_cuts_its_outputs(tmp_path):
    written(tmp_path, lengths=replace(LENGTHS, padding=Padding("x", {"y": (1, 2)})))
    session = InferenceSession(tmp_path)
    given = np.random.default_rng(0).normal(size=(1, 5, 5, 64)).astype(np.float32)
    (found,) = session.run(None, {"x": given})
    assert found.shape == (1, 5, 5, 96) and found.flags.c_contiguous
    behind = np.pad(given, [(0, 0), (0, 3), (0, 3), (0, 0)])
    np.testing.assert_array_equal(found, session.run(["y"], {"x": behind})[0][:, :5, :5])


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_a_program_in_c_chooses_the_length(tmp_path):
    written(tmp_path)
    (tmp_path / "main.c").write_text(
        '#include "net.h"\n#include <stdio.h>\n'
        "static int8_t in[NET_INPUT_28_BYTES], out[NET_OUTPUT_28_BYTES];\n"
        "int main(void) { net *one = net_create(2); if (!one) return 2;\n"
        "if (net_length(4) != 8 || net_length(28) != 28 || net_length(29) != -1) return 3;\n"
        "if (net_run(one, 4, in, out) != -1) return 4;\n"
        "fread(in, 1, NET_INPUT_8_BYTES, stdin); if (net_run(one, net_length(8), in, out)) return 5;\n"
        "fwrite(out, 1, NET_OUTPUT_8_BYTES, stdout);\n"
        "fread(in, 1, sizeof in, stdin); net_run_28(one, in, out); fwrite(out, 1, sizeof out, stdout);\n"
        "net_destroy(one); return 0; }\n"
    )
    words = ["gcc", "-std=c11", "-Wall", "-Wextra", "-Wno-unused-result", "-Werror", "main.c", "-L.", "-lnet"]
    subprocess.run([*words, "-Wl,-rpath,$ORIGIN", "-o", "main"], cwd=tmp_path, check=True)
    given = [codes_of(side) for side in (8, 28)]
    done = subprocess.run([tmp_path / "main"], input=b"".join(map(bytes, given)), capture_output=True)
    assert done.returncode == 0, done.returncode
    session = InferenceSession(tmp_path)
    assert done.stdout == b"".join(session.run_codes([codes])[0].tobytes() for codes in given)
