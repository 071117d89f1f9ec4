"""What both of PyTorch's exporters write, of every opset in use: models/export_patterns.py made the files."""

from __future__ import annotations

import hashlib
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from qcompile.core import model as models
from qcompile.passes.patterns import Patterns

FOLDER = Path(__file__).parents[1] / "exports"
FILES = sorted(FOLDER.glob("*.onnx"))
LIMIT = 500_000

MHA, GQA, ROPES = "attention 4/4 of 4", "attention 4/2 of 4", {"rope": 2}
EXPECTED: dict[str, dict[str, int]] = {
    "layer_norm": {"layer": 1},
    "rms_norm": {"rms": 1},
    **{name: {name: 1} for name in ("gelu", "gelu_tanh", "silu", "quick_gelu", "hard_swish")},
    **{name: {MHA: 1} for name in ("mha_module", "mha_by_hand", "mha_fused", "sdpa")},
    "gqa_rope": {GQA: 1, **ROPES},
    "pre_norm": {MHA: 1, "layer": 3, "gelu": 1},
    "post_norm": {MHA: 1, "layer": 2, "gelu": 1},
    "llama": {GQA: 1, **ROPES, "rms": 3, "silu": 1},
    "vit": {MHA: 1, "layer": 3, "gelu": 1},
    "bottlenecks": {},
}


def counts(patterns: Patterns) -> Counter[str]:
    found = Counter(str(norm.kind) for norm in patterns.norms)
    found.update(str(activation.kind) for activation in patterns.activations)
    found.update("rope" for _ in patterns.ropes)
    found.update(f"attention {a.heads}/{a.kv_heads} of {a.head_dim}" for a in patterns.attentions)
    return found


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_all_is_found_and_is_what_it_is_said_to_be(path: Path, checked: Callable[[ir.Model], Patterns]) -> None:
    patterns = checked(models.load(path))
    assert counts(patterns) == EXPECTED[path.name.split(".")[0]]
    assert patterns.refusals == ()
    for attention in patterns.attentions:
        assert attention.scale == pytest.approx(0.5)
        assert attention.output is not None and attention.output_channels is not None
        assert (attention.rope is not None) == bool(patterns.ropes)
        assert not attention.rope or not attention.rope.interleaved
    every = [*patterns.norms, *patterns.activations, *patterns.ropes]
    assert not any(pattern.shared for pattern in every)


def test_every_module_is_there_in_both_exporters() -> None:
    exporters = {name: {p.name.split(".")[1][:6] for p in FILES if p.name.startswith(f"{name}.")} for name in EXPECTED}
    assert exporters == {name: {"script", "dynamo"} for name in EXPECTED}


def test_the_catalog_says_where_the_files_come_from(root: Path) -> None:
    catalog = tomllib.loads((root / "models" / "catalog.toml").read_text(encoding="utf-8"))
    [entry] = [entry for entry in catalog["committed"] if entry["file"].startswith("../tests/passes/exports")]
    contents = [path.read_bytes() for path in FILES]
    assert entry["bytes"] == sum(map(len, contents)) <= LIMIT
    assert entry["sha256"] == hashlib.sha256(b"".join(contents)).hexdigest()
