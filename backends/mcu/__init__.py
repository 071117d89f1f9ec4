"""Microcontrollers: a network as C99 that stands alone."""

from __future__ import annotations

from qcompile.backends.mcu.backend import McuBackend

__all__ = ["McuBackend"]
