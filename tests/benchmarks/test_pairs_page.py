"""What the page of pairs makes of what was measured."""

from __future__ import annotations

import json

import pairs


def row(predicted, paired):
    return pairs.Row(predicted, paired, predicted, paired, (0.0, 0.0), (0.0, 0.0))


def test_a_row_ranks_predictions_by_both_kinds_of_samples_and_these_by_one_another():
    rows = [row(1.0, 1.0), row(2.0, 3.0), row(3.0, 2.0)]
    measured = [(5.0, 5.0), (6.0, 7.0), (7.0, 6.0)]
    assert pairs.ranks("net", rows, measured, pairs.ARTIFACTS) == "| net | 1.00 | 0.50 | 0.50 | 1.00 | 0.50 |"


def test_artifacts_that_were_measured_are_read_again(tmp_path):
    (tmp_path / f"net-by-sample-{pairs.REPEATS}.json").write_text(json.dumps([[1.0, 2.0]]))
    assert pairs.by_sample("net", None, tmp_path) == [(1.0, 2.0)]
