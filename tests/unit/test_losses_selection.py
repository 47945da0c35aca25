"""Tokens of high entropy: threshold, weights, and what they make of the loss and its gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_occ.losses import entropy_threshold, entropy_weights
from tests.unit.rl_setup import four_updates, mini_batches, run_updates

FIVE = torch.tensor([0.3, 2.0, 0.1, 1.5, 0.7])


@pytest.mark.parametrize(
    ("share", "expected"),
    # a fifth of five is one token; 0.21 of them is more than one
    [(0.2, [1]), (0.21, [1, 3]), (0.4, [1, 3]), (0.6, [1, 3, 4]), (1.0, [0, 1, 2, 3, 4])],
)
def test_which_tokens_are_chosen(share: float, expected: list[int]) -> None:
    weights = entropy_weights(FIVE, entropy_threshold(FIVE, share))
    assert weights.nonzero().flatten().tolist() == expected
    assert set(weights.tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("count", [1, 5, 10, 15, 35, 70, 1000])
def test_rounding_of_the_share_takes_no_token_more(count: int) -> None:
    values = torch.arange(count, dtype=torch.float32)
    chosen = entropy_weights(values, entropy_threshold(values, 0.2)).sum()
    assert chosen == math.ceil(count / 5)


def test_equal_entropies_are_chosen_together() -> None:
    values = torch.tensor([1.0, 1.0, 1.0, 0.5])
    assert entropy_weights(values, entropy_threshold(values, 0.25)).tolist() == [1, 1, 1, 0]


def test_no_token_and_no_share() -> None:
    assert entropy_threshold(torch.zeros(0), 0.2) == math.inf
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="share is"):
            entropy_threshold(FIVE, share)


def test_updates_are_those_of_weights_chosen_by_hand() -> None:
    settings = ("mtp.preset=policy", "rl.loss.aggregation=token")
    trainer, actor = four_updates(*settings, "rl.loss.top_entropy=0.3")
    run_updates(trainer)
    other, plain = four_updates(*settings)
    (mini, *_) = mini_batches(other)
    rows = mini.rows
    arguments = {"parts": [range(len(rows))], "lengths": None, "temperature": 1.0}
    _, entropies = plain.get_inference_log_probs(rows.ids, **arguments, entropies=True)
    mask = torch.nn.functional.pad(rows.response_mask[:, 1:], (0, 1)) > 0
    ranked = sorted(entropies[mask].tolist(), reverse=True)
    least = ranked[math.ceil(0.3 * len(ranked)) - 1]
    weights = (entropies >= least).float()
    assert 0 < weights[mask].sum() < mask.sum()
    other.updater.run_update(replace(mini, rows=replace(rows, importance_weights=weights)))
    assert plain.losses[0] == pytest.approx(actor.losses[0], abs=1e-12)
    for name, gradient in plain.gradients[0].items():
        assert torch.equal(actor.gradients[0][name], gradient), name
    whole, every = four_updates(*settings)
    run_updates(whole)
    assert every.losses[0] != pytest.approx(plain.losses[0], abs=1e-6)
