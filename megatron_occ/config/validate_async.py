"""What sampling ahead of training needs of the other settings."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_occ.config.schema import Config


def async_problems(config: Config) -> Iterator[str]:
    """Problems of ``rl.async``, one message each.

    Args:
        config: a configuration whose single values are in range.
    """
    lag = f"rl.async.max_lag={config.rl.async_.max_lag}"
    if not config.rl.async_.max_lag or not config.rl.train_trunk:
        return
    trunk = config.mtp.trunk
    by_logprobs = trunk.coefficient == "occ" and trunk.estimator != "exact"
    if by_logprobs and config.rl.old_logprobs == "rollout":
        yield (
            f"{lag}: with rl.old_logprobs=rollout the old log-probs are those of several versions "
            f"of the policy, and what it moved meanwhile would count in both factors of lambda "
            f"(mtp.trunk.estimator={trunk.estimator}). Give rl.old_logprobs=training, and "
            "rl.correction.weights=token for the lag"
        )
    if config.mtp.head.states == "rollout":
        yield (
            f"{lag}: mtp.head.states=rollout would train the head on states of earlier weights. "
            "Give mtp.head.states=training, or rl.async.max_lag=0"
        )


def async_warnings(config: Config) -> list[str]:
    """Settings of ``rl.async`` that a user may not mean."""
    rl = config.rl
    corrected = rl.correction.weights != "none" or rl.correction.reject != "none"
    if not rl.async_.max_lag or not rl.train_trunk or rl.old_logprobs == "rollout" or corrected:
        return []
    return [
        f"rl.async.max_lag={rl.async_.max_lag}: responses of up to so many steps ago train as if "
        "the present policy had drawn them. Give rl.correction.weights=token with "
        "rl.correction.high=2, say, or rl.old_logprobs=rollout"
    ]
