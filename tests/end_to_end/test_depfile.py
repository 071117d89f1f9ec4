"""`--depfile`: what a build has to watch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qcompile.depfile import write_depfile
from qcompile.options import Options


def rule(file) -> tuple[str, list[str]]:
    target, _, read = file.read_text().replace(" \\\n", "").partition(": ")
    return target, read.split()


def test_a_compile_names_what_it_read(qcompile, small, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'observer = "minmax"\neval = "{small.data}"\n')
    words = ("--target", "cpu", "--data", small.data, "--recipe", recipe, "-o", tmp_path / "out", "--quiet")
    assert qcompile(small.model, *words, "--depfile", tmp_path / "out.d").code == 0
    target, read = rule(tmp_path / "out.d")
    assert target == str(tmp_path / "out/manifest.json")
    assert read == [str(path) for path in (small.model, small.data, recipe)]


def test_weights_beside_the_model_and_every_sample_of_a_folder_are_named(small, tmp_path):
    model = small.save(small.proto, "far.onnx", save_as_external_data=True, location="far.data", size_threshold=0)
    samples = tmp_path / "samples"
    samples.mkdir()
    for index in range(2):
        np.savez(samples / f"{index}.npz", x=small.samples[index])
    options = Options("cpu", data=str(samples), eval="module:function", costs=tmp_path / "costs.json")
    write_depfile(tmp_path / "out.d", tmp_path / "out", model, options, None)
    _, read = rule(tmp_path / "out.d")
    names = ("far.onnx", "far.data", "samples/0.npz", "samples/1.npz", "costs.json")
    assert read == [str(tmp_path / name) for name in names]


def test_what_make_would_read_otherwise_is_escaped(small, tmp_path):
    write_depfile(tmp_path / "out.d", tmp_path / "a b#c$d", small.model, Options("cpu"), None)
    assert (tmp_path / "out.d").read_text().startswith(f"{tmp_path}/a\\ b\\#c$$d/manifest.json:")


def test_a_depfile_that_cannot_be_written_is_one_line(qcompile, small, tmp_path):
    (tmp_path / "file").touch()
    words = ("--target", "cpu", "-o", tmp_path / "out", "--depfile", tmp_path / "file/out.d")
    done = qcompile(small.model, *words)
    assert done.code == 2 and done.err.count("\n") == 1 and "out.d: cannot be written" in done.err


def test_the_cmake_package_is_where_it_says(qcompile):
    done = qcompile("--cmake-dir")
    assert done.code == 0 and (Path(done.out.strip()) / "qcompile-config.cmake").is_file()
