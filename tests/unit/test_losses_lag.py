"""What lag does to lambda and to products of gradients, by hand and by counting all cases."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_occ.losses.calibration import calibration_sums, coefficient_from_sums
from megatron_occ.losses.correction import CorrectionSettings, correct

SEQUENCE = CorrectionSettings(weights="sequence")
TOKEN = CorrectionSettings(weights="token")


def sums(logprobs, old, mtp):
    rows = [torch.tensor([values], dtype=torch.float64) for values in (logprobs, old)]
    return calibration_sums(
        *rows, torch.tensor([[mtp]], dtype=torch.float64), torch.ones(1, len(old))
    )


def test_what_the_policy_moved_between_versions_counts_in_both_factors_of_lambda():
    """With log-probs o - d of older weights in place of o, the cross term grows by
    <d, (l - o) + (m - o)> + |d|^2: lambda is positive where nothing agrees."""
    moved, gap, drift = [0.1, -0.1], [-0.3, -0.3], [0.2, -0.4]
    old = [-1.0, -2.0]
    now = [o + x for o, x in zip(old, moved, strict=True)]
    mtp = [o + x for o, x in zip(old, gap, strict=True)]
    rollout = [o - d for o, d in zip(old, drift, strict=True)]
    right, lagging = sums(now, old, mtp), sums(now, rollout, mtp)
    # moved and gap are at right angles
    assert float(right.cross) == pytest.approx(0.0)
    # <d, moved> = 0.06, <d, gap> = 0.06, |d|^2 = 0.2
    assert float(lagging.cross) == pytest.approx(0.32)
    assert float(coefficient_from_sums(right, lambda_plus=1.0)) == pytest.approx(0.0)
    # |gap + d|^2 = 0.01 + 0.49
    assert float(coefficient_from_sums(lagging, lambda_plus=1.0)) == pytest.approx(0.32 / 0.5)


def log_policy(parameters):
    """Log-probs of the first token [3], and of the second by the first [3, 3]."""
    first, second = parameters[:3], parameters[3:].view(3, 3)
    return first.log_softmax(0), second.log_softmax(1)


def draws(now, first_weights, second_weights):
    """Every response of two tokens: its probability, advantage, ratios and gradient.

    The first token was drawn under one version of the weights, the second under a later one.
    """
    (first, _), (_, second) = log_policy(first_weights), log_policy(second_weights)
    found = []
    for a, b in itertools.product(range(3), range(3)):
        parameters = now.clone().requires_grad_()
        own_first, own_second = log_policy(parameters)
        logprobs = torch.stack([own_first[a], own_second[a, b]])
        sampled = torch.stack([first[a], second[a, b]])
        (gradient,) = torch.autograd.grad(logprobs.sum(), parameters)
        advantage = float((a - 1) * (b + 1))
        found.append((sampled.sum().exp(), advantage * gradient, logprobs.detach(), sampled))
    return found


def weights_of(logprobs, sampled, settings):
    found = correct(logprobs[None], sampled[None], torch.ones(1, 2), settings)
    return found.weights[0]


@pytest.fixture
def versions():
    generator = torch.Generator().manual_seed(3)
    oldest = torch.randn(12, generator=generator, dtype=torch.float64)
    older = oldest + 0.4 * torch.randn(12, generator=generator, dtype=torch.float64)
    now = older + 0.4 * torch.randn(12, generator=generator, dtype=torch.float64)
    return now, older, oldest


def expectation(found, weigh):
    return sum(p * weigh(logprobs, sampled) * g for p, g, logprobs, sampled in found)


def one(logprobs, sampled):
    return 1.0


def ratio(logprobs, sampled):
    return weights_of(logprobs, sampled, SEQUENCE)[0]


def test_sequence_weights_make_up_for_responses_of_several_versions(versions):
    now, older, oldest = versions
    wanted = expectation(draws(now, now, now), one)
    straddling = draws(now, oldest, older)
    assert float(sum(p for p, *_ in straddling)) == pytest.approx(1.0)
    # each token's log-prob under its own version is all that it takes
    torch.testing.assert_close(expectation(straddling, ratio), wanted)
    assert float((expectation(straddling, one) - wanted).norm() / wanted.norm()) > 0.1


def test_token_weights_are_a_first_order_of_it(versions):
    now, older, oldest = versions
    wanted = expectation(draws(now, now, now), one)

    def error(step):
        near = [now + step * (weights - now) for weights in (oldest, older)]
        total = 0
        for p, _, logprobs, sampled in draws(now, *near):
            each = weights_of(logprobs, sampled, TOKEN)
            total = total + p * each.prod() - p * torch.exp((logprobs - sampled).sum())
        found = expectation(draws(now, *near), lambda a, b: weights_of(a, b, TOKEN).mean())
        assert float(total) == pytest.approx(0.0, abs=1e-9)
        plain = expectation(draws(now, *near), one)
        return float((found - wanted).norm()), float((plain - wanted).norm())

    weighted, plain = error(0.1)
    assert 0 < weighted < plain


def test_products_of_two_halves_are_those_of_their_means_whatever_the_lag(versions):
    """Pairs of ``mtp.trunk.exact.pairs=cross``: other responses of the same mini-batch."""
    now, older, oldest = versions
    found = draws(now, oldest, older)
    mean = expectation(found, ratio)
    crossed = sum(
        p * q * (ratio(a, s) * g) @ (ratio(b, t) * h)
        for (p, g, a, s), (q, h, b, t) in itertools.product(found, found)
    )
    assert float(crossed) == pytest.approx(float(mean @ mean))
    fresh = expectation(draws(now, now, now), one)
    assert float(crossed) == pytest.approx(float(fresh @ fresh))
    # of the same response: the variance comes on top, and with weights more of it
    same = sum(p * ((ratio(a, s) * g) @ (ratio(a, s) * g)) for p, g, a, s in found)
    without = sum(p * (g @ g) for p, g, _, _ in draws(now, now, now))
    assert float(same) > float(crossed) and float(without) > float(fresh @ fresh)
