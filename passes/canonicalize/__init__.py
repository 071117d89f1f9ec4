"""Canonicalize: what exporters leave behind is cleaned up, one rule a file, in the order of `rules`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from qcompile.core.contract import Effect, Refusal, Rewritten
from qcompile.core.lengths import Shape
from qcompile.passes.canonicalize.fix_names import FixNames
from qcompile.passes.canonicalize.fix_shapes import FixShapes
from qcompile.passes.canonicalize.fold_affine import FoldAffine
from qcompile.passes.canonicalize.fold_batch_norm import FoldBatchNorm
from qcompile.passes.canonicalize.fold_constants import FoldConstants
from qcompile.passes.canonicalize.fold_pad import FoldPad
from qcompile.passes.canonicalize.fold_shapes import FoldShapes
from qcompile.passes.canonicalize.infer_shapes import InferShapes
from qcompile.passes.canonicalize.join_clips import JoinClips
from qcompile.passes.canonicalize.join_factors import JoinFactors
from qcompile.passes.canonicalize.join_matmul_add import JoinMatMulAdd
from qcompile.passes.canonicalize.merge_casts import MergeCasts
from qcompile.passes.canonicalize.merge_views import MergeViews
from qcompile.passes.canonicalize.move_transposes import MoveTransposes
from qcompile.passes.canonicalize.plain_gemm import PlainGemm
from qcompile.passes.canonicalize.raise_opset import RaiseOpset
from qcompile.passes.canonicalize.remove_no_ops import RemoveNoOps
from qcompile.passes.canonicalize.remove_trivial_moves import RemoveTrivialMoves
from qcompile.passes.canonicalize.remove_unused_opsets import RemoveUnusedOpsets
from qcompile.passes.canonicalize.share_results import ShareResults
from qcompile.passes.canonicalize.widen_float16 import WidenFloat16
from qcompile.passes.join_activations import JoinActivations


@dataclass(frozen=True)
class Canonicalize(ir.passes.InPlacePass):
    """Bring a model from any exporter into the form that the other passes expect.

    Parameters
    ----------
    opset : int
        The default operator set is raised to this version.
    shapes : mapping of str to Shape
        Inputs to fix, by name.
    widen : bool
        Compute in float32 what is float16.
    batch_of_one : bool
        Where the first axis of an input is all that is open, it is fixed to 1, and what follows from that is folded.
    joins : bool
        Write activations of several operators as one, before a factor of theirs goes into weights.
    """

    opset: int
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    widen: bool = False
    batch_of_one: bool = False
    joins: bool = False
    effect: ClassVar[Effect] = Effect.CLOSE

    def rules(self) -> tuple[ir.passes.PassBase, ...]:
        """Return the rules in the order in which they run."""
        return (*self.prepare(), *SETTLE, *self.joining(), *tidy())

    def joining(self) -> tuple[ir.passes.PassBase, ...]:
        """Return what writes activations as one operator each, where that is asked for."""
        return (JoinActivations(), *SETTLE) if self.joins else ()

    def prepare(self) -> tuple[ir.passes.PassBase, ...]:
        """Return the rules that bring any model to one opset, with shapes, constants and names."""
        return (
            FixShapes(self.shapes, self.batch_of_one),
            RaiseOpset(self.opset),
            InferShapes(),
            FoldConstants(),
            # Functions are inlined, and types are known.
            *([WidenFloat16()] if self.widen else []),
            # Constants that were folded tell more shapes, and shapes more constants.
            InferShapes(),
            FoldShapes(),
            FoldConstants(),
            InferShapes(),
            RemoveNoOps(),
            RemoveUnusedOpsets(),
        )

    def call(self, model: ir.Model) -> Rewritten:
        """Apply the rules in place; those that make work for one another run until nothing changes."""
        modified, refusals, notes = _apply(self.prepare(), model)
        if self.joins:
            modified |= _apply((*SETTLE, *self.joining()), model)[0]
        for _ in range(ROUNDS):
            settled, _, _ = _apply(SETTLE, model)
            changed, left, _ = _apply(tidy(), model)
            modified |= settled or changed
            if not changed:
                break
        return Rewritten(model, modified, (*refusals, *left), notes)


def tidy() -> tuple[ir.passes.PassBase, ...]:
    """Return the rules that each may leave work for another."""
    return (
        RemoveTrivialMoves(),
        MergeCasts(),
        # In front of what folds into Conv: channels must come to stand where it has them.
        MoveTransposes(),
        MergeViews(),
        JoinClips(),
        ShareResults(),
        PlainGemm(),
        JoinMatMulAdd(),
        FoldPad(),
        FoldBatchNorm(),
        FoldAffine(),
        JoinFactors(),
    )


#: In front of each round: what was moved has other shapes, and those may let more move; refusals name the nodes.
SETTLE = (InferShapes(), FoldShapes(), FixNames())
#: Two do for every model of the catalogue, the second to see that nothing is left.
ROUNDS = 6


def _apply(rules: Iterable[ir.passes.PassBase], model: ir.Model) -> tuple[bool, tuple[Refusal, ...], tuple[str, ...]]:
    results = [rule(model) for rule in rules]
    said = [result for result in results if isinstance(result, Rewritten)]
    refusals = tuple(refusal for result in said for refusal in result.refusals)
    notes = tuple(note for result in said for note in result.notes)
    return any(result.modified for result in results), refusals, notes
