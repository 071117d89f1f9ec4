"""What the page of observers makes of errors: views of one picture are one, and the best is that of hindsight."""

from __future__ import annotations

import numpy as np
import observers
import pytest

from qcompile.calib.output_error import OutputError


def error_of(decibels):
    """Samples of unit signal with so much SQNR each."""
    return OutputError({"y": [1.0] * len(decibels)}, {"y": [float(10.0 ** (-of / 10.0)) for of in decibels]})


def test_without_views_every_sample_counts():
    assert observers.by_original("resnet8", error_of([10.0, 20.0, 30.0])) == pytest.approx([10, 20, 30], abs=0.01)


def test_views_that_follow_one_another_are_one(monkeypatch):
    monkeypatch.setattr(observers, "VIEWS", {"net": 2})
    assert observers.by_original("net", error_of([10.0, 20.0, 30.0, 50.0])) == pytest.approx([15, 40], abs=0.01)


def test_views_of_pictures_in_turn_are_one(monkeypatch):
    monkeypatch.setattr(observers, "IN_TURN", {"net": 2})
    assert observers.by_original("net", error_of([10.0, 20.0, 30.0, 50.0])) == pytest.approx([20, 35], abs=0.01)


def test_a_row_has_the_gain_over_the_best_and_its_uncertainty_by_originals(monkeypatch):
    monkeypatch.setattr(observers, "VIEWS", {"net": 2})
    # Views of one picture differ alike: as samples they would halve a variance that they know nothing of.
    auto, best, worse = (error_of([20.0 + of for of in parts]) for parts in ((1, 1, 3, 3), (0, 0, 0, 0), (-5,) * 4))
    cells = observers.row("net", [[auto], [worse], [best]]).split(" | ")
    assert cells[:5] == ["| net", "4 x 1", "22.0", "15.0", "20.0"]
    assert cells[5] == "+2.0 ± 1.0"


def test_uncertainty_has_what_runs_differ_by():
    runs, over = ([error_of([at] * 4) for at in levels] for levels in ((20.0, 22.0), (20.0, 20.0)))
    better, uncertain = observers.gained("net", runs, over)
    # Samples are all alike, so that runs make all of it: 0 and 2 dB, by as many of them the root.
    assert uncertain == pytest.approx(1.0, abs=0.01)
    # Noise is averaged, not decibels: 20 and 22 dB are 20.9 together.
    assert better == pytest.approx(20.0 - 10.0 * np.log10((1.0 + 10.0**-0.2) / 2.0) - 20.0, abs=0.01)


def test_rows_that_stand_on_the_page_are_found_by_model(tmp_path, monkeypatch):
    page, head = tmp_path / "page.md", "\n\n| model | a |\n|---|---|\n"
    monkeypatch.setattr(observers, "PAGE", page)
    assert observers.standing() == {}
    page.write_text(f"# Page{head}| rule | 0 |\n\n{observers.TABLE}{head}| net | 1 |\n\n## Two{head}| other | 2 |\n")
    assert observers.standing() == {"net": "| net | 1 |"}


def test_hindsight_loses_nothing_where_one_is_always_best():
    assert observers.lost_in_hindsight([np.full(4, 30.0), np.full(4, 20.0)]) == 0.0


def test_hindsight_loses_what_its_choice_on_one_half_lacks_on_the_other():
    # The first is best on every second original, by 2 dB; the second on the others, by 4.
    assert observers.lost_in_hindsight([np.array([12.0, 6.0]), np.array([10.0, 10.0])]) == pytest.approx(-3.0)
