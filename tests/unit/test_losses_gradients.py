"""Gradients of a user's module taken apart, and their inner products."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from megatron_occ.losses import (
    adam_denominators,
    gradient_products,
    parts_by_prompt,
    products_of_parts,
    trunk_gradients,
)


class TwoHeads(nn.Module):
    """A trunk of two layers, of which one head reads both and the other the first alone."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)
        self.main, self.mtp = nn.Linear(4, 2), nn.Linear(4, 2)

    def losses(self, inputs):
        hidden = self.first(inputs).tanh()
        main = self.main(self.second(hidden).tanh()).logsumexp(-1).mean()
        return [main, self.mtp(hidden).square().mean()]

    def trunk(self):
        return [*self.first.parameters(), *self.second.parameters()]


GROUPS = [0, 0, 1, 1]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TwoHeads().double()


def separately(model, inputs, loss):
    """Brute force: a forward and a backward pass for one loss, entries read one by one."""
    model.zero_grad()
    model.losses(inputs)[loss].backward()
    return [
        [0.0] * p.numel() if p.grad is None else p.grad.flatten().tolist() for p in model.trunk()
    ]


def by_hand(left, right, groups=None, divided=None):
    """Inner product of two such lists in each group."""
    groups = groups or [0] * len(left)
    totals = [0.0] * (1 + max(groups))
    for index, group in enumerate(groups):
        for place, (a, b) in enumerate(zip(left[index], right[index], strict=True)):
            totals[group] += a * b / (divided[index][place] if divided else 1.0)
    return totals


def test_products_are_those_of_separate_backward_passes(model):
    inputs = torch.randn(5, 3, dtype=torch.float64)
    gradients = trunk_gradients(model.losses(inputs), model.trunk())
    found = gradient_products(gradients, gradients, groups=GROUPS)
    assert found.shape == (2, 2, 2)
    passes = [separately(model, inputs, loss) for loss in (0, 1)]
    for i in (0, 1):
        for j in (0, 1):
            expected = by_hand(passes[i], passes[j], GROUPS)
            assert found[i, j].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    # the MTP head does not read the second layer
    assert found[1, 1, 1] == 0 and found[0, 0, 1] > 0
    ungrouped = gradient_products(gradients, gradients)
    torch.testing.assert_close(ungrouped[..., 0], found.sum(-1))


def test_products_of_half_precision_do_not_overflow():
    gradient = [torch.full((100,), 3e4, dtype=torch.float16)]
    assert gradient_products([gradient], [gradient]).item() == pytest.approx(9e10, rel=1e-3)


def test_nothing_is_left_in_the_model_and_a_backward_pass_can_follow(model):
    losses = model.losses(torch.randn(5, 3, dtype=torch.float64))
    gradients = trunk_gradients(losses, model.trunk())
    assert all(p.grad is None for p in model.parameters())
    (losses[0] + 3 * losses[1]).backward()
    for parameter, main, mtp in zip(model.trunk(), *gradients, strict=True):
        torch.testing.assert_close(parameter.grad, main + 3 * mtp)


def test_a_loss_that_is_cut_off_is_refused(model):
    losses = model.losses(torch.randn(5, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="loss 1 reaches none of the 2 parameters"):
        trunk_gradients(losses, list(model.second.parameters()))
    with pytest.raises(ValueError, match="loss 0 reaches none"):
        trunk_gradients([losses[0].detach()], model.trunk())


def test_two_parts_equal_a_hand_computation():
    # RL's and MTP's gradient of each half, on two parameters of a group each
    halves = [
        [
            [torch.tensor([1.0, 2.0]), torch.tensor([4.0])],
            [torch.tensor([0.0, 1.0]), torch.ones(1)],
        ],
        [[torch.tensor([3.0, -1.0]), torch.ones(1)], [torch.tensor([2.0, 2.0]), -torch.ones(1)]],
    ]
    found = products_of_parts(halves, groups=[0, 1])
    # of the whole: RL (4, 1 | 5), MTP (2, 3 | 0)
    assert found.same[..., 0].tolist() == [[17.0, 11.0], [11.0, 13.0]]
    assert found.same[..., 1].tolist() == [[25.0, 0.0], [0.0, 0.0]]
    # twice <g_i, g_j'> + <g_i', g_j>: RL with itself 2 (1 + 1), with MTP 2 (6 - 1)
    assert found.cross[..., 0].tolist() == [[4.0, 10.0], [10.0, 8.0]]
    assert found.cross[..., 1].tolist() == [[16.0, -6.0], [-6.0, -4.0]]
    scaled = products_of_parts(halves, denominators=[torch.tensor([1.0, 2.0]), torch.tensor([4.0])])
    assert scaled.same[0, 1].item() == 8.0 + 3.0 / 2 + 0.0 / 4
    # first entries 1 * 2 + 3 * 0, second 2 * 2 - 1 * 1, third -4 * 1 + 1 * 1
    assert scaled.cross[0, 1].item() == 2 * (2.0 + 3.0 / 2 - 3.0 / 4)


@pytest.mark.parametrize("count", [2, 3])
def test_parts_pair_with_all_others_and_add_up(model, count):
    batches = [torch.randn(5, 3, dtype=torch.float64) for _ in range(count)]
    found = products_of_parts(
        [
            trunk_gradients([loss / count for loss in model.losses(b)], model.trunk())
            for b in batches
        ],
        groups=GROUPS,
    )
    whole = [separately(model, torch.cat(batches), loss) for loss in (0, 1)]
    passes = [[separately(model, batch, loss) for loss in (0, 1)] for batch in batches]
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    for i in (0, 1):
        for j in (0, 1):
            expected = by_hand(whole[i], whole[j], GROUPS)
            assert found.same[i, j].tolist() == pytest.approx(expected, abs=1e-15)
            # the mean over pairs of means over their rows
            terms = [by_hand(passes[a][i], passes[b][j], GROUPS) for a, b in pairs]
            expected = [sum(group) / len(pairs) for group in zip(*terms, strict=True)]
            assert found.cross[i, j].tolist() == pytest.approx(expected, abs=1e-15)


def test_parts_are_equal_and_no_prompt_is_in_two():
    numbers = torch.tensor([7, 3, 3, 5, 7, 7, 9, 5, 3, 4])
    padded = torch.stack([torch.zeros_like(numbers), numbers, numbers % 2], dim=1)
    for prompts in (numbers, padded):
        parts = [part.tolist() for part in parts_by_prompt(prompts, 2)]
        assert sorted(parts[0] + parts[1]) == list(range(10))
        assert [len(part) for part in parts] == [5, 5]
        first, second = ({int(numbers[row]) for row in part} for part in parts)
        assert not first & second
    with pytest.raises(ValueError, match="5 prompts make no 6 parts"):
        parts_by_prompt(numbers, 6)


def test_one_part_has_no_pairs_with_others(model):
    gradients = trunk_gradients(model.losses(torch.randn(5, 3, dtype=torch.float64)), model.trunk())
    found = products_of_parts([gradients])
    assert found.cross is None
    assert torch.equal(found.same, gradient_products(gradients, gradients))


def test_parts_that_do_not_fit_are_refused_and_infinite_ones_reported():
    one, infinite = [torch.tensor([1.0])], [torch.tensor([math.inf])]
    for parts in ([], [[one, one], [one]]):
        with pytest.raises(ValueError, match="give one part or more, all with 1 \\+ K"):
            products_of_parts(parts)
    assert products_of_parts([[one], [one]]).is_finite
    assert not products_of_parts([[one], [infinite]]).is_finite


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_the_denominators_are_those_of_the_update(model, optimizer):
    """Without momentum Adam moves each entry by lr g / denominator."""
    rate = 0.01
    optimizer = optimizer(model.parameters(), lr=rate, betas=(0.0, 0.9), eps=1e-3, weight_decay=0.0)
    for _ in range(3):
        before = [p.detach().clone() for p in model.trunk()]
        optimizer.zero_grad()
        losses = model.losses(torch.randn(5, 3, dtype=torch.float64))
        losses[0].backward()
        optimizer.step()
    found = adam_denominators(optimizer, model.trunk())
    for parameter, old, denominator in zip(model.trunk(), before, found, strict=True):
        torch.testing.assert_close(parameter.detach(), old - rate * parameter.grad / denominator)


def test_products_in_adams_metric_equal_a_hand_computation():
    weight = nn.Parameter(torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))
    optimizer = torch.optim.Adam([weight], betas=(0.9, 0.5), eps=0.1)
    for gradient in ([4.0, 1.0, 0.0], [2.0, 3.0, 0.0]):
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    # v of two updates at 0.5, over 1 - 0.5^2: (0.25 g1^2 + 0.5 g2^2) / 0.75
    roots = [math.sqrt((0.25 * 16 + 0.5 * 4) / 0.75) + 0.1, math.sqrt(4.75 / 0.75) + 0.1]
    denominators = adam_denominators(optimizer, [weight])
    assert denominators[0].tolist() == pytest.approx([*roots, math.inf])
    left, right = ([torch.tensor(values)] for values in ([1.0, 2.0, 3.0], [5.0, -1.0, 7.0]))
    found = gradient_products([left], [right], denominators=denominators)
    # the third entry has never been updated: it takes no part
    assert found.item() == pytest.approx(5.0 / roots[0] - 2.0 / roots[1])


def test_an_optimizer_without_the_moments_is_refused(model):
    optimizer = torch.optim.Adam(model.first.parameters())
    with pytest.raises(ValueError, match="after its first update"):
        adam_denominators(optimizer, list(model.first.parameters()))
    with pytest.raises(ValueError, match=r"shape \[4, 4\] is not in the optimizer"):
        adam_denominators(optimizer, list(model.second.parameters()))
    amsgrad = torch.optim.Adam(model.first.parameters(), amsgrad=True)
    model.losses(torch.randn(5, 3, dtype=torch.float64))[0].backward()
    amsgrad.step()
    with pytest.raises(ValueError, match="without amsgrad"):
        adam_denominators(amsgrad, list(model.first.parameters()))


class Policy(nn.Module):
    """A softmax policy over 4 actions and an MTP head on one vector, known in full."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.trunk = nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64))
        self.main, other = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
        self.mtp = self.main + 0.5 * other
        self.rewards = torch.tensor([1.0, -1.0, 0.5, -2.0], dtype=torch.float64)

    def losses(self, weights):
        """-sum_a weights[a] reward[a] log p(a) of both heads."""
        logprobs = [(head @ self.trunk).log_softmax(0) for head in (self.main, self.mtp)]
        return [-(weights * self.rewards * p).sum() for p in logprobs]

    def probabilities(self):
        return (self.main @ self.trunk).softmax(0).detach()


def test_products_across_parts_are_unbiased_and_those_within_are_not():
    policy, generator = Policy(), torch.Generator().manual_seed(5)

    def half():
        actions = torch.multinomial(policy.probabilities(), 4, True, generator=generator)
        weights = torch.bincount(actions, minlength=4).double() / 8
        return trunk_gradients(policy.losses(weights), [policy.trunk])

    main, mtp = trunk_gradients(policy.losses(policy.probabilities()), [policy.trunk])
    truth = float(main[0] @ mtp[0])
    found = [products_of_parts([half(), half()]) for _ in range(300)]
    for kind, is_biased in (("cross", False), ("same", True)):
        values = torch.stack([getattr(sample, kind)[0, 1, 0] for sample in found])
        error = float(values.std()) / math.sqrt(len(values))
        assert (abs(float(values.mean()) - truth) > 4 * error) == is_biased
