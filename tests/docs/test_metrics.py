"""Whatever our tables and files call a number stands on the metrics page, with its equation."""

import re

import pytest

from foundation.evaluation.baselines import BASELINES
from foundation.evaluation.evaluated import PROTOCOLS
from foundation.evaluation.interventions import CONTROL
from foundation.evaluation.partition import PARTS
from foundation.evaluation.score import CEILING, FLOORS, METRICS, SAMPLING_METRICS
from foundation.evaluation.specialisation import REPLACEMENTS
from tests.documented import ROOT

CODE = set(re.findall(r"`([^`\n]+)`", (ROOT / "docs/metrics.md").read_text()))
SCORES = {metric for _, metric in (*METRICS, *SAMPLING_METRICS)}
FURTHER = ("p_permutation", "share_fdr05", "rsa_spearman")
"""Metrics of rows that `foundation.evaluate` adds to those of scores."""


@pytest.mark.parametrize(
    "name", sorted({*SCORES, *FURTHER, *FLOORS, CEILING, *PROTOCOLS, *PARTS, *REPLACEMENTS, CONTROL})
)
def test_a_name_is_explained(name):
    assert name in CODE or any(name in re.split(r"[ ,]+", code) for code in CODE), name


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_named_where_models_are(name):
    assert f"`{name}`" in (ROOT / "docs/evaluating.md").read_text()


def test_the_names_of_rows_are_those_that_are_tested():
    from foundation.evaluation.rsa import RsaScore
    from foundation.evaluation.rsa_table import rsa_rows

    score = RsaScore(
        subject="subj01",
        roi="all",
        method="spearman",
        value=0.5,
        low=None,
        high=None,
        ceiling_low=None,
        ceiling_high=None,
        ceiling_reason="one",
        n_images=4,
        n_rdms=1,
        n_voxels=3,
    )
    assert {row.metric for row in rsa_rows({"ours": [score]})} <= set(FURTHER)
