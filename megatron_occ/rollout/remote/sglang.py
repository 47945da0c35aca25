"""Dialect of SGLang's own server.

Sources, read in ``sglang/srt`` of the releases named:

- ``/generate`` with ``input_ids``, ``sampling_params`` and ``return_logprob``; the answer has
  ``output_ids`` and ``meta_info`` (``entrypoints/http_server.py``, ``managers/io_struct.py``,
  ``managers/tokenizer_manager.py``, 0.5.23). ``output_token_logprobs`` are triples (log-prob, id,
  text) under softmax(logits / temperature) before top-p and top-k (``layers/sampler.py``), unless
  ``SGLANG_RETURN_ORIGINAL_LOGPROB`` is set.
- ``sampling_seed`` counts only with ``--enable-deterministic-inference``
  (``sampling/sampling_batch_info.py``).
- ``ignore_eos`` switches off stop ids too (``managers/schedule_batch.py``), so it is sent only
  where there are none.
- ``/update_weights_from_disk``: loads the target alone up to 0.5.10, target and drafter from
  0.5.11 on (``managers/scheduler_update_weights_mixin.py``); ``weight_version`` comes back in the
  ``meta_info`` of each answer.
- ``spec_verify_ct`` and counts of accepted drafts in ``meta_info``
  (``_calculate_spec_decoding_metrics``): 0.5.11 and 0.5.23 name them differently.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import Any

from megatron_occ.rollout.engine import (
    ABORT,
    DraftStatistics,
    EngineError,
    Request,
    SamplingSettings,
)
from megatron_occ.rollout.remote.carriers import Weights
from megatron_occ.rollout.remote.checks import Field
from megatron_occ.rollout.remote.http import Client, TransportError
from megatron_occ.rollout.remote.server import (
    SEED_MASK,
    Aborted,
    Answer,
    StaleWeights,
    finished,
    response_limit,
)
from megatron_occ.rollout.remote.settings import RemoteSettings

GENERATE, UPDATE = "/generate", "/update_weights_from_disk"
UPDATES_DRAFTER = (0, 5, 11)
ACCEPTED = ("spec_num_correct_drafts", "spec_accepted_drafts", "spec_accept_token_num")
HISTOGRAM = ("spec_correct_drafts_histogram", "spec_accept_histogram")


class SglangServer:
    """See :class:`megatron_occ.rollout.remote.server.Server`."""

    def __init__(self, client: Client, settings: RemoteSettings) -> None:
        self.client, self._settings = client, settings
        self.speculative_tokens = 0
        self.head: tuple[int, ...] | None = None
        self._version: int | None = None
        self._counts, self._lock = DraftStatistics(), threading.Lock()

    def inspect(self) -> None:
        """See ``Server``.

        Raises:
            EngineError: no answer, a release that would not update the drafter, or seeds ignored.
        """
        path = "/server_info"
        try:
            answer = self.client.get(path)
        except TransportError as error:
            if error.status != 404:
                raise
            path = "/get_server_info"
            answer = self.client.get(path)
        info = self._field(path, answer)
        if info.get("speculative_algorithm") is not None:
            self.speculative_tokens = info["speculative_num_draft_tokens"].integer(2) - 1
            self._check_release(info["version"].text())
        seeded = info.get("enable_deterministic_inference")
        if self._settings.require_seeds and (seeded is None or seeded.value is not True):
            raise EngineError(
                f"{self.client.url}: ignores seeds: start SGLang with "
                "--enable-deterministic-inference, or set require_seeds to false and give up "
                "repeatable rollouts"
            )

    def check_sampling(self, sampling: SamplingSettings) -> None:
        """See ``Server``: its log-probs are those of the policy under all settings."""

    def healthy(self) -> bool:
        """See ``Server``: ``/health`` has an empty answer with status 200."""
        return self.client.answers("/health", 30.0)

    def sample(
        self,
        request: Request,
        sampling: SamplingSettings,
        stop: threading.Event | None = None,
        top: bool = False,
    ) -> Answer:
        """See ``Server``."""
        params = {
            "max_new_tokens": response_limit(request, sampling),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": -1 if sampling.top_k is None else sampling.top_k,
            "sampling_seed": request.seed & SEED_MASK,
            "stop_token_ids": list(sampling.stop_ids),
            "stop": list(sampling.stop_strings),
            "ignore_eos": not sampling.stop_ids,
        }
        body = {"logprob_start_len": -1, "top_logprobs_num": 1 if top else 0}
        answer = self._generate(request.prompt, params, body, stop)
        meta = answer["meta_info"]
        tokens = answer["output_ids"].tokens(self._settings.vocab_size)
        reason = finished(meta["finish_reason"]["type"], tokens, request, sampling)
        if not tokens:
            raise Aborted(answer.url, Answer([], [], ABORT))
        logprobs = _logprobs(meta["output_token_logprobs"], tokens)
        if reason == ABORT:
            raise Aborted(answer.url, Answer(tokens, logprobs, ABORT))
        tops = _tops(meta, logprobs) if top else []
        self._count(meta)
        return Answer(tokens, logprobs, reason, tops)

    def score(self, tokens: Sequence[int]) -> list[float]:
        """See ``Server``: the log-prob of the first entry is null."""
        params = {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True}
        answer = self._generate(tokens, params, {"logprob_start_len": 0})
        return _logprobs(answer["meta_info"]["input_token_logprobs"], tokens, first=1)

    def load_weights(self, weights: Weights, version: int) -> None:
        """See ``Server``; running requests are aborted."""
        body = {
            "model_path": str(weights),
            "abort_all_requests": True,
            "flush_cache": True,
            "weight_version": str(version),
        }
        answer = self.client.post(UPDATE, body, self._settings.update_timeout)
        success = self._field(UPDATE, answer)["success"]
        if success.value is not True:
            raise EngineError(f"{self.client.url}{UPDATE}: failed: {str(answer)[:300]}")
        self.client.raw("POST", "/flush_cache", timeout=self._settings.update_timeout)
        self._version = version

    def holds(self, weights: Weights) -> bool | None:
        """See ``Server``: its answers to requests name a version."""
        return None

    def drafts(self) -> DraftStatistics:
        """See ``Server``: counted from the answers."""
        total = DraftStatistics()
        with self._lock:
            total.add(self._counts)
        return total

    def interrupt(self) -> None:
        """See ``Server``."""
        body = {"rid": "", "abort_all": True}
        self.client.raw("POST", "/abort_request", body, min(10.0, self._settings.timeout))

    def abort(self, stop: threading.Event) -> None:
        """See ``Server``: SGLang ends a request whose connection is closed."""
        self.client.cancel(stop)

    def _check_release(self, version: str) -> None:
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
        if numbers < UPDATES_DRAFTER:
            raise EngineError(
                f"{self.client.url}: SGLang {version} updates no drafter: take 0.5.11 or later, or "
                "start it without --speculative-algorithm"
            )

    def _generate(
        self,
        prompt: Sequence[int],
        params: dict[str, Any],
        body: dict[str, Any],
        stop: threading.Event | None = None,
    ) -> Field:
        fixed = {"skip_special_tokens": False, "no_stop_trim": True}
        content = {
            "input_ids": list(prompt),
            "sampling_params": {**fixed, **params},
            "return_logprob": True,
            "stream": False,
            **body,
        }
        answer = self._field(GENERATE, self.client.post(GENERATE, content, stop=stop))
        version = answer["meta_info"].get("weight_version")
        known = version is not None and self._version is not None
        if known and version.value != str(self._version):
            raise StaleWeights(
                f"{answer.url}: field {version.path}: answered with weights {version.value!r}, "
                f"loaded were {self._version}: was the server restarted?",
                retry=True,
            )
        return answer

    def _count(self, meta: Field) -> None:
        if not self.speculative_tokens or meta.get("spec_verify_ct") is None:
            return
        passes = meta["spec_verify_ct"].integer()
        accepted = _accepted(meta, passes, self.speculative_tokens)
        proposed = [passes] * len(accepted)
        with self._lock:
            self._counts.add(DraftStatistics(proposed, accepted, passes, passes + sum(accepted)))

    def _field(self, path: str, answer: Any) -> Field:
        return Field(answer, self.client.url + path)


def _logprobs(listed: Field, tokens: Sequence[int], first: int = 0) -> list[float]:
    """Log-probs of triples (log-prob, id, text), whose ids must be the tokens."""
    listed.of_length(len(tokens))
    values = []
    for index in range(first, len(tokens)):
        listed[index][1].integer(tokens[index], tokens[index])
        values.append(listed[index][0].logprob())
    return values


def _tops(meta: Field, logprobs: list[float]) -> list[float]:
    listed = meta["output_top_logprobs"].of_length(len(logprobs))
    return [max(own, listed[index][0][0].logprob()) for index, own in enumerate(logprobs)]


def _accepted(meta: Field, passes: int, depth: int) -> list[int]:
    """Accepted drafts by position, from the histogram: entry n counts passes that accepted n."""
    histogram = next((found for name in HISTOGRAM if (found := meta.get(name))), None)
    if histogram is not None:
        counts = [histogram[i].integer() for i in range(len(histogram.items()))]
        return [sum(counts[position + 1 :]) for position in range(depth)]
    total = next((found for name in ACCEPTED if (found := meta.get(name))), None)
    if total is None or depth > 1:
        raise meta.wrong(f"one of {', '.join(HISTOGRAM)}")
    return [total.integer(0, passes)]
