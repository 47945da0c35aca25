"""Which keys a resumed run may change: those that leave what was done so far as it was."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_occ.config.errors import ConfigError
from megatron_occ.config.load import flat_values
from megatron_occ.config.schema import Config
from megatron_occ.config.words import counted

# length, bookkeeping and speed; not what a step computes
_CHANGEABLE = (
    "run_dir",
    "keep_checkpoints",
    "keep_best",
    "keep_every",
    "save_in_background",
    "max_skipped_updates",
    "phase_limits.",
    "data.verifier_timeout",
    "data.verifier_workers",
    "parallel.",
    "fusions",
    "attention_backend",
    "recompute",
    "pretrain.micro_batch_size",
    "pretrain.save_every",
    "pretrain.log_every",
    "rl.micro_batch_size",
    "rl.micro_batch_tokens",
    "rl.rollout.batch_size",
    "rl.rollout.cache_tokens",
    "rl.rollout.log_samples",
    "rl.rollout.server.",
    "rl.validation.",
    "rl.save_every",
    "eval.",
    "log.",
    "alerts.",
    "profile.",
)


def check_resumed(
    saved: Config, now: Config, *, done: Mapping[str, int] | None = None
) -> list[str]:
    """Compare a run's saved configuration with the one it is to be resumed with.

    Args:
        saved: what the run was started with.
        now: what it is to go on with.
        done: step of the newest checkpoint of ``pretrain`` and of ``rl``, 0 without one; None:
            there are none. With one of RL, pretraining is not entered again.

    Returns:
        The permitted changes, one line each, for the log.

    Raises:
        ConfigError: a change after which the run would not be the same run.
    """
    before, after = flat_values(saved), flat_values(now)
    changed = [key for key in after if after[key] != before[key]]
    lines = {key: f"{key} was {before[key]!r}, is {after[key]!r}" for key in changed}
    objections = {key: _objection(key, now, done or {}) for key in changed}
    refused = [f"{lines[key]} ({text})" for key, text in objections.items() if text]
    if refused:
        raise ConfigError(
            "--resume continues a run as it was, but "
            + "; ".join(refused)
            + ": give the run's own values, or start another run with rl.init_from=<checkpoint>"
        )
    return list(lines.values())


def _objection(key: str, config: Config, done: Mapping[str, int]) -> str:
    """Why a key may not change; empty where it may."""
    if key == "pretrain.steps" and done.get("rl", 0):
        return "pretraining is over, RL goes on from its end"
    if key in ("pretrain.steps", "rl.steps"):
        phase = config.pretrain if key == "pretrain.steps" else config.rl
        behind = done.get(key.partition(".")[0], 0)
        if phase.steps < behind:
            return f"{counted(behind, 'step')} done"
        decays = phase.optimizer.schedule != "constant"
        return "the learning rate decays over the whole phase" if decays else ""
    if key == "profile.steps" and config.profile.steps:
        behind = done.get(config.profile.phase, 0)
        return f"{behind} steps are done" if config.profile.steps[0] <= behind else ""
    if key.startswith("rl.micro_batch_") and config.mtp.trunk.estimator == "released":
        return "mtp.trunk.estimator=released takes lambda from each micro-batch"
    return "" if key.startswith(_CHANGEABLE) else "it would not be the same run"
