"""A response in parts: what weights changed in the middle of goes on under the new ones.

The tokens of the earlier parts become prompt, so the server computes its cache for them anew, and
each token keeps the log-prob of the weights that it was drawn under. Source: partial rollouts of
Kimi k1.5 (arXiv 2501.12599, section 2.6.2) and interruptible generation of AReaL (arXiv
2505.24298).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from megatron_occ.rollout.engine import STOP, Request, SamplingSettings
from megatron_occ.rollout.remote.server import SEED_MASK, Answer, response_limit
from megatron_occ.rollout.text import StopText

if TYPE_CHECKING:
    from megatron_occ.rollout.remote.fleet import Member

# who answered: a server between two looks at its weights
Source = tuple["Member", int]


@dataclass(frozen=True)
class Part:
    """Tokens of a response that were drawn under one version of the weights.

    Args:
        answer: of the server.
        version: of the weights.
        source: who answered.
    """

    answer: Answer
    version: int
    source: Source

    @property
    def is_stale(self) -> bool:
        """Whether the server turned out to have had other weights."""
        member, epoch = self.source
        return epoch in member.stale

    @property
    def is_unseen(self) -> bool:
        """Whether the server has not been looked at since."""
        member, epoch = self.source
        return epoch == member.epoch


def fresh(parts: Sequence[Part]) -> list[Part]:
    """The parts before the first stale one: what comes after it depends on it."""
    return list(parts[: next((i for i, part in enumerate(parts) if part.is_stale), len(parts))])


def rest_of(request: Request, parts: Sequence[Part], sampling: SamplingSettings) -> Request:
    """What is left to ask for behind the parts, with random numbers of its own."""
    done = [token for part in parts for token in part.answer.tokens]
    if not done:
        return request
    digest = hashlib.blake2b(f"{request.seed} {len(done)}".encode(), digest_size=8).digest()
    return replace(
        request,
        prompt=[*request.prompt, *done],
        seed=int.from_bytes(digest, "big") & SEED_MASK,
        max_response_length=response_limit(request, sampling) - len(done),
    )


def joined(parts: Sequence[Part], stop: StopText | None) -> Answer:
    """The response of the parts, cut where a stop string is complete that they share.

    A server sees its own part alone, and does not end at a string that began before it.

    Args:
        parts: the last one is the end of the response.
        stop: finds the run's stop strings.
    """
    tokens = [token for part in parts for token in part.answer.tokens]
    logprobs = [value for part in parts for value in part.answer.logprobs]
    versions = [part.version for part in parts for _ in part.answer.tokens]
    reason = parts[-1].answer.finish_reason
    if stop is not None and len(parts) > 1:
        for count in _over_edges(parts, stop.window):
            if stop.ends(tokens[max(0, count - stop.window) : count]):
                tokens, logprobs, versions = tokens[:count], logprobs[:count], versions[:count]
                reason = STOP
                break
    return Answer(tokens, logprobs, reason, versions=versions)


def _over_edges(parts: Sequence[Part], window: int) -> list[int]:
    """Counts of tokens whose last ones, ``window`` of them, are of several parts; in order.

    The whole response is not among them.
    """
    sizes = [len(part.answer.tokens) for part in parts]
    total = sum(sizes)
    edges = accumulate(sizes[:-1])
    counts = {n for edge in edges for n in range(edge + 1, min(edge + window, total))}
    return sorted(counts)
