"""Write backends/ort/kernels/cuda.json: the kernels that an onnxruntime-gpu's CUDA provider registers.

Usage: python benchmarks/cuda_kernels.py PYTHON, the interpreter of a virtual environment with onnxruntime-gpu,
nvidia-cublas and nvidia-curand. No GPU is needed: the provider registers its kernels when it is made, and all that this
asks of the driver are a device and its properties, which a few stub libraries answer (gcc must be there). Nothing runs
on them. On a machine with a GPU, --real leaves the stubs out and gives the same table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).parent.parent / "backends" / "ort" / "kernels" / "cuda.json"
DOMAINS = ("", "com.microsoft")
#: Each library of the driver that the two providers name, and the symbols that they want of it.
STUBS = {
    "libcuda.so.1": "int cuTensorMapEncodeTiled(void){return 100;}",
    "libnvonnxparser.so.10": "int createNvOnnxParser_INTERNAL(void){return 0;}"
    "int createNvOnnxParserRefitter_INTERNAL(void){return 0;}",
    "libnvinfer.so.10": "static long zero(void){return 0;} static void*table[64]; static void**object[16];"
    "void*getPluginRegistry(void){for(int i=0;i<64;i++)table[i]=(void*)zero; object[0]=table; return object;}"
    "int getInferLibVersion(void){return 100900;} int createInferBuilder_INTERNAL(void){return 0;}"
    "int createInferRefitter_INTERNAL(void){return 0;} int createInferRuntime_INTERNAL(void){return 0;}",
    "libcudnn.so.9": "int cudnnCreate(void**h){*h=(void*)8;return 0;} int cudnnDestroy(void*h){return 0;}"
    "int cudnnSetStream(void*h,void*s){return 0;}",
}
#: What is answered in place of the CUDA runtime, so that the provider can be made.
ANSWERS = """
#include <string.h>
int cudaSetDevice(int d){return 0;} int cudaGetDevice(int*n){*n=0;return 0;}
int cudaGetDeviceCount(int*n){*n=1;return 0;} int cudaDeviceSynchronize(void){return 0;}
int cudaStreamSynchronize(void*s){return 0;} int cudaGetLastError(void){return 0;}
int cudaGetDeviceProperties(void*p,int d){memset(p,0,640);return 0;}
int cudaMemGetInfo(size_t*a,size_t*b){*a=*b=1ull<<33;return 0;}
int cudaRuntimeGetVersion(int*v){*v=13000;return 0;} int cudaDriverGetVersion(int*v){*v=13000;return 0;}
int cudaDeviceGetAttribute(int*v,int a,int d){*v=90;return 0;}
int cublasCreate_v2(void**h){*h=(void*)8;return 0;} int cublasDestroy_v2(void*h){return 0;}
int cublasLtCreate(void**h){*h=(void*)8;return 0;} int cublasLtDestroy(void*h){return 0;}
int cublasSetStream_v2(void*h,void*s){return 0;}
"""
LISTING = """
import json, onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state
rows = [[k.domain, k.op_name, *k.version_range, {n: sorted(t) for n, t in k.type_constraints.items()}]
        for k in state.get_all_opkernel_def() if k.provider == "CUDAExecutionProvider"]
print(json.dumps([onnxruntime.__version__, rows]))
"""
#: What the registry has in place of "and all that follow".
OPEN = 2**31 - 1


def listed(python: str, real: bool) -> tuple[str, list[list[Any]]]:
    """Return the version of a runtime and the kernels of its CUDA provider."""
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ) if real else with_stubs(python, Path(folder))
        done = subprocess.run([python, "-c", LISTING], env=environment, capture_output=True, text=True, check=True)
    version, rows = json.loads(done.stdout.splitlines()[-1])
    return version, rows


def with_stubs(python: str, folder: Path) -> dict[str, str]:
    """Return an environment in which the provider loads although there is no driver."""
    (folder / "cudnn.map").write_text("libcudnn.so.9 { global: *; };")
    for name, source in STUBS.items():
        versions = [f"-Wl,--version-script={folder / 'cudnn.map'}"] if "cudnn" in name else []
        build(source, folder / name, f"-Wl,-soname,{name}", *versions)
    build(ANSWERS, folder / "answers.so")
    script = "import pathlib, onnxruntime; print(pathlib.Path(onnxruntime.__file__).parent.parent)"
    site = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    found = [str(path.parent) for path in Path(site).glob("nvidia/*/lib/libcu*.so*")]
    runtime = [str(path.parent) for path in Path("/usr/local").glob("cuda*/lib64/libcudart.so.*")]
    paths = [str(folder), *sorted(set(found)), *sorted(set(runtime))]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(paths), "LD_PRELOAD": str(folder / "answers.so")}


def build(source: str, target: Path, *flags: str) -> None:
    """Compile a shared library of C."""
    command = ["gcc", "-w", "-shared", "-fPIC", "-x", "c", "-", "-o", str(target), *flags]
    subprocess.run(command, input=source, text=True, check=True)


def table(version: str, rows: list[list[Any]]) -> dict[str, Any]:
    """Return the table as the file has it: by operator, kernels that differ in one type joined into one."""
    joined: dict[str, dict[str, dict[str, set[str]]]] = defaultdict(dict)
    for domain, name, first, last, types in rows:
        if domain not in DOMAINS:
            continue
        short = {variable: sorted(each.removeprefix("tensor(").removesuffix(")") for each in allowed)
                 for variable, allowed in sorted(types.items())}  # fmt: skip
        key = json.dumps([first, None if last == OPEN else last, short])
        joined[f"{domain}:{name}" if domain else str(name)][key] = {}
    kernels = {name: [json.loads(key) for key in sorted(found, key=lambda key: (json.loads(key)[0], key))]
               for name, found in sorted(joined.items())}  # fmt: skip
    return {"provider": "CUDAExecutionProvider", "runtime": f"onnxruntime-gpu {version}", "kernels": kernels}


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python")
    parser.add_argument("--real", action="store_true")
    arguments = parser.parse_args()
    content = table(*listed(arguments.python, arguments.real))
    lines = [f" {json.dumps(name)}: [\n  " + ",\n  ".join(map(json.dumps, rows)) + "\n ]"
             for name, rows in content.pop("kernels").items()]  # fmt: skip
    head = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in content.items())
    OUTPUT.write_text("{\n" + head + '"kernels": {\n' + ",\n".join(lines) + "\n}\n}\n")
    print(f"{OUTPUT}: {len(lines)} operators")


if __name__ == "__main__":
    main()
