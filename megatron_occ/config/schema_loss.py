"""The sections of ``rl`` from rewards to the loss: advantages, policy loss, correction."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_occ.config import limits
from megatron_occ.config.options import option


@dataclass
class AdvantageConfig:
    baseline: str = option(
        "mean",
        "what is taken off a reward: mean of the group, of the group's others, or nothing",
        choices=("mean", "leave_one_out", "none"),
    )
    normalize: bool = option(True, "divide by a standard deviation (false: Dr.GRPO)")
    normalize_over: str = option(
        "group",
        "whose standard deviation: the rewards of a group, or the advantages of the step, whose "
        "mean is taken off too (REINFORCE++)",
        choices=("group", "step"),
    )
    without_failures: bool = option(
        False,
        "a response whose verifier failed counts in no baseline and trains nothing (false: it "
        "counts, with a score of 0)",
    )


@dataclass
class PolicyLossConfig:
    kind: str = option(
        "clipped",
        "what it makes of the ratio to the old policy: PPO's clip, CISPO's constant weight, "
        "SAPO's soft gate or DPPO's trust region",
        choices=("clipped", "cispo", "sapo", "dppo"),
    )
    aggregation: str = option(
        "token",
        "how it is averaged: over tokens; over tokens, then sequences; token sums over sequences "
        "(RLOO); that by the longest allowed response (Dr.GRPO); one ratio a sequence (GSPO)",
        choices=("token", "sequence", "sum", "constant", "gspo"),
    )
    clip_low: float = option(0.2, "lower clip of the ratio", above=0, maximum=1)
    clip_high: float = option(0.28, "upper clip of the ratio", above=0, maximum=limits.FACTOR)
    dual_clip: float | None = option(
        None, "bound for negative advantages (null: off)", above=1, maximum=limits.FACTOR
    )
    tau_positive: float = option(
        1.0,
        "kind=sapo: steepness of the gate where the advantage is positive",
        above=0,
        maximum=limits.FACTOR,
    )
    tau_negative: float = option(
        1.05,
        "kind=sapo: the same for other advantages; the larger, the sooner gradients fade",
        above=0,
        maximum=limits.FACTOR,
    )
    divergence: str = option(
        "tv", "kind=dppo: divergence of this token or another", choices=("tv", "kl")
    )
    divergence_limit: float = option(
        0.15,
        "kind=dppo: divergence from which the policy does not move on (kl: 0.05 is usual)",
        above=0,
        maximum=limits.FACTOR,
    )
    top_entropy: float = option(
        1.0,
        "share of a mini-batch's response tokens, those of the highest entropy at the start of the "
        "step, that policy losses learn from, 0.2 say (1: all)",
        above=0,
        maximum=1,
    )
    sampling_mask: bool = option(
        False,
        "log-probs and entropies of the policy are those of the tokens that rl.rollout.top_p and "
        "top_k left when a token was drawn (false: of the whole vocabulary)",
    )
    entropy_coefficient: float = option(
        0.0, "weight of the entropy bonus", minimum=0, maximum=limits.FACTOR
    )
    kl_coefficient: float = option(
        0.0, "weight of the KL penalty to the reference policy", minimum=0, maximum=limits.FACTOR
    )
    kl_reference_every: int | None = option(
        None,
        "RL steps after which the reference policy becomes the present one (null: it stays the "
        "policy that RL began with)",
        minimum=1,
        maximum=limits.STEPS,
    )
    kl_kind: str = option(
        "k3",
        "estimator of KL(policy || reference): on policy k2 has that KL's gradient and a biased "
        "value, k3 an unbiased value and the gradient of KL(reference || policy) (k1 is for "
        "rewards: in a loss its expected gradient is 0)",
        choices=("k2", "k3"),
    )
    kl_importance: bool = option(
        False,
        "multiply a token's estimate by its ratio to the old policy, gradient included: k3 then "
        "has value and gradient of KL(policy || reference) in every mini-batch of a step",
    )
    kl_input_clamp: float = option(
        20.0,
        "a token's log-ratio to the reference policy is clamped to +- this, in nats, before the "
        "estimate, which has no gradient beyond (k3 would overflow)",
        above=0,
        maximum=80,
    )
    kl_output_clamp: float | None = option(
        10.0,
        "a token's estimate is clamped to this, in nats, and has no gradient beyond: for k3 at a "
        "log-ratio below -2.6 or above 11, for k2 beyond +- 4.5 (null: off)",
        above=0,
        maximum=limits.FACTOR,
    )


@dataclass
class CorrectionConfig:
    weights: str = option(
        "none",
        "importance weights of the tokens: each token's ratio, or the product over its sequence",
        choices=("none", "token", "sequence"),
    )
    low: float | None = option(
        None, "smallest weight (null: no bound)", above=0, maximum=limits.FACTOR
    )
    high: float | None = option(
        None, "largest weight, 2 say (null: no bound)", above=0, maximum=limits.FACTOR
    )
    outside: str = option(
        "truncate",
        "a weight outside of the bounds becomes the nearer one (truncated importance sampling), or "
        "0 (mask, as in IcePop)",
        choices=("truncate", "mask"),
    )
    reject: str = option(
        "none",
        "leave out, numerator and denominator: tokens by their ratio, or sequences by the product "
        "of their tokens' or its geometric mean",
        choices=("none", "token", "sequence", "geometric"),
    )
    reject_low: float | None = option(
        None, "smallest ratio that is kept (null: no bound)", above=0, maximum=limits.FACTOR
    )
    reject_high: float | None = option(
        None, "largest ratio that is kept (null: no bound)", above=0, maximum=limits.FACTOR
    )
    veto: float | None = option(
        None,
        "leave out sequences with a token whose ratio is below this, 1e-4 say (null: none)",
        above=0,
        below=1,
    )


@dataclass
class DynamicSamplingConfig:
    enabled: bool = option(False, "replace groups whose rewards have no spread (DAPO)")
    max_rounds: int = option(
        4, "maximum rounds of rollouts per step", minimum=1, maximum=limits.STEPS
    )
    spread_of: str = option(
        "score",
        "what has to differ in a group: the verifier's scores (DAPO), or rewards, with the penalty "
        "for length; a group without it that is kept for want of better ones trains nothing",
        choices=("score", "reward"),
    )


@dataclass
class OverlongConfig:
    buffer: int = option(
        0,
        "tokens before the limit over which the penalty grows (0: off)",
        minimum=0,
        maximum=limits.TOKENS,
    )
    penalty: float = option(1.0, "penalty at the limit", minimum=0, maximum=limits.FACTOR)
    leave_out: bool = option(
        False, "responses cut off at the limit do not train the policy (they count in baselines)"
    )
