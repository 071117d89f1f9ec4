"""Sessions on a GPU: each way in which there is none is one clear line; texts are those of onnxruntime-gpu 1.31.1."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx_ir as ir
import pytest

from qcompile import device_run
from qcompile.backends.ort import device
from qcompile.backends.ort.device import DeviceSession, explained
from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.core.errors import TargetError, UsageError

Build = Callable[..., ir.Model]
NO_DRIVER = (
    "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:154 std::conditional_t<THRW, void, common::Status> "
    "onnxruntime::CudaCall(ERRTYPE, const char*) [with ERRTYPE = cudaError; bool THRW = true] CUDA failure 35: CUDA "
    "driver version is insufficient for CUDA runtime version ; GPU=-1 ; hostname=vm ; line=355 ; "
    "expr=cudaSetDevice(info_.device_id); "
)
LEFT = (
    "[ONNXRuntimeError] : 1 : FAIL : This session contains graph nodes that are assigned to the default CPU EP, but "
    "fallback to CPU EP has been explicitly disabled by the user."
)


@pytest.mark.parametrize(
    ("text", "missing", "fact"),
    [
        (LEFT, "libcublasLt.so.13", "does not load: libcublasLt.so.13 is not there; install CUDA"),
        (NO_DRIVER, "", "no NVIDIA GPU that it can use (CUDA error 35, CUDA driver version is insufficient for CUDA "
                        "runtime version); run it where"),
        ("CUDA failure 100: no CUDA-capable device is detected ; GPU=0", "", "(CUDA error 100, no CUDA-capable device "
                                                                            "is detected)"),
        (LEFT, "", "leaves nodes to the host's processor; see on_host in report.json"),
        ("something else", "", "cannot be used here (something else)"),
        ("", "", "cannot be used here (it says nothing of why)"),
    ],
)  # fmt: skip
def test_what_the_runtime_says_becomes_one_line(text: str, missing: str, fact: str) -> None:
    error = explained(text, missing, "CUDAExecutionProvider")
    assert isinstance(error, TargetError) and error.exit_code == 7
    assert fact in str(error) and "\n" not in str(error) and "onnxruntime_src" not in str(error)


class Runtime:
    """An onnxruntime whose sessions end as a test wants."""

    __file__ = "/nowhere/onnxruntime/__init__.py"
    __version__ = "0"

    def __init__(self, providers: list[str], fails: str = "", kept: list[str] | None = None) -> None:
        self.providers, self.fails, self.kept = providers, fails, kept or []
        self.entries: dict[str, str] = {}
        self.asked: list[Any] = []

    def get_available_providers(self) -> list[str]:
        return self.providers

    def set_default_logger_severity(self, severity: int) -> None:
        assert severity == 4

    def SessionOptions(self) -> Any:
        outer = self

        class Options:
            log_severity_level = 2

            def add_session_config_entry(self, key: str, value: str) -> None:
                outer.entries[key] = value

        return Options()

    def InferenceSession(self, path: str, options: Any, providers: list[Any], enable_fallback: int) -> Any:
        assert enable_fallback == 0
        self.asked = [provider[0] for provider in providers]
        if self.fails:
            raise RuntimeError(self.fails)
        kept = self.kept

        class Session:
            def get_providers(self) -> list[str]:
                return kept

        return Session()


@pytest.mark.parametrize(
    ("present", "provider", "fact"),
    [
        (Runtime(["CPUExecutionProvider"]), "cuda", "is a build without CUDAExecutionProvider; pip uninstall"),
        (Runtime(["CUDAExecutionProvider"], NO_DRIVER), "cuda", "does not load: "),
        (Runtime(["CUDAExecutionProvider"], kept=["CPUExecutionProvider"]), "cuda", "does not load: "),
        (Runtime(["TensorrtExecutionProvider"], kept=["CPUExecutionProvider"]), "tensorrt", "does not load: "),
    ],
)
def test_no_session_falls_back_in_silence(
    monkeypatch: pytest.MonkeyPatch, present: Runtime, provider: str, fact: str
) -> None:
    monkeypatch.setattr(runtime, "load_onnxruntime", lambda: present)
    with pytest.raises(TargetError, match="onnxruntime") as caught:
        DeviceSession(Path("model.onnx"), provider)
    assert fact in str(caught.value)


@pytest.mark.parametrize(("fallback", "entry"), [(False, {"session.disable_cpu_ep_fallback": "1"}), (True, {})])
def test_the_host_gets_nodes_only_where_that_is_allowed(
    monkeypatch: pytest.MonkeyPatch, fallback: bool, entry: dict[str, str]
) -> None:
    present = Runtime(["CUDAExecutionProvider", "TensorrtExecutionProvider"], LEFT)
    monkeypatch.setattr(runtime, "load_onnxruntime", lambda: present)
    monkeypatch.setattr(device, "missing_library", lambda ort, provider: "")
    with pytest.raises(TargetError, match="leaves nodes"):
        DeviceSession(Path("model.onnx"), "cuda", fallback)
    # The runtime refuses a session that names the CPU's provider beside that entry.
    assert present.entries == entry and present.asked == ["CUDAExecutionProvider"]
    present.entries.clear()
    with pytest.raises(TargetError):
        DeviceSession(Path("model.onnx"), "tensorrt", fallback)
    assert present.entries == {**entry, "session.disable_quant_qdq": "1"}
    assert present.asked == ["TensorrtExecutionProvider", "CUDAExecutionProvider"]


def test_a_build_for_processors_is_named(model_of: Build, tmp_path: Path) -> None:
    if "CUDAExecutionProvider" in runtime.load_onnxruntime().get_available_providers():
        pytest.skip("a build for GPUs is installed")
    models.save(model_of("(float[2] x) => (float[2] y) { y = Neg (x) }"), tmp_path / "model.onnx")
    with pytest.raises(TargetError, match="is a build without CUDAExecutionProvider; pip uninstall onnxruntime"):
        DeviceSession(tmp_path / "model.onnx", "cuda")


@pytest.fixture
def artifact(model_of: Build, tmp_path: Path) -> Path:
    from qcompile import Options, compile

    model = model_of("(float[2,32] x) => (float[2,64] y) { y = MatMul (x, w) }", w=np.ones((32, 64), np.float32))
    models.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((6, 2, 32)).astype(np.float32))
    compile(tmp_path / "model.onnx", Options("cuda", data=tmp_path / "data.npz", output=tmp_path / "out"))
    return tmp_path / "out"


def test_a_run_adds_its_figures_to_the_measurements(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], root: Path
) -> None:
    class Here(runtime.Session):
        provider, device, runtime = "CPUExecutionProvider", "this processor", "a runtime"

    from qcompile.backends.ort.lower import OrtBackend

    monkeypatch.setattr(OrtBackend, "on_device", lambda self, target, fallback: Here)
    before = (artifact / "report.json").read_bytes(), (artifact / "manifest.json").read_bytes()
    alone = device_run.run(artifact, None, None, 1, False)
    assert alone.artifact_ms > 0 and alone.float_ms is None
    beside = device_run.run(artifact, artifact.parent / "model.onnx", str(artifact.parent / "data.npz"), 3, False)
    assert beside.float_ms is not None and beside.ratio == pytest.approx(beside.artifact_ms / beside.float_ms)
    # The host rounds each result as a GPU would; here nothing does.
    assert alone.sqnr_of_host is not None and alone.sqnr_of_host > 60 and "dB from" in alone.lines()[2]
    assert "of the float model's" in beside.lines()[1] and "of the float" not in alone.lines()[1]
    content = json.loads((artifact / "measurements.json").read_text())
    assert content["on_device"]["ratio"] == beside.ratio
    jsonschema.validate(content, json.loads((root / "docs/schemas/measurements.schema.json").read_text()))
    assert ((artifact / "report.json").read_bytes(), (artifact / "manifest.json").read_bytes()) == before


def test_an_artifact_that_was_changed_is_not_run(artifact: Path) -> None:
    (artifact / "model.onnx").write_bytes((artifact / "model.onnx").read_bytes() + b"\0")
    with pytest.raises(UsageError, match="checksum differs"):
        device_run.run(artifact, None, None, 1, False)


def test_other_folders_have_no_device(tmp_path: Path) -> None:
    assert device_run.device_target(tmp_path) is None
    (tmp_path / "manifest.json").write_text('{"target": "cpu"}')
    assert device_run.device_target(tmp_path) is None


needs_gpu = pytest.mark.skipif(
    "CUDAExecutionProvider" not in runtime.load_onnxruntime().get_available_providers()
    or device.device_name() == device.UNNAMED,
    reason="there is no NVIDIA GPU, or no onnxruntime-gpu",
)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("target", ["cuda", "cuda:tensorrt"])
def test_resnet8_runs_on_the_device_as_it_was_verified(target: str, root: Path, tmp_path: Path) -> None:
    from qcompile import Options, compile

    folder, data = root / "models", root / "models/resnet8_calib.npz"
    options = Options(target, data=data, eval=folder / "resnet8_eval.npz", output=tmp_path / "out")
    compile(folder / "resnet8.onnx", options)
    seen = device_run.run(tmp_path / "out", folder / "resnet8.onnx", str(folder / "resnet8_eval.npz"), 20, False)
    # Kernels sum in another order, and round to float16 where the host does not: far below what codes lose.
    assert seen.sqnr_of_host is None or seen.sqnr_of_host > 40.0
    assert seen.ratio is not None and seen.rounds >= 5


@pytest.mark.gpu
@needs_gpu
def test_the_table_of_kernels_is_that_of_the_device_here() -> None:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    from qcompile.backends.ort.kernel_table import cuda_kernels

    found = {(one.domain, one.op_name) for one in state.get_all_opkernel_def()
             if one.provider == "CUDAExecutionProvider" and one.domain in ("", "com.microsoft")}  # fmt: skip
    known = {tuple(name.rpartition(":")[::2]) for name in cuda_kernels().kernels}
    assert known - found == set()
