"""What advantages, policy loss and correction must satisfy together."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_occ.config import limits
from megatron_occ.config.keys import spell
from megatron_occ.config.schema import Config
from megatron_occ.config.schema_loss import CorrectionConfig


def loss_problems(config: Config) -> Iterator[str]:
    """Problems from the advantages to the loss, one message each.

    Args:
        config: a configuration whose single values are in range.
    """
    if config.rl.train_trunk:
        yield from _kind(config)
        yield from _values(config)
        yield from _sampling_mask(config)
        yield from _routing_replay(config)
        yield from _baseline(config)
        yield from _correction(config)


def _kind(config: Config) -> Iterator[str]:
    loss, trunk = config.rl.loss, config.mtp.trunk
    if loss.kind == "clipped":
        return
    if loss.aggregation == "gspo":
        yield (
            f"rl.loss.kind={loss.kind}: is defined token by token, and rl.loss.aggregation=gspo "
            "has one ratio a sequence. Give rl.loss.kind=clipped, or another aggregation"
        )
    if trunk.weighting == "ppo" and "policy" in (trunk.signal, config.mtp.head.signal):
        yield (
            f"rl.loss.kind={loss.kind}: mtp.trunk.weighting=ppo is the clipped loss of an MTP "
            "head, and this loss does not clip. Give mtp.trunk.weighting=truncated "
            "(the form of CISPO) or unit, or rl.loss.kind=clipped"
        )


def _values(config: Config) -> Iterator[str]:
    loss = config.rl.loss
    if loss.kl_importance and loss.kl_kind == "k2":
        yield (
            "rl.loss.kl_importance=true: rl.loss.kl_kind=k2 has the gradient of the divergence "
            "without the ratio, and loses it with it. Give rl.loss.kl_kind=k3, or "
            "rl.loss.kl_importance=false"
        )
    if loss.top_entropy < 1 and loss.aggregation == "gspo":
        yield (
            f"rl.loss.top_entropy={loss.top_entropy}: chooses tokens, and rl.loss.aggregation=gspo "
            "has one ratio a sequence. Give rl.loss.top_entropy=1, or another aggregation"
        )
    if loss.top_entropy < 1 and config.rl.old_logprobs == "rollout":
        yield (
            f"rl.loss.top_entropy={loss.top_entropy}: entropies come from the pass that computes "
            "old log-probs, and rl.old_logprobs=rollout makes none. Give rl.old_logprobs=training, "
            "or rl.loss.top_entropy=1"
        )
    if loss.kind == "dppo" and loss.divergence == "tv" and loss.divergence_limit >= 1:
        yield (
            f"rl.loss.divergence_limit={loss.divergence_limit}: a total variation is never above "
            "1. Give rl.loss.divergence_limit=0.15, or rl.loss.divergence=kl"
        )


def _sampling_mask(config: Config) -> Iterator[str]:
    rollout, key = config.rl.rollout, "rl.loss.sampling_mask=true"
    if not config.rl.loss.sampling_mask:
        return
    if rollout.engine != "megatron":
        yield (
            f"{key}: rl.rollout.engine={rollout.engine} does not return what a token was drawn "
            "from. Give rl.rollout.engine=megatron, or rl.loss.sampling_mask=false"
        )
    if rollout.top_k is None and rollout.top_p == 1:
        yield (
            f"{key}: rl.rollout.top_p=1.0 and rl.rollout.top_k=null leave all tokens. Give "
            "rl.rollout.top_p=0.9 and rl.rollout.top_k=64, say, or rl.loss.sampling_mask=false"
        )
    elif rollout.top_k is None or rollout.top_k > limits.MASK_IDS:
        yield (
            f"{key}: keeps the ids that a token was drawn from, as many as "
            f"rl.rollout.top_k={spell(rollout.top_k)} allows. Give rl.rollout.top_k=64, say, "
            f"{limits.MASK_IDS:,} at most, or rl.loss.sampling_mask=false"
        )


def _routing_replay(config: Config) -> Iterator[str]:
    replay = config.rl.routing_replay
    if replay == "rollout" and config.rl.rollout.engine != "megatron":
        yield (
            f"rl.routing_replay=rollout: rl.rollout.engine={config.rl.rollout.engine} does not "
            "return the experts of a token. Give rl.rollout.engine=megatron, or "
            "rl.routing_replay=training"
        )
    if replay == "training" and config.rl.old_logprobs == "rollout":
        yield (
            "rl.routing_replay=training: experts come from the pass that computes old log-probs, "
            "and rl.old_logprobs=rollout makes none. Give rl.old_logprobs=training, or "
            "rl.routing_replay=rollout"
        )


def _baseline(config: Config) -> Iterator[str]:
    advantage = config.rl.advantage
    if advantage.baseline == "none" and advantage.normalize and advantage.normalize_over == "group":
        yield (
            "rl.advantage.baseline=none: the standard deviation of a group is around its mean. "
            "Give rl.advantage.normalize_over=step (REINFORCE++), rl.advantage.normalize=false, or "
            "rl.advantage.baseline=mean"
        )
    if advantage.baseline == "none" and config.rl.dynamic_sampling.enabled:
        yield (
            "rl.dynamic_sampling.enabled=true: drops groups without spread, which have a gradient "
            "with rl.advantage.baseline=none. Give rl.dynamic_sampling.enabled=false, or "
            "rl.advantage.baseline=mean"
        )


def _correction(config: Config) -> Iterator[str]:
    correction = config.rl.correction
    given = [
        f"rl.correction.{name}={value if isinstance(value, str) else spell(value)}"
        for name, value in vars(correction).items()
        if value != getattr(CorrectionConfig(), name)
    ]
    if given and config.rl.old_logprobs == "rollout":
        yield (
            f"{', '.join(given)}: compares the training model's old log-probs with the rollout's, "
            "and rl.old_logprobs=rollout takes the rollout's for both. Drop it, or give "
            "rl.old_logprobs=training"
        )
    yield from _range("", correction.low, correction.high)
    yield from _range("reject_", correction.reject_low, correction.reject_high)
    keeps_all = (correction.reject_low, correction.reject_high) == (None, None)
    if correction.reject != "none" and keeps_all:
        yield (
            f"rl.correction.reject={correction.reject}: without bounds nothing is rejected. Give "
            "rl.correction.reject_low=0.5 and rl.correction.reject_high=2, say, or "
            "rl.correction.reject=none"
        )
    unbounded = (correction.low, correction.high) == (None, None)
    if correction.outside == "mask" and correction.weights != "none" and unbounded:
        yield (
            "rl.correction.outside=mask: without bounds no weight is outside. Give "
            "rl.correction.low=0.5 and rl.correction.high=5 (IcePop), or "
            "rl.correction.outside=truncate"
        )


def _range(prefix: str, low: float | None, high: float | None) -> Iterator[str]:
    if low is None or high is None or low < high:
        return
    yield (
        f"rl.correction.{prefix}low={low}: is not below rl.correction.{prefix}high={high}. Lower "
        "the one or raise the other"
    )
