"""Generated C gives the interpreter's codes, bit by bit: on this machine, and on emulated processors."""

from __future__ import annotations

import numpy as np
import pytest
from random_programs import random_codes, random_narrow_program, random_program

from qcompile.backends.integer.interpret import interpret
from qcompile.backends.integer.storage import to_bytes
from qcompile.backends.mcu.backend import McuBackend
from qcompile.backends.mcu.emulate import emulate
from qcompile.backends.mcu.emulated_run import driver
from qcompile.backends.mcu.host import HostNetwork

PROGRAMS, ALL = range(30), range(30, 300)
#: Programs that are linked into one run, and inputs of each.
EMULATED, INPUTS = 4, 2


def check_on_host(pack, tmp_path, seed, draw=random_program):
    program = draw(seed)
    source = pack(program)
    network = HostNetwork(tmp_path, source.name, program)
    for turn in range(3):
        codes = random_codes(program, turn)
        expected, found = interpret(program, codes), network.run(codes)
        for name, array in expected.items():
            kinds = [type(operation).__name__ for operation in program.operations]
            np.testing.assert_array_equal(found[name], array, err_msg=f"seed {seed}: {kinds}")


@pytest.mark.parametrize("seed", PROGRAMS)
def test_host_code_equals_the_interpreter(pack, tmp_path, seed):
    check_on_host(pack, tmp_path, seed)


@pytest.mark.parametrize("seed", PROGRAMS)
def test_host_code_of_maps_in_four_bits_equals_the_interpreter(pack, tmp_path, seed):
    check_on_host(pack, tmp_path, seed, random_narrow_program)


@pytest.mark.slow
@pytest.mark.parametrize("seed", ALL)
def test_host_code_equals_the_interpreter_on_more_programs(pack, tmp_path, seed):
    check_on_host(pack, tmp_path, seed)


def check_on_device(pack, tmp_path, processor, seed, draw=random_program):
    program = draw(seed)
    source = pack(program)
    inputs = [random_codes(program, turn) for turn in range(INPUTS)]
    (tmp_path / "main.c").write_text(driver(program, source.name, INPUTS))
    compiler = next(t for t in McuBackend().targets() if t.name == processor).settings["compiler"]
    kind = program.tensors[program.inputs[0].tensor].dtype
    given = b"".join(to_bytes(codes["x"], kind).tobytes() for codes in inputs)
    seen = emulate([tmp_path / "model.c", tmp_path / "main.c"], processor, {"in.bin": given}, compiler)
    wanted = b"".join(interpret(program, codes)["y"].tobytes() for codes in inputs)
    kinds = [type(operation).__name__ for operation in program.operations]
    assert (seen.status, seen.files["out.bin"]) == (0, wanted), f"seed {seed}: {kinds}"


@pytest.mark.qemu
@pytest.mark.parametrize("processor", ["cortex-m4", "cortex-m55", "cortex-m0plus"])
@pytest.mark.parametrize("seed", range(5))
def test_device_code_equals_the_interpreter(pack, tmp_path, processor, seed):
    check_on_device(pack, tmp_path, processor, seed)


@pytest.mark.qemu
@pytest.mark.parametrize("processor", ["cortex-m4", "cortex-m55", "cortex-m0plus"])
@pytest.mark.parametrize("seed", range(4))
def test_device_code_of_maps_in_four_bits_equals_the_interpreter(pack, tmp_path, processor, seed):
    check_on_device(pack, tmp_path, processor, seed, random_narrow_program)


@pytest.mark.slow
@pytest.mark.qemu
@pytest.mark.parametrize("processor", ["cortex-m4", "cortex-m55"])
@pytest.mark.parametrize("seed", range(5, 300))
def test_device_code_equals_the_interpreter_on_more_programs(pack, tmp_path, processor, seed):
    check_on_device(pack, tmp_path, processor, seed)
