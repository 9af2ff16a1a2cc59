"""Simulated subjects with known truth, written through the same store as measured ones.

`write_phantom` makes a store of NSD's shape: shared and own images, sessions in the order of scanning, betas as int16
in 1/300 percent signal change, retinotopic and stream ROIs. Beside `NAME.zarr` it writes `NAME.truth.zarr`, what no
scanner tells (`data.phantom.truth`).

A subject's randomness depends on the seed and the subject's number alone: subject 1 of eight is subject 1 of two.
"""

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int16, UInt8

from data.phantom.cortex import Cortex, dealt_out, draw_cortex, selective_rois
from data.phantom.design import ImageCounts, TrialTable, count_images, draw_trials
from data.phantom.images import ImageLabels, join_labels
from data.phantom.responses import (
    Population,
    draw_common_tuning,
    draw_noise,
    draw_population,
    energy_maps,
    noise_free_signal,
)
from data.phantom.stimuli import InventedStimuli, PhotographStimuli, read_photographs
from data.phantom.truth import SubjectTruth, Truth, truth_path, write_truth
from data.schema import pixel_identity
from data.sources import ImageBlock, SubjectData
from data.store import PooledStore
from data.voxels import Rois

SCALE = 1 / 300
UNIT = "percent signal change"
_SMALLEST = {"subjects": 1, "sessions": 1, "trials_per_session": 8, "voxels": 20, "repeats": 1, "seed": 0}
_SESSION_GAIN, _SESSION_OFFSET = 0.15, 0.5
_SELECTIVE = 0.8
_FLOC = {
    "floc-faces": ("face", "OFA", "FFA-1"),
    "floc-places": ("building", "OPA", "PPA"),
    "floc-bodies": ("person", "EBA", "FBA-1"),
    "floc-words": ("text", "OWFA", "VWFA-1"),
}
# Streams of random numbers under the phantom's seed; the third number is the subject's, 0 for what is shared.
_COMMON, _CORTEX, _POPULATION, _TRIALS, _NOISE, _LABELS = range(6)


@dataclass(frozen=True, kw_only=True)
class PhantomConfig:
    """Size and seed of a phantom.

    Raises
    ------
    ValueError
        If an option is out of range or the trials don't suffice for all image roles.
    """

    subjects: int = 8
    """Number of subjects, named subj01 onwards."""
    sessions: int = 3
    """Scan sessions of each subject."""
    trials_per_session: int = 200
    """Trials in each session."""
    voxels: int = 400
    """Voxels of each subject."""
    repeats: int = 3
    """Presentations of each test image; validation and train images are shown twice, or once where this is 1."""
    images: Path | None = None
    """Folder of photographs in place of invented pictures; without a labels.csv in it, only V1 to V3 are simulated."""
    specialised: bool = True
    """Whether areas differ; False: labels are dealt out to voxels at random, so that no area differs from another."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        for name, smallest in _SMALLEST.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {smallest}")
        count_images(n_trials=self.n_trials, repeats=self.repeats)

    @property
    def n_trials(self) -> int:
        """Trials of one subject."""
        return self.sessions * self.trials_per_session

    def as_json(self) -> dict[str, Any]:
        """Return the settings with the folder as text."""
        return dataclasses.asdict(self) | {"images": None if self.images is None else str(self.images)}

    def rng(self, stream: int, number: int = 0) -> np.random.Generator:
        """Return the generator of one stream of randomness, of one subject where `number` is given."""
        return np.random.default_rng([self.seed, stream, number])


PRESETS = {"tiny": PhantomConfig(), "standard": PhantomConfig(sessions=10, voxels=1400)}


def write_phantom(path: str | Path, config: PhantomConfig) -> None:
    """Simulate subjects and write them to a new store, and the truth beside it.

    Raises
    ------
    ValueError
        If the store or its truth exists, the path is a URL, or the photographs don't suffice.
    """
    if "://" in str(path):
        raise ValueError(f"{path} is a URL; a phantom is written to a local path, copy it from there")
    path = Path(path)
    for there in (path, truth_path(path)):
        if there.exists():
            raise ValueError(f"{there} exists already; choose another path or remove it first")
    # Under another name until everything is in it: a phantom is there whole or not at all.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        truth = _simulate(unfinished, path.name.removesuffix(".zarr"), config)
        write_truth(truth_path(unfinished), truth)
        os.rename(truth_path(unfinished), truth_path(path))
        os.rename(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(truth_path(unfinished), ignore_errors=True)


def _simulate(path: Path, name: str, config: PhantomConfig) -> Truth:
    stimuli, counts = _stimuli(config)
    common = draw_common_tuning(stimuli.n_content, rng=config.rng(_COMMON))
    provenance = {"made_by": "data.phantom", "config": config.as_json()}
    store = PooledStore.create(path, name=name, provenance=provenance)

    pixels, labels = stimuli.shared()
    roles = ["test"] * counts.test + ["validation"] * counts.validation
    shared_rows = store.add_images(_block(pixels, roles))
    shared_maps = energy_maps(pixels, common)
    rows_of_labels = [(shared_rows, labels)]
    subjects = {}
    for number in range(1, config.subjects + 1):
        own_pixels, own_labels = stimuli.own(number)
        own_rows = store.add_images(_block(own_pixels, ["train"] * len(own_pixels)))
        rows_of_labels.append((own_rows, own_labels))
        seen = None if labels is None or own_labels is None else join_labels([labels, own_labels])

        cortex = draw_cortex(config.voxels, rng=config.rng(_CORTEX, number), early_only=labels is None)
        population = draw_population(cortex, common, rng=config.rng(_POPULATION, number))
        maps = np.concatenate([shared_maps, energy_maps(own_pixels, common)])
        signal = noise_free_signal(maps, seen, population)
        rows = np.concatenate([shared_rows, own_rows]).astype(np.int32)
        trials = draw_trials(counts, trials_per_session=config.trials_per_session, rng=config.rng(_TRIALS, number))
        rois = _rois(cortex, population, stimuli.category_names)
        if not config.specialised:
            rois = dealt_out(rois, rng=config.rng(_LABELS, number))
        subject = f"subj{number:02d}"
        store.add_subject(
            SubjectData(
                name=subject,
                responses=_measure(signal, trials, population, rng=config.rng(_NOISE, number)),
                scale=SCALE,
                unit=UNIT,
                image=rows[trials.image],
                session=trials.session,
                run=trials.run,
                repeat=trials.repeat,
                coordinates=cortex.coordinates,
                rois=rois,
                provenance={"made_by": "data.phantom", "subject": number},
            )
        )
        subjects[subject] = _truth(rows, signal, population, test_repeats=counts.test_repeats)
    return Truth(config=config.as_json(), subjects=subjects, labels=_in_store_order(rows_of_labels))


def _stimuli(config: PhantomConfig) -> tuple[InventedStimuli | PhotographStimuli, ImageCounts]:
    if config.images is None:
        counts = count_images(n_trials=config.n_trials, repeats=config.repeats)
        return InventedStimuli(counts, seed=config.seed), counts
    stock = read_photographs(Path(config.images))
    counts = count_images(n_trials=config.n_trials, repeats=config.repeats, n_available=len(stock[0]))
    return PhotographStimuli(stock, counts, n_subjects=config.subjects, seed=config.seed), counts


def _block(pixels: UInt8[np.ndarray, "image 128 128 3"], roles: list[str]) -> ImageBlock:
    return ImageBlock(ids=[pixel_identity(picture) for picture in pixels], pixels=pixels, roles=roles)


def _measure(
    signal: Float[np.ndarray, "image voxel"], trials: TrialTable, population: Population, *, rng: np.random.Generator
) -> Int16[np.ndarray, "trial voxel"]:
    """Betas: signal and noise of each trial, times the session's gain, over its offset; in units of `SCALE`."""
    n_sessions, n_voxels = int(trials.session.max()), signal.shape[1]
    noise = draw_noise(trials.session, population.cortex, rng=rng) / population.ncsnr
    whole_brain = rng.standard_normal((n_sessions, 1))
    gain = np.exp(_SESSION_GAIN * (0.8 * whole_brain + 0.6 * rng.standard_normal((n_sessions, n_voxels))))
    offset = population.baseline + _SESSION_OFFSET * population.amplitude * rng.standard_normal((n_sessions, n_voxels))
    session = trials.session - 1
    percent = offset[session] + gain[session] * population.amplitude * (signal[trials.image] + noise)
    limit = np.iinfo(np.int16).max
    return np.clip(np.rint(percent / SCALE), -limit, limit).astype(np.int16)


def _rois(cortex: Cortex, population: Population, category_names: tuple[str, ...]) -> dict[str, Rois]:
    """NSD's label families; the functional localisers only where the images have such categories."""
    rois = {"prf-visualrois": cortex.retinotopic, "streams": cortex.streams}
    n_categories = len(category_names)
    for family, (category, lateral_name, ventral_name) in _FLOC.items():
        if category not in category_names or n_categories < 2:
            continue
        tuning = population.content[:, :n_categories]
        wanted = tuning[:, category_names.index(category)]
        others = (tuning.sum(axis=1) - wanted) / (n_categories - 1)
        selective = (wanted - others > _SELECTIVE) & (population.content_share > 0.5)
        rois[family] = selective_rois(cortex, selective, lateral_name=lateral_name, ventral_name=ventral_name)
    return rois


def _truth(
    rows: np.ndarray, signal: Float[np.ndarray, "image voxel"], population: Population, *, test_repeats: int
) -> SubjectTruth:
    ncsnr2 = population.ncsnr**2
    return SubjectTruth(
        image=rows,
        signal=signal.astype(np.float32),
        receptive_field=population.cortex.receptive_field,
        hierarchy=population.cortex.hierarchy,
        content_share=population.content_share,
        ncsnr=population.ncsnr,
        ceiling=np.sqrt(ncsnr2 / (ncsnr2 + 1 / test_repeats)),
        amplitude=population.amplitude,
        early=population.early,
        content=population.content,
    )


def _in_store_order(parts: list[tuple[np.ndarray, ImageLabels | None]]) -> ImageLabels | None:
    """Labels of the store's images, each image once."""
    known = [labels for _, labels in parts if labels is not None]
    if not known:
        return None
    _, first = np.unique(np.concatenate([rows for rows, _ in parts]), return_index=True)
    return join_labels(known).select(first)
