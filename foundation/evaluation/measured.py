"""What was measured of one subject's test images, as a protocol wants it: trials, ceiling, ROI families."""

from dataclasses import replace

import numpy as np
from jaxtyping import Int

from data.audit import audit_trials
from data.legacy import LegacyTrials, legacy_trials
from data.noise_ceiling import ncsnr, noise_ceiling
from data.preprocess import Preprocessing, Trials, average_repeats, standardised_trials
from data.rois import families
from data.splits import Part, Split
from data.store import SubjectStore
from foundation.evaluation.score import Measured


def measured_part(
    subject: SubjectStore,
    split: Split,
    *,
    n_sessions: int | None = None,
    preprocessing: Preprocessing = Preprocessing(),
    part: Part = "test",
) -> tuple[Measured, Int[np.ndarray, " image"]]:
    """Return the trials of `part` for a model that had `n_sessions`, and the store's row of each image.

    The ceiling's NCSNR is estimated from all of the subject's repeats; it is reported, and weighs nothing.

    Raises
    ------
    ValueError
        If the subject saw no image of `part`, or what is tested had a share in standardising it.
    """
    trials = standardised_trials(subject, split, n_sessions=n_sessions, preprocessing=preprocessing)
    audit_trials(split, trials)
    keep = split.select(trials.image, part)
    if not keep.any():
        raise ValueError(f"{subject.name} saw no {part} image; it can't be scored on this split")
    rows, image = np.unique(trials.image[keep], return_inverse=True)
    responses = trials.responses[keep]
    averaged = bool((trials.n_averaged > 1).any())
    if averaged:  # perhaps within sessions only: rows of one image are averaged on, so that they don't pose as trials
        _, responses, _ = average_repeats(responses, trials.image[keep], trials.n_averaged[keep])
        image = np.arange(len(rows))
    ceiling, reason = _ceiling(trials, keep, averaged=averaged)
    notes = (
        () if subject.upstream_preprocessing is None else (f"upstream preprocessing: {subject.upstream_preprocessing}",)
    )
    if "sessions" in subject.provenance:
        notes += (f"sessions: {subject.provenance['sessions']}",)
    measured = Measured(
        subject=subject.name,
        trials=responses,
        image=image,
        ceiling=ceiling,
        ceiling_reason=reason,
        families=families(subject),
        notes=notes,
        trial_reason="the data came averaged over repeats" if averaged else None,
        normalisation="standardised by the training images" if subject.session is None else preprocessing.name,
    )
    return measured, rows


def measured_legacy(
    subject: SubjectStore, split: Split, strict: Measured, *, part: Part = "test"
) -> tuple[Measured, LegacyTrials]:
    """Return what `strict` has as the protocol ``chasm-legacy`` prepares it, and the unit that it is in.

    The same images and trials, z-scored over all trials of the subject. The ceiling is the strict one, which has no
    unit.
    """
    keep = split.select(subject.image, part)
    trials = legacy_trials(subject, split, keep)
    responses = trials.responses
    if strict.trial_reason is not None:
        averaged = subject.trial_column("n_averaged")
        weight = np.ones(subject.n_trials, np.float32) if averaged is None else averaged
        _, responses, _ = average_repeats(responses, subject.image[keep], weight[keep])
    measured = replace(strict, trials=responses, normalisation="z-scored over all trials, test trials included")
    return measured, trials


def _ceiling(trials: Trials, keep: np.ndarray, *, averaged: bool) -> tuple[np.ndarray | None, str | None]:
    if averaged:
        return None, "the data came averaged over repeats, so their noise can't be told"
    _, repeats = np.unique(trials.image, return_counts=True)
    if (repeats < 2).all():
        return None, "no image was repeated"
    _, shown = np.unique(trials.image[keep], return_counts=True)
    return noise_ceiling(ncsnr(trials.responses, trials.image), shown), None
