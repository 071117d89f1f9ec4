"""Threads of a library: the same codes for any number of them, and none left behind."""

from __future__ import annotations

import gc
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from float_programs import floats, pointwise, product, program_of, rows
from random_programs import random_codes, random_program, wide, with_table

from qcompile.backends.cpu import library
from qcompile.backends.cpu.backend import write
from qcompile.backends.cpu.network import Call
from qcompile.backends.cpu.phases import phases
from qcompile.backends.cpu.session import InferenceSession
from qcompile.backends.integer import float_operations as ops
from qcompile.backends.integer.expressions import leaf, number
from qcompile.backends.integer.interpret import interpret

pytest.importorskip("tvm")

from qcompile.backends.cpu import pool
from qcompile.backends.tvm.schedules import shares
from qcompile.backends.tvm.schedules.vectors import COLUMNS, OUTPUTS, ROWS
from qcompile.backends.tvm.schedules.x86 import PROCESSORS

VNNI = PROCESSORS["avx512-vnni"]


@pytest.fixture
def everything_shared(monkeypatch):
    """Let threads share whatever has two iterations."""
    monkeypatch.setattr(shares, "WORTH", 0)


def check(program, folder, draws=3):
    codes = [random_codes(program, draw) for draw in range(draws)]
    expected = [interpret(program, each)["y"] for each in codes]
    for threads in (1, 2, 3, 5):
        session = InferenceSession(folder, threads)
        for _ in range(3):
            for given, wanted in zip(codes, expected, strict=True):
                found = session.run_codes([given["x"]])[0]
                np.testing.assert_array_equal(found, wanted, err_msg=f"{threads} threads")


@pytest.mark.usefixtures("everything_shared")
@pytest.mark.parametrize("seed", range(24))
def test_any_number_of_threads_equals_the_interpreter(load, tmp_path, seed):
    program = random_program(seed, wide=False)
    load(program, list(PROCESSORS)[seed % len(PROCESSORS)])
    check(program, tmp_path)


@pytest.mark.usefixtures("everything_shared")
@pytest.mark.parametrize("processor", ["avx512-vnni", "amx"])
@pytest.mark.parametrize("loop", [ROWS, COLUMNS, OUTPUTS])
@pytest.mark.parametrize(
    ("channels", "outputs", "size", "stride", "groups", "side"),
    [(17, 200, 1, 1, 1, (7, 7)), (32, 70, 3, 1, 1, (9, 11)), (64, 330, 1, 1, 1, (1, 1)), (8, 24, 3, 1, 2, (6, 6)),
     (150, 150, 3, 1, 150, (9, 11)), (96, 96, 5, 2, 96, (14, 15))],
)  # fmt: skip
def test_whichever_loop_is_shared(
    load, tmp_path, monkeypatch, loop, processor, channels, outputs, size, stride, groups, side
):
    def picked(axes):
        costs, _ = axes.get(loop, ((), 0))
        return (loop, len(costs)) if len(costs) > 1 else ("", 0)

    monkeypatch.setattr(shares, "chosen", picked)
    random = np.random.default_rng(channels)
    program = with_table(wide(random, channels, outputs, size, stride, groups, side), random)
    load(program, processor)
    check(program, tmp_path)


def in_float(kind):
    """Return a program of one operation in float."""
    if kind == "Pointwise":
        return pointwise(("exp", ("add", leaf(0), leaf(1))), np.ones((7, 61)), np.ones((1, 61)), shape=(7, 61))
    if kind == "flat":
        return pointwise(("mul", leaf(0), number(0.5)), np.ones((1, 1001)), shape=(1, 1001))
    if kind == "Normalize":
        return rows(ops.Normalize, (2, 9, 33), (np.ones(33, np.float32), np.ones(33, np.float32), 1e-5, True))
    if kind == "FloatSoftmax":
        return rows(ops.FloatSoftmax, (9, 77))
    if kind == "Reduce":
        leaves = (ops.Leaf(0, (1, 0)),)
        operation = ops.Reduce("r", ("x",), "y", leaves, leaf(0), (12,), "sum", 0.5)
        return program_of(operation, [floats("x", 12, 83)], floats("y", 83))
    step = ops.Dequantize(np.array([0.013], np.float32))
    return product((2, 3), 21, 70, 35, step, lambda shape: floats("y", *shape), True, kind == "turned")


@pytest.mark.usefixtures("everything_shared")
@pytest.mark.parametrize("processor", ["avx2", "amx"])
@pytest.mark.parametrize("kind", ["Pointwise", "flat", "Normalize", "FloatSoftmax", "Reduce", "MatMul", "turned"])
def test_any_number_of_threads_gives_the_same_floats(load, tmp_path, processor, kind):
    program = in_float(kind)
    alone, random = load(program, processor), np.random.default_rng(0)
    (call,) = library.network_of(program, PROCESSORS[processor]).calls
    assert call.shared > 1
    tensors = [program.tensors[port.tensor] for port in program.inputs]
    given = [random.integers(-128, 128, tensor.shape).astype(tensor.dtype) for tensor in tensors]
    given = [array / np.float32(64) if array.dtype == np.float32 else array for array in given]
    expected = alone.run_codes(given)[0]
    assert len(np.unique(expected)) > 16, "an output that says something"
    for threads in (2, 3, 5):
        session = InferenceSession(tmp_path, threads)
        for _ in range(3):
            np.testing.assert_array_equal(session.run_codes(given)[0], expected, err_msg=f"{threads} threads")


def test_only_what_is_worth_it_is_shared():
    for side, kinds in (((28, 28), [False, True]), ((3, 3), [False])):
        groups = phases(library.network_of(wide(np.random.default_rng(0), 64, 64, 3, side=side), VNNI).calls)
        # The margin of the network's input has to be there before it is read.
        assert [group[-1].shared > 1 for group in groups] == kinds


def test_threads_wait_where_one_reads_what_another_wrote():
    def call(kernel, operation, shared=0, apart=False):
        return Call(kernel, (), operation, shared, apart)

    one, margin, two = call("linear_0", "a", 4), call("fill_1", "b", apart=True), call("linear_2", "b", 4)
    assert phases([one, margin, margin, two]) == [[one], [margin, margin, two]]
    # What is not the margin of the operation behind it has to be there first.
    other, copy = call("fill_1", "c", apart=True), call("gather_3", "d")
    assert phases([one, copy, other, two]) == [[one], [copy, other], [two]]
    assert phases([copy, margin, two]) == [[copy], [margin, two]]
    # Channels of one operation are apart; one operation of another is not.
    whole, left = call("depthwise_4", "e", 8), call("depthwise_5", "e", 8)
    assert phases([whole, left, one, two]) == [[whole, left], [one], [two]]
    assert phases([whole, call("depthwise_5", "e")]) == [[whole], [call("depthwise_5", "e")]]


def test_parts_are_as_even_as_loops_allow():
    assert shares.shared([1.0] * 7, 2) == [3.0, 4.0]
    # Nine rows are shared by two and by four more evenly than five blocks of channels.
    assert shares.chosen({ROWS: ([1e4] * 9, 0), OUTPUTS: ([1.8e4] * 5, 0)}) == (ROWS, 9)
    # Unless every thread has to read a lot for that.
    assert shares.chosen({ROWS: ([1e4] * 9, 1_000_000), OUTPUTS: ([1.8e4] * 5, 0)}) == (OUTPUTS, 5)
    assert shares.chosen({ROWS: ([shares.WORTH / 3] * 2, 0)}) == ("", 0)


def test_threads_are_the_session_s_own_and_end_with_it(load, tmp_path):
    load(wide(np.random.default_rng(0), 16, 16, 3))
    before = len(list(Path("/proc/self/task").iterdir()))
    sessions = [InferenceSession(tmp_path, 3) for _ in range(2)]
    assert len(list(Path("/proc/self/task").iterdir())) == before + 4
    del sessions
    gc.collect()
    assert len(list(Path("/proc/self/task").iterdir())) == before


@pytest.mark.parametrize("threads", [0, -1, 17])
def test_no_such_number_of_threads_is_told(load, tmp_path, threads):
    load(wide(np.random.default_rng(0), 16, 16, 3))
    with pytest.raises(OSError, match=f"{threads} threads cannot be had: Invalid argument"):
        InferenceSession(tmp_path, threads)


def test_two_instances_of_two_threads_each_run_side_by_side(load, tmp_path):
    program = wide(np.random.default_rng(2), 64, 64, 3, side=(28, 28))
    load(program)
    sessions = [InferenceSession(tmp_path, 2) for _ in range(2)]
    inputs = [random_codes(program, draw)["x"] for draw in range(2)]
    expected = [interpret(program, {"x": codes})["y"] for codes in inputs]
    wrong = []

    def work(session, codes, wanted):
        wrong.extend(True for _ in range(100) if not np.array_equal(session.run_codes([codes])[0], wanted))

    callers = [threading.Thread(target=work, args=each) for each in zip(sessions, inputs, expected, strict=True)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_one_thread_needs_no_threads_of_the_system(tmp_path):
    write(library.network_of(random_program(1, wide=False), VNNI), "net", tmp_path)
    listed = subprocess.run(["nm", "-D", tmp_path / "libnet.so"], capture_output=True, text=True, check=True).stdout
    weak = {line.split()[-1] for line in listed.splitlines() if line.split()[-2] == "w"}
    assert weak == {"pthread_create", "pthread_join", "sched_yield", "sem_init", "sem_wait", "sem_post", "sem_destroy"}


@pytest.mark.skipif(shutil.which("clang-19") is None, reason="needs clang-19")
@pytest.mark.parametrize("architecture", pool.ARCHITECTURES)
def test_the_pool_s_text_is_what_clang_makes_of_it(architecture):
    done = subprocess.run(pool.command(architecture), cwd=pool.HERE, capture_output=True, text=True, check=True)
    assert done.stdout == (pool.HERE / f"pool.{architecture}.ll").read_text(encoding="utf-8")
