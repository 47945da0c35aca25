"""Which keys a resumed run may change: those that leave what was done so far as it was."""

from __future__ import annotations

from megatron_occ.config.errors import ConfigError
from megatron_occ.config.load import flat_values
from megatron_occ.config.schema import Config

# length, bookkeeping and speed; not what a step computes
_CHANGEABLE = (
    "run_dir",
    "keep_checkpoints",
    "data.verifier_timeout",
    "parallel.",
    "pretrain.micro_batch_size",
    "pretrain.save_every",
    "pretrain.log_every",
    "rl.micro_batch_size",
    "rl.rollout.batch_size",
    "rl.rollout.log_samples",
    "rl.validation.",
    "rl.save_every",
)


def check_resumed(saved: Config, now: Config) -> list[str]:
    """Compare a run's saved configuration with the one it is to be resumed with.

    Returns:
        The permitted changes, one line each, for the log.

    Raises:
        ConfigError: a change after which the run would not be the same run.
    """
    before, after = flat_values(saved), flat_values(now)
    changed = [key for key in after if after[key] != before[key]]
    lines = {key: f"{key} was {before[key]!r}, is {after[key]!r}" for key in changed}
    refused = [lines[key] for key in changed if not _may_change(key, now)]
    if refused:
        raise ConfigError(
            "--resume continues a run as it was, but "
            + "; ".join(refused)
            + ": give the run's own values, or start another run with rl.init_from=<checkpoint>"
        )
    return list(lines.values())


def _may_change(key: str, config: Config) -> bool:
    if key in ("pretrain.steps", "rl.steps"):
        phase = config.pretrain if key == "pretrain.steps" else config.rl
        # a decay is laid out over the whole phase
        return phase.optimizer.schedule == "constant"
    return key.startswith(_CHANGEABLE)
