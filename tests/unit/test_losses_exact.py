"""Lambda from inner products of gradients: gate, scale, share, and what is unbiased."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from megatron_occ.losses.exact import ExactCalibrator, ExactSettings, GradientProducts
from megatron_occ.losses.mixture import best_mixture

SAME = torch.tensor([[4.0, 0.4], [0.4, 2.0]], dtype=torch.float64)


def products(same=SAME, cross=None):
    grouped = [None if part is None else part.unsqueeze(-1) for part in (same, cross)]
    return GradientProducts(*grouped)


def cross(signal, c):
    return torch.tensor([[signal, c], [c, 0.0]], dtype=torch.float64)


def calibrated(settings, samples):
    calibrator = ExactCalibrator(1, 1, settings)
    for sample in samples:
        answer = calibrator.update(sample)
    return answer


def noisy(c, spread, count=40, signal=1.0):
    """Samples of c with mean c, in turn above and below it."""
    signs = [1 if i % 2 else -1 for i in range(count)]
    return [products(cross=cross(signal + 0.01 * s, c + spread * s)) for s in signs]


OPEN = {"gate": 0.0, "share_cap": None, "clamp": (None, None), "ema": 1.0}


def test_same_pairs_are_the_papers_coefficient_from_full_gradients():
    settings = ExactSettings(pairs="same", lambda_plus=3.0, **OPEN)
    answer = calibrated(settings, [products()])
    assert answer.values.item() == pytest.approx(3.0 * 0.4 / 2.0)
    assert answer.raw.item() == answer.values.item()
    # |lambda| |g_1| / |g_0|
    assert answer.share.item() == pytest.approx(0.6 * math.sqrt(2.0 / 4.0))


def test_cross_pairs_give_c_over_v2_with_the_error_of_c():
    settings = ExactSettings(lambda_plus=2.0, **OPEN)
    answer = calibrated(settings, noisy(0.3, 0.1, count=50))
    assert answer.values.item() == pytest.approx(2.0 * 0.3 / 2.0)
    assert answer.error.item() == pytest.approx(2.0 / 2.0 * 0.1 / math.sqrt(49))


def test_without_a_scale_it_is_that_of_the_best_mixture():
    answer = calibrated(ExactSettings(lambda_plus=None, **OPEN), noisy(0.3, 0.1))
    expected = best_mixture(SAME, torch.tensor([1.0, 0.3]))
    assert answer.values.item() == pytest.approx(expected.weights.item())


@pytest.mark.parametrize(("spread", "acts"), [(0.5, True), (3.0, False)])
def test_the_gate_lets_through_what_is_clear_of_zero(spread, acts):
    # standard errors: 0.5 / sqrt(39) = 0.08 and 0.48, c = 0.3
    settings = ExactSettings(lambda_plus=1.0, **OPEN | {"gate": 2.0})
    answer = calibrated(settings, noisy(0.3, spread))
    assert (answer.values.item() != 0) == acts
    assert answer.raw.item() == pytest.approx(0.15)


def test_the_gate_is_shut_for_the_first_samples():
    calibrator = ExactCalibrator(1, 1, ExactSettings(lambda_plus=1.0, **OPEN | {"gate": 1.0}))
    values = [calibrator.update(sample).values.item() for sample in noisy(0.3, 0.01)]
    assert [value != 0 for value in values[:10]] == [False] * 7 + [True] * 3


def test_without_a_scale_the_error_is_that_of_the_numerator():
    samples = [(1.0, 0.3), (1.4, 0.5), (0.7, 0.1), (1.1, 0.4), (0.8, 0.2)]
    settings = ExactSettings(lambda_plus=None, **OPEN)
    answer = calibrated(settings, [products(cross=cross(h, c)) for h, c in samples])
    numerators = [c * 4.0 - h * 0.4 for h, c in samples]
    h, c = (sum(part) / 5 for part in zip(*samples, strict=True))
    below = h * 2.0 - c * 0.4
    assert answer.raw.item() == pytest.approx((c * 4.0 - h * 0.4) / below)
    assert answer.raw.item() == pytest.approx(answer.values.item())
    error = statistics.stdev(numerators) / math.sqrt(5) / below
    assert answer.error.item() == pytest.approx(error, rel=1e-9)


def test_a_gradient_that_is_rls_own_with_more_noise_seldom_passes_the_gate():
    # g_1 = g_0 + noise of its own: c = |G|^2 and c_same = E|g_0|^2, so that the best weight is 0
    generator = torch.Generator().manual_seed(0)
    expected = torch.full((20,), 0.3, dtype=torch.float64)
    settings = ExactSettings(lambda_plus=None, **OPEN | {"gate": 2.0, "clamp": (0.0, None)})
    acted = 0
    for _ in range(40):
        calibrator = ExactCalibrator(1, 1, settings)
        for _ in range(40):
            halves = []
            for _ in range(2):
                main = expected + torch.randn(20, generator=generator, dtype=torch.float64)
                noise = torch.randn(20, generator=generator, dtype=torch.float64)
                halves.append(torch.stack((main, main + noise)) / 2)
            total = halves[0] + halves[1]
            same = total @ total.T
            apart = 2 * (same - sum(half @ half.T for half in halves))
            answer = calibrator.update(products(same, apart))
        acted += bool(answer.values > 0)
    assert acted <= 4


def test_a_share_holds_for_several_depths_where_one_is_clamped():
    same = torch.tensor([[4.0, 0.5, 0.3], [0.5, 2.0, 1.98], [0.3, 1.98, 2.0]], dtype=torch.float64)
    settings = ExactSettings(
        pairs="same", lambda_plus=10.0, **OPEN | {"share_cap": 0.5, "clamp": (0.0, None)}
    )
    answer = ExactCalibrator(2, 1, settings).update(products(same))
    assert answer.values.min() == 0 < answer.values.max()
    assert answer.share.item() == pytest.approx(0.5)


def test_a_depth_that_would_be_clamped_leaves_the_others_their_own_best_weight():
    same = torch.tensor([[1, 0.03, 0.03], [0.03, 1, 0.95], [0.03, 0.95, 1]], dtype=torch.float64)
    signal = torch.tensor([0.02, 0.0035, 0.002], dtype=torch.float64)
    together = best_mixture(same, signal).weights
    assert together[0] > 0.4 and together[1] < -0.3
    crossed = torch.zeros(3, 3, dtype=torch.float64)
    crossed[0], crossed[:, 0] = signal, signal
    settings = ExactSettings(lambda_plus=None, **OPEN | {"clamp": (0.0, None)})
    answer = ExactCalibrator(2, 1, settings).update(products(same, crossed))
    alone = best_mixture(same[:2, :2], signal[:2]).weights
    # lambda acts as lambda / K
    assert (answer.values.flatten() / 2).tolist() == pytest.approx([alone.item(), 0.0])
    assert alone.item() == pytest.approx(0.146, abs=1e-3)


def test_there_is_no_weight_where_rls_own_would_not_be_positive():
    settings = ExactSettings(lambda_plus=None, **OPEN)
    against = calibrated(settings, [products(cross=cross(-0.4, 0.4))] * 3)
    assert math.isnan(against.raw.item()) and against.values.item() == 0
    # MTP's gradient alone would be better than any mixture with RL's
    same = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    instead = calibrated(settings, [products(same, cross(0.02, 0.04))] * 3)
    assert math.isnan(instead.raw.item()) and instead.values.item() == 0


def test_the_scale_from_rls_signal_needs_that_signal():
    settings = ExactSettings(lambda_plus=None, **OPEN | {"gate": 2.0})
    unclear = [products(cross=cross(s, 0.3)) for s in [1.0, -1.2, 1.1, -0.9] * 5]
    assert calibrated(settings, unclear).values.item() == 0
    clear = [products(cross=cross(s, 0.3 + s / 100)) for s in [1.0, 1.2, 1.1, 0.9] * 5]
    assert calibrated(settings, clear).values.item() > 0


def test_a_share_is_reached_and_a_cap_kept():
    target = ExactSettings(lambda_plus=1.0, share=0.25, **OPEN)
    assert calibrated(target, noisy(0.3, 0.1)).share.item() == pytest.approx(0.25)
    capped = ExactSettings(lambda_plus=100.0, **OPEN | {"share_cap": 0.5})
    assert calibrated(capped, noisy(0.3, 0.1)).share.item() == pytest.approx(0.5)
    low = ExactSettings(lambda_plus=1.0, **OPEN | {"share_cap": 0.5})
    assert calibrated(low, noisy(0.3, 0.1)).values.item() == pytest.approx(0.15)


def test_a_negative_coefficient_is_clamped_unless_it_is_asked_for():
    assert calibrated(ExactSettings(**OPEN | {"clamp": (0.0, None)}), noisy(-0.3, 0.1)).values == 0
    assert calibrated(ExactSettings(**OPEN), noisy(-0.3, 0.1)).values < 0


def test_depths_that_are_alike_are_not_counted_twice():
    same = torch.tensor([[4.0, 0.4, 0.4], [0.4, 2.0, 1.9], [0.4, 1.9, 2.0]], dtype=torch.float64)
    settings = ExactSettings(pairs="same", lambda_plus=1.0, **OPEN)
    answer = ExactCalibrator(2, 1, settings).update(products(same))
    # the loss divides by K = 2: half of lambda is the gradient's weight, 0.4 / 3.9
    assert answer.values.flatten().tolist() == pytest.approx([2 * 0.4 / 3.9] * 2)
    alone = calibrated(settings, [products()])
    assert answer.values.sum().item() / 2 == pytest.approx(alone.values.item(), rel=0.03)


def test_a_depth_that_fails_the_gate_leaves_the_others_as_if_alone():
    def three(first, second):
        return torch.tensor(
            [[1.0, first, second], [first, 0.0, 0.0], [second, 0.0, 0.0]], dtype=torch.float64
        )

    same = torch.tensor([[4.0, 0.4, 0.1], [0.4, 2.0, 0.9], [0.1, 0.9, 2.0]], dtype=torch.float64)
    settings = ExactSettings(lambda_plus=1.0, **OPEN | {"gate": 2.0})
    calibrator = ExactCalibrator(2, 1, settings)
    for index in range(20):
        sign = 1 if index % 2 else -1
        answer = calibrator.update(products(same, three(0.3 + 0.01 * sign, 5.0 * sign)))
    assert answer.values.flatten().tolist() == pytest.approx([2 * 0.3 / 2.0, 0.0])


def test_groups_have_coefficients_of_their_own():
    same = torch.stack((SAME, 2 * SAME), dim=-1)
    crossed = torch.stack((cross(1.0, 0.3), cross(1.0, -0.3)), dim=-1)
    calibrator = ExactCalibrator(1, 2, ExactSettings(lambda_plus=1.0, **OPEN))
    answer = calibrator.update(GradientProducts(same, crossed))
    assert answer.values.tolist() == [pytest.approx([0.15, -0.075])]


def test_state_goes_on_bit_for_bit():
    settings = ExactSettings(lambda_plus=1.0)
    one, other = (ExactCalibrator(1, 1, settings) for _ in range(2))
    samples = noisy(0.3, 0.2)
    for sample in samples[:30]:
        one.update(sample)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.current, other.current) and one.current > 0
    for sample in samples[30:]:
        assert torch.equal(one.update(sample).values, other.update(sample).values)


def test_what_can_not_be_used_is_refused():
    calibrator = ExactCalibrator(1, 1, ExactSettings())
    with pytest.raises(ValueError, match="not finite"):
        calibrator.update(products(SAME * math.nan))
    with pytest.raises(ValueError, match=r"expected \[2, 2, 1\]"):
        calibrator.update(products(torch.eye(3)))
    with pytest.raises(ValueError, match="pairs='same'"):
        ExactSettings(pairs="same", lambda_plus=None)


class Bandit:
    """A softmax policy over 6 actions and an MTP head on the same parameters, known in full."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.theta = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)
        self.main, other = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
        # the heads see the trunk alike, so that a batch moves both gradients alike
        self.mtp = self.main + 0.5 * other
        self.rewards = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0], dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(5)

    def gradients(self, weights):
        """RL's and MTP's gradient of sum_a weights[a] reward[a] log p(a), [2, 4]."""
        found = []
        for matrix in (self.main, self.mtp):
            gain = (weights * self.rewards * (matrix @ self.theta).log_softmax(0)).sum()
            found.append(torch.autograd.grad(gain, self.theta)[0])
        return torch.stack(found)

    def policy(self):
        return (self.main @ self.theta).softmax(0).detach()

    def expected(self):
        return self.gradients(self.policy())

    def batch(self, size=8):
        actions = torch.multinomial(self.policy(), size, True, generator=self.generator)
        return self.gradients(torch.bincount(actions, minlength=6).double() / size)


def test_pairs_of_different_parts_are_unbiased_and_those_of_one_batch_are_not():
    bandit = Bandit()
    main, mtp = bandit.expected()
    truth = float(main @ mtp)
    calibrator = ExactCalibrator(1, 1, ExactSettings(lambda_plus=1.0, **OPEN))
    for _ in range(2000):
        halves = [bandit.batch() / 2 for _ in range(2)]
        total = halves[0] + halves[1]
        same = total @ total.T
        calibrator.update(products(same, 2 * (same - sum(half @ half.T for half in halves))))
    c, error = (float(part[0, 1, 0]) for part in (calibrator.cross.mean, calibrator.cross.error))
    assert abs(c - truth) < 3 * error
    c, error = (float(part[0, 1, 0]) for part in (calibrator.same.mean, calibrator.same.error))
    assert abs(c - truth) > 10 * error
