"""Settings that do what they say, and that a user may not mean."""

from __future__ import annotations

from megatron_occ.config.schema import Config, OptimizerConfig
from megatron_occ.config.served import served_warnings
from megatron_occ.config.validate_async import async_warnings

_HIGH_RATE = 0.05  # more than twice the usual size of initial weights


def rate_warnings(key: str, optimizer: OptimizerConfig) -> list[str]:
    """A warning about a learning rate that may be a slip; one above 1 is refused.

    Args:
        key: ``rl.optimizer`` or ``pretrain.optimizer``.
        optimizer: its values.
    """
    if optimizer.lr < _HIGH_RATE:
        return []
    return [
        f"{key}.lr={optimizer.lr:g}: Adam moves every weight by about this much in an update, and "
        "weights are rarely larger than that. 1e-3 is much for a small model, and 1e-6 usual for "
        "RL of a large one"
    ]


def rl_warnings(config: Config) -> list[str]:
    """Warnings about RL, for the run's log: the MTP regime and the learning rate.

    Args:
        config: a configuration that ``validate`` accepts.
    """
    trunk, head = config.mtp.trunk, config.mtp.head
    clips = trunk.weighting == "ppo" and "policy" in (trunk.signal, head.signal)
    found = rate_warnings("rl.optimizer", config.rl.optimizer) + async_warnings(config)
    if clips and trunk.dual_clip is None:
        found.append(
            "mtp.trunk.dual_clip=null: nothing bounds the ratio exp(m - o) of an MTP head where "
            "the advantage is negative, and a few tokens that the main head gave little can be the "
            "whole gradient. Give mtp.trunk.dual_clip=10, or mtp.trunk.weighting=truncated"
        )
    if clips and config.rl.loss.aggregation == "gspo":
        found.append(
            "rl.loss.aggregation=gspo: the sequence ratio of an MTP head lies far below the clip "
            "range, so that responses of negative advantage have no gradient there and those of "
            "positive advantage all of it. Give mtp.trunk.weighting=truncated for both"
        )
    loss = config.rl.loss
    by_logprobs = trunk.coefficient == "occ" and trunk.estimator in ("logprob", "released")
    if loss.sampling_mask and by_logprobs:
        found.append(
            f"rl.loss.sampling_mask=true: with mtp.trunk.estimator={trunk.estimator} lambda "
            "compares an MTP head's log-prob over all ids with the main head's over those that the "
            "cuts left, which shifts all differences one way. Give mtp.preset=occ_exact, whose "
            "lambda is from gradients"
        )
    if loss.kind == "cispo" and loss.clip_low < 1:
        found.append(
            f"rl.loss.clip_low={loss.clip_low}: CISPO as published has no lower bound of the "
            "weight, rl.loss.clip_low=1, and a wide upper one; rl.algorithm=cispo sets both"
        )
    found += served_warnings(config)
    if config.rl.rollout.engine == "sglang" and config.model.mtp_reads == "before":
        found.append(
            "model.mtp_reads=before: SGLang hands MTP layers the trunk's state after its final "
            "norm, so that it accepts fewer drafts than the embedded engine or vLLM would; "
            "responses are the same"
        )
    return found
