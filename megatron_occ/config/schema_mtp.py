"""The section ``mtp`` of the configuration: what MTP does in RL."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_occ.config import limits
from megatron_occ.config.options import option, section


@dataclass
class ExactConfig:
    every: int = option(
        1,
        "measure in every n-th mini-batch, by one more pass. A head with a loss of its own lets "
        "MTP act on the trunk in these alone; with a shared loss the last lambda holds in between",
        minimum=1,
        maximum=limits.STEPS,
    )
    pairs: str = option(
        "cross",
        "inner products of RL's and MTP's gradients from different parts of a mini-batch "
        "(unbiased), or from all of it (the paper's full-gradient variant: mostly shared noise)",
        choices=("cross", "same"),
    )
    parts: int = option(
        2,
        "parts that pairs=cross cuts a mini-batch into, between prompts",
        minimum=2,
        maximum=limits.SEQUENCES,
    )
    per: str = option("trunk", "one coefficient, or one for each layer", choices=("trunk", "layer"))
    metric: str = option(
        "adam", "metric of inner products: the optimizer's, or plain", choices=("adam", "euclidean")
    )
    gate: float = option(
        2.0,
        "lambda acts only if it is this many standard errors from 0 (0: always)",
        minimum=0,
        maximum=limits.FACTOR,
    )
    share: float | None = option(
        None,
        "size of MTP's part of the trunk's update relative to RL's, where the gate is passed "
        "(null: what lambda_plus gives)",
        above=0,
        maximum=limits.FACTOR,
    )
    share_cap: float | None = option(
        0.5, "upper bound of that share (null: none)", above=0, maximum=limits.FACTOR
    )
    control: str | None = option(
        None,
        "controls for studies: a random direction of the same norm in place of MTP's gradient, or "
        "lambda of a random earlier measurement in place of the latest",
        choices=("random", "shuffled"),
    )


@dataclass
class TrunkConfig:
    signal: str = option(
        "none", "MTP loss whose gradient enters the trunk", choices=("none", "ce", "policy")
    )
    weighting: str = option(
        "ppo",
        "token weights in a policy loss of the MTP heads: the clipped ratio exp(m - o), the ratio "
        "cut at ratio_cap as a constant, or 1",
        choices=("ppo", "truncated", "unit"),
    )
    dual_clip: float | None = option(
        10.0,
        "bound on weighting=ppo for negative advantages (null: off, heavy tails)",
        above=1,
        maximum=limits.FACTOR,
    )
    ratio_cap: float = option(
        1.0, "largest weight of weighting=truncated", above=0, maximum=limits.FACTOR
    )
    coefficient: str = option(
        "fixed", "how the weight of that gradient is chosen", choices=("fixed", "occ")
    )
    weight: float = option(
        0.1, "the weight, with coefficient=fixed", minimum=0, maximum=limits.FACTOR
    )
    estimator: str = option(
        "logprob",
        "OCC formula: the paper's log-prob proxy, the released code's, or the gradients themselves",
        choices=("logprob", "released", "exact"),
    )
    statistics: str = option(
        "previous",
        "mini-batch that lambda is computed from: the previous one, or this one (one more forward)",
        choices=("previous", "current"),
    )
    lambda_plus: float | None = option(
        1.0,
        "lambda+ of the paper's formula (f of the released one; null with estimator=exact: the "
        "best step's scale, estimated from RL's own gradient)",
        above=0,
        maximum=limits.FACTOR,
    )
    clamp: list[float | None] = option(
        [0.0, None],
        "lower and upper bound of lambda (null: none)",
        minimum=-limits.FACTOR,
        maximum=limits.FACTOR,
    )
    ema: float = option(
        0.0, "decay of the exponential average of the statistics", minimum=0, below=1
    )
    exact: ExactConfig = section(ExactConfig, "measurements of estimator=exact")


@dataclass
class HeadConfig:
    signal: str = option(
        "ce",
        "what trains the MTP head: the loss that reaches the trunk, or one detached from the trunk",
        choices=("same_as_trunk", "none", "ce", "soft_ce", "tv", "policy"),
    )
    weight: float = option(0.1, "weight of the head's own loss", minimum=0, maximum=limits.FACTOR)
    cut_output_layer: bool = option(
        True,
        "detach the head's own loss from the output layer too (false, as in the code released with "
        "OCC: it trains the output layer, and a tied embedding)",
    )
    states: str = option(
        "training",
        "trunk states for a soft_ce or tv loss: those of the training pass, or those the rollout "
        "computed, of all responses drawn",
        choices=("training", "rollout"),
    )
    clip_grad: float = option(
        1.0,
        "gradient norm of the head's parameters is clipped to this (0: no clipping)",
        minimum=0,
        maximum=limits.NORM,
    )


@dataclass
class MTPConfig:
    num_layers: int = option(1, "MTP depths K", minimum=0, maximum=limits.DEPTHS)
    preset: str | None = option(
        None,
        "named regime: sets trunk and head",
        choices=(
            "none",
            "detach",
            "ce",
            "policy",
            "occ",
            "occ_decoupled",
            "occ_exact",
            "head_only",
        ),
    )
    trunk: TrunkConfig = section(TrunkConfig, "gradient that MTP sends into the trunk")
    head: HeadConfig = section(HeadConfig, "training of the MTP head itself")
