"""Losses that train an MTP head as a drafter, on dense logits: the reference definitions.

The student is the MTP head, the teacher the main head at the same target token. The teacher is
always taken as a constant, so none of these moves the policy through it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_occ.losses._inputs import at_least_float32, require_same_shape


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross entropy `-sum_v p_v log q_v` of the student q against the teacher's distribution p.

    Its gradient is that of KL(p || q); the smallest value is the teacher's entropy. Tokens that
    the teacher excludes (logit -inf) contribute nothing.

    Args:
        student_logits: [..., v].
        teacher_logits: [..., v], taken as a constant.

    Returns:
        [...] in nats, at least float32.

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    teacher = at_least_float32(teacher_logits.detach()).softmax(dim=-1)
    student_log = at_least_float32(student_logits).log_softmax(dim=-1)
    return -(teacher * torch.where(teacher > 0, student_log, 0.0)).sum(dim=-1)


def total_variation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Total variation distance `0.5 * sum_v |p_v - q_v|` between teacher p and student q.

    `1 - TV` is the probability that lossless speculative sampling accepts a token drafted by the
    student (Leviathan et al., arXiv 2211.17192, theorem 3.5), so this trains acceptance itself.

    Args:
        student_logits: [..., v].
        teacher_logits: [..., v], taken as a constant.

    Returns:
        [...] in [0, 1], at least float32.

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    teacher = at_least_float32(teacher_logits.detach()).softmax(dim=-1)
    student = at_least_float32(student_logits).softmax(dim=-1)
    return 0.5 * (student - teacher).abs().sum(dim=-1)


def agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Whether student and teacher have the same most probable token: greedy acceptance.

    Args:
        student_logits: [..., v].
        teacher_logits: [..., v].

    Returns:
        bool [...].

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    return student_logits.argmax(dim=-1) == teacher_logits.argmax(dim=-1)
