"""W4A16: rows of halves times weights of four bits, held to float64 within what float32's sums may be off."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.backends.cuda import compiler
from qcompile.backends.cuda.driver import Driver, has_device
from qcompile.backends.cuda.four_bits import BLOCK, Gemv, exact, pack
from qcompile.backends.cuda.network import prelude

SHAPES = [(1, 32), (8, 64), (9, 4096), (13, 4128), (37, 5 * 1024 + 96), (64, 1024)]


def drawn(outputs, depth, seed):
    random = np.random.default_rng(seed)
    x = random.normal(size=depth).astype(np.float16)
    scales = random.uniform(0.001, 0.03, (outputs, depth // BLOCK)).astype(np.float16)
    return x, random.integers(0, 16, (outputs, depth)).astype(np.uint8), scales


def computed(driver, gemv, code, x, codes, scales):
    module = driver.made("cuModuleLoadData", code)
    stream, made = driver.made("cuStreamCreate", 1), np.empty(gemv.outputs, np.float16)
    addresses = []
    addresses += [driver.upload(array.tobytes()) for array in (x, pack(codes), scales, gemv.table)]
    addresses.append(driver.allocate(made.nbytes))
    driver.launch(driver.function(module, "gemv"), gemv.grid, gemv.threads, addresses, gemv.numbers, stream)
    pinned = driver.made("cuMemAllocHost_v2", made.nbytes)
    driver.call("cuMemcpyDtoHAsync_v2", pinned, addresses[-1], made.nbytes, stream)
    driver.call("cuStreamSynchronize", stream)
    ctypes.memmove(made.ctypes.data, pinned.value, made.nbytes)
    for address in addresses:
        driver.call("cuMemFree_v2", address)
    driver.call("cuMemFreeHost", pinned)
    driver.call("cuStreamDestroy_v2", stream)
    driver.call("cuModuleUnload", module)
    return made


def check(driver, code, outputs, depth, seed):
    x, codes, scales = drawn(outputs, depth, seed)
    sums, bounds = exact(x, codes, scales)
    found = computed(driver, Gemv(outputs, depth), code, x, codes, scales).astype(np.float64)
    assert np.all(np.abs(found - sums) <= bounds), (np.abs(found - sums) / bounds).max()
    assert np.abs(sums).max() > 100 * bounds.max(), "a sum that says something"


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    from emulated_cuda import emulate

    folder = tmp_path_factory.mktemp("gemv")
    text = Gemv(1, 32).kernel("gemv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QCOMPILE_LIBCUDA", str(emulate.built([prelude(emulate.REPLACED), text], folder)))
        yield Driver()


@pytest.mark.parametrize(("outputs", "depth"), SHAPES)
def test_sums_are_as_near_as_float32_has_them(emulated, outputs, depth):
    check(emulated, bytes.fromhex("50ed55ba"), outputs, depth, outputs)


def test_each_code_and_place_counts(emulated):
    # Powers of two: nothing is rounded, so that a wrong place shows.
    depth = 2 * BLOCK
    x = np.zeros(depth, np.float16)
    codes = np.arange(16, dtype=np.uint8)[:, None] + np.zeros(depth, np.uint8)
    scales = np.tile(np.array([0.5, 2.0], np.float16), (16, 1))
    for place in range(depth):
        x[:] = 0.0
        x[place] = 4.0
        made = computed(emulated, Gemv(16, depth), bytes.fromhex("50ed55ba"), x, codes, scales)
        np.testing.assert_array_equal(made, (np.arange(16) - 8) * 4.0 * (0.5 if place < BLOCK else 2.0))


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_codes_are_packed_as_matmulnbits_has_them(outputs, blocks, seed):
    codes = np.random.default_rng(seed).integers(0, 16, (outputs, blocks * BLOCK)).astype(np.uint8)
    packed = pack(codes)
    assert packed.shape == (outputs, blocks * BLOCK // 2)
    for place in range(blocks * BLOCK):
        np.testing.assert_array_equal(packed[:, place // 2] >> 4 * (place % 2) & 15, codes[:, place])


def test_what_is_no_block_of_codes_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 33\) codes up to 0 are no blocks of 32"):
        pack(np.zeros((2, 33), np.uint8))
    with pytest.raises(ValueError, match="codes up to 16"):
        pack(np.full((2, 32), 16, np.uint8))


@pytest.mark.parametrize("architecture", compiler.ARCHITECTURES)
def test_its_machine_code_keeps_nothing_in_memory_and_converts_nothing(architecture, tmp_path):
    from emulated_cuda.machine_code import taken_apart

    if not compiler.available():
        pytest.skip("neither NVRTC nor nvFatbin")
    made = compiler.compile_cuda(Gemv(4096, 4096).source("gemv"), architecture)
    assert made.spills() == []
    (code,) = taken_apart(made.code, tmp_path).values()
    assert not any("LDL" in line or "STL" in line or "I2F" in line for line in code.lines)
    # Eight blocks of 32 codes in flight, sixteen bytes at once.
    assert sum("LDG.E.128" in line for line in code.lines) >= 8 and sum("FFMA" in line for line in code.lines) >= 256


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(20))
def test_a_device_is_as_near(seed):
    if not has_device() or not compiler.available():
        pytest.skip("no CUDA device, or nothing to compile with")
    random, driver = np.random.default_rng(seed), Driver()
    outputs, depth = int(random.integers(1, 5000)), int(random.integers(1, 300)) * BLOCK
    here = driver.capability.removeprefix("sm_")
    code = compiler.compile_cuda(Gemv(outputs, depth).source("gemv"), "90a" if here == "90" else here).code
    check(driver, code, outputs, depth, seed)
