"""What a person wants to know of a store: `describe` finds it out as plain JSON, `show` prints it.

Noise ceilings are estimated from all repeats, session by session standardised over all trials, on a sample of voxels
that a seed draws. They are for reading only: test trials are among those repeats.
"""

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.noise_ceiling import ncsnr, noise_ceiling
from data.preprocess import MIN_TRIALS, n_sessions_of, standardise
from data.rois import families
from data.schema import told_runs
from data.splits import split_of
from data.store import PooledStore, SubjectStore

N_VOXELS, SEED = 500, 0
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_LABELS = 12


def describe(store: PooledStore, *, ceilings: bool = True) -> dict[str, Any]:
    """Return what a store holds, as JSON; what can't be computed is ``{"n/a": reason}``.

    Parameters
    ----------
    ceilings
        Estimate each subject's noise ceiling, for which all of its responses are read, a shard at a time.
    """
    split = split_of(store)
    sizes = store.file_sizes()
    return {
        "name": store.name,
        "path": store.path,
        "provenance": store.provenance,
        "images": {
            "n": store.n_images,
            "with_pixels": sum(n for _, n, shape in store.image_blocks() if shape is not None),
            "sizes": sorted({f"{shape[0]} x {shape[1]}" for _, _, shape in store.image_blocks() if shape is not None}),
        },
        "split": {
            "rule": split.rule,
            "digest": split.digest,
            **{part: int((split.parts == part).sum()) for part in ("train", "validation", "test")},
        },
        "encoders": {name: _encoder(store, name, sizes) for name in store.encoders},
        "subjects": {name: _subject(store.subject(name), sizes, ceilings=ceilings) for name in store.subjects},
        "bytes": {"total": sum(sizes.values()), "pixels": _below(sizes, "images", "/pixels/")},
    }


def _below(sizes: dict[str, int], start: str, holding: str = "") -> int:
    return sum(size for key, size in sizes.items() if key.startswith(f"{start}/") and holding in key)


def _encoder(store: PooledStore, name: str, sizes: dict[str, int]) -> dict[str, Any]:
    missing = store.missing_tokens(name)
    found: dict[str, Any] = {"bytes": _below(sizes, f"features/{name}"), "blocks_without_tokens": missing}
    if len(missing) == len(store.image_blocks()):
        return found
    tokens = store.tokens(name)
    _, n_patches, width = tokens.shape
    shape = {"depths": list(tokens.depths), "patches": n_patches, "width": width, "global_token": tokens.global_token}
    return found | shape | {"digest": tokens.digest}


def _subject(subject: SubjectStore, sizes: dict[str, int], *, ceilings: bool) -> dict[str, Any]:
    images, shown = np.unique(subject.image, return_counts=True)
    times, n_images = np.unique(shown, return_counts=True)
    voxels, attrs = subject.voxels, subject.attrs
    place = attrs.get("place") or {"kind": "coordinates" if voxels.coordinates is not None else "unknown"}
    start = f"subjects/{subject.name}"
    return {
        "sessions": n_sessions_of(subject),
        "trials": subject.n_trials,
        "images": len(images),
        "images_by_repeats": {str(int(t)): int(n) for t, n in zip(times, n_images, strict=True)},
        "voxels": subject.n_voxels,
        "unit": attrs["unit"],
        "scale": attrs["scale"],
        "dtype": subject.dtype,
        "place": place,
        "families": {name: int(mask.sum()) for name, mask in families(subject).items()},
        "rois": {
            family: {name: int((rois.labels == label).sum()) for label, name in sorted(rois.names.items())}
            for family, rois in sorted(voxels.rois.items())
        },
        "reliability": sorted(voxels.reliability),
        "upstream_preprocessing": subject.upstream_preprocessing,
        "ceiling": _ceiling(subject) if ceilings else {"n/a": "not asked for"},
        "parts": {
            key: {"sessions": list(part["n_trials"]), "provenance": part["provenance"]}
            for key, part in subject.parts.items()
        },
        "bytes": {"total": _below(sizes, start), "responses": _below(sizes, start, "/responses/")},
        "digest": subject.digest,
    }


def _ceiling(subject: SubjectStore) -> dict[str, Any]:
    """Return quantiles over voxels of the NCSNR and of the ceilings, of a trial and of all repeats' mean."""
    averaged = subject.trial_column("n_averaged")
    if averaged is not None and (averaged > 1).any():
        return {"n/a": "the data came averaged over repeats"}
    _, shown = np.unique(subject.image, return_counts=True)
    if shown.max() < 2:
        return {"n/a": "no image was shown twice"}
    session = np.ones(subject.n_trials, np.int16) if subject.session is None else subject.session
    if (few := np.unique(session, return_counts=True)[1].min()) < MIN_TRIALS:
        return {"n/a": f"a session has {few} trials, and at least {MIN_TRIALS} are needed to standardise it"}
    n = min(N_VOXELS, subject.n_voxels)
    voxels = np.sort(np.random.default_rng(SEED).choice(subject.n_voxels, n, replace=False))
    responses = standardise(subject.voxel_responses(voxels), session, np.ones(len(session), bool))
    ratio = ncsnr(responses, subject.image)
    ratio = ratio[np.isfinite(ratio)]
    if not len(ratio):
        return {"n/a": f"none of the {n} voxels looked at varies"}

    def quantiles(values: np.ndarray) -> dict[str, float]:
        return {f"{q:.0%}": round(float(v), 4) for q, v in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}

    return {
        "voxels": len(ratio),
        "of": subject.n_voxels,
        "ncsnr": quantiles(ratio),
        "single_trial": quantiles(noise_ceiling(ratio, np.ones(1, int))),
        "mean_of_repeats": quantiles(noise_ceiling(ratio, shown)),
    }


# -- printing ----------------------------------------------------------------------------------------------------------


def show(found: dict[str, Any], console: Console) -> None:
    """Print what `describe` found, for 80 columns and more."""
    show_summary(found, console)
    for name, subject in found["subjects"].items():
        lines = Table.grid(padding=(0, 2))
        lines.add_column(no_wrap=True)
        lines.add_column(overflow="fold")
        for label, text in _lines(subject).items():
            lines.add_row(Text(f"  {label}"), Text(text))
        console.print("", Text(name, style="bold"), lines, sep="\n")


def show_summary(found: dict[str, Any], console: Console) -> None:
    """Print a line per subject, and what the images and encoders are."""

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    total, pixels = found["bytes"]["total"], found["bytes"]["pixels"]
    line(f"{found['name']} ({found['path']}), {_size(total)}{_made(found['provenance'])}")
    _table(console, found)
    images, split = found["images"], found["split"]
    pictures = f"{images['with_pixels']} with pixels ({', '.join(images['sizes'])}; {_size(pixels)})"
    line(f"images: {images['n']}, {pictures if images['with_pixels'] else 'none with pixels'}")
    parts = ", ".join(f"{part} {split[part]}" for part in ("train", "validation", "test"))
    line(f"split by {split['rule']}: {parts}; {split['digest'][:19]}")
    for name, encoder in found["encoders"].items():
        if "depths" in encoder:
            depths = ", ".join(map(str, encoder["depths"]))
            token = f"{encoder['global_token']} and {encoder['patches']} patches of width {encoder['width']}"
            line(f"tokens {name}: depths {depths}; {token}; {_size(encoder['bytes'])}; {encoder['digest'][:19]}")
        if encoder["blocks_without_tokens"]:
            n = len(encoder["blocks_without_tokens"])
            line(f"tokens {name}: lacking for {n} image blocks; run `python -m data features`")


def _table(console: Console, found: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("subject", "sessions", "trials", "images", "repeats", "voxels", "NCSNR", "ceiling", "size"):
        table.add_column(column, justify="left" if column == "subject" else "right")
    for name, subject in found["subjects"].items():
        ceiling, repeats = subject["ceiling"], [int(n) for n in subject["images_by_repeats"]]
        median = (
            ["n/a", "n/a"] if "n/a" in ceiling else [f"{ceiling[k]['50%']:.2f}" for k in ("ncsnr", "mean_of_repeats")]
        )
        table.add_row(
            name,
            _or_na(subject["sessions"]),
            str(subject["trials"]),
            str(subject["images"]),
            str(repeats[0]) if len(repeats) == 1 else f"{min(repeats)}-{max(repeats)}",
            str(subject["voxels"]),
            *median,
            _size(subject["bytes"]["total"]),
        )
    console.print(table)
    if any("n/a" not in subject["ceiling"] for subject in found["subjects"].values()):
        text = "NCSNR; ceiling: share of signal in the variance of images' mean responses (medians over voxels)"
        console.print(text, style="dim", highlight=False)


def _lines(subject: dict[str, Any]) -> dict[str, str]:
    shown = subject["images_by_repeats"]
    lines = {"images shown": ", ".join(f"{_times(int(times))}: {n}" for times, n in shown.items())}
    place = subject["place"]
    if place["kind"] == "volume":
        lines["voxels"] = f"in a volume of {' x '.join(map(str, place['shape']))}"
    elif place["kind"] == "surface":
        lines["voxels"] = (
            f"vertices of {place['space']} ({place['n_vertices'][0]} left, {place['n_vertices'][1]} right)"
        )
    else:
        lines["voxels"] = "positions in mm, no volume" if place["kind"] == "coordinates" else "place n/a: not told"
    lines["responses"] = f"{subject['dtype']}, {subject['unit']}, {_size(subject['bytes']['responses'])}"
    lines["upstream preprocessing"] = subject["upstream_preprocessing"] or "none told"
    named = ", ".join(f"{name} {n}" for name, n in subject["families"].items())
    lines["families"] = named or "n/a: no prf-visualrois or streams labels"
    for family, labels in subject["rois"].items():
        some = ", ".join(f"{name} {n}" for name, n in list(labels.items())[:_LABELS])
        lines[family] = some + (f" and {len(labels) - _LABELS} more labels" if len(labels) > _LABELS else "")
    if subject["reliability"]:
        lines["published maps"] = ", ".join(subject["reliability"])
    ceiling = subject["ceiling"]
    if "n/a" in ceiling:
        lines["noise ceiling"] = f"n/a: {ceiling['n/a']}"
    else:
        which = (
            "all voxels"
            if ceiling["voxels"] == ceiling["of"]
            else f"{ceiling['voxels']} voxels drawn of {ceiling['of']}"
        )
        names = {"ncsnr": "NCSNR", "single_trial": "ceiling, a trial", "mean_of_repeats": "ceiling, the mean"}
        for key, name in names.items():
            values = ", ".join(f"{q} {value:.2f}" for q, value in ceiling[key].items())
            lines[name] = values + (f" (quantiles over {which})" if key == "ncsnr" else "")
    for key, part in subject["parts"].items():
        lines[f"part {key}"] = f"{_told(part['sessions'])}{_made(part['provenance'])}"
    lines["digest"] = subject["digest"][:19]
    return lines


def _told(sessions: list[str]) -> str:
    if sessions == ["all"]:
        return "no session index"
    runs = told_runs([int(session) for session in sessions])
    return f"session {runs}" if len(sessions) == 1 else f"{len(sessions)} sessions, {runs}"


def _made(provenance: dict[str, Any]) -> str:
    """Return what provenance says in short: all that is a single value, a level into groups of options."""
    flat: list[str] = []
    for key, value in provenance.items():
        pairs = value.items() if isinstance(value, dict) else [("", value)]
        flat += [
            f"{f'{key}.' if inner else key}{inner} {text}"
            for inner, text in pairs
            if isinstance(text, (str, int, float))
        ]
    return f"; {', '.join(flat)}" if flat else ""


def _times(n: int) -> str:
    return {1: "once", 2: "twice", 3: "thrice"}.get(n, f"{n} times")


def _or_na(value: int | None) -> str:
    return "n/a" if value is None else str(value)


def _size(n_bytes: int | float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            break
        n_bytes /= 1000
    return f"{n_bytes:.0f} {unit}" if n_bytes >= 100 or unit == "bytes" else f"{n_bytes:.1f} {unit}"
