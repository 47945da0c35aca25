"""What must hold on the device, whichever it is: ``pytest -m gpu`` runs it on one GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.loss_memory import gradient_deviation
from megatron_occ.mcore.checkpoint import load_checkpoint
from megatron_occ.mcore.inference.engine import MegatronEngine, Speculation
from megatron_occ.mcore.startup import shutdown
from megatron_occ.rollout import Request, SamplingSettings
from tests.mcore.conftest import write_checkpoint
from tools.gpu.correct import engine_gap
from tools.gpu.training import TOY_TRAINING, Side, rollout

FP32 = ("precision=fp32", "model.init_std=0.2", "rl.optimizer.lr=1e-3")
LENGTHS = [20, 31, 7, 16]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def side(request):
    """A small policy on the device that commands use here."""
    if torch.cuda.is_available() != (request.param == "cuda"):
        pytest.skip(f"no {request.param} device for commands here")
    yield Side(TOY_TRAINING, (*TOY_TRAINING.dense, *FP32), "occ_decoupled")
    shutdown()


def test_parameters_are_where_the_layout_says(side):
    assert {p.device.type for p in side.actor.chunks[0].parameters()} == {side.device.type}


def test_log_probs_over_the_vocabulary_have_the_gradients_of_a_plain_softmax(side):
    assert gradient_deviation() < 1e-5


@pytest.mark.parametrize("cache_tokens", [None, 300])
@pytest.mark.parametrize("drafts", [0, 2])
def test_the_engine_samples_with_the_log_probs_of_training(side, drafts, cache_tokens):
    gap, tokens = engine_gap(side.actor, Speculation(drafts), cache_tokens=cache_tokens)
    assert tokens == 96
    assert gap < 1e-4


def test_a_layer_without_a_bias_may_have_an_empty_tensor_in_its_place(side):
    """As TransformerEngine's have."""
    layers = [m for chunk in side.actor.inference_chunks() for m in chunk.modules()]
    attentions = [m for m in layers if hasattr(m, "linear_qkv")]
    assert len(attentions) == 3
    for module in attentions:
        module.linear_qkv._parameters.pop("bias", None)
        module.linear_qkv.bias = torch.empty(0, device=side.device)
    assert engine_gap(side.actor, Speculation(2))[0] < 1e-4


def test_drafts_do_not_change_what_is_sampled(side):
    requests = [Request([1 + row, 2, 3], row) for row in range(6)]
    found = [
        MegatronEngine(
            side.actor.inference_chunks,
            side.actor.layout,
            slots=3,
            speculation=Speculation(drafts),
        ).generate(requests, SamplingSettings(1.0, 16))
        for drafts in (0, 2)
    ]
    assert found[0].tokens == found[1].tokens


def test_packed_micro_batches_have_the_log_probs_of_padded_ones(side):
    rows = rollout(TOY_TRAINING.vocabulary, LENGTHS).map(lambda values: values.to(side.device))
    found = [
        side.actor.get_inference_log_probs(
            rows.ids, parts=[[0, 1], [2, 3]], lengths=lengths, temperature=1.0
        )
        for lengths in (None, LENGTHS)
    ]
    for row, length in enumerate(LENGTHS):
        padded, packed = (values[row, : length - 1] for values in found)
        torch.testing.assert_close(packed, padded, atol=1e-4, rtol=0)


def test_an_update_after_a_checkpoint_is_the_one_without_it(side, tmp_path):
    update = side.update("detach", LENGTHS)
    update()
    path = write_checkpoint(tmp_path, 1, side.actor, {}, {"model": "toy"})
    ends = []
    for _ in range(2):
        metrics = update().metrics
        ends.append(
            (metrics["grad_norm/trunk"], [p.clone() for p in side.actor.chunks[0].parameters()])
        )
        load_checkpoint(path, side.actor, {"model": "toy"})
    (norm, weights), (again, reached) = ends
    assert again == pytest.approx(norm, rel=1e-5)
    for one, other in zip(weights, reached, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
