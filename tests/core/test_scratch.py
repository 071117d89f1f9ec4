"""Large arrays leave memory where that was asked for, and come back as they were."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qcompile.core import mapped, runtime, scratch
from qcompile.core.errors import UsageError

LARGE = (np.arange(scratch.LEAST, dtype=np.float32) % 1000.0).reshape(-1, 16)


def test_without_a_folder_arrays_stay_in_memory() -> None:
    assert not scratch.is_open()
    assert not isinstance(scratch.tensor(LARGE, "w"), ir.ExternalTensor)
    assert scratch.kept(LARGE) is LARGE


@pytest.mark.parametrize("array", [LARGE, LARGE.T, (LARGE % 251).astype(np.int8), LARGE.astype(np.float16)])
def test_a_large_array_leaves_memory_and_reads_the_same(array: np.ndarray) -> None:
    with scratch.opened(True):
        tensor = scratch.tensor(array, "w")
        assert isinstance(tensor, mapped.MappedTensor) and tensor.name == "w"
        np.testing.assert_array_equal(tensor.numpy(), array)
        assert tensor.numpy().dtype == array.dtype and tensor.tobytes() == np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize("array", [LARGE[:2], np.zeros(scratch.LEAST, ml_dtypes.int4), np.float32(1.0)])
def test_what_is_small_or_has_no_type_of_numpy_stays(array: np.ndarray) -> None:
    with scratch.opened(True):
        assert not isinstance(scratch.tensor(np.asarray(array), "w"), ir.ExternalTensor)


def test_a_file_goes_with_its_tensor_and_the_folder_at_the_end() -> None:
    with scratch.opened(True):
        tensor = scratch.tensor(LARGE, "w")
        assert isinstance(tensor, mapped.MappedTensor)
        path = Path(tensor.path)
        assert path.is_file()
        array = scratch.kept(LARGE)
        del tensor
        assert not path.exists() and path.parent.is_dir()
        np.testing.assert_array_equal(array, LARGE)
    assert not path.parent.exists()
    np.testing.assert_array_equal(array, LARGE, "a mapping outlives its file")


def test_the_folder_goes_after_a_failure_too() -> None:
    with pytest.raises(KeyError), scratch.opened(True):
        tensor = scratch.tensor(LARGE, "w")
        raise KeyError
    assert isinstance(tensor, mapped.MappedTensor) and not Path(tensor.path).parent.exists()
    assert not scratch.is_open()


def test_a_compile_in_another_thread_has_none() -> None:
    with scratch.opened(True), ThreadPoolExecutor(1) as pool:
        assert scratch.is_open() and not pool.submit(scratch.is_open).result()


def test_a_disk_that_takes_no_more_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with scratch.opened(True):
        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(UsageError, match=r"--max-memory: .*No space left on device.*TMPDIR"):
            scratch.tensor(LARGE, "w")


def test_a_model_whose_weights_left_memory_runs(model_of) -> None:
    text = "(float[1,4] x) => (float[1,32768] y) { y = MatMul (x, w) }"
    weights, feeds = np.random.default_rng(0).normal(size=(4, 32768)), {"x": np.ones((1, 4), np.float32)}
    model = model_of(text, w=weights.astype(np.float32))
    expected = {optimize: runtime.Session(model, optimize=optimize).run(feeds)["y"] for optimize in (True, False)}
    with scratch.opened(True):
        value = model.graph.initializers["w"]
        value.const_value = scratch.tensor(value.const_value.numpy(), "w")
        for optimize, y in expected.items():
            np.testing.assert_array_equal(runtime.Session(model, optimize=optimize).run(feeds)["y"], y)
