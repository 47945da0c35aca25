"""Rollouts by the training model itself: a KV cache, plain sampling, one uniform number a token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

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


@torch.no_grad()
def generate(
    model: OCCGPTModel, prompts: list[list[int]], sampling: SamplingSettings, seeds: list[int]
) -> Generation:
    """Sample a response for each prompt.

    A sequence's random numbers come from its own seed, so that its response does not depend on the
    batch it was generated in, nor on the data-parallel layout, up to rounding in the logits.

    Args:
        model: bare model; put into evaluation mode meanwhile.
        prompts: n non-empty lists of token ids.
        sampling: see ``SamplingSettings``.
        seeds: n seeds.
    """
    was_training = model.training
    model.eval()
    results = Generation([], [], [])
    try:
        for start in range(0, len(prompts), sampling.batch_size):
            rows = slice(start, start + sampling.batch_size)
            decoder = _BatchDecoder(model, prompts[rows], sampling)
            part = decoder.run(uniforms(seeds[rows], sampling.max_response_length))
            for name in ("tokens", "logprobs", "finished"):
                getattr(results, name).extend(getattr(part, name))
    finally:
        model.train(was_training)
    return results


class _BatchDecoder:
    """Decodes a batch in step: shorter prompts are sampled while longer ones are still read."""

    def __init__(
        self, model: OCCGPTModel, prompts: list[list[int]], sampling: SamplingSettings
    ) -> None:
        limit = sampling.max_response_length
        self.model, self.device = model, next(model.parameters()).device
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        self.shortest, self.total = int(self.lengths.min()), int(self.lengths.max()) + limit
        self.limit, self.temperature = limit, sampling.temperature
        self.stop = torch.tensor(sampling.stop_ids, device=self.device)
        self.ids = torch.zeros(len(prompts), self.total, dtype=torch.long, device=self.device)
        for row, prompt in enumerate(prompts):
            self.ids[row, : len(prompt)] = torch.tensor(prompt, device=self.device)
        self.logprobs = torch.zeros(self.ids.shape, device=self.device)
        self.ends = (self.lengths + limit).clamp(max=self.total)
        self.stopped = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)

    def run(self, uniform: Tensor) -> Generation:
        uniform = uniform.to(self.device)
        context = StaticInferenceContext(self.ids.size(0), self.total)
        positions = torch.arange(self.total, device=self.device).expand_as(self.ids)
        cached = 0
        for position in range(self.shortest, self.total):
            new = slice(cached, position)
            logits = self.model.next_token_logits(self.ids[:, new], positions[:, new], context)
            context.sequence_len_offset = cached = position
            context.enable_decode_mode()
            self._append(position, logits / self.temperature, uniform)
            if bool((self.ends <= position + 1).all()):
                break
        return self._collect()

    def _append(self, position: int, logits: Tensor, uniform: Tensor) -> None:
        step = (position - self.lengths).clamp(0, self.limit - 1)
        log_probs = logits.log_softmax(-1)
        token = sample_from_uniform(log_probs, uniform.gather(1, step.unsqueeze(1)).squeeze(1))
        live = (position >= self.lengths) & (position < self.ends)
        self.ids[:, position] = torch.where(live, token, self.ids[:, position])
        picked = log_probs.gather(1, token.unsqueeze(1)).squeeze(1)
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
