"""What the compiler of Qualcomm's provider makes of an artifact, where it is installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from qcompile import Options, compile

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("onnxruntime_qnn"), reason="onnxruntime-qnn is not installed"),
]

#: A process of its own: a provider stays in the process that it was registered in.
COMPILE = """
import sys, onnxruntime, onnxruntime_qnn
onnxruntime.register_execution_provider_library("QNN", onnxruntime_qnn.get_library_path())
[device, *_] = [one for one in onnxruntime.get_ep_devices() if one.ep_name.startswith("QNN")]
options = onnxruntime.SessionOptions()
options.add_session_config_entry("ep.context_enable", "1")
options.add_session_config_entry("ep.context_file_path", sys.argv[2])
where = {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), "htp_arch": "73"}
options.add_provider_for_devices([device], where)
onnxruntime.InferenceSession(sys.argv[1], options)
"""


def compiled(model: Path, context: Path) -> list[str]:
    """Return the operators that are left once HTP's compiler has taken its part."""
    words = [sys.executable, "-c", COMPILE, str(model), str(context)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [node.op_type for node in onnx.load(context).graph.node]


@pytest.mark.parametrize("bits", ["8", "16"])
def test_all_of_resnet8_is_one_graph(root, tmp_path, bits):
    models = root / "models"
    options = Options("qnn", data=str(models / "resnet8_calib.npz"), output=tmp_path / "out", activations=bits)
    compile(models / "resnet8.onnx", options)
    left = compiled(tmp_path / "out/model.onnx", tmp_path / "context.onnx")
    assert left == ["QuantizeLinear", "EPContext", "DequantizeLinear"]


def test_what_breaks_a_rule_is_left_to_the_cpu(model_of, tmp_path):
    """The check can fail: an operator between floats is not taken."""
    from qcompile.core import model as models

    text = "(float[1,4] x) => (float[1,4] y) { a = Mod <fmod = 1> (x, d) y = Mod <fmod = 1> (a, d) }"
    models.save(model_of(text, 21, d=np.float32(0.7)), tmp_path / "model.onnx")
    words = [sys.executable, "-c", COMPILE, str(tmp_path / "model.onnx"), str(tmp_path / "context.onnx")]
    subprocess.run(words, capture_output=True, check=False)
    assert not (tmp_path / "context.onnx").exists()
