"""The table carries its protocol and fits; the JSON file is whole or absent."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from foundation.evaluation.score import Measured, Scores, merge_scores, score
from foundation.evaluation.table import WIDTH, print_scores, sampling_table, score_table, write_rows_json


def scores(*, subject="subj01", protocol="strict", labels=True, names=("ridge", "manybrains"), n_samples=0) -> Scores:
    rng = np.random.default_rng(0)
    n_images, n_voxels = 30, 24
    signal = rng.standard_normal((n_images, n_voxels)).astype(np.float32)
    image = np.repeat(np.arange(n_images), 2)
    trials = signal[image] + 2 * rng.standard_normal((60, n_voxels)).astype(np.float32)
    masks = {name: np.arange(n_voxels) % 3 == i for i, name in enumerate(("early", "mid", "higher"))}
    measured = Measured(
        subject,
        trials,
        image,
        np.full(n_voxels, 0.4),
        families=masks if labels else {},
        notes=("upstream_preprocessing: averaged [and more]",),
        normalisation="session-standardised",
    )
    predictions = {name: signal + i + 1 for i, name in enumerate(names)}
    noise = np.random.default_rng(1).standard_normal((n_samples, n_images, n_voxels))
    samples = {"manybrains": signal + 2 * noise} if n_samples else None
    mean = np.zeros(n_voxels)
    return score(
        predictions, measured, training_mean=mean, n_bootstraps=50, rng=rng, protocol=protocol, samples=samples
    )


def lines(table, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table)
    return console.file.getvalue().splitlines()


def test_the_table_carries_axis_target_normalisation_floors_ceiling_and_protocol():
    text = "\n".join(lines(score_table(scores()), WIDTH))
    for word in ("voxel r", "pattern r", "MSE", "r²/c", "Δr ridge", "ΔMSE zero", "ΔMSE mean", "(trial)", "higher"):
        assert word in text
    for word in ("protocol strict", "session-standardised", "Floors:", "ceiling", "averaged [and more]", "95 %"):
        assert word in text


@pytest.mark.parametrize("several", [False, True])
def test_the_table_keeps_each_row_on_one_line_at_its_width(several):
    made = merge_scores([scores(), scores(subject="subj02")]) if several else scores()
    table = score_table(made)
    printed = lines(table, WIDTH)
    assert max(map(len, printed)) <= WIDTH
    assert sum(" ceiling " in line and "." in line for line in printed if line.startswith("  ")) >= 4 * len(
        {row.subject for row in made.rows}
    )
    assert "…" not in "\n".join(printed)
    assert {r.subject for r in made.rows} <= set(" ".join(printed).replace(",", " ").split())


def test_rois_without_labels_are_in_the_caption_not_in_the_rows():
    printed = lines(score_table(scores(labels=False)), 120)
    assert any("roi early: n/a, no labels" in line for line in printed)
    assert not any("early" in line.split()[:2] for line in printed)


def test_the_legacy_protocol_warns_and_protocols_do_not_mix():
    legacy = scores(protocol="chasm-legacy")
    assert "WARNING" in "\n".join(lines(score_table(legacy), 120))
    with pytest.raises(ValueError, match="make one table of each"):
        score_table(merge_scores([legacy, scores()]))


def test_without_the_reference_there_is_no_column_for_it():
    assert "Δr" not in "\n".join(lines(score_table(scores(names=("manybrains",))), 120)).split("Protocol:")[0]


def test_samples_have_a_table_of_their_own_beside_the_floors():
    table = sampling_table(scores(n_samples=20))
    assert table is not None
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["ROI"] == ["all", "", "", "early", "", "", "mid", "", "", "higher", "", ""]
    assert cells["system"] == ["zero", "mean", "manybrains"] * 4
    assert set(cells["target"]) == {"trial"}
    assert [cell == "n/a" for cell in cells["coverage 90 %"]] == [True, True, False] * 4
    assert all("[" in str(cell) for cell in cells["CRPS"])
    printed = lines(table, WIDTH)
    assert max(map(len, printed)) <= WIDTH
    for word in ("protocol strict", "[ ]: 95 %", "absolute error"):
        assert word in " ".join(" ".join(printed).split())


def test_samples_leave_the_score_table_and_without_them_there_is_one_table(capsys):
    plain, sampled = scores(), scores(n_samples=20)
    assert sampling_table(plain) is None
    assert [list(c.cells) for c in score_table(plain).columns] == [list(c.cells) for c in score_table(sampled).columns]
    print_scores(plain)
    assert "CRPS" not in capsys.readouterr().out
    print_scores(sampled)
    printed = capsys.readouterr().out
    assert printed.index("voxel r") < printed.index("CRPS")
    assert "samples of manybrains: T = 20" in printed


def test_the_json_file_holds_the_rows_with_null(tmp_path):
    made = scores()
    path = tmp_path / "rows.json"
    path.write_text("old")
    write_rows_json(made.rows, path)
    assert json.loads(path.read_text()) == [row.to_json() for row in made.rows]
    assert "null" in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_rows_json([replace(scores().rows[0], value=float("nan"))], path)
    assert path.read_text() == "old"


def test_a_note_that_subjects_share_stands_once():
    made = merge_scores([scores(), scores(subject="subj02")])
    text = " ".join(" ".join(lines(score_table(made), WIDTH)).split())
    assert "subj01, subj02: normalisation: session-standardised" in text
    assert text.count("session-standardised") == 1
