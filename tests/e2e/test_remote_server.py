"""A real vLLM or SGLang server, where one is given; see docs/rollout-servers.md.

``ROLLOUT_SERVER_URL``: base URL of a server started as that page says. ``ROLLOUT_SERVER_KIND``:
``vllm`` (default) or ``sglang``. ``ROLLOUT_SERVER_MODEL``: the folder it was started with, on a
disk that server and test share, as the temporary folder must be (``--basetemp``).
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_occ.rollout.engine import Request, SamplingSettings
from megatron_occ.rollout.remote import Probe, RemoteEngine, RemoteSettings
from megatron_occ.rollout.remote.fleet import Fleet

URL, MODEL = (os.environ.get(f"ROLLOUT_SERVER_{name}") for name in ("URL", "MODEL"))
pytestmark = pytest.mark.skipif(not URL, reason="ROLLOUT_SERVER_URL names no server")
PROMPTS = [[5 + i, 9, 14, 7, 11, 6] for i in range(4)]
REQUESTS = [Request(PROMPTS[i // 4], seed=1000 + i) for i in range(16)]
CONFIG = json.loads((Path(MODEL) / "config.json").read_text()) if URL else {}
# what fits behind a prompt, and a token that scoring asks for
ROOM = CONFIG.get("max_position_embeddings", 0) - len(PROMPTS[0]) - 1
SAMPLING = SamplingSettings(1.0, max_response_length=min(24, max(1, ROOM)))


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    model, vocab_size = Path(MODEL), CONFIG["vocab_size"]
    folder = tmp_path_factory.mktemp("weights")
    kind = os.environ.get("ROLLOUT_SERVER_KIND", "vllm")
    settings = RemoteSettings(kind, (URL,), folder, vocab_size, timeout=120.0, concurrency=8)
    # the weights are those of the folder: the server's log-probs under these are the reference
    server = Fleet(settings, None).members[0].server
    server.load_weights(model, 0)
    scores = [server.score(prompt) for prompt in PROMPTS]

    def export(target: Path) -> None:
        for path in model.iterdir():
            if path.is_file():
                shutil.copy(path, target)

    engine = RemoteEngine(
        settings, export, Probe(PROMPTS, lambda _: scores, PROMPTS, draft_tokens=min(32, ROOM))
    )
    engine.update_weights(1)
    engine.server = server
    return engine


def test_the_probe_finds_the_weights(engine):
    (report,) = engine.reports.values()
    assert report.gap_max < 0.1


def test_seeds_repeat_responses(engine):
    first, second = (engine.generate(REQUESTS, SAMPLING) for _ in range(2))
    same = [a == b for a, b in zip(first.tokens, second.tokens, strict=True)]
    assert sum(same) >= 14  # rounding in another batch may turn a close draw
    assert len({tuple(tokens) for tokens in first.tokens}) > 4


def test_logprobs_are_those_of_scoring_the_response(engine):
    result = engine.generate(REQUESTS[:4], SAMPLING)
    for request, tokens, logprobs in zip(REQUESTS, result.tokens, result.logprobs, strict=False):
        scores = engine.server.score([*request.prompt, *tokens])[len(request.prompt) - 1 :]
        assert logprobs == pytest.approx(scores, abs=0.1)


def test_a_stop_id_ends_a_response_and_stays_in_it(engine):
    free = engine.generate(REQUESTS, SAMPLING).tokens
    stop = free[0][3]
    sampling = replace(SAMPLING, stop_ids=(stop,))
    result = engine.generate(REQUESTS[:1], sampling)
    assert result.tokens[0] == free[0][: free[0].index(stop) + 1]
    assert result.finish_reasons == ["stop"]


def test_abort_ends_a_call(engine):
    many = [Request(PROMPTS[0], seed) for seed in range(512)]
    timer = threading.Timer(0.3, engine.abort)
    timer.start()
    start = time.monotonic()
    result = engine.generate(many, SamplingSettings(1.0, min(300, ROOM)))
    assert "abort" in result.finish_reasons
    assert time.monotonic() - start < 10
    assert "abort" not in engine.generate(REQUESTS, SAMPLING).finish_reasons
