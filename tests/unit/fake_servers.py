"""HTTP servers that talk like vLLM and SGLang, around a model of sixteen tokens.

The model: the next token depends on the last one and on the seed of the trunk; the head drafts the
likeliest token of the table that its own seed gives, so it is right only with the trunk's seed.
"""

from __future__ import annotations

import json
import math
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

from megatron_occ.rollout.remote.arrival import ArrivalError, opened, tensors_of
from megatron_occ.rollout.remote.manifest import read_manifest

VOCAB, EOS = 16, 1
EXTENSION = "megatron_occ.rollout.remote.vllm_worker.ReloadExtension"


def log_probs(trunk: int, last: int, temperature: float = 1.0) -> list[float]:
    """Log-probs of the next token."""
    logits = [
        2 * math.sin(12.9898 * (last + 1) + 78.233 * (v + 1) + 3.7 * trunk) for v in range(VOCAB)
    ]
    logits = [x / temperature for x in logits]
    norm = math.log(sum(map(math.exp, logits)))
    return [x - norm for x in logits]


def score(trunk: int, tokens: list[int]) -> list[float]:
    return [log_probs(trunk, a)[b] for a, b in pairwise(tokens)]


def sample(trunk: int, prompt: list[int], seed: int, limit: int, stops: list[int], temperature=1.0):
    """Tokens, whatever server samples them: a function of seed and position."""
    tokens, last = [], prompt[-1]
    while len(tokens) < limit and (not tokens or tokens[-1] not in stops):
        probs = list(map(math.exp, log_probs(trunk, last, temperature or 1.0)))
        if temperature:
            draw = random.Random(f"{seed} {len(tokens)}").random()
            last = next((v for v in range(VOCAB) if sum(probs[: v + 1]) > draw), VOCAB - 1)
        else:
            last = max(range(VOCAB), key=probs.__getitem__)
        tokens.append(last)
    return tokens


def drafting(head: int, prompt: list[int], tokens: list[int]) -> tuple[int, int]:
    """Passes and accepted drafts of one drafted token a pass."""
    passes = accepted = 0
    at, line = 1, [prompt[-1], *tokens]
    while at < len(tokens):
        draft = max(range(VOCAB), key=log_probs(head, line[at]).__getitem__)
        hit = draft == tokens[at]
        passes, accepted, at = passes + 1, accepted + hit, at + 1 + hit
    return passes, accepted


def export(trunk: int, head: int):
    """What a trainer would write: the two seeds."""

    def write(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({"trunk": trunk, "head": head}))
        (folder / "model.safetensors").write_bytes(b"not read")

    return write


class Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # the default of 5 makes connections wait for a second


class FakeServer:
    """Base: a thread, the model's state, faults, and a record of calls.

    Args:
        speculative: drafts with the head.
        takes: parts that a weight update really changes.
        biased: draws tokens after the first that its log-probs do not say.
        seeded: a seed gives the same response each time.
        pace: seconds that a token takes.
        frozen: a request waits to be interrupted, and has so many tokens by then; None: it
            does not.
        address: to listen on; port 0: any.
    """

    def __init__(
        self,
        speculative=False,
        takes=("trunk", "head"),
        biased=False,
        seeded=True,
        pace=0.0,
        frozen=None,
        address=("127.0.0.1", 0),
    ) -> None:
        self.pace, self.frozen, self.interrupted = pace, frozen, threading.Event()
        self.waiting = 0  # requests that are held
        self.speculative, self.takes = speculative, takes
        self.trunk = self.head = 0
        self.faults: list[str] = []  # one for each sampled request, the first first
        self.faults_of_new: list[str] = []  # likewise, but for those that were seen before
        self.lost: dict[str, list[str]] = {}  # likewise of other calls, by path
        self.seen: set[str] = set()
        self.calls: list[tuple[str, dict]] = []
        self.drafts = self.accepted = 0
        self.version, self.biased, self.seeded = "default", biased, seeded
        self.held = ""  # identity of what was fetched
        self.ends: list[str] = []  # what becomes of a fetch in the middle: "die" or "stop"
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                self.handle_call({})

            def do_POST(self):
                size = int(self.headers.get("Content-Length") or 0)
                self.handle_call(json.loads(self.rfile.read(size) or b"{}"))

            def handle_call(self, body):
                parts = urlsplit(self.path)
                with outer.lock:
                    outer.calls.append((self.path, body))
                waiting = [] if outer.is_sample(self.path, body) else outer.lost.get(parts.path)
                fault = waiting.pop(0) if waiting else ""
                if fault == "drop":
                    return
                try:
                    status, answer = outer.answer(parts.path, body, self)
                    if fault == "unanswered":
                        return
                    if fault == "500":
                        status, answer = 500, b"no"
                except (BrokenPipeError, ConnectionResetError):
                    return
                if status:
                    self.reply(status, answer)

            def reply(self, status, answer):
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass

        self.http = Http(address, Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.interrupt()
        self.http.shutdown()
        self.http.server_close()

    def sampled(self) -> list[dict]:
        """Bodies of the sampled requests."""
        return [body for path, body in self.calls if self.is_sample(path, body)]

    def load(self, folder: str) -> None:
        config = json.loads((Path(folder) / "config.json").read_text())
        for part in self.takes:
            setattr(self, part, config[part])

    def score(self, tokens):
        """Log-probs of all tokens but the first."""
        return score(self.trunk, tokens)

    def respond(self, prompt, seed, limit, stops, temperature):
        """Tokens, log-probs, log-probs of the likeliest, finish reason, passes, accepted."""
        if not self.seeded:
            seed = f"{seed} {len(self.calls)}"
        tokens = sample(self.trunk, prompt, seed, limit, stops, temperature)
        if self.biased:
            tokens = tokens[:1] + [(token + 3) % VOCAB for token in tokens[1:]]
        line = [prompt[-1], *tokens]
        tables = [log_probs(self.trunk, last, temperature or 1.0) for last in line[:-1]]
        logprobs = [table[token] for table, token in zip(tables, tokens, strict=True)]
        reason = "stop" if tokens[-1] in stops else "length"
        done = self.until_interrupted(len(tokens))
        if done < len(tokens):
            tokens, logprobs, tables = tokens[:done], logprobs[:done], tables[:done]
            reason = "abort"
        passes, accepted = drafting(self.head, prompt, tokens) if self.speculative else (0, 0)
        with self.lock:
            self.drafts, self.accepted = self.drafts + passes, self.accepted + accepted
        return tokens, logprobs, [max(table) for table in tables], reason, passes, accepted

    def until_interrupted(self, count):
        """Tokens that there is time for."""
        with self.lock:
            ended, start, frozen = self.interrupted, time.monotonic(), self.frozen
            self.waiting += frozen is not None
        if frozen is not None:
            ended.wait(30)
            with self.lock:
                self.waiting -= 1
            return min(frozen, count)
        if not self.pace or not ended.wait(count * self.pace):
            return count
        return int((time.monotonic() - start) / self.pace)

    def interrupt(self):
        """End the responses under way."""
        ended, self.interrupted = self.interrupted, threading.Event()
        ended.set()

    def fault(self, handler, body) -> tuple[str, tuple | None]:
        """Name of the fault of this request, and the reply if it takes the reply's place."""
        key = json.dumps(body, sort_keys=True)
        with self.lock:
            waiting = self.faults if key in self.seen else self.faults_of_new or self.faults
            self.seen.add(key)
            name = waiting.pop(0) if waiting else ""
        if name == "drop":
            handler.connection.close()
            return name, (0, None)
        if name == "500":
            return name, (500, {"error": "out of memory"})
        if name == "400":
            return name, (400, {"error": "prompt too long"})
        if name == "slow":
            time.sleep(1.0)
        if name == "drip":
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            for _ in range(50):
                handler.wfile.write(b" ")
                time.sleep(0.05)
            return name, (0, None)
        if name == "truncate":
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b'{"choices": [')
            return name, (0, None)
        if name == "text":
            return name, (200, b"<html>gateway</html>")
        if name == "deep":
            return name, (200, b"[" * 100000)
        if name == "huge":
            return name, (200, b" " * 3_000_000)
        return name, None


class FakeVllm(FakeServer):
    """vLLM; ``extension`` as in ``--worker-extension-cls``."""

    def __init__(
        self, extension=EXTENSION, mode="raw_logprobs", development=True, **kwargs
    ) -> None:
        self.extension, self.mode, self.development = extension, mode, development
        self.paused = False
        super().__init__(**kwargs)

    def is_sample(self, path, body):
        return path == "/v1/completions" and "logprobs" in body

    def answer(self, path, body, handler):
        if path in ("/health", "/pause", "/resume"):
            self.paused = {"/pause": True, "/resume": False}.get(path, self.paused)
            if path == "/pause":
                self.interrupt()
            return 200, b""
        if path == "/v1/models":
            return 200, {"data": [{"id": "policy"}]}
        if path == "/server_info":
            return (200, {"vllm_config": self.config()}) if self.development else (404, b"no")
        if path == "/metrics":
            return 200, self.metrics()
        if path == "/reset_prefix_cache":
            return 200, {"success": True}
        if path == "/collective_rpc":
            if body["method"] == "held_weights":
                return 200, {"results": [{"identity": self.held}]}
            assert self.paused
            if body["method"] == "fetch_weights":
                return self.fetch(**body["kwargs"])
            self.held = ""
            self.load(body["kwargs"]["weights_path"])
            self.held = body["kwargs"]["weights_path"]
            both = body["method"] == "reload_trunk_and_head"
            return 200, {"results": [{"drafter": 3, "held": self.head} if both else None]}
        assert path == "/v1/completions", path
        return self.complete(body, handler)

    def fetch(self, manifest, source):
        """As the worker extension: tensor by tensor, so that an end in the middle leaves half."""
        self.held, wanted = "", read_manifest(manifest)
        end = self.ends.pop(0) if self.ends else ""
        given = 0
        try:
            with opened(wanted, source) as arrived:
                for name, tensor in tensors_of(wanted, arrived):
                    given += 1
                    if name in self.takes:
                        setattr(self, name, int(tensor[0]))
                    if end and name == "trunk":
                        return self.cut_short(end)
        except ArrivalError as error:
            return 500, str(error).encode()
        self.held = wanted.identity
        held = {"trunk": given, "drafter": 1, "held": self.head, "identity": self.held}
        return 200, {"results": [held]}

    def cut_short(self, end):
        """It is killed and started again, or told that the trainer is gone."""
        if end == "stop":
            return 500, b"did not arrive"
        self.trunk, self.head, self.paused = 0, 0, False
        return 0, None

    def config(self):
        speculative = {"method": "mtp", "num_speculative_tokens": 1} if self.speculative else None
        return {
            "model_config": {"logprobs_mode": self.mode},
            "parallel_config": {"worker_extension_cls": self.extension},
            "speculative_config": speculative,
        }

    def metrics(self):
        rows = {
            "drafts": self.drafts,
            "draft_tokens": self.drafts,
            "accepted_tokens": self.accepted,
        }
        lines = [f'vllm:spec_decode_num_{k}_total{{engine="0"}} {v:.1f}' for k, v in rows.items()]
        per = 'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} '
        return "\n".join(["# HELP x", *lines, f"{per}{self.accepted:.1f}", ""]).encode()

    def complete(self, body, handler):
        prompt = body["prompt"]
        if "prompt_logprobs" in body:
            values = self.score(prompt)
            listed = [None]
            for token, value in zip(prompt[1:], values, strict=True):
                listed.append({str(token): {"logprob": value}, "0": {"logprob": -1.0}})
                if token == 0:
                    listed[-1] = {"0": {"logprob": value}}
            return 200, {"choices": [{"prompt_logprobs": listed}]}
        fault, reply = self.fault(handler, body)
        if reply:
            return reply
        arguments = (body["seed"], body["max_tokens"], body["stop_token_ids"], body["temperature"])
        tokens, logprobs, tops, reason, *_ = self.respond(prompt, *arguments)
        if not tokens:
            return 200, {"choices": [{"token_ids": [], "finish_reason": reason, "logprobs": None}]}
        listed = {"token_logprobs": logprobs, "top_logprobs": [{"a": top} for top in tops]}
        choice = {"token_ids": tokens, "finish_reason": reason, "logprobs": listed}
        spoil_vllm(choice, fault)
        return 200, {"choices": [choice]}


def spoil_vllm(choice, fault):
    logprobs = choice["logprobs"]["token_logprobs"]
    if fault == "short":
        logprobs.pop()
    if fault == "cut":
        del choice["token_ids"][2:], logprobs[2:]
        choice["finish_reason"] = "stop"
    if fault == "missing":
        del choice["token_ids"]
    if fault == "vocabulary":
        choice["token_ids"][0] = VOCAB
    if fault == "negative":
        choice["token_ids"][0] = -1
    if fault == "boolean":
        choice["token_ids"][0] = True
    if fault == "nan":
        logprobs[0] = math.nan
    if fault == "positive":
        logprobs[0] = 0.5
    if fault == "reason":
        choice["finish_reason"] = "tired"
    if fault == "aborted":
        del choice["token_ids"][1:], logprobs[1:]
        choice["finish_reason"] = "abort"


class FakeSglang(FakeServer):
    """SGLang."""

    def __init__(self, release="0.5.23", deterministic=True, **kwargs) -> None:
        self.release, self.deterministic, self.aborted = release, deterministic, 0
        super().__init__(**kwargs)

    def is_sample(self, path, body):
        return path == "/generate" and body["logprob_start_len"] == -1

    def answer(self, path, body, handler):
        if path in ("/health", "/flush_cache"):
            return 200, b""
        if path == "/server_info":
            return 200, self.info()
        if path == "/abort_request":
            self.aborted += 1
            self.interrupt()
            return 200, b""
        if path == "/update_weights_from_disk":
            self.load(body["model_path"])
            self.version = body["weight_version"]
            return 200, {"success": True, "message": "ok"}
        assert path == "/generate", path
        return self.generate(body, handler)

    def info(self):
        return {
            "version": self.release,
            "enable_deterministic_inference": self.deterministic,
            "speculative_algorithm": "EAGLE" if self.speculative else None,
            "speculative_num_draft_tokens": 2 if self.speculative else None,
        }

    def generate(self, body, handler):
        prompt, params = body["input_ids"], body["sampling_params"]
        meta = {"weight_version": self.version, "finish_reason": {"type": "length"}}
        if body["logprob_start_len"] == 0:
            values = [None, *self.score(prompt)]
            meta["input_token_logprobs"] = [
                [v, t, None] for v, t in zip(values, prompt, strict=True)
            ]
            return 200, {"output_ids": [2], "meta_info": meta}
        fault, reply = self.fault(handler, body)
        if reply:
            return reply
        tokens, logprobs, tops, reason, passes, accepted = self.respond(
            prompt,
            params["sampling_seed"],
            params["max_new_tokens"],
            params["stop_token_ids"],
            params["temperature"],
        )
        meta["finish_reason"]["type"] = reason
        pairs = zip(logprobs, tokens, strict=True)
        meta["output_token_logprobs"] = [[value, token, None] for value, token in pairs]
        meta["output_top_logprobs"] = [[[top, 0, None]] for top in tops]
        if passes:
            meta["spec_verify_ct"] = passes
            meta["spec_correct_drafts_histogram"] = [passes - accepted, accepted]
        if fault == "short":
            meta["output_token_logprobs"].pop()
        if fault == "missing":
            del meta["output_token_logprobs"]
        if fault == "other":
            meta["output_token_logprobs"][0][1] = (tokens[0] + 1) % VOCAB
        return 200, {"output_ids": tokens, "meta_info": meta}
