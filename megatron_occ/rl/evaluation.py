"""Validation on held-out problems: avg@k and pass@k of sampled responses."""

from __future__ import annotations

import torch

from megatron_occ.config.schema import ValidationConfig
from megatron_occ.data.prompts import PromptRecord, PromptStream
from megatron_occ.observe.progress import Timers
from megatron_occ.rl.sampler import Sampler, sample_seed


def held_out_problems(stream: PromptStream, count: int, part: int = 0) -> list[PromptRecord]:
    """The problems of a part: ``count`` of a task's own, the same first ones of a file in each.

    Args:
        stream: held-out prompts; a file with fewer than ``count`` is used whole.
        count: problems of a part.
        part: 0-based.

    Raises:
        ValueError: a generated task that has no such part.
    """
    if stream.size is None:
        return stream.prompts_for_step(part, count)
    return stream.prompts_for_step(0, min(count, stream.size))


def evaluate(
    sampler: Sampler,
    stream: PromptStream,
    config: ValidationConfig,
    seed: int,
    *,
    part: int = 0,
) -> dict[str, float]:
    """Sample ``config.samples`` responses to each held-out problem, the same seeds every time.

    Args:
        sampler: samples and scores.
        stream: held-out prompts.
        config: section ``rl.validation``.
        seed: of sampling.
        part: of the problems; see :func:`held_out_problems`. Each has random numbers of its own, so
            that a choice made by one is not favoured by another.

    Returns:
        ``avg@k`` (mean score over all samples), ``pass@1`` (its unbiased estimate, the same
        number), ``pass@k`` (share of problems with a correct sample, all k drawn), ``problems``;
        over all data-parallel ranks.
    """
    layout, samples = sampler.actor.layout, config.samples
    records = held_out_problems(stream, config.problems, part)
    mine = range(layout.data_parallel_rank, len(records), layout.data_parallel_size)
    first = part * len(records) * samples
    pairs = [
        (records[i], sample_seed(seed, first + i * samples + j))
        for i in mine
        for j in range(samples)
    ]
    # a rank without a problem of its own samples too: generation is the work of all ranks
    drawn = sampler(
        [record for record, _ in pairs],
        seeds=[seed for _, seed in pairs],
        temperature=config.temperature,
        timers=Timers(),
    )
    scores = torch.tensor(drawn.scores, dtype=torch.float64).view(-1, samples)
    local = torch.stack(
        (scores.mean(1).sum(), scores.amax(1).sum(), scores.new_tensor(len(scores)))
    )
    sums = local.to(layout.device)
    total, solved, count = layout.all_reduce_data_parallel(sums).tolist()
    mean = total / count
    return {
        f"avg@{samples}": mean,
        "pass@1": mean,
        f"pass@{samples}": solved / count,
        "problems": count,
    }
