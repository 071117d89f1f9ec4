"""Machine code of kernels in float and of products of activations, for all architectures: nothing is in memory."""

from __future__ import annotations

import re

import pytest
from emulated_cuda.machine_code import taken_apart
from float_programs import every_kind

from qcompile.backends.cuda import compiler
from qcompile.backends.cuda.network import network_of


@pytest.mark.parametrize("architecture", compiler.ARCHITECTURES)
def test_kernels_in_float_keep_nothing_in_memory(architecture, tmp_path):
    if not compiler.available():
        pytest.skip("neither NVRTC nor nvFatbin")
    network = network_of(every_kind())
    made = compiler.compile_cuda(network.source(), architecture)
    assert made.spills() == []
    apart = taken_apart(made.code, tmp_path)
    assert set(apart) == set(network.sources)
    for name, code in apart.items():
        assert not any(re.search(r"\b(LDL|STL)\b", line) for line in code.lines), f"{name} keeps registers in memory"
        tensor = any("IMMA" in line for line in code.lines)
        floating = "float_product" in network.sources[name]
        assert tensor == (name.startswith(("product", "linear")) and not floating), name
        # What is fused is so where the source says it: a GELU's polynomials, no other product and sum.
        assert any("FFMA" in line for line in code.lines) or not floating
