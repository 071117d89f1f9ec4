"""Recipes: every key, flags over keys, overrides of single operators, and one clear line for what cannot be."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import onnx
import pytest

from qcompile import Options, QcompileError
from qcompile.options import parse_shape
from qcompile.override import REASON, Override

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(small):
    """Write a recipe beside the small model."""

    def write(text: str, name: str = "small.toml") -> Path:
        (small.folder / name).write_text(text)
        return small.folder / name

    return write


@pytest.fixture
def fails(qcompile, small, recipe):
    """Compile with a recipe, and hold the failure to what every failure must be."""

    def check(text: str, *facts: str, code: int = 2) -> None:
        done = qcompile(small.model, "--data", small.data, "--recipe", recipe(text), "-o", small.folder / "out")
        assert done.code == code, done
        line = done.err.strip()
        assert line.startswith("error: ") and "\n" not in line and "; " in line, done.err
        for fact in facts:
            assert fact in line, line
        assert done.out == "" and not (small.folder / "out").exists()

    return check


def compiled(qcompile, small, path, *words):
    """Return the report of a compile by a recipe."""
    output = small.folder / "out"
    done = qcompile(small.model, "--data", small.data, "--recipe", path, "-o", output, "--json", *words)
    assert done.code == 0, done.err
    return json.loads(done.out)["report"]


def test_every_option_is_a_key(small, recipe):
    text = """
        target = "cpu"
        data = "data.npz"
        enlarge = 64
        eval = "module.of:samples"
        output = "sub/out"
        weights = 8
        activations = "none"
        observer = "mse"
        smoothing = "none"
        rotation = "none"
        no_added_nodes = true
        allow_ort_segments = true
        max_size = "0.2x"
        max_bops = "20G"
        max_latency = "12ms"
        board = "nrf52840"
        max_sram = "64KB"
        max_flash = "0.5MB"
        pairs = 4
        pareto = true
        costs = "costs.json"
        cache = "../cache"
        seed = 7
        threads = 1000
        workers = 3
        max_memory = "4GB"
        [shape]
        x = [1, 3, 8, 8]
        [min_fidelity]
        sqnr = 20
        cosine = 0.9
        [[override]]
        match = "conv"
        keep_float = true
        [[override]]
        match = ["a*", "b"]
        op_type = "Gemm"
        weights = "int8"
    """
    found = Options.from_recipe(recipe(text))
    assert found == Options(
        "cpu",
        data=str(small.folder / "data.npz"),
        enlarge=64,
        eval="module.of:samples",
        output=small.folder / "sub/out",
        weights="8",
        activations="none",
        observer="mse",
        smoothing="none",
        rotation="none",
        no_added_nodes=True,
        allow_ort_segments=True,
        costs=small.folder / "costs.json",
        shape={"x": (1, 3, 8, 8)},
        max_size="0.2x",
        max_bops="20G",
        max_latency="12ms",
        board="nrf52840",
        max_sram="64KB",
        max_flash="0.5MB",
        pairs=4,
        pareto=True,
        min_fidelity={"sqnr": 20.0, "cosine": 0.9},
        cache=small.folder / "../cache",
        seed=7,
        threads=1000,
        workers="3",
        max_memory="4GB",
        overrides=(Override(("conv",), keep_float=True), Override(("a*", "b"), "Gemm", weights="int8")),
    )
    default = Options("other")
    assert [f.name for f in fields(Options) if getattr(found, f.name) == getattr(default, f.name)] == []


def test_an_axis_may_have_several_lengths(recipe):
    found = Options.from_recipe(recipe('target = "cpu:tvm"\nshape = {x = [1, 3, [8, 16], [9]]}'))
    assert found.shape == {"x": (1, 3, (8, 16), 9)}
    assert dict([parse_shape("x=1x3x8,16x9")]) == found.shape


def test_every_key_is_documented():
    page = (ROOT / "docs/recipe.md").read_text()
    keys = {field.name for field in fields(Options)} - {"overrides"} | {field.name for field in fields(Override)}
    assert keys - set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set()


def test_fields_count_more_than_keys(recipe):
    path = recipe('target = "cpu"\nobserver = "mse"\nseed = 3')
    assert Options.from_recipe(path, observer="minmax") == Options("cpu", observer="minmax", seed=3)
    with pytest.raises(QcompileError, match="names no target"):
        Options.from_recipe(recipe("seed = 3"))


def test_from_python_places_are_texts_or_paths():
    texts = {"data": "d.npz", "eval": "e.npz", "output": "out", "costs": "none", "cache": "c"}
    paths = {name: Path(text) for name, text in texts.items()}
    assert Options("cpu", **texts) == Options("cpu", **paths)
    assert Options("cpu", **texts).cost_table is None


def test_flags_count_more_than_keys(qcompile, small, recipe):
    path = recipe('target = "toaster"\nobserver = "mse"\n[min_fidelity]\nsqnr = 300')
    report = compiled(qcompile, small, path, "--target", "cpu", "--observer", "minmax", "--min-fidelity", "sqnr=1")
    assert report["target"] == "cpu"
    assert report["options"]["observer"] == "minmax" and report["options"]["min_fidelity"] == {"sqnr": 1.0}


def test_the_key_counts_where_no_flag_is_given(qcompile, small, recipe):
    report = compiled(qcompile, small, recipe('target = "cpu"\nweights = "none"\nactivations = "none"'))
    assert report["options"]["weights"] == report["options"]["activations"] == "none"
    assert report["precision"]["float"] == len(report["operators"])


def test_paths_are_relative_to_the_recipe(qcompile, small, recipe, tmp_path_factory, monkeypatch):
    path = recipe('target = "cpu"\ndata = "data.npz"\noutput = "here"')
    assert small.data.exists()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert qcompile(small.model, "--recipe", path).code == 0
    assert (small.folder / "here/model.onnx").exists()
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ('wieghts = "8"', ["small.toml", "no key 'wieghts'", "did you mean 'weights'?"]),
        ("zzz = 1", ["no key 'zzz'", "there are target, data"]),
        ('overrides = "x"', ["no key 'overrides'", "did you mean 'override'?"]),
        ("target = 3", ["small.toml: target", "3 is not a text"]),
        ('target = ""', ["small.toml: target", "is not a text"]),
        ("data = [1]", ["small.toml: data", "is not a path or module:function"]),
        ("output = true", ["small.toml: output", "is not a path"]),
        ("weights = 3", ["small.toml: weights", "no choice '3'", "4, mixed, none"]),
        ("weights = true", ["small.toml: weights", 'mixed" or "none"']),
        ("observer = 'best'", ["small.toml: observer", "no choice 'best'", "minmax"]),
        ("pairs = 9", ["small.toml: pairs", "not a number of neighbours", "1 to 8"]),
        ("pairs = true", ["small.toml: pairs", "is not a whole number"]),
        ("seed = 1.5", ["small.toml: seed", "1.5 is not a whole number"]),
        ("threads = true", ["small.toml: threads", "is not a whole number"]),
        ("workers = 0", ["small.toml: workers", "neither a number of processes nor tcp://"]),
        ("workers = 1.5", ["small.toml: workers", "is not a number of processes, or an address"]),
        ("threads = 0", ["small.toml: threads", "not a number of threads"]),
        ("shape = [1]", ["small.toml: shape", "is not a table of lists"]),
        ("shape = {x = [0]}", ["small.toml: shape", "is not a table of lists"]),
        ("shape = {x = 3}", ["small.toml: shape", "is not a table of lists"]),
        ("shape = {x = [[]]}", ["small.toml: shape", "is not a table of lists"]),
        ("shape = {x = [1, [8, 0]]}", ["small.toml: shape", "is not a table of lists"]),
        ("min_fidelity = 20", ["small.toml: min_fidelity", "is not a table of numbers"]),
        ("min_fidelity = {sqnr = nan}", ["small.toml: min_fidelity", "is not a table of numbers"]),
        ("min_fidelity = {beauty = 1}", ["small.toml: min_fidelity", "no measure 'beauty'"]),
        ("override = 3", ["small.toml: override", "[[override]]"]),
        ("[override]\nmatch = 'a'", ["small.toml: override", "[[override]]"]),
        ("[[override]]\nkeep_float = true", ["small.toml: override 1", "chooses no operators"]),
        ("[[override]]\nmatch = 'a'", ["small.toml: override 1", "asks for nothing"]),
        ("[[override]]\nmatch = 'a'\nkeep_float = 1", ["override 1: keep_float", "is not true or false"]),
        ("[[override]]\nmatch = 3\nkeep_float = true", ["override 1: match", "is not a pattern"]),
        ("[[override]]\nop_type = ['Conv']\nkeep_float = true", ["override 1: op_type", "is not a text"]),
        ("[[override]]\nmatch = 'a'\nweights = 'int4'", ["override 1", "cannot be 'int4'", "int8, int16, float"]),
        ("[[override]]\nmatch = 'a'\nkeepfloat = true", ["override 1", "no key 'keepfloat'", "'keep_float'?"]),
        ("target = ", ["small.toml", "is not TOML"]),
    ],
)
def test_what_a_recipe_cannot_say(fails, text, facts):
    header = "" if text.startswith("target") else 'target = "cpu"\n'
    fails(header + text, *facts)


def test_a_recipe_that_is_none(qcompile, small):
    (small.folder / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    for name, fact in {"absent.toml": "No such file", "bytes.toml": "is not TOML", ".": "cannot be read"}.items():
        done = qcompile(small.model, "--recipe", small.folder / name)
        assert done.code == 2 and fact in done.err and done.err.count("\n") == 1


def test_no_target_anywhere(fails):
    fails("seed = 1", "Missing option '--target'", "--help")


# Overrides.


@pytest.fixture
def names(small):
    """Give the small model's nodes names."""
    for node, name in zip(
        small.proto.graph.node, ["net/conv", "net/relu", "pool", "flat", "head[0]/gemm"], strict=True
    ):
        node.name = name


def fates(report):
    return {op["name"]: (op["precision"], op["reason"]) for op in report["operators"]}


def override(text: str) -> str:
    return 'target = "cpu"\n' + "".join(f"[[override]]\n{part}\n" for part in text.split("---"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("match = 'net/*'\nkeep_float = true", {"net/conv": ("float", REASON), "net/relu": ("float", REASON)}),
        ("match = 'net/*'\nweights = 'float'", {"net/conv": ("float", REASON), "net/relu": ("float", REASON)}),
        ("op_type = 'Conv'\nkeep_float = true\nweights = 'int8'", {"net/conv": ("weight_only", REASON)}),
        ("match = '*'\nop_type = 'Gemm'\nweights = 'int8'", {"head[0]/gemm": ("integer", None)}),
        ("match = 'head[0]/gemm'\nweights = 'int8'", {"head[0]/gemm": ("integer", None)}),
        (
            "match = ['net/relu', 'pool']\nkeep_float = true",
            {"net/conv": ("integer", None), "net/relu": ("float", REASON), "pool": ("float", REASON)},
        ),
        ("match = '*'\nkeep_float = true --- match = 'net/conv'\nweights = 'int8'", {"net/conv": ("integer", None)}),
        ("match = 'net/conv'\nweights = 'int8' --- match = '*'\nkeep_float = true", {"net/conv": ("float", REASON)}),
    ],
)
def test_overrides(qcompile, small, names, recipe, text, expected):
    report = compiled(qcompile, small, recipe(override(text)))
    found = fates(report)
    assert {name: found[name] for name in expected} == expected
    plan = json.loads((small.folder / "out/plan.json").read_text())
    manifest = json.loads((small.folder / "out/manifest.json").read_text())
    assert len(manifest["options"]["overrides"]) == text.count("---") + 1
    assert manifest["options"]["overrides"] == plan["options"]["override"]


def test_integer_weights_are_stored_as_such(qcompile, small, names, recipe):
    compiled(qcompile, small, recipe(override("op_type = 'Conv'\nkeep_float = true\nweights = 'int8'")))
    stored = {t.name: t.data_type for t in onnx.load(small.folder / "out/model.onnx").graph.initializer}
    assert stored["w_quantized"] == onnx.TensorProto.INT8 and "w" not in stored


def test_an_override_that_fits_nothing_names_what_is_near(fails, names):
    fails(override("match = 'net/covn'\nkeep_float = true"), "'net/covn' fits no node name", "net/conv", "inspect")
    fails(override("match = ['net/*', 'nte/*']\nkeep_float = true"), "'nte/*' fits no node name")
    fails(override("match = 'NET/*'\nkeep_float = true"), "'NET/*' fits no node name")
    fails(override("op_type = 'Cnov'\nkeep_float = true"), "the model has no Cnov", "Conv")
    fails(override("match = 'net/*'\nop_type = 'Gemm'\nkeep_float = true"), "'net/*' fits no node name of a Gemm")


def test_overrides_of_a_model_that_is_quantized_already(qcompile, small, recipe):
    assert qcompile(small.model, "--target", "cpu", "--data", small.data, "-o", small.folder / "first").code == 0
    path = recipe(override("match = '*'\nkeep_float = true"))
    done = qcompile(small.folder / "first/model.onnx", "--data", small.data, "--recipe", path, "-o", small.folder / "o")
    assert done.code == 2 and "quantized already" in done.err


def test_another_override_does_not_find_the_old_entries_of_the_cache(qcompile, small, names, recipe):
    first = compiled(
        qcompile, small, recipe(override("match = 'pool'\nkeep_float = true")), "--cache", small.folder / "c"
    )
    second = compiled(
        qcompile, small, recipe(override("op_type = 'Conv'\nkeep_float = true")), "--cache", small.folder / "c"
    )
    assert fates(first)["net/conv"][0] == "integer" and fates(second)["net/conv"][0] == "float"


def test_inspect_lists_the_names_to_match(qcompile, small, names):
    shown = qcompile("inspect", small.model, "--ops").out
    assert "head[0]/gemm" in shown and "head[0]/gemm" not in qcompile("inspect", small.model).out
    listed = json.loads(qcompile("inspect", small.model, "--json").out)["ops"]
    assert listed[0] == {"name": "net/conv", "op_type": "Conv", "precision": "integer", "reason": ""}
    assert {op["name"]: op["reason"] for op in listed}["head[0]/gemm"].startswith("its 20 weights are too few")


def test_the_example(qcompile, tmp_path, resnet8):
    done = qcompile(resnet8[0], "--recipe", ROOT / "examples/resnet8.toml", "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)["report"]
    assert fates(report)["dense"] == ("weight_only", REASON)
    assert sum(op["kernel"] == "QLinearConv" for op in report["operators"]) == 9
    assert report["fidelity"]["outputs"]["probabilities"]["sqnr"] > 30
    dense = [
        t for t in onnx.load(tmp_path / "out/model.onnx").graph.initializer if "dense" in t.name and len(t.dims) > 1
    ]
    assert [onnx.numpy_helper.to_array(t).dtype for t in dense if t.data_type != onnx.TensorProto.FLOAT] == [np.int8]
