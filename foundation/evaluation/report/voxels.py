"""The sections on single voxels: scores against the ceiling, and maps."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from foundation.evaluation.figures.brain import Scale, brain_map, how_shown
from foundation.evaluation.figures.histogram import r_against_highest, voxel_histogram
from foundation.evaluation.report.drawer import Drawer, panels
from foundation.evaluation.report.kept import FDR, Shown
from foundation.evaluation.report.markup import Markup, element, together
from foundation.evaluation.report.page import Section
from foundation.evaluation.report.tables import details, table
from foundation.evaluation.table import number


def voxel_section(subjects: Sequence[Shown], drawer: Drawer) -> Section:
    """Return histograms of voxel r, and r against the highest that a voxel could reach."""
    limits = _limits([values for of in subjects for values in of.r.values()])
    histograms = [_histogram(of, limits, drawer) for of in subjects]
    planes = [plane for of in subjects for plane in _planes(of, limits, drawer)]
    lacking = [f"{of.subject}: no ceiling, {of.ceiling_reason}." for of in subjects if of.highest_r is None]
    rows = [
        [
            of.subject,
            system,
            *(number(_quantile(r, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)),
            f"{100 * of.above_chance[system] / of.n_voxels:.0f} % ({of.above_chance[system]} of {of.n_voxels})",
        ]
        for of in subjects
        for system, r in of.r.items()
    ]
    numbers = table(
        ["subject", "system", "5 %", "25 %", "median", "75 %", "95 %", "voxels above chance"],
        rows,
        caption=f"Quantiles of voxel r over voxels, and voxels above chance (false discovery rate {FDR} over voxels)",
        n_leading=2,
        ruled=True,
    )
    return Section(
        key="voxels",
        heading="Voxels and their ceiling",
        lead="How well single voxels are predicted, and how near that is to the highest correlation that their noise "
        "allows: squares on the dashed line are as good as can be expected.",
        body=together(
            [
                panels(*histograms),
                panels(*planes) if planes else None,
                *(element("p", text) for text in lacking),
                numbers,
            ]
        ),
    )


def _histogram(of: Shown, limits: tuple[float, float], drawer: Drawer) -> Markup:
    medians = ", ".join(f"{system} {number(_quantile(values, 0.5))}" for system, values in of.r.items())
    title = f"{of.subject}, {of.n_voxels} voxels"
    return drawer.figure(
        f"voxels-{of.subject}",
        lambda path: voxel_histogram(of.r, path, highest_r=of.highest_r, title=title, limits=limits),
        alt=f"Histogram of voxel r for {of.subject}; medians: {medians}.",
    )


def _planes(of: Shown, limits: tuple[float, float], drawer: Drawer) -> list[Markup]:
    """Return a figure for each system; none where there is no ceiling."""
    highest_r = of.highest_r
    if highest_r is None:
        return []
    return [
        drawer.figure(
            f"ceiling-{of.subject}-{system}",
            partial(r_against_highest, r, highest_r, title=f"{of.subject}, {system}", limits=limits),
            alt=f"Voxels of {of.subject} by the r that {system} reaches and the highest possible r; the median voxel "
            f"reaches {number(_quantile(r, 0.5))}, the median of the highest is {number(_quantile(highest_r, 0.5))}.",
        )
        for system, r in of.r.items()
    ]


def map_section(subjects: Sequence[Shown], systems: Sequence[str], drawer: Drawer) -> Section:
    """Return maps of the leading system's r, of the highest possible r, and of the difference from the next system."""
    leading, others = systems[0], systems[1:]
    of_r = _limits([of.r[leading] for of in subjects] + [of.highest_r for of in subjects if of.highest_r is not None])
    scale = Scale(label="correlation over test images", low=0.0, high=of_r[1])
    blocks: list[Markup] = []
    reach = 0.05
    if others:
        differences = [np.abs(of.r[leading] - of.r[others[0]]) for of in subjects]
        reach = max(reach, *(_quantile(values, 0.98) or 0.0 for values in differences))
    for of in subjects:
        figures = [voxel_map(drawer, of, f"r-{leading}", of.r[leading], scale, f"{of.subject}: voxel r of {leading}")]
        if of.highest_r is not None:
            figures.append(voxel_map(drawer, of, "highest", of.highest_r, scale, f"{of.subject}: highest possible r"))
        if others:
            between = Scale(label="difference of voxel r", low=-reach, high=reach)
            change = of.r[leading] - of.r[others[0]]
            title = f"{of.subject}: difference from {others[0]}"
            figures.append(voxel_map(drawer, of, f"minus-{others[0]}", change, between, title))
        blocks += [element("h3", of.subject), element("p", how_shown(of.voxels)), panels(*figures)]
    rows = [
        [of.subject, name, str(int(mask.sum())), *(number(_quantile(of.r[s][mask], 0.5)) for s in systems)]
        for of in subjects
        for name, mask in {"all": np.ones(of.n_voxels, bool), **of.families}.items()
    ]
    numbers = table(["subject", "ROI", "voxels", *systems], rows, caption="Median voxel r", n_leading=2, ruled=True)
    return Section(
        key="maps",
        heading="Maps",
        lead=f"Where voxels are predicted well by {leading}"
        + (f", and where it differs from {others[0]} (red: {leading} is better)." if others else "."),
        body=together([*blocks, details("The numbers", numbers)]),
    )


def voxel_map(drawer: Drawer, of: Shown, name: str, values: np.ndarray, scale: Scale, title: str) -> Markup:
    """Return a map of a number per voxel."""
    median = number(_quantile(values, 0.5))
    return drawer.figure(
        f"map-{of.subject}-{name}",
        lambda path: brain_map(values, path, voxels=of.voxels, families=of.families, scale=scale, title=title),
        alt=f"Map, {title}; median {median}, {scale.label}.",
    )


def _limits(values: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return limits of r that hold almost all voxels of all subjects."""
    known = np.concatenate([v[np.isfinite(v)] for v in values])
    if not known.size:
        return -1.0, 1.0
    low, high = np.quantile(known, [0.002, 0.998])
    return min(-0.1, float(np.floor(low * 10) / 10)), max(0.2, float(np.ceil(high * 10) / 10))


def _quantile(values: np.ndarray, q: float) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.quantile(known, q)) if known.size else None
