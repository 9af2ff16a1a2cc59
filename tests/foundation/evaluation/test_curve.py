"""The learning curve's rows: the scores' own numbers, put beside each other."""

import csv
import json

import pytest

from foundation.evaluation.curve import curve_rows, print_curve, write_curve
from foundation.evaluation.score import Scores, merge_scores
from tests.planted_scores import planted_scores

N_TRAIN = {1: 160, 3: 431}


@pytest.fixture(scope="module")
def points() -> list[tuple[int, Scores]]:
    """Two points of a curve, the later one first."""
    return [
        (3, planted_scores({"manybrains": 0.5, "ridge": 1.0})),
        (1, planted_scores({"manybrains": 1.0, "ridge": 2.0})),
    ]


def test_a_row_stands_for_each_number_of_sessions_and_system_in_their_order(points):
    rows = curve_rows(points, n_train=N_TRAIN)
    places = [(row.sessions, row.n_train, row.system) for row in rows]
    systems = ("manybrains", "ridge", "ceiling")
    assert places == [(n, N_TRAIN[n], system) for n in (1, 3) for system in systems]


def test_values_and_paired_differences_are_those_of_the_scores(points):
    (of_one,) = [scores for n, scores in points if n == 1]
    found = {row.system: row for row in curve_rows(points) if row.sessions == 1}
    key = ("all", "voxel", "mean", "r")
    for row in of_one.rows:
        if (row.roi, row.axis, row.target, row.metric) == key and row.system in found:
            mine = found[row.system]
            assert (mine.value, mine.low, mine.high) == (row.value, row.low, row.high)
    (paired,) = [
        c
        for c in of_one.comparisons
        if (c.roi, c.axis, c.target, c.metric, c.system, c.versus) == (*key, "manybrains", "ridge")
    ]
    ours = found["manybrains"]
    assert (ours.difference, ours.difference_low, ours.difference_high) == (paired.difference, paired.low, paired.high)
    assert paired.low is not None
    assert found["ridge"].difference is None
    assert found["ceiling"].difference is None


def test_subjects_stand_one_after_the_other():
    both = merge_scores(planted_scores({"ridge": 1.0}, subject=name) for name in ("subj07", "subj05"))
    rows = curve_rows([(1, both), (2, both)])
    assert [(row.subject, row.sessions) for row in rows if row.system == "ridge"] == [
        ("subj05", 1),
        ("subj05", 2),
        ("subj07", 1),
        ("subj07", 2),
    ]


def test_no_point_or_the_same_sessions_twice_are_refused(points):
    with pytest.raises(ValueError, match=r"needs points of different numbers of sessions, got \[\]"):
        curve_rows([])
    with pytest.raises(ValueError, match=r"got \[3, 3\]"):
        curve_rows([points[0], points[0]])


def test_json_and_csv_hold_the_same_rows(points, tmp_path):
    rows = curve_rows(points)
    for name in ("curve.json", "curve.csv"):
        write_curve(rows, tmp_path / name)
    in_json = json.loads((tmp_path / "curve.json").read_text())
    with (tmp_path / "curve.csv").open() as file:
        in_csv = list(csv.DictReader(file))
    assert len(in_json) == len(rows)
    assert in_csv == [{key: "" if v is None else str(v) for key, v in row.items()} for row in in_json]
    assert in_json[0]["n_train"] is None
    with pytest.raises(ValueError, match=r"as .json or .csv, not as 'curve.xlsx'"):
        write_curve(rows, tmp_path / "curve.xlsx")


def test_the_table_prints_each_point_once_and_gains_with_their_sign(points, capsys):
    print_curve(curve_rows(points, n_train=N_TRAIN))
    lines = capsys.readouterr().out.splitlines()
    assert sum("160" in line for line in lines) == 1
    (ours,) = [line for line in lines if "manybrains" in line and "431" in line]
    assert ours.count("+0.") == 3
    assert sum("gain over ridge" in line for line in lines) == 1
