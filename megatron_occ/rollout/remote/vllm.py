"""Dialect of vLLM's OpenAI-compatible server.

Sources, read in the source code of the releases named:

- ``/v1/completions`` with ``prompt`` as token ids, ``return_token_ids`` (0.10.2 and later),
  ``logprobs``, ``prompt_logprobs``, ``seed`` (signed 64 bits), ``stop_token_ids``, ``ignore_eos``:
  ``vllm/entrypoints/openai`` (0.27.1, 0.30.0).
- Development endpoints, only with ``VLLM_SERVER_DEV_MODE=1``: ``/server_info?config_format=json``
  (0.11.0), ``/pause`` and ``/resume`` (0.12.0), ``/collective_rpc`` (0.10.2),
  ``/reset_prefix_cache``.
- ``reload_weights(weights_path=...)`` of the worker takes another folder from 0.16.0 on. It loads
  the target model and no drafter in any release up to 0.32.0 (``vllm/v1/worker``): with
  speculative decoding the server needs the worker extension of
  :mod:`megatron_occ.rollout.remote.vllm_worker`.
- Log-probs: ``--logprobs-mode raw_logprobs`` (the default) is softmax(logits) whatever the
  temperature; ``processed_logprobs`` is what the token was drawn from, after temperature and cuts.
- Counters ``vllm:spec_decode_*`` in ``/metrics`` are those of the whole server.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_occ.rollout.engine import (
    ABORT,
    DraftStatistics,
    EngineError,
    Request,
    SamplingSettings,
)
from megatron_occ.rollout.remote.carriers import Shipment, Weights
from megatron_occ.rollout.remote.checks import Field
from megatron_occ.rollout.remote.http import Client, TransportError
from megatron_occ.rollout.remote.patience import patiently
from megatron_occ.rollout.remote.server import SEED_MASK, Aborted, Answer, finished, response_limit
from megatron_occ.rollout.remote.settings import RemoteSettings
from megatron_occ.rollout.remote.vllm_shipment import deliver, holds

COMPLETIONS = "/v1/completions"
RPC = "/collective_rpc"
EXTENSION = "megatron_occ.rollout.remote.vllm_worker.ReloadExtension"
# vllm/sampling_params.py raises smaller positive temperatures to this value
SMALLEST_TEMPERATURE = 0.01
# seconds of calls that a server answers at once
SHORT = 10.0
SAMPLE = re.compile(
    r"^vllm:spec_decode_num_(drafts|draft_tokens|accepted_tokens|accepted_tokens_per_pos)_total"
    r"\{([^}]*)\} ([0-9.eE+]+)$",
    re.MULTILINE,
)
POSITION = re.compile(r'position="(\d{1,2})"')


class VllmServer:
    """See :class:`megatron_occ.rollout.remote.server.Server`."""

    def __init__(self, client: Client, settings: RemoteSettings) -> None:
        self.client, self._settings = client, settings
        self.speculative_tokens = 0
        self.head: tuple[int, ...] | None = None
        self._model = ""
        self._logprobs_mode = ""
        self._extended = False

    def inspect(self) -> None:
        """See ``Server``.

        Raises:
            EngineError: no answer, no development mode, or a drafter that could not be updated.
        """
        models = self._field("/v1/models", self.client.get("/v1/models"))
        self._model = models["data"][0]["id"].text()
        path = "/server_info?config_format=json"
        try:
            answer = self.client.get(path)
        except TransportError as error:
            if error.status == 404:
                raise EngineError(
                    f"{error}: start vLLM (0.16.0 or later) with VLLM_SERVER_DEV_MODE=1"
                ) from None
            raise
        config = self._field(path, answer)["vllm_config"]
        self._logprobs_mode = config["model_config"]["logprobs_mode"].text()
        drafting = config.get("speculative_config")
        self.speculative_tokens = drafting["num_speculative_tokens"].integer() if drafting else 0
        extension = config["parallel_config"].get("worker_extension_cls")
        self._extended = extension is not None and extension.text() == EXTENSION
        if self.speculative_tokens and not self._extended:
            raise EngineError(
                f"{self.client.url}: vLLM reloads no drafter by itself: start it with "
                f"--worker-extension-cls {EXTENSION}"
            )
        wants_extension = self._settings.transfer != "folder"
        if wants_extension and (extension is None or extension.text() != EXTENSION):
            raise EngineError(
                f"{self.client.url}: rl.rollout.server.transfer={self._settings.transfer} needs "
                f"the worker extension: start vLLM with --worker-extension-cls {EXTENSION}, or use "
                "transfer=folder"
            )

    def check_sampling(self, sampling: SamplingSettings) -> None:
        """See ``Server``.

        Raises:
            EngineError: with the log-prob mode that the server must be started with.
        """
        temperature, mode = sampling.temperature, self._logprobs_mode
        cut = sampling.top_p < 1 or sampling.top_k is not None
        if 0 < temperature < SMALLEST_TEMPERATURE:
            raise EngineError(f"temperature {temperature}: vLLM takes 0 or {SMALLEST_TEMPERATURE}")
        if mode not in ("raw_logprobs", "processed_logprobs"):
            raise EngineError(f"{self.client.url}: logprobs mode {mode!r} gives no log-probs")
        if mode == "raw_logprobs" and temperature not in (0, 1):
            raise EngineError(
                f"{self.client.url}: temperature {temperature} needs log-probs after temperature: "
                "start vLLM with --logprobs-mode processed_logprobs, or sample at temperature 1"
            )
        if mode == "processed_logprobs" and cut:
            raise EngineError(
                f"{self.client.url}: processed log-probs are those after top_p and top_k: set them "
                "to 1 and null, or start vLLM with --logprobs-mode raw_logprobs and sample at "
                "temperature 1"
            )

    def healthy(self) -> bool:
        """See ``Server``: ``/health`` has an empty answer with status 200."""
        return self.client.answers("/health", 10.0)

    def sample(
        self,
        request: Request,
        sampling: SamplingSettings,
        stop: threading.Event | None = None,
        top: bool = False,
    ) -> Answer:
        """See ``Server``."""
        body = {
            "prompt": list(request.prompt),
            "max_tokens": response_limit(request, sampling),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": -1 if sampling.top_k is None else sampling.top_k,
            "seed": request.seed & SEED_MASK,
            "logprobs": 1 if top else 0,
            "stop_token_ids": list(sampling.stop_ids),
            "stop": list(sampling.stop_strings),
        }
        choice = self._complete(body, stop)
        tokens = choice["token_ids"].tokens(self._settings.vocab_size)
        reason = finished(choice["finish_reason"], tokens, request, sampling)
        if not tokens:
            raise Aborted(choice.url, Answer([], [], ABORT))
        listed = choice["logprobs"]["token_logprobs"].of_length(len(tokens))
        logprobs = [listed[i].logprob() for i in range(len(tokens))]
        if reason == ABORT:
            raise Aborted(choice.url, Answer(tokens, logprobs, ABORT))
        return Answer(tokens, logprobs, reason, self._tops(choice, logprobs) if top else [])

    def score(self, tokens: Sequence[int]) -> list[float]:
        """See ``Server``: the first entry of ``prompt_logprobs`` is null."""
        body = {"prompt": list(tokens), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        listed = self._complete(body)["prompt_logprobs"].of_length(len(tokens))
        return [listed[i][str(tokens[i])]["logprob"].logprob() for i in range(1, len(tokens))]

    def load_weights(self, weights: Weights, version: int) -> None:
        """See ``Server``; the server is paused meanwhile, which aborts its requests."""
        self._post("/pause?mode=abort")
        try:
            if isinstance(weights, Shipment):
                drafting = bool(self.speculative_tokens)
                head = deliver(self._ask, self.client.url, weights, drafting=drafting)
                self.head = head if drafting else None
            else:
                self._reload(weights)
            reset = self._post("/reset_prefix_cache")
            if b'"success":false' in reset.replace(b" ", b""):
                raise EngineError(f"{self.client.url}/reset_prefix_cache: refused: {reset!r}")
        except BaseException:
            # the cause is what is told
            with contextlib.suppress(TransportError):
                self._post("/resume")
            raise
        self._post("/resume")

    def holds(self, weights: Weights) -> bool | None:
        """See ``Server``: the extension knows what it has loaded."""
        return holds(self._ask, weights) if self._extended else None

    def drafts(self) -> DraftStatistics:
        """See ``Server``: Prometheus counters, added over the engines of the server."""
        if not self.speculative_tokens:
            return DraftStatistics()
        text = self.client.raw("GET", "/metrics").decode("utf-8", "replace")
        totals = dict.fromkeys(("drafts", "draft_tokens", "accepted_tokens"), 0)
        accepted = [0] * self.speculative_tokens
        seen = set()
        for name, labels, value in SAMPLE.findall(text):
            seen.add(name)
            if name != "accepted_tokens_per_pos":
                totals[name] += int(float(value))
            elif (at := POSITION.search(labels)) and int(at[1]) < len(accepted):
                accepted[int(at[1])] += int(float(value))
        if not seen.issuperset(totals):
            raise TransportError(
                f"{self.client.url}/metrics: no counters vllm:spec_decode_num_*: is the server "
                "started with --disable-log-stats?",
                retry=False,
            )
        return _statistics(totals, accepted)

    def interrupt(self) -> None:
        """See ``Server``: a pause ends the requests that are under way."""
        try:
            self._post("/pause?mode=abort&clear_cache=false", SHORT)
        except BaseException:
            # it may have been paused all the same
            with contextlib.suppress(TransportError):
                self._post("/resume", SHORT)
            raise
        patiently(lambda: self._post("/resume", SHORT), self._settings)

    def abort(self, stop: threading.Event) -> None:
        """See ``Server``: vLLM ends a request whose connection is closed."""
        self.client.cancel(stop)

    def _reload(self, folder: Path) -> None:
        method = "reload_trunk" if self._extended else "reload_weights"
        if self.speculative_tokens:
            method = "reload_trunk_and_head"
        body = {"method": method, "kwargs": {"weights_path": str(folder)}}
        try:
            found = self.client.post(RPC, body, self._settings.update_timeout)
        except TransportError as error:
            if error.status is None:
                raise
            raise TransportError(
                f"{error}: can the server read {folder} (rl.rollout.server.weights_dir)? Its log "
                "says more",
                error.retry,
                error.status,
            ) from None
        workers = self._workers(found)
        if self.speculative_tokens:
            for worker in workers:
                worker["drafter"].integer(1)
            self.head = tuple(worker["held"].integer() for worker in workers)

    def _ask(self, body: dict[str, Any]) -> list[Field]:
        """What each worker answers to a call of the extension."""
        return self._workers(self.client.post(RPC, body, self._settings.update_timeout))

    def _workers(self, found: Any) -> list[Field]:
        results = self._field(RPC, found)["results"]
        if not results.items():
            raise results.wrong("an entry for each worker")
        return [results[worker] for worker in range(len(results.value))]

    def _complete(self, body: dict[str, Any], stop: threading.Event | None = None) -> Field:
        """The only choice of a completion, and defaults of a model's generation_config undone."""
        fixed = {
            "model": self._model,
            "n": 1,
            "stream": False,
            "return_token_ids": True,
            "ignore_eos": True,
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        answer = self.client.post(COMPLETIONS, {**fixed, **body}, stop=stop)
        return self._field(COMPLETIONS, answer)["choices"].of_length(1)[0]

    def _tops(self, choice: Field, logprobs: list[float]) -> list[float]:
        listed = choice["logprobs"]["top_logprobs"].of_length(len(logprobs))
        tops = []
        for index, own in enumerate(logprobs):
            entries = listed[index]
            if not isinstance(entries.value, dict):
                raise entries.wrong("an object")
            tops.append(max([own, *(entries[text].logprob() for text in entries.value)]))
        return tops

    def _post(self, path: str, seconds: float | None = None) -> bytes:
        limit = self._settings.update_timeout
        return self.client.raw("POST", path, timeout=limit if seconds is None else seconds)

    def _field(self, path: str, answer: Any) -> Field:
        return Field(answer, self.client.url + path)


def _statistics(totals: dict[str, int], accepted: list[int]) -> DraftStatistics:
    """vLLM counts drafts, not what was proposed at each position: shorter ones lack the last."""
    proposed, left = [], totals["draft_tokens"]
    for _ in accepted:
        proposed.append(min(totals["drafts"], left))
        left -= proposed[-1]
    committed = totals["drafts"] + totals["accepted_tokens"]
    return DraftStatistics(proposed, accepted, passes=totals["drafts"], tokens=committed)
