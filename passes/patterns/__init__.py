"""What nodes are together: norms, activations, rotary embeddings, attentions. Queries; all of them stay decomposed."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qcompile.core.contract import Refusal
from qcompile.passes.patterns.activations import Activation, ActivationKind, activations
from qcompile.passes.patterns.attentions import Attention, Operand, attentions
from qcompile.passes.patterns.norms import Norm, NormKind, norms
from qcompile.passes.patterns.projections import Projection, projection_at, projection_of
from qcompile.passes.patterns.ropes import Rope, ropes

__all__ = [
    "Activation",
    "ActivationKind",
    "Attention",
    "Norm",
    "NormKind",
    "Operand",
    "Patterns",
    "Projection",
    "Rope",
    "activations",
    "attentions",
    "norms",
    "projection_at",
    "projection_of",
    "recognise",
    "ropes",
]


@dataclass(frozen=True, eq=False)
class Patterns:
    """All that was recognised, each kind in the order of the graph, and what looks like an attention but is none."""

    norms: tuple[Norm, ...]
    activations: tuple[Activation, ...]
    ropes: tuple[Rope, ...]
    attentions: tuple[Attention, ...]
    refusals: tuple[Refusal, ...]


def recognise(graph: ir.Graph) -> Patterns:
    """Ask all queries of a canonical graph; what stands in subgraphs is not looked at."""
    found_norms, found_ropes = norms(graph), ropes(graph)
    found_attentions, refusals = attentions(graph, found_norms, found_ropes)
    return Patterns(found_norms, activations(graph), found_ropes, found_attentions, refusals)
