"""Acceptance of drafts: exact distributions, and rules that are wrong are found out."""

from __future__ import annotations

import pytest
import torch

from megatron_occ.rollout import coupled_accept, sample_from_uniform, speculative_accept

VOCABULARY, ROWS = 5, 60_000


def distributions(seed=0):
    """Target log-probs [3, v] after 0, 1, 2 drafts, and draft log-probs [2, v]."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, VOCABULARY, generator=generator, dtype=torch.float64)
    target, draft = (1.5 * logits[:3]).log_softmax(-1), logits[3:].log_softmax(-1)
    target[1, 3] = draft[0, 2] = -torch.inf  # can't be drawn, can't be drafted
    return target.log_softmax(-1), draft.log_softmax(-1)


def drafted(draft, generator):
    numbers = torch.rand(2, ROWS, generator=generator, dtype=torch.float64)
    pairs = zip(draft, numbers, strict=True)
    return torch.stack([sample_from_uniform(q.expand(ROWS, -1), u) for q, u in pairs], dim=1)


def first_tokens(accept, seed=1):
    """The first two committed tokens of many rows; the second is drawn anew after a rejection."""
    target, draft = distributions()
    generator = torch.Generator().manual_seed(seed)
    drafts = drafted(draft, generator)
    accepted, after = accept(
        drafts,
        draft.expand(ROWS, -1, -1),
        target.expand(ROWS, -1, -1),
        generator,
    )
    tokens = torch.cat((drafts, after.unsqueeze(1)), dim=1)
    return tokens.scatter(1, accepted.unsqueeze(1), after.unsqueeze(1)), accepted


def p_value(counts, probabilities):
    """Of a chi-square test of goodness of fit, by the Wilson-Hilferty approximation."""
    expected = probabilities * counts.sum()
    inside = expected > 0
    if counts[~inside].sum() > 0:
        return 0.0
    statistic = ((counts - expected)[inside] ** 2 / expected[inside]).sum()
    freedom = int(inside.sum()) - 1
    scaled = (statistic / freedom) ** (1 / 3)
    z = (scaled - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    return float(0.5 * torch.erfc(z / 2**0.5))


def by_depth(accept):
    """p-values of the first token, and of the second where the first was accepted."""
    target, _ = distributions()
    tokens, accepted = first_tokens(accept)
    values = []
    for depth in range(3):
        rows = tokens[accepted >= depth, depth]
        counts = torch.bincount(rows, minlength=VOCABULARY).double()
        values.append(p_value(counts, target[depth].exp()))
    return values


def always(drafts, draft_logprobs, target_logprobs, generator):
    """Keeps every draft."""
    accepted, after = speculative_accept(drafts, draft_logprobs, target_logprobs, generator)
    return torch.full_like(accepted, drafts.size(1)), after


def without_residual(drafts, draft_logprobs, target_logprobs, generator):
    """Draws from the target itself after a rejection."""
    accepted, _ = speculative_accept(drafts, draft_logprobs, target_logprobs, generator)
    at = accepted.view(-1, 1, 1).expand(-1, -1, VOCABULARY)
    wanted = target_logprobs.gather(1, at).squeeze(1)
    return accepted, sample_from_uniform(wanted, torch.rand(ROWS, generator=generator))


def test_committed_tokens_have_the_targets_distribution():
    assert min(by_depth(speculative_accept)) > 1e-3


@pytest.mark.parametrize("wrong", [always, without_residual])
def test_a_wrong_rule_is_found_out_by_the_same_test(wrong):
    assert min(by_depth(wrong)) < 1e-6


def test_the_acceptance_rate_is_one_minus_the_total_variation():
    target, draft = distributions()
    _, accepted = first_tokens(speculative_accept)
    overlap = torch.minimum(target[:2].exp(), draft.exp()).sum(-1)
    assert float((accepted >= 1).double().mean()) == pytest.approx(float(overlap[0]), abs=0.01)
    second = float((accepted >= 2).sum() / (accepted >= 1).sum())
    assert second == pytest.approx(float(overlap[1]), abs=0.01)


def test_acceptance_by_hand():
    """Draft 0 has p/q = 0.25 / 0.5: kept below 0.5; behind a rejection 1 and 2 are left."""
    draft = torch.tensor([0.5, 0.5, 0.0]).log().expand(4, 1, 3)
    target = torch.tensor([[0.25, 0.35, 0.4], [0.0, 0.0, 1.0]]).log().expand(4, 2, 3)
    uniform = torch.zeros(4, 2, 2, dtype=torch.float64)
    uniform[:, 0, 0] = torch.tensor([0.4999, 0.5001, 0.5001, 0.69])
    # residual (0, 0, 0.4): the draft 1 with p/q = 0.7 leaves only 2
    uniform[:, 0, 1] = torch.tensor([0.3, 0.0, 0.99, 0.5])
    drafts = torch.tensor([[0], [0], [0], [1]])
    accepted, after = speculative_accept(drafts, draft, target, uniform=uniform)
    assert accepted.tolist() == [1, 0, 0, 1]
    assert after.tolist() == [2, 2, 2, 2]


def test_equal_distributions_accept_everything():
    target, _ = distributions()
    drafts = drafted(target[:2], torch.Generator().manual_seed(3))[:100]
    accepted, after = speculative_accept(
        drafts,
        target[:2].expand(100, -1, -1),
        target.expand(100, -1, -1),
        torch.Generator().manual_seed(4),
    )
    assert accepted.tolist() == [2] * 100
    assert set(after.tolist()) <= set(range(VOCABULARY))


def test_one_hot_distributions_are_compared():
    eye = torch.full((3, 3), -torch.inf).fill_diagonal_(0.0)
    draft, target = eye[[0, 1]].unsqueeze(0), eye[[0, 2, 1]].unsqueeze(0)
    accepted, after = speculative_accept(torch.tensor([[0, 1]]), draft, target)
    assert (accepted.tolist(), after.tolist()) == ([1], [2])


def test_without_drafts_the_target_is_sampled():
    target, _ = distributions()
    rows = target[:1].expand(1000, 1, -1)
    uniform = torch.rand(1000, 1, 2, dtype=torch.float64)
    none = torch.zeros(1000, 0, dtype=torch.long)
    accepted, after = speculative_accept(
        none, torch.zeros(1000, 0, VOCABULARY), rows, uniform=uniform
    )
    assert accepted.sum() == 0
    assert torch.equal(after, sample_from_uniform(rows[:, 0], uniform[:, 0, 1]))


def test_coupled_drafts_stay_up_to_the_first_difference():
    drafts = torch.tensor([[1, 2, 3], [1, 0, 3], [0, 2, 3], [1, 2, 0]])
    targets = torch.tensor([1, 2, 3, 4]).expand(4, -1)
    assert coupled_accept(drafts, targets).tolist() == [3, 1, 0, 2]
    assert coupled_accept(drafts[:, :0], targets[:, :1]).tolist() == [0] * 4
