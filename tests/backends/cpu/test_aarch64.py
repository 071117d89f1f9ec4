"""Libraries for aarch64: the right instructions, exact rounding, nothing of a C library, one clear line elsewhere."""

from __future__ import annotations

import platform
import re
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from random_programs import random_codes, random_program, wide

from qcompile.backends.cpu import backend, emulate, library
from qcompile.backends.cpu.session import InferenceSession
from qcompile.backends.integer.interpret import interpret
from qcompile.core.errors import TargetError, VerificationError

pytest.importorskip("tvm")

PROCESSORS = backend.PROCESSORS
SDOT, I8MM, NEON, ANDROID = (PROCESSORS[name] for name in ("sdot", "i8mm", "neon", "sdot-android"))
pytestmark = pytest.mark.usefixtures("emulation")


def assembly(program, processor=SDOT):
    """Return the text of a program's kernels by name."""
    text = "".join(each.assembly for each in library.compiled(library.network_of(program, processor), "net")[:-2])
    return dict(re.findall(r"^(\w+):\n(.*?)^\.Lfunc_end", text, re.MULTILINE | re.DOTALL))


def of_bytes(program):
    """Return a program of one layer whose weights are stored as bytes, however few bits they have."""
    (layer,) = program.operations
    return replace(program, operations=(replace(layer, bits=8),))


def innermost(body):
    """Return the loops that hold no other: what lies between a label and a jump back to it."""
    found = re.findall(r"^(\.LBB\w+):\n((?:(?!^\.LBB).)*?)\tb\.\w+\t\1$", body, re.MULTILINE | re.DOTALL)
    return [inner for _, inner in found]


def spilled(loop):
    """Return what a loop stores on the stack. Weights that it finds there were put there once, and cost no more."""
    return re.findall(r"^\tst\w+\t.*\[sp.*$", loop, re.MULTILINE)


def read(file, *words):
    """Return what readelf says of a file."""
    return subprocess.run(["readelf", "-W", *words, file], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("channels", "outputs", "size"), [(64, 64, 3), (64, 128, 1), (32, 16, 3), (256, 24, 1)])
def test_the_inner_loop_is_sdot_without_spills(channels, outputs, size):
    bodies = assembly(of_bytes(wide(np.random.default_rng(0), channels, outputs, size, side=(14, 14))))
    loops = [loop for name, body in bodies.items() if name.startswith("linear") for loop in innermost(body)]
    products = [loop for loop in loops if "sdot" in loop]
    assert products and max(loop.count("sdot") for loop in products) >= 32
    for loop in products:
        assert not spilled(loop)
        assert loop.count("sdot") == len(re.findall(r"sdot\tv\d+\.4s, v\d+\.16b, v\d+\.4b\[\d\]", loop)), "no dup"
        loads = len(re.findall(r"\tldu?r\tq", loop)) + 2 * len(re.findall(r"\tldp\tq", loop))
        assert loop.count("sdot") >= 2.5 * loads


@pytest.mark.parametrize(("channels", "outputs", "size"), [(64, 64, 3), (256, 128, 1), (256, 24, 1), (144, 24, 1)])
def test_products_of_matrices_take_fewer_instructions_without_spills(channels, outputs, size):
    program = of_bytes(wide(np.random.default_rng(0), channels, outputs, size, side=(14, 14)))
    bodies = assembly(program, I8MM)
    loops = [loop for name, body in bodies.items() if name.startswith("linear") for loop in innermost(body)]
    products = [loop for loop in loops if "smmla" in loop]
    assert products
    for loop in products:
        assert not spilled(loop)
    # More than sdot could do if a loop were nothing else.
    assert max(32 * loop.count("smmla") / len(re.findall(r"^\t", loop, re.MULTILINE)) for loop in products) > 16


def test_pieces_of_few_codes_are_dot_products():
    program = of_bytes(wide(np.random.default_rng(0), 1, 64, 3, side=(20, 20)))
    assert "sdot" in str(assembly(program, I8MM)) and "smmla" not in str(assembly(program, I8MM))


@pytest.mark.parametrize("seed", range(4))
def test_nothing_of_tvm_is_called(seed):
    for body in assembly(random_program(seed, wide=False)).values():
        assert set(re.findall(r"\tbl?\t([A-Za-z_]\w*)", body)) <= {"memcpy", "memset", "memmove"}


def test_without_the_instruction_none_is_there():
    program = wide(np.random.default_rng(0), 64, 64, 3)
    assert "sdot" in str(assembly(program)) and "sdot" not in str(assembly(program, NEON))
    assert (SDOT.emulated, NEON.emulated) == ("cortex-a76", "cortex-a53"), "QEMU refuses what these do not have"


@pytest.mark.parametrize("processor", ["sdot", "neon"])
@pytest.mark.parametrize("lowest", [1, 33])
def test_every_sum_is_rounded_as_the_program_says(load, processor, lowest):
    """Weights are zero, so that biases are sums: extremes, ties, neighbours of ties, and all the shifts there are."""
    random, outputs = np.random.default_rng(lowest), 6144
    program = wide(random, 16, outputs, 1, side=(1, 1))
    (conv,) = program.operations
    shift = np.resize(np.arange(lowest, 63), outputs)
    multiplier = np.where(random.random(outputs) < 0.5, 1 << 30, random.integers(1 << 30, 1 << 31, outputs))
    # Sums whose codes are about -200 to 200; with a multiplier of 2^30, half a step more is a tie.
    steps = random.integers(-200, 200, outputs) * 2 + random.integers(0, 2, outputs)
    sums = np.rint(steps * 2.0 ** (shift - 1) / multiplier) + random.integers(-1, 2, outputs)
    sums[::16], sums[8::16] = -(1 << 31), (1 << 31) - 1
    conv.weights[:] = 0
    conv.bias[:] = np.clip(sums, -(1 << 31), (1 << 31) - 1)
    requantize = replace(conv.requantize, multiplier=multiplier.astype(np.int32), shift=shift.astype(np.int32))
    program = replace(program, operations=(replace(conv, requantize=requantize),))
    codes = random_codes(program, 1)
    expected = interpret(program, codes)["y"]
    assert len(np.unique(expected)) > 200
    np.testing.assert_array_equal(load(program, processor).run_codes([codes["x"]])[0], expected)


@pytest.mark.parametrize("processor", [SDOT, ANDROID], ids=["linux", "android"])
def test_a_library_needs_memcpy_and_memset_alone(tmp_path, processor):
    network = library.network_of(random_program(3, wide=False), processor)
    backend.write(network, "net", tmp_path)
    symbols = [line.split() for line in read(tmp_path / "libnet.so", "--dyn-syms").splitlines()]
    names = {words[-1]: words[6] for words in symbols if len(words) == 8 and words[0] != "Num:"}
    made = {name for name, section in names.items() if section != "UND"}
    assert made == {f"net_{stem}" for stem in library.exports(network)}
    weak = {words[-1] for words in symbols if len(words) == 8 and words[4] == "WEAK"}
    needed = {name.split("@")[0] for name, section in names.items() if section == "UND" and name not in weak}
    assert needed <= {"memcpy", "memset", "memmove"}
    dynamic = read(tmp_path / "libnet.so", "-d")
    assert re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic) == list(processor.needs)
    assert (SDOT.needs, ANDROID.needs) == ((), ("libc.so",)), "whose loader looks nowhere else"
    assert "Library soname: [libnet.so]" in dynamic and "TEXTREL" not in dynamic
    assert "AArch64" in read(tmp_path / "libnet.so", "-h")


def test_android_has_pages_of_16_kb_and_its_register(tmp_path):
    program = wide(np.random.default_rng(0), 64, 64, 3)
    backend.write(library.network_of(program, ANDROID), "net", tmp_path)
    headers = [line.split() for line in read(tmp_path / "libnet.so", "-l").splitlines()]
    loads = [words for words in headers if words[:1] == ["LOAD"]]
    assert loads and {int(words[-1], 16) for words in loads} == {16384}
    # Sections lie in pages as they lie in the file.
    assert all(int(words[1], 16) % 16384 == int(words[2], 16) % 16384 for words in loads)
    assert "x18" not in str(assembly(program, ANDROID)), "it is the system's there"


def test_the_runner_is_static(tmp_path):
    backend.write(library.network_of(random_program(3, wide=False), SDOT), "net", tmp_path)
    headers = read(tmp_path / "net_runner", "-l", "-h")
    assert "EXEC" in headers and "INTERP" not in headers and "DYNAMIC" not in headers


def test_the_same_program_gives_the_same_bytes(tmp_path):
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        written = backend.write(library.network_of(random_program(3, wide=False), SDOT), "net", tmp_path / name)
        made.append([(tmp_path / name / file).read_bytes() for file in written])
    assert made[0] == made[1] and len(made[0]) == 5


def test_android_s_code_equals_the_interpreter(load):
    program = wide(np.random.default_rng(4), 40, 70, 3)
    codes = random_codes(program, 1)
    expected = interpret(program, codes)["y"]
    np.testing.assert_array_equal(load(program, "sdot-android").run_codes([codes["x"]])[0], expected)


def test_one_process_takes_many_inputs(load):
    program = random_program(5, wide=False)
    session = load(program, "sdot")
    for draw in range(20):
        codes = random_codes(program, draw)
        np.testing.assert_array_equal(session.run_codes([codes["x"]])[0], interpret(program, codes)["y"])


@pytest.mark.skipif(platform.machine() == "aarch64", reason="is that machine")
def test_another_machine_is_told_so(load, tmp_path):
    load(random_program(1, wide=False), "sdot")
    with pytest.raises(OSError, match=f"is for aarch64, and this is {platform.machine()}"):
        InferenceSession(tmp_path)


def test_a_processor_that_lacks_the_instruction_ends_in_one_line(load, tmp_path, monkeypatch):
    network = library.network_of(wide(np.random.default_rng(0), 64, 64, 3), SDOT)
    older = replace(SDOT, emulated="cortex-a53")
    backend.write(replace(network, processor=older), "net", tmp_path)
    session = emulate.EmulatedSession(tmp_path)
    with pytest.raises(VerificationError, match="the emulated network left with"):
        session.run_codes([np.zeros(session.inputs[0].stored, np.int8)])


def test_an_emulator_that_is_not_here_is_named(monkeypatch):
    monkeypatch.setattr(emulate.shutil, "which", lambda name: None)
    with pytest.raises(TargetError, match="needs qemu-aarch64") as caught:
        emulate.emulator("aarch64")
    assert caught.value.exit_code == 7 and "apt-get install qemu-user" in str(caught.value)


@pytest.mark.skipif(platform.machine() == "aarch64", reason="links for itself")
def test_a_linker_that_is_not_here_is_named(monkeypatch):
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    with pytest.raises(TargetError, match="needs a linker for aarch64") as caught:
        library.linker("aarch64")
    assert caught.value.exit_code == 7 and "apt-get install lld" in str(caught.value)
