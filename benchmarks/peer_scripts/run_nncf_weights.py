"""NNCF's compression of weights, in an opset below which what it makes of four bits is wrong without a word."""

from __future__ import annotations

import nncf
import onnx
from job import Job

OPSET = 21


def main() -> None:
    """Do the job that the command line names."""
    job = Job.read()
    setting = dict(job.setting)
    mode = nncf.CompressWeightsMode(setting.pop("mode"))
    if setting.pop("calibrated", False):
        setting |= {"dataset": nncf.Dataset(job.samples), "subset_size": len(job.samples)}
    onnx.save(nncf.compress_weights(job.raised(OPSET), mode=mode, **setting), job.output)


if __name__ == "__main__":
    main()
