"""KL estimators and the masked sum."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_occ.losses import kl_penalty, masked_sum


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
    assert (gradients["k3"] - logits.grad).abs().max() > 1e-2


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
