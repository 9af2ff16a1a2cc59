"""Fitting an adapter: never worse than the start on validation images, the backbone untouched, the seed decides."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters.fit import FitConfig, Fitted, Method, fit_adapter, streams_of
from data.preprocess import Samples, samples
from data.splits import split_of
from data.store import PooledStore
from foundation.evaluation.metrics import voxelwise_r
from foundation.model.encoding_model import EncodingModel
from foundation.training.loop import predict_samples
from tests.tiny_store import ENCODER, N_VOXELS

SUBJECT = "subj05"
SHORT = FitConfig(lr=3e-3, epochs=5)


@dataclass(frozen=True, kw_only=True)
class Done:
    """A fit, its model and what it logged by epoch."""

    fitted: Fitted
    model: EncodingModel
    logged: dict[int, dict[str, float]]

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        return self.model.adapter(SUBJECT).state_dict()


@pytest.fixture
def fit(tiny_store: Path, make_backbone):
    """Fit `SUBJECT` on a fresh backbone, with other validation samples or another config if given."""
    store = PooledStore.open(tiny_store)
    subject, split = store.subject(SUBJECT), split_of(store)

    def run(
        method: Method = "head", *, seed: int = 0, config: FitConfig = SHORT, n_sessions: int | None = 2, **change
    ) -> Done:
        train = samples(subject, split, "train", n_sessions=n_sessions)
        validation = replace(samples(subject, split, "validation", n_sessions=n_sessions), **change)
        model, logged = make_backbone(), {}
        parcel = torch.arange(N_VOXELS[SUBJECT]) // 4

        def log(metrics: dict[str, float], epoch: int) -> None:
            logged[epoch] = metrics

        fitted = fit_adapter(
            model, SUBJECT, parcel, store.tokens(ENCODER), train, validation,
            method=method, seed=seed, config=config, log=log,
        )  # fmt: skip
        return Done(fitted=fitted, model=model, logged=logged)

    return run


@pytest.fixture
def validation(tiny_store: Path) -> Samples:
    store = PooledStore.open(tiny_store)
    return samples(store.subject(SUBJECT), split_of(store), "validation", n_sessions=2)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def test_the_start_alone_already_predicts(fit):
    done = fit("ridge")
    assert done.fitted.start == done.fitted.kept
    assert done.fitted.start > 0.1
    assert done.logged == {0: {"validation/voxel_r": done.fitted.start}}


@pytest.mark.parametrize("lr", [3e-3, 3e-2, 10.0])
def test_refinement_never_leaves_a_worse_validation_score_than_the_start(fit, tiny_store, validation, lr):
    done = fit(config=replace(SHORT, lr=lr))
    assert done.fitted.kept >= done.fitted.start
    scores = {epoch: metrics["validation/voxel_r"] for epoch, metrics in done.logged.items()}
    assert done.fitted.kept == max(scores.values()) == scores[done.fitted.kept_epoch]
    tokens = PooledStore.open(tiny_store).tokens(ENCODER)
    found = voxelwise_r(predict_samples(done.model, tokens, validation), validation.responses)
    assert np.nan_to_num(found).mean() == pytest.approx(done.fitted.kept, abs=1e-4)


def test_where_no_step_helps_the_start_is_kept_bit_for_bit(fit):
    done = fit(config=FitConfig(lr=1e3, epochs=3))
    assert done.fitted.kept_epoch == 0
    assert_same(done.adapter, fit("ridge").adapter)


@pytest.mark.parametrize("method", ["ridge", "head"])
def test_the_backbone_and_the_other_subjects_are_unchanged_bit_for_bit(fit, make_backbone, method):
    after = fit(method).model.state_dict()
    assert_same({key: value for key, value in after.items() if SUBJECT not in key}, make_backbone().state_dict())


@pytest.mark.parametrize("method", ["ridge", "head"])
def test_the_same_seed_gives_the_same_adapter(fit, method):
    first = fit(method)
    torch.rand(7)
    second = fit(method)
    assert_same(first.adapter, second.adapter)
    assert first.logged == second.logged


def test_another_seed_steps_another_way(fit):
    assert fit(seed=0).logged[1] != fit(seed=1).logged[1]


def test_validation_responses_do_not_enter_the_closed_form(fit, validation):
    spoilt = 1e6 * np.random.default_rng(0).standard_normal(validation.responses.shape)
    found = fit("ridge", responses=spoilt.astype(np.float32))
    assert_same(found.adapter, fit("ridge").adapter)


def test_validation_responses_choose_the_epoch_but_no_step(fit, validation):
    config = replace(SHORT, patience=99)
    losses = [
        [metrics["train/loss"] for epoch, metrics in done.logged.items() if epoch]
        for done in (fit(config=config), fit(config=config, responses=-validation.responses))
    ]
    assert len(losses[0]) == 5
    assert losses[0] == losses[1]


def test_it_stops_once_patience_is_over(fit):
    done = fit(config=FitConfig(lr=1e3, epochs=50, patience=2))
    assert max(done.logged) == done.fitted.kept_epoch + 2


def test_more_sessions_are_more_to_learn_from(fit):
    assert fit("ridge", n_sessions=1).adapter["voxel_bias"].shape == (N_VOXELS[SUBJECT],)
    one, three = fit("ridge", n_sessions=1), fit("ridge", n_sessions=3)
    assert not torch.equal(one.adapter["roi_cls"], three.adapter["roi_cls"])


def test_streams_computed_once_are_those_of_a_forward_pass(tiny_store, make_backbone, validation):
    tokens, model = PooledStore.open(tiny_store).tokens(ENCODER), make_backbone()
    cls, patch = tokens.read(validation.image)
    found, expected = (
        streams_of(model, tokens, validation),
        model.streams(torch.from_numpy(cls).float(), torch.from_numpy(patch).float()),
    )
    for name in ("cls", "patch", "gate"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
        assert not getattr(found, name).requires_grad
