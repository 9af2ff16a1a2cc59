"""The score table against simulated truth, direct computation and the protocol's demands."""

import json
from dataclasses import fields, replace

import jaxtyping
import numpy as np
import pytest

from data.noise_ceiling import ncsnr, noise_ceiling
from foundation.evaluation.metrics import mse, patternwise_r, voxelwise_r
from foundation.evaluation.sampling import coverage, crps, energy_score
from foundation.evaluation.score import Measured, Row, Scores, merge_scores, score
from foundation.evaluation.statistics import paired_wilcoxon


def world(*, n_images=60, n_voxels=90, n_repeats=3, seed=0, snr=0.6, **given) -> tuple[Measured, np.ndarray]:
    """A subject measured with known signal: unequal repeats, shuffled in time."""
    rng = np.random.default_rng(seed)
    repeats = np.maximum(1, n_repeats - (np.arange(n_images) % 5 == 0))
    image = rng.permutation(np.repeat(np.arange(n_images), repeats))
    signal = (snr * rng.standard_normal((n_images, n_voxels))).astype(np.float32)
    trials = (signal[image] + rng.standard_normal((len(image), n_voxels))).astype(np.float32)
    options = {
        "ceiling": noise_ceiling(ncsnr(trials, image), repeats),
        "families": {name: np.arange(n_voxels) % 3 == i for i, name in enumerate(("early", "mid", "higher"))},
        "normalisation": "session-standardised",
    } | given
    return Measured("subj01", trials, image, **options), signal


def run(predictions, measured, *, n_bootstraps=100, seed=0, **options) -> Scores:
    options = {"training_mean": np.linspace(-0.1, 0.1, measured.n_voxels)} | options
    return score(predictions, measured, n_bootstraps=n_bootstraps, rng=np.random.default_rng(seed), **options)


def row(scores: Scores, system: str, axis: str, target: str, metric: str, roi: str = "all") -> Row:
    (found,) = [
        r for r in scores.rows if (r.system, r.axis, r.target, r.metric, r.roi) == (system, axis, target, metric, roi)
    ]
    return found


def noisy(signal: np.ndarray, seed: int, noise: float = 0.5) -> np.ndarray:
    return (signal + noise * np.random.default_rng(seed).standard_normal(signal.shape)).astype(np.float32)


def test_rows_are_exactly_the_contract():
    contract = "system, subject, roi, protocol, axis, target, metric, value, low, high, n_images, n_voxels"
    assert [f.name for f in fields(Row)] == contract.split(", ")
    measured, signal = world()
    scores = run({"ridge": noisy(signal, 1)}, measured)
    keys = [(r.system, r.roi, r.axis, r.target, r.metric) for r in scores.rows]
    assert len(set(keys)) == len(keys) == 4 * 4 * 2 * 7
    assert {r.protocol for r in scores.rows} == {"strict"}


@pytest.mark.parametrize("roi", ["all", "mid"])
def test_values_are_those_of_the_metrics_on_rows_and_means(roi):
    measured, signal = world()
    x = noisy(signal, 1)
    scores = run({"model": x}, measured)
    inside = measured.families.get(roi, np.ones(measured.n_voxels, dtype=bool))
    means = np.stack([measured.trials[measured.image == i].mean(axis=0) for i in range(measured.n_images)])
    for target, prediction, rows in (("mean", x, means), ("trial", x[measured.image], measured.trials)):
        p, y = prediction[:, inside], rows[:, inside]
        r = voxelwise_r(p, y)
        expected = {
            ("voxel", "r"): r.mean(),
            ("voxel", "r_median"): np.median(r),
            ("voxel", "mse"): mse(p, y),
            ("pattern", "mse"): mse(p, y),
            ("pattern", "r"): patternwise_r(p, y).mean(),
        }
        for (axis, metric), value in expected.items():
            assert row(scores, "model", axis, target, metric, roi).value == pytest.approx(value, rel=1e-5)
        zero = row(scores, "zero", "voxel", target, "mse", roi)
        assert zero.value == pytest.approx(np.mean(y.astype(float) ** 2), rel=1e-5)
        floor = np.broadcast_to(np.linspace(-0.1, 0.1, measured.n_voxels), prediction.shape)[:, inside]
        assert row(scores, "mean", "voxel", target, "mse", roi).value == pytest.approx(mse(floor, y), rel=1e-5)


def test_intervals_hold_their_estimates_and_missing_ones_are_null():
    measured, signal = world()
    scores = run({"model": noisy(signal, 1), "ridge": noisy(signal, 2, 1.0)}, measured)
    for r in scores.rows:
        if r.low is not None and r.high is not None and r.value is not None:
            assert r.low <= r.value <= r.high, r
    assert all(r.low is not None for r in scores.rows if r.system in ("model", "ridge"))
    without = run({"model": noisy(signal, 1)}, measured, n_bootstraps=0)
    assert all(r.low is None and r.high is None for r in without.rows)
    assert row(without, "model", "voxel", "mean", "r") == replace(
        row(scores, "model", "voxel", "mean", "r"), low=None, high=None
    )


def test_the_ceiling_rows_of_r_are_the_roots_of_the_ceilings():
    measured, signal = world()
    scores = run({"model": noisy(signal, 1)}, measured)
    assert row(scores, "ceiling", "voxel", "mean", "r").value == pytest.approx(np.sqrt(measured.ceiling).mean())
    single = noise_ceiling(ncsnr(measured.trials, measured.image), np.ones(1, dtype=int))
    assert row(scores, "ceiling", "voxel", "trial", "r").value == pytest.approx(np.sqrt(single).mean())


@pytest.mark.parametrize("target", ["mean", "trial"])
def test_the_true_signal_scores_at_the_ceiling(target):
    measured, signal = world(n_images=600, n_voxels=300)
    scores = run({"oracle": signal}, measured, n_bootstraps=20)
    for axis, metric, tolerance in (("voxel", "r", 0.01), ("pattern", "r", 0.01), ("voxel", "mse", 0.01)):
        reached, allowed = (row(scores, s, axis, target, metric).value for s in ("oracle", "ceiling"))
        assert reached == pytest.approx(allowed, abs=tolerance)
    assert row(scores, "oracle", "voxel", target, "r2_ceiling_unclipped").value == pytest.approx(1, abs=0.04)


def test_constants_have_null_correlations_but_an_mse():
    measured, signal = world()
    scores = run({"model": noisy(signal, 1)}, measured)
    for target in ("mean", "trial"):
        for system in ("zero", "mean"):
            for metric in ("r", "r_median", "r2_ceiling", "r2_ceiling_unclipped"):
                assert row(scores, system, "voxel", target, metric).value is None
            assert row(scores, system, "voxel", target, "mse").value is not None
        assert row(scores, "zero", "pattern", target, "r").value is None
        assert row(scores, "mean", "pattern", target, "r").value is not None
    assert any("a constant has no correlation" in note for note in scores.notes)


def test_permuting_voxels_leaves_every_score():
    measured, signal = world()
    x, order = noisy(signal, 1), np.random.default_rng(5).permutation(measured.n_voxels)
    shuffled = Measured(
        "subj01",
        measured.trials[:, order],
        measured.image,
        measured.ceiling[order],
        families={name: mask[order] for name, mask in measured.families.items()},
    )
    mean = np.linspace(-0.1, 0.1, measured.n_voxels)
    one = run({"model": x}, measured)
    other = run({"model": x[:, order]}, shuffled, training_mean=mean[order])
    for a, b in zip(one.rows, other.rows, strict=True):
        assert replace(a, value=None, low=None, high=None) == replace(b, value=None, low=None, high=None)
        for name in ("value", "low", "high"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), abs=1e-5)


def test_differences_use_the_same_resamples_and_are_antisymmetric():
    measured, signal = world()
    x, better = noisy(signal, 1, 1.0), noisy(signal, 2, 0.2)
    scores = run({"ridge": x, "model": better}, measured)
    found = {(c.system, c.versus, c.roi, c.axis, c.target, c.metric): c for c in scores.comparisons}
    for key, c in found.items():
        if key[1] in ("zero", "mean"):
            continue
        mirrored = found[c.versus, c.system, *key[2:]]
        assert (c.difference, c.low, c.high) == pytest.approx((-mirrored.difference, -mirrored.high, -mirrored.low))
        assert c.p_value == pytest.approx(mirrored.p_value)
    c = found["model", "ridge", "all", "voxel", "mean", "r"]
    values = [row(scores, s, "voxel", "mean", "r").value for s in ("model", "ridge")]
    assert c.difference == pytest.approx(values[0] - values[1])
    assert 0 < c.low < c.difference < c.high
    assert ("model", "zero", "all", "voxel", "mean", "r") not in found
    assert found["model", "zero", "all", "voxel", "mean", "mse"].difference < 0
    same = run({"a": x, "b": x}, measured)
    assert {(c.difference, c.p_value) for c in same.comparisons if {c.system, c.versus} == {"a", "b"}} == {(0.0, 1.0)}


def test_paired_p_is_wilcoxons_over_images():
    measured, signal = world()
    a, b = noisy(signal, 1, 0.7), noisy(signal, 2, 0.8)
    scores = run({"a": a, "b": b}, measured)
    (c,) = [
        c
        for c in scores.comparisons
        if (c.system, c.versus, c.roi, c.axis, c.target, c.metric) == ("a", "b", "all", "pattern", "mean", "r")
    ]
    expected = paired_wilcoxon(patternwise_r(a, measured.mean), patternwise_r(b, measured.mean))
    assert c.p_value == pytest.approx(expected)
    assert c.test == "wilcoxon over images"


def test_a_difference_counts_only_voxels_that_both_systems_define():
    measured, signal = world()
    a, b = noisy(signal, 1), noisy(signal, 2)
    b[:, :30] = 0.25
    scores = run({"a": a, "b": b}, measured)
    (c,) = [
        c
        for c in scores.comparisons
        if (c.system, c.versus, c.roi, c.axis, c.target, c.metric) == ("a", "b", "all", "voxel", "mean", "r")
    ]
    y = measured.mean
    expected = np.nanmean(voxelwise_r(a[:, 30:], y[:, 30:])) - np.nanmean(voxelwise_r(b[:, 30:], y[:, 30:]))
    assert c.difference == pytest.approx(expected)
    assert row(scores, "b", "voxel", "mean", "r").n_voxels == measured.n_voxels - 30
    assert row(scores, "a", "voxel", "mean", "r").n_voxels == measured.n_voxels


def test_without_a_ceiling_its_rows_are_null_and_the_reason_is_kept():
    measured, signal = world(n_repeats=1, ceiling=None, ceiling_reason="no image was repeated")
    scores = run({"model": noisy(signal, 1)}, measured)
    for target in ("mean", "trial"):
        for axis, metric in (("voxel", "r"), ("voxel", "mse"), ("pattern", "r")):
            assert row(scores, "ceiling", axis, target, metric).value is None
        assert row(scores, "model", "voxel", target, "r2_ceiling").value is None
        assert row(scores, "model", "voxel", target, "r").value is not None
    assert "subj01: voxel ceiling and r2_ceiling: n/a, no image was repeated" in scores.notes


def test_averaged_responses_have_null_trial_rows_with_the_reason():
    measured, signal = world(n_repeats=1, ceiling=None, ceiling_reason="averaged", trial_reason="averaged upstream")
    scores = run({"model": noisy(signal, 1)}, measured)
    trial = [r for r in scores.rows if r.target == "trial"]
    assert trial
    assert all(r.value is None for r in trial)
    assert not [c for c in scores.comparisons if c.target == "trial"]
    assert row(scores, "model", "voxel", "mean", "r").value is not None
    assert "subj01: target trial: n/a, averaged upstream" in scores.notes


def test_families_without_labels_are_null_rows_with_a_reason():
    measured, signal = world(families={"V1": np.arange(90) < 20, "early": np.zeros(90, dtype=bool)})
    scores = run({"model": noisy(signal, 1)}, measured)
    assert row(scores, "model", "voxel", "mean", "r", "mid").value is None
    assert row(scores, "model", "voxel", "mean", "mse", "early").value is None
    assert row(scores, "model", "voxel", "mean", "r", "V1").n_voxels == 20
    assert "subj01: roi mid: n/a, no labels" in scores.notes


def test_voxels_with_too_low_a_ceiling_are_counted_in_the_notes():
    measured, signal = world()
    ceiling = measured.ceiling.copy()
    ceiling[:7], ceiling[7] = 0.0, np.nan
    scores = run({"model": noisy(signal, 1)}, replace(measured, ceiling=ceiling))
    n_low = 8 + int((ceiling[8:] < 0.01).sum())
    assert row(scores, "model", "voxel", "mean", "r2_ceiling").n_voxels == 90 - n_low
    assert any(f"target mean, roi all: {n_low} of 90 voxels left out" in note for note in scores.notes)


# -- samples -----------------------------------------------------------------------------------------------------------


def draws(signal: np.ndarray, m: int, *, sd: float = 1.0, seed: int = 9) -> np.ndarray:
    return (signal + sd * np.random.default_rng(seed).standard_normal((m, *signal.shape))).astype(np.float32)


def test_samples_add_rows_and_leave_the_others():
    measured, signal = world()
    systems = {"model": signal, "ridge": noisy(signal, 1)}
    plain, sampled = run(systems, measured), run(systems, measured, samples={"model": draws(signal, 20)})
    assert sampled.rows[: len(plain.rows)] == plain.rows
    assert sampled.comparisons == plain.comparisons
    keys = [(r.system, r.roi, r.axis, r.target, r.metric) for r in sampled.rows]
    assert len(set(keys)) == len(keys) == len(plain.rows) + 3 * 4 * 2 * 3
    added = sampled.rows[len(plain.rows) :]
    assert {r.system for r in added} == {"zero", "mean", "model"}
    assert {(r.axis, r.metric) for r in added} == {("voxel", "crps"), ("voxel", "coverage90"), ("pattern", "energy")}
    assert {r.target for r in added if r.value is not None} == {"trial"}
    for r in added:
        assert r.value is None or r.low < r.value < r.high
    assert "subj01: samples of model: T = 20" in sampled.notes


@pytest.mark.parametrize("roi", ["all", "mid"])
def test_sampling_rows_average_over_trials_and_voxels(roi):
    measured, signal = world(n_voxels=300)  # several blocks of voxels
    drawn, inside = draws(signal, 25), np.ones(300, bool) if roi == "all" else np.arange(300) % 3 == 1
    scores = run({"model": signal}, measured, samples={"model": drawn})
    x, y = drawn[:, measured.image][:, :, inside], measured.trials[:, inside]
    mean = np.linspace(-0.1, 0.1, 300)[inside]
    expected = {
        ("model", "crps"): crps(x, y).mean(),
        ("model", "coverage90"): coverage(x, y, level=0.9).mean(),
        ("zero", "crps"): np.abs(y).mean(),
        ("mean", "crps"): np.abs(y - mean).mean(),
    }
    for (system, metric), value in expected.items():
        found = row(scores, system, "voxel", "trial", metric, roi)
        assert found.value == pytest.approx(value, rel=1e-5)
        assert (found.n_images, found.n_voxels) == (60, inside.sum())
    assert row(scores, "zero", "voxel", "trial", "coverage90", roi).value is None
    found = row(scores, "model", "pattern", "trial", "energy", roi)
    of_image = measured.image
    per_row = energy_score(drawn[:, :, inside], y, image=of_image)
    assert found.value == pytest.approx(per_row.mean(), rel=1e-5)
    floor = np.linalg.norm(y - mean, axis=1).mean()
    assert row(scores, "mean", "pattern", "trial", "energy", roi).value == pytest.approx(floor, rel=1e-5)


def test_draws_of_the_truth_are_calibrated_and_beat_a_point_and_the_floors():
    measured, signal = world(n_images=200, n_voxels=300)
    samples = {"true": draws(signal, 40), "narrow": draws(signal, 30, sd=0.5)}
    scores = run({"true": signal, "narrow": signal}, measured, samples=samples)
    assert row(scores, "true", "voxel", "trial", "coverage90").value == pytest.approx(0.9, abs=0.01)
    assert row(scores, "narrow", "voxel", "trial", "coverage90").value < 0.65
    score_of = {s: row(scores, s, "voxel", "trial", "crps").value for s in ("true", "narrow", "mean")}
    assert score_of["true"] == pytest.approx(1 / np.sqrt(np.pi), abs=0.01)  # of standard normal noise
    assert score_of["true"] < score_of["narrow"] < np.sqrt(2 / np.pi) < score_of["mean"]


@pytest.mark.parametrize(("m", "undefined"), [(1, {"crps", "coverage90", "energy"}), (18, {"coverage90"}), (19, set())])
def test_too_few_samples_are_null_rows_with_a_reason(m, undefined):
    measured, signal = world()
    scores = run({"model": signal}, measured, samples={"model": draws(signal, m)})
    for axis, metric, needed in (("voxel", "crps", 2), ("voxel", "coverage90", 19), ("pattern", "energy", 2)):
        assert (row(scores, "model", axis, "trial", metric).value is None) == (metric in undefined)
        told = f"subj01: {metric} of model: n/a, needs {needed} samples, got {m}" in scores.notes
        assert told == (metric in undefined)


def test_samples_meet_averages_where_there_are_no_trials_and_a_note_says_so():
    measured, signal = world(n_repeats=1, ceiling=None, ceiling_reason="averaged", trial_reason="averaged upstream")
    scores = run({"model": signal}, measured, samples={"model": draws(signal, 20)})
    for metric in ("crps", "coverage90"):
        assert row(scores, "model", "voxel", "trial", metric).value is None
        assert row(scores, "model", "voxel", "mean", metric).value is not None
    assert any("crps, coverage90, energy against averages" in n and "averaged upstream" in n for n in scores.notes)


def test_sampling_rows_of_families_without_voxels_are_null():
    measured, signal = world(families={"early": np.zeros(90, dtype=bool)})
    scores = run({"model": signal}, measured, samples={"model": draws(signal, 20)})
    for roi in ("early", "mid"):
        assert row(scores, "model", "voxel", "trial", "crps", roi).value is None


def test_samples_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in production, where shapes aren't checked
    measured, signal = world()
    with pytest.raises(ValueError, match="'other' stand without a prediction"):
        run({"model": signal}, measured, samples={"other": draws(signal, 3)})
    with pytest.raises(ValueError, match=r"\(3, 60, 80\), expected \(sample, image, voxel\)"):
        run({"model": signal}, measured, samples={"model": draws(signal, 3)[:, :, :80]})
    with pytest.raises(ValueError, match="'model' for subj01 hold NaN"):
        run({"model": signal}, measured, samples={"model": np.full((3, *signal.shape), np.nan)})


# -- together ----------------------------------------------------------------------------------------------------------


def test_the_same_generator_gives_the_same_table():
    measured, signal = world()
    x = noisy(signal, 1)
    assert run({"model": x}, measured, seed=3) == run({"model": x}, measured, seed=3)


def test_rows_are_json_with_null_for_what_is_undefined():
    measured, signal = world()
    scores = run({"model": noisy(signal, 1)}, measured)
    rows = [r.to_json() for r in (*scores.rows, *scores.comparisons)]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert any(r["value"] is None for r in rows[: len(scores.rows)])


def test_merging_keeps_every_subject():
    measured, signal = world()
    one = run({"model": noisy(signal, 1)}, measured)
    other = run({"model": noisy(signal, 1)}, replace(measured, subject="subj02"))
    merged = merge_scores([one, other])
    assert len(merged.rows) == 2 * len(one.rows)
    assert {r.subject for r in merged.rows} == {"subj01", "subj02"}


def test_what_does_not_fit_is_refused():
    measured, signal = world()
    with pytest.raises(ValueError, match="expected \\(image, voxel\\) \\(60, 90\\)"):
        run({"model": signal[:, :80]}, measured, training_mean=np.zeros(80))
    with pytest.raises(ValueError, match="'mean' is taken"):
        run({"mean": signal}, measured)
    with pytest.raises(ValueError, match="holds NaN"):
        run({"model": np.where(signal > 1, np.nan, signal)}, measured)
    with pytest.raises(ValueError, match="numbered 0 to n_images - 1"):
        Measured("subj01", measured.trials, measured.image + 1, measured.ceiling)
    with pytest.raises(ValueError, match="say why in ceiling_reason"):
        Measured("subj01", measured.trials, measured.image, None)
    with pytest.raises(ValueError, match="yet claims to be averaged"):
        replace(measured, trial_reason="averaged upstream")
