"""Run the stages: apply a pass, verify it, record it; take from the cache what was done before."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, Self, TypeVar

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from qcompile import cache as caching
from qcompile import translation, verify
from qcompile.cache import Cache
from qcompile.calib.collect import Statistics
from qcompile.calib.data import Sample
from qcompile.calib.map_losses import MapLosses
from qcompile.calib.sensitivity import Choice
from qcompile.core import model as models
from qcompile.core import runtime, scratch
from qcompile.core.contract import Effect, Pass, Refusal, Rewritten
from qcompile.core.errors import VerificationError, first_line
from qcompile.core.numerics import IntArray
from qcompile.core.target import Target
from qcompile.evidence import Evidence
from qcompile.options import Options
from qcompile.passes.canonicalize.widen_float16 import computes_in_float16
from qcompile.passes.place import Wish

T = TypeVar("T")


def untracked(items: Iterable[T], total: int, what: str) -> Iterable[T]:
    """Show no progress."""
    return items


@dataclass(frozen=True)
class Codec(Generic[T]):
    """How a measurement's result is kept in the cache."""

    encode: Callable[[T], bytes]
    decode: Callable[[bytes], T]


STATISTICS = Codec(Statistics.to_bytes, Statistics.from_bytes)
CHOICE: Codec[Choice] = Codec(
    lambda choice: json.dumps(asdict(choice)).encode(),
    lambda content: Choice.from_json(json.loads(content)),
)
WISHES: Codec[dict[str, Wish]] = Codec(
    lambda wishes: json.dumps({node: asdict(wish) for node, wish in wishes.items()}).encode(),
    lambda content: {node: Wish.from_json(entry) for node, entry in json.loads(content).items()},
)
DRIFT: Codec[dict[str, tuple[float, ...]]] = Codec(
    lambda drift: json.dumps(drift).encode(),
    lambda content: {name: tuple(shift) for name, shift in json.loads(content).items()},
)
NOISE: Codec[dict[str, float]] = Codec(
    lambda noise: json.dumps(noise).encode(), lambda content: dict(json.loads(content))
)
COUNTS: Codec[dict[str, int]] = Codec(
    lambda counts: json.dumps(counts).encode(), lambda content: dict(json.loads(content))
)
CODES: Codec[dict[str, IntArray]] = Codec(lambda codes: _archive(codes), lambda content: _arrays(content))
LOSSES: Codec[dict[str, dict[int, float]]] = Codec(
    lambda losses: json.dumps(losses).encode(),
    lambda content: {name: {int(bits): loss for bits, loss in of.items()} for name, of in json.loads(content).items()},
)
MAP_LOSSES: Codec[MapLosses] = Codec(
    lambda losses: json.dumps(losses.as_json()).encode(), lambda content: MapLosses.from_json(json.loads(content))
)
TRIED: Codec[dict[frozenset[str], float]] = Codec(
    lambda tried: json.dumps([[sorted(names), noise] for names, noise in tried.items()]).encode(),
    lambda content: {frozenset(names): float(noise) for names, noise in json.loads(content)},
)
PAIRS: Codec[dict[tuple[str, str], float]] = Codec(
    lambda pairs: json.dumps([[*names, loss] for names, loss in pairs.items()]).encode(),
    lambda content: {(a, b): float(loss) for a, b, loss in json.loads(content)},
)
WIDTHS: Codec[dict[int, dict[str, IntArray]]] = Codec(
    lambda codes: _archive({f"{bits} {name}": array for bits, of in codes.items() for name, array in of.items()}),
    lambda content: _by_bits(_arrays(content)),
)
NAMES: Codec[list[str]] = Codec(
    lambda names: json.dumps(names).encode(), lambda content: [str(name) for name in json.loads(content)]
)


@dataclass(frozen=True)
class Step:
    """What became of one pass.

    Parameters
    ----------
    name : str
    effect : str
    nodes_before, nodes_after : int
    error : float
        Largest max|Δ| / max|y| of the outputs on the verification samples.
    refusals : tuple of Refusal
    notes : tuple of str
        What it did that the report is to say first.
    """

    name: str
    effect: str
    nodes_before: int
    nodes_after: int
    error: float
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class Pipeline:
    """The state of one compile between its stages.

    Parameters
    ----------
    key : str
        Stands for everything that went in so far: each stage's result is stored under the key of its ingredients.
    reference : onnx_ir.Model
        The model as it came in; every float pass is held against it.
    samples : sequence of Sample
        Real inputs on which passes are verified.
    cache : Cache, optional
    """

    key: str
    reference: ir.Model
    samples: Sequence[Sample]
    cache: Cache | None = None
    steps: list[Step] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    _outputs: list[runtime.Outputs] | None = None

    @classmethod
    def start(cls, model: ir.Model, evidence: Evidence, target: Target, options: Options) -> Self:
        """Begin a compile: from here on, the key stands for the model, the data, the target, the options and us."""
        libraries = sorted(f"{name} {version}" for name, version in caching.versions().items())
        ingredients = [models.content_hash(model), evidence.digest, repr(target), repr(options.measured_by())]
        key = caching.key(caching.code_digest(), *libraries, *ingredients)
        return cls(key, model, evidence.samples, caching.open_cache(options.cache))

    def apply(self, pass_: Pass, model: ir.Model) -> ir.Model:
        """Run a pass on a copy of the model, verify it and record it.

        Returns
        -------
        onnx_ir.Model
            The rewritten model; `model` stays as it was.

        Raises
        ------
        VerificationError
            If the pass moved the outputs by more than its effect allows.
        """
        name = type(pass_).__name__
        self.key = caching.key(self.key, name, repr(pass_))
        start = time.perf_counter()
        scratch.give_back()
        found = self._load(model)
        if found is None:
            found = self._run(name, pass_, model)
            self._store(*found)
        rewritten, step = found
        self.steps.append(step)
        self.seconds[name] = time.perf_counter() - start
        return rewritten

    def obstacle(self, pass_: Pass, model: ir.Model) -> str:
        """Return what a pass would be stopped for on the verification samples; nothing if it would not be.

        Neither is the pass recorded, nor the model changed.
        """
        try:
            self._moved(pass_, model, pass_(model.clone()).model)
        except VerificationError as error:
            return error.fact
        return ""

    def _run(self, name: str, pass_: Pass, model: ir.Model) -> tuple[ir.Model, Step]:
        before = len(model.graph)
        result = pass_(model.clone())
        refusals, notes = (result.refusals, result.notes) if isinstance(result, Rewritten) else ((), ())
        translation.validate(pass_, model, result.model, {refusal.node for refusal in refusals})
        moved = self._moved(pass_, model, result.model)
        step = Step(name, pass_.effect.value, before, len(result.model.graph), float(f"{moved:.3g}"), refusals, notes)
        return result.model, step

    def _moved(self, pass_: Pass, model: ir.Model, rewritten: ir.Model) -> float:
        """Hold a pass to its effect, and return the largest max|Δ| / max|y| of the outputs."""
        name = type(pass_).__name__
        if self._outputs is None:
            self._outputs = verify.outputs_of(self.reference, self.samples)
        # What earlier passes moved within their bounds must not count against a pass that is exact.
        expected = verify.outputs_of(model, self.samples) if pass_.effect is Effect.EXACT else self._outputs
        try:
            found = verify.outputs_of(rewritten, self.samples)
        except Exception as error:
            fact = f"left a model that does not run ({first_line(error)})"
            raise VerificationError(f"pass {name}", fact, "report it with the model") from error
        try:
            width = 2 if computes_in_float16(self.reference) else 8
            return verify.check_equivalence(name, pass_.effect, expected, found, width)
        except VerificationError:
            verify.require_repeatable(self.reference, self.samples, self._outputs)
            raise

    def decline(self, pass_: type[Pass], model: ir.Model, refusals: Sequence[Refusal]) -> None:
        """Record that a pass was not applied, and why."""
        count = len(model.graph)
        self.steps.append(Step(pass_.__name__, pass_.effect.value, count, count, 0.0, tuple(refusals)))

    def record(self, pass_: type[Pass], result: Rewritten) -> None:
        """Record a pass that was run before there was anything to verify it against."""
        count = len(result.model.graph)
        self.steps.append(
            Step(pass_.__name__, pass_.effect.value, count, count, math.nan, result.refusals, result.notes)
        )

    def measure(self, name: str, codec: Codec[T], compute: Callable[[], T]) -> T:
        """Run a measurement, or take its result from the cache.

        What it depends on must be in the key already: the passes so far, and all that `start` put there.
        """
        start = time.perf_counter()
        key = caching.key(self.key, "measure", name)
        content = self.cache.get(key) if self.cache else None
        if content is None:
            scratch.give_back()
            result = compute()
            if self.cache:
                self.cache.put(key, codec.encode(result))
        else:
            result = codec.decode(content)
        self.seconds[name] = time.perf_counter() - start
        return result

    def _load(self, model: ir.Model) -> tuple[ir.Model, Step] | None:
        content = self.cache.get(self.key) if self.cache else None
        if content is None:
            return None
        header, _, body = content.partition(b"\n")
        entry = json.loads(header)
        refusals = tuple(Refusal(**refusal) for refusal in entry.pop("refusals"))
        step = replace(Step(**entry), refusals=refusals, notes=tuple(entry["notes"]))
        return ir.from_proto(onnx.ModelProto.FromString(body)), step

    def _store(self, model: ir.Model, step: Step) -> None:
        # A model beyond protobuf's 2 GiB is made again rather than stored: its stages cost less than its bytes.
        if self.cache and models.initializer_bytes(model) <= models.INLINE_LIMIT:
            self.cache.put(self.key, _line(asdict(step)) + models.serialize(model))


def _archive(arrays: dict[str, IntArray]) -> bytes:
    buffer = io.BytesIO()
    types = np.array([array.dtype.name for array in arrays.values()], np.str_)
    np.savez(buffer, *arrays.values(), names=np.array(list(arrays), np.str_), types=types)
    return buffer.getvalue()


def _arrays(content: bytes) -> dict[str, IntArray]:
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        # NumPy reads codes of four bits as bytes without a type.
        kinds = [np.dtype(getattr(ml_dtypes, str(kind), str(kind))) for kind in archive["types"]]
        return {str(name): archive[f"arr_{index}"].view(kinds[index]) for index, name in enumerate(archive["names"])}


def _by_bits(arrays: dict[str, IntArray]) -> dict[int, dict[str, IntArray]]:
    found: dict[int, dict[str, IntArray]] = {}
    for key, array in arrays.items():
        bits, _, name = key.partition(" ")
        found.setdefault(int(bits), {})[name] = array
    return found


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=True).encode() + b"\n"
