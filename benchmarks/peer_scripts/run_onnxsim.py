"""onnxsim's quantizers, on a model that it simplified, in an opset below which they return the float model."""

from __future__ import annotations

import onnx
import onnxsim
from job import Job

OPSET = 21


def main() -> None:
    """Do the job that the command line names."""
    job = Job.read()
    setting = dict(job.setting)
    quantize = getattr(onnxsim, setting.pop("function"))
    if setting.pop("calibrated", False):
        setting["calibration_data"] = list(job.samples)
    model, _ = onnxsim.simplify(job.raised(OPSET))
    # What quantization leaves without a reader, the float weights, is for simplify to remove, say onnxsim's notes.
    quantized, _ = onnxsim.simplify(quantize(model, **setting), skip_constant_folding=True)
    onnx.save(quantized, job.output)


if __name__ == "__main__":
    main()
