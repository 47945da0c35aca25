"""Group-relative advantages, dynamic-sampling test and the overlong penalty."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BASELINES = ("mean", "leave_one_out", "none")

# Rewards of a group that differ by no more than this many units of rounding (relative to the
# largest magnitude in the group) are one and the same reward, computed along different ways.
SPREAD_ULPS = 4.0


def group_advantages(
    rewards: Tensor,
    group_size: int,
    *,
    baseline: str = "mean",
    normalize: bool = True,
    eps: float = 1e-6,
    valid: Tensor | None = None,
) -> Tensor:
    """Advantage of each response against the other responses to the same prompt.

    - `baseline="mean"`, `normalize=True`: `(r - mean) / (std + eps)` with the sample standard
      deviation (n - 1), GRPO (arXiv 2402.03300, section 4.1.2) and DAPO (2503.14476, eq. 9).
    - `baseline="mean"`, `normalize=False`: `r - mean`, Dr. GRPO (2503.20783).
    - `baseline="leave_one_out"`: `r_i - mean of the others = n / (n - 1) * (r_i - mean)`, RLOO
      (2402.14740); with `normalize=True` divided by `std + eps` as well.
    - `baseline="none"`, `normalize=False`: `r`, for `step_advantages` (REINFORCE++, 2501.03262).

    With a baseline a group without spread (see `group_has_spread`) gets exactly 0.

    Args:
        rewards: [n], the responses to one prompt next to each other.
        group_size: responses per prompt; divides n.
        eps: added to the standard deviation, in units of reward.
        valid: bool [n], responses whose reward says something; the others get 0, and the group is
            what is left of it. None: all.

    Returns:
        [n], in the dtype of `rewards` (float32 if that is not a floating type); computed in
        float64.

    Raises:
        ValueError: n is not a multiple of `group_size`; `group_size` < 2 with `normalize` or
            leave_one_out; a reward is not finite; unknown `baseline`; negative `eps`; no baseline
            with `normalize`.
    """
    if baseline not in BASELINES:
        raise ValueError(f"baseline is {baseline!r}: use one of {', '.join(BASELINES)}")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}: use 0 or a small positive number")
    if group_size < 2 and (normalize or baseline == "leave_one_out"):
        raise ValueError(
            f"group_size is {group_size}: normalize=True and baseline='leave_one_out' compare a "
            "response with others and need at least 2 responses per prompt"
        )
    groups, kept = _grouped(rewards, group_size), _kept(rewards, group_size, valid)
    if baseline == "none":
        if normalize:
            raise ValueError("baseline='none': a group's standard deviation is around its mean")
        return (groups * kept).flatten().to(_output_dtype(rewards))
    count = kept.sum(dim=1, keepdim=True)
    others = (count - 1).clamp(min=1)
    mean = (groups * kept).sum(dim=1, keepdim=True) / count.clamp(min=1)
    advantages = (groups - mean) * kept
    std = (advantages.square().sum(dim=1, keepdim=True) / others).sqrt()
    if baseline == "leave_one_out":
        advantages = advantages * (count / others)
    if normalize:
        advantages = advantages / (std + eps)
    spread = _spread(groups, kept, rewards.dtype)
    advantages = torch.where(spread.unsqueeze(1), advantages, 0.0)
    return advantages.flatten().to(_output_dtype(rewards))


def advantage_sums(advantages: Tensor) -> Tensor:
    """Number, sum and sum of squares of [n] advantages, [3] float64: add them up over ranks."""
    values = advantages.detach().double()
    return torch.stack((values.new_tensor(float(len(values))), values.sum(), values.square().sum()))


def step_advantages(
    advantages: Tensor, sums: Tensor, eps: float = 1e-6, *, valid: Tensor | None = None
) -> Tensor:
    """`(A - mean) / (std + eps)` over all responses of a step, REINFORCE++ (arXiv 2501.03262).

    With the sample standard deviation (n - 1), as `group_advantages`.

    Args:
        advantages: [n] of `group_advantages` without normalisation.
        sums: of all responses of the step that are valid, see `advantage_sums`.
        eps: added to the standard deviation, in units of reward.
        valid: bool [n], the others get 0; None: all.

    Returns:
        [n] in the dtype of `advantages`; 0 where all of the step are equal.
    """
    count, total, squares = sums.tolist()
    mean = total / max(count, 1.0)
    variance = max(squares - count * mean**2, 0.0) / max(count - 1, 1.0)
    # what is left of equal numbers is rounding
    rounding = SPREAD_ULPS * torch.finfo(advantages.dtype).eps
    if variance <= (rounding * mean) ** 2:
        return torch.zeros_like(advantages)
    found = (advantages.double() - mean) / (variance**0.5 + eps)
    return (found if valid is None else found * valid).to(advantages.dtype)


def group_has_spread(rewards: Tensor, group_size: int, *, valid: Tensor | None = None) -> Tensor:
    """Whether the rewards of each group differ, i.e. whether the group gives any gradient.

    Used for DAPO's dynamic sampling (arXiv 2503.14476, section 3.2). A difference of at most
    4 units of rounding of the rewards' dtype, relative to the group's largest magnitude, is none.

    Args:
        rewards: [n], the responses to one prompt next to each other.
        group_size: responses per prompt; divides n.
        valid: bool [n], responses that count; None: all.

    Returns:
        bool [n / group_size].

    Raises:
        ValueError: n is not a multiple of `group_size`, or a reward is not finite.
    """
    groups, kept = _grouped(rewards, group_size), _kept(rewards, group_size, valid)
    return _spread(groups, kept, rewards.dtype)


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int, penalty: float) -> Tensor:
    """Soft overlong punishment of DAPO (arXiv 2503.14476, eq. 13), to be added to the rewards.

    0 up to `max_length - buffer` tokens, then linear down to `-penalty` at `max_length`, and
    `-penalty` beyond.

    Args:
        lengths: [n] response lengths in tokens.
        max_length: length in tokens at which the whole penalty is due.
        buffer: length in tokens of the linear part.
        penalty: largest punishment, a non-negative number in units of reward.

    Returns:
        [n], values in [-penalty, 0], float32 (or the dtype of `lengths` if that is floating).

    Raises:
        ValueError: `buffer` outside [1, max_length], negative or non-finite `penalty`.
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(
            f"overlong buffer is {buffer} tokens: it must lie between 1 and max_length={max_length}"
        )
    if not (math.isfinite(penalty) and penalty >= 0):
        raise ValueError(f"overlong penalty is {penalty}: use a finite number of at least 0")
    excess = (lengths.double() - (max_length - buffer)).clamp(min=0.0)
    return -((excess / buffer).clamp(max=1.0) * penalty).to(_output_dtype(lengths))


def _grouped(rewards: Tensor, group_size: int) -> Tensor:
    """Checked rewards as float64 [n / group_size, group_size]."""
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}: use at least 1 response per prompt")
    if rewards.dim() != 1:
        raise ValueError(f"rewards have shape {list(rewards.shape)}: give one number per response")
    if rewards.numel() % group_size:
        raise ValueError(
            f"{rewards.numel()} rewards do not divide into groups of {group_size}: give "
            "group_size rewards for each prompt"
        )
    values = rewards.detach().double()
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        index = int((~finite).nonzero()[0])
        raise ValueError(
            f"rewards[{index}] is {float(values[index])}: a reward must be a finite number, "
            "check the verifier"
        )
    return values.reshape(-1, group_size)


def _kept(rewards: Tensor, group_size: int, valid: Tensor | None) -> Tensor:
    """Bool [n / group_size, group_size]."""
    given = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid.bool()
    return given.reshape(-1, group_size)


def _spread(groups: Tensor, kept: Tensor, dtype: torch.dtype) -> Tensor:
    # Largest minus smallest, not the standard deviation: it is exactly 0 for equal rewards, while
    # the mean of equal rewards can differ from them by a rounding.
    rounding = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    magnitude = (groups.abs() * kept).amax(dim=1)
    largest = groups.masked_fill(~kept, -math.inf).amax(dim=1)
    smallest = groups.masked_fill(~kept, math.inf).amin(dim=1)
    return largest - smallest > SPREAD_ULPS * rounding * magnitude


def _output_dtype(values: Tensor) -> torch.dtype:
    return values.dtype if values.is_floating_point() else torch.float32
