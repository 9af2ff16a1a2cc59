"""A small copy of the Algonauts 2023 challenge: names, dtypes, shapes and quirks of the real one, few of everything."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

FSAVERAGE = 163_842
COUNTS = {"lh": 6, "rh": 9}
NAMES = {
    "prf-visualrois": ["V1v", "V1d", "V2v", "V2d", "V3v", "V3d", "hV4"],
    "floc-bodies": ["EBA", "FBA-1", "FBA-2", "mTL-bodies"],
    "floc-faces": ["OFA", "FFA-1", "FFA-2", "mTL-faces", "aTL-faces"],
    "floc-places": ["OPA", "PPA", "RSC"],
    "floc-words": ["OWFA", "VWFA-1", "VWFA-2", "mfs-words", "mTL-words"],
    "streams": ["early", "midventral", "midlateral", "midparietal", "ventral", "lateral", "parietal"],
}


def picture(nsd_id: int, side: int = 6) -> np.ndarray:
    """The pixels of an image, as (side, side, 3) uint8."""
    return np.random.default_rng([73, nsd_id]).integers(0, 256, (side, side, 3), np.uint8)


def make_algonauts_subject(root: Path, name: str, nsd_ids: Sequence[int], *, seed: int = 0) -> Path:
    """Write one subject, whose row i is the response to ``nsd_ids[i]``; returns its directory."""
    rng = np.random.default_rng(seed)
    directory = root / name
    responses, pictures, tests, masks = (
        directory / part
        for part in (
            "training_split/training_fmri",
            "training_split/training_images",
            "test_split/test_images",
            "roi_masks",
        )
    )
    for folder in (responses, pictures, tests, masks):
        folder.mkdir(parents=True)
    for side, count in COUNTS.items():
        np.save(responses / f"{side}_training_fmri.npy", rng.normal(size=(len(nsd_ids), count)).astype(np.float32))
        on_surface = np.zeros(FSAVERAGE, np.int64)
        on_surface[rng.choice(FSAVERAGE, count, replace=False)] = 1
        np.save(masks / f"{side}.all-vertices_fsaverage_space.npy", on_surface)
        for family, names in NAMES.items():
            labels = rng.integers(0, len(names) + 1, count)
            whole = np.zeros(FSAVERAGE, np.int64)
            whole[np.flatnonzero(on_surface)] = labels
            np.save(masks / f"{side}.{family}_challenge_space.npy", labels)
            np.save(masks / f"{side}.{family}_fsaverage_space.npy", whole)
    for family, names in NAMES.items():
        np.save(masks / f"mapping_{family}.npy", dict(enumerate(["Unknown", *names])), allow_pickle=True)
    for row, nsd_id in enumerate(nsd_ids):
        Image.fromarray(picture(nsd_id)).save(pictures / f"train-{row + 1:04d}_nsd-{nsd_id:05d}.png")
    Image.fromarray(picture(72_999)).save(tests / "test-0001_nsd-72999.png")
    return directory
