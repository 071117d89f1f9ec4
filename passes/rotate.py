"""Rotate channels: orthogonal matrices folded into the weights on both sides of a stream, or of an attention's values.

Rotations spread what stands out in a few channels over all, so that one scale serves them (QuaRot, Ashkboos et al.
2024; SpinQuant, Liu et al. 2024). What can be rotated is proven in `rotations.py`; which matrices are good for it is
measured in `calib/rotations.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.core.contract import Effect, Refusal, Rewritten
from qcompile.core.orthogonal import Matrix, Orthogonal
from qcompile.core.rotation import Place, Rotation
from qcompile.passes.canonicalize.editing import add_constant, remove_unused
from qcompile.passes.fold_matrix import add_shift, multiply_constant, multiply_inputs, multiply_outputs, response
from qcompile.passes.patterns import Norm, projection_at
from qcompile.passes.rotations import NormReaders, Rotatable, StreamSite, ValueSite, rotatable
from qcompile.passes.structure import constant, constant_tensor, name_of


def spread_evenly(places: Iterable[Place], seed: int = 0) -> tuple[Rotation, ...]:
    """Return a randomized Hadamard matrix for each place, or the nearest that its width allows; no two alike."""
    return tuple(
        Rotation(place, (Orthogonal.spreading(place.width, seed + index, keeps_ones=place.keeps_ones),))
        for index, place in enumerate(places)
    )


@dataclass(frozen=True)
class Rotate(ir.passes.InPlacePass):
    """Rotate streams and values of attentions; weights on both sides take it in, and no node is added.

    γ and β of the norms that read a stream go into the operators behind them. Weights that several read are stored once
    for each that reads them rotated; how much larger that makes the model is a note.

    Parameters
    ----------
    rotations : tuple of Rotation
    refused : tuple of Refusal
        Places that were not chosen, to be reported with the rest.
    """

    rotations: tuple[Rotation, ...] = ()
    refused: tuple[Refusal, ...] = ()
    effect: ClassVar[Effect] = Effect.CLOSE

    def requires(self, model: ir.Model) -> None:
        """Refuse rotations of another graph."""
        known = {node.name for node in model.graph}
        if missing := sorted({rotation.place.node for rotation in self.rotations} - known):
            raise ir.passes.PreconditionError(f"a rotation names node '{missing[0]}', which the graph does not have")

    def call(self, model: ir.Model) -> Rewritten:
        """Rewrite in place; places that are not what they were are refusals."""
        if not self.rotations:
            return Rewritten(model, False, self.refused)
        found, before, refusals = rotatable(model.graph), _stored(model.graph), list[Refusal]()
        sites: dict[Place, StreamSite | ValueSite] = {site.place: site for site in found.streams}
        sites |= {site.place: site for site in found.values}
        for rotation in self.rotations:
            site = sites.get(rotation.place)
            if isinstance(site, StreamSite):
                _rotate_stream(site, rotation)
            elif isinstance(site, ValueSite):
                _rotate_values(site, rotation)
            else:
                refusals.append(_missing(rotation.place, found))
        remove_unused(model)
        notes = _untied(before, _stored(model.graph))
        return Rewritten(model, len(refusals) < len(self.rotations), (*self.refused, *refusals), notes)


def _missing(place: Place, found: Rotatable) -> Refusal:
    for refusal in found.refusals:
        if refusal.node == place.node:
            return refusal
    return Refusal(place.node, f"no {place.site} of {place.width} channels that can be rotated is here")


def _rotate_stream(site: StreamSite, rotation: Rotation) -> None:
    r = rotation.of(0)
    for behind in site.norms:
        # What a reader got was n · γ of the norm's quotient n; now it gets n R.
        inverse = r.T * _absorb(behind, r)
        for node in behind.readers:
            multiply_inputs(node, inverse)
    for reader in site.segment.readers:
        if isinstance(reader, ir.Node):
            multiply_inputs(reader, r.T)
    for node in site.written_by:
        multiply_outputs(node, r)
    for node, index, axis in site.constants:
        multiply_constant(node, index, axis, r)


def _absorb(behind: NormReaders, r: Matrix) -> npt.NDArray[np.float64]:
    """Take γ and β out of a norm; return γ, which its readers are to take in.

    β goes into their biases. Where one has none, the norm adds (β / γ) R instead: rotated back and times γ that is β.
    """
    norm = behind.norm
    gamma = np.ones(len(r)) if norm.gamma is None else _vector(norm.gamma)
    if norm.beta is not None:
        beta, left = _vector(norm.beta), np.zeros(len(r))
        if behind.absorbs:
            for node in behind.readers:
                projection = projection_at(node)
                assert projection is not None
                add_shift(node, projection.bias, response(node, beta))
        else:
            left = np.divide(beta, gamma, out=left, where=beta != 0) @ r
        _set(norm, norm.beta, left)
    if norm.gamma is not None:
        _set(norm, norm.gamma, np.ones(len(r)))
    return gamma


def _vector(value: ir.Value) -> npt.NDArray[np.float64]:
    array = constant(value)
    assert array is not None
    return array.reshape(-1).astype(np.float64)


def _set(norm: Norm, parameter: ir.Value, numbers: npt.NDArray[np.float64]) -> None:
    """Give a norm another γ or β, others that read the old one keep it.

    A Mul by ones and an Add of zeros stay: runtimes make one kernel of a norm of several nodes only with these.
    """
    for node in norm.nodes:
        if parameter in node.inputs:
            old = constant(parameter)
            assert old is not None and isinstance(node.graph, ir.Graph)
            new = add_constant(node.graph, f"{parameter.name}_rotated", numbers.reshape(old.shape).astype(old.dtype))
            node.replace_input_with(node.inputs.index(parameter), new)


def _rotate_values(site: ValueSite, rotation: Rotation) -> None:
    value, output = site.attention.value.projection, site.attention.output
    assert value is not None and output is not None
    inward, outward = np.eye(value.width), np.eye(sum(rows.size for rows in site.rows))
    for head, (columns, rows) in enumerate(zip(site.columns, site.rows, strict=True)):
        r = rotation.of(head)
        inward[np.ix_(columns, columns)] = r
        for row in rows:
            outward[np.ix_(row, row)] = r.T
    multiply_outputs(value.node, inward)
    if value.bias is not None:
        index = next(i for i, x in enumerate(value.bias.inputs) if constant_tensor(x) is not None)
        multiply_constant(value.bias, index, value.axis, inward)
    multiply_inputs(output.node, outward)


def _stored(graph: ir.Graph) -> dict[str, tuple[int, int]]:
    """Return the bytes of each constant, and how many read it."""
    found = {}
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None:
            found[name_of(value)] = tensor.nbytes, len(value.uses())
    return found


def _untied(before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """Return a note if the model has grown, naming what was stored once for several readers."""
    growth = sum(size for size, _ in after.values()) - sum(size for size, _ in before.values())
    shared = [(size, name) for name, (size, uses) in before.items() if uses > 1 and after.get(name, (0, 0))[1] < uses]
    if not shared or growth < max(shared)[0] / 2:
        return ()
    name = max(shared)[1]
    return (f"rotation makes the float model {growth / 2**20:.1f} MB larger: the readers of '{name}' share it no more",)
