"""GLMsingle's output and LAION-fMRI's as labs have them on disk, small and generated, with the truth beside them."""

import gzip
import io
from dataclasses import dataclass
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pandas as pd
from PIL import Image

GRID = (5, 4, 3)
AFFINE = np.array([[-1.8, 0, 0, 30], [0, 1.8, 0, -40], [0, 0, 1.8, 12], [0, 0, 0, 1.0]])
N_PICTURES, SIDE = 12, 8
RUNS, PER_RUN = 2, 6
TYPED = "TYPED_FITHRF_GLMDENOISE_RR"


@dataclass(frozen=True, kw_only=True)
class Truth:
    """One subject as it was scanned; trials are in the order of scanning."""

    name: str
    betas: np.ndarray
    """(x, y, z, trial) float32."""
    mask: np.ndarray
    """(x, y, z) bool."""
    session: np.ndarray
    run: np.ndarray
    onset: np.ndarray
    picture: np.ndarray
    """Number of the picture that each trial showed."""

    @property
    def responses(self) -> np.ndarray:
        """What an import should give: (trial, voxel), voxels in the C order of the mask."""
        return np.stack([self.betas[..., t][self.mask] for t in range(self.betas.shape[-1])])


def picture(k: int) -> np.ndarray:
    """Pixels of picture `k`."""
    return np.random.default_rng(1000 + k).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def picture_name(k: int) -> str:
    return f"stim_{k:02d}.png"


def scan(name: str, *, n_sessions: int = 2, seed: int = 0) -> Truth:
    """Return a subject whose every session has two runs of six trials."""
    rng = np.random.default_rng(seed)
    n = n_sessions * RUNS * PER_RUN
    mask = rng.random(GRID) < 0.5
    betas = np.where(mask[..., None], rng.normal(size=(*GRID, n)), 0).astype(np.float32)
    return Truth(
        name=name,
        betas=betas,
        mask=mask,
        session=np.repeat(np.arange(1, n_sessions + 1), RUNS * PER_RUN),
        run=np.tile(np.repeat(np.arange(1, RUNS + 1), PER_RUN), n_sessions),
        onset=np.tile(np.arange(PER_RUN) * 4.0 + 2.5, n_sessions * RUNS),
        picture=rng.integers(0, N_PICTURES, n),
    )


def write_pictures(directory: Path, suffix: str = ".png") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for k in range(N_PICTURES):
        Image.fromarray(picture(k)).save((directory / picture_name(k)).with_suffix(suffix))


def save_nifti(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def glmsingle_dict(betas: np.ndarray) -> dict[str, object]:
    """What GLMsingle (Python) saves, in miniature: arrays, lists, None."""
    return {
        "HRFindex": np.zeros(GRID, np.int64),
        "glmbadness": None,
        "pcnum": 3,
        "noisepool": np.zeros(GRID, bool),
        "pcregressors": [np.zeros((7, 2), np.float32)],
        "betasmd": betas,
        "R2": np.full(GRID, 5, np.float32),
    }


def save_betas(directory: Path, betas: np.ndarray, kind: str) -> Path:
    """Write GLMsingle's TYPE-D output, as ``hdf5`` or ``npy``."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{TYPED}.{kind}"
    if kind == "npy":
        np.save(path, glmsingle_dict(betas))
        return path
    with h5py.File(path, "w") as file:
        for key, value in glmsingle_dict(betas).items():
            value = np.array(value) if isinstance(value, list) else value
            file.create_dataset(key, data=h5py.Empty("f") if value is None else value)
    return path


def events(truth: Truth, where: np.ndarray, **columns: object) -> pd.DataFrame:
    """Return the BIDS events of some trials, each run begun and ended by a row of fixation, in no order."""
    table = pd.DataFrame(
        {
            "onset": truth.onset[where],
            "duration": 3.0,
            "trial_type": "image",
            "stim_file": [picture_name(k) for k in truth.picture[where]],
        }
    ).assign(**columns)
    rest = table.iloc[:2].assign(onset=[0.0, 99.0], trial_type="fixation", stim_file="n/a")
    return pd.concat([table, rest]).sample(frac=1, random_state=3)


def save_table(path: Path, table: pd.DataFrame) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, sep="\t", index=False, na_rep="n/a")
    return path


def write_glmsingle(source: Path, truths: list[Truth], *, kind: str = "hdf5", per_session: bool = False) -> Path:
    """Write a lab's own scans: betas of all sessions in one file, or one each; BIDS events of each run; pictures."""
    for truth in truths:
        directory = source / truth.name
        save_nifti(directory / "mask.nii.gz", truth.mask.astype(np.uint8))
        for session in np.unique(truth.session):
            here = truth.session == session
            if per_session:
                save_betas(directory / f"ses-{session:02d}", truth.betas[..., here], kind)
            for run in np.unique(truth.run):
                name = f"{truth.name}_ses-{session:02d}_task-images_run-{run:02d}_events.tsv"
                where = np.flatnonzero(here & (truth.run == run))
                save_table(directory / f"ses-{session:02d}" / "func" / name, events(truth, where))
        if not per_session:
            save_betas(directory, truth.betas, kind)
    write_pictures(source / "stimuli")
    return source


def write_laion(source: Path, truths: list[Truth]) -> Path:
    """Write LAION-fMRI's derivatives and stimuli: statmaps, trial tables, mean R2 for a mask, an archive."""
    for truth in truths:
        directory = source / truth.name
        r2 = np.where(truth.mask, 7.5, 0).astype(np.float32)
        save_nifti(directory / f"{truth.name}_task-images_space-T1w_stat-rsquare_desc-R2mean_statmap.nii.gz", r2)
        for session in np.unique(truth.session):
            here = np.flatnonzero(truth.session == session)
            stem = f"{truth.name}_ses-{session:02d}_task-images"
            func = directory / f"ses-{session:02d}" / "func"
            path = func / f"{stem}_space-T1w_stat-effect_desc-SingletrialBetas_statmap.nii.gz"
            save_nifti(path, truth.betas[..., here])
            save_nifti(func / f"{stem}_space-T1w_desc-HRFindex_dseg.nii.gz", np.ones(GRID, np.uint8))
            table = pd.DataFrame(
                {
                    "session": f"ses-{session:02d}",
                    "run": [f"run-{run:02d}" for run in truth.run[here]],
                    "beta_index": np.arange(len(here)),
                    "label": [picture_name(k) for k in truth.picture[here]],
                }
            )
            save_table(func / f"{stem}_desc-SingletrialBetas_trials.tsv", table)
    write_archive(source / "stimuli")
    return source


def write_archive(directory: Path) -> None:
    """Write LAION-fMRI's pictures: bytes of files in an HDF5, their names in a table beside it (here: lossless)."""
    directory.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(5).permutation(N_PICTURES)
    names = [picture_name(k).removesuffix(".png") for k in order]
    pd.DataFrame({"image_name": names, "dataset": "x"}).to_csv(directory / "task-images_metadata.csv", index=False)
    with h5py.File(directory / "task-images_stimuli.h5", "w") as file:
        images = file.create_dataset("images", (N_PICTURES,), dtype=h5py.vlen_dtype(np.uint8))
        for row, k in enumerate(order):
            buffer = io.BytesIO()
            Image.fromarray(picture(k)).save(buffer, "png")
            images[row] = np.frombuffer(buffer.getvalue(), np.uint8)


def cut_gzip(path: Path) -> None:
    """Drop the last volume of a gzipped NIfTI, and leave a whole gzip file."""
    with gzip.open(path) as file:
        content = file.read()
    with gzip.open(path, "wb") as file:
        file.write(content[: -int(np.prod(GRID)) * 4])
