"""Rollouts as tensors, and the frames of the joint loss's constants."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_occ.config.schema_loss import CorrectionConfig
from megatron_occ.rl.batch import (
    MiniBatch,
    RolloutBatch,
    head_masks,
    head_targets,
    joint_targets,
    masks_at_source,
    pad_masks,
    pad_sequences,
    sequence_ends,
)
from megatron_occ.rl.correction import Corrections
from tests.unit.fake_layouts import FakeLayout

# row 0: prompt 11 12, response 13 14 15; row 1: prompt 21, response 22
PROMPTS, RESPONSES = [[11, 12], [21]], [[13, 14, 15], [22]]
LOGPROBS = [[-0.3, -0.4, -0.5], [-0.2]]


def small_batch():
    advantages = torch.tensor([1.5, -0.5])
    return pad_sequences(PROMPTS, RESPONSES, LOGPROBS, advantages, 9, 5, torch.device("cpu"))


def scored_batch(**changes):
    """Old log-probs in the source frame: entry t is -(t + 1) / 10, about token t + 1."""
    old = -torch.arange(1, 6).float().div(10).expand(2, 5).clone()
    return small_batch().with_logprobs(old, changes.get("reference"))


def test_padding():
    batch = small_batch()
    assert len(batch) == 2
    assert batch.ids.tolist() == [[11, 12, 13, 14, 15], [21, 22, 9, 9, 9]]
    assert batch.response_mask.tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]
    expected = torch.tensor([[0, 0, -0.3, -0.4, -0.5], [0, -0.2, 0, 0, 0]])
    assert torch.equal(batch.rollout_logprobs, expected)
    assert batch.advantages.tolist() == [1.5, -0.5]
    assert batch.old_logprobs is None
    assert batch.ref_logprobs is None


def test_padding_refuses_lists_of_different_lengths():
    with pytest.raises(ValueError, match="zip"):
        pad_sequences(PROMPTS, RESPONSES[:1], LOGPROBS, torch.zeros(2), 0, 5, torch.device("cpu"))


def numbered_batch(rows=5, width=3):
    numbers = torch.arange(rows * width).view(rows, width).float()
    return RolloutBatch(numbers.long(), numbers + 1, numbers + 2, numbers[:, 0], numbers + 3)


def test_a_wider_batch_has_more_padding_and_one_without_rows_is_possible():
    cpu = torch.device("cpu")
    wide = pad_sequences(PROMPTS, RESPONSES, LOGPROBS, torch.zeros(2), 9, 7, cpu)
    assert wide.ids[:, 5:].tolist() == [[9, 9], [9, 9]]
    assert torch.equal(wide.trimmed(5).ids, small_batch().ids)
    empty = pad_sequences([], [], [], torch.zeros(0), 9, 7, cpu)
    assert empty.ids.shape == (0, 7)


def test_lengths_end_with_the_last_response_token():
    assert small_batch().lengths().tolist() == [5, 2]
    mask = torch.tensor([[0.0, 1, 0, 1, 0], [0, 0, 0, 0, 0]])
    batch = RolloutBatch(torch.zeros(2, 5).long(), mask, torch.zeros(2, 5), torch.zeros(2))
    assert batch.lengths().tolist() == [4, 1]  # a sequence is never empty
    assert sequence_ends(mask).tolist() == [4, 0]


def test_padded_micro_batches_hold_every_row_and_what_belongs_to_it():
    batch = numbered_batch()
    mini = MiniBatch.padded(batch, 2)
    assert mini.sizes == [2, 2, 1]
    parts = [rows for rows, lengths in mini.micro_batches() if lengths is None]
    assert [len(part) for part in parts] == [2, 2, 1]
    for name in ("ids", "response_mask", "rollout_logprobs", "advantages", "old_logprobs"):
        together = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(together, getattr(batch, name)), name
    assert all(part.ref_logprobs is None for part in parts)
    assert torch.equal(batch.rows(1, 3).old_logprobs, batch.old_logprobs[1:3])


def test_packed_micro_batches_are_as_wide_as_their_longest_sequence():
    batch = numbered_batch(rows=3, width=4)
    first, second = MiniBatch(batch, [1, 2], [3, 1, 2]).micro_batches()
    assert (first[1], second[1]) == ([3], [1, 2])
    assert torch.equal(first[0].ids, batch.ids[:1, :3])
    assert torch.equal(second[0].old_logprobs, batch.old_logprobs[1:, :2])
    assert torch.equal(second[0].advantages, batch.advantages[1:])


def test_targets_of_every_head():
    ids = torch.tensor([[11, 12, 13, 14, 15]])
    expected = [[[12, 13, 14, 15, 0]], [[13, 14, 15, 0, 0]], [[14, 15, 0, 0, 0]]]
    assert head_targets(ids, 2).tolist() == expected
    assert head_targets(ids, 0).tolist() == expected[:1]


def test_constants_of_every_depth_at_every_position():
    """Position t of depth d is about token t + 1 + d; entry t of the old log-probs about t + 1."""
    constants = joint_targets(scored_batch(), depths=2)
    # row 0: response tokens at 2, 3, 4; row 1: at 1
    assert constants.mask.tolist() == [
        [[0, 1, 1, 1, 0], [1, 0, 0, 0, 0]],
        [[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]],  # nothing predicts token 1 two steps ahead
        [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]],
    ]
    old = constants.old_logprobs
    assert old.shape == (3, 2, 5)
    frames = torch.tensor(
        [
            [-0.1, -0.2, -0.3, -0.4, -0.5],
            [-0.2, -0.3, -0.4, -0.5, 0.0],
            [-0.3, -0.4, -0.5, 0.0, 0.0],
        ]
    )
    for depth in range(3):
        for row in range(2):
            torch.testing.assert_close(old[depth, row], frames[depth])
    assert constants.advantages.tolist() == [1.5, -0.5]
    assert constants.importance_weights is None
    assert constants.ref_logprobs is None


def test_every_head_sees_the_same_old_logprob_of_the_same_token():
    """Random lengths, in plain Python: token x has one old log-prob, whoever predicts it."""
    generator = torch.Generator().manual_seed(0)
    rows, width, depths = 6, 12, 3
    ids = torch.randint(0, 50, (rows, width), generator=generator)
    mask = (torch.rand(rows, width, generator=generator) < 0.6).float()
    old = -torch.rand(rows, width, generator=generator)
    batch = RolloutBatch(ids, mask, torch.zeros(rows, width), torch.zeros(rows), old)
    constants = joint_targets(batch, depths)
    targets = head_targets(ids, depths)
    for depth in range(depths + 1):
        for row in range(rows):
            for t in range(width):
                token = t + 1 + depth
                exists = token < width
                where = (depth, row, t)
                assert constants.mask[where] == (mask[row, token] if exists else 0), where
                if exists:
                    assert targets[where] == ids[row, token], where
                    assert constants.old_logprobs[where] == old[row, token - 1], where
    assert torch.equal(constants.mask, head_masks(mask, depths))


def test_importance_weights_compare_the_same_token():
    """Sampled log-probs are token-aligned, old ones in the source frame."""
    # row 0, tokens 2, 3, 4: old -0.2 -0.3 -0.4, sampled -0.3 -0.4 -0.5: exp(0.1) > 1.1, capped
    # row 1, token 1: old -0.1, sampled -0.2
    expected = torch.ones(2, 5)
    expected[0, 1:4] = expected[1, 0] = 1.1
    corrected = Corrections(CorrectionConfig(weights="token", high=1.1))(scored_batch())
    torch.testing.assert_close(joint_targets(corrected, 1).importance_weights, expected)
    loose = Corrections(CorrectionConfig(weights="token", high=2.0))(scored_batch())
    torch.testing.assert_close(
        loose.importance_weights[0, 1:4], torch.full((3,), 1.1051709180756477)
    )


def test_a_rejected_token_is_no_head_s_target():
    batch = scored_batch()
    sampled = batch.rollout_logprobs.clone()
    # row 0: token 3 was drawn with a log-prob of -2, and its old one is -0.3
    sampled[0, 3] = -2.0
    corrections = Corrections(CorrectionConfig(reject="token", reject_high=2.0))
    corrected = corrections(replace(batch, rollout_logprobs=sampled))
    assert corrected.response_mask.tolist() == [[0, 0, 1, 0, 1], [0, 1, 0, 0, 0]]
    assert joint_targets(corrected, 2).mask.tolist() == [
        [[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]],
        [[1, 0, 1, 0, 0], [0, 0, 0, 0, 0]],
        [[0, 1, 0, 0, 0], [0, 0, 0, 0, 0]],
    ]
    metrics = {name: float(value) for name, value in corrections.metrics(FakeLayout()).items()}
    assert metrics == {"correction/rejected/tokens": 0.25, "correction/rejected/sequences": 0.0}


def test_reference_logprobs_are_handed_on():
    reference = torch.full((2, 5), -3.0)
    constants = joint_targets(scored_batch(reference=reference), 1)
    assert torch.equal(constants.ref_logprobs, reference)


def test_targets_before_the_old_logprobs_are_an_error():
    with pytest.raises(AssertionError, match="old log-probs"):
        joint_targets(small_batch(), 1)


def test_sampling_masks_stand_with_their_tokens_and_follow_the_rows():
    drawn = [torch.tensor([[3], [9]]).int(), torch.tensor([[4, 2, 0]]).int()]
    masks = pad_masks([[1], [1, 2]], drawn, (4, 3))
    assert masks.tolist() == [
        [[0, 0, 0], [3, 0, 0], [9, 0, 0], [0, 0, 0]],
        [[0, 0, 0], [0, 0, 0], [4, 2, 0], [0, 0, 0]],
    ]
    batch = replace(numbered_batch(2, 4), sampling_masks=masks)
    # position t is about token t + 1
    assert masks_at_source(batch)[0].tolist() == [[3, 0, 0], [9, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert torch.equal(batch.rows(1, 2).trimmed(3).sampling_masks, masks[1:, :3])
    assert masks_at_source(numbered_batch()) is None
