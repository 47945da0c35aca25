"""From prompts to a batch with advantages: generation, verification, dynamic sampling."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from megatron_occ.config.schema import RLConfig
from megatron_occ.data.prompts import PromptRecord, PromptStream
from megatron_occ.data.splits import mix64
from megatron_occ.data.tokenizers import Tokenizer
from megatron_occ.losses import group_advantages, group_has_spread, overlong_penalty
from megatron_occ.observe.progress import Timers
from megatron_occ.rl.batch import RolloutBatch, pad_sequences
from megatron_occ.rl.interfaces import Actor
from megatron_occ.rl.rewards import VerifierPool
from megatron_occ.rollout import SamplingSettings


@dataclass
class Samples:
    """Responses of whole groups, one entry a response."""

    records: list[PromptRecord] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    def take(self, rows: list[int]) -> Samples:
        """The given responses."""
        return Samples(*([getattr(self, f.name)[row] for row in rows] for f in fields(self)))

    def extend(self, other: Samples) -> None:
        """Append the responses of ``other``."""
        for f in fields(self):
            getattr(self, f.name).extend(getattr(other, f.name))


def sample_seed(key: int, index: int) -> int:
    """Seed of response ``index`` among those drawn under ``key``, in the range torch accepts."""
    return mix64(mix64(key) ^ index) >> 1


@dataclass(frozen=True)
class Rollouts:
    """A step's batch on this rank, metrics over all ranks, samples to read, and warnings."""

    batch: RolloutBatch
    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    events: list[str]


@dataclass(frozen=True)
class Sampler:
    """Samples and scores responses.

    Args:
        actor: the policy.
        tokenizer: of prompts and responses.
        verifiers: pool that scores responses.
        sampling: of RL; validation has a temperature of its own.
        max_prompt_length: tokens of a prompt at most, so that both fit the position range.
    """

    actor: Actor
    tokenizer: Tokenizer
    verifiers: VerifierPool
    sampling: SamplingSettings
    max_prompt_length: int

    def __call__(
        self, records: list[PromptRecord], *, seeds: list[int], temperature: float, timers: Timers
    ) -> Samples:
        """One response to each record; ``seeds`` names each response's random numbers."""
        prompts = [self._encode(record) for record in records]
        with timers("rollout"):
            sampling = replace(self.sampling, temperature=temperature)
            generation = self.actor.infer(prompts, sampling, seeds)
        texts = [self.tokenizer.decode(tokens) for tokens in generation.tokens]
        with timers("reward"):
            items = [(r.task_name, text, r.answer) for r, text in zip(records, texts, strict=True)]
            scores = [result.score for result in self.verifiers.score(items)]
        return Samples(
            list(records),
            prompts,
            generation.tokens,
            generation.logprobs,
            generation.finished,
            texts,
            scores,
        )

    def _encode(self, record: PromptRecord) -> list[int]:
        prompt = self.tokenizer.encode(record.prompt)
        if not 0 < len(prompt) <= self.max_prompt_length:
            raise ValueError(
                f"prompt {record.index} ({record.prompt!r:.60}) has {len(prompt)} tokens, allowed "
                f"are 1 to {self.max_prompt_length}: shorten it, lower "
                f"rl.rollout.max_response_length={self.sampling.max_response_length} or raise "
                "model.max_position_embeddings"
            )
        return prompt


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
        kept, dropped = Samples(), Samples()
        rounds = self.config.dynamic_sampling.max_rounds if self._is_dynamic else 1
        for _ in range(rounds):
            samples = self._round(timers)
            useful = self._useful_rows(samples)
            kept.extend(samples.take(useful))
            chosen = set(useful)
            dropped.extend(samples.take([i for i in range(len(samples)) if i not in chosen]))
            if self._all_ranks_have(len(kept) >= wanted):
                break
        events = []
        missing = max(0, wanted - len(kept))
        short = self._sum([missing // size])[0]
        if short:
            events.append(
                f"dynamic sampling: {short:.0f} groups without spread kept after {rounds} rounds"
            )
        num_dropped = len(dropped) - missing
        kept.extend(dropped.take(list(range(missing))))
        return self._assemble(kept.take(list(range(wanted))), num_dropped // size, events, timers)

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

    def _assemble(
        self, samples: Samples, dropped: int, events: list[str], timers: Timers
    ) -> Rollouts:
        rewards = self._rewards(samples)
        advantages = group_advantages(
            rewards,
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
        metrics = self._metrics(samples, rewards, dropped)
        return Rollouts(batch, metrics, self._readable(samples, rewards, advantages), events)

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
                "correct": samples.scores[i] > 0,
                "reward": round(float(rewards[i]), 6),
                "advantage": round(float(advantages[i]), 6),
                "finish_reason": "stop" if samples.finished[i] else "length",
            }
            for i in range(0, count * stride, stride)
        ]
