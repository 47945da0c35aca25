"""What the engine asks of a server, whatever its dialect."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron_occ.rollout.engine import (
    ABORT,
    LENGTH,
    STOP,
    DraftStatistics,
    EngineError,
    Request,
    SamplingSettings,
)
from megatron_occ.rollout.remote.carriers import Weights
from megatron_occ.rollout.remote.checks import Field
from megatron_occ.rollout.remote.http import Client, TransportError

# torch and both servers take signed 64-bit seeds; a run's seeds are 64 bits of a hash
SEED_MASK = 2**63 - 1


class StaleWeights(TransportError):
    """The server says itself that it serves other weights than those loaded last."""


@dataclass(frozen=True)
class Answer:
    """One response.

    Args:
        tokens: ids, stop token included.
        logprobs: of each token, see ``Generation``.
        finish_reason: ``stop`` or ``length``; ``abort`` in :class:`Aborted`.
        top_logprobs: log-prob of the likeliest token at each position, where asked for.
        versions: of each token's weights; of a whole response.
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    top_logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


class Aborted(TransportError):
    """The server ended the request, as it was told to or by itself.

    Args:
        url: of the request.
        answer: tokens that there are, none perhaps.
    """

    def __init__(self, url: str, answer: Answer) -> None:
        super().__init__(f"{url}: the server aborted the request", retry=True)
        self.answer = answer


class Server(Protocol):
    """A server under one URL; methods raise ``EngineError`` and may be called from any thread.

    Args:
        client: transport.
        speculative_tokens: drafted tokens of a pass, 0 without speculative decoding; known after
            :meth:`inspect`.
        head: what the server says of the bits of its drafter's weights since :meth:`load_weights`,
            by worker; None where it says nothing.
    """

    client: Client
    speculative_tokens: int
    head: tuple[int, ...] | None

    def inspect(self) -> None:
        """Read the server's configuration and refuse one that can't do the work."""
        ...

    def check_sampling(self, sampling: SamplingSettings) -> None:
        """Refuse settings under which the server's log-probs would not be the policy's."""
        ...

    def healthy(self) -> bool:
        """Whether the server answers now."""
        ...

    def sample(
        self,
        request: Request,
        sampling: SamplingSettings,
        stop: threading.Event | None = None,
        top: bool = False,
    ) -> Answer:
        """Sample one response, with ``top_logprobs`` if ``top``; ``stop`` as in ``Client.post``.

        Raises:
            Aborted: the request was ended before the response.
        """
        ...

    def score(self, tokens: Sequence[int]) -> list[float]:
        """Log-probs under softmax(logits) of all tokens but the first, n - 1 for n tokens."""
        ...

    def load_weights(self, weights: Weights, version: int) -> None:
        """Load trunk and head and drop the caches of older ones."""
        ...

    def holds(self, weights: Weights) -> bool | None:
        """Whether it has loaded these as the last thing, to their end; None: it can't tell."""
        ...

    def drafts(self) -> DraftStatistics:
        """Counts since the server was started or first asked; only differences mean something."""
        ...

    def interrupt(self) -> None:
        """End all requests, in seconds; they are answered with the tokens that there are."""
        ...

    def abort(self, stop: threading.Event) -> None:
        """End the requests that were sent with this ``stop``."""
        ...


def response_limit(request: Request, sampling: SamplingSettings) -> int:
    """Tokens that the response may have."""
    limit = sampling.max_response_length
    return limit if request.max_response_length is None else min(limit, request.max_response_length)


def finished(reason: Field, tokens: list[int], request: Request, sampling: SamplingSettings) -> str:
    """Finish reason of a response, checked against its tokens.

    Raises:
        TransportError: reason and tokens contradict each other.
        EngineError: the server ends responses by rules of its own.
    """
    limit, said, where = response_limit(request, sampling), reason.text(), reason.url
    if said == ABORT and not tokens:
        return ABORT
    if said not in (STOP, LENGTH, ABORT):
        raise reason.wrong("stop or length")
    if not 0 < len(tokens) <= limit:
        raise TransportError(f"{where}: {len(tokens)} tokens, asked for 1 to {limit}", retry=True)
    if any(token in sampling.stop_ids for token in tokens[:-1]):
        raise TransportError(f"{where}: tokens follow a stop token in {tokens}", retry=True)
    if tokens[-1] in sampling.stop_ids:
        return STOP
    if said == ABORT:
        return LENGTH if len(tokens) == limit else ABORT
    if said == LENGTH and len(tokens) < limit:
        raise EngineError(
            f"{where}: cut at {len(tokens)} of {limit} tokens: raise the context length that the "
            "server was started with"
        )
    if said == STOP and not sampling.stop_strings:
        raise EngineError(
            f"{where}: ended after {len(tokens)} of {limit} tokens with token {tokens[-1]}, which "
            f"is none of the stop ids {sampling.stop_ids}. If this is the server's own end-of-text "
            "token, name it in rl.rollout.stop_ids; if it differs from response to response, "
            "something on the way cuts answers short"
        )
    return said
