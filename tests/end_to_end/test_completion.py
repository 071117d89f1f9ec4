"""Shells complete commands, options and targets."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["comp"], {"compare", "compile"}),
        (["model.onnx", "--max-s"], {"--max-size", "--max-sram"}),
        (["compile", "model.onnx", "--target", "cortex-m"], {"cortex-m4", "cortex-m7", "cortex-m55"}),
        (["model.onnx", "--target", "cuda"], {"cuda", "cuda:tensorrt", "cuda:tvm"}),
    ],
)
def test_what_was_begun_is_completed(typed: list[str], expected: set[str]) -> None:
    words = {"COMP_WORDS": " ".join(["qcompile", *typed]), "COMP_CWORD": str(len(typed))}
    script = "import sys; sys.argv[0] = 'qcompile'; from qcompile.cli import main; main()"
    environment = os.environ | words | {"_QCOMPILE_COMPLETE": "bash_complete"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    found = {line.partition(",")[2] for line in done.stdout.splitlines()}
    assert expected <= found and all(name.startswith(typed[-1]) for name in found), done
