"""Validation on held-out problems: avg@k and pass@k of sampled responses."""

from __future__ import annotations

import torch

from megatron_occ.config.schema import ValidationConfig
from megatron_occ.data.prompts import PromptStream
from megatron_occ.observe.progress import Timers
from megatron_occ.rl.rollouts import Sampler, sample_seed


def evaluate(
    sampler: Sampler, stream: PromptStream, config: ValidationConfig, seed: int
) -> dict[str, float]:
    """Sample ``config.samples`` responses to each held-out problem, the same seeds every time.

    Args:
        sampler: samples and scores.
        stream: held-out prompts; a file with fewer prompts than ``config.problems`` is used whole.
        config: section ``rl.validation``.
        seed: of sampling.

    Returns:
        ``avg@k`` (mean score over all samples), ``pass@1`` (its unbiased estimate, the same
        number), ``pass@k`` (share of problems with a correct sample, all k drawn), ``problems``;
        over all data-parallel ranks.
    """
    layout, samples = sampler.actor.layout, config.samples
    problems = config.problems if stream.size is None else min(config.problems, stream.size)
    records = stream.prompts_for_step(0, problems)
    mine = range(layout.data_parallel_rank, problems, layout.data_parallel_size)
    pairs = [(records[i], sample_seed(seed, i * samples + j)) for i in mine for j in range(samples)]
    sums = torch.zeros(3, dtype=torch.float64, device=layout.device)
    if pairs:
        drawn = sampler(
            [record for record, _ in pairs],
            seeds=[seed for _, seed in pairs],
            temperature=config.temperature,
            timers=Timers(),
        )
        scores = torch.tensor(drawn.scores, dtype=torch.float64).view(-1, samples)
        local = torch.tensor([scores.mean(1).sum(), scores.amax(1).sum(), len(scores)])
        sums += local.to(sums)
    total, solved, count = layout.all_reduce_data_parallel(sums).tolist()
    mean = total / count
    return {
        f"avg@{samples}": mean,
        "pass@1": mean,
        f"pass@{samples}": solved / count,
        "problems": count,
    }
