"""Does a server serve the weights that the trainer has, in trunk and head, and sample from them?

Three checks, each for a failure that no error message announces:

- Log-probs of fixed sequences, scored by the server, against the trainer's. An absolute tolerance
  must leave room for the rounding of two implementations, and one update can move log-probs by
  less than that. So the movement since the version before is compared too: what the server's
  log-probs did must be what the trainer's did.
- Accepted drafts on greedy prompts. A drafter with old weights costs speed and no error. One that
  is a single update old drafts as well as before: where the server tells a fingerprint of the
  drafter's bits, they must have changed if the trainer's head did. Not the reverse: the export of
  a head may depend on the trunk.
- Sampled tokens: how often the likeliest token is drawn, against its probability. Indicators
  minus probabilities are a martingale difference, so their sum over the root of the summed
  p (1 - p) is close to standard normal where the server samples from its own log-probs. With it:
  whether the same seed gives the same response.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_occ.rollout.engine import DraftStatistics, EngineError, Request, SamplingSettings
from megatron_occ.rollout.remote.server import Answer, Server
from megatron_occ.rollout.remote.settings import RemoteSettings
from megatron_occ.rollout.remote.workers import results_of

LogProbs = Sequence[Sequence[float]]
# below this the trainer's log-probs count as not moved, in nats: the rounding of bf16 weights
# can swallow an update
STILL = 1e-3
# samples and tokens of each in the check of sampling
SAMPLES, SAMPLE_LENGTH = 64, 8
# of these so many are asked for a second time
REPEATS = 8
# requests under way at once
THREADS = 8


@dataclass(frozen=True)
class Probe:
    """Material of the checks.

    Args:
        sequences: token sequences to score, at least two tokens each; a few hundred tokens in all.
        reference: log-probs of the sequences' tokens but the first under the trainer's present
            weights: softmax(logits), no temperature. Called once for each update.
        draft_prompts: prompts for greedy responses and for the check of sampling; empty: neither
            is checked.
        draft_tokens: length of the greedy responses.
        expected_acceptance: accepted share of drafted tokens to expect on ``draft_prompts``; None:
            the best that the run has seen.
        head: a fingerprint of the trainer's head. Called once for each update.
    """

    sequences: Sequence[Sequence[int]]
    reference: Callable[[Sequence[Sequence[int]]], LogProbs]
    draft_prompts: Sequence[Sequence[int]] = ()
    draft_tokens: int = 32
    expected_acceptance: Callable[[], float] | None = None
    head: Callable[[], object] | None = None


@dataclass(frozen=True)
class ProbeReport:
    """What a probe measured on one server.

    Args:
        gap_mean, gap_max: absolute differences of log-probs to the trainer's, in nats.
        followed: regression of the server's movement on the trainer's, 1 where they agree; None
            without a version before, or where the trainer's log-probs stood still.
        acceptance: accepted share of drafted tokens, None if not measured.
        sampling_z: see the module; None if not measured.
    """

    gap_mean: float
    gap_max: float
    followed: float | None = None
    acceptance: float | None = None
    sampling_z: float | None = None


class Prober:
    """Runs a probe and remembers what it saw at the version before.

    Raises:
        EngineError: from all methods, with the figures, where a check fails.
    """

    def __init__(self, probe: Probe, settings: RemoteSettings) -> None:
        if not probe.sequences or any(len(tokens) < 2 for tokens in probe.sequences):
            raise EngineError("a probe needs sequences of at least two tokens")
        self._probe, self._settings = probe, settings
        self._wanted: list[float] = []
        self._before: list[float] = []
        self._scores: dict[str, list[float]] = {}
        self._scores_before: dict[str, list[float]] = {}
        self._best_acceptance = 0.0
        self._head: object = None
        # by URL, at its last update: the trainer's head, and the server's
        self._heads: dict[str, tuple[object, tuple[int, ...]]] = {}
        self._sampled: set[str] = set()

    def begin(self) -> None:
        """The trainer's weights are new: ask it for its log-probs."""
        self._head = self._probe.head() if self._probe.head is not None else None
        self._before, self._scores_before = self._wanted, self._scores
        self._scores = {}
        listed = self._probe.reference(self._probe.sequences)
        wanted = [[float(value) for value in row] for row in listed]
        lengths = [len(tokens) - 1 for tokens in self._probe.sequences]
        if [len(row) for row in wanted] != lengths:
            raise EngineError(
                f"the probe's reference has {[len(row) for row in wanted]} log-probs, wanted one "
                f"for each token but the first: {lengths}"
            )
        self._wanted = [value for row in wanted for value in row]
        if not all(math.isfinite(value) for value in self._wanted):
            raise EngineError("the probe's reference log-probs are not finite")

    def check(self, server: Server) -> ProbeReport:
        """All checks on one server."""
        mean, largest, followed = self.check_logprobs(server)
        self.check_head(server)
        acceptance = sampling_z = None
        if self._probe.draft_prompts:
            if server.speculative_tokens and self._settings.draft_share:
                acceptance = self._check_drafts(server)
            if self._settings.sampling_z and server.client.url not in self._sampled:
                sampling_z = self._check_sampling(server)
                self._sampled.add(server.client.url)
        return ProbeReport(mean, largest, followed, acceptance, sampling_z)

    def check_logprobs(self, server: Server) -> tuple[float, float, float | None]:
        """Mean gap, largest gap and how much of the trainer's movement the server followed."""
        url = server.client.url
        scores = [value for tokens in self._probe.sequences for value in server.score(tokens)]
        gaps = [abs(mine - theirs) for mine, theirs in zip(self._wanted, scores, strict=True)]
        mean, largest = sum(gaps) / len(gaps), max(gaps)
        if not (mean <= self._settings.gap_mean and largest <= self._settings.gap_max):
            raise EngineError(
                f"{url} serves old or partial weights: log-probs of {len(gaps)} probe tokens "
                f"differ from the trainer's by {mean:.4g} on average and {largest:.4g} at most, "
                f"tolerated are {self._settings.gap_mean:g} and {self._settings.gap_max:g}"
            )
        followed = self._check_movement(url, scores)
        self._scores[url] = scores
        return mean, largest, followed

    def check_head(self, server: Server) -> None:
        """After new weights were loaded: does the drafter hold others than before?"""
        if self._probe.head is None or server.head is None:
            return
        url = server.client.url
        wanted, held = self._heads.get(url, (None, None))
        if held == server.head and wanted != self._head:
            raise EngineError(
                f"{url} drafts with old weights of the head: the trainer's head has changed since "
                "the last update, and the server's has not"
            )
        self._heads[url] = (self._head, server.head)

    def _check_movement(self, url: str, scores: list[float]) -> float | None:
        earlier = self._scores_before.get(url)
        if not earlier or not self._before:
            return None
        wanted = [new - old for new, old in zip(self._wanted, self._before, strict=True)]
        moved = [new - old for new, old in zip(scores, earlier, strict=True)]
        if max(map(abs, wanted)) < STILL:
            return None
        if not any(moved):
            raise EngineError(
                f"{url} serves old weights: the trainer's log-probs moved by up to "
                f"{max(map(abs, wanted)):.4g} since the last version, the server's not at all"
            )
        followed = _dot(moved, wanted) / _dot(wanted, wanted)
        noise = [theirs - mine for theirs, mine in zip(earlier, self._before, strict=True)]
        # where rounding is larger than the movement, the regression says little
        if followed < 0.5 and _dot(wanted, wanted) >= _dot(noise, noise):
            raise EngineError(
                f"{url} serves old or partial weights: its log-probs followed {followed:.2f} of "
                f"the trainer's movement since the last version (root mean square "
                f"{math.sqrt(_dot(wanted, wanted) / len(wanted)):.4g}), wanted is 1"
            )
        return followed

    def _check_drafts(self, server: Server) -> float:
        greedy = SamplingSettings(0.0, max_response_length=self._probe.draft_tokens)
        before = server.drafts()
        for prompt in self._probe.draft_prompts:
            server.sample(Request(prompt, seed=0), greedy)
        counts = difference(server.drafts(), before)
        proposed, accepted = sum(counts.proposed), sum(counts.accepted)
        if not proposed:
            raise EngineError(
                f"{server.client.url} is started with speculative decoding and drafted nothing on "
                f"{len(self._probe.draft_prompts)} probe prompts"
            )
        share, source = accepted / proposed, "the best of this run"
        wanted = self._best_acceptance
        if self._probe.expected_acceptance is not None:
            wanted, source = float(self._probe.expected_acceptance()), "the trainer's"
        if not accepted or share < self._settings.draft_share * wanted:
            raise EngineError(
                f"{server.client.url} drafts with old weights of the head: {accepted} of "
                f"{proposed} drafted tokens accepted on the probe prompts, a share of {share:.3f}; "
                f"{source} is {wanted:.3f}; set draft_share to 0 if the head is not trained"
            )
        self._best_acceptance = max(self._best_acceptance, share)
        return share

    def _check_sampling(self, server: Server) -> float:
        settings = SamplingSettings(1.0, max_response_length=SAMPLE_LENGTH)
        prompts = self._probe.draft_prompts
        requests = [Request(prompts[i % len(prompts)], seed=i + 1) for i in range(SAMPLES)]
        ask = partial(server.sample, sampling=settings, top=True)
        answers = results_of(ask, requests, min(THREADS, self._settings.concurrency))
        self._compare_scores(server, requests[0], answers[0])
        z = likeliest_z(answers)
        if abs(z) > self._settings.sampling_z:
            raise EngineError(
                f"{server.client.url} does not sample from its own log-probs: the likeliest token "
                f"is drawn {'less' if z < 0 else 'more'} often than its probability says, by "
                f"{abs(z):.1f} standard deviations over {SAMPLES} responses; a server without "
                "speculative decoding tells whether that is the cause"
            )
        if self._settings.require_seeds:
            self._check_seeds(server, requests, answers, settings)
        return z

    def _check_seeds(
        self,
        server: Server,
        requests: Sequence[Request],
        answers: Sequence[Answer],
        settings: SamplingSettings,
    ) -> None:
        """Most of some requests, sent again by themselves, must be answered as before.

        Not all: in another batch a rounding error may turn a draw that was close.
        """
        pairs = list(zip(requests, answers, strict=True))[:REPEATS]
        same = sum(server.sample(one, settings).tokens == old.tokens for one, old in pairs)
        if same < REPEATS / 2:
            raise EngineError(
                f"{server.client.url} ignores seeds: {same} of {REPEATS} responses of "
                f"{SAMPLE_LENGTH} tokens were the same the second time; set require_seeds to false "
                "to give up repeatable rollouts"
            )

    def _compare_scores(self, server: Server, request: Request, answer: Answer) -> None:
        """Log-probs that came with sampled tokens must be those of scoring the same tokens."""
        scores = server.score([*request.prompt, *answer.tokens])[len(request.prompt) - 1 :]
        gaps = [abs(mine - theirs) for mine, theirs in zip(scores, answer.logprobs, strict=True)]
        if max(gaps) > self._settings.gap_max:
            raise EngineError(
                f"{server.client.url}: log-probs of sampled tokens differ by {max(gaps):.4g} from "
                "those of scoring the same tokens: look at the server's log-prob settings"
            )


def difference(after: DraftStatistics, before: DraftStatistics) -> DraftStatistics:
    """Counts in between; ``after`` itself where a restart set the counters to zero."""
    if after.passes < before.passes:
        return after
    result = DraftStatistics()
    result.add(after)
    minus = DraftStatistics([-n for n in before.proposed], [-n for n in before.accepted])
    minus.passes, minus.tokens = -before.passes, -before.tokens
    result.add(minus)
    return result


def likeliest_z(answers: Sequence[Answer]) -> float:
    """Standardised surplus of draws of the likeliest token, see the module."""
    surplus = variance = 0.0
    for answer in answers:
        for own, top in zip(answer.logprobs, answer.top_logprobs, strict=True):
            probability = min(math.exp(top), 1.0)
            surplus += (own >= top) - probability
            variance += probability * (1 - probability)
    return surplus / math.sqrt(variance) if variance > 1e-9 else 0.0


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
