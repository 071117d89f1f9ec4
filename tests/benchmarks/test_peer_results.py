"""What follows from figures: verdicts, and the page that shows them."""

from __future__ import annotations

import peer_page
import peer_plot
import peers
import pytest
from peer_results import OURS, Result, Row, judge


def result_of(*rows, float_ms=1.0):
    return Result("net", "a machine", ("tool 1.0",), float_ms, 4096, 8, 4, 10, rows)


def ours(sqnr=30.0, latency=0.5):
    return Row(OURS, "default", sqnr=sqnr, latency=latency, size=1024, seconds=2.0)


def row(setting="a", sqnr=31.0, latency=0.4, **more):
    return Row("tool", setting, sqnr=sqnr, latency=latency, size=2048, **more)


def test_a_setting_that_is_both_faster_and_more_faithful_ends_it():
    verdict = judge(result_of(ours(), row("a"), row("b", sqnr=29.0)))
    assert not verdict.holds and [found.setting for found in verdict.better] == ["a"]


@pytest.mark.parametrize(
    ("sqnr", "latency", "better"),
    [(30.31, 0.484, True), (30.29, 0.484, False), (30.31, 0.486, False), (None, 0.484, True), (40.0, 0.6, False)],
)
def test_both_must_be_more_than_noise(sqnr, latency, better):
    assert judge(result_of(ours(), row(sqnr=sqnr, latency=latency))).holds != better


def test_nothing_is_more_faithful_than_exact():
    assert judge(result_of(ours(sqnr=None), row(sqnr=None), row(sqnr=200.0))).holds


@pytest.mark.parametrize(("latency", "holds"), [(1.0, True), (1.03, True), (1.04, False)])
def test_a_default_that_float_is_faster_than_does_not_hold(latency, holds):
    verdict = judge(result_of(ours(latency=latency)))
    assert verdict.holds == holds and verdict.slower != holds


def test_a_setting_that_failed_is_never_better():
    assert judge(result_of(ours(), Row("tool", "a", failure="crashed"))).holds


def test_a_default_that_failed_does_not_hold():
    verdict = judge(result_of(Row(OURS, "default", failure="refused"), row()))
    assert not verdict.holds and verdict.failure == "refused"
    assert "| net | refused | no |" in peer_page.page([result_of(Row(OURS, "default", failure="refused"))])


def test_figures_survive_the_disk(tmp_path):
    result = result_of(ours(sqnr=None), row(agreement=0.5), Row("tool", "b", failure="crashed", seconds=1.0))
    result.save(tmp_path / "net.json")
    assert Result.load(tmp_path / "net.json") == result


def table_of(result):
    lines = peer_page.section(result).splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")][1:]


def test_the_table_goes_from_fast_to_slow_and_then_to_what_failed():
    failed = Row("tool", "c", failure="ValueError: a | b\nat c", seconds=7.4)
    rows = table_of(result_of(ours(), failed, row("a", latency=2.0), row("b", agreement=0.984)))
    assert [line[0] for line in rows] == ["3", "★", "2", "1"]
    assert rows[0] == ["3", "tool: b", "31.0", "98%", "0.40x", "0.50x", "0"]
    assert rows[1] == ["★", f"**{OURS}: default**", "30.0", "", "0.50x", "0.25x", "2"]
    assert rows[3] == ["1", "tool: c", "fails: ValueError: a / b at c", "", "", "", "7"]


def test_exact_rows_say_so():
    [_, line] = table_of(result_of(ours(latency=0.1), row(sqnr=None)))
    assert line[1:3] == ["tool: a", "exact"]


def test_the_page_names_what_is_better():
    page = peer_page.page([result_of(ours(), row("a"), row("b"))])
    assert "| [net](#net) | 30.0, 0.50x | no | tool: a; tool: b |" in page
    slow = result_of(ours(latency=2.0))
    assert "no: slower than float" in peer_page.verdict_row(slow, judge(slow))


def test_the_terminal_gets_the_same_verdict():
    result = result_of(ours(), row("a"), row("b", sqnr=29.0))
    expected = "30.0 dB at 0.50x of float: does not hold; better: tool: a (31.0 dB, 0.40x)"
    assert peer_page.sentence(result, judge(result)) == expected


def test_latency_is_the_median_of_the_ratios_within_rounds():
    assert peers.latency([1.0, 20.0, 3.0], [2.0, 10.0, 4.0]) == 0.75


def test_a_row_that_failed_has_no_ratio():
    with pytest.raises(ValueError, match="not measured"):
        _ = Row("tool", "a", failure="crashed").ratio


def test_what_leaves_the_plot_stands_at_its_edge_with_its_figure():
    rows = [ours(), row("a", sqnr=None), row("b", sqnr=-4.0, latency=6.25), row("c", latency=2.0)]
    result = result_of(*rows)
    assert [peer_plot.height(found, rows) for found in rows] == [30.0, 36.0, 0.0, 31.0]
    assert [peer_plot.place(found) for found in rows] == [0.5, 0.4, peer_plot.SLOWEST, 2.0]
    assert [peer_plot.name(result, found) for found in rows] == ["", "1", "2: 6.2x", "3"]


def test_the_committed_page_is_that_of_the_committed_figures(root):
    results = [Result.load(path) for name in peers.MODELS if (path := root / f"docs/peers/{name}.json").exists()]
    assert results, "python benchmarks/peers.py writes them"
    assert (root / "docs/peers.md").read_text(encoding="utf-8") == peer_page.page(results)
