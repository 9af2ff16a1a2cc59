"""A small copy of the MindEye2 release: names, keys, dtypes, axis orders and quirks of the real one, but few."""

import io
import tarfile
from pathlib import Path

import h5py
import numpy as np

N_IMAGES = 73_000
TRIALS_PER_SESSION = 750
SIDE = 2


def pictures(nsd_ids: np.ndarray) -> np.ndarray:
    """The pixels of images, as (image, SIDE, SIDE, 3) uint8; all 256 values occur."""
    places = np.arange(SIDE * SIDE * 3).reshape(SIDE, SIDE, 3)
    return ((np.asarray(nsd_ids)[:, None, None, None] * 31 + places * 7) % 256).astype(np.uint8)


def write_pictures(path: Path, *, rows_per_chunk: int | None = 64) -> None:
    """Write all 73,000 pictures as the release has them: channels first, half precision, 0 to 1."""
    with h5py.File(path, "w") as file:
        chunks = None if rows_per_chunk is None else (rows_per_chunk, 3, SIDE, SIDE)
        scaled = pictures(np.arange(N_IMAGES)).transpose(0, 3, 1, 2) / 255
        file.create_dataset("images", data=scaled.astype(np.float16), chunks=chunks)


def behav(image: int, trial: int, *, shared: bool = False, n: int = 1) -> np.ndarray:
    """A sample's table: 73k id from 0, row of the betas, flag of the shared images; -1 elsewhere."""
    table = np.full((n, 17), -1.0)
    table[0, [0, 5, 16]] = image, trial, shared
    return table


def write_tar(path: Path, samples: list[dict[str, np.ndarray]]) -> None:
    """Write a webdataset tar: member ``sample%09d.KEY.npy`` for each key of each sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for k, sample in enumerate(samples):
            for key, values in sample.items():
                buffer = io.BytesIO()
                np.save(buffer, values)
                member = tarfile.TarInfo(f"sample{k:09d}.{key}.npy")
                member.size = buffer.tell()
                buffer.seek(0)
                archive.addfile(member, buffer)


def make_mindeye_subject(
    root: Path, name: str, image: np.ndarray, shared: set[int], *, n_voxels: int = 4, seed: int = 0
) -> None:
    """Write one subject whose trial t showed ``image[t]`` (73k id from 0): betas, and tars as in ``wds``."""
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    with h5py.File(root / f"betas_all_{name}_fp32_renorm.hdf5", "w") as file:
        betas = rng.normal(size=(len(image), n_voxels)).astype(np.float32)
        file.create_dataset("betas", data=betas, chunks=(100, n_voxels))

    def sample(trial: int) -> dict[str, np.ndarray]:
        table = behav(int(image[trial]), trial, shared=int(image[trial]) in shared)
        past = np.full((15, 17), -1.0)
        earlier = np.flatnonzero(image[:trial] == image[trial])
        olds = np.full((3, 17), -1.0)
        for k, old in enumerate(earlier[:3]):
            olds[k] = behav(int(image[old]), int(old))[0]
        return {"behav": table, "past_behav": past, "future_behav": past, "olds_behav": olds}

    is_shared = np.array([int(i) in shared for i in image])
    for session in range(-(-len(image) // TRIALS_PER_SESSION)):
        trials = np.arange(session * TRIALS_PER_SESSION, min((session + 1) * TRIALS_PER_SESSION, len(image)))
        write_tar(root / "wds" / name / "train" / f"{session}.tar", [sample(t) for t in trials[~is_shared[trials]]])
    tested = np.flatnonzero(is_shared)
    write_tar(root / "wds" / name / "new_test" / "0.tar", [sample(t) for t in tested])
    write_tar(root / "wds" / name / "test" / "0.tar", [sample(t) for t in tested[: len(tested) * 2 // 3]])


def write_indices(root: Path, image: dict[str, np.ndarray]) -> None:
    """Write the 73k id of each trial of each subject."""
    with h5py.File(root / "COCO_73k_subj_indices.hdf5", "w") as file:
        for name, of_trial in image.items():
            file.create_dataset(name, data=of_trial.astype(np.int64))


def write_shared(root: Path, shared: set[int]) -> None:
    """Write which of the 73k images are shared."""
    np.save(root / "shared1000.npy", np.isin(np.arange(N_IMAGES), list(shared)))
