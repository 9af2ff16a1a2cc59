"""ROI families early, mid and higher, from the labels that a data set brings; never from ranges of indices."""

import numpy as np

from data.store import SubjectStore

EARLY = ("V1v", "V1d", "V2v", "V2d", "V3v", "V3d")
MID = ("hV4", "midventral", "midlateral", "midparietal")
HIGHER = ("ventral", "lateral", "parietal")


def families(subject: SubjectStore) -> dict[str, np.ndarray]:
    """Return (voxel,) masks of the families that the subject's labels define; empty where it has none.

    `prf-visualrois` (V1 to V3: early; hV4: mid) has the first word, `streams` (mid*: mid; ventral, lateral, parietal:
    higher) speaks for the voxels it leaves open.
    """
    retinotopic, streams = subject.rois.get("prf-visualrois"), subject.rois.get("streams")
    if retinotopic is None and streams is None:
        return {}
    nothing = np.zeros(subject.n_voxels, bool)
    early = nothing if retinotopic is None else retinotopic.mask(*EARLY)
    v4 = nothing if retinotopic is None else retinotopic.mask("hV4")
    taken = early | v4
    mid = v4 | (nothing if streams is None else streams.mask(*MID) & ~taken)
    higher = nothing if streams is None else streams.mask(*HIGHER) & ~taken
    found = {"early": early, "mid": mid, "higher": higher}
    return {name: mask for name, mask in found.items() if mask.any()}
