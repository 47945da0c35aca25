"""The rank that needs the most memory, whether it fits, and what would make it fit."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

from megatron_occ.config import ConfigError, validate
from megatron_occ.config.pipeline import model_chunks
from megatron_occ.config.schema import Config
from megatron_occ.config.sizes import derive, round_up, sequence_multiple
from megatron_occ.mcore.estimate.memory import memory_use
from megatron_occ.mcore.estimate.ranks import RankEstimate

GIB = 2**30
Change = dict[str, object]


def distinct_stage_ranks(config: Config, world_size: int, rank: int) -> list[int]:
    """A rank of each kind of pipeline stage, at the place of ``rank`` in it: the one to compare.

    All ranks of a stage hold as much. Stages with the same layers differ in how many micro-batches
    are in flight, which is most on the first of them: no other needs more memory.

    Args:
        config: a configuration that ``validate`` accepts.
        world_size: ranks in all.
        rank: any rank.
    """
    stages = config.parallel.pipeline
    chunks, size = _kinds_of_chunks(config), world_size // stages
    first: dict[tuple[str, ...], int] = {}
    for stage in range(stages):
        first.setdefault(tuple(chunks[stage::stages]), stage)
    return [stage * size + rank % size for stage in first.values()]


def _kinds_of_chunks(config: Config) -> list[str]:
    """Chunks in pipeline order, with ``d`` for layers that are dense beside MoE layers."""
    dense = 0
    if config.model.moe.num_experts is not None:
        dense = config.model.moe.first_dense_layers
    chunks, before = [], 0
    for chunk in model_chunks(config):
        layers = chunk.count("t")
        here = max(0, min(layers, dense - before))
        chunks.append(chunk.replace("t", "d", here))
        before += layers
    return chunks


def largest(estimates: Sequence[RankEstimate]) -> RankEstimate:
    """The one that needs the most memory; of equals the first."""
    return max(estimates, key=lambda entry: entry.memory.peak)


def changes_that_help(
    config: Config, estimates: Sequence[RankEstimate], command: str, window: int, limit: int
) -> list[tuple[Change, int]]:
    """Keys with values that lower the peak of the largest rank, and that peak, each on its own.

    Of a size the largest value is given that fits, or the one that comes nearest. The last entry is
    several changes together, where none alone is enough.

    Args:
        config: a configuration that ``validate`` accepts.
        estimates: one of each kind of stage.
        command: that would run.
        window: of an audit.
        limit: bytes of a rank.
    """
    world_size = estimates[0].world_size

    def peak(change: Change) -> int:
        changed = _changed(config, change)
        uses = (memory_use(changed, e.held, world_size, command, window) for e in estimates)
        return max(use.peak for use in uses)

    def improved(before: Change, candidates: list[Change]) -> Change:
        """With the mildest candidate that makes it fit, else the one that lowers the peak most."""
        options = [before | candidate for candidate in candidates]
        options = [one for one in options if _is_allowed(config, one, command, world_size)]
        fitting = next((one for one in options if peak(one) <= limit), None)
        best = fitting or min(options, key=peak, default=before)
        return best if peak(best) < peak(before) else before

    kinds = list(_candidates(config, world_size, command))
    found = [change for change in (improved({}, kind) for kind in kinds) if change]
    if not any(peak(change) <= limit for change in found):
        together: Change = {}
        # twice: what helps little before another change may help much after it
        for kind in [*kinds, *kinds]:
            together = together if peak(together) <= limit else improved(together, kind)
        found += [together] if len(together) > 1 else []
    return [(change, peak(change)) for change in found]


def _candidates(config: Config, world_size: int, command: str) -> Iterator[list[Change]]:
    """Changes that leave the parameters of a rank alone, mild ones first."""
    if config.recompute != "full" or config.recompute_layers is not None:
        whole: Change = {"recompute": "full"}
        whole |= {"recompute_modules": []} if config.recompute_modules else {}
        yield [whole | ({"recompute_layers": None} if config.recompute_layers else {})]
    if not config.parallel.distributed_optimizer:
        yield [{"parallel.distributed_optimizer": True}]
    sizes, rl = derive(config, world_size), config.rl
    if command == "pretrain":
        key, value = "pretrain.micro_batch_size", config.pretrain.micro_batch_size
        yield [{key: size} for size in _divisors(sizes.rank_pretrain_batch, value)]
    elif rl.micro_batch_tokens is None:
        mini_batch = sizes.rank_mini_batch
        yield [{"rl.micro_batch_size": n} for n in _divisors(mini_batch, rl.micro_batch_size)]
    else:
        longest = round_up(config.model.max_position_embeddings, sequence_multiple(config))
        counts = range(rl.micro_batch_tokens // longest, 0, -1)
        tokens = [count * longest for count in counts if count * longest < rl.micro_batch_tokens]
        yield [{"rl.micro_batch_tokens": budget} for budget in tokens]
    if rl.rollout.engine == "megatron":
        rows = [2**n for n in range(20, -1, -1) if 2**n < rl.rollout.batch_size]
        yield [{"rl.rollout.batch_size": count} for count in rows]
    shares = (0.25, 0.5, 0.75, 1.0)
    yield [
        {"parallel.optimizer_offload": share}
        for share in shares
        if share > config.parallel.optimizer_offload
    ]


def _divisors(number: int, below: int) -> list[int]:
    return [size for size in range(min(number, below - 1), 0, -1) if number % size == 0]


def _changed(config: Config, change: Change) -> Config:
    changed = copy.deepcopy(config)
    for key, value in change.items():
        *sections, name = key.split(".")
        section = changed
        for part in sections:
            section = getattr(section, part)
        setattr(section, name, value)
    return changed


def _is_allowed(config: Config, change: Change, command: str, world_size: int) -> bool:
    try:
        validate(_changed(config, change), command=command, world_size=world_size)
    except ConfigError:
        return False
    return True
