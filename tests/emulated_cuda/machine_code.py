"""Machine code of kernels, taken apart."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

_LABEL = re.compile(r"^\s*(\.L_x?_?\w+):")
_JUMP = re.compile(r"\bBRA\b.*`\((\.L\w+)\)")


@dataclass(frozen=True)
class Code:
    """A kernel taken apart."""

    lines: list[str]

    def count(self, mnemonic: str) -> int:
        return sum(bool(re.search(rf"\b{re.escape(mnemonic)}\b", line)) for line in self.lines)

    def looped(self, mnemonic: str) -> int:
        """Count an instruction within the innermost loops that have it, from a label to the jump back there."""
        labels, best = dict[str, int](), 0
        for at, line in enumerate(self.lines):
            if found := _LABEL.match(line):
                labels[found[1]] = at
            elif (jump := _JUMP.search(line)) and jump[1] in labels:
                best = max(best, Code(self.lines[labels[jump[1]] : at]).count(mnemonic))
        return best


def taken_apart(code: bytes, folder: Path) -> dict[str, Code]:
    """Return the machine code of each kernel, by nvdisasm; skip without."""
    nvidia = pytest.importorskip("nvidia")
    found = [file for place in nvidia.__path__ for file in Path(place).glob("*/bin/nvdisasm")]
    if not found:
        pytest.skip("no nvdisasm")
    file = folder / "kernels.cubin"
    file.write_bytes(code)
    text = subprocess.run([str(found[0]), "-c", str(file)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^//-+ \.text\.(\w+) +-+\n", text, flags=re.MULTILINE)[1:]
    return {name: Code(body.splitlines()) for name, body in zip(parts[::2], parts[1::2], strict=True)}
