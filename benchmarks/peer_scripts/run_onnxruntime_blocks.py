"""onnxruntime's quantizer of weights in blocks of few bits, for MatMulNBits and GatherBlockQuantized."""

from __future__ import annotations

from typing import Any

from job import Job
from onnxruntime.quantization import QuantFormat
from onnxruntime.quantization import matmul_nbits_quantizer as blocks

#: The first opset with types of four bits.
OPSET = 21
#: The algorithms whose blocks are the configuration's, not the quantizer's.
OWN_BLOCKS = {"HQQ"}


def algorithm(name: str, setting: dict[str, Any], job: Job) -> blocks.WeightOnlyQuantConfig:
    """Return the configuration of an algorithm, with those of the setting's keys that are its own."""
    options: dict[str, Any] = {}
    if name in OWN_BLOCKS:
        options["block_size"] = setting.pop("block_size")
    if name == "GPTQ":
        options["calibration_data_reader"] = list(job.samples)
    return getattr(blocks, f"{name}WeightOnlyQuantConfig")(**options)


def main() -> None:
    """Do the job that the command line names."""
    job = Job.read()
    setting = dict(job.setting)
    if "algorithm" in setting:
        setting["algo_config"] = algorithm(setting.pop("algorithm"), setting, job)
    if "quant_format" in setting:
        setting["quant_format"] = QuantFormat[setting["quant_format"]]
    quantizer = blocks.MatMulNBitsQuantizer(job.raised(OPSET), **setting)
    quantizer.process()
    quantizer.model.save_model_to_file(str(job.output))


if __name__ == "__main__":
    main()
