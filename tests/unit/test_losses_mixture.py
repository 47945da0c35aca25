"""Mixtures of gradients: the formulas by hand, and against a search."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_occ.losses.mixture import best_mixture, gram_weights, mixture_slope, update_share

# E|g_0|^2 = 1.33, v^2 = 0.59, common noise 0.066; signals 0.01 and 0.0016
SAME = torch.tensor([[1.33, 0.066], [0.066, 0.59]], dtype=torch.float64)
SIGNAL = torch.tensor([0.01, 0.0016], dtype=torch.float64)


def step_gain(weights, same, signal, step):
    """Of a step along sum w_i g_i with L = 1."""
    return step * float(signal @ weights) - step**2 / 2 * float(weights @ same @ weights)


def test_one_depth_by_hand():
    mixture = best_mixture(SAME, SIGNAL)
    # S^-1 h up to the determinant: (h0 v2 - c cs, c r2 - h0 cs)
    main, mtp = 0.01 * 0.59 - 0.0016 * 0.066, 0.0016 * 1.33 - 0.01 * 0.066
    assert mixture.weights.item() == pytest.approx(mtp / main, rel=1e-12)
    gain = (0.01 * main + 0.0016 * mtp) / (1.33 * 0.59 - 0.066**2)
    assert mixture.gain == pytest.approx(gain / (0.01**2 / 1.33) - 1, rel=1e-9)


def test_no_other_mixture_gains_more_and_the_gain_is_that_of_a_search():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    same = noise @ noise.T + torch.eye(3, dtype=torch.float64)
    signal = torch.tensor([0.5, 0.2, 0.1], dtype=torch.float64)
    mixture = best_mixture(same, signal)
    steps = torch.linspace(0, 1, 2001).tolist()
    best = torch.cat((torch.ones(1, dtype=torch.float64), mixture.weights))
    reached = max(step_gain(best, same, signal, step) for step in steps)
    alone = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    base = max(step_gain(alone, same, signal, step) for step in steps)
    assert reached / base - 1 == pytest.approx(mixture.gain, rel=1e-3)
    for _ in range(50):
        other = best + 0.3 * torch.randn(3, generator=generator, dtype=torch.float64)
        assert max(step_gain(other, same, signal, s) for s in steps) <= reached * (1 + 1e-4)


def test_the_slope_of_given_weights_by_hand():
    # (h0 + w h1) / sqrt(S00 + 2 w S01 + w^2 S11) over h0 / sqrt(S00), w = 1
    expected = (0.0116 / math.sqrt(1.33 + 2 * 0.066 + 0.59)) / (0.01 / math.sqrt(1.33))
    assert mixture_slope(SAME, SIGNAL, torch.ones(1)) == pytest.approx(expected, rel=1e-6)
    best = best_mixture(SAME, SIGNAL)
    slope = mixture_slope(SAME, SIGNAL, best.weights)
    assert slope**2 - 1 == pytest.approx(best.gain, rel=1e-9)
    assert mixture_slope(SAME, SIGNAL, torch.zeros(1)) == 1
    # against RL's direction no step gains
    assert mixture_slope(SAME, torch.tensor([0.01, -0.02]), torch.ones(1)) < 0


def test_an_mtp_gradient_that_is_rls_own_direction_adds_nothing():
    # g_1 = 2 g_0 + noise of its own: h_1 = 2 h_0, S_01 = 2 S_00
    same = torch.tensor([[1.0, 2.0], [2.0, 5.0]], dtype=torch.float64)
    mixture = best_mixture(same, torch.tensor([0.1, 0.2], dtype=torch.float64))
    assert mixture.weights.item() == pytest.approx(0.0, abs=1e-12)
    assert mixture.gain == pytest.approx(0.0, abs=1e-12)


def test_common_noise_makes_the_best_weight_negative_where_there_is_no_signal():
    mixture = best_mixture(SAME, torch.tensor([0.01, 0.0], dtype=torch.float64))
    assert mixture.weights.item() < 0 < mixture.gain


def test_gram_weights_are_c_over_v2_for_one_depth_and_do_not_count_twice_what_two_share():
    assert gram_weights(torch.tensor([[4.0]]), torch.tensor([2.0])).item() == 0.5
    # the same gradient twice, but for a little noise: half of the weight each
    gram = torch.tensor([[4.0 + 1e-9, 4.0], [4.0, 4.0 + 1e-9]], dtype=torch.float64)
    weights = gram_weights(gram, torch.tensor([2.0, 2.0], dtype=torch.float64))
    assert weights.tolist() == pytest.approx([0.25, 0.25], rel=1e-6)


def test_what_can_not_be_solved_is_not_finite():
    assert not gram_weights(torch.zeros(1, 1), torch.ones(1)).isfinite().any()
    negative = best_mixture(SAME, torch.tensor([-0.01, 0.0], dtype=torch.float64))
    assert not negative.weights.isfinite().any()


def test_share_is_the_ratio_of_norms():
    g = torch.tensor([[3.0, 4.0, 0.0], [0.0, 1.0, 1.0], [2.0, 0.0, 1.0]], dtype=torch.float64)
    weights = torch.tensor([0.5, -1.0], dtype=torch.float64)
    part = 0.5 * g[1] - g[2]
    assert update_share(g @ g.T, weights) == pytest.approx(float(part.norm()) / 5)
    assert update_share(torch.zeros(2, 2), torch.ones(1)) == 0
    assert math.isfinite(update_share(SAME, torch.tensor([0.0])))
