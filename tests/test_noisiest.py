"""What is spared where nothing tells what integers are worth."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qcompile.latency_budget import noisiest


def test_the_worst_goes_first_and_no_more_than_it_takes() -> None:
    alone = {"a": 0.001, "b": 0.3, "c": 0.05}
    assert noisiest(alone, 0.4, 0.1) == ["b"]
    assert noisiest(alone, 0.4, 0.01) == ["b", "c"]
    assert noisiest(alone, 0.005, 0.01) == [] == noisiest({}, 0.4, 0.01)


@given(st.dictionaries(st.text(min_size=1), st.floats(0, 10), max_size=8), st.floats(0, 10), st.floats(1e-4, 1))
def test_what_is_left_is_within_the_bound(alone: dict[str, float], noise: float, bound: float) -> None:
    found, total = noisiest(alone, noise, bound), sum(alone.values())
    left = noise - sum(noise * alone[name] / total for name in found) if total else noise
    assert len(set(found)) == len(found) and set(found) <= set(alone)
    assert left <= bound + 1e-6 or total == 0.0
    if noise <= bound:
        assert not found
