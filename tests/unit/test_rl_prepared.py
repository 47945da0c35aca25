"""What a mini-batch tells of itself before it is trained on."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_occ.config import load_config
from megatron_occ.rl.batch import MiniBatch, RolloutBatch
from megatron_occ.rl.prepared import PreparedBatch
from tests.unit.fake_layouts import FakeLayout

MASK = torch.tensor([[0.0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]])


def prepared(advantages, *overrides, layout=None, **changes):
    rows = RolloutBatch(
        torch.zeros(3, 4).long(), MASK, -MASK, torch.tensor(advantages), old_logprobs=-MASK
    )
    actor = SimpleNamespace(
        layout=layout or FakeLayout(),
        num_depths=1,
        micro_batch=lambda _ids, _targets, **named: named,
    )
    mini = MiniBatch.padded(replace(rows, **changes), 2)
    return PreparedBatch(load_config([], list(overrides)), actor, mini)


def test_a_row_that_is_left_out_has_no_token_for_routers_to_balance():
    ends = [part["ends"].tolist() for part in prepared([1.0, 1.0, 1.0]).micro_batches()]
    assert ends == [[3, 0], [4]]


@pytest.mark.parametrize(
    ("advantages", "overrides", "expected"),
    [
        ([0.0, 0.0, -0.5], [], True),
        ([0.0, 0.0, 0.0], [], False),
        # of a response that is left out
        ([0.0, 2.0, 0.0], [], False),
        ([0.0, 0.0, 0.0], ["rl.loss.kl_coefficient=0.1"], True),
        ([0.0, 0.0, 0.0], ["rl.loss.entropy_coefficient=0.1"], True),
    ],
)
def test_the_policy_learns_from_advantages_of_tokens_that_count(advantages, overrides, expected):
    assert prepared(advantages, *overrides).teaches_policy() is expected


def test_without_a_weight_an_advantage_teaches_nothing_nor_do_terms_without_a_token():
    assert prepared([1.0] * 3, importance_weights=MASK).teaches_policy()
    assert not prepared([1.0] * 3, importance_weights=torch.zeros(3, 4)).teaches_policy()
    nothing = {"response_mask": torch.zeros(3, 4)}
    assert not prepared([1.0] * 3, "rl.loss.kl_coefficient=0.1", **nothing).teaches_policy()


def test_another_rank_may_have_what_this_one_has_not():
    class Two(FakeLayout):
        def all_reduce_data_parallel(self, values, *, maximum=False):
            return values + 1

    assert prepared([0.0] * 3, layout=Two()).teaches_policy()
