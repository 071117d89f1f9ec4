"""The fewest bytes that an arena can have, by a program in integers: for each pair, which of the two lies above."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse
from scipy.optimize import Bounds, LinearConstraint

from qcompile.passes.highs import milp

if TYPE_CHECKING:
    from qcompile.backends.integer.memory import Layout

#: Pairs beyond which it is not tried, and nodes of its search after which it gives up: a second or two.
MOST_PAIRS, MOST_NODES = 600, 500


def exact_offsets(layout: Layout, placed: Mapping[str, int], extent: int) -> tuple[dict[str, int], bool]:
    """Return offsets that take the fewest bytes, and whether that is proven.

    Minimize H over offsets o ≥ 0 with o_i + size_i ≤ H, and for each pair that lives at one time either
    o_j ≥ o_i + gap_ij or o_i ≥ o_j + gap_ji.

    Parameters
    ----------
    layout : Layout
    placed : mapping of str to int
        Offsets that are known to fit.
    extent : int
        The bytes that these take.
    """
    names, pairs = list(layout.buffers), list(layout.graph.edges)
    if len(pairs) > MOST_PAIRS:
        return dict(placed), False
    place = {name: index for index, name in enumerate(names)}
    last, count = len(names) + len(pairs), len(names) + len(pairs) + 1
    rows: list[dict[int, float]] = [{last: 1.0, place[name]: -1.0} for name in names]
    least = [float(layout.buffers[name].size) for name in names]
    for index, (one, other) in enumerate(pairs):
        choice = len(names) + index
        # No offset is beyond the extent, so twice that lifts a condition.
        rows.append({place[other]: 1.0, place[one]: -1.0, choice: 2.0 * extent})
        rows.append({place[one]: 1.0, place[other]: -1.0, choice: -2.0 * extent})
        least += [layout.gaps[one, other], layout.gaps[other, one] - 2.0 * extent]
    entries = [(row, column, number) for row, terms in enumerate(rows) for column, number in terms.items()]
    where, columns, numbers = zip(*entries, strict=True)
    matrix = scipy.sparse.csr_array((numbers, (where, columns)), shape=(len(rows), count))
    upper = np.full(count, float(extent))
    upper[len(names) : last] = 1.0
    integral, lower = np.zeros(count), np.zeros(count)
    lower[last] = layout.bound()[0]
    integral[len(names) : last] = 1.0
    found = milp(
        np.eye(count)[last], constraints=LinearConstraint(matrix, np.array(least), np.inf), integrality=integral,
        bounds=Bounds(lower, upper), options={"node_limit": MOST_NODES},
    )  # fmt: skip
    proven = bool(found.status == 0)
    if found.x is None or round(found.x[last]) >= extent:
        return dict(placed), proven
    offsets = {name: round(found.x[place[name]]) for name in names}
    # What the solver holds to a tolerance must hold to the byte.
    return (offsets, proven) if layout.holds(offsets) else (dict(placed), False)
