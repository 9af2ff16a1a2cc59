"""The training step against its parts, and in half precision against single."""

from dataclasses import replace

import pytest
import torch

from foundation.config import LossConfig
from foundation.losses import objective
from foundation.model.dual_stream import TokenShape
from foundation.model.encoding_model import EncodingModel
from foundation.training.step import TrainingStep, autocast_dtype
from tests.cluster.zero_ranks import make_batch, make_model
from tests.tiny_store import TINY_BACKBONE

LOSS = LossConfig()
CPU = torch.device("cpu")


@pytest.fixture
def model() -> EncodingModel:
    return make_model()


def taken(step: TrainingStep, stage=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    return step.train()(make_batch(1, 1), stage)


@pytest.mark.parametrize("stage", [None, "stage1", "stage2"])
def test_a_step_is_the_objective_of_the_models_output(model, stage):
    batch = make_batch(1, 1)
    total, terms = taken(TrainingStep(model, LOSS), stage)
    torch.manual_seed(3)
    rows = {name: part.rows for name, part in batch.parts.items()}
    output = model(batch.cls, batch.patch, rows, sample=True, hold_stage1=stage == "stage2")
    responses = {name: part.responses for name, part in batch.parts.items()}
    wanted = objective(model, output, responses, LOSS, stage=stage, image=batch.image)
    torch.testing.assert_close(total, wanted.total, rtol=0, atol=0)
    torch.testing.assert_close(terms, wanted.terms, rtol=0, atol=0)


def test_in_half_precision_losses_are_near_single_precisions_and_gradients_are_finite_and_single(model):
    single, _ = taken(TrainingStep(model, LOSS))
    half, terms = taken(TrainingStep(model, LOSS, autocast=torch.bfloat16))
    assert half.dtype == torch.float32
    assert {term.dtype for term in terms.values()} == {torch.float32}
    assert half != single  # something was computed in half precision
    torch.testing.assert_close(half, single, rtol=0.02, atol=0)
    half.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


def test_in_half_precision_the_gradient_points_where_single_precisions_does(model):
    gradients = []
    for autocast in (None, torch.bfloat16):
        model.zero_grad()
        taken(TrainingStep(model, LOSS, autocast=autocast))[0].backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.995


def test_the_scan_is_given_single_precision_whatever_the_products_are_in(model, monkeypatch):
    import foundation.model.mamba as mamba

    seen = set()

    def watched(*inputs, **options):
        seen.update(value.dtype for value in (inputs[1], inputs[2]))  # dt and A, whose exponentials decay the state
        assert not torch.is_autocast_enabled("cpu")
        return scan(*inputs, **options)

    scan = mamba.selective_scan
    monkeypatch.setattr(mamba, "selective_scan", watched)
    taken(TrainingStep(model, LOSS, autocast=torch.bfloat16))
    assert seen == {torch.float32}


def test_double_precision_stays_double():
    shape = TokenShape(depth=2, patch=16, width=6)
    torch.manual_seed(0)
    model = EncodingModel(shape, replace(TINY_BACKBONE), {"subj01": torch.arange(14) % 4}).double()
    batch = make_batch(1, 1)
    part = replace(batch.parts["subj01"], rows=slice(0, 6), responses=torch.randn(6, 14).double())
    batch = replace(batch, cls=batch.cls.double(), patch=batch.patch.double(), parts={"subj01": part})
    total, _ = TrainingStep(model, LOSS)(batch, None)
    assert total.dtype == torch.float64


@pytest.mark.parametrize(("precision", "wanted"), [("auto", None), ("fp32", None), ("bf16", torch.bfloat16)])
def test_on_a_processor_half_precision_is_taken_only_where_it_is_asked_for(precision, wanted):
    assert autocast_dtype(precision, CPU) == wanted
