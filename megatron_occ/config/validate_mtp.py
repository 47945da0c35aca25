"""What the keys of ``mtp`` must satisfy together: a regime that cannot act is an error."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_occ.config.keys import spell
from megatron_occ.config.schema import Config
from megatron_occ.config.schema_mtp import TrunkConfig


def mtp_problems(config: Config) -> Iterator[str]:
    """Problems of the MTP regime in RL, one message each.

    Args:
        config: a configuration whose single values are in range.
    """
    trunk, head = config.mtp.trunk, config.mtp.head
    own_loss = head.signal not in ("none", "same_as_trunk")
    if config.mtp.num_layers == 0 and (trunk.signal != "none" or own_loss):
        yield (
            f"mtp.num_layers=0: there is no MTP layer for mtp.trunk.signal={trunk.signal} and "
            f"mtp.head.signal={head.signal}. Set mtp.preset=none (in place of these keys), or "
            "mtp.num_layers=1 or more"
        )
    if trunk.signal == "none" and head.signal == "same_as_trunk" and config.rl.train_trunk:
        yield (
            "mtp.head.signal=same_as_trunk: mtp.trunk.signal=none has no loss to share, so "
            "nothing trains the MTP layers. Set mtp.head.signal=ce (preset detach), or none to "
            "freeze them"
        )
    if own_loss and head.weight == 0:
        yield (
            f"mtp.head.weight=0: mtp.head.signal={head.signal} would train nothing. Give a "
            "weight above 0, or mtp.head.signal=none to freeze the MTP layers"
        )
    if trunk.signal != "none" and trunk.coefficient == "fixed" and trunk.weight == 0:
        yield (
            f"mtp.trunk.weight=0: mtp.trunk.signal={trunk.signal} would have no effect. Give a "
            "weight above 0, or mtp.trunk.signal=none"
        )
    yield from _weighting(config)
    if not config.rl.train_trunk:
        yield from _head_alone(config)
    if head.states == "rollout":
        yield from _states_of_rollouts(config)
    yield from _clamp(trunk)
    if trunk.coefficient == "occ":
        yield from _calibration(trunk, config.rl.mini_batches)


def _weighting(config: Config) -> Iterator[str]:
    """Weights of tokens where no MTP head has a policy loss."""
    trunk, head = config.mtp.trunk, config.mtp.head
    if trunk.signal == "policy" or head.signal == "policy":
        return
    defaults = TrunkConfig()
    for name in ("weighting", "dual_clip", "ratio_cap"):
        value = getattr(trunk, name)
        if value != getattr(defaults, name):
            yield (
                f"mtp.trunk.{name}={spell(value)}: no MTP head has a policy loss "
                f"(mtp.trunk.signal={trunk.signal}, mtp.head.signal={head.signal}). Set "
                "mtp.trunk.signal=policy, or drop the key"
            )


def _head_alone(config: Config) -> Iterator[str]:
    """What a stage that trains the head alone can't do."""
    signal, head = config.mtp.trunk.signal, config.mtp.head.signal
    remedy = "Set mtp.head.signal=soft_ce (mtp.preset=head_only) or tv, or rl.train_trunk=true"
    if signal != "none":
        yield (
            f"mtp.trunk.signal={signal}: rl.train_trunk=false leaves the trunk as it is. Set "
            "mtp.trunk.signal=none (mtp.preset=head_only), or rl.train_trunk=true"
        )
    why = {
        "none": "nothing would be trained",
        "same_as_trunk": "there is no loss of the trunk to share",
        "ce": "soft_ce has the same expected gradient on responses of the policy itself, without "
        "the noise of the tokens drawn",
        "policy": "its advantages are for a policy that learns",
    }
    if head in why:
        yield f"mtp.head.signal={head}: with rl.train_trunk=false {why[head]}. {remedy}"


def _states_of_rollouts(config: Config) -> Iterator[str]:
    """Who cannot train the head on the states that rollouts verified tokens with."""
    parallel, signal = config.parallel, config.mtp.head.signal
    remedy = "Give mtp.head.states=training"
    if signal in ("ce", "policy"):
        yield (
            f"mtp.head.states=rollout: mtp.head.signal={signal} is about tokens that the policy is "
            "trained on, not about what the main head predicts. Set mtp.head.signal=soft_ce or tv, "
            "or mtp.head.states=training"
        )
    if config.rl.rollout.engine != "megatron":
        yield (
            f"mtp.head.states=rollout: servers (rl.rollout.engine={config.rl.rollout.engine}) "
            f"return no hidden states. {remedy}, or rl.rollout.engine=megatron"
        )
    for name, why in (
        ("pipeline", "the states are on the last stage, and Megatron's schedule runs all of them"),
        ("expert", "ranks that share experts take their micro-batches in step"),
    ):
        size = getattr(parallel, name)
        if size > 1:
            yield f"mtp.head.states=rollout: with parallel.{name}={size} {why}. {remedy}"


def _clamp(trunk: TrunkConfig) -> Iterator[str]:
    clamp = trunk.clamp
    if len(clamp) != 2:
        yield (
            f"mtp.trunk.clamp={spell(clamp)}: needs two entries, the lower and the upper bound "
            "of lambda, for example [0.0, null]"
        )
        return
    low, high = clamp
    if low is not None and high is not None and low > high:
        yield f"mtp.trunk.clamp={spell(clamp)}: the lower bound is above the upper. Swap them"
    if trunk.coefficient == "occ" and high is not None and high <= 0:
        yield (
            f"mtp.trunk.clamp={spell(clamp)}: lambda could never be above 0, so the MTP loss "
            "would not be minimised. Give an upper bound above 0, or null"
        )


def _calibration(trunk: TrunkConfig, mini_batches: int) -> Iterator[str]:
    if trunk.signal == "none" or (trunk.signal == "ce" and trunk.estimator != "exact"):
        yield (
            f"mtp.trunk.coefficient=occ: with mtp.trunk.estimator={trunk.estimator} calibrates the "
            f"policy gradient of the MTP heads, not mtp.trunk.signal={trunk.signal}. Set "
            "mtp.trunk.coefficient=fixed, or mtp.trunk.signal=policy"
        )
    if trunk.lambda_plus is None and trunk.estimator != "exact":
        yield (
            f"mtp.trunk.lambda_plus=null: mtp.trunk.estimator={trunk.estimator} does not measure "
            "the scale of lambda. Give a number (1.0 is the paper's), or "
            "mtp.trunk.estimator=exact"
        )
    if trunk.estimator == "exact":
        return
    if mini_batches == 1:
        yield (
            "rl.mini_batches=1: with mtp.trunk.coefficient=occ lambda would stay 0, since in the "
            "first mini-batch of a step the policy still is the old policy (d_RL = l - o = 0). "
            "Give rl.mini_batches=2 or more, or mtp.trunk.coefficient=fixed"
        )
    if trunk.estimator != "released":
        return
    if trunk.statistics == "current":
        yield (
            "mtp.trunk.statistics=current: mtp.trunk.estimator=released takes lambda from each "
            "micro-batch by definition. Leave mtp.trunk.statistics=previous, or set "
            "mtp.trunk.estimator=logprob"
        )
    if trunk.ema != 0:
        yield (
            f"mtp.trunk.ema={trunk.ema}: mtp.trunk.estimator=released takes lambda from each "
            "micro-batch alone. Set mtp.trunk.ema=0, or mtp.trunk.estimator=logprob"
        )
