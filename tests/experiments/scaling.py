"""The tables of docs/scaling.md, from the formulas and constants of `scaling_plan`.

::

    python -m tests.experiments.scaling                    prints the tables
    python -m tests.experiments.scaling docs/scaling.md    puts them in the page, in place of those there
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

from tests.experiments.scaling_plan import (
    ASSUMED,
    CHECKPOINT_EVERY,
    DATA_SETS,
    MEASURED,
    N_VOXEL,
    PLANS,
    TOKEN_BYTES,
    VENDOR,
    Plan,
    activation_bytes,
    checkpoint_bytes,
    read_of,
    seconds_per_step,
    state_bytes,
    step_seconds,
    traffic_bytes,
    unread_seconds,
)


def quantity(value: float, unit: str) -> str:
    """Return a number with three digits and the unit's prefix: 1.58 MB."""
    if value == 0:
        return f"0 {unit}"
    scale, prefix = next((s, p) for s, p in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")) if value >= s)
    return f"{value / scale:.3g} {prefix}{unit}"


def duration(seconds: float) -> str:
    """Return a time with three digits: 24 ms, 9.3 min."""
    if seconds == 0:
        return "0 s"
    steps = ((3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
    scale, unit = next((s, u) for s, u in steps if seconds >= s)
    return f"{seconds / scale:.3g} {unit}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def of_plans(plans: tuple[Plan, ...], rows: list[tuple[str, str, Callable[[Plan], str]]]) -> str:
    """Return a table with a column for each plan; a row is its name, its formula and its value."""
    heads = ["", "formula", *(plan.name for plan in plans)]
    return table(heads, [[name, formula, *(value(plan) for plan in plans)] for name, formula, value in rows])


def constants() -> str:
    """Return the constants."""
    measured = [
        [name, f"{value:,}" if isinstance(value, int) else f"{value:.5g}", "measured"]
        for name, value in MEASURED.items()
    ]
    told = [
        [name, f"{value:g}", source]
        for source, of_source in (("data sheet", VENDOR), ("assumed", ASSUMED))
        for name, value in of_source.items()
    ]
    return table(["constant", "value", "from"], measured + told)


def disk() -> str:
    """Return bytes on disk, what reading them once takes, and what encoding takes."""
    tokens = MEASURED["token_bytes_ratio"] * TOKEN_BYTES
    raw, ratio = 2 * N_VOXEL, MEASURED["response_bytes_ratio"]
    encoding = MEASURED["encoder_flops"] / (VENDOR["peak_flops"] * ASSUMED["encoder_utilisation"])
    return of_plans(
        DATA_SETS,
        [
            ("tokens of an image", "4 x 257 x 768 x 2 B", lambda p: quantity(tokens, "B")),
            ("tokens", "images x that", lambda p: quantity(p.n_images * tokens, "B")),
            ("responses", "S x trials x 16,000 x 2 B", lambda p: quantity(p.n_subjects * p.trials * raw, "B")),
            ("compressed", "x response_bytes_ratio", lambda p: quantity(p.n_subjects * p.trials * raw * ratio, "B")),
            (
                "encoding, one GPU",
                "images x encoder_flops / (40 % of the peak)",
                lambda p: duration(p.n_images * encoding),
            ),
            ("tokens read in an epoch", "S x train images x that of an image", lambda p: quantity(read_of(p), "B")),
            (
                "responses in a worker's memory",
                "S x train images x 16,000 x 4 B",
                lambda p: quantity(p.n_subjects * p.train_images * N_VOXEL * 4, "B"),
            ),
        ],
    )


def memory() -> str:
    """Return a GPU's memory by ZeRO stage."""
    rows: list[tuple[str, str, Callable[[Plan], str]]] = [
        ("P, trained", "backbone + S x adapter", lambda p: quantity(p.trained, "")),
        ("K, kept", "S x adapter_kept", lambda p: quantity(p.kept, "")),
        ("N, GPUs", "machines x GPUs of each", lambda p: str(p.gpus)),
        ("ZeRO 0", "16 P + 4 K", lambda p: quantity(state_bytes(p, 0), "B")),
        ("ZeRO 1", "8 P + 8 P / N + 4 K", lambda p: quantity(state_bytes(p, 1), "B")),
        ("ZeRO 2", "4 P + 12 P / N + 4 K", lambda p: quantity(state_bytes(p, 2), "B")),
        ("ZeRO 3", "16 P / N + 4 K", lambda p: quantity(state_bytes(p, 3), "B")),
        (
            "activations",
            "B / N x saved_bytes_per_image + S x saved_bytes_fixed",
            lambda p: quantity(activation_bytes(p), "B"),
        ),
    ]
    return of_plans(PLANS, rows)


def time() -> str:
    """Return steps, the parts of a step under ZeRO 2, GPU-hours, and what a checkpoint adds."""

    def part(name: str) -> Callable[[Plan], str]:
        return lambda plan: duration(step_seconds(plan)[name])

    def slowest(plan: Plan) -> str:
        parts = step_seconds(plan)
        return max(parts, key=lambda name: parts[name])

    def checkpoint(plan: Plan) -> float:
        return checkpoint_bytes(plan) / MEASURED["saved_bytes_per_s"]

    def whole(plan: Plan) -> float:
        return plan.steps * seconds_per_step(plan)

    rows: list[tuple[str, str, Callable[[Plan], str]]] = [
        ("steps", "10 x S x train images / B", lambda p: f"{p.steps:,}"),
        ("products", "B / N x flops_per_image / (10 % of the peak)", part("products")),
        ("launches", "(operators_fixed + S x operators_per_subject) x 5 µs", part("launches")),
        ("optimiser", "28 bytes x P / N / memory's rate", part("optimiser")),
        ("sent by a GPU", "2 (N - 1) / N x 4 P", lambda p: quantity(traffic_bytes(p, 2), "B")),
        ("network", "that / slowest link", part("network")),
        ("reading", "B x tokens of an image / (machines x 5 GB/s)", part("reading")),
        (
            "a step",
            "max(max(products, launches) + optimiser + network, reading)",
            lambda p: duration(seconds_per_step(p)),
        ),
        ("longest part", "", slowest),
        (
            "reading wanted",
            "B x tokens of an image / the step without reading",
            lambda p: quantity(p.batch * TOKEN_BYTES / unread_seconds(p), "B/s"),
        ),
        ("training", "steps x a step", lambda p: duration(whole(p))),
        ("GPU-hours", "N x training", lambda p: f"{p.gpus * whole(p) / 3600:.3g}"),
        ("a checkpoint", "4 (P + K) + 8 P", lambda p: quantity(checkpoint_bytes(p), "B")),
        ("written in", "that / saved_bytes_per_s", lambda p: duration(checkpoint(p))),
        (
            "share of the time",
            "written in / (50 steps + written in)",
            lambda p: f"{checkpoint(p) / (CHECKPOINT_EVERY * seconds_per_step(p) + checkpoint(p)):.1%}",
        ),
        (
            "one thread of our machine",
            "10 x S x train images / images_per_s",
            lambda p: duration(p.epochs * p.n_subjects * p.train_images / MEASURED["images_per_s"]),
        ),
    ]
    return of_plans(PLANS, rows)


TABLES = {"constants": constants, "disk": disk, "memory": memory, "time": time}


def with_tables(page: str) -> str:
    """Return the page with each table, between ``<!-- table: NAME -->`` and ``<!-- end -->``, as it is now."""
    for name, make in TABLES.items():
        marked = re.compile(f"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert len(marked.findall(page)) == 1, name
        page = marked.sub(lambda found, made=make(): f"{found[1]}\n{made}\n\n{found[2]}", page)
    return page


def main(args: list[str]) -> None:
    """Print the tables, or put them into the pages named."""
    for name in args:
        Path(name).write_text(with_tables(Path(name).read_text()))
    if not args:
        print("\n\n".join(f"{name}\n\n{make()}" for name, make in TABLES.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
