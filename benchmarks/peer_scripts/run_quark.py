"""AMD Quark's quantizer of ONNX models: u8 activations, s8 weights per channel."""

from __future__ import annotations

import onnx
from job import FLOAT_OUTPUTS, LINEAR, Job
from quark.onnx import ModelQuantizer, QConfig, QLayerConfig
from quark.onnx.quantization.config.algorithm import SmoothQuantConfig
from quark.onnx.quantization.config.spec import CalibMethod, Int8Spec, QuantGranularity, UInt8Spec

#: From this opset on scales per channel are standard.
OPSET = 13


def main() -> None:
    """Do the job that the command line names."""
    job = Job.read()
    setting = dict(job.setting)
    method = getattr(CalibMethod, setting.pop("calibrate"))
    smoothing = [SmoothQuantConfig(alpha=setting.pop("smooth"))] if "smooth" in setting else []
    if setting.pop("linear", False):
        setting["OpTypesToQuantize"] = LINEAR
    if setting.pop("float_outputs", False):
        setting["OpTypesToExcludeOutputQuantization"] = FLOAT_OUTPUTS
    activations = UInt8Spec(symmetric=False, calibration_method=method)
    weights = Int8Spec(symmetric=True, calibration_method=method, quant_granularity=QuantGranularity.Channel)
    layers = QLayerConfig(input_tensors=activations, weight=weights)
    config = QConfig(global_config=layers, algo_config=smoothing, **setting)
    raised = job.output.with_name("raised.onnx")
    onnx.save(job.raised(OPSET), raised)
    ModelQuantizer(config).quantize_model(str(raised), str(job.output), job.samples)


if __name__ == "__main__":
    main()
