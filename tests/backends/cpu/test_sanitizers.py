"""Libraries under sanitizers, through their C API: 1,000 runs each, between pages that nobody may touch."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from random_programs import random_program, wide, with_table

from qcompile.backends.cpu import library
from qcompile.backends.cpu.backend import write
from qcompile.backends.cpu.layout import NETWORK, POOL, THREADS
from qcompile.backends.cpu.session import InferenceSession, absent
from qcompile.backends.integer.interpret import dequantize_output, interpret, quantize_input

pytest.importorskip("tvm")

from qcompile.backends.cpu import pool
from qcompile.backends.tvm.schedules import shares
from qcompile.backends.tvm.schedules.x86 import PROCESSORS

HERE = Path(__file__).parent
RUNS = 1000
GCC = ("gcc", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fno-sanitize-recover=all", "-pthread")

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler with sanitizers")


def guarded(folder, name, samples):
    """Compile guarded.c for a library, run it over samples and return its outputs."""
    macros = [f'-DHEADER="{name}.h"', f"-DSTEM={name}", f"-DMACRO={name.upper()}"]
    macros += ["-DTILES"] * (f"{name}_allow(" in (folder / f"{name}.h").read_text())
    words = [*GCC, "-fsanitize=address,undefined", *macros, f"-I{folder}", str(HERE / "guarded.c"), f"-L{folder}"]
    subprocess.run([*words, f"-l{name}", "-Wl,-rpath,$ORIGIN", "-o", "guarded"], cwd=folder, check=True)
    given = np.ascontiguousarray(samples, np.float32).tobytes()
    done = subprocess.run([folder / "guarded"], input=given, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    return np.frombuffer(done.stdout, np.float32).reshape(len(samples), -1)


def check(program, processor, folder):
    if missing := absent(PROCESSORS[processor].flags):
        pytest.skip(f"the processor has no {missing[0]}")
    write(library.network_of(program, PROCESSORS[processor]), "net", folder)
    (port,), (made,) = program.inputs, program.outputs
    scale = program.tensors[port.tensor].scale
    samples = np.random.default_rng(7).normal(0, 60 * scale, (RUNS, *port.shape)).astype(np.float32)
    found = guarded(folder, "net", samples)
    for index in (0, 1, 2, 3, RUNS - 1):
        codes = interpret(program, {"x": quantize_input(program, port, samples[index])})["y"]
        np.testing.assert_array_equal(found[index], dequantize_output(program, made, codes).reshape(-1))


@pytest.mark.parametrize("seed", range(8))
def test_programs_touch_nothing_but_their_own(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(shares, "WORTH", 0)
    check(random_program(seed, wide=False), list(PROCESSORS)[seed % len(PROCESSORS)], tmp_path)


@pytest.mark.parametrize("processor", ["avx512-vnni", "amx"])
@pytest.mark.parametrize(
    ("channels", "outputs", "size", "groups"), [(3, 70, 3, 1), (65, 33, 1, 1), (70, 70, 3, 70), (24, 20, 5, 1)]
)
def test_wide_layers_touch_nothing_but_their_own(tmp_path, monkeypatch, processor, channels, outputs, size, groups):
    monkeypatch.setattr(shares, "WORTH", 0)
    random = np.random.default_rng(channels)
    check(with_table(wide(random, channels, outputs, size, groups=groups), random), processor, tmp_path)


@pytest.mark.parametrize("offset", ["-1", "WORKSPACE"])
def test_what_is_touched_beside_a_workspace_is_found(tmp_path, offset):
    # A library that says that it needs a page less than it does, or one that writes in front of what it is given.
    if missing := absent(PROCESSORS["avx512-vnni"].flags):
        pytest.skip(f"the processor has no {missing[0]}")
    program = wide(np.random.default_rng(0), 64, 64, 3, side=(20, 20))
    write(library.network_of(program, PROCESSORS["avx512-vnni"]), "net", tmp_path)
    header = tmp_path / "net.h"
    text = header.read_text()
    if offset == "WORKSPACE":
        text = re.sub(r"(WORKSPACE_BYTES )(\d+)", lambda found: f"{found[1]}{int(found[2]) - 4096}", text)
    else:
        text = text.replace(
            "#endif\n", "#define net_run(workspace, in, out) (net_run)((char *)(workspace) - 64, in, out)\n#endif\n"
        )
    header.write_text(text)
    with pytest.raises(AssertionError):
        guarded(tmp_path, "net", np.zeros((4, *program.inputs[0].shape), np.float32))


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_the_pool_under_sanitizers(tmp_path, sanitizers):
    macros = [f"-DMOST={THREADS}", f"-DBYTES={POOL}", f"-DNETWORK={NETWORK}", f"-I{pool.HERE}"]
    words = [*GCC, f"-fsanitize={sanitizers}", *macros, str(HERE / "pool_check.c"), "-o", str(tmp_path / "check")]
    subprocess.run(words, check=True)
    done = subprocess.run([tmp_path / "check"], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_wait_that_does_not_wait_is_found(tmp_path):
    source = pool.SOURCE.read_text()
    weaker = source.replace("__ATOMIC_ACQ_REL", "__ATOMIC_RELAXED").replace("__ATOMIC_RELEASE", "__ATOMIC_RELAXED")
    assert weaker != source
    (tmp_path / "pool.c").write_text(weaker)
    macros = [f"-DMOST={THREADS}", f"-DBYTES={POOL}", f"-DNETWORK={NETWORK}", f"-I{tmp_path}"]
    shutil.copy(HERE / "pool_check.c", tmp_path)
    words = [*GCC, "-fsanitize=thread", *macros, str(tmp_path / "pool_check.c"), "-o", str(tmp_path / "check")]
    subprocess.run(words, check=True)
    done = subprocess.run([tmp_path / "check"], capture_output=True, check=False)
    assert done.returncode and b"data race" in done.stderr


def test_a_library_runs_with_static_memory_that_nobody_began(tmp_path):
    if missing := absent(PROCESSORS["avx512-vnni"].flags):
        pytest.skip(f"the processor has no {missing[0]}")
    program = wide(np.random.default_rng(0), 64, 64, 3, side=(28, 28))
    write(library.network_of(program, PROCESSORS["avx512-vnni"]), "net", tmp_path)
    (tmp_path / "main.c").write_text(
        '#include "net.h"\n#include <stdio.h>\n'
        "static _Alignas(NET_ALIGNMENT) char workspace[NET_WORKSPACE_BYTES];\n"
        "static int8_t in[NET_INPUT_BYTES], out[NET_OUTPUT_BYTES];\n"
        "int main(void) { return !fread(in, sizeof in, 1, stdin) || (net_run(workspace, in, out), "
        "!fwrite(out, sizeof out, 1, stdout)); }\n"
    )
    words = ["gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", "main.c", "-L.", "-lnet", "-Wl,-rpath,$ORIGIN"]
    subprocess.run([*words, "-o", "main"], cwd=tmp_path, check=True)
    codes = np.random.default_rng(0).integers(-128, 128, program.tensors["t0"].shape).astype(np.int8)
    done = subprocess.run([tmp_path / "main"], input=codes.tobytes(), capture_output=True, check=True)
    assert done.stdout == InferenceSession(tmp_path, 2).run_codes([codes])[0].tobytes()
