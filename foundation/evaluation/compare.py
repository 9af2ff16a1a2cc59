"""Models beside baselines on the same subject, tokens, sessions and split; where the pieces are put together."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float32, Int

from data.audit import audit_fit
from data.loader import tokens_on
from data.preprocess import Preprocessing, Samples, samples
from data.splits import Split
from data.store import SubjectStore, TokenReader
from foundation.evaluation.baselines import BASELINES, predict
from foundation.evaluation.measured import measured_test
from foundation.evaluation.score import Scores, score
from foundation.model.encoding_model import EncodingModel
from foundation.training.validation import predict_samples

SAMPLE_BATCH = 64


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


def model_samples(
    model: EncodingModel, tokens: TokenReader, subject: str, rows: Int[np.ndarray, " image"], *, n: int, seed: int
) -> Float32[np.ndarray, "sample image voxel"]:
    """Return `n` single trials that `model` draws for each of the images in `rows`."""
    device = model.streams.cls_mean.device
    generator = torch.Generator(device).manual_seed(seed)
    drawn = np.empty((n, len(rows), model.adapter(subject).n_voxel), np.float32)
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(rows), SAMPLE_BATCH):
            some = slice(start, start + SAMPLE_BATCH)
            cls, patch = tokens_on(device, tokens, rows[some])
            drawn[:, some] = model.sample(cls, patch, subject, n, generator=generator).cpu().numpy()
    return drawn


def score_subject(
    models: Mapping[str, EncodingModel],
    subject: SubjectStore,
    tokens: TokenReader,
    split: Split,
    *,
    pictures: dict[int, str],
    baselines: Sequence[str] = ("ridge",),
    n_sessions: int | None = None,
    preprocessing: Preprocessing = Preprocessing(),
    seed: int = 0,
    n_bootstraps: int = 1000,
    n_samples: int = 0,
) -> Scores:
    """Score models and baselines on a subject's test images, all with the same sessions to learn from.

    Parameters
    ----------
    pictures
        The store's (`PooledStore.picture_digests`), for the leakage audit, which comes before a baseline is fitted.
    baselines
        Names of `foundation.evaluation.baselines.BASELINES`.
    n_samples
        Single trials that each model draws for an image, to be scored as a distribution; 0: none.

    Raises
    ------
    ValueError
        If the audit finds a leak, a baseline is unknown, or a model has a baseline's name.
    """
    unknown = [name for name in baselines if name not in BASELINES]
    if unknown:
        raise ValueError(f"there is no baseline {', '.join(map(repr, unknown))}; there are {', '.join(BASELINES)}")
    taken = [name for name in models if name in baselines]
    if taken:
        raise ValueError(f"a model can't be named {taken[0]!r} beside the baseline of that name; rename the model")
    measured, rows = measured_test(subject, split, n_sessions=n_sessions, preprocessing=preprocessing)
    train = samples(subject, split, "train", n_sessions=n_sessions, preprocessing=preprocessing)
    audit_fit(split.ids, split, {subject.name: train}, {}, parcels={}, pictures=pictures)
    predictions = {name: model_prediction(model, tokens, subject.name, rows) for name, model in models.items()}
    predictions |= {name: predict(name, tokens, train, rows, seed=seed) for name in baselines}
    training_mean = train.responses.mean(0)
    rng = np.random.default_rng(seed)
    drawn = {
        name: model_samples(model, tokens, subject.name, rows, n=n_samples, seed=seed)
        for name, model in models.items()
        if n_samples
    }
    return score(
        predictions, measured, training_mean=training_mean, n_bootstraps=n_bootstraps, rng=rng, samples=drawn or None
    )


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
        if row.roi == "all" and (ours or row.system in (*BASELINES, "ceiling")):
            values.setdefault(f"test/{metric}" + ("" if ours else f"_{row.system}"), []).append(row.value)
        if ours and metric == "voxel_r":
            place = f"subject/{row.subject}" if row.roi == "all" else f"roi/{row.roi}"
            values.setdefault(f"test/{metric}/{place}", []).append(row.value)
    return {key: float(np.mean(found)) for key, found in values.items()}
