"""Validation on sets of held-out problems: avg@k and pass@k of sampled responses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_occ.data.prompt_stream import PromptStream
from megatron_occ.data.prompts import PromptRecord
from megatron_occ.data.splits import mix64
from megatron_occ.observe.progress import Timers
from megatron_occ.rl.drafts import draft_metrics
from megatron_occ.rl.interfaces import Collectives
from megatron_occ.rl.pass_rates import pass_at
from megatron_occ.rl.rewards import FULL_SCORE
from megatron_occ.rl.sampler import Sampler, Samples, sample_seed
from megatron_occ.rollout import DraftStatistics


class Validation(NamedTuple):
    """A measurement: its metrics, and warnings about it."""

    metrics: dict[str, float]
    events: list[str]


class Amount(Protocol):
    """How much is drawn: the sections ``rl.validation`` and, without its nulls, ``eval``.

    Attributes:
        samples: responses to a problem.
        problems: of each set; None: all of a file.
        temperature: of sampling, 0: greedy.
    """

    samples: int
    problems: int | None
    temperature: float


@dataclass(frozen=True)
class Answered:
    """The problems of a set, and this rank's part of the responses.

    Args:
        records: all problems, the same on all ranks.
        mine: places of those that this data-parallel rank has sampled for.
        samples: their responses, those of a problem side by side.
        size: responses to a problem.
    """

    records: list[PromptRecord]
    mine: range
    samples: Samples
    size: int

    def scores(self, layout: Collectives) -> Tensor:
        """[problems, size] of all data-parallel ranks, on the CPU in double precision."""
        own = torch.tensor(self.samples.scores, dtype=torch.float64).view(-1, self.size)
        ranks = layout.data_parallel_size
        share = -(-len(self.records) // ranks)
        padded = torch.zeros(share, self.size, dtype=torch.float64)
        padded[: len(own)] = own
        by_rank = layout.gather_data_parallel(padded.to(layout.device)).cpu()
        # rank r of R has problems r, r + R, ...
        in_order = by_rank.view(ranks, share, self.size).transpose(0, 1)
        return in_order.reshape(-1, self.size)[: len(self.records)]


def held_out_problems(stream: PromptStream, count: int | None, part: int = 0) -> list[PromptRecord]:
    """The problems of a part: ``count`` of a task's own, the same first ones of a file in each.

    Args:
        stream: held-out prompts; a file with fewer than ``count`` is used whole.
        count: problems of a part; None: all of a file.
        part: 0-based.

    Raises:
        ValueError: a generated task that has no such part.
    """
    if stream.size is None:
        assert count is not None, "a task has no end"
        return stream.prompts_for_step(part, count)
    return stream.prompts_for_step(0, min(count or stream.size, stream.size))


def set_seed(seed: int, name: str) -> int:
    """Seed of a set's responses, whatever other sets there are; ``seed`` if it has no name."""
    if not name:
        return seed
    return mix64(seed ^ int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))


def answer(
    sampler: Sampler, stream: PromptStream, amount: Amount, seed: int, *, part: int = 0
) -> Answered:
    """Sample responses to each problem of a set, the same seeds every time; called by all ranks.

    Args:
        sampler: samples and scores.
        stream: held-out prompts.
        amount: how many.
        seed: of sampling.
        part: of the problems; see :func:`held_out_problems`. Each has random numbers of its own, so
            that a choice made by one is not favoured by another.

    Raises:
        ValueError: a prompt does not fit, or the verifier of every response failed.
    """
    layout, size = sampler.actor.layout, amount.samples
    records = held_out_problems(stream, amount.problems, part)
    mine = range(layout.data_parallel_rank, len(records), layout.data_parallel_size)
    first = part * len(records) * size
    pairs = [
        (records[i], sample_seed(seed, first + i * size + j)) for i in mine for j in range(size)
    ]
    # a rank without a problem of its own samples too: generation is the work of all ranks
    samples = sampler(
        [record for record, _ in pairs],
        seeds=[seed for _, seed in pairs],
        temperature=amount.temperature,
        timers=Timers(),
    )
    return Answered(records, mine, samples, size)


def evaluate(
    sampler: Sampler,
    sets: Mapping[str, PromptStream],
    amount: Amount,
    seed: int,
    *,
    part: int = 0,
    before_set: Callable[[], None] = lambda: None,
) -> Validation:
    """Validate on sets of held-out problems.

    Args:
        sampler: samples and scores.
        sets: held-out prompts by name.
        amount: how many of them, and of responses to each.
        seed: of sampling.
        part: of the problems, see :func:`answer`.
        before_set: called on all ranks before each set; it may raise to leave the rest out.

    Returns:
        ``avg@k`` (mean score over all samples), ``pass@1`` (share of correct samples, which is
        the same number where scores are 0 or 1), ``pass@k`` (share of problems with a correct
        sample, all k drawn), ``problems``, and where there were drafts those of
        :func:`draft_metrics`; over all data-parallel ranks. A sample is correct at ``FULL_SCORE``
        or more. Of sets with a name also ``name/avg@k`` and so on; those without one are then
        unweighted means over sets, and ``problems`` the sum.

    Raises:
        ValueError: a prompt does not fit, or the verifier of every response to a set failed.
    """
    layout, drafts, events = sampler.actor.layout, DraftStatistics(), []
    by_set = {}
    for name, stream in sets.items():
        before_set()
        answered = answer(sampler, stream, amount, set_seed(seed, name), part=part)
        by_set[name] = _rates(answered.scores(layout))
        drafts.add(answered.samples.drafts)
        where = f"{name}: " if name else ""
        events += [where + event for event in answered.samples.warnings()]
    metrics = _over_sets(list(by_set.values()))
    for name, rates in by_set.items():
        if name:
            metrics |= {f"{name}/{metric}": value for metric, value in rates.items()}
    of_drafts = draft_metrics(drafts, layout)
    if len(of_drafts) > 1:  # without drafts there is nothing to tell
        metrics |= of_drafts
    return Validation(metrics, events)


def _rates(scores: Tensor) -> dict[str, float]:
    count, samples = scores.shape
    correct = scores >= FULL_SCORE
    return {
        f"avg@{samples}": float(scores.mean()),
        "pass@1": float(correct.double().mean()),
        f"pass@{samples}": float(pass_at(correct, samples).mean()),
        "problems": float(count),
    }


def _over_sets(rates: list[dict[str, float]]) -> dict[str, float]:
    sums = {name: sum(each[name] for each in rates) for name in rates[0]}
    return {n: total if n == "problems" else total / len(rates) for n, total in sums.items()}
