"""Adapting one subject: the first N sessions and no more, what is refused, what a prediction is said to be made of."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters import course as module
from adapters.backbone_outputs import BackboneOutputs
from adapters.course import Adapted, Settings, adapt_subject, check_subject, gather, parcels_of
from data.preprocess import Preprocessing
from data.sources import ImageBlock, SubjectData
from data.store import PooledStore
from foundation.closed_form import population_start
from foundation.config import LossConfig
from foundation.evaluation.metrics import voxelwise_r
from foundation.model.encoding_model import EncodingModel
from foundation.training.validation import predict_samples
from tests.tiny_store import ENCODER, N_VOXELS, SPEC, make_tiny_store

NEW = "subj05"
RIDGE = Settings(method="ridge", preprocessing=Preprocessing(), seed=0)


def lineage(store: PooledStore) -> dict[str, Any]:
    """What a backbone of subj01 and subj02 says of itself."""
    return {
        "recipe": {"data": {"encoder": ENCODER, "parcels": "auto:4"}, "loss": asdict(LossConfig())},
        "encoder_digest": store.tokens(ENCODER).digest,
        "subject_digests": {name: store.subject(name).digest for name in ("subj01", "subj02")},
    }


@pytest.fixture
def store(tiny_store: Path) -> PooledStore:
    return PooledStore.open(tiny_store)


@pytest.fixture
def adapted(make_backbone: Callable[[], EncodingModel]) -> Callable[..., tuple[EncodingModel, Adapted]]:
    """Adapt a fresh backbone to `NEW`."""

    def run(store: PooledStore, *, n_sessions: int = 2) -> tuple[EncodingModel, Adapted]:
        model, made_from = make_backbone(), lineage(store)
        material = gather(store, NEW, made_from, n_sessions=n_sessions, settings=RIDGE)
        outputs = BackboneOutputs(make_backbone(), material.tokens, backbone="sha256:0", images=store.image_ids())
        return model, adapt_subject(
            model, material, made_from, settings=RIDGE, outputs=outputs, log=lambda metrics, step: None
        )

    return run


# -- material ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_sessions", [1, 2, 3])
def test_images_are_those_that_were_shown_in_the_first_sessions(store, n_sessions):
    material = gather(store, NEW, lineage(store), n_sessions=n_sessions, settings=RIDGE)
    subject = store.subject(NEW)
    assert subject.session is not None
    shown = set(subject.image[subject.session <= n_sessions].tolist())
    of_part = {part: {int(row) for row in getattr(material, part).image} for part in ("train", "validation")}
    assert of_part["train"] == {row for row in shown if row < 44}
    assert of_part["validation"] == {row for row in shown if 44 <= row < 52}
    assert len(material.parcels.labels) == N_VOXELS[NEW]
    assert material.split_digest.startswith("sha256:")


def test_nothing_is_learnt_from_later_sessions_nor_from_test_images(adapted, store, tmp_path):
    spoilt = make_tiny_store(tmp_path / "spoilt.zarr", spoilt=("test", 3))
    (model, one), (other, two) = adapted(store), adapted(spoilt)
    mine, theirs = (made.adapter(NEW).state_dict() for made in (model, other))
    torch.testing.assert_close(dict(mine), dict(theirs), rtol=0, atol=0, equal_nan=True)
    assert one.composition == two.composition
    assert one.validation_voxel_r == two.validation_voxel_r


def test_a_leak_between_the_parts_is_refused(store, monkeypatch):
    real = module.samples
    monkeypatch.setattr(module, "samples", lambda subject, split, part, **options: real(subject, split, "validation"))
    with pytest.raises(ValueError, match="validation"):
        gather(store, NEW, lineage(store), n_sessions=2, settings=RIDGE)


def test_parcels_of_old_recipes_are_read_by_their_size():
    assert parcels_of({"parcels": "rois"}) == "rois"
    assert parcels_of({"parcel_size": 30}) == "auto:30"


# -- who may be adapted to ---------------------------------------------------------------------------------------------


def checked(store: PooledStore, wanted: str = NEW, *, sessions: int = 1, allow_seen: bool = False, **made_from) -> str:
    return check_subject(
        store,
        wanted,
        lineage(store) | made_from,
        most_sessions=sessions,
        backbone="tiny/1",
        allow_seen=allow_seen,
    )


@pytest.mark.parametrize("wanted", ["5", "subj05"])
def test_a_subject_is_known_by_number_or_name(store, wanted):
    assert checked(store, wanted, sessions=3) == NEW


REFUSED = {
    "unknown": (dict(wanted="9"), "subject '9' is not in .*; it has subj01, subj02, subj05"),
    "too many sessions": (dict(sessions=4), "subj05 has 3 sessions; --sessions 4 must be 1 to 3"),
    "seen": (dict(wanted="1"), "backbone tiny/1 was trained on subj01; pass --allow-seen"),
    "another encoder": (
        dict(encoder_digest="sha256:0"),
        "'noise' tokens of .* come from another encoder than backbone",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_who_cannot_be_adapted_to_is_told_why(store, options, message):
    with pytest.raises(ValueError, match=message):
        checked(store, **options)


def test_a_subject_that_was_seen_under_another_name_is_recognised_by_its_data(store):
    with pytest.raises(ValueError, match="was trained on subj05; pass --allow-seen"):
        checked(store, subject_digests={"amy": store.subject(NEW).digest})
    assert checked(store, "1", allow_seen=True) == "subj01"


def test_a_data_set_without_sessions_cannot_be_asked_for_some(tmp_path):
    store = PooledStore.create(tmp_path / "none.zarr", name="none")
    store.add_images(ImageBlock(ids=["a", "b"], roles=["train", "test"]))
    store.begin_tokens(ENCODER, SPEC)
    tokens = {"cls": np.zeros((2, 2, 6), np.float16), "patch": np.zeros((2, 2, 16, 6), np.float16)}
    store.write_tokens(ENCODER, "0000", [tokens])
    responses = np.zeros((4, 3), np.float32)
    store.add_subject(SubjectData(name=NEW, responses=responses, image=np.array([0, 1, 0, 1], np.int32), session=None))
    with pytest.raises(ValueError, match=r"subj05 of .*none\.zarr has no session index, so --sessions can't be asked"):
        check_subject(store, NEW, lineage_without_subjects(store), most_sessions=1, backbone="tiny/1", allow_seen=False)


def lineage_without_subjects(store: PooledStore) -> dict[str, Any]:
    return {
        "recipe": {"data": {"encoder": ENCODER}},
        "encoder_digest": store.tokens(ENCODER).digest,
        "subject_digests": {},
    }


# -- what it says ------------------------------------------------------------------------------------------------------


def test_the_composition_is_what_the_prediction_is_made_of_on_average_over_voxels(adapted, store, monkeypatch):
    settled, settle = [], population_start.shares_of

    def spy(members: list[np.ndarray], responses: np.ndarray, **options) -> np.ndarray:
        settled.append((np.stack(members), settle(members, responses, **options)))
        return settled[-1][1]

    monkeypatch.setattr(population_start, "shares_of", spy)
    model, found = adapted(store)
    ((members, shares),) = settled
    shares[-1] = np.minimum(shares[-1], population_start.LARGEST_NETWORK_SHARE)
    names = ("whole", "field", "population", "network")
    expected = dict(zip(names, shares.mean(1).tolist(), strict=True))
    assert found.composition["shares"] == pytest.approx(expected, abs=1e-4)
    assert list(found.composition["validation_voxel_r"]) == list(names)
    assert found.composition["validation_voxel_r"]["network"] == pytest.approx(found.settled.network, abs=1e-4)
    told = ", ".join(f"{name} {share:.2f}" for name, share in found.composition["shares"].items())
    assert found.told().startswith(f"a prediction is made of: {told} (mean shares over voxels")

    material = gather(store, NEW, lineage(store), n_sessions=2, settings=RIDGE)
    predicted = predict_samples(model, material.tokens, material.validation)
    made_of = material.train.responses.mean(0) + (shares[:, None] * members).sum(0)
    np.testing.assert_allclose(predicted, made_of, atol=1e-3)


def test_the_validation_score_is_that_of_the_whole_prediction(adapted, store):
    model, found = adapted(store)
    material = gather(store, NEW, lineage(store), n_sessions=2, settings=RIDGE)
    cls, patch = (torch.from_numpy(t).float() for t in material.tokens.read(material.validation.image))
    with torch.inference_mode():
        predicted = model.predict(cls, patch, NEW).numpy()
    expected = np.nan_to_num(voxelwise_r(predicted, material.validation.responses)).mean()
    assert found.validation_voxel_r == pytest.approx(expected, abs=1e-4)
    assert found.settled.mixture == pytest.approx(expected, abs=1e-4)


def test_adapting_again_from_outputs_that_are_kept_gives_the_same_adapter(adapted, store):
    (first, _), (second, _) = adapted(store), adapted(store)
    mine, theirs = (dict(model.adapter(NEW).state_dict()) for model in (first, second))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
