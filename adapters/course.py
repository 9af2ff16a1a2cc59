"""Adapting one subject from its first N sessions: material, audit, fit, what is settled at the end."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from adapters.backbone_outputs import BackboneOutputs
from adapters.fit import Fitted, Method, fit_adapter
from data.audit import audit_fit
from data.parcels import Parcels, make_parcels, parse_parcels
from data.preprocess import Preprocessing, Samples, n_sessions_of, samples
from data.splits import Split, split_of
from data.store import PooledStore, TokenReader
from foundation.closed_form.finish import Settled, settle_noise
from foundation.closed_form.roi_weights import weights_of_subject
from foundation.closed_form.threads import threads_for
from foundation.config import LossConfig
from foundation.model.encoding_model import EncodingModel
from foundation.training.validation import validation_scores


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a fit depends on beside backbone, store and number of sessions."""

    method: Method
    preprocessing: Preprocessing
    seed: int


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a subject's adapter is fitted on: its first `n_sessions`, and nothing else."""

    store: PooledStore
    subject: str
    tokens: TokenReader
    split: Split
    n_sessions: int
    parcels: Parcels
    train: Samples
    validation: Samples

    @property
    def split_digest(self) -> str:
        """Digest of the split, as far as the subject's images go."""
        return self.split.digest_of(self.store.subject(self.subject).image)


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A finished fit, and what it has to say."""

    fitted: Fitted
    settled: Settled
    validation_voxel_r: float

    @property
    def composition(self) -> dict[str, Any]:
        """What a prediction is made of: mean shares over voxels, and validation scores of the parts alone."""
        members = self.fitted.members
        return {
            "shares": {name: round(share, 4) for name, share in members.share.items()},
            "validation_voxel_r": {name: round(r, 4) for name, r in members.validation_r.items()},
        }

    def told(self) -> str:
        """Return the composition as a line for people."""
        shares = ", ".join(f"{name} {share:.2f}" for name, share in self.composition["shares"].items())
        return f"a prediction is made of: {shares} (mean shares over voxels; they need not add up to 1)"


def parcels_of(data: dict[str, Any]) -> str:
    """Return how a backbone's recipe makes parcels; those of before they had names give their size alone."""
    return data.get("parcels") or f"auto:{data['parcel_size']}"


def gather(
    store: PooledStore, subject: str, made_from: dict[str, Any], *, n_sessions: int, settings: Settings
) -> Material:
    """Return the material of a fit, audited.

    Raises
    ------
    ValueError
        If the audit finds a leak, or the sessions hold no image of a part.
    """
    data = made_from["recipe"]["data"]
    measurements, tokens, split = store.subject(subject), store.tokens(data["encoder"]), split_of(store)
    tokens.require(measurements.image)
    train, validation = (
        samples(measurements, split, part, n_sessions=n_sessions, preprocessing=settings.preprocessing)
        for part in ("train", "validation")
    )
    material = Material(
        store=store,
        subject=subject,
        tokens=tokens,
        split=split,
        n_sessions=n_sessions,
        train=train,
        validation=validation,
        parcels=make_parcels(
            parse_parcels(parcels_of(data)),
            measurements.voxels,
            responses=train,
            split_digest=split.digest_of(measurements.image),
            n_sessions=n_sessions,
            seed=settings.seed,
        ),
    )
    audit_fit(
        store.image_ids(),
        split,
        {subject: train},
        {subject: validation},
        parcels={subject: material.parcels},
        pictures=store.picture_digests(),
    )
    return material


def adapt_subject(
    model: EncodingModel,
    material: Material,
    made_from: dict[str, Any],
    *,
    settings: Settings,
    outputs: BackboneOutputs,
    log: Callable[[dict[str, float], int], None],
) -> Adapted:
    """Fit the subject's adapter on the frozen backbone `model`, which then has it."""
    store, subject, train = material.store, material.subject, material.train
    measurements = store.subject(subject)
    loss, parcel = LossConfig(**made_from["recipe"]["loss"]), torch.from_numpy(material.parcels.labels).long()
    with threads_for(train.responses.size):
        fitted = fit_adapter(
            model,
            subject,
            parcel,
            material.tokens,
            train,
            material.validation,
            method=settings.method,
            seed=settings.seed,
            loss=loss,
            target_weight=weights_of_subject(
                loss.roi_target, parcel, measurements, material.split, train, n_sessions=material.n_sessions
            ),
            outputs=outputs,
            log=log,
        )
        settled = settle_noise(
            model,
            measurements,
            material.tokens,
            material.split,
            material.validation,
            seed=settings.seed,
            n_sessions=material.n_sessions,
            preprocessing=settings.preprocessing,
        )
    score = validation_scores(model, material.tokens, {subject: material.validation})["validation/voxel_r"]
    return Adapted(fitted=fitted, settled=settled, validation_voxel_r=score)


def check_subject(
    store: PooledStore, wanted: str, made_from: dict[str, Any], *, most_sessions: int, backbone: str, allow_seen: bool
) -> str:
    """Return the subject's name, if it may be adapted to; before anything is tracked.

    Raises
    ------
    ValueError
        If the subject is unknown, has no or too few sessions, was seen by the backbone, or has tokens of another
        encoder.
    """
    subject = store.resolve_subject(wanted)
    measurements = store.subject(subject)
    have = n_sessions_of(measurements)
    if have is None:
        raise ValueError(f"{subject} of {store.path} has no session index, so --sessions can't be asked of it")
    if not 1 <= most_sessions <= have:
        raise ValueError(f"{subject} has {have} sessions; --sessions {most_sessions} must be 1 to {have}")
    known = made_from["subject_digests"]
    if (subject in known or measurements.digest in known.values()) and not allow_seen:
        raise ValueError(f"backbone {backbone} was trained on {subject}; pass --allow-seen to adapt to it all the same")
    encoder = made_from["recipe"]["data"]["encoder"]
    if store.tokens(encoder).digest != made_from["encoder_digest"]:
        raise ValueError(
            f"{encoder!r} tokens of {store.path} come from another encoder than backbone {backbone} learned"
        )
    return subject
