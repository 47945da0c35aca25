"""Per-token estimators of the KL divergence to a reference policy, and the masked sum."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_occ.losses._inputs import (
    as_bool_mask,
    at_least_float32,
    bounded,
    neutralised,
    require_same_shape,
)

KINDS = ("k1", "k2", "k3")


def kl_penalty(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    kind: str = "k3",
    *,
    input_clamp: float | None = None,
    output_clamp: float | None = None,
    old_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Schulman's estimators (joschu.net/blog/kl-approx.html) of KL(policy || reference), per token.

    With `d = logprobs - ref_logprobs` on tokens drawn from the policy:

    - k1 = `d`: unbiased, high variance, of either sign. Its expected gradient is 0, so it belongs
      into the reward, not into the loss.
    - k2 = `d^2 / 2`: biased value, but on policy its gradient is the gradient of the KL divergence:
      E[d grad log p] = grad KL(policy || reference).
    - k3 = `exp(-d) - 1 + d`: unbiased and never negative (GRPO, arXiv 2402.03300, eq. 4). On policy
      its gradient is that of the other divergence: E[(1 - reference / p) grad log p] =
      -sum reference grad log p = grad KL(reference || policy), since E[grad log p] = 0.

    Both hold for tokens of the policy itself, not for those of an older one, as in all mini-batches
    of a step but the first. With `old_logprobs` the estimate is multiplied by
    `exp(logprobs - old_logprobs)`, gradient included (DeepSeek-V3.2, arXiv 2512.02556, eq. 7): the
    value is that of the present policy where these are of the policy that sampled, and since the
    ratio carries the gradient of the sampling too, k1 and k3 have that of KL(policy || reference)
    (k2, which has it without the ratio, loses it). A clamped token has no gradient here either.

    The slope of k3 is 1 - exp(-d): -1e26 at d = -60, and below -88 the estimate overflows. A clamp
    bounds it by cutting the gradient to 0 where it acts, so that a token that is far from the
    reference is no longer drawn back. With the default clamps of `PolicySettings` (20 and 10, as
    in NeMo-RL) the slope of k3 lies between -12.7 and 1, that of k2 between -4.5 and 4.5.

    Args:
        logprobs: [b, s] log-probs of the policy; the gradient flows into these.
        ref_logprobs: [b, s] log-probs of the reference policy; taken as constants.
        input_clamp: clamps `d` to [-input_clamp, input_clamp].
        output_clamp: clamps the result to [-output_clamp, output_clamp]. It needs an input_clamp of
            at most 80: the gradient of an infinite k3 is NaN even where it is clamped.
        old_logprobs: [b, s] log-probs under the policy that sampled; taken as constants. The ratio
            is clamped to exp(+-20).
        mask: [b, s]; where it is 0 the result and its gradient are 0 whatever the inputs hold.
            Without it, k3 of an infinite `d` has a NaN gradient even if masked out later.

    Returns:
        [b, s] in nats, at least float32.

    Raises:
        ValueError: unknown `kind`, a clamp that is not positive, shapes that differ.
    """
    if kind not in KINDS:
        raise ValueError(f"KL kind is {kind!r}: use one of {', '.join(KINDS)}")
    for name, bound in (("input_clamp", input_clamp), ("output_clamp", output_clamp)):
        if bound is not None and not bound > 0:
            raise ValueError(f"{name} is {bound}: use a positive number or None")
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    if old_logprobs is not None:
        require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs)
    raw = difference = _difference(logprobs, ref_logprobs.detach(), mask)
    if input_clamp is not None:
        difference = raw.clamp(-input_clamp, input_clamp)
    if kind == "k1":
        estimate = difference
    elif kind == "k2":
        estimate = 0.5 * difference.square()
    else:
        estimate = torch.expm1(-difference) + difference
    found = estimate
    if output_clamp is not None:
        found = estimate.clamp(-output_clamp, output_clamp)
    if old_logprobs is None:
        return found
    log_ratio = _difference(logprobs, old_logprobs.detach(), mask)
    ratio = bounded(log_ratio).exp()
    # the ratio's own gradient would drive a clamped token on, away from the reference
    is_clamped = (difference != raw) | (found != estimate)
    return found * torch.where(is_clamped, ratio.detach(), ratio)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` over the positions where `mask` is not 0; 0-dim, at least float32.

    Divided by the global count of response tokens this is the token mean of an entropy bonus or a
    KL penalty. Masked positions add 0 to the value and to the gradient, even NaN or infinity.

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape(values=values, mask=mask)
    return neutralised(values, as_bool_mask(mask)).sum()


def _difference(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return at_least_float32(logprobs) - at_least_float32(ref_logprobs)
    require_same_shape(logprobs=logprobs, mask=mask)
    keep = as_bool_mask(mask)
    return neutralised(logprobs, keep) - neutralised(ref_logprobs, keep)
