"""What loading a network takes, and the most memory that one run does, each in a process that did nothing before."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

#: Processes of each kind, in turns; the median of loading and the most of memory count.
PROCESSES = 9

#: Load a library as a program in C does, and run it once.
IN_C = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return 1e3 * (double)time.tv_sec + 1e-6 * (double)time.tv_nsec;
}

int main(int count, char **words) /* library, start, run_floats, bytes of the workspace and of each port */
{
    if (count != 5 + PORTS)
        return 1;
    double began = now();
#if defined(__x86_64__)
    syscall(SYS_arch_prctl, 0x1023, 18); /* what NAME_allow asks for, in vain where there is no AMX */
#endif
    void *library = dlopen(words[1], RTLD_NOW);
    if (!library)
        return 2;
    int (*start)(void *, int);
    void (*run)(TYPES);
    *(void **)&start = dlsym(library, words[2]);
    *(void **)&run = dlsym(library, words[3]);
    void *given[1 + PORTS];
    size_t bytes[1 + PORTS];
    for (int i = 0; i <= PORTS; i++)
        bytes[i] = ((size_t)atoll(words[4 + i]) + 63) / 64 * 64;
    given[0] = aligned_alloc(64, bytes[0]);
    if (start(given[0], 1))
        return 3;
    double took = now() - began;
    for (int i = 1; i <= PORTS; i++)
        given[i] = memset(aligned_alloc(64, bytes[i]), 0, bytes[i]);
    run(GIVEN);
    char line[256];
    long peak = 0;
    FILE *status = fopen("/proc/self/status", "r");
    while (fgets(line, sizeof line, status))
        sscanf(line, "VmHWM: %ld", &peak);
    printf("{\"load_ms\": %.3f, \"peak_kb\": %ld}\n", took, peak);
    return 0;
}
"""

#: The same from Python; NumPy is there before, as every caller has it.
IN_PYTHON = """
import json, re, sys, time
import numpy as np
kind, path, inputs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
if kind == "library":
    sys.path.insert(0, path)
    from session import InferenceSession
    began = time.perf_counter()
    session = InferenceSession(path)
elif kind == "onnxruntime":
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    began = time.perf_counter()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
else:
    began, session = time.perf_counter(), None
took = 1e3 * (time.perf_counter() - began)
feeds = {name: np.zeros(shape, dtype) for name, shape, dtype in inputs}
if session is not None:
    session.run(None, feeds)
peak = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
print(json.dumps({"load_ms": took, "peak_kb": peak}))
"""


@dataclass(frozen=True)
class Taken:
    """What a kind of process took.

    Parameters
    ----------
    load_ms : float
        Median.
    peak_mb : float
        The most resident memory of the whole process (VmHWM), the most of all processes, in 1024 · 1024 bytes.
    """

    load_ms: float
    peak_mb: float


def compare(library: Path, model: Path) -> dict[str, Taken]:
    """Return what a library takes in C and in Python, onnxruntime in Python, and Python with NumPy alone.

    Parameters
    ----------
    library : Path
        A folder of `cpu:tvm`, of one length.
    model : Path
        What onnxruntime loads.
    """
    about = json.loads((library / "network.json").read_text(encoding="utf-8"))
    ports = [*about["inputs"], *about["outputs"]]
    types = [_type(port) for port in ports]
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "load.c", Path(folder) / "load"
        given = [f"given[{index}]" for index in range(1 + len(ports))]
        pointers = ", ".join("void *" for _ in given)
        text = IN_C.replace("PORTS", str(len(ports))).replace("TYPES", pointers).replace("GIVEN", ", ".join(given))
        source.write_text(text, encoding="utf-8")
        compiler = shutil.which("cc") or shutil.which("gcc") or "clang-19"
        subprocess.run([compiler, "-O1", "-o", program, source, "-ldl"], check=True)
        bytes_of = [np.dtype(kind).itemsize * math.prod(port["shape"]) for port, kind in zip(ports, types, strict=True)]
        sizes = (about["workspace_bytes"], *bytes_of)
        names = [f"{about['name']}_{stem}" for stem in ("start", "run_floats")]
        feeds = [[port["name"], port["shape"], _type(port)] for port in about["inputs"]]
        shape = [json.dumps(feeds)]
        script = [sys.executable, "-c", IN_PYTHON]
        commands = {
            "C": [str(program), str((library / about["library"]).resolve()), *names, *map(str, sizes)],
            "Python": [*script, "library", str(library.resolve()), *shape],
            "onnxruntime": [*script, "onnxruntime", str(model.resolve()), *shape],
            "nothing": [*script, "nothing", "", *shape],
        }
        seen: dict[str, list[dict[str, float]]] = {kind: [] for kind in commands}
        for _ in range(PROCESSES):
            for kind, words in commands.items():
                done = subprocess.run(words, capture_output=True, text=True, check=True)
                seen[kind].append(json.loads(done.stdout))
    return {
        kind: Taken(statistics.median(each["load_ms"] for each in of), max(each["peak_kb"] for each in of) / 1024)
        for kind, of in seen.items()
    }


def _type(port: Mapping[str, Any]) -> str:
    """Return the type of the model's own values."""
    return "int64" if port["dtype"] == "int64" else "float32"
