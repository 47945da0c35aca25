"""The balance loss of experts against hand numbers and a loop over sequences."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_occ.losses.balance import (
    balance_sum,
    highest,
    normalized_scores,
    sequence_loads,
)

LENGTHS = torch.tensor([5, 1, 0, 7])
# tokens of four sequences in any order, the last of each other than the first, and padding: 4
SEQUENCES = torch.tensor([0, 3, 3, 4, 1, 0, 0, 3, 4, 3, 0, 3, 3, 0, 3])


def naive(logits, chosen, sequences, lengths, top_k, score_function):
    """The published formula (equations 17 to 20), token by token, times the sequences' tokens."""
    total, experts = 0.0, logits.size(1)
    for number, length in enumerate(lengths.tolist()):
        tokens = [t for t, owner in enumerate(sequences.tolist()) if owner == number]
        assert len(tokens) == length
        for expert in range(experts):
            load = sum(float(chosen[t, expert]) for t in tokens)
            mean = 0.0
            for t in tokens:
                scores = logits[t].exp() if score_function == "softmax" else logits[t].sigmoid()
                mean = mean + scores[expert] / scores.sum() / length
            total = total + length * experts / (top_k * max(length, 1)) * load * mean
    return total


def drawn(experts=6, top_k=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(SEQUENCES), experts, generator=generator).double()
    places = torch.rand(logits.shape, generator=generator).topk(top_k, dim=1).indices
    return logits, torch.zeros_like(logits).scatter(1, places, 1.0).bool()


def computed(logits, chosen, score_function, top_k=2):
    loads = sequence_loads(chosen, SEQUENCES, len(LENGTHS))
    how = {"top_k": top_k, "score_function": score_function}
    return balance_sum(logits, loads, SEQUENCES, LENGTHS, **how)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_value_and_gradient_are_those_of_the_formula(score_function):
    logits, chosen = drawn()
    mine, other = (logits.clone().requires_grad_() for _ in range(2))
    found = computed(mine, chosen, score_function)
    expected = naive(other, chosen, SEQUENCES, LENGTHS, 2, score_function)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    found.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad, other.grad, atol=1e-6, rtol=1e-5)
    # padding has no part
    assert not mine.grad[SEQUENCES == 4].any()
    assert mine.grad[SEQUENCES == 1].any()


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_the_highest_scores_of_each_token_are_marked(score_function):
    logits = torch.tensor([[0.3, -2.0, 0.1, 4.0], [-9.0, -3.0, -8.0, -4.0]]).requires_grad_()
    assert highest(logits, 2, score_function).tolist() == [
        [True, False, False, True],
        [False, True, False, True],
    ]
    assert highest(logits, 1, score_function).int().sum(1).tolist() == [1, 1]


def test_numbers_by_hand():
    # two tokens, experts (1, 2) and (1, 3) of 4, scores 1/2, 1/4, 1/8, 1/8 and equal ones:
    # f = 4 / (2 * 2) * (2, 1, 1, 0), P = (3/8, 1/4, 3/16, 3/16), L = 3/4 + 1/4 + 3/16
    logits = torch.tensor([[math.log(4), math.log(2), 0.0, 0.0], [0.0] * 4])
    chosen = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]])
    one, two = torch.tensor([0, 0]), torch.tensor([2])
    loads = sequence_loads(chosen, one, 1)
    assert loads.tolist() == [[2, 1, 1, 0]]
    found = balance_sum(logits, loads, one, two, top_k=2, score_function="softmax")
    assert float(found) == pytest.approx(2 * 19 / 16)


def test_an_even_load_is_1_and_the_worst_one_all_experts_over_those_chosen():
    even, worst = torch.zeros(8, 8), torch.full((8, 8), -100.0)
    worst[:, 0] = 100.0
    one, eight = torch.zeros(8, dtype=torch.long), torch.tensor([8])
    for logits, chosen, expected in (
        (even, torch.eye(8), 1.0),
        (worst, torch.eye(8)[:1].expand(8, 8), 8.0),
    ):
        loads = sequence_loads(chosen, one, 1)
        for score_function in ("softmax", "sigmoid"):
            how = {"top_k": 1, "score_function": score_function}
            found = balance_sum(logits, loads, one, eight, **how)
            assert float(found) / 8 == pytest.approx(expected, rel=1e-5)


def test_parts_of_sequences_add_up_once_their_loads_do():
    logits, chosen = drawn()
    whole = computed(logits, chosen, "sigmoid")
    halves = [slice(0, 8), slice(8, None)]
    loads = sum(sequence_loads(chosen[half], SEQUENCES[half], 4) for half in halves)
    parts = [
        balance_sum(
            logits[half], loads, SEQUENCES[half], LENGTHS, top_k=2, score_function="sigmoid"
        )
        for half in halves
    ]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)


def test_scores_add_up_to_1_whatever_the_logits():
    for score_function in ("softmax", "sigmoid"):
        scores = normalized_scores(torch.tensor([[-50.0, -51.0], [200.0, 3.0]]), score_function)
        assert scores.sum(1).tolist() == pytest.approx([1, 1])
        assert float(scores[0, 0]) == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-4)
