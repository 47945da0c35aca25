"""Validation on held-out problems: avg@k and pass@k of sampled responses."""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_occ.config.schema import ValidationConfig
from megatron_occ.data.prompt_stream import PromptStream
from megatron_occ.data.prompts import PromptRecord
from megatron_occ.observe.progress import Timers
from megatron_occ.rl.drafts import draft_metrics
from megatron_occ.rl.rewards import FULL_SCORE
from megatron_occ.rl.sampler import Sampler, sample_seed


class Validation(NamedTuple):
    """A measurement: its metrics, and warnings about it."""

    metrics: dict[str, float]
    events: list[str]


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
) -> Validation:
    """Sample ``config.samples`` responses to each held-out problem, the same seeds every time.

    Args:
        sampler: samples and scores.
        stream: held-out prompts.
        config: section ``rl.validation``.
        seed: of sampling.
        part: of the problems; see :func:`held_out_problems`. Each has random numbers of its own, so
            that a choice made by one is not favoured by another.

    Returns:
        ``avg@k`` (mean score over all samples), ``pass@1`` (share of correct samples, which is
        the same number where scores are 0 or 1), ``pass@k`` (share of problems with a correct
        sample, all k drawn), ``problems``, and where there were drafts those of
        :func:`draft_metrics`; over all data-parallel ranks. A sample is correct at ``FULL_SCORE``
        or more.

    Raises:
        ValueError: a prompt does not fit, or the verifier of every response failed.
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
    correct = (scores >= FULL_SCORE).to(scores)
    sums = (scores.mean(1).sum(), correct.mean(1).sum(), correct.amax(1).sum())
    local = torch.stack((*sums, scores.new_tensor(len(scores)))).to(layout.device)
    total, right, solved, count = layout.all_reduce_data_parallel(local).tolist()
    metrics = {
        f"avg@{samples}": total / count,
        "pass@1": right / count,
        f"pass@{samples}": solved / count,
        "problems": count,
    }
    drafts = draft_metrics(drawn.drafts, layout)
    if len(drafts) > 1:  # without drafts there is nothing to tell
        metrics |= drafts
    return Validation(metrics, drawn.failures.events())
