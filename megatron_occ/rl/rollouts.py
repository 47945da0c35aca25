"""From prompts to a batch with advantages: generation, verification, dynamic sampling."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_occ.config.schema import RLConfig
from megatron_occ.config.words import counted
from megatron_occ.data.prompt_stream import PromptStream
from megatron_occ.data.splits import mix64
from megatron_occ.losses import (
    advantage_sums,
    group_advantages,
    group_has_spread,
    overlong_penalty,
    step_advantages,
)
from megatron_occ.observe.progress import Timers
from megatron_occ.rl.ages import Ages
from megatron_occ.rl.batch import RolloutBatch, pad_masks, pad_routes, pad_sequences
from megatron_occ.rl.drafts import draft_metrics
from megatron_occ.rl.head_rows import HeadRows
from megatron_occ.rl.rewards import FULL_SCORE
from megatron_occ.rl.sampler import Begun, Sampler, Samples, sample_seed
from megatron_occ.rollout.engine import LENGTH
from megatron_occ.rollout.statistics import server_metrics


@dataclass(frozen=True)
class Rollouts:
    """Responses of a step, the same on any layout but for which rank holds them.

    Args:
        batch: the rows that this rank holds, in global order, as wide on all ranks.
        owners: the data-parallel rank that holds each row of the step, in global order.
        metrics: over all ranks.
        samples: of this rank, to read.
        events: warnings.
        head: all responses that this rank drew, with states, where they train the head.
    """

    batch: RolloutBatch
    owners: list[int]
    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    events: list[str]
    head: HeadRows | None = None


class RolloutSource:
    """Draws prompts and turns responses into a batch; the stream's position is its only state.

    With ``rl.async.max_lag`` n the responses of the n steps after this one are asked for before it
    trains, and those that are not finished by then go on under later weights. Steps take them in
    the order of the prompts: what is finished first does not count first, which would prefer short
    responses, and none is older than n steps. A run that is stopped asks for them anew.

    Args:
        sampler: samples and scores.
        stream: training prompts.
        config: section ``rl``.
        seed: of sampling.
        keep_states: hand on the trunk states of all responses, to train the head on.
    """

    def __init__(
        self,
        sampler: Sampler,
        stream: PromptStream,
        config: RLConfig,
        seed: int,
        *,
        keep_states: bool = False,
    ) -> None:
        self.sampler, self.stream, self.config, self.seed = sampler, stream, config, seed
        self.keep_states = keep_states
        self.actor = sampler.actor
        self._position = 0
        self._begun: deque[Begun] = deque()
        self._ages = Ages()

    @property
    def position(self) -> int:
        """Rounds that steps have taken."""
        return self._position

    @position.setter
    def position(self, value: int) -> None:
        self._begun.clear()
        self._position = value

    def abort(self) -> None:
        """End a generation under way; what it returns then is of no use."""
        self.sampler.engine.abort()

    def generate(
        self,
        timers: Timers,
        after_round: Callable[[], None] = lambda: None,
        *,
        steps_left: int = 1,
    ) -> Rollouts:
        """Rollouts of one step.

        Groups count in the order of their prompts, whichever rank drew them: the first useful ones
        are taken, then the first of the others.

        Args:
            timers: of the parts.
            after_round: called by all ranks before the responses of a round are looked at.
            steps_left: of the run, this one included: none is asked for that has no step.

        Raises:
            ValueError: a prompt does not fit, or the verifier of every response of a round failed.
        """
        self.sampler.update(timers)
        self._ages.begin_step(self.actor.version)
        self._ask(min(self.config.async_.max_lag + 1, steps_left), timers)
        wanted = self.config.prompts_per_step
        drawn, useful = Samples(), []
        rounds = self.config.dynamic_sampling.max_rounds if self._is_dynamic else 1
        for _ in range(rounds):
            samples = self._round(timers)
            after_round()
            drawn.extend(samples)
            useful += self._useful_groups(samples)
            if sum(useful) >= wanted:
                break
        events = drawn.warnings()
        short = wanted - sum(useful)
        if short > 0:
            events.append(
                f"dynamic sampling: {counted(short, 'group')} without spread kept after "
                f"{counted(rounds, 'round')}"
            )
        # those of use first
        order = sorted(range(len(useful)), key=lambda group: not useful[group])[:wanted]
        chosen = [(group, useful[group]) for group in order]
        return self._assemble(drawn, chosen, len(useful) - wanted, events)

    @property
    def _is_dynamic(self) -> bool:
        return self.config.dynamic_sampling.enabled

    def _ask(self, rounds: int, timers: Timers) -> None:
        """Have so many rounds asked for, those that are included."""
        if len(self._begun) >= rounds:
            return
        with timers("rollout"):
            while len(self._begun) < rounds:
                self._begun.append(self._begin(self._position + len(self._begun)))

    def _round(self, timers: Timers) -> Samples:
        """Responses to the next prompts."""
        self._ask(1, timers)
        begun = self._begun.popleft()
        self._position += 1
        return self.sampler.finish(begun, timers)

    def _begin(self, position: int) -> Begun:
        """Ask for a response to each of this rank's share of prompts, for each of its samples."""
        layout = self.actor.layout
        records = self.stream.prompts_for_step(position, self.config.prompts_per_step)
        key = mix64(mix64(self.seed) + position)
        mine = range(layout.data_parallel_rank, len(records), layout.data_parallel_size)
        copies = range(self.config.samples_per_prompt)
        pairs = [(records[i], sample_seed(key, i * len(copies) + j)) for i in mine for j in copies]
        return self.sampler.begin(
            [record for record, _ in pairs],
            seeds=[seed for _, seed in pairs],
            temperature=self.config.rollout.temperature,
            keep_states=self.keep_states,
            keep_masks=self.config.loss.sampling_mask,
            keep_routes=self.config.routing_replay == "rollout",
        )

    def _useful_groups(self, samples: Samples) -> list[bool]:
        """Whether each group of a round is of use, over all ranks, in the order of the prompts."""
        if not self._is_dynamic:
            return [True] * self.config.prompts_per_step
        layout = self.actor.layout
        by_score = self.config.dynamic_sampling.spread_of == "score"
        values = torch.tensor(samples.scores) if by_score else self._rewards(samples)
        size, valid = self.config.samples_per_prompt, self._valid(samples)
        spread = group_has_spread(values, size, valid=valid)
        by_rank = layout.gather_data_parallel(spread.long().to(layout.device))
        # rank r of R drew prompts r, r + R, ...
        return by_rank.view(layout.data_parallel_size, -1).t().flatten().bool().tolist()

    def _sum(self, values: list[float]) -> list[float]:
        layout = self.actor.layout
        total = torch.tensor(values, dtype=torch.float64, device=layout.device)
        return layout.all_reduce_data_parallel(total).tolist()

    def _maximum(self, value: int) -> float:
        layout = self.actor.layout
        largest = torch.tensor(value, dtype=torch.float64, device=layout.device)
        return float(layout.all_reduce_data_parallel(largest, maximum=True))

    def _assemble(
        self, drawn: Samples, chosen: list[tuple[int, bool]], dropped: int, events: list[str]
    ) -> Rollouts:
        """Batch from groups of all ranks; metrics over all responses that were drawn.

        Args:
            drawn: of this rank.
            chosen: groups, and whether they are of use.
            dropped: groups that are not chosen.
            events: warnings.
        """
        layout, size = self.actor.layout, self.config.samples_per_prompt
        ranks = layout.data_parallel_size
        # group g was drawn by rank g % R, as its group g // R
        own = [
            (g // ranks, of_use) for g, of_use in chosen if g % ranks == layout.data_parallel_rank
        ]
        rows = [group * size + copy for group, _ in own for copy in range(size)]
        samples, rewards = drawn.take(rows), self._rewards(drawn)
        valid = self._valid(samples)
        # without a difference in scores, the penalty for length alone would be what is learned
        learns = torch.tensor([of_use for _, of_use in own for _ in range(size)], dtype=torch.bool)
        advantages = self._advantages(rewards[rows], valid) * learns
        batch = pad_sequences(
            samples.prompts,
            samples.tokens,
            samples.logprobs,
            advantages,
            self.sampler.tokenizer.pad_id,
            self._width(samples),
            layout.device,
        )
        if self.config.routing_replay == "rollout":
            like = max(drawn.routes, key=torch.Tensor.dim)
            routes = pad_routes(samples.routes, batch.ids.size(1), like)
            batch = replace(batch, routes=routes)
        if self.config.loss.sampling_mask:
            kept = int(self._maximum(max((mask.size(-1) for mask in samples.masks), default=0)))
            shape = (batch.ids.size(1), max(1, kept))
            masks = pad_masks(samples.prompts, samples.masks, shape)
            batch = replace(batch, sampling_masks=masks)
        if self.config.overlong.leave_out:
            batch = _without(batch, [reason == LENGTH for reason in samples.finish_reasons])
        if valid is not None:
            batch = _without(batch, samples.failed)
        return Rollouts(
            batch,
            [g % ranks for g, _ in chosen for _ in range(size)],
            self._metrics(drawn, rewards, dropped) | self._lag(samples),
            self._readable(samples, rewards[rows], advantages),
            events,
            HeadRows.of(drawn, size, layout) if self.keep_states else None,
        )

    def _lag(self, samples: Samples) -> dict[str, float]:
        """How old the responses are that train; {} where each step waits for its own."""
        if not self.config.async_.max_lag:
            return {}
        lags = self._ages.of(samples.versions)
        sums = self._sum(lags.sums)
        return lags.metrics(sums, self._maximum(lags.largest))

    def _valid(self, samples: Samples) -> Tensor | None:
        """[n], responses that count in baselines; None: all."""
        if not self.config.advantage.without_failures:
            return None
        return ~torch.tensor(samples.failed, dtype=torch.bool)

    def _advantages(self, rewards: Tensor, valid: Tensor | None) -> Tensor:
        """[n], 0 where the policy does not learn; called by all ranks."""
        if not self.config.train_trunk:
            return torch.zeros_like(rewards)
        settings = self.config.advantage
        over_step = settings.normalize and settings.normalize_over == "step"
        found = group_advantages(
            rewards,
            self.config.samples_per_prompt,
            baseline=settings.baseline,
            normalize=settings.normalize and not over_step,
            valid=valid,
        )
        if not over_step:
            return found
        layout = self.actor.layout
        own = advantage_sums(found if valid is None else found[valid])
        sums = layout.all_reduce_data_parallel(own.to(layout.device))
        return step_advantages(found, sums, valid=valid)

    def _width(self, samples: Samples) -> int:
        """Tokens of the longest sequence on any rank."""
        pairs = zip(samples.prompts, samples.tokens, strict=True)
        longest = max((len(prompt) + len(tokens) for prompt, tokens in pairs), default=0)
        return int(self._maximum(longest))

    def _rewards(self, samples: Samples) -> Tensor:
        rewards = torch.tensor(samples.scores)
        overlong = self.config.overlong
        if overlong.buffer == 0:
            return rewards
        lengths = torch.tensor([len(tokens) for tokens in samples.tokens])
        limit = self.config.rollout.max_response_length
        return rewards + overlong_penalty(lengths, limit, overlong.buffer, overlong.penalty)

    def _metrics(self, samples: Samples, rewards: Tensor, dropped: int) -> dict[str, float]:
        lengths = [len(tokens) for tokens in samples.tokens]
        sums = self._sum(
            [
                float(len(samples)),
                float(rewards.double().sum()),
                float(rewards.double().square().sum()),
                float(sum(score >= FULL_SCORE for score in samples.scores)),
                float(sum(lengths)),
                float(samples.finish_reasons.count(LENGTH)),
            ]
        )
        count, total, squares, correct, tokens, truncated = sums
        mean = total / count
        return {
            "reward/mean": mean,
            "reward/std": max(0.0, squares / count - mean**2) ** 0.5,
            "rollout/accuracy": correct / count,
            "rollout/length_mean": tokens / count,
            "rollout/length_max": self._maximum(max(lengths)),
            "rollout/truncated": truncated / count,
            "rollout/dropped_groups": float(dropped),
            "rollout/tokens": tokens,
            "verifier/errors": float(samples.failures.errors),
            "verifier/timeouts": float(samples.failures.timeouts),
            "verifier/failed": samples.failures.share,
            **draft_metrics(samples.drafts, self.actor.layout),
            **server_metrics(samples.servers),
        }

    def _readable(
        self, samples: Samples, rewards: Tensor, advantages: Tensor
    ) -> list[dict[str, Any]]:
        """A few responses spread over the step's prompts, for ``rollouts.jsonl``."""
        count = min(self.config.rollout.log_samples, len(samples))
        stride = max(1, len(samples) // max(1, count))
        return [
            {
                "prompt": samples.records[i].prompt,
                "response": samples.texts[i],
                "answer": samples.records[i].answer,
                "correct": samples.scores[i] >= FULL_SCORE,
                "reward": round(float(rewards[i]), 6),
                "advantage": round(float(advantages[i]), 6),
                "finish_reason": samples.finish_reasons[i],
                **({"verifier_failure": samples.problems[i]} if samples.problems[i] else {}),
            }
            for i in range(0, count * stride, stride)
        ]


def _without(batch: RolloutBatch, left_out: list[bool]) -> RolloutBatch:
    """The same rows, some of which train nothing."""
    device = batch.response_mask.device
    keep = ~torch.tensor(left_out, dtype=torch.bool, device=device).view(-1, 1)
    return replace(batch, response_mask=batch.response_mask * keep)
