"""Small trees laid out as NSD is: same names, dtypes, axis orders and quirks, other numbers and sizes.

Nothing here uses the package: what a tree holds is known from how it was made. A tree of realistic sizes, to measure
an import of 40 sessions, which are one session linked 40 times::

    python -m tests.nsd_tree DIR --realistic
    /usr/bin/time -v python -m data import nsd DIR STORE --file-type hdf5 --no-pixels
"""

import argparse
import gzip
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pandas as pd
from scipy.io import savemat

BETAS = "betas_fithrf_GLMdenoise_RR"
SESSIONS_DONE = (40, 40, 32, 30, 40, 32, 40, 30)
STREAMS = ("early", "midventral", "midlateral", "midparietal", "ventral", "lateral", "parietal")
PRF = ("V1v", "V1d", "V2v", "V2d", "V3v", "V3d", "hV4")
FAMILIES = {"streams": STREAMS, "prf-visualrois": PRF, "floc-faces": ("OFA", "FFA-1")}
AFFINE = np.array([[-1.8, 0.05, 0, 70.5], [0.05, 1.8, 0.1, -90.25], [0, -0.1, 1.8, -40], [0, 0, 0, 1]])
FIRST_DAY = 737_000.4
"""A MATLAB date of 2017."""


@dataclass(frozen=True)
class DesignTruth:
    """An experiment made so that its images' roles are known.

    `of_trial` (subject, trial) has 73k ids from 0. Of the shared images all subjects see `tested` three times within
    30 sessions, which is what subjects 4 and 8 did.
    """

    ordering: np.ndarray
    images: np.ndarray
    tested: frozenset[int]
    validated: frozenset[int]

    @property
    def of_trial(self) -> np.ndarray:
        return self.images[:, self.ordering - 1] - 1

    @property
    def n_shared(self) -> int:
        return len(self.tested) + len(self.validated)

    @property
    def trials_per_session(self) -> int:
        return len(self.ordering) // 40


def make_design(
    shared: Sequence[int] = (12, 6, 4, 2), other: Sequence[int] = (119, 51, 29, 17), n_images: int = 2000, seed: int = 0
) -> DesignTruth:
    """A design by how many images are seen 3, 2, 1 and 0 times within 30 sessions; within 40 all are seen 3 times."""
    rng = np.random.default_rng(seed)
    early = np.concatenate([np.repeat((3, 2, 1, 0), counts) for counts in (shared, other)])
    n_shared, n_own = sum(shared), len(early)
    # A subject's first images are the shared ones; which of those are seen three times is scattered.
    early[:n_shared] = rng.permutation(early[:n_shared])
    numbers = np.arange(1, n_own + 1)
    ordering = np.concatenate(
        [rng.permutation(np.repeat(numbers, early)), rng.permutation(np.repeat(numbers, 3 - early))]
    )
    assert 4 * early.sum() == 3 * len(ordering), "30 of 40 sessions"
    pool = rng.permutation(n_images) + 1
    common, rest = np.sort(pool[:n_shared]), pool[n_shared : n_shared + 8 * (n_own - n_shared)]
    images = np.concatenate([np.tile(common, (8, 1)), rest.reshape(8, -1)], axis=1)
    thrice = early[:n_shared] == 3
    return DesignTruth(
        ordering, images, frozenset((common[thrice] - 1).tolist()), frozenset((common[~thrice] - 1).tolist())
    )


def real_sized_design() -> DesignTruth:
    """A design with the totals that NSD publishes of 30 sessions: 515 of 1,000 shared images are seen three times."""
    shared, every = (515, 251, 141, 93), (5445, 2401, 1363, 791)
    return make_design(shared, [a - b for a, b in zip(every, shared, strict=True)], n_images=73_000)


def experiment(root: Path) -> Path:
    """Where the files of the design are."""
    return root / "nsddata" / "experiments" / "nsd"


def write_expdesign(root: Path, design: DesignTruth) -> Path:
    path = experiment(root) / "nsd_expdesign.mat"
    path.parent.mkdir(parents=True, exist_ok=True)
    variables = {
        "masterordering": design.ordering[None],
        "subjectim": design.images,
        "sharedix": design.images[:1, : design.n_shared],
    }
    savemat(path, {name: values.astype(np.float64) for name, values in variables.items()}, do_compression=True)
    return path


def write_stim_info(root: Path, design: DesignTruth, n_images: int = 2000) -> Path:
    """The same as a table with a row an image."""
    path = experiment(root) / "nsd_stim_info_merged.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, np.ndarray] = {"cocoId": np.arange(n_images) + 500, "cocoSplit": np.full(n_images, "train2017")}
    columns |= {"nsdId": np.arange(n_images)}
    columns["shared1000"] = np.isin(np.arange(n_images), design.images[0, : design.n_shared] - 1)
    for subject in range(8):
        trials = np.zeros((n_images, 3), int)
        seen = np.zeros(n_images, int)
        for trial, image in enumerate(design.of_trial[subject]):
            trials[image, seen[image]] = trial + 1
            seen[image] += 1
        columns |= {f"subject{subject + 1}": (seen > 0).astype(int)}
        columns |= {f"subject{subject + 1}_rep{r}": trials[:, r] for r in range(3)}
    pd.DataFrame(columns).to_csv(path)
    return path


def write_responses(root: Path, design: DesignTruth, name: str, n_sessions: int) -> Path:
    """The subject's behaviour; trials are 4 s apart, and a run begins 60 s after the one before it ended."""
    number, n = int(name[4:]), design.trials_per_session
    path = root / "nsddata" / "ppdata" / name / "behav" / "responses.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    shown, rows = design.of_trial[number - 1], []
    for session in range(1, n_sessions + 1):
        run = [1 + k for k in range(12) for _ in range(-(-n // 12) if k % 2 == 0 else n // 12)]
        for t in range(n):
            image = shown[(session - 1) * n + t] + 1
            seconds = 4 * t + 60 * (run[t] - 1)
            rows.append(
                {
                    "SUBJECT": number,
                    "SESSION": session,
                    "RUN": run[t],
                    "TRIAL": t - run.index(run[t]) + 1,
                    "73KID": image,
                }
                | {"10KID": 1, "TIME": repr(FIRST_DAY + session * 7 + seconds / 86_400), "ISOLD": 0, "RT": float("nan")}
            )
    pd.DataFrame(rows).to_csv(path, sep="\t", index=False)
    return path


def write_nifti(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE, *, slope: float | None = None) -> Path:
    """A NIfTI of the raw `data`; `slope` goes into the header alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(data, affine)
    image.header.set_data_dtype(data.dtype)
    if slope is None:
        nib.save(image, path)
        return path
    raw = bytearray(image.to_bytes())
    raw[112:116] = np.float32(slope).tobytes()
    path.write_bytes(gzip.compress(bytes(raw)))
    return path


def write_hdf5_betas(path: Path, data: np.ndarray) -> Path:
    """Betas (x, y, z, trial) as MATLAB writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("betas", data=data.transpose(3, 2, 1, 0), chunks=(data.shape[3], 1, 1, 1))
    return path


def write_mgh(path: Path, data: np.ndarray) -> Path:
    """A hemisphere's values, (vertex,) or (vertex, trial)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = nib.MGHImage(data.reshape(len(data), 1, 1, *data.shape[1:]), np.eye(4)).to_bytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".mgz" else raw)
    return path


def write_ctab(path: Path, names: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{k} {name}\t\n" for k, name in enumerate(["Unknown", *names])))
    return path


def write_pictures(root: Path, n_images: int = 2000, seed: int = 3) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (n_images, 5, 7, 3), np.uint8)
    path = root / "nsddata_stimuli" / "stimuli" / "nsd" / "nsd_stimuli.hdf5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["imgBrick"] = pixels
    return pixels


def betas_directory(root: Path, name: str, space: str = "func1pt8mm") -> Path:
    return root / "nsddata_betas" / "ppdata" / name / space / BETAS


def roi_directory(root: Path, name: str) -> Path:
    return root / "nsddata" / "ppdata" / name / "func1pt8mm" / "roi"


def write_volume_subject(
    root: Path,
    design: DesignTruth,
    name: str,
    sessions: Sequence[int],
    *,
    shape: tuple[int, int, int] = (5, 7, 6),
    kinds: Sequence[str] = ("nii.gz", "hdf5"),
) -> None:
    """A subject in native space; half of the volume is -1 in `nsdgeneral`, a fifth is the mask."""
    rng = np.random.default_rng(int(name[4:]))
    nsdgeneral = rng.permutation(np.resize([-1, -1, 0, 1, 0, -1, -1, 0, 1, -1], int(np.prod(shape)))).reshape(shape)
    write_nifti(roi_directory(root, name) / "nsdgeneral.nii.gz", nsdgeneral.astype(np.float32))
    write_nifti(roi_directory(root, name).parent / "brainmask.nii.gz", (nsdgeneral >= 0).astype(np.int16))
    for family, names in FAMILIES.items():
        labels = rng.integers(-1, len(names) + 1, shape).astype(np.int16)
        write_nifti(roi_directory(root, name) / f"{family}.nii.gz", labels)
        for side in ("lh", "rh"):
            write_nifti(roi_directory(root, name) / f"{side}.{family}.nii.gz", labels)
        write_ctab(root / "nsddata" / "freesurfer" / name / "label" / f"{family}.mgz.ctab", names)
    directory = betas_directory(root, name)
    write_nifti(directory / "ncsnr.nii.gz", rng.random(shape).astype(np.float32))
    write_responses(root, design, name, SESSIONS_DONE[int(name[4:]) - 1])
    for session in sessions:
        data = rng.integers(-3000, 3000, (*shape, design.trials_per_session), np.int16)
        if "nii.gz" in kinds:
            write_nifti(directory / f"betas_session{session:02d}.nii.gz", data)
        if "hdf5" in kinds:
            write_hdf5_betas(directory / f"betas_session{session:02d}.hdf5", data)


def write_surface_subject(
    root: Path, design: DesignTruth, name: str, sessions: Sequence[int], *, n_vertices: tuple[int, int] = (11, 9)
) -> None:
    """A subject on a tiny fsaverage; session 2 has no data in the left vertex 3."""
    rng = np.random.default_rng(100 + int(name[4:]))
    directory, labels = (
        betas_directory(root, name, "fsaverage"),
        root / "nsddata" / "freesurfer" / "fsaverage" / "label",
    )
    write_responses(root, design, name, SESSIONS_DONE[int(name[4:]) - 1])
    for side, n in zip(("lh", "rh"), n_vertices, strict=True):
        write_mgh(
            labels / f"{side}.nsdgeneral.mgz",
            np.where(np.arange(n) % 4 == 3, 1, np.arange(n) % 3 - 1).astype(np.float32),
        )
        write_mgh(labels / f"{side}.streams.mgz", (np.arange(n) % 8).astype(np.float32))
        write_mgh(directory / f"{side}.ncsnr.mgh", rng.random(n).astype(np.float32))
        for session in sessions:
            data = rng.normal(size=(n, design.trials_per_session)).astype(np.float32)
            if session == 2 and side == "lh":
                data[3] = np.nan
            write_mgh(directory / f"{side}.betas_session{session:02d}.mgh", data)
    write_ctab(labels / "streams.mgz.ctab", STREAMS)


def write_tree(
    root: Path, sessions: Mapping[str, Sequence[int]], *, kinds: Sequence[str] = ("nii.gz", "hdf5"), csv: bool = True
) -> DesignTruth:
    """A whole tree of subjects in native space, each with its sessions, and what its design is."""
    design = make_design()
    write_expdesign(root, design)
    if csv:
        write_stim_info(root, design)
    write_pictures(root)
    for k, (name, numbers) in enumerate(sessions.items()):
        write_volume_subject(root, design, name, numbers, shape=(5 + k, 7, 6), kinds=kinds)
    return design


# -- realistic sizes ---------------------------------------------------------------------------------------------------


def write_realistic_tree(root: Path, *, shape: tuple[int, int, int] = (81, 104, 83), n_voxels: int = 15_724) -> None:
    """subj01 in its real sizes: 40 sessions of 750 trials, all of them links to one; no pictures."""
    design, rng = real_sized_design(), np.random.default_rng(0)
    n_trials = design.trials_per_session
    write_expdesign(root, design)
    write_responses(root, design, "subj01", 40)
    radius = np.linalg.norm(np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")), axis=0)
    brain = radius < 0.9
    shell = np.argwhere(brain & (radius > 0.72))
    posterior = shell[np.argsort(shell[:, 1], kind="stable")[:n_voxels]]
    nsdgeneral = np.where(brain, 0, -1).astype(np.int16)
    nsdgeneral[tuple(posterior.T)] = 1
    write_nifti(roi_directory(root, "subj01") / "nsdgeneral.nii.gz", nsdgeneral)
    directory = betas_directory(root, "subj01")
    data = np.zeros((*shape, n_trials), np.int16, order="F")
    for trial in range(n_trials):
        data[..., trial][brain] = rng.normal(0, 600, int(brain.sum())).astype(np.int16)
    write_nifti(directory / "betas_session01.nii.gz", data)
    with h5py.File(directory / "betas_session01.hdf5", "w") as file:
        betas = file.create_dataset("betas", (n_trials, *shape[::-1]), np.int16, chunks=(n_trials, 1, 1, 1))
        for z in range(shape[2]):
            betas[:, z] = data[:, :, z].transpose(2, 1, 0)
    for suffix in ("nii.gz", "hdf5"):
        for session in range(2, 41):
            os.link(directory / f"betas_session01.{suffix}", directory / f"betas_session{session:02d}.{suffix}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--realistic", action="store_true", help="one subject in real sizes; 3 GB")
    options = parser.parse_args()
    if options.realistic:
        write_realistic_tree(options.directory)
    else:
        write_tree(options.directory, {"subj01": range(1, 4), "subj05": (1, 2)})
