"""What a policy loss makes of the ratio of new to old policy and of the advantage.

An objective maps the terms of a loss, one for each token or each sequence, to losses of the same
shape and to marks of the terms that it cuts. `policy.policy_loss` adds them up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

DIVERGENCES = ("tv", "kl")
# probabilities of a token in a divergence stay this far from 1, where log(1 - p) has no value
_CLOSEST = 1e-6


@dataclass(frozen=True)
class Terms:
    """Terms of a loss; all tensors have one shape, [b, s] of tokens or [b] of sequences.

    Args:
        ratio: exp(l - o), with gradient.
        advantage: constants.
        logprobs: l with gradient, a sequence's mean over its tokens.
        old_logprobs: o.
    """

    ratio: Tensor
    advantage: Tensor
    logprobs: Tensor
    old_logprobs: Tensor


@dataclass(frozen=True)
class Losses:
    """Losses of the terms, and bool marks of those that are cut below, above, and by dual clip."""

    values: Tensor
    low: Tensor
    high: Tensor
    dual: Tensor


class Objective(Protocol):
    """From terms to losses."""

    def __call__(self, terms: Terms) -> Losses: ...


@dataclass(frozen=True)
class Clipped:
    """`max(-A r, -A clip(r, 1 - low, 1 + high))`: PPO (arXiv 1707.06347, eq. 7).

    With DAPO's two clip ranges (2503.14476, eq. 8).

    Args:
        low: width of the clip range below 1, in [0, 1].
        high: width of the clip range above 1, at least 0.
        dual: c > 1 bounds the loss by `-c A` where A < 0 (Dual-clip PPO, 1912.09729, eq. 5).

    Raises:
        ValueError: a setting out of range.
    """

    low: float = 0.2
    high: float = 0.28
    dual: float | None = None

    def __post_init__(self) -> None:
        check_clip(self.low, self.high)
        if self.dual is not None and not self.dual > 1:
            raise ValueError(f"dual_clip is {self.dual}: use a number above 1, 10 say, or None")

    def __call__(self, terms: Terms) -> Losses:
        ratio, advantage = terms.ratio, terms.advantage
        clipped = ratio.clamp(1 - self.low, 1 + self.high)
        loss = torch.maximum(-advantage * ratio, -advantage * clipped)
        if self.dual is not None:
            loss = torch.where(advantage < 0, torch.minimum(loss, -self.dual * advantage), loss)
        bound = math.inf if self.dual is None else self.dual
        ratio = ratio.detach()
        return Losses(
            loss,
            (advantage < 0) & (ratio < 1 - self.low),
            (advantage > 0) & (ratio > 1 + self.high),
            (advantage < 0) & (ratio > bound),
        )


@dataclass(frozen=True)
class Cispo:
    """`-A c l` with the constant `c = clip(r, 1 - low, 1 + high)`: CISPO (arXiv 2506.13585, eq. 4).

    The gradient goes through l alone, so that no token loses its own. The paper has no lower bound,
    which is `low = 1`.

    Raises:
        ValueError: a setting out of range.
    """

    low: float = 1.0
    high: float = 4.0

    def __post_init__(self) -> None:
        check_clip(self.low, self.high)

    def __call__(self, terms: Terms) -> Losses:
        ratio = terms.ratio.detach()
        weight = ratio.clamp(1 - self.low, 1 + self.high)
        return Losses(
            -terms.advantage * weight * terms.logprobs,
            ratio < 1 - self.low,
            ratio > 1 + self.high,
            torch.zeros_like(ratio, dtype=torch.bool),
        )


@dataclass(frozen=True)
class Sapo:
    """`-A f(r)` with `f(r) = (4 / tau) sigmoid(tau (r - 1))`: SAPO (arXiv 2511.20347, eq. 5 and 6).

    The gate takes the place of the clip: its slope is 1 at r = 1 and falls off on both sides.

    Args:
        tau_positive: tau where A > 0.
        tau_negative: tau elsewhere; the larger, the sooner a token's gradient fades.

    Raises:
        ValueError: a tau that is not positive.
    """

    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __post_init__(self) -> None:
        for name in ("tau_positive", "tau_negative"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: use a positive number, 1 say")

    def __call__(self, terms: Terms) -> Losses:
        advantage = terms.advantage
        tau = torch.full_like(advantage, self.tau_negative)
        tau = tau.masked_fill(advantage > 0, self.tau_positive)
        gate = 4 / tau * torch.sigmoid(tau * (terms.ratio - 1))
        nowhere = torch.zeros_like(advantage, dtype=torch.bool)
        return Losses(-advantage * gate, nowhere, nowhere, nowhere)


@dataclass(frozen=True)
class Dppo:
    """`-A M r`, M = 0 where the policy moves on out of a trust region: DPPO (arXiv 2602.04879).

    Eq. 11 and 12: M = 0 where the divergence of old and new policy at a token is above `limit` and
    the gradient would make it larger (A > 0 and r > 1, or A < 0 and r < 1), else 1. The divergence
    is that of "this token or another one", `|p - q|` for "tv" (eq. 13) and KL(q || p) for "kl"
    (eq. 14), with p = exp(l) and q = exp(o).

    Raises:
        ValueError: a limit that is not positive, or an unknown divergence.
    """

    limit: float = 0.15
    divergence: str = "tv"

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"divergence_limit is {self.limit}: use a positive number, 0.15 say")
        if self.divergence not in DIVERGENCES:
            raise ValueError(
                f"divergence is {self.divergence!r}: use one of {', '.join(DIVERGENCES)}"
            )

    def __call__(self, terms: Terms) -> Losses:
        ratio, advantage = terms.ratio.detach(), terms.advantage
        far = self._divergence(terms.logprobs.detach(), terms.old_logprobs) > self.limit
        low, high = far & (advantage < 0) & (ratio < 1), far & (advantage > 0) & (ratio > 1)
        loss = torch.where(low | high, 0.0, -advantage * terms.ratio)
        return Losses(loss, low, high, torch.zeros_like(far))

    def _divergence(self, logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
        new, old = logprobs.exp(), old_logprobs.exp()
        if self.divergence == "tv":
            return (new - old).abs()
        rest_new, rest_old = (1 - each.clamp(max=1 - _CLOSEST) for each in (new, old))
        return old * (old_logprobs - logprobs) + rest_old * (rest_old / rest_new).log()


def check_clip(low: float, high: float) -> None:
    """Raise ValueError for a clip range that is none."""
    if not 0 <= low <= 1:
        raise ValueError(f"clip_low is {low}: use a number in [0, 1], for instance 0.2")
    if not high >= 0:
        raise ValueError(f"clip_high is {high}: use a number of at least 0, for instance 0.28")
