"""onnxruntime's own quantizers, behind its own preparation of the model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx
from job import FLOAT_OUTPUTS, LINEAR, Job
from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

#: From this opset on onnxruntime takes scales per channel.
OPSET = 13


def prepared(job: Job) -> Path:
    """Run the preparation that onnxruntime recommends, without its symbolic shapes where those fail."""
    raised, path = job.output.with_name("raised.onnx"), job.output.with_name("prepared.onnx")
    onnx.save(job.raised(OPSET), raised)
    try:
        quant_pre_process(str(raised), str(path))
    except Exception as error:
        print(f"symbolic shapes are left out: {error}", file=sys.stderr)
        quant_pre_process(str(raised), str(path), skip_symbolic_shape=True)
    return path


def main() -> None:
    """Do the job that the command line names."""
    job = Job.read()
    setting: dict[str, Any] = dict(job.setting)
    if setting.pop("mode") == "dynamic":
        quantize_dynamic(prepared(job), job.output, **setting)
        return
    if setting.pop("linear", False):
        setting["op_types_to_quantize"] = LINEAR
    if setting.pop("float_outputs", False):
        setting["extra_options"] = {"OpTypesToExcludeOutputQuantization": FLOAT_OUTPUTS}
    if "calibrate" in setting:
        setting["calibrate_method"] = getattr(CalibrationMethod, setting.pop("calibrate"))
    if "activation" in setting:
        setting["activation_type"] = getattr(QuantType, setting.pop("activation"))
    quantize_static(prepared(job), job.output, job.samples, **setting)


if __name__ == "__main__":
    main()
