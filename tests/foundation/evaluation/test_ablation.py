"""What ablation finds where the truth is made by hand: streams that serve one family, or all alike."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.splits import split_of
from foundation.evaluation.ablation import RETRAINED, ablate, ablate_network, write_ablation
from foundation.evaluation.area_losses import Ablation, Losses, ResampledR, merged
from foundation.evaluation.interventions import CONTROL
from foundation.evaluation.metrics import voxelwise_r
from foundation.evaluation.score import Measured
from foundation.evaluation.specialisation import findings, sentences
from foundation.evaluation.statistics import resample_counts
from foundation.model.dual_stream import Streams, TokenShape
from foundation.model.encoding_model import EncodingModel
from tests.tiny_store import ENCODER, N_VOXELS, TINY_BACKBONE, make_tiny_store

N_IMAGE, N_PLACE, WIDTH, N_VOXEL, PER_PARCEL = 80, 4, 8, 240, 5


class HandMade:
    """A linear network on random streams, and responses that follow it with noise."""

    def __init__(self, *, patch_share: np.ndarray, seed: int) -> None:
        rng = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        self.streams = Streams(
            cls=torch.randn(N_IMAGE, WIDTH, generator=generator),
            patch=torch.randn(N_IMAGE, 1, WIDTH, generator=generator).expand(-1, N_PLACE, -1),
            gate=torch.zeros(N_IMAGE, 1),
        )
        unit = rng.standard_normal((2, WIDTH, len(patch_share)))
        self.readout = (
            unit / np.linalg.norm(unit, axis=1, keepdims=True) * np.sqrt([1 - patch_share, patch_share])[:, None]
        )
        noise = rng.standard_normal((N_IMAGE, len(patch_share)))
        self.responses = (self.network(self.streams) + noise).astype(np.float32)

    def network(self, streams: Streams) -> np.ndarray:
        both = streams.cls.numpy() @ self.readout[0] + streams.patch.mean(1).numpy() @ self.readout[1]
        return both.astype(np.float32)

    def ablation(self, families: dict[str, np.ndarray], *, subject: str = "subj01", seed: int = 0) -> Ablation:
        measured = Measured(
            subject=subject,
            trials=self.responses,
            image=np.arange(N_IMAGE),
            ceiling=None,
            ceiling_reason="not repeated",
            families=families,
        )
        parcel = np.arange(N_VOXEL) // PER_PARCEL
        losses = Losses(measured, parcel, n_bootstraps=200, rng=np.random.default_rng(seed))
        found, removed = ablate_network(
            self.network, self.streams, losses, n_draws=2, generator=torch.Generator().manual_seed(seed)
        )
        return losses.told(found.pop(("", "")), found, removed=removed)


EARLY = np.arange(N_VOXEL) < N_VOXEL // 2
FAMILIES = {"early": EARLY, "higher": ~EARLY}


def test_a_branch_that_serves_early_voxels_only_is_found_and_so_is_the_other():
    made = HandMade(patch_share=np.where(EARLY, 0.98, 0.02), seed=0)
    found = findings(made.ablation(FAMILIES).differentials)
    assert {f.branch: f.favours for f in found} == {"patch": "early", "cls": "higher"}
    said = sentences(found)
    assert "patch stream matters more for early than for higher areas in 1 of 1 subjects" in said[1]
    assert "CLS stream matters more for higher than for early areas in 1 of 1 subjects" in said[0]
    assert "opposite ends of the hierarchy in 1 of 1 subjects" in said[2]


def test_where_voxels_of_all_areas_use_both_streams_alike_nothing_is_claimed_beyond_the_nominal_rate():
    """40 null draws: voxels differ widely in what they use, and labels are dealt out to them at random."""
    claims, plain = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        made = HandMade(patch_share=rng.random(N_VOXEL), seed=seed)
        early = rng.permutation(EARLY)
        differentials = made.ablation({"early": early, "higher": ~early}, seed=seed).differentials
        claims.append(any(f.favours for f in findings(differentials)))
        plain += [d.p_value < 0.05 for d in differentials if d.intervention == "mean"]
    assert sum(claims) <= 5  # above 5 of 40 has a chance of 1 % at the nominal .05
    assert sum(plain) <= 9  # of 80, likewise 2 %


def test_the_loss_is_that_of_the_correlation_and_a_disabled_prediction_counts_as_none():
    made = HandMade(patch_share=np.where(EARLY, 1.0, 0.5), seed=1)
    rows = {(r.branch, r.intervention, r.roi): r for r in made.ablation(FAMILIES).rows}
    intact = voxelwise_r(made.network(made.streams), made.responses)
    without = replace(made.streams, patch=torch.zeros_like(made.streams.patch))
    left = np.nan_to_num(voxelwise_r(made.network(without), made.responses))
    assert np.allclose(left[EARLY], 0)
    for name, mask in {"all": np.ones(N_VOXEL, bool), **FAMILIES}.items():
        row = rows["patch", "zero", name]
        assert row.loss == pytest.approx((intact - left)[mask].mean(), abs=1e-5)
        assert row.intact == pytest.approx(intact[mask].mean(), abs=1e-5)
        assert row.low < row.loss < row.high
        assert row.n_voxels == mask.sum()
    assert rows["patch", "zero", "early"].share_of_intact == pytest.approx(1)


def test_the_differential_is_early_less_higher_and_is_told_beside_its_control():
    made = HandMade(patch_share=np.where(EARLY, 0.8, 0.3), seed=2)
    found = made.ablation(FAMILIES)
    rows = {(r.branch, r.intervention, r.roi): r.loss for r in found.rows}
    by_name = {(d.branch, d.intervention): d for d in found.differentials}
    for (branch, name), d in by_name.items():
        expected = rows[branch, name, "early"] - rows[branch, name, "higher"]
        assert d.difference == pytest.approx(expected, abs=1e-6)
        if name == CONTROL:
            assert d.versus_control is None
        else:
            assert d.versus_control == pytest.approx(expected - by_name[branch, CONTROL].difference, abs=1e-6)


def test_areas_in_too_few_parcels_or_without_labels_are_not_compared():
    made = HandMade(patch_share=np.full(N_VOXEL, 0.5), seed=3)
    assert not made.ablation({}).differentials
    assert "no labels of early areas" in made.ablation({}).notes[-1]
    few = np.arange(N_VOXEL) < 4 * PER_PARCEL
    found = made.ablation({"early": few, "higher": ~few})
    assert not found.differentials
    assert "early voxels lie in 4 of the model's parcels, at least 5 are needed" in found.notes[-1]
    assert sentences(findings(found.differentials)) == ["Whether streams serve different areas: n/a, see the notes."]


def losses_of(n_parcel: int, rng: np.random.Generator) -> Losses:
    """Two areas of `n_parcel` parcels, a voxel each."""
    early = np.arange(2 * n_parcel) < n_parcel
    measured = Measured(
        subject="subj01",
        trials=rng.standard_normal((N_IMAGE, 2 * n_parcel)).astype(np.float32),
        image=np.arange(N_IMAGE),
        ceiling=None,
        ceiling_reason="not repeated",
        families={"early": early, "higher": ~early},
    )
    return Losses(measured, np.arange(2 * n_parcel), n_bootstraps=1, rng=rng)


def resampled(of_parcels: np.ndarray, weights: np.ndarray) -> ResampledR:
    """Mean r of all voxels, of the first half and of the second, on parcels' resamples."""
    half = len(of_parcels) // 2
    with np.errstate(invalid="ignore"):
        areas = [(weights[:, at] @ of_parcels[at]) / weights[:, at].sum(1) for at in (slice(half), slice(half, None))]
    values = np.stack([weights @ of_parcels / weights.sum(1), *areas], axis=1)
    return ResampledR(values, values)


def test_areas_of_five_parcels_differ_by_chance_no_more_often_than_is_said():
    """Of 1000 draws; plain percentiles find a difference in about 95."""
    rng = np.random.default_rng(0)
    losses, false = losses_of(5, rng), 0
    for _ in range(1000):
        weights = np.vstack([np.ones((1, 10)), resample_counts(10, 300, rng=rng)])
        intact = resampled(np.full(10, 0.5), weights)
        (found,) = losses.told(
            intact, {("cls", "zero"): resampled(0.3 + 0.05 * rng.standard_normal(10), weights)}
        ).differentials
        assert found.p_value is not None
        false += found.p_value <= 0.05
    assert false <= 66  # more has a chance of 1 % at the nominal .05


def test_shares_are_not_told_where_an_area_is_hardly_predicted():
    rng = np.random.default_rng(0)
    losses = losses_of(20, rng)
    weights = np.vstack([np.ones((1, 40)), resample_counts(40, 300, rng=rng)])
    for r_of_higher, defined in ((0.3, True), (0.01, False)):
        r = np.repeat([0.3, r_of_higher], 20) + 0.1 * rng.standard_normal(40)
        told = losses.told(resampled(r, weights), {("cls", "zero"): resampled(0.7 * r, weights)})
        (found,) = told.differentials
        assert (found.share_difference is not None) == (found.share_p_value is not None) == defined
        assert found.p_value is not None
        assert any("shares n/a, the intact r of higher areas isn't clear of 0" in n for n in told.notes) != defined


def model_of(**changes) -> EncodingModel:
    torch.manual_seed(0)
    parcels = {name: torch.arange(n) // 2 for name, n in N_VOXELS.items()}
    config = replace(TINY_BACKBONE, **changes)
    return EncodingModel(TokenShape(depth=2, patch=16, width=6), config, parcels).eval()


def test_a_trained_model_is_ablated_in_every_way_and_beside_models_without_a_stream(tmp_path):
    store = make_tiny_store(tmp_path / "tiny.zarr")
    model, without = model_of(), model_of(streams=("patch",), gate="image")
    found = ablate(
        model,
        store.subject("subj02"),
        store.tokens(ENCODER),
        split_of(store),
        without={"cls": without},
        n_bootstraps=20,
        n_draws=2,
    )
    told = {(r.branch, r.intervention) for r in found.rows}
    ways = {"zero", "mean", "shuffled", CONTROL}
    expected = {(branch, way) for branch in ("cls", "patch") for way in ways}
    assert told == expected | {("both", "swapped inputs"), ("cls", RETRAINED)}
    assert any("closed-form path bypasses the streams" in note for note in found.notes)
    write_ablation(tmp_path / "ablation.json", merged([found]), sentences=["said"])
    kept = json.loads((tmp_path / "ablation.json").read_text())
    assert len(kept["rows"]) == len(found.rows)
    assert kept["sentences"] == ["said"]


def test_a_model_of_one_stream_is_told_to_be_not_applicable(tmp_path):
    store = make_tiny_store(tmp_path / "tiny.zarr")
    model = model_of(streams=("cls",), gate="image")
    found = ablate(model, store.subject("subj01"), store.tokens(ENCODER), split_of(store))
    assert not found.rows
    assert found.notes == ("subj01: ablation n/a, the model has the cls stream only",)
