"""The only import of onnxruntime: sessions that run models, and a look at what its optimizer made of one."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import io
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qcompile.core import model as models
from qcompile.core.errors import ModelError, QcompileError, TargetError, shortened

Feeds = Mapping[str, npt.NDArray[Any]]
Outputs = dict[str, npt.NDArray[Any]]

#: What `MappedTensor` tells locations from.
ROOT = Path.cwd().anchor
#: Bytes of weights up to which the runtime keeps what it freed for the next run.
ARENA = 1 << 28
#: What the runtime wraps its messages in, and what is left of that: codes, source files, C++ signatures, conditions.
WRAPPINGS = (
    (r"\[ONNXRuntimeError\] : \d+ : \w+ : ", ""),
    (r"/onnxruntime_src/\S+ .*?\)(?: \[[^\]]*\])? (?=\S)", ""),
    (r"^(?:Fatal error|Exception during initialization): ", ""),
    (r"^Non-zero status code returned while running (\S+) node\. Name:'([^']*)' Status Message: ", r"\1 '\2': "),
    (r"^This is an invalid model\. In Node, \(\"([^\"]*)\", (\w+), .*, Error ", r"\2 '\1': "),
    (r"(^|: )(?:(?!: ).)* was false\. ", r"\1"),
)
#: How many axes a batch of images has, and how high and wide one is that all but the deepest networks take.
IMAGE_RANK, SMALL_IMAGE = 4, 64
#: Distributions that all install the one import package `onnxruntime`.
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")


def distributions() -> dict[str, str]:
    """Return the installed distributions of ONNX Runtime and their versions."""
    found = {}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def load_onnxruntime() -> ModuleType:
    """Import onnxruntime.

    Raises
    ------
    TargetError
        If no distribution of it is installed, or two that overwrite one another.
    """
    found = distributions()
    if len(found) > 1:
        fact = "onnxruntime and onnxruntime-gpu are both installed and overwrite one another"
        raise TargetError("onnxruntime", fact, "uninstall both, then install one of 'qcompile[cpu]', 'qcompile[cuda]'")
    # Since 1.29 its official builds send what they run to their maker, and leave files in the temporary folder.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        remedy = "pip install 'qcompile[cpu]' (or 'qcompile[cuda]' for NVIDIA GPUs)"
        raise TargetError("onnxruntime", "is not installed", remedy) from error
    module: ModuleType = onnxruntime
    return module


@functools.cache
def newest_versions() -> tuple[int, int, str]:
    """Return the newest opset and IR version that the runtime loads, found by trying, and the runtime's name."""

    def loads(opset: int, ir_version: int) -> bool:
        text = (
            f'<ir_version: {ir_version}, opset_import: ["": {opset}]> g (float[1] x) => (float[1] y) {{ y = Neg (x) }}'
        )
        try:
            Session(ir.from_proto(onnx.parser.parse_model(text)))
        except ModelError:
            return False
        return True

    oldest, known = 7, onnx.defs.onnx_opset_version()
    opset = next((version for version in range(known, oldest, -1) if loads(version, 8)), oldest)
    formats = range(onnx.IR_VERSION, 8, -1)
    return opset, next((version for version in formats if loads(oldest, version)), 8), name()


def name() -> str:
    """Return the runtime's name and version."""
    return f"onnxruntime {load_onnxruntime().__version__}"


def _reason(error: BaseException) -> str:
    """Return what the runtime says was the matter, without its codes, its source files and its C++ signatures."""
    text = " ".join(str(error).split())
    for pattern, rest in WRAPPINGS:
        text = re.sub(pattern, rest, text)
    return shortened(text)


class Session:
    """A model ready to run on the CPU.

    Parameters
    ----------
    model : onnx_ir.Model or Path
    optimize : bool
        Let the runtime rewrite the graph (integer kernels, fusions), as a user's session does. Without it each node
        runs as written, which for Q/DQ pairs is their definition.
    integer_kernels : bool
        Let the optimizer look for Q/DQ. It drops a Clip or Relu in front of a QuantizeLinear even where the parameters
        are inputs of the graph, about which it cannot know that they saturate alike: EfficientNet-Lite0 then gives
        4 dB where it has 26.
    threads : int
        Threads inside an operator. One by default, so that sums have one order and results repeat.
    optimized_path : Path, optional
        Where the runtime writes the graph that its optimizer made.
    profile_prefix : Path, optional
        Time each node of each run; `end_profiling` tells the file.

    Raises
    ------
    ModelError
        If the runtime does not accept the model.
    """

    def __init__(
        self,
        model: ir.Model | Path,
        *,
        optimize: bool = True,
        integer_kernels: bool = True,
        threads: int = 1,
        optimized_path: Path | None = None,
        profile_prefix: Path | None = None,
    ) -> None:
        ort = load_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.use_deterministic_compute = True
        # Its arena holds twice the weights where these are dequantized as they are read; a large model's are worth more
        # than the time that it saves.
        options.enable_cpu_mem_arena = _weight_bytes(model) <= ARENA
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        if not integer_kernels:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if optimized_path is not None:
            options.optimized_model_filepath = str(optimized_path)
            # Beside the graph, or a model beyond protobuf's 2 GiB could not be looked at.
            beside = "session.optimized_model_external_initializers"
            options.add_session_config_entry(f"{beside}_file_name", f"{optimized_path.name}.data")
            options.add_session_config_entry(f"{beside}_min_size_in_bytes", "1024")
        if profile_prefix is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile_prefix)
        self._place = place = model if isinstance(model, Path) else "model"
        try:
            with _loadable(model) as (content, weights):
                # Not copied: they have to be there as long as the session is.
                self._weights = [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
                options.add_external_initializers(list(weights), self._weights)
                # Locations of weights that are in files are told from there.
                if isinstance(content, bytes):
                    options.add_session_config_entry("session.model_external_initializers_file_folder_path", ROOT)
                self._session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except QcompileError:
            raise
        except Exception as error:
            fact = f"{name()} does not load it ({_reason(error)})"
            remedy = "export it with standard operators, in an opset that this runtime takes"
            raise ModelError(place, fact, remedy) from error
        self.output_names: tuple[str, ...] = tuple(output.name for output in self._session.get_outputs())

    def run(self, feeds: Feeds) -> Outputs:
        """Run one sample and return its outputs by name, a sequence's elements as ``name[0]``, ``name[1]`` and so on.

        Raises
        ------
        ModelError
            If the runtime fails on it.
        """
        try:
            values = self._session.run(None, dict(feeds))
        except Exception as error:  # the runtime raises a class of its own for each kind of failure
            fact = f"onnxruntime fails on a sample ({_reason(error)})"
            raise ModelError(self._place, fact, "check that the model runs with these inputs") from error
        outputs: Outputs = {}
        for name, value in zip(self.output_names, values, strict=True):
            if isinstance(value, np.ndarray):
                outputs[name] = value
            elif isinstance(value, list):
                outputs |= {f"{name}[{index}]": np.asarray(element) for index, element in enumerate(value)}
            elif value is not None:  # an optional that is empty has nothing to compare
                outputs[name] = np.asarray(value)
        return outputs

    def end_profiling(self) -> Path:
        """Stop timing nodes, and return the file with the events."""
        return Path(self._session.end_profiling())


def write_ort_format(model: Path) -> None:
    """Write a model for ARM in ORT format beside it, and what that needs, by the runtime's own tools.

    Raises
    ------
    TargetError
        If what they are made with is not installed.
    """
    load_onnxruntime()
    try:
        from onnxruntime.tools import convert_onnx_models_to_ort as tool
    except ImportError as error:
        raise TargetError("onnxruntime's tools", f"cannot be loaded ({error})", "pip install flatbuffers") from error
    said = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            tool.convert_onnx_models_to_ort(
                model, optimization_styles=[tool.OptimizationStyle.Fixed], target_platform="arm",
                save_optimized_onnx_model=True, enable_type_reduction=True,
            )  # fmt: skip
    finally:
        logging.disable(said)


def ort_format(table: str) -> ModuleType:
    """Return what reads and writes a table of files in ORT format."""
    return importlib.import_module(f"onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs.{table}")


def _weight_bytes(model: ir.Model | Path) -> int:
    """Return the bytes of a model's weights; of a file, those of all that goes with it."""
    if isinstance(model, ir.Model):
        return models.initializer_bytes(model)
    return sum(file.stat().st_size for file in model.parent.glob(f"{model.name}*") if file.is_file())


@contextlib.contextmanager
def _loadable(model: ir.Model | Path) -> Iterator[tuple[str | bytes, dict[str, npt.NDArray[Any]]]]:
    """Give what InferenceSession takes, and weights in memory that it takes beside that.

    That is a path, or bytes, or a temporary file where the bytes would be too many. Weights in files stay there: the
    runtime maps them.
    """
    if isinstance(model, Path):
        yield str(model), {}
    elif models.held_bytes(model) <= models.INLINE_LIMIT:
        yield models.apart(model)
    else:
        with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
            path = Path(folder) / "model.onnx"
            models.save(model, path)
            yield str(path), {}


def with_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """Return a copy of `model` (weights shared) in which the named values are outputs as well."""
    copy = model.clone()
    present = {value.name for value in copy.graph.outputs}
    values = ir.convenience.create_value_mapping(copy.graph)
    copy.graph.outputs.extend(values[name] for name in names if name not in present and values[name].producer())
    return copy


def optimized(model: Path) -> onnx.GraphProto:
    """Return the graph that ONNX Runtime really executes for a model, after its own optimizer."""
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        path = Path(folder) / "optimized.onnx"
        Session(model, optimized_path=path)
        return onnx.load(path, load_external_data=False).graph


def optimized_nodes(model: Path) -> list[onnx.NodeProto]:
    """Return the nodes of that graph."""
    return list(optimized(model).node)


def synthetic_feeds(model: ir.Model, seed: int, open_axis: int = 1) -> dict[str, npt.NDArray[Any]]:
    """Return one seeded random sample that fits the model's inputs: normal floats, integers 0 and 1.

    Axes that the model leaves open are `open_axis` long, but for a batch, a first one, which is 1, and for the height
    and width of an image, which are at least `SMALL_IMAGE`: networks that halve them many times fail on less. An image
    is the only float input of four axes; several are the keys and values of attention.

    It serves to check that a rewrite keeps the function, never to measure fidelity.
    """
    generator = np.random.default_rng(seed)
    feeds: dict[str, npt.NDArray[Any]] = {}
    # Others have a default, as every weight of an IR version 3 model has.
    wanted = [value for value in model.graph.inputs if not value.is_initializer()]
    images = [value for value in wanted if len(value.shape or ()) == IMAGE_RANK and _is_float(value)]
    for value in wanted:
        assert value.name is not None and value.dtype is not None
        length = max(open_axis, SMALL_IMAGE) if images == [value] else open_axis
        lengths = [1, *[length] * len(value.shape or ())]
        shape = [dim if isinstance(dim, int) else lengths[axis] for axis, dim in enumerate(value.shape or ())]
        dtype = value.dtype.numpy()
        if _is_float(value):
            feeds[value.name] = generator.standard_normal(shape).astype(dtype)
        else:
            feeds[value.name] = generator.integers(0, 2, shape).astype(dtype)
    return feeds


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()
