"""NNCF's post-training quantization of ONNX models."""

from __future__ import annotations

import nncf
import onnx
from job import Job

#: From this opset on NNCF gives weights a scale per channel.
OPSET = 13


def main() -> None:
    """Do the job that the command line names."""
    job = Job.read()
    options = {}
    if "model_type" in job.setting:
        options["model_type"] = nncf.ModelType(job.setting["model_type"])
    if "preset" in job.setting:
        options["preset"] = nncf.QuantizationPreset(job.setting["preset"])
    samples = nncf.Dataset(job.samples)
    onnx.save(nncf.quantize(job.raised(OPSET), samples, subset_size=len(job.samples), **options), job.output)


if __name__ == "__main__":
    main()
