"""What the trained networks of MLPerf Tiny take, exactly: a slower kernel does not pass, nor one with other codes."""

from __future__ import annotations

import hashlib
import json
import shutil
import tomllib
from pathlib import Path

import pytest

from qcompile.backends.mcu.backend import McuBackend
from qcompile.backends.mcu.emulated_run import run_package
from qcompile.core import model as models
from qcompile.core.plan import QuantPlan

HERE = Path(__file__).parent
#: Quantized models that compiles for a Cortex-M4 wrote (`reference.onnx`): what was measured then is frozen in them.
NETWORKS = sorted((HERE / "networks").glob("*.onnx"))
#: Executed instructions of one run, by compiler; ResNet-8's are those of the compile in tests/end_to_end.
COUNTS = json.loads((HERE / "instructions.json").read_text())
ARENAS = {"ad-autoencoder": 768, "ds-cnn": 11_840, "vww-mobilenet": 37_632}


@pytest.mark.qemu
@pytest.mark.parametrize("processor", ["cortex-m4", "cortex-m7", "cortex-m55"])
@pytest.mark.parametrize("path", NETWORKS, ids=lambda path: path.stem)
def test_a_trained_network_takes_as_many_instructions_as_it_did(tmp_path, path, processor):
    if processor == "cortex-m55" and shutil.which("clang-19") is None:
        pytest.skip("needs clang-19")
    target = next(target for target in McuBackend().targets() if target.name == processor)
    lowered = McuBackend().lower(models.load(path), QuantPlan(), target, tmp_path)
    seen = run_package(tmp_path)
    assert json.loads((tmp_path / "footprint.json").read_text())["arena_bytes"] == ARENAS[path.stem]
    known = COUNTS.get(f"{lowered.measured['compiler']}, {processor}")
    assert known is None or seen.instructions == known[path.stem], "update instructions.json if this is meant"


def test_the_networks_are_those_of_the_catalogue(root):
    catalog = tomllib.loads((root / "models/catalog.toml").read_text())
    [entry] = [entry for entry in catalog["committed"] if "tests/backends/mcu/networks" in entry["file"]]
    content = b"".join(path.read_bytes() for path in NETWORKS)
    assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert entry["licence"] == "Zlib" and {path.stem for path in NETWORKS} == set(ARENAS)
    assert all(path.stat().st_size < 1 << 20 for path in NETWORKS)
