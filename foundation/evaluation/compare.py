"""A model beside ridge on the same subject, tokens, sessions and split; the one place that puts the pieces together."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float32, Int

from data.audit import audit_fit
from data.preprocess import Preprocessing, Samples, samples
from data.splits import Split
from data.store import SubjectStore, TokenReader
from foundation.evaluation.baselines import fit_ridge, ridge_features
from foundation.evaluation.measured import measured_test
from foundation.evaluation.score import Scores, score
from foundation.model.encoding_model import EncodingModel
from foundation.training.loop import predict_samples


def features_of(
    tokens: TokenReader, rows: Int[np.ndarray, " image"], *, batch: int = 256
) -> Float32[np.ndarray, "image feature"]:
    """Return the features that ridge sees of the images in `rows`."""
    _, patch, _ = tokens.shape
    side = round(patch**0.5)
    parts = []
    for start in range(0, len(rows), batch):
        cls, patches = tokens.read(rows[start : start + batch])
        parts.append(
            ridge_features(cls.astype(np.float32), patches.astype(np.float32), grid=(side, side), pool=min(4, side))
        )
    return np.concatenate(parts).astype(np.float32)


def ridge_prediction(
    tokens: TokenReader, train: Samples, rows: Int[np.ndarray, " image"], *, seed: int
) -> Float32[np.ndarray, "image voxel"]:
    """Return what ridge, its penalty chosen per voxel by cross-validation within `train`, predicts for `rows`."""
    model = fit_ridge(features_of(tokens, train.image), train.responses, seed=seed)
    return model.predict(features_of(tokens, rows)).astype(np.float32)


def model_prediction(
    model: EncodingModel, tokens: TokenReader, subject: str, rows: Int[np.ndarray, " image"]
) -> Float32[np.ndarray, "image voxel"]:
    """Return what `model` predicts for the images in `rows`."""
    n_voxel = model.adapter(subject).n_voxel
    wanted = Samples(
        subject=subject,
        image=rows,
        responses=np.zeros((len(rows), n_voxel), np.float32),
        n_repeats=np.ones(len(rows), np.float32),
    )
    return predict_samples(model, tokens, wanted)


def score_subject(
    models: Mapping[str, EncodingModel],
    subject: SubjectStore,
    tokens: TokenReader,
    split: Split,
    *,
    pictures: dict[int, str],
    n_sessions: int | None = None,
    preprocessing: Preprocessing = Preprocessing(),
    seed: int = 0,
    n_bootstraps: int = 1000,
) -> Scores:
    """Score models and ridge on a subject's test images, all with the same sessions to learn from.

    `pictures` are the store's (`PooledStore.picture_digests`), for the leakage audit, which comes before ridge is
    fitted and may raise ValueError.
    """
    measured, rows = measured_test(subject, split, n_sessions=n_sessions, preprocessing=preprocessing)
    train = samples(subject, split, "train", n_sessions=n_sessions, preprocessing=preprocessing)
    audit_fit(split.ids, split, {subject.name: train}, {}, parcels={}, pictures=pictures)
    predictions = {name: model_prediction(model, tokens, subject.name, rows) for name, model in models.items()}
    predictions["ridge"] = ridge_prediction(tokens, train, rows, seed=seed)
    training_mean = train.responses.mean(0)
    rng = np.random.default_rng(seed)
    return score(predictions, measured, training_mean=training_mean, n_bootstraps=n_bootstraps, rng=rng)


NAMES = {
    ("voxel", "r"): "voxel_r",
    ("pattern", "r"): "pattern_r",
    ("voxel", "mse"): "mse",
    ("voxel", "r2_ceiling"): "r2_ceiling",
}


def headline(scores: Scores, system: str = "manybrains") -> dict[str, float]:
    """Return the numbers that a run is known by, against repeat means; docs/mlflow.md lists them.

    Means over subjects: ``test/<metric>`` for voxel_r, pattern_r, mse and r2_ceiling, the others' beside it
    (``test/voxel_r_ridge``, ``test/voxel_r_ceiling``, ...), and ``test/voxel_r/roi/<roi>``. One subject's:
    ``test/voxel_r/subject/<subject>``. What is undefined is left out.
    """
    values: dict[str, list[float]] = {}
    for row in scores.rows:
        metric = NAMES.get((row.axis, row.metric))
        if row.target != "mean" or metric is None or row.value is None:
            continue
        ours = row.system == system
        if row.system == "ceiling" and metric == "r2_ceiling":  # 1 by definition
            continue
        if row.roi == "all" and (ours or row.system in ("ridge", "ceiling")):
            values.setdefault(f"test/{metric}" + ("" if ours else f"_{row.system}"), []).append(row.value)
        if ours and metric == "voxel_r":
            place = f"subject/{row.subject}" if row.roi == "all" else f"roi/{row.roi}"
            values.setdefault(f"test/{metric}/{place}", []).append(row.value)
    return {key: float(np.mean(found)) for key, found in values.items()}
