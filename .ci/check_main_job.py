"""Hold the README's main job to what it promises: int8 agrees with float on every evaluation image, in integers."""

import json
import sys
from pathlib import Path

folder = Path(sys.argv[1])
report = json.loads((folder / "report.json").read_text())
output = report["fidelity"]["outputs"]["probabilities"]
assert report["fidelity"]["samples"] == 20 and output["top1"] == 1.0, output
kernels = [op["kernel"] for op in report["operators"] if op["kernel"]]
# The first convolution reads three channels: it is cheaper in float, by the cost table.
assert kernels.count("QLinearConv") >= 8, kernels
assert report["size"]["ratio"] < 0.4, report["size"]
print(f"{folder.name}: {output['sqnr']:.1f} dB, 20/20 same argmax, {report['size']['ratio']:.2f}x size")
