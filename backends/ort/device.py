"""Sessions on a GPU: what does not run there, or cannot, is one clear line and never a silent fall back."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

from qcompile.core import runtime
from qcompile.core.errors import ModelError, TargetError, shortened

#: By the provider of a target's settings: its name, and the providers of a session, first choice first.
NAMES = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
LIBRARIES = {"cuda": "libonnxruntime_providers_cuda.so", "tensorrt": "libonnxruntime_providers_tensorrt.so"}
INSTALL = "pip uninstall onnxruntime, then pip install 'qcompile[cuda]'"
LIBRARY_REMEDY = "install CUDA and cuDNN (for cuda:tensorrt TensorRT too) as docs/targets/cuda.md says"
DEVICE_REMEDY = "run it where there is an NVIDIA GPU with a driver; a compile needs neither"
FALLBACK_REMEDY = "see on_host in report.json, or allow it with --fallback"
#: A GPU that nothing tells the name of.
UNNAMED = "an NVIDIA GPU"
#: What the CUDA runtime says where there is no device, or no driver for it.
NO_DEVICE = re.compile(r"CUDA failure (\d+): ([^;]*?)\s*(?:;|$)|(no CUDA-capable device[^;.]*)")


class DeviceSession:
    """A model that a GPU runs, by one provider of ONNX Runtime.

    Parameters
    ----------
    model : Path
    provider : str
        A key of `NAMES`.
    fallback : bool
        Leave nodes that the provider has no kernel for to the host's processor; otherwise they are an error.

    Raises
    ------
    TargetError
        If there is no such provider, library or device here, or nodes would fall back that may not.
    """

    def __init__(self, model: Path, provider: str, fallback: bool = False) -> None:
        ort = runtime.load_onnxruntime()
        name = NAMES[provider]
        if name not in ort.get_available_providers():
            fact = f"{runtime.name()} is a build without {name}"
            raise TargetError("onnxruntime", fact, INSTALL)
        ort.set_default_logger_severity(4)  # it prints in colours what is said here in one line
        try:
            session = ort.InferenceSession(
                str(model), _options(ort, provider, fallback), providers=_providers(provider), enable_fallback=0
            )
        except Exception as error:  # the runtime raises a class of its own for each kind of failure
            raise explained(str(error), missing_library(ort, provider), name) from error
        if name not in session.get_providers():
            raise explained("", missing_library(ort, provider), name)
        self._session = session
        self._model = model
        self.provider = name
        self.device = device_name()
        self.runtime = runtime.name()
        self.output_names: tuple[str, ...] = tuple(output.name for output in session.get_outputs())

    def run(self, feeds: runtime.Feeds) -> runtime.Outputs:
        """Run one sample, inputs and outputs in the host's memory.

        Raises
        ------
        ModelError
            If the runtime fails on it.
        """
        try:
            return dict(zip(self.output_names, self._session.run(None, dict(feeds)), strict=True))
        except Exception as error:
            fact = f"{self.provider} fails on a sample ({shortened(' '.join(str(error).split()))})"
            raise ModelError(self._model, fact, "check that it runs with these inputs on the CPU") from error


def _options(ort: ModuleType, provider: str, fallback: bool) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not fallback:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if provider == "tensorrt":
        # The runtime's own rewrites of Q/DQ are for its CPU kernels.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def _providers(provider: str) -> list[Any]:
    cuda = (NAMES["cuda"], {"device_id": "0"})
    if provider == "cuda":
        return [cuda]
    return [(NAMES["tensorrt"], {"device_id": "0", "trt_fp16_enable": "1", "trt_int8_enable": "1"}), cuda]


def missing_library(ort: ModuleType, provider: str) -> str:
    """Return which shared library a provider lacks, as the system says it; nothing if it loads."""
    folder = Path(str(ort.__file__)).parent / "capi"
    try:
        for file in ("libonnxruntime_providers_shared.so", LIBRARIES[provider]):
            ctypes.CDLL(str(folder / file), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return str(error).partition(": ")[0]
    return ""


def explained(text: str, missing: str, name: str) -> TargetError:
    """Return the one line for why a session on a device could not be made.

    Parameters
    ----------
    text : str
        What the runtime said; empty if it went on without the provider.
    missing : str
        The library that the provider lacks, if one.
    name : str
        The provider.
    """
    if missing:
        return TargetError("onnxruntime", f"{name} does not load: {missing} is not there", LIBRARY_REMEDY)
    found = NO_DEVICE.search(text)
    if found is not None:
        said = found.group(3) or f"CUDA error {found.group(1)}, {found.group(2).strip()}"
        return TargetError("device", f"{name} finds no NVIDIA GPU that it can use ({said})", DEVICE_REMEDY)
    if "fallback to CPU EP has been explicitly disabled" in text:
        return TargetError("device", f"{name} leaves nodes to the host's processor", FALLBACK_REMEDY)
    said = shortened(" ".join(text.split())) or "it says nothing of why"
    return TargetError("device", f"{name} cannot be used here ({said})", DEVICE_REMEDY)


def device_name() -> str:
    """Return the GPU's name, as far as its driver's tool tells."""
    try:
        words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return UNNAMED
    return done.stdout.strip() or UNNAMED
