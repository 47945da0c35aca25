"""KL estimators and the masked sum."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_occ.config import load_config
from megatron_occ.losses import kl_penalty, masked_sum
from megatron_occ.losses.heads import HeadOutputs, JointTargets, Normalizers
from megatron_occ.losses.joint import JointLoss
from megatron_occ.losses.regime import Regime
from megatron_occ.rl.update import policy_settings

DEFAULT_CLAMPS = {"input_clamp": 20.0, "output_clamp": 10.0}


def value_and_slope(ratio: float, kind: str = "k3", **clamps: float) -> tuple[float, float]:
    """The estimate of one token at a log-ratio to the reference, and its derivative."""
    logprobs = torch.tensor([[ratio]], requires_grad=True)
    estimate = kl_penalty(logprobs, torch.zeros(1, 1), kind, **clamps)
    estimate.sum().backward()
    return estimate.item(), logprobs.grad.item()


def test_estimators_by_hand() -> None:
    logprobs = torch.tensor([[math.log(0.5), math.log(0.2)]], dtype=torch.float64)
    reference = torch.tensor([[math.log(0.25), math.log(0.4)]], dtype=torch.float64)
    ln2 = math.log(2.0)
    assert kl_penalty(logprobs, reference, "k1")[0].tolist() == pytest.approx([ln2, -ln2])
    k2 = kl_penalty(logprobs, reference, "k2")[0].tolist()
    assert k2 == pytest.approx([ln2**2 / 2, ln2**2 / 2])
    k3 = kl_penalty(logprobs, reference)[0].tolist()  # the default
    assert k3 == pytest.approx([0.5 - 1 + ln2, 2 - 1 - ln2])


def test_expectation_and_gradient_over_a_whole_vocabulary() -> None:
    """Weighted with the policy's own probabilities: the value and gradient of the KL divergence."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)

    def policy() -> tuple[torch.Tensor, torch.Tensor]:
        start = torch.Generator().manual_seed(1)
        logits = torch.randn(6, generator=start, dtype=torch.float64).requires_grad_()
        return logits, logits.log_softmax(0)

    logits, logprobs = policy()
    exact = (logprobs.exp() * (logprobs - reference)).sum()
    exact.backward()
    reversed_logits, reversed_logprobs = policy()
    (reference.exp() * (reference - reversed_logprobs)).sum().backward()
    gradients = {}
    for kind in ("k1", "k2", "k3"):
        own, own_logprobs = policy()
        estimate = (own_logprobs.exp().detach() * kl_penalty(own_logprobs, reference, kind)).sum()
        if kind != "k2":
            assert estimate.item() == pytest.approx(exact.item(), rel=1e-12)
        estimate.backward()
        gradients[kind] = own.grad
    torch.testing.assert_close(gradients["k2"], logits.grad)
    assert gradients["k1"].abs().max() < 1e-15  # why k1 belongs into the reward
    # the gradient of the other divergence, KL(reference || policy)
    torch.testing.assert_close(gradients["k3"], reversed_logits.grad)
    assert (gradients["k3"] - logits.grad).abs().max() > 1e-2


def test_with_importance_tokens_of_an_older_policy_give_the_present_one_s_divergence() -> None:
    """Weighted with the old policy's probabilities: value and gradient of KL(policy || ref)."""
    generator = torch.Generator().manual_seed(4)
    logits, old_logits, ref_logits = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    old, reference = old_logits.log_softmax(0), ref_logits.log_softmax(0)
    logits.requires_grad_()
    logprobs = logits.log_softmax(0)
    divergence = (logprobs.exp() * (logprobs - reference)).sum()
    (wanted,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    for kind in ("k1", "k3"):
        each = kl_penalty(logprobs[None], reference[None], kind, old_logprobs=old[None])
        value = (old.exp() * each[0]).sum()
        (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
        assert value.item() == pytest.approx(divergence.item())
        torch.testing.assert_close(gradient, wanted)
    plain = (old.exp() * kl_penalty(logprobs[None], reference[None], "k3")[0]).sum()
    assert abs(plain.item() - divergence.item()) > 0.01


@pytest.mark.parametrize("d", [-2.7, -5.0, -10.0, -30.0, 12.0])
def test_a_clamped_token_has_no_gradient_with_importance_either(d: float) -> None:
    """On policy the gradient of r k3 is r d; where a clamp acts it is 0."""
    logprobs = torch.tensor([[d]], requires_grad=True)
    old, reference = logprobs.detach(), torch.zeros(1, 1)
    kl_penalty(logprobs, reference, old_logprobs=old, **DEFAULT_CLAMPS).sum().backward()
    assert logprobs.grad.item() == 0.0
    small = torch.tensor([[-1.5]], requires_grad=True)
    kl_penalty(small, reference, old_logprobs=small.detach(), **DEFAULT_CLAMPS).sum().backward()
    assert small.grad.item() == pytest.approx(-1.5)


def test_k3_keeps_small_differences_in_float32() -> None:
    difference = 1e-3
    value = kl_penalty(torch.tensor([[difference]]), torch.zeros(1, 1), "k3").item()
    # exp(-d) - 1 + d in float32 would be wrong in the first digits
    assert value == pytest.approx(difference**2 / 2 - difference**3 / 6, rel=1e-3)


def test_clamps() -> None:
    logprobs, reference = torch.tensor([[0.0, -9.0]]), torch.tensor([[-9.0, 0.0]])
    assert kl_penalty(logprobs, reference, "k1", input_clamp=2.0).tolist() == [[2.0, -2.0]]
    assert kl_penalty(logprobs, reference, "k2", output_clamp=10.0).tolist() == [[10.0, 10.0]]
    both = kl_penalty(logprobs, reference, "k3", input_clamp=2.0, output_clamp=3.0)[0].tolist()
    assert both == pytest.approx([math.exp(-2) + 1, 3.0])


def test_without_clamps_a_far_token_is_the_whole_gradient() -> None:
    value, slope = value_and_slope(-60.0)
    assert value == pytest.approx(math.exp(60) - 61, rel=1e-5)
    assert slope == pytest.approx(1 - math.exp(60), rel=1e-5)  # -1.1e26
    assert value_and_slope(-100.0)[0] == math.inf


@pytest.mark.parametrize(
    ("ratio", "kind", "clamps", "value", "slope"),
    [
        # beyond the clamp of the input, and of the output
        (-100.0, "k3", {"input_clamp": 20.0}, math.exp(20) - 21, 0.0),
        (-100.0, "k3", DEFAULT_CLAMPS, 10.0, 0.0),
        (-60.0, "k3", DEFAULT_CLAMPS, 10.0, 0.0),
        (-100.0, "k3", {"input_clamp": 80.0, "output_clamp": 10.0}, 10.0, 0.0),
        (100.0, "k3", {"input_clamp": 20.0}, 19.0, 0.0),
        (-100.0, "k2", DEFAULT_CLAMPS, 10.0, 0.0),
        (-math.inf, "k3", DEFAULT_CLAMPS, 10.0, 0.0),
        (math.inf, "k3", DEFAULT_CLAMPS, 10.0, 0.0),
        # inside: e^2 - 3 and 1 - e^2; d - 1 + e^-d
        (-2.0, "k3", DEFAULT_CLAMPS, math.exp(2) - 3, 1 - math.exp(2)),
        (8.0, "k3", DEFAULT_CLAMPS, 7 + math.exp(-8), 1 - math.exp(-8)),
        (4.0, "k2", DEFAULT_CLAMPS, 8.0, 4.0),
        (0.0, "k3", DEFAULT_CLAMPS, 0.0, 0.0),
        (1e-3, "k3", DEFAULT_CLAMPS, 5e-7 - 1e-9 / 6, 1e-3 - 5e-7),
    ],
)
def test_clamped_value_and_slope(ratio, kind, clamps, value, slope) -> None:
    assert value_and_slope(ratio, kind, **clamps) == pytest.approx(
        (value, slope), rel=1e-4, abs=2e-10
    )


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_inside_the_clamps_nothing_changes_and_outside_the_slope_is_bounded(kind) -> None:
    ratios = torch.linspace(-120, 120, 4801)
    plain, bounded = (ratios.clone().requires_grad_() for _ in range(2))
    reference = torch.zeros_like(ratios)
    free = kl_penalty(plain, reference, kind)
    held = kl_penalty(bounded, reference, kind, **DEFAULT_CLAMPS)
    free.sum().backward()
    held.sum().backward()
    inside = free < 10
    assert 100 < inside.sum() < 300
    assert torch.equal(free[inside], held[inside])
    assert torch.equal(plain.grad[inside], bounded.grad[inside])
    assert held[~inside].unique().tolist() == [10.0]
    assert bounded.grad[~inside].unique().tolist() == [0.0]
    lowest = {"k2": -math.sqrt(20), "k3": -12.7}[kind]
    assert bounded.grad.min() > lowest and bounded.grad.max() < 4.5


def test_the_training_loss_takes_the_clamps_of_the_configuration() -> None:
    def loss_and_gradient(*overrides: str) -> tuple[float, list[float]]:
        config = load_config([], ["rl.loss.kl_coefficient=0.5", *overrides])
        logprobs = torch.tensor([[-100.0, -2.0]], requires_grad=True)
        targets = JointTargets(
            mask=torch.ones(1, 1, 2),
            old_logprobs=logprobs.detach()[None],
            advantages=torch.zeros(1),
            ref_logprobs=torch.zeros(1, 2),
        )
        normalizers = Normalizers(torch.tensor([2.0]), torch.tensor([1.0]))
        joint = JointLoss(policy_settings(config), Regime())
        loss, _ = joint(HeadOutputs(logprobs), targets, normalizers)
        loss.backward()
        return loss.item(), logprobs.grad[0].tolist()

    k3, slope = math.exp(2) - 3, 1 - math.exp(2)
    loss, gradient = loss_and_gradient()
    assert loss == pytest.approx(0.25 * (10 + k3))
    assert gradient == pytest.approx([0.0, 0.25 * slope])
    loss, gradient = loss_and_gradient("rl.loss.kl_output_clamp=null", "rl.loss.kl_input_clamp=3")
    assert loss == pytest.approx(0.25 * (math.exp(3) - 4 + k3))
    assert gradient == pytest.approx([0.0, 0.25 * slope])
    loss, gradient = loss_and_gradient("rl.loss.kl_output_clamp=4")
    assert (loss, gradient) == (2.0, [0.0, 0.0])


def test_mask_neutralises_value_and_gradient() -> None:
    mask = torch.tensor([[1, 0, 0, 0]])
    reference = torch.tensor([[-1.0, math.inf, -math.inf, math.nan]], requires_grad=True)
    for kind in ("k1", "k2", "k3"):
        logprobs = torch.tensor([[-0.5, math.nan, math.inf, -math.inf]], requires_grad=True)
        penalty = kl_penalty(logprobs, reference, kind, mask=mask)
        assert penalty[0, 1:].tolist() == [0.0, 0.0, 0.0]
        masked_sum(penalty, mask).backward()
        assert logprobs.grad[0, 0] != 0
        assert logprobs.grad[0, 1:].tolist() == [0.0, 0.0, 0.0]
    assert reference.grad is None


def test_masked_sum() -> None:
    values = torch.tensor([[1.0, math.nan], [math.inf, 4.0]], requires_grad=True)
    total = masked_sum(values, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    total.backward()
    assert total.item() == 5.0
    assert values.grad.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert masked_sum(torch.full((1, 4096), 1.0, dtype=torch.bfloat16), torch.ones(1, 4096)) == 4096


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(1, 2), torch.zeros(1, 2), "k4"), {}, "'k4': use one of k1, k2, k3"),
        ((torch.zeros(1, 2), torch.zeros(2)), {}, r"ref_logprobs has shape \[2\]"),
        ((torch.zeros(1, 2), torch.zeros(1, 2)), {"input_clamp": 0.0}, "input_clamp is 0.0"),
        ((torch.zeros(1, 2), torch.zeros(1, 2)), {"output_clamp": -1.0}, "output_clamp is -1.0"),
    ],
)
def test_bad_input_is_refused(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kl_penalty(*arguments, **options)
