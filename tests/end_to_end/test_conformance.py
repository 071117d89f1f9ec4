"""Every node case of onnx's backend tests that can stand as a model keeps its meaning, or is refused in one line."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.backend.test.case.test_case import TestCase

from qcompile import Options, QcompileError, compile
from qcompile.core.errors import VerificationError

#: The default run takes every twentieth case.
STRIDE = 20


@functools.cache
def cases() -> tuple[TestCase, ...]:
    """The cases whose inputs are tensors."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnx's own cases divide by zero and overflow on purpose
        loaded = load_model_tests(kind="node")
    return tuple(case for case in loaded if case.model is not None and case.data_sets and _tensors(case))


def _tensors(case: TestCase) -> bool:
    return all(isinstance(array, np.ndarray | np.generic) for inputs, _ in case.data_sets for array in inputs)


def write_inputs(case: TestCase, folder: Path) -> None:
    for number, (inputs, _) in enumerate(case.data_sets):
        target = folder / f"test_data_set_{number}"
        target.mkdir()
        for index, (array, value) in enumerate(zip(inputs, case.model.graph.input, strict=False)):
            tensor = onnx.numpy_helper.from_array(np.asarray(array), value.name)
            (target / f"input_{index}.pb").write_bytes(tensor.SerializeToString())


def hold(case: TestCase, folder: Path, **options: Any) -> None:
    """Compile a case; it is exact, or refused as what it is, never as a pass that broke it."""
    folder.mkdir()
    write_inputs(case, folder)
    choice = Options("cpu", data=str(folder), output=folder / "out", observer="mse", threads=1, **options)
    try:
        result = compile(case.model, choice)
    except VerificationError as error:
        pytest.fail(f"{case.name}: {error}")
    except QcompileError as error:
        assert "\n" not in str(error)
        assert not (folder / "out").exists()
        return
    if "weights" in options:
        assert all(measures["exact"] for measures in result.report["fidelity"]["outputs"].values()), case.name


@pytest.mark.parametrize("offset", range(4))
def test_a_sample_of_node_cases(offset: int, tmp_path: Path) -> None:
    for case in cases()[offset * STRIDE // 4 :: STRIDE]:
        hold(case, tmp_path / case.name, weights="none", activations="none")
        hold(case, tmp_path / f"{case.name}_8")


@pytest.mark.slow
@pytest.mark.parametrize("offset", range(STRIDE))
def test_all_node_cases(offset: int, tmp_path: Path) -> None:
    for case in cases()[offset::STRIDE]:
        hold(case, tmp_path / case.name, weights="none", activations="none")
        hold(case, tmp_path / f"{case.name}_8")
