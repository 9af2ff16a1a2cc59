"""The plan on paper: its page shows what the formulas give, its constants are the model's, its formulas hold."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.experiments import scaling_constants
from tests.experiments.scaling import TABLES, with_tables
from tests.experiments.scaling_plan import (
    MEASURED,
    PLANS,
    seconds_per_step,
    state_bytes,
    step_seconds,
    traffic_bytes,
)

PAGE = Path(__file__).parents[2] / "docs/scaling.md"
AGAIN = (
    "run `python -m tests.experiments.scaling_constants`, then `python -m tests.experiments.scaling docs/scaling.md`"
)


def test_the_page_has_the_tables_of_today():
    page = PAGE.read_text()
    assert with_tables(page) == page, "run `python -m tests.experiments.scaling docs/scaling.md`"


def test_a_table_that_is_out_of_date_is_replaced():
    page = PAGE.read_text()
    for make in TABLES.values():
        page = page.replace(make(), "old")
    assert page.count("old") >= len(TABLES)
    assert with_tables(page) == PAGE.read_text()


def test_parameters_of_the_plan_are_the_model_s():
    assert {name: MEASURED[name] for name in scaling_constants.n_parameters()} == scaling_constants.n_parameters(), (
        AGAIN
    )


def test_operations_and_activations_of_the_plan_are_the_model_s():
    for name, measure in (
        ("flops_per_image", scaling_constants.step_flops),
        ("saved_bytes_per_image", scaling_constants.saved_bytes),
    ):
        per_image = (measure(4) - measure(2)) / 2
        assert per_image == pytest.approx(MEASURED[name], rel=0.02), AGAIN


def test_the_encoder_s_operations_are_those_of_its_equations():
    n, width, patches = 257, 768, 256  # a block: 12 n w^2 multiply-adds of its products, 2 n^2 w of attention
    block = 12 * n * width**2 + 2 * n**2 * width
    expected = 2 * (12 * block + patches * width * 3 * 14**2)
    assert scaling_constants.encoder_flops() == pytest.approx(expected, rel=0.001)
    assert scaling_constants.encoder_flops() == MEASURED["encoder_flops"], AGAIN


def test_a_store_s_bytes_are_measured_on_the_disk(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c").write_bytes(bytes(300))
    (tmp_path / "a/d").write_bytes(bytes(20))
    assert scaling_constants.bytes_on_disk(tmp_path) == 320


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_zero_shards_what_it_says(plan):
    by_stage = [state_bytes(plan, stage) for stage in range(4)]
    assert by_stage == sorted(by_stage, reverse=True)
    whole = 16 * plan.trained
    alone = replace(plan, machines=1, gpus_per_machine=1)
    assert {state_bytes(alone, stage) for stage in range(4)} == {whole + 4 * plan.kept}
    many = replace(plan, machines=10_000)
    assert [state_bytes(many, stage) - 4 * plan.kept for stage in range(4)] == pytest.approx(
        [whole, whole / 2, whole / 4, 0], rel=1e-3, abs=1e-3 * whole
    )


def sent_in_a_ring(n_ranks: int, n_numbers: int) -> int:
    """Numbers that a rank sends in an all-reduce, played through: chunks go round once to be added, once to be told."""
    own = [[float(rank + 1)] * n_ranks for rank in range(n_ranks)]  # a chunk stands for n_numbers / n_ranks numbers
    sent = 0
    for start, add in ((0, True), (1, False)):
        for turn in range(n_ranks - 1):
            moved = [(rank, (rank + start - turn) % n_ranks) for rank in range(n_ranks)]
            values = [own[rank][chunk] for rank, chunk in moved]
            for (rank, chunk), value in zip(moved, values, strict=True):
                following = (rank + 1) % n_ranks
                own[following][chunk] = own[following][chunk] + value if add else value
            sent += 1
    assert all(chunk == n_ranks * (n_ranks + 1) / 2 for rank in own for chunk in rank)
    return sent * n_numbers // n_ranks


@pytest.mark.parametrize("machines", [1, 2, 5])
def test_traffic_is_that_of_a_ring_played_through(machines):
    plan = replace(PLANS[0], machines=machines)
    n_numbers = 1_000 * plan.gpus
    per_number = traffic_bytes(plan, 2) / (4 * plan.trained)
    assert per_number * n_numbers == pytest.approx(sent_in_a_ring(plan.gpus, n_numbers))
    assert traffic_bytes(plan, 3) == pytest.approx(1.5 * traffic_bytes(plan, 2))


def test_a_step_is_as_long_as_its_reading_or_as_all_the_rest():
    for plan in PLANS:
        parts = step_seconds(plan)
        assert seconds_per_step(plan) >= max(parts.values())
        assert seconds_per_step(plan) <= sum(parts.values())
