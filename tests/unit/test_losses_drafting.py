"""Head losses on dense logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_occ.losses import agreement, soft_cross_entropy, total_variation


def logits(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def random_pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 5)
    student = torch.randn(shape, generator=generator, dtype=torch.float64)
    return student, torch.randn(shape, generator=generator, dtype=torch.float64)


def test_by_hand() -> None:
    student, teacher = logits(0.5, 0.25, 0.25), logits(0.2, 0.7, 0.1)
    assert total_variation(student, teacher).item() == pytest.approx(0.45)
    expected = 0.2 * math.log(2) + 0.8 * math.log(4)
    assert soft_cross_entropy(student, teacher).item() == pytest.approx(expected)
    assert not agreement(student, teacher)
    assert agreement(student, logits(0.6, 0.3, 0.1))


def test_shapes_and_agreement_per_position() -> None:
    student, teacher = random_pair()
    for function in (soft_cross_entropy, total_variation, agreement):
        assert function(student, teacher).shape == (2, 3)
    same = agreement(student, teacher)
    for i in range(2):
        for j in range(3):
            s, t = student[i, j].tolist(), teacher[i, j].tolist()
            assert same[i, j].item() == (s.index(max(s)) == t.index(max(t)))


def test_total_variation_is_the_rejection_rate_of_speculative_sampling() -> None:
    student, teacher = random_pair()
    q, p = student.softmax(-1), teacher.softmax(-1)
    # a draft x ~ q is accepted with probability min(1, p(x) / q(x))
    acceptance = (q * (p / q).clamp(max=1.0)).sum(-1)
    torch.testing.assert_close(total_variation(student, teacher), 1 - acceptance)


def test_soft_cross_entropy_gradient_is_q_minus_p() -> None:
    student, teacher = random_pair()
    student.requires_grad_()
    teacher.requires_grad_()
    soft_cross_entropy(student, teacher).sum().backward()
    torch.testing.assert_close(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach())
    assert teacher.grad is None


def test_total_variation_gradient() -> None:
    student, teacher = random_pair()
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: total_variation(x, teacher.detach()), student.clone().requires_grad_()
    )
    total_variation(student.requires_grad_(), teacher).sum().backward()
    assert teacher.grad is None


def test_equal_distributions() -> None:
    student, _ = random_pair()
    shifted = student + 3.0  # logits are defined up to a constant
    assert total_variation(student, shifted).abs().max() < 1e-15
    log_p = student.log_softmax(-1)
    torch.testing.assert_close(soft_cross_entropy(student, shifted), -(log_p.exp() * log_p).sum(-1))


def test_excluded_tokens_give_no_nan() -> None:
    student = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, -math.inf]])
    loss = soft_cross_entropy(student, teacher) + total_variation(student, teacher)
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert student.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = (x.bfloat16() for x in random_pair())
    for function in (soft_cross_entropy, total_variation):
        result = function(student, teacher)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, function(student.float(), teacher.float()))


@pytest.mark.parametrize("function", [soft_cross_entropy, total_variation, agreement])
def test_shapes_must_agree(function: object) -> None:
    with pytest.raises(ValueError, match=r"teacher_logits has shape \[4\]"):
        function(torch.zeros(5), torch.zeros(4))
