"""Run a .tflite on samples `[S, ...]` of its input's codes or numbers; leave what its output stands for, in floats.

python run_tflite.py MODEL.tflite INPUTS.npy OUTPUTS.npy
"""

from __future__ import annotations

import sys

import numpy as np
from ai_edge_litert.interpreter import Interpreter


def main() -> None:
    """Run it, quantizing and dequantizing where the model has integers at its ends."""
    model, given, made = sys.argv[1:]
    interpreter = Interpreter(model)
    interpreter.allocate_tensors()
    [source], [result] = interpreter.get_input_details(), interpreter.get_output_details()
    found = []
    for sample in np.load(given):
        values = sample.reshape(source["shape"]).astype(np.float32)
        if source["dtype"] is not np.float32:
            scale, zero_point = source["quantization"]
            info = np.iinfo(source["dtype"])
            values = np.clip(np.rint(values / scale) + zero_point, info.min, info.max).astype(source["dtype"])
        interpreter.set_tensor(source["index"], values)
        interpreter.invoke()
        output = interpreter.get_tensor(result["index"])
        if result["dtype"] is not np.float32:
            scale, zero_point = result["quantization"]
            output = (output.astype(np.float32) - zero_point) * np.float32(scale)
        found.append(output)
    np.save(made, np.stack(found))


if __name__ == "__main__":
    main()
