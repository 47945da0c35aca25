"""From prompts to a batch with advantages: generation, verification, dynamic sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_occ.config.schema import RLConfig
from megatron_occ.data.prompts import PromptStream
from megatron_occ.data.splits import mix64
from megatron_occ.losses import group_advantages, group_has_spread, overlong_penalty
from megatron_occ.observe.progress import Timers
from megatron_occ.rl.batch import RolloutBatch, pad_sequences
from megatron_occ.rl.sampler import Sampler, Samples, sample_seed


@dataclass(frozen=True)
class Rollouts:
    """A step's batch on this rank, metrics over all ranks, samples to read, and warnings."""

    batch: RolloutBatch
    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    events: list[str]


class RolloutSource:
    """Draws prompts and turns responses into a batch; the stream's position is its only state.

    Args:
        sampler: samples and scores.
        stream: training prompts.
        config: section ``rl``.
        seed: of sampling.
    """

    def __init__(self, sampler: Sampler, stream: PromptStream, config: RLConfig, seed: int) -> None:
        self.sampler, self.stream, self.config, self.seed = sampler, stream, config, seed
        self.actor = sampler.actor
        self.position = 0

    def generate(self, timers: Timers) -> Rollouts:
        """Rollouts of one step."""
        size = self.config.samples_per_prompt
        wanted = self.config.prompts_per_step // self.actor.layout.data_parallel_size * size
        drawn, useful = Samples(), []
        rounds = self.config.dynamic_sampling.max_rounds if self._is_dynamic else 1
        for _ in range(rounds):
            samples = self._round(timers)
            useful += [len(drawn) + row for row in self._useful_rows(samples)]
            drawn.extend(samples)
            if self._all_ranks_have(len(useful) >= wanted):
                break
        events = []
        short = self._sum([max(0, wanted - len(useful)) // size])[0]
        if short:
            events.append(
                f"dynamic sampling: {short:.0f} groups without spread kept after {rounds} rounds"
            )
        chosen = set(useful)
        rest = [row for row in range(len(drawn)) if row not in chosen]
        return self._assemble(drawn, (useful + rest)[:wanted], events)

    @property
    def _is_dynamic(self) -> bool:
        return self.config.dynamic_sampling.enabled

    def _round(self, timers: Timers) -> Samples:
        """One response to each of this rank's share of prompts, ``samples_per_prompt`` times."""
        layout = self.actor.layout
        records = self.stream.prompts_for_step(self.position, self.config.prompts_per_step)
        key = mix64(mix64(self.seed) + self.position)
        self.position += 1
        mine = range(layout.data_parallel_rank, len(records), layout.data_parallel_size)
        copies = range(self.config.samples_per_prompt)
        pairs = [(records[i], sample_seed(key, i * len(copies) + j)) for i in mine for j in copies]
        return self.sampler(
            [record for record, _ in pairs],
            seeds=[seed for _, seed in pairs],
            temperature=self.config.rollout.temperature,
            timers=timers,
        )

    def _useful_rows(self, samples: Samples) -> list[int]:
        if not self._is_dynamic:
            return list(range(len(samples)))
        size = self.config.samples_per_prompt
        spread = group_has_spread(torch.tensor(samples.scores), size)
        return [i for i in range(len(samples)) if bool(spread[i // size])]

    def _all_ranks_have(self, enough: bool) -> bool:
        return self._sum([0.0 if enough else 1.0])[0] == 0

    def _sum(self, values: list[float]) -> list[float]:
        layout = self.actor.layout
        total = torch.tensor(values, dtype=torch.float64, device=layout.device)
        return layout.all_reduce_data_parallel(total).tolist()

    def _assemble(self, drawn: Samples, rows: list[int], events: list[str]) -> Rollouts:
        """Batch from the chosen rows; metrics over all responses that were drawn."""
        samples, rewards = drawn.take(rows), self._rewards(drawn)
        advantages = group_advantages(
            rewards[rows],
            self.config.samples_per_prompt,
            baseline=self.config.advantage.baseline,
            normalize=self.config.advantage.normalize,
        )
        batch = pad_sequences(
            samples.prompts,
            samples.tokens,
            samples.logprobs,
            advantages,
            self.sampler.tokenizer.pad_id,
            self.actor.layout.device,
        )
        dropped = (len(drawn) - len(rows)) // self.config.samples_per_prompt
        metrics = self._metrics(drawn, rewards, dropped)
        return Rollouts(batch, metrics, self._readable(samples, rewards[rows], advantages), events)

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
                float(sum(samples.scores)),
                float(sum(lengths)),
                float(len(samples) - sum(samples.finished)),
                float(dropped),
            ]
        )
        count, total, squares, accuracy, tokens, truncated, dropped_groups = sums
        longest = torch.tensor(max(lengths), device=self.actor.layout.device)
        self.actor.layout.all_reduce_data_parallel(longest, maximum=True)
        mean = total / count
        return {
            "reward/mean": mean,
            "reward/std": max(0.0, squares / count - mean**2) ** 0.5,
            "rollout/accuracy": accuracy / count,
            "rollout/length_mean": tokens / count,
            "rollout/length_max": float(longest),
            "rollout/truncated": truncated / count,
            "rollout/dropped_groups": dropped_groups,
            "rollout/tokens": tokens,
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
                "correct": samples.scores[i] >= 1.0,
                "reward": round(float(rewards[i]), 6),
                "advantage": round(float(advantages[i]), 6),
                "finish_reason": "stop" if samples.finished[i] else "length",
            }
            for i in range(0, count * stride, stride)
        ]
