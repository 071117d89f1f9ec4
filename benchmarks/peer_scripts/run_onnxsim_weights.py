"""onnxsim's quantizers of weights in four bits, and what it improves them with, on a model that it simplified."""

from __future__ import annotations

import onnx
import onnxsim
from job import Job

#: Below it the quantizers return the float model.
OPSET = 21


def main() -> None:
    """Do the job that the command line names."""
    job = Job.read()
    setting = dict(job.setting)
    quantize, improvement = getattr(onnxsim, setting.pop("function")), setting.pop("improved_by", None)
    model, _ = onnxsim.simplify(job.raised(OPSET))
    quantized = quantize(model, **setting)
    if improvement is not None:
        quantized = getattr(onnxsim, improvement)(model, quantized, calibration_data=list(job.samples))
    # What quantization leaves without a reader, the float weights, is for simplify to remove, say onnxsim's notes.
    quantized, _ = onnxsim.simplify(quantized, skip_constant_folding=True)
    onnx.save(quantized, job.output)


if __name__ == "__main__":
    main()
