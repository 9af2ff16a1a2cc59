"""Representational similarity as rows and as a table."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from foundation.evaluation.rsa import RsaScore
from foundation.evaluation.score import Row
from foundation.evaluation.table import new_table, number

CAPTION = (
    "Correlation over pairs of images of predicted with measured dissimilarities (1 - r of patterns over voxels), "
    "averaged over measured RDMs. [ ]: 95 % bootstrap interval over images. Noise ceiling (Nili et al. 2014): how well "
    "the measured RDMs' mean does, the one compared left out (lower) or not (upper)."
)


def rsa_rows(scores: Mapping[str, Sequence[RsaScore]], *, protocol: str = "strict") -> list[Row]:
    """Return rows by system, ceilings among them: axis ``pattern``, target ``rdm``, metric ``rsa_<method>``."""
    rows = []
    for system, of_system in scores.items():
        for s in of_system:
            place = (s.subject, s.roi, protocol, "pattern", "rdm", f"rsa_{s.method}")
            size = (s.n_images, s.n_voxels or 0)
            rows.append(Row(system, *place, s.value, s.low, s.high, *size))
    first = next(iter(scores.values()), ())
    for s in first:
        place = (s.subject, s.roi, protocol, "pattern", "rdm", f"rsa_{s.method}")
        middle = None
        if s.ceiling_low is not None and s.ceiling_high is not None:
            middle = (s.ceiling_low + s.ceiling_high) / 2
        rows.append(Row("ceiling", *place, middle, s.ceiling_low, s.ceiling_high, s.n_images, s.n_voxels or 0))
    return rows


def rsa_table(scores: Sequence[Mapping[str, Sequence[RsaScore]]]) -> Table:
    """Return a table row per subject, ROI and system; `scores` are by system, one mapping a subject."""
    table = new_table(
        "Representational similarity",
        CAPTION,
        left=("subject", "ROI", "system"),
        right=("RDM r", "noise ceiling", "RDMs", "images"),
    )
    for of_subject in scores:
        rois = list(dict.fromkeys(s.roi for of_system in of_subject.values() for s in of_system))
        for roi in rois:
            for k, (system, of_system) in enumerate(of_subject.items()):
                found = [s for s in of_system if s.roi == roi]
                if not found:
                    continue
                (s,) = found
                interval = "" if s.low is None or s.high is None else f" \\[{number(s.low)} {number(s.high)}]"
                bounds = f"{number(s.ceiling_low)} – {number(s.ceiling_high)}" if s.ceiling_low is not None else "n/a"
                leading = (s.subject, roi) if k == 0 else ("", "")
                table.add_row(*leading, system, f"{number(s.value)}{interval}", bounds, str(s.n_rdms), str(s.n_images))
        table.add_section()
    return table
