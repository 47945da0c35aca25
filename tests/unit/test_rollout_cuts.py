"""Temperature, top-k and top-p against transformers' own, and stop strings."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_occ.rollout import SamplingSettings
from megatron_occ.rollout.sampling import cut_log_probs, token_log_probs
from megatron_occ.rollout.text import StopText

LOGITS = 2 * torch.randn(50, 31, generator=torch.Generator().manual_seed(0))


def ours(temperature, **cuts):
    settings = SamplingSettings(temperature, 1, **cuts)
    return cut_log_probs(token_log_probs(LOGITS, temperature), settings)


def theirs(temperature, top_k=None, top_p=1.0):
    steps = [TemperatureLogitsWarper(temperature)]
    steps += [TopKLogitsWarper(top_k)] if top_k is not None else []
    steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return LogitsProcessorList(steps)(None, LOGITS).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
@pytest.mark.parametrize("cuts", [{}, {"top_k": 4}, {"top_p": 0.9}, {"top_k": 6, "top_p": 0.5}])
def test_the_distribution_is_that_of_transformers(temperature, cuts):
    torch.testing.assert_close(ours(temperature, **cuts), theirs(temperature, **cuts))


@pytest.mark.parametrize("cuts", [{"top_k": 1}, {"top_p": 1e-9}])
def test_the_likeliest_token_always_stays(cuts):
    found = ours(1.0, **cuts)
    assert torch.equal(found.argmax(-1), LOGITS.argmax(-1))
    assert torch.equal(found.max(-1).values, torch.zeros(50))
    assert int(torch.isfinite(found).sum()) == 50


def test_top_p_by_hand():
    """0.5 + 0.3 is not above 0.8 yet for the third: it stays out, as the mass before it is 0.8."""
    log_probs = torch.tensor([0.05, 0.3, 0.5, 0.15]).log()
    kept = cut_log_probs(log_probs, SamplingSettings(1.0, 1, top_p=0.79)).exp()
    torch.testing.assert_close(kept, torch.tensor([0.0, 0.375, 0.625, 0.0]))
    more = cut_log_probs(log_probs, SamplingSettings(1.0, 1, top_p=0.81)).exp()
    torch.testing.assert_close(more, torch.tensor([0.0, 0.3, 0.5, 0.15]) / 0.95)


def test_more_than_the_vocabulary_cuts_nothing():
    assert ours(1.0, top_k=31) is not None
    torch.testing.assert_close(ours(1.0, top_k=100), LOGITS.log_softmax(-1))


def decode(ids):
    """Token 9 is special and has no text, 8 is a long one."""
    return "".join({9: "", 8: "the end"}.get(i, "abcdefgh"[i % 8]) for i in ids)


def test_a_stop_string_is_found_at_the_token_that_completes_it():
    ends = StopText(decode, ("cab", "e e")).ends
    response = [0, 2, 9, 0, 9, 1, 3]
    assert [ends(response[:n]) for n in range(1, 8)] == [False] * 5 + [True] * 2
    assert ends([8])
    assert not ends([])


def test_a_stop_string_far_back_is_still_seen_when_its_last_token_comes():
    text = StopText(decode, ("abc",))
    assert text.window == 12
    ends = text.ends
    assert ends([5] * 500 + [0, 1, 9, 2])
    assert not ends([5] * 500 + [0, 1, 9])
