"""The command: a page with every section that the runs allow, and one clear line where something is wrong."""

import re
import shutil
from pathlib import Path

import pytest

from foundation import report as entry
from foundation.report import Report, report
from foundation.tracking.runs import TrackedRun
from foundation.tracking.scores import log_curve, log_scores
from tests.planted_scores import planted_scores
from tests.tiny_store import make_tiny_store, tiny_recipe
from tests.tiny_trained import train_tiny

ALWAYS = ["summary", "scores", "differences", "families", "voxels", "calibration", "images", "maps"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a model that was trained on the tiny store."""
    directory = tmp_path_factory.mktemp("report")
    make_tiny_store(directory / "tiny.zarr")
    return train_tiny(tiny_recipe(directory / "tiny.zarr", epochs=1), directory) / "final"


@pytest.fixture(scope="module")
def written(trained: Path, session_home: Path) -> tuple[str, Path]:
    """A report's page and its PNG files."""
    directory = trained.parent / "report"
    directory.mkdir()
    run = TrackedRun.start("curve-of-another", kind="curve", config={}, tags={})
    log_curve(run, [(1, planted_scores({"manybrains": 1.0, "ridge": 1.2}))])
    run.finish()
    report(
        Report(
            runs=(str(trained), "curve-of-another"), out=directory / "report.html", png=directory / "png", bootstraps=50
        )
    )
    return (directory / "report.html").read_text(), directory / "png"


def sections(html: str) -> list[str]:
    return re.findall(r'<section id="(\w+)"', html)


def test_every_section_that_there_are_numbers_for_is_written_in_order(written):
    expected = [*ALWAYS]
    expected.insert(expected.index("calibration"), "curves")
    assert sections(written[0]) == expected


def test_every_picture_is_data_with_an_alternative_text(written):
    pictures = re.findall(r"<img [^>]*>", written[0])
    assert len(pictures) > 20
    for picture in pictures:
        assert 'src="data:image/' in picture
        assert len(re.findall(r'alt="([^"]*)"', picture)[0]) > 20


def test_the_figures_are_png_files_too(written):
    names = {path.stem for path in written[1].iterdir()}
    assert {"bars-subj01", "voxels-subj02", "calibration-subj05", "image-subj01-best", "map-subj02-highest"} <= names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1].iterdir())


def test_each_system_is_judged_beside_the_baseline_subject_by_subject(written):
    assert re.search(r"tiny-run/final is above ridge on \d of 3 subjects", written[0])


def test_a_store_without_pictures_says_so(written):
    assert "the store was made without pixels" in written[0]


def test_a_report_replaces_the_one_that_was_there_whole(trained, tmp_path):
    out = tmp_path / "report.html"
    out.write_text("the old one")
    report(Report(runs=("ridge",), out=out, store=str(trained.parents[2] / "tiny.zarr"), subjects=("1",), bootstraps=0))
    assert out.read_text().startswith("<!DOCTYPE html>")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert "calibration" not in sections(out.read_text())  # ridge draws no samples


def test_what_could_not_be_checked_of_the_comparison_stands_in_the_page(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("foundation.line_up.check_images", lambda *_, **__: "not checked: its store is gone")
    out = tmp_path / "report.html"
    report(Report(runs=(str(trained),), out=out, subjects=("1",), samples=0, bootstraps=0))
    assert "tiny-run/final was trained on test images of subj01 is not checked: its store is gone" in out.read_text()


def test_a_name_with_markup_in_it_comes_out_inert(trained, tmp_path):
    named = tmp_path / "<script>alert(1)" / "final"
    shutil.copytree(trained, named)
    out = tmp_path / "report.html"
    title = "</title><script>alert(2)</script>"
    report(Report(runs=(str(named),), out=out, subjects=("1",), title=title, samples=0, bootstraps=0))
    assert "<script" not in out.read_text().lower()
    assert "&lt;script&gt;alert(1)/final is above ridge" in out.read_text()


def test_a_comparison_shows_its_networks_and_scores_its_baselines_anew(trained, tmp_path):
    store = str(trained.parents[2] / "tiny.zarr")
    run = TrackedRun.start("compared", kind="comparison", config={}, tags={"store": store, "subjects": "subj05"})
    log_scores(run, planted_scores({"gru": 1.0, "ridge": 1.2}), system="gru")
    report(Report(runs=("compared",), out=tmp_path / "r.html", bootstraps=0))
    html = (tmp_path / "r.html").read_text()
    assert sections(html)[:3] == ["summary", "scores", "compared"]
    assert re.search(r'<th scope="row">gru</th><td>\.\d{3} \[', html)
    assert "subj05 (12 voxels, 8 test images)" in html


def test_a_system_of_an_evaluation_is_scored_where_no_other_is_named(trained, tmp_path, home):
    run = TrackedRun.start("evaluated", kind="evaluation", config={}, tags={"models": "cls-probe ridge"})
    run.finish()
    store = str(trained.parents[2] / "tiny.zarr")
    report(Report(runs=("evaluated",), out=tmp_path / "r.html", store=store, subjects=("5",), bootstraps=0))
    assert (
        "cls-probe is above ridge on 0 of 1 subjects; no interval could be made on subj05"
        in (tmp_path / "r.html").read_text()
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"runs": ()}, "name what to report on"),
        (
            {"out": Path("nowhere/report.html")},
            "there is no directory .*nowhere for nowhere/report.html; make it first",
        ),
        ({"out": Path(".")}, "is a directory; name a file"),
        ({"png": Path("nowhere/png")}, "there is no directory .*nowhere for nowhere/png"),
        ({"png": Path("file")}, "--png file is a file; name a directory"),
        ({"samples": -1}, "--samples -1 must be at least 0"),
    ],
    ids=["no run", "no directory", "a directory", "no place for pictures", "a file", "negative"],
)
def test_bad_options_are_told_before_anything_is_loaded(tmp_path, monkeypatch, options, told):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(ValueError, match=told):
        report(Report(**{"runs": ("ridge",), "out": Path("report.html"), **options}))


def test_an_unknown_run_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="'nobody' is no run in"):
        report(Report(runs=("nobody",), out=tmp_path / "report.html"))


def test_help_names_every_option(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["report", "--help"])
    with pytest.raises(SystemExit):
        entry.main()
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--out", "--png", "--title", "--baselines", "--no-pictures"))
