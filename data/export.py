"""Maps of a subject's voxels, by name, written as the field's files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.nifti import label_path, surface_paths, write_label_names, write_surface, write_volume, written_whole
from data.noise_ceiling import ncsnr, noise_ceiling, split_half_reliability
from data.parcels import make_parcels, parse_parcels
from data.preprocess import samples, standardised_voxels
from data.splits import Split, split_of
from data.store import PooledStore, SubjectStore
from data.voxels import Surface, Volume

COMPUTED = {
    "mean": "mean over all trials, in the subject's unit",
    "sd": "standard deviation over all trials, in the subject's unit",
    "ncsnr": "signal-to-noise ratio from all repeats, trials standardised per session",
    "noise-ceiling": "share of the variance of the test images' means that is signal",
    "split-half": "reliability of the mean of repeats, from twenty random halves (seed 0)",
}
BLOCK_BYTES = 2**29
"""Bytes of the standardised trials in memory at a time; reading and standardising them need some four times that."""
SUFFIXES = (".nii", ".nii.gz", ".gii", ".npy")
Labels = tuple[np.ndarray, dict[int, str]]


def map_names(subject: SubjectStore) -> list[str]:
    """Return the names of the maps that a subject has, beside ``parcels:SPEC`` for any parcels that can be made."""
    published = [f"published:{name}" for name in sorted(subject.voxels.reliability)]
    return [*COMPUTED, *published, *(f"roi:{family}" for family in sorted(subject.rois))]


def export_map(store: PooledStore, subject: str | int, name: str, out: Path, *, overwrite: bool = False) -> list[Path]:
    """Write a voxel map and return the paths: ``.nii`` and ``.nii.gz`` for volumes, ``.gii`` for surfaces, ``.npy``.

    Maps are those of `COMPUTED`, ``published:NAME`` (what a data set publishes), ``roi:FAMILY`` and ``parcels:SPEC``
    (as in `data.parcels`, numbered from 1; ``functional`` from all sessions' training images, seed 0). The last two
    come with a table of names, ``.tsv``. ``ncsnr``, ``noise-ceiling`` and ``split-half`` are for reports: they look at
    test trials.

    Raises
    ------
    ValueError
        If there is no such map, the file is there already, or its format doesn't suit where the voxels lie.
    """
    found = store.subject(subject)
    place = found.voxels.place
    targets = _targets(out, place, found.name)
    has_names = name.startswith(("roi:", "parcels:"))
    targets += [label_path(out)] if has_names else []
    if not overwrite and (there := [path for path in targets if path.exists()]):
        raise ValueError(f"{there[0]} exists already; choose another name or pass --overwrite")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is not a directory; make it first")
    values, names = _labels(store, found, name) if has_names else (_values(store, found, name), {})
    if isinstance(place, Volume) and out.suffix != ".npy":
        write_volume(out, values, place)
    elif isinstance(place, Surface) and out.suffix != ".npy":
        write_surface(out, values, place)
    else:
        _write_npy(out, values)
    if has_names:
        write_label_names(out, names)
    return targets


def _targets(out: Path, place: Volume | Surface | None, subject: str) -> list[Path]:
    """Return the files that a map goes to, or say why it can't."""
    if not out.name.endswith(SUFFIXES):
        raise ValueError(f"{out} must end with one of {', '.join(SUFFIXES)}, which says the format")
    if out.suffix == ".npy":
        return [out]
    surface_file = out.suffix == ".gii"
    if place is None:
        raise ValueError(
            f"{subject}'s voxels have no place in a volume or on a surface; write {out.with_suffix('.npy')}"
        )
    if isinstance(place, Surface) and not surface_file:
        raise ValueError(f"{subject}'s voxels lie on a surface ({place.space}), which NIfTI doesn't hold; name a .gii")
    if isinstance(place, Volume) and surface_file:
        raise ValueError(f"{subject}'s voxels lie in a volume, which GIFTI doesn't hold; name a .nii.gz")
    return surface_paths(out) if surface_file else [out]


def _values(store: PooledStore, subject: SubjectStore, name: str) -> np.ndarray:
    if name in ("mean", "sd"):
        mean, sd = _moments(subject)
        return mean if name == "mean" else sd
    if name.startswith("published:") and name.removeprefix("published:") in subject.voxels.reliability:
        return subject.voxels.reliability[name.removeprefix("published:")]
    if name not in COMPUTED:
        raise ValueError(
            f"{subject.name} has no map {name!r}; it has {', '.join(map_names(subject))} and parcels:SPEC (compact:30)"
        )
    _check_repeats(subject, name)
    split = split_of(store)
    shown = np.unique(subject.image[split.select(subject.image, "test")], return_counts=True)[1]
    if name == "noise-ceiling" and not len(shown):
        raise ValueError(f"{subject.name} saw no test image, so there is no ceiling of theirs; ask for ncsnr")
    if name == "split-half":  # seeded anew for each block, so that all voxels have the same halves
        return _by_blocks(
            subject, split, lambda y: split_half_reliability(y, subject.image, rng=np.random.default_rng(0))
        )
    ratio = _by_blocks(subject, split, lambda y: ncsnr(y, subject.image))
    return ratio if name == "ncsnr" else noise_ceiling(ratio, shown)


def _by_blocks(subject: SubjectStore, split: Split, of_trials: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return a number per voxel from all standardised trials, as many voxels at a time as fit into `BLOCK_BYTES`."""
    size = max(1, BLOCK_BYTES // (4 * subject.n_trials))
    voxels = np.arange(subject.n_voxels)
    blocks = [voxels[start : start + size] for start in range(0, len(voxels), size)]
    return np.concatenate([of_trials(standardised_voxels(subject, split, block)) for block in blocks])


def _check_repeats(subject: SubjectStore, name: str) -> None:
    averaged = subject.trial_column("n_averaged")
    if averaged is not None and (averaged > 1).any():
        raise ValueError(f"{subject.name} came averaged over repeats, so its noise can't be told: no map {name!r}")
    if (np.unique(subject.image, return_counts=True)[1] < 2).all():
        raise ValueError(f"{subject.name} saw no image twice, so its noise can't be told: no map {name!r}")


def _moments(subject: SubjectStore) -> tuple[np.ndarray, np.ndarray]:
    """Return each voxel's mean and standard deviation over all trials, a session in memory at a time."""
    session = np.ones(subject.n_trials) if subject.session is None else subject.session
    total, squares, n = np.zeros(subject.n_voxels), np.zeros(subject.n_voxels), 0
    shift = None
    for number in np.unique(session):
        here = subject.responses(np.flatnonzero(session == number)).astype(np.float64)
        shift = here.mean(0) if shift is None else shift  # squares of small numbers: nothing cancels
        here -= shift
        total += here.sum(0)
        squares += (here**2).sum(0)
        n += len(here)
    assert shift is not None
    return shift + total / n, np.sqrt(np.maximum(squares / n - (total / n) ** 2, 0))


def _labels(store: PooledStore, subject: SubjectStore, name: str) -> Labels:
    """Return labels, 0 for "in none", and their names."""
    kind, _, what = name.partition(":")
    if kind == "roi":
        if what not in subject.rois:
            raise ValueError(f"{subject.name} has no map {name!r}; it has {', '.join(map_names(subject))}")
        return subject.rois[what].labels, subject.rois[what].names
    spec = parse_parcels(what)
    if spec.kind == "functional":
        split = split_of(store)
        given = {"responses": samples(subject, split, "train"), "split_digest": split.digest_of(subject.image)}
    else:
        given = {}
    made = make_parcels(spec, subject.voxels, **given)
    return made.labels + 1, {k + 1: label for k, label in enumerate(made.names)}


def _write_npy(path: Path, values: np.ndarray) -> None:
    with written_whole(path) as draft, draft.open("wb") as file:
        np.save(file, values)
