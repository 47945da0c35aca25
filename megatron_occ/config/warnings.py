"""Settings that do what they say, and that a user may not mean."""

from __future__ import annotations

from megatron_occ.config.schema import Config


def regime_warnings(config: Config) -> list[str]:
    """Warnings about the MTP regime in RL, for the run's log.

    Args:
        config: a configuration that ``validate`` accepts.
    """
    trunk, head = config.mtp.trunk, config.mtp.head
    clips = trunk.weighting == "ppo" and "policy" in (trunk.signal, head.signal)
    found = []
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
    if config.rl.rollout.engine == "sglang" and config.model.mtp_reads == "before":
        found.append(
            "model.mtp_reads=before: SGLang hands MTP layers the trunk's state after its final "
            "norm, so that it accepts fewer drafts than the embedded engine or vLLM would; "
            "responses are the same"
        )
    return found
