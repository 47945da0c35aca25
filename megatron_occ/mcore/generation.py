"""Rollouts by the training model itself: a KV cache, plain sampling, one uniform number a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megatron_occ.mcore.layout import Layout
from megatron_occ.mcore.model import OCCGPTModel
from megatron_occ.rollout import SamplingSettings, sample_from_uniform, uniforms


@dataclass(frozen=True)
class Generation:
    """Responses of n prompts.

    Args:
        tokens: n lists of response ids, a stop token included where one ended the response.
        logprobs: n lists, log-prob of each token under the sampling temperature.
        finished: n flags: ended by a stop token (False: cut off at the limit).
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finished: list[bool]


def generate_shared(
    chunks: Sequence[OCCGPTModel],
    layout: Layout,
    prompts: list[list[int]],
    sampling: SamplingSettings,
    seeds: list[int],
) -> Generation:
    """As :func:`generate`, with context-parallel ranks each taking a share of the prompts.

    Decoding has no sequence to split, so they work as further data-parallel ranks.
    """
    rank, size = layout.context_parallel_rank, layout.context_parallel_size
    mine = generate(chunks, layout, prompts[rank::size], sampling, seeds[rank::size])
    shares = layout.gather_context_parallel(mine)
    merged = Generation([], [], [])
    for field in fields(Generation):
        values = getattr(merged, field.name)
        values += [None] * len(prompts)
        for first, share in enumerate(shares):
            values[first::size] = getattr(share, field.name)
    return merged


@torch.no_grad()
def generate(
    chunks: Sequence[OCCGPTModel],
    layout: Layout,
    prompts: list[list[int]],
    sampling: SamplingSettings,
    seeds: list[int],
) -> Generation:
    """Sample a response for each prompt.

    A sequence's random numbers come from its own seed, so that its response does not depend on the
    batch it was generated in, nor on the parallel layout, up to rounding in the logits.

    Args:
        chunks: this rank's bare model, without sequence and context parallelism; put into
            evaluation mode meanwhile.
        layout: this rank's place.
        prompts: n non-empty lists of token ids, the same on all ranks that share the model.
        sampling: see ``SamplingSettings``.
        seeds: n seeds.
    """
    was_training = chunks[0].training
    for chunk in chunks:
        chunk.eval()
    results = Generation([], [], [])
    largest = layout.largest_among_expert_ranks
    try:
        for start in range(0, largest(len(prompts)), sampling.batch_size):
            rows = slice(start, start + sampling.batch_size)
            wanted, numbers = prompts[rows], seeds[rows]
            # experts are shared with ranks that may have more prompts: keep them company
            missing = largest(len(wanted)) - len(wanted)
            filler = [prompts[0] if prompts else [0]] * missing
            decoder = _BatchDecoder(chunks, layout, wanted + filler, sampling)
            part = decoder.run(uniforms(numbers + [0] * missing, sampling.max_response_length))
            for field in fields(Generation):
                getattr(results, field.name).extend(getattr(part, field.name)[: len(wanted)])
    finally:
        for chunk in chunks:
            chunk.train(was_training)
    return results


class _BatchDecoder:
    """Decodes a batch in step: shorter prompts are sampled while longer ones are still read."""

    def __init__(
        self,
        chunks: Sequence[OCCGPTModel],
        layout: Layout,
        prompts: list[list[int]],
        sampling: SamplingSettings,
    ) -> None:
        limit = sampling.max_response_length
        self.device, self.largest = layout.device, layout.largest_among_expert_ranks
        lengths = [len(prompt) for prompt in prompts]
        self.lengths = torch.tensor(lengths, device=self.device)
        self.shortest = -self.largest(-min(lengths))
        self.total = self.largest(max(lengths)) + limit
        self.limit, self.temperature = limit, sampling.temperature
        self.stop = torch.tensor(sampling.stop_ids, device=self.device)
        self.ids = torch.zeros(len(prompts), self.total, dtype=torch.long, device=self.device)
        for row, prompt in enumerate(prompts):
            self.ids[row, : len(prompt)] = torch.tensor(prompt, device=self.device)
        self.logprobs = torch.zeros(self.ids.shape, device=self.device)
        self.ends = (self.lengths + limit).clamp(max=self.total)
        self.stopped = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        self.pipeline = _Pipeline(chunks, len(prompts), self.total)

    def run(self, uniform: Tensor) -> Generation:
        uniform = uniform.to(self.device)
        positions = torch.arange(self.total, device=self.device).expand_as(self.ids)
        cached = 0
        for position in range(self.shortest, self.total):
            new = slice(cached, position)
            logits = self.pipeline.next_token_logits(self.ids[:, new], positions[:, new])
            cached = position
            self._append(position, logits, uniform)
            if not self.largest(int(bool((self.ends > position + 1).any()))):
                break
        return self._collect()

    def _append(self, position: int, logits: Tensor | None, uniform: Tensor) -> None:
        step = (position - self.lengths).clamp(0, self.limit - 1)
        picks = torch.zeros(2, len(self.ids), dtype=torch.float64, device=self.device)
        if logits is not None:
            log_probs = (logits / self.temperature).log_softmax(-1)
            number = uniform.gather(1, step.unsqueeze(1)).squeeze(1)
            drawn = sample_from_uniform(log_probs, number)
            picked = log_probs.gather(1, drawn.unsqueeze(1)).squeeze(1)
            picks = torch.stack((drawn.double(), picked.double()))
        token, picked = self.pipeline.share(picks)
        token, picked = token.long(), picked.float()
        live = (position >= self.lengths) & (position < self.ends)
        self.ids[:, position] = torch.where(live, token, self.ids[:, position])
        self.logprobs[:, position] = torch.where(live, picked, 0.0)
        stops = live & torch.isin(token, self.stop)
        self.stopped |= stops
        self.ends = torch.where(stops, position + 1, self.ends)

    def _collect(self) -> Generation:
        spans = list(zip(self.lengths.tolist(), self.ends.tolist(), strict=True))
        rows = zip(self.ids.tolist(), self.logprobs.tolist(), spans, strict=True)
        pairs = [(ids[a:b], logprobs[a:b]) for ids, logprobs, (a, b) in rows]
        return Generation(
            [ids for ids, _ in pairs], [logprobs for _, logprobs in pairs], self.stopped.tolist()
        )


class _Pipeline:
    """The model over all pipeline stages, with a KV cache for each chunk of this one."""

    def __init__(self, chunks: Sequence[OCCGPTModel], batch: int, length: int) -> None:
        self.chunks = chunks
        self.contexts = [StaticInferenceContext(batch, length) for _ in chunks]
        self.group = chunks[0].pg_collection.pp
        self.rank, self.size = self.group.rank(), self.group.size()

    def next_token_logits(self, ids: Tensor, positions: Tensor) -> Tensor | None:
        """Logits [b, v] of the next token on the last stage, None on others.

        Args:
            ids: [b, s] tokens that the caches do not hold yet.
            positions: [b, s].
        """
        hidden = None
        for chunk, context in zip(self.chunks, self.contexts, strict=True):
            if not chunk.pre_process:
                chunk.set_input_tensor(self._receive(chunk, ids))
            hidden = chunk.last_hidden(ids, positions, context)
            context.sequence_len_offset += ids.size(1)
            context.enable_decode_mode()
            if not chunk.post_process:
                torch.distributed.send(
                    hidden.contiguous(), group=self.group, group_dst=(self.rank + 1) % self.size
                )
        last = self.chunks[-1]
        return last.next_token_logits(hidden) if last.post_process else None

    def _receive(self, chunk: OCCGPTModel, ids: Tensor) -> Tensor:
        size = (ids.size(1), ids.size(0), chunk.config.hidden_size)
        hidden = torch.empty(size, dtype=chunk.config.params_dtype, device=ids.device)
        torch.distributed.recv(hidden, group=self.group, group_src=(self.rank - 1) % self.size)
        return hidden

    def share(self, picks: Tensor) -> Tensor:
        """What the last stage sampled, on all stages."""
        if self.size > 1:
            torch.distributed.broadcast(picks, group=self.group, group_src=self.size - 1)
        return picks
