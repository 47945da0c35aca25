"""Temperature, top-k and top-p against transformers' own, and stop strings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_occ.rollout import SamplingSettings, row_keys, sample_by_race, token_keys
from megatron_occ.rollout.sampling import cut, cut_log_probs, token_log_probs
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


MANY, LOOK = 100_000, 256


def hard_logits():
    """Rows [., MANY] by name that are hard to cut."""
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(MANY, generator=generator)
    one_hot, two = torch.full((MANY,), -50.0), torch.full((MANY,), -torch.inf)
    one_hot[777], two[[5, 99_998]] = 50.0, 0.0
    return {
        "peaked": 6 * noise,
        "flat": noise,
        "nearly uniform": 1e-3 * noise,
        "uniform": torch.zeros(MANY),
        "one hot": one_hot,
        "two": two,
        # as bf16 logits are: many are the same
        "ties": (6 * noise).bfloat16().float(),
        "all ties at the edge": torch.cat((torch.ones(LOOK - 1), torch.zeros(MANY - LOOK + 1))),
    }


def by_sorting(log_probs, top_p):
    """What stays of one row: a plain look at all tokens, the smaller of two equal ids first."""
    order = np.lexsort((np.arange(MANY), -log_probs.numpy()))
    probabilities = log_probs.double().softmax(-1)[order]
    before = probabilities.cumsum(-1) - probabilities
    count = max(1, int((before < top_p).sum()))
    kept = torch.full_like(log_probs, -torch.inf)
    kept[order[:count]] = log_probs[order[:count]].double().log_softmax(-1).float()
    return kept


@pytest.mark.parametrize("top_p", [1e-9, 0.5 + 1e-6, 0.95 + 1e-6, 1 - 1e-7])
@pytest.mark.parametrize("name", hard_logits())
def test_a_look_at_the_likeliest_finds_the_nucleus_or_says_that_it_did_not(name, top_p):
    log_probs = hard_logits()[name].log_softmax(-1)
    expected = by_sorting(log_probs, top_p)
    settings = SamplingSettings(1.0, 1, top_p=top_p)
    whole = cut(log_probs, settings)
    assert whole.complete is None
    torch.testing.assert_close(whole.dense(MANY), expected, atol=1e-6, rtol=0)
    part = cut(log_probs, settings, at_most=LOOK)
    size = int(expected.isfinite().sum())
    assert part.ids.shape == (LOOK,)
    assert bool(part.complete) == (size < LOOK)
    if part.complete:
        # to the bit: what is drawn does not depend on how it was found
        assert torch.equal(part.dense(MANY), whole.dense(MANY))


def test_most_hard_rows_are_told_apart():
    """The test before this one sees both answers."""
    settings = SamplingSettings(1.0, 1, top_p=0.95)
    found = {
        name: bool(cut(row.log_softmax(-1), settings, at_most=LOOK).complete)
        for name, row in hard_logits().items()
    }
    assert {name for name, complete in found.items() if complete} == {
        "peaked",
        "one hot",
        "two",
        "ties",
    }


@pytest.mark.parametrize("cuts", [{"top_p": 0.9}, {"top_k": 50}, {"top_k": 50, "top_p": 0.9}])
def test_a_race_among_what_stays_is_won_as_one_among_all(cuts):
    rows = torch.stack([hard_logits()["peaked"].roll(i) for i in range(20)]).log_softmax(-1)
    keys = token_keys(row_keys([3]), torch.arange(20))[0]
    kept = cut(rows, SamplingSettings(1.0, 1, **cuts), at_most=LOOK)
    assert kept.log_probs.size(1) < MANY
    drawn = kept.race(keys)
    assert drawn.tolist() == sample_by_race(kept.dense(MANY), keys).tolist()
    assert len(set(drawn.tolist())) > 10


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


@pytest.mark.parametrize("cuts", [{"top_k": 5}, {"top_k": 9, "top_p": 0.6}, {"top_k": 40}])
@pytest.mark.parametrize("at_most", [None, 12])
def test_masks_name_what_is_left_and_log_probs_are_of_that(cuts, at_most):
    log_probs, settings = LOGITS.log_softmax(-1), SamplingSettings(1.0, 1, keep_masks=True, **cuts)
    kept, dense = cut(log_probs, settings, at_most=at_most), cut_log_probs(log_probs, settings)
    masks = kept.mask(settings.top_k)
    assert masks.dtype == torch.int32
    assert masks.shape == (50, min(settings.top_k, 31))
    for row, mask in enumerate(masks.tolist()):
        left = [i - 1 for i in mask if i]
        if not left:
            # all of them
            left = dense[row].argsort(descending=True).tolist()
        assert left == dense[row].argsort(descending=True, stable=True)[: len(left)].tolist()
        assert set(left) == set(torch.isfinite(dense[row]).nonzero().flatten().tolist())
    for token in (int(dense[0].argmax()), int(dense[0].argmin())):
        tokens = torch.full((50,), token)
        assert torch.equal(kept.of(tokens), dense[:, token])


def test_masks_need_a_bound():
    with pytest.raises(ValueError, match="keep_masks=True: give top_k"):
        SamplingSettings(1.0, 1, top_p=0.5, keep_masks=True)
