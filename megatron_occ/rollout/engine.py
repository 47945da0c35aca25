"""What a rollout engine is asked and what it answers; the embedded one and remote ones alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron_occ.rollout.statistics import DraftStatistics, ServerWork

STOP, LENGTH, ABORT = "stop", "length", "abort"


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are drawn; the same for all requests of a call.

    Tokens are drawn from softmax(logits / temperature) cut to the ``top_k`` likeliest tokens, then
    to the smallest set of likeliest tokens that holds ``top_p`` of what is left, and normalised
    again, the order in which vLLM and transformers do it.

    Args:
        temperature: divides the logits; 0: the likeliest token (greedy).
        max_response_length: tokens of a response at most, stop token included.
        stop_ids: token ids that end a response; the id stays in it.
        stop_strings: texts that end a response; the tokens that complete one stay in it.
        top_p: probability mass that stays, 1: all.
        top_k: number of tokens that stay, None: all.
        keep_states: return the trunk's hidden states too; the embedded engine alone can.
        keep_masks: return the ids that each token was drawn from, ``top_k`` of them at most, and
            log-probs under these alone; the embedded engine alone can.
        keep_routes: return the experts that each token went to; the embedded engine alone can.

    Raises:
        ValueError: a value out of its range, or ``keep_masks`` without ``top_k``.
    """

    temperature: float
    max_response_length: int
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    top_p: float = 1.0
    top_k: int | None = None
    keep_states: bool = False
    keep_masks: bool = False
    keep_routes: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: give a number from 0 (greedy)")
        if self.max_response_length < 1:
            raise ValueError(f"max_response_length={self.max_response_length}: give at least 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: give a number above 0, 1 at most (1: all)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: give at least 1, or None (all)")
        if self.keep_masks and self.top_k is None:
            raise ValueError("keep_masks=True: give top_k, which bounds the ids that are kept")


@dataclass(frozen=True)
class Request:
    """One response that is wanted.

    Args:
        prompt: token ids, at least one. Neighbours with equal prompts share a prefill.
        seed: of the response's own random numbers; 64 bits of it count.
        max_response_length: a limit of its own, below that of the settings; None: theirs.

    Raises:
        ValueError: an empty prompt, or a limit below 1.
    """

    prompt: Sequence[int]
    seed: int
    max_response_length: int | None = None

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise ValueError(f"prompt={self.prompt!r}: has no token to go on from. Give at least 1")
        if self.max_response_length is not None and self.max_response_length < 1:
            raise ValueError(
                f"max_response_length={self.max_response_length}: give at least 1, or None (the "
                "limit of the settings)"
            )


@dataclass
class Generation:
    """Responses of n requests, in their order.

    Args:
        tokens: n lists of response ids; see ``SamplingSettings`` for what ends one.
        logprobs: n lists, log-prob of each token under softmax(logits / temperature), before any
            cut by top-k or top-p: what the training forward pass computes. With temperature 0
            under softmax(logits), with ``keep_masks`` after the cuts.
        finish_reasons: n of ``stop``, ``length`` and ``abort``.
        drafts: of all n together.
        states: with ``keep_states`` n tensors on the CPU, [tokens - 1, h] of prompt and response:
            hidden states of the trunk that MTP layers read, at all tokens but the last; or empty.
        masks: with ``keep_masks`` n int32 tensors on the CPU, [tokens, m]: 1 + the ids that a token
            was drawn from, the likeliest first, then 0. 0 alone: from all. Or empty.
        routes: with ``keep_routes`` n tensors on the CPU, [tokens - 1, routers, k] of prompt and
            response, a byte or two each: 1 + the experts that a token went to in each layer with
            experts on this rank, in the order of the model's chunks, MTP layers behind those of
            their chunk; 0 where a layer did not read it. Or empty.
        events: what happened meanwhile that a person should know.
        versions: n lists, the version of the weights that each token was drawn under, see
            ``RolloutEngine.update_weights``.
        servers: what each server did since the generation before; none without servers.
    """

    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    drafts: DraftStatistics = field(default_factory=DraftStatistics)
    states: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    routes: list[Tensor] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    versions: list[list[int]] = field(default_factory=list)
    servers: list[ServerWork] = field(default_factory=list)


class EngineError(RuntimeError):
    """A rollout engine failed; the message says which, why, and what to do."""


class PendingGeneration(Protocol):
    """Responses that an engine was asked for."""

    def result(self) -> Generation:
        """Wait for them; called once, in the order of the ``submit`` calls.

        Raises:
            EngineError: the engine failed and could not be brought back; no response of the call
                is to be used.
        """
        ...


@dataclass(frozen=True)
class Done:
    """A :class:`PendingGeneration` of an engine that samples while it is asked."""

    generation: Generation

    def result(self) -> Generation:
        """See ``PendingGeneration.result``."""
        return self.generation


class RolloutEngine(Protocol):
    """Samples responses under the policy's present weights."""

    def submit(self, requests: Sequence[Request], sampling: SamplingSettings) -> PendingGeneration:
        """Ask for a response to each request, without waiting for them where the engine can.

        Weights may be updated meanwhile: responses that are not finished go on under the new
        ones.

        Raises:
            EngineError: the engine has no weights, or can't sample like this.
        """
        ...

    def generate(self, requests: Sequence[Request], sampling: SamplingSettings) -> Generation:
        """Sample a response for each request.

        A response depends on its prompt, its seed and the weights, not on the requests around it,
        up to rounding in the logits.

        Raises:
            EngineError: see :meth:`submit` and ``PendingGeneration.result``.
        """
        ...

    def update_weights(self, version: int) -> None:
        """Serve the policy's present weights from now on.

        Args:
            version: optimizer updates behind them; grows from call to call.

        Raises:
            EngineError: the engine did not take them.
        """
        ...

    def abort(self) -> None:
        """End all calls under way, from any thread; unfinished responses say ``abort``.

        Where none is under way it ends the next one, and is then forgotten.
        """
        ...

    def close(self) -> None:
        """Give back what the engine holds; it is not used after this."""
        ...


def merge_shares(shares: Sequence[Generation], count: int) -> Generation:
    """One generation of ``count`` requests from those of ranks that took every n-th of them."""
    merged = Generation([[]] * count, [[]] * count, [ABORT] * count)
    kept = [name for name in ("states", "masks", "routes") if any(getattr(s, name) for s in shares)]
    for name in kept:
        setattr(merged, name, [torch.empty(0)] * count)
    for first, share in enumerate(shares):
        for name in kept:
            if found := getattr(share, name):
                getattr(merged, name)[first :: len(shares)] = found
        merged.tokens[first :: len(shares)] = share.tokens
        merged.logprobs[first :: len(shares)] = share.logprobs
        merged.finish_reasons[first :: len(shares)] = share.finish_reasons
        merged.drafts.add(share.drafts)
    return merged


def check_finite(generation: Generation) -> None:
    """Refuse log-probs that are not finite: their tokens were drawn from nothing.

    Raises:
        EngineError: the policy's logits are not finite.
    """
    for index, logprobs in enumerate(generation.logprobs):
        # a sum is finite where its terms are, and costs next to nothing
        if math.isfinite(sum(logprobs)):
            continue
        place = next(i for i, value in enumerate(logprobs) if not math.isfinite(value))
        raise EngineError(
            f"request {index}: log-prob of token {place}: wanted a finite log-prob, got "
            f"{logprobs[place]}. The policy's logits are not finite: its weights have diverged. "
            "Lower rl.optimizer.lr, and start from an earlier checkpoint (rl.init_from)"
        )
