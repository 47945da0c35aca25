"""Sampling and scoring: one response to each prompt, with random numbers of its own."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch

from megatron_occ.config.words import counted
from megatron_occ.data.prompts import PromptRecord
from megatron_occ.data.splits import mix64
from megatron_occ.data.tokenizers import Tokenizer
from megatron_occ.observe.progress import Timers
from megatron_occ.rl.failures import Failures
from megatron_occ.rl.interfaces import Actor
from megatron_occ.rl.rewards import VerifierPool
from megatron_occ.rollout import DraftStatistics, Request, RolloutEngine, SamplingSettings
from megatron_occ.rollout.engine import Done, PendingGeneration
from megatron_occ.rollout.statistics import ServerWork


@dataclass
class Samples:
    """Responses of whole groups, one entry a response, and what holds for all of them.

    ``failed``: a response could not be scored, and has the score 0. ``problems`` says why; "" where
    it could, and on ranks that did not ask the verifiers. ``drafts`` is how drafts fared,
    ``failures`` those of verifiers on all ranks. ``states`` has an entry a response too where the
    engine was asked for states, none elsewhere; so have ``masks`` and ``routes``. ``events`` are
    those of the engine. ``versions`` are those of each token's weights. ``servers``
    is what each server did, of every round, and empty without servers.
    """

    records: list[PromptRecord] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    failed: list[bool] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    failures: Failures = field(default_factory=Failures)
    drafts: DraftStatistics = field(default_factory=DraftStatistics)
    states: list[torch.Tensor] = field(default_factory=list)
    masks: list[torch.Tensor] = field(default_factory=list)
    routes: list[torch.Tensor] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    versions: list[list[int]] = field(default_factory=list)
    servers: list[ServerWork] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    def take(self, rows: list[int]) -> Samples:
        """The given responses, without states and what holds for all."""
        others = ("failures", "drafts", "states", "events", "servers")
        names = [f.name for f in fields(self) if f.name not in others and getattr(self, f.name)]
        return Samples(**{name: [getattr(self, name)[row] for row in rows] for name in names})

    def warnings(self) -> list[str]:
        """What a person should know of them, on the main rank."""
        return [*self.events, *self.failures.events()]

    def extend(self, other: Samples) -> None:
        """Append the responses of ``other``."""
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if f.name in ("failures", "drafts"):
                mine.add(theirs)
            else:
                mine.extend(theirs)


def sample_seed(key: int, index: int) -> int:
    """Seed of response ``index`` among those drawn under ``key``, in the range torch accepts."""
    return mix64(mix64(key) ^ index) >> 1


@dataclass(frozen=True)
class Begun:
    """Responses that the engine was asked for: their records, encoded prompts, and the call."""

    records: list[PromptRecord]
    prompts: list[list[int]]
    pending: PendingGeneration


@dataclass(frozen=True)
class Sampler:
    """Samples and scores responses.

    Args:
        engine: generates, under the weights of ``actor``.
        actor: the policy.
        tokenizer: of prompts and responses.
        verifiers: pool that scores responses.
        sampling: of RL; validation has a temperature of its own.
        max_prompt_length: tokens of a prompt at most, so that both fit the position range.
        length_key: of the configuration, which limits responses.
    """

    engine: RolloutEngine
    actor: Actor
    tokenizer: Tokenizer
    verifiers: VerifierPool
    sampling: SamplingSettings
    max_prompt_length: int
    length_key: str = "rl.rollout.max_response_length"

    def __call__(
        self,
        records: list[PromptRecord],
        *,
        seeds: list[int],
        temperature: float,
        timers: Timers,
        **kept: bool,
    ) -> Samples:
        """One response to each record, under the present weights.

        Args:
            records: prompts and answers.
            seeds: of each response's random numbers.
            temperature: of sampling.
            timers: of the parts.
            kept: what else is wanted of each response: ``keep_states``, ``keep_masks``,
                ``keep_routes``, see ``SamplingSettings``.

        Raises:
            ValueError: a prompt does not fit, or every verifier failed.
        """
        prompts, requests = self._requests(records, seeds)
        self.update(timers)
        with timers("rollout"):
            sampling = replace(self.sampling, temperature=temperature, **kept)
            pending = Done(self.engine.generate(requests, sampling))
        return self.finish(Begun(records, prompts, pending), timers)

    def update(self, timers: Timers) -> None:
        """Have the engine serve the present weights; what was begun goes on under them."""
        # a part of the rollout, whose time limit holds for it too
        with timers("update_weights"), timers("rollout"):
            self.engine.update_weights(self.actor.version)

    def begin(
        self, records: list[PromptRecord], *, seeds: list[int], temperature: float, **kept: bool
    ) -> Begun:
        """Ask for a response to each record; arguments and errors as in a call."""
        prompts, requests = self._requests(records, seeds)
        sampling = replace(self.sampling, temperature=temperature, **kept)
        return Begun(records, prompts, self.engine.submit(requests, sampling))

    def finish(self, begun: Begun, timers: Timers) -> Samples:
        """Wait for the responses, and score them."""
        records = begun.records
        with timers("rollout"):
            generation = begun.pending.result()
        texts = [self.tokenizer.decode(tokens) for tokens in generation.tokens]
        with timers("reward"):
            answers = [self.without_stop(text) for text in texts]
            scores, failed, problems, failures = self._score(records, answers)
        failures.check()
        return Samples(
            list(records),
            begun.prompts,
            generation.tokens,
            generation.logprobs,
            generation.finish_reasons,
            texts,
            scores,
            failed,
            problems,
            failures,
            generation.drafts,
            generation.states,
            generation.masks,
            generation.routes,
            generation.events,
            generation.versions,
            generation.servers,
        )

    def _requests(
        self, records: list[PromptRecord], seeds: list[int]
    ) -> tuple[list[list[int]], list[Request]]:
        """Encoded prompts, and what the engine is asked for."""
        prompts = [self._encode(record) for record in records]
        return prompts, [Request(*pair) for pair in zip(prompts, seeds, strict=True)]

    def _score(
        self, records: list[PromptRecord], texts: list[str]
    ) -> tuple[list[float], list[bool], list[str], Failures]:
        """Scores of this data-parallel share's responses, the same on all ranks of the share.

        One of them asks the verifiers: under time limits two processes may get two answers, and
        would then train on different advantages.

        Returns:
            Scores, which responses could not be scored and why (see :class:`Samples`), and
            failures on all ranks.
        """
        layout = self.actor.layout
        # of each response its score, and whether there was a problem
        found = torch.zeros(2, len(texts), dtype=torch.float64, device=layout.device)
        problems, failures = [""] * len(texts), Failures()
        if layout.is_model_parallel_main:
            items = [(r.task_name, text, r.answer) for r, text in zip(records, texts, strict=True)]
            results = self.verifiers.score(items)
            problems = [result.detail for result in results]
            pairs = [(result.score, result.status != "ok") for result in results]
            found += torch.tensor(pairs, dtype=torch.float64).view(-1, 2).t().to(found)
            failures = Failures.of([record.task_name for record in records], results)
        scores, failed = layout.broadcast_model_parallel(found)
        return scores.tolist(), failed.bool().tolist(), problems, failures.over_ranks(layout)

    def without_stop(self, text: str) -> str:
        """What verifiers read: a response up to the text that ended it."""
        ends = [text.find(stop) for stop in self.sampling.stop_strings]
        return text[: min((end for end in ends if end >= 0), default=len(text))]

    def _encode(self, record: PromptRecord) -> list[int]:
        prompt = self.tokenizer.encode(record.prompt)
        if not 0 < len(prompt) <= self.max_prompt_length:
            raise ValueError(
                f"prompt {record.index} ({record.prompt!r:.60}) has "
                f"{counted(len(prompt), 'token')}, allowed are 1 to {self.max_prompt_length}: "
                f"shorten it, lower {self.length_key}={self.sampling.max_response_length} or raise "
                "model.max_position_embeddings"
            )
        return prompt
