"""What the section ``profile`` must satisfy: a window that the run comes to."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_occ.config.schema import Config


def profile_problems(
    config: Config, world_size: int, *, pretrains: bool, trains: bool
) -> Iterator[str]:
    """Problems of the profiler's window, one message each.

    Args:
        config: a whole configuration.
        world_size: ranks in all.
        pretrains: whether the command runs pretraining.
        trains: whether it runs RL.
    """
    profile = config.profile
    is_run = pretrains if profile.phase == "pretrain" else trains
    if not profile.steps or not is_run:
        return
    key = f"profile.steps={profile.steps}"
    if len(profile.steps) != 2 or profile.steps[0] > profile.steps[1]:
        yield f"{key}: must be the first and the last step, as in [3, 5], or [] for no trace"
        return
    phase = config.pretrain if profile.phase == "pretrain" else config.rl
    if profile.steps[1] > phase.steps:
        yield (
            f"{key}: the run ends at step {phase.steps} ({profile.phase}.steps), before the "
            f"window does. Give steps up to {phase.steps}"
        )
    if not profile.ranks:
        yield f"profile.ranks=[]: no rank would write {key}. Give [0], or profile.steps=[]"
    beyond = [rank for rank in profile.ranks if rank >= world_size]
    if beyond:
        yield (
            f"profile.ranks={profile.ranks}: there are ranks 0 to {world_size - 1}. Leave out "
            f"{', '.join(map(str, beyond))}"
        )
