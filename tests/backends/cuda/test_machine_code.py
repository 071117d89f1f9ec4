"""Machine code for all architectures, taken apart: which instructions multiply, and that nothing is kept in memory."""

from __future__ import annotations

import re
import struct

import pytest
from emulated_cuda.machine_code import taken_apart

from qcompile.backends.cuda import compiler
from qcompile.backends.cuda.linear import NARROW, TILES
from qcompile.backends.cuda.network import LAYER, prelude
from qcompile.core.errors import VerificationError

#: By kernel, its call: every tile, every width in which codes are read and written, both roundings, every window.
KERNELS = {
    **{f"tile_{at}": f"linear<{tile.kind}, {tile.pixels}, {tile.outputs}, {taken}, {given}, {flag}>"
       for at, (tile, taken, given, flag) in enumerate(zip(
           TILES, (16, 16, 8, 4, 16, 16, 8, 1), (16, 16, 8, 4, 1, 16, 16, 4), ("HIGH", "SHIFTED") * 4, strict=False))},
    **{f"tile_0_{given}_{form}": f"linear<{TILES[0].kind}, {TILES[0].pixels}, {TILES[0].outputs}, 16, {given}, {form}>"
       for given, form in ((1, "HIGH"), (4, "HIGH"))},
    "narrow": f"linear<{NARROW.kind}, {NARROW.pixels}, {NARROW.outputs}, 4, 4, HIGH>",
    "narrow_bytes": f"linear<{NARROW.kind}, {NARROW.pixels}, {NARROW.outputs}, 1, 1, SHIFTED>",
    "gemv_16": "gemv<4, 16, HIGH>", "gemv_4": "gemv<4, 4, SHIFTED>", "gemv_1": "gemv<4, 1, HIGH>",
    "depthwise_3": "depthwise<3, 3, 128, 4, HIGH>", "depthwise_5": "depthwise<5, 5, 128, 4, SHIFTED>",
    "depthwise_1": "depthwise<3, 3, 128, 1, HIGH>",
}  # fmt: skip
TENSOR = {"75": "IMMA.8816.S8.S8"}


def source() -> str:
    parts = [f'extern "C" __global__ void __launch_bounds__({bounds(body)}) {name}({LAYER})\n'
             f"{{ {body}(input, weights, table, output, shape); }}\n" for name, body in KERNELS.items()]  # fmt: skip
    return prelude() + "".join(parts)


def bounds(body: str) -> str:
    found = [tile.resident for tile in (*TILES, NARROW) if f"<{tile.kind}, " in body]
    return f"{threads(body)}, {found[0] if found else 1}"


def threads(body: str) -> int:
    cores = re.search(r"TensorCores<\d+, \d+, (\d), (\d)>", body)
    return 32 * int(cores[1]) * int(cores[2]) if cores else 256 if "DotProducts" in body else 128


@pytest.fixture(scope="session", autouse=True)
def nvrtc():
    """Skip without what compiles."""
    if not compiler.available():
        pytest.skip("neither NVRTC nor nvFatbin")


@pytest.mark.parametrize("architecture", compiler.ARCHITECTURES)
def test_every_kernel_is_of_the_right_instructions(architecture, tmp_path):
    made = compiler.compile_cuda(source(), architecture)
    assert made.spills() == []
    codes = taken_apart(made.code, tmp_path)
    assert set(codes) == set(KERNELS)
    for name, code in codes.items():
        assert code.count("LDL") == code.count("STL") == 0, f"{name} keeps registers in memory"
        assert not any(re.search(r"\b(LDL|STL)\.", line) for line in code.lines)
        if name.startswith("tile"):
            assert code.looped(TENSOR.get(architecture, "IMMA.16832.S8.S8")) >= 8, name
            assert (code.count("LDGSTS.E") + code.count("LDGSTS.E.BYPASS.128") > 0) == (architecture != "75"), name
        else:
            products = "IDP.4A.S8.S8"
            assert (code.count(products) if name.startswith("depthwise") else code.looped(products)) >= 4, name
            assert not any("IMMA" in line for line in code.lines)


def test_spills_are_read_from_the_assemblers_account():
    said = [("good", 0), ("bad", 8)]
    lines = [f"ptxas info : Function properties for {name}\nptxas . {n} bytes stack frame, {n} bytes spill stores"
             for name, n in said]  # fmt: skip
    assert compiler.Cubin("80", b"", "\n".join(lines)).spills() == ["bad"]
    # What needs a place in memory has one, and is found.
    text = (
        'extern "C" __global__ void f(int *x, int n) { int kept[64]; for (int i = 0; i < n; i++) kept[x[i]] = i;'
        " x[n] = kept[n]; }"
    )
    assert compiler.compile_cuda(text, "80").spills() == ["f"]
    with pytest.raises(VerificationError, match="f: keeps registers in memory on sm_75"):
        compiler.compile_all(text)


def test_what_does_not_compile_says_so_in_one_line():
    with pytest.raises(VerificationError, match=r"sm_80: NVRTC refuses a kernel: .*undefined.*; report it"):
        compiler.compile_cuda("__global__ void f() { nothing(); }", "80")


def test_the_fatbin_has_every_architecture(tmp_path):
    text = 'extern "C" __global__ void f(int *x) { x[threadIdx.x] = 3; }'
    content = compiler.compile_all(text)
    assert content == compiler.compile_all(text), "the same bytes"
    assert content[:4] == bytes.fromhex("50ed55ba")
    # One entry for each: a header that names its architecture.
    entries, at = [], 16
    while at < len(content):
        kind, _, header, size = struct.unpack_from("<HHIQ", content, at)
        assert kind == 2, "machine code"
        entries.append(struct.unpack_from("<I", content, at + 28)[0])
        at += header + size
    assert entries == [75, 80, 86, 87, 89, 90]
