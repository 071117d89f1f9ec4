"""Boards and bounds on memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qcompile.backends.mcu.backend import McuBackend
from qcompile.backends.mcu.boards import Limits, boards, check_board, find_board
from qcompile.core.errors import TargetError, UsageError

TARGETS = {target.name: target for target in McuBackend().targets()}


def test_every_target_is_one_of_integers_alone():
    assert set(TARGETS) == {"cortex-m0plus", "cortex-m4", "cortex-m55", "cortex-m7", "riscv32"}
    assert all(target.integer_only and target.activation_dtype == "int8" for target in TARGETS.values())


def test_every_board_has_a_target():
    assert {board.target for board in boards().values()} <= set(TARGETS)
    assert boards()["stm32f746"].sram_bytes == 320 * 1024 and boards()["nrf52840"].flash_bytes == 1024 * 1024


def test_the_tighter_bound_counts_and_is_named():
    board = find_board("nrf52840")
    found = Limits.of({"board": "nrf52840", "max_sram": 1000, "max_flash": None})
    assert (found.sram_bytes, found.sram_place) == (1000, "--max-sram")
    assert (found.flash_bytes, found.flash_place) == (board.flash_bytes, "--board nrf52840")
    found = Limits.of({"board": "nrf52840", "max_sram": 10**9})
    assert found.sram_bytes == board.sram_bytes
    assert Limits.of({}) == Limits()


def test_a_board_that_is_not_there_or_not_the_targets_is_refused():
    with pytest.raises(UsageError, match=r"no such board; use one of .*nrf52840"):
        find_board("toaster")
    with pytest.raises(UsageError, match="--target cortex-m7"):
        check_board("stm32f746", TARGETS["cortex-m4"])
    check_board("stm32f746", TARGETS["cortex-m7"])


def test_without_tvm_one_line_tells_what_to_install(monkeypatch):
    def absent():
        raise TargetError("tvm", "is not installed", "pip install 'qcompile[tvm]'")

    monkeypatch.setattr(McuBackend, "available", lambda self: False)
    monkeypatch.setattr("qcompile.backends.mcu.backend.load_tvm", absent)
    with pytest.raises(TargetError, match=r"pip install 'qcompile\[tvm\]'"):
        McuBackend().check(TARGETS["cortex-m4"])


def test_a_device_that_is_not_here_is_not_timed():
    with pytest.raises(TargetError, match="no times"):
        McuBackend().measure(TARGETS["cortex-m4"], (), "", lambda items, total, what: items)
    settings = replace(TARGETS["cortex-m4"], settings={**TARGETS["cortex-m4"].settings, "board": "rp2040"})
    with pytest.raises(UsageError, match="cortex-m0plus"):
        McuBackend().check(settings)
