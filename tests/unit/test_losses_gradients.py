"""Gradients of a user's module taken apart, and their inner products."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from megatron_occ.losses import (
    GradientWindow,
    adam_denominators,
    gradient_products,
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


def test_the_window_multiplies_with_earlier_mini_batches_alone(model):
    batches = [torch.randn(5, 3, dtype=torch.float64) for _ in range(4)]
    window = GradientWindow(2, GROUPS)
    found = [window.products(trunk_gradients(model.losses(b), model.trunk())) for b in batches]
    assert found[0].cross is None
    passes = [[separately(model, batch, loss) for loss in (0, 1)] for batch in batches]
    last = found[3]
    for i in (0, 1):
        for j in (0, 1):
            expected = by_hand(passes[3][i], passes[3][j], GROUPS)
            assert last.same[i, j].tolist() == pytest.approx(expected, abs=1e-15)
            # of the last two, in both orders
            pairs = [(3, 1), (1, 3), (3, 2), (2, 3)]
            parts = [by_hand(passes[a][i], passes[b][j], GROUPS) for a, b in pairs]
            expected = [sum(group) / 4 for group in zip(*parts, strict=True)]
            assert last.cross[i, j].tolist() == pytest.approx(expected, abs=1e-15)


def test_gradients_that_are_not_finite_are_reported_and_not_kept():
    window = GradientWindow(3)
    broken = [[torch.tensor([math.inf])], [torch.tensor([1.0])]]
    assert not window.products(broken).is_finite
    found = window.products([[torch.tensor([2.0])], [torch.tensor([1.0])]])
    assert found.is_finite and found.cross is None


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


def test_products_across_mini_batches_are_unbiased_and_those_within_are_not():
    policy, generator = Policy(), torch.Generator().manual_seed(5)

    def mini_batch():
        actions = torch.multinomial(policy.probabilities(), 4, True, generator=generator)
        weights = torch.bincount(actions, minlength=4).double() / 4
        return trunk_gradients(policy.losses(weights), [policy.trunk])

    main, mtp = trunk_gradients(policy.losses(policy.probabilities()), [policy.trunk])
    truth = float(main[0] @ mtp[0])
    found = []
    for _ in range(300):
        # a window of its own, so that the pairs are independent
        window = GradientWindow(1)
        window.products(mini_batch())
        found.append(window.products(mini_batch()))
    for kind, is_biased in (("cross", False), ("same", True)):
        values = torch.stack([getattr(sample, kind)[0, 1, 0] for sample in found])
        error = float(values.std()) / math.sqrt(len(values))
        assert (abs(float(values.mean()) - truth) > 4 * error) == is_biased
