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
from foundation.checkpoint import load_adapter, save_model
from foundation.evaluation.metrics import voxelwise_r
from foundation.model.encoding_model import EncodingModel
from foundation.model.lora import LowRankUpdate
from foundation.training.validation import predict_samples
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
    torch.testing.assert_close(dict(one), dict(other), rtol=0, atol=0, equal_nan=True)


def test_the_start_alone_already_predicts(fit):
    done = fit("ridge")
    assert done.fitted.start == done.fitted.kept
    assert done.fitted.start > 0.1
    assert done.logged == {0: {"validation/voxel_r": done.fitted.start}}


@pytest.mark.parametrize(("method", "lr"), [("head", 3e-3), ("head", 3e-2), ("head", 10.0), ("lora", 3e-3)])
def test_refinement_never_leaves_a_worse_validation_score_than_the_start(fit, tiny_store, validation, method, lr):
    done = fit(method, config=replace(SHORT, lr=lr))
    assert done.fitted.kept >= done.fitted.start
    scores = {epoch: metrics["validation/voxel_r"] for epoch, metrics in done.logged.items()}
    assert done.fitted.kept == max(scores.values()) == scores[done.fitted.kept_epoch]
    tokens = PooledStore.open(tiny_store).tokens(ENCODER)
    done.model.adapter(SUBJECT).network_share.fill_(1)  # the network alone is what is refined
    found = voxelwise_r(predict_samples(done.model, tokens, validation), validation.responses)
    assert np.nan_to_num(found).mean() == pytest.approx(done.fitted.kept, abs=1e-4)


@pytest.mark.parametrize("method", ["head", "lora"])
def test_where_no_step_helps_the_start_is_kept_bit_for_bit(fit, method):
    done = fit(method, config=FitConfig(lr=1e3, epochs=3))
    assert done.fitted.kept_epoch == 0
    assert_same(done.adapter, fit("ridge").adapter)


@pytest.mark.parametrize("method", ["ridge", "head", "lora"])
def test_the_backbone_and_the_other_subjects_are_unchanged_bit_for_bit(fit, make_backbone, method):
    after = fit(method).model.state_dict()
    assert_same({key: value for key, value in after.items() if SUBJECT not in key}, make_backbone().state_dict())


@pytest.mark.parametrize("method", ["ridge", "head", "lora"])
def test_the_same_seed_gives_the_same_adapter(fit, method):
    first = fit(method)
    torch.rand(7)
    second = fit(method)
    assert_same(first.adapter, second.adapter)
    assert first.logged == second.logged


def test_another_seed_steps_another_way(fit):
    assert fit(seed=0).logged[1] != fit(seed=1).logged[1]


def test_validation_responses_settle_shares_and_enter_no_fit(fit, validation):
    shares = ("linear.weight_whole", "linear.weight_field", "linear.bias", "population.weight", "network_share")
    found, other = (
        {key: value for key, value in done.adapter.items() if key not in shares}
        for done in (fit("ridge"), fit("ridge", responses=-validation.responses))
    )
    assert_same(found, other)


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


def test_low_rank_updates_are_learnt_and_are_the_subjects_alone(fit, make_backbone, tiny_store, validation):
    done = fit("lora", config=replace(SHORT, lora_rank=2))
    assert done.fitted.kept_epoch > 0
    update = done.model.adapter(SUBJECT).lora
    assert update is not None
    assert update.rank == 2
    assert all(up.any() for up in update.up.values())
    cls, patch = (torch.from_numpy(t).float() for t in PooledStore.open(tiny_store).tokens(ENCODER).read(np.arange(6)))
    rows = {"subj01": slice(0, 3), SUBJECT: slice(3, 6)}
    found, frozen = done.model.streams_of(cls, patch, rows).patch, make_backbone().streams(cls, patch).patch
    torch.testing.assert_close(found[:3], frozen[:3])
    assert not torch.allclose(found[3:], frozen[3:], rtol=1e-3)


def test_steps_from_tokens_are_steps_from_streams_while_no_update_has_moved(fit, monkeypatch):
    """The two methods share all but the updates: with these held at zero, they take the same way."""
    monkeypatch.setattr(LowRankUpdate, "updated", lambda self, module: {})
    low_rank, head = fit("lora").logged, fit("head").logged
    assert low_rank.keys() == head.keys()
    for epoch, metrics in head.items():
        assert low_rank[epoch] == pytest.approx(metrics, rel=1e-3), epoch


def test_a_saved_adapter_with_updates_predicts_the_same_in_a_fresh_backbone(fit, make_backbone, tiny_store, tmp_path):
    done, other = fit("ridge"), make_backbone()
    for up in done.model.add_lora(SUBJECT, 2).up.values():  # whether steps help is another test's
        torch.nn.init.normal_(up, std=0.1)
    save_model(done.model, tmp_path, made_from={}, only=SUBJECT)
    load_adapter(other, tmp_path)
    cls, patch = (torch.from_numpy(t).float() for t in PooledStore.open(tiny_store).tokens(ENCODER).read(np.arange(9)))
    with torch.inference_mode():
        found, expected = (model.predict(cls, patch, SUBJECT) for model in (other, done.model))
    assert_same(other.adapter(SUBJECT).state_dict(), done.adapter)
    torch.testing.assert_close(found, expected)  # equal weights at other addresses may round otherwise in a product


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
