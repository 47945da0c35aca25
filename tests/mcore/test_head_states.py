"""Training the MTP head on the trunk states that a rollout verified tokens with."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from megatron_occ.config.schema import RLConfig
from megatron_occ.losses.head_loss import HeadLoss
from megatron_occ.losses.heads import Normalizers
from megatron_occ.mcore.head_request import HeadRequest
from megatron_occ.mcore.inference.engine import Speculation
from megatron_occ.mcore.placement import place_packed
from megatron_occ.rl.batch import head_targets
from megatron_occ.rl.head_rows import HeadRows
from tests.mcore.conftest import VOCABULARY, build_model, gradients, positions, small_config
from tests.mcore.test_generation import prompts, respond
from tests.mcore.test_speculation import scale_final_norm

TEMPERATURE = 0.8


def mla(config):
    config.model.mla.enabled = True
    config.model.num_query_groups = config.model.num_attention_heads


def untied(config):
    config.model.tie_embeddings = False


def before_the_norm(config):
    config.model.mtp_reads = "before"


KINDS = {
    "tied": lambda config: None,
    "untied": untied,
    "latent attention": mla,
    "before the norm": before_the_norm,
}


def head_batch(model, drafts, depths):
    """All responses of an engine with three slots, in one micro-batch."""
    found = respond(
        model,
        prompts(),
        slots=3,
        speculation=Speculation(drafts),
        temperature=TEMPERATURE,
        keep_states=True,
    )
    ids = [prompt + tokens for prompt, tokens in zip(prompts(), found.tokens, strict=True)]
    assert [len(states) for states in found.states] == [len(tokens) - 1 for tokens in ids]
    rows = HeadRows(ids, [len(prompt) for prompt in prompts()], found.states, [])
    config = RLConfig(micro_batch_size=len(ids))
    (batch,) = rows.batches(config, depths, torch.device("cpu"))
    return batch


def outcome(model, batch, depths, signal, **where):
    """Loss and gradients of the head alone."""
    ids = batch.ids
    placement = where.get("placement")
    if placement is not None:
        ids = placement.as_input(placement.take(ids))
    request = HeadRequest(
        head_targets(batch.ids, depths), ((False, True),), TEMPERATURE, distance=signal, **where
    )
    outputs = model(ids, positions(ids), None, request=request)
    normalizers = Normalizers.from_counts(Normalizers.count(batch.targets.mask))
    loss, report = HeadLoss(0.5)(outputs, batch.targets, normalizers)
    model.zero_grad()
    loss.backward()
    return loss.detach(), report.metrics, gradients(model)


@contextmanager
def not_run(module):
    calls = []
    hook = module.register_forward_hook(lambda *_: calls.append(module))
    yield
    hook.remove()
    assert not calls


@pytest.mark.parametrize("signal", ["soft_ce", "tv"])
@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_head_learns_as_from_a_pass_through_the_trunk(layout, kind, drafts, signal):
    config = small_config(depths=2)
    KINDS[kind](config)
    model = build_model(config, VOCABULARY, layout.device)
    scale_final_norm(model)
    batch = head_batch(model, drafts, 2)
    loss, metrics, expected = outcome(model, batch, 2, signal)
    lengths = [int(row.nonzero().max()) + 2 for row in batch.targets.mask[0]]
    packed = place_packed(tuple(batch.ids.shape), lengths, layout.device)
    for where in ({"states": batch.states}, {"states": batch.states, "placement": packed}):
        with not_run(model.decoder.layers[0]):
            found, reported, grads = outcome(model, batch, 2, signal, **where)
        torch.testing.assert_close(found, loss, atol=1e-6, rtol=1e-5)
        for name, value in metrics.items():
            torch.testing.assert_close(reported[name], value, atol=1e-6, rtol=1e-5)
        heads = {name for name, grad in expected.items() if grad.any()}
        assert heads == {name for name, grad in grads.items() if grad.any()}
        assert heads
        assert all(name.startswith("mtp.") for name in heads)
        for name in heads:
            torch.testing.assert_close(grads[name], expected[name], atol=1e-6, rtol=1e-4)


def test_the_trunk_is_back_after_a_call_that_fails(layout):
    model = build_model(small_config(depths=1), VOCABULARY, layout.device)
    decoder, ids = model.decoder, torch.zeros(2, 4, dtype=torch.long)
    request = HeadRequest(head_targets(ids, 1), ((False, True),), states=torch.zeros(2, 4, 7))
    with pytest.raises(RuntimeError):
        model(ids, positions(ids), None, request=request)
    assert model.decoder is decoder


def test_states_are_kept_only_on_request(layout):
    model = build_model(small_config(depths=1), VOCABULARY, layout.device)
    assert respond(model, prompts(), speculation=Speculation(2)).states == []
