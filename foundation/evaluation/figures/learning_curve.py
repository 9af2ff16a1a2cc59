"""The learning curve: scores over the sessions that were learned from, and the gain over ridge on its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from foundation.evaluation.curve import REFERENCE, CurveRow, curve_rows
from foundation.evaluation.figures.canvas import DPI, Look, looks, new_figure
from foundation.evaluation.figures.panel import legend_columns
from foundation.evaluation.score import CEILING, Scores


def learning_curve(
    points: Sequence[tuple[int, Scores]], path: Path, *, n_train: Mapping[int, int] | None = None
) -> None:
    """Draw the curve of scores, as `draw_curve` does.

    Parameters
    ----------
    points
        Numbers of sessions, and the scores of systems that learned from so many.
    n_train
        Training images by number of sessions, for a second line of labels.

    Raises
    ------
    ValueError
        If there is no point, or one stands twice (`foundation.evaluation.curve.curve_rows`).
    """
    draw_curve(curve_rows(points, n_train=n_train), path)


def draw_curve(rows: Sequence[CurveRow], path: Path) -> None:
    """Draw a curve per system with its interval as a band, and below it the paired gain over ridge, as a picture.

    A column of panels per subject; the rows are those of a run's ``curve.json``.
    """
    subjects = list(dict.fromkeys(row.subject for row in rows))
    drawn_as = looks(row.system for row in rows)
    figure = new_figure(1.2 + 3.2 * len(subjects), 6.6)
    axes = figure.subplots(2, len(subjects), sharex="col", sharey="row", squeeze=False, height_ratios=[3, 2])
    for (above, below), subject in zip(axes.T, subjects, strict=True):
        mine = [row for row in rows if row.subject == subject]
        for system, look in drawn_as.items():
            of_system = [row for row in mine if row.system == system]
            _line(above, [(r.sessions, r.value, r.low, r.high) for r in of_system], look, system)
            if system != REFERENCE:
                gain = [(r.sessions, r.difference, r.difference_low, r.difference_high) for r in of_system]
                _line(below, gain, look, system)
        ceiling = [(r.sessions, r.value) for r in mine if r.system == CEILING and r.value is not None]
        if ceiling:
            above.plot(*zip(*ceiling, strict=True), color="black", linestyle="--", linewidth=1.2, label="ceiling")
        below.axhline(0, color=looks([REFERENCE])[REFERENCE].colour, linewidth=1.5)
        _label_sessions(below, mine)
        above.set_title(subject)
        for ax in (above, below):
            ax.grid(axis="y", color="#DDDDDD", linewidth=0.6)
            ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("correlation over test images\n(mean over voxels, 95 % interval)")
    axes[1, 0].set_ylabel(f"gain over {REFERENCE}\n(paired, 95 % interval)")
    named = {label: line for ax in axes[0] for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(
        named.values(),
        named.keys(),
        loc="outside lower center",
        ncols=min(3, legend_columns(figure, named)),
        frameon=False,
    )
    figure.savefig(path, dpi=DPI)


def _line(ax: Axes, points: list[tuple[int, float | None, float | None, float | None]], look: Look, label: str) -> None:
    known = [(x, value) for x, value, _, _ in points if value is not None]
    if not known:
        return
    ax.plot(*zip(*known, strict=True), color=look.colour, marker=look.marker, markersize=5, label=label)
    bounded = [(x, low, high) for x, _, low, high in points if low is not None and high is not None]
    if len(bounded) > 1:
        x, low, high = zip(*bounded, strict=True)
        ax.fill_between(x, low, high, color=look.colour, alpha=0.15, linewidth=0)
    else:
        for at, lower, upper in bounded:
            ax.vlines(at, lower, upper, color=look.colour, linewidth=1)


def _label_sessions(ax: Axes, rows: Sequence[CurveRow]) -> None:
    n_train = {row.sessions: row.n_train for row in rows}
    labels = [str(x) if n is None else f"{x}\n{n}" for x, n in n_train.items()]
    ax.set_xticks(list(n_train), labels)
    ax.set_xlabel("sessions" if None in n_train.values() else "sessions (below: training images in them)")
