"""Remote rollouts against servers that fail: nothing lost, nothing twice, nothing stale."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import replace

import pytest

from megatron_occ.rollout.engine import EngineError, Request, SamplingSettings
from megatron_occ.rollout.remote import Probe, RemoteEngine, RemoteSettings
from megatron_occ.rollout.remote.fleet import Member
from megatron_occ.rollout.remote.job import Ledger, prompt_groups
from megatron_occ.rollout.remote.parts import Part
from megatron_occ.rollout.remote.server import Answer
from tests.unit.fake_servers import (
    EOS,
    VOCAB,
    FakeSglang,
    FakeVllm,
    drafting,
    export,
    log_probs,
    sample,
    score,
)

KINDS = {"vllm": FakeVllm, "sglang": FakeSglang}
SAMPLING = SamplingSettings(1.0, max_response_length=12, stop_ids=(EOS,))
REQUESTS = [Request([2 + i // 2, 3], seed=100 + i) for i in range(12)]


@contextlib.contextmanager
def fleet(
    tmp_path,
    kind="vllm",
    count=1,
    probe=True,
    trunk=7,
    head=7,
    options=None,
    trainer_tells=False,
    decode=None,
    **fakes,
):
    """Engine with weights loaded, and its servers; ``trainer_tells`` what its head is."""
    servers = [KINDS[kind](**fakes) for _ in range(count)]
    weights = {"trunk": trunk, "head": head}
    settings = {
        "timeout": 5.0,
        "update_timeout": 5.0,
        "backoff": 0.01,
        "sampling_z": 0.0,
        **(options or {}),
    }
    urls = tuple(server.url for server in servers)
    setup = RemoteSettings(kind, urls, tmp_path / "weights", VOCAB, **settings)
    sequences = [[2, 3, 4, 5, 6], [7, 8, 9]]
    material = Probe(
        sequences,
        lambda asked: [score(weights["trunk"], tokens) for tokens in asked],
        draft_prompts=[[3], [5], [8]],
        head=(lambda: weights["head"]) if trainer_tells else None,
    )

    def write(folder):
        export(**weights)(folder)

    try:
        engine = RemoteEngine(setup, write, material if probe else None, decode)
        engine.update_weights(1)
        for server in servers:
            server.calls.clear()
        yield engine, servers, weights
        engine.close()
    finally:
        for server in servers:
            server.close()


def expected(trunk=7):
    return [sample(trunk, list(r.prompt), r.seed, 12, [EOS]) for r in REQUESTS]


def check(result, trunk=7):
    assert result.tokens == expected(trunk)
    for request, tokens, logprobs in zip(REQUESTS, result.tokens, result.logprobs, strict=True):
        wanted = score(trunk, [request.prompt[-1], *tokens])
        assert logprobs == pytest.approx(wanted, abs=1e-9)
    ends = ["stop" if tokens[-1] == EOS else "length" for tokens in result.tokens]
    assert result.finish_reasons == ends
    assert set(ends) == {"stop", "length"}  # the requests cover both


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3])
def test_responses_are_those_of_prompt_seed_and_weights(tmp_path, kind, count):
    with fleet(tmp_path, kind, count) as (engine, servers, _):
        check(engine.generate(REQUESTS, SAMPLING))
        assert all(server.sampled() for server in servers)
        assert sum(len(server.sampled()) for server in servers) == len(REQUESTS)


def test_neighbours_with_equal_prompts_share_a_server(tmp_path):
    assert prompt_groups(REQUESTS) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    with fleet(tmp_path, count=2) as (engine, servers, _):
        engine.generate(REQUESTS, SAMPLING)
        first, second = ({tuple(body["prompt"]) for body in s.sampled()} for s in servers)
        assert first.isdisjoint(second)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_reach_the_server(tmp_path, kind):
    sampling = SamplingSettings(1.0, 9, stop_ids=(EOS, 4), stop_strings=("x",), top_p=0.9, top_k=5)
    with fleet(tmp_path, kind) as (engine, (server,), _):
        engine.generate([Request([2], seed=2**64 - 1, max_response_length=4)], sampling)
        (body,) = server.sampled()
        body = body.get("sampling_params", body)
    assert body.get("max_tokens", body.get("max_new_tokens")) == 4
    assert body.get("seed", body.get("sampling_seed")) == 2**63 - 1
    assert (body["temperature"], body["top_p"], body["top_k"]) == (1.0, 0.9, 5)
    assert (body["stop_token_ids"], body["stop"]) == ([EOS, 4], ["x"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["drop", "500", "truncate", "text", "short", "missing"])
def test_only_the_affected_requests_are_sent_again(tmp_path, kind, fault):
    with fleet(tmp_path, kind) as (engine, (server,), _):
        server.faults_of_new = ["", fault, "", "", fault]
        check(engine.generate(REQUESTS, SAMPLING))
        seeds = [str(body) for body in server.sampled()]
    assert len(seeds) == len(REQUESTS) + 2
    again = [seed for seed in set(seeds) if seeds.count(seed) == 2]
    assert len(again) == 2  # with the same prompt, seed and settings


def test_a_timeout_is_retried_and_its_late_answer_counts_for_nothing(tmp_path):
    with fleet(tmp_path, options={"timeout": 0.3}) as (engine, (server,), _):
        server.faults = ["slow"]
        check(engine.generate(REQUESTS, SAMPLING))


def test_a_second_answer_is_discarded():
    first, second = Answer([1], [-1.0], "stop"), Answer([2], [-1.0], "stop")
    ledger, source = Ledger(2), (Member(None), 0)
    assert ledger.put(0, [Part(first, 3, source)])
    assert not ledger.put(0, [Part(second, 3, source)])
    assert ledger.close() == [replace(first, versions=[3] * len(first.tokens)), None]
    assert not ledger.put(1, [Part(second, 3, source)])


def test_answers_of_an_epoch_with_other_weights_are_withdrawn():
    answer, member = Answer([1], [-1.0], "stop"), Member(None)
    ledger = Ledger(3)
    ledger.put(0, [Part(answer, 1, (member, 1)), Part(answer, 2, (member, 0))])
    ledger.put(1, [Part(answer, 2, (member, 1))])
    member.stale.add(0)
    assert ledger.withdraw_stale() == [0, 2]
    assert ledger.put(0, [Part(answer, 2, (member, 1))])
    assert ledger.withdraw_stale() == [2]


def test_retries_are_limited_and_the_last_error_is_told(tmp_path):
    with fleet(tmp_path, options={"retries": 2}) as (engine, (server,), _):
        server.faults = ["500"] * 1000
        with pytest.raises(EngineError, match=r"request 0 failed 3 times.*HTTP 500.*out of memory"):
            engine.generate(REQUESTS[:1], SAMPLING)
        assert len(server.sampled()) == 3


def test_a_refused_request_is_not_retried(tmp_path):
    with fleet(tmp_path) as (engine, (server,), _):
        server.faults = ["400"]
        with pytest.raises(EngineError, match="HTTP 400"):
            engine.generate(REQUESTS[:1], SAMPLING)
        assert len(server.sampled()) == 1


def test_an_oversize_answer_ends_the_call(tmp_path):
    with fleet(tmp_path, options={"max_answer_bytes": 100_000}) as (engine, (server,), _):
        server.faults = ["huge"]
        with pytest.raises(EngineError, match="answer over 100000 bytes"):
            engine.generate(REQUESTS[:1], SAMPLING)


def test_a_dead_server_is_left_out(tmp_path):
    with fleet(tmp_path, count=2) as (engine, servers, _):
        servers[0].close()
        check(engine.generate(REQUESTS, SAMPLING))
        assert len(servers[1].sampled()) == len(REQUESTS)
        picked = {engine._fleet.pick(group, 0).server.client.url for group in range(4)}
        assert picked == {servers[1].url}  # no later request is sent to it


@pytest.mark.parametrize("kind", KINDS)
def test_a_restarted_server_gets_the_weights_again(tmp_path, kind):
    with fleet(tmp_path, kind) as (engine, (server,), _):
        server.trunk, server.version = 0, "default"  # what it was started with
        server.faults = ["drop"]
        check(engine.generate(REQUESTS, SAMPLING))
        assert server.trunk == 7


def test_a_restart_between_two_calls_is_noticed(tmp_path):
    with fleet(tmp_path) as (engine, (server,), _):
        check(engine.generate(REQUESTS, SAMPLING))
        server.trunk = 0
        check(engine.generate(REQUESTS, SAMPLING))


def test_sglang_says_itself_that_it_was_restarted(tmp_path):
    with fleet(tmp_path, "sglang", probe=False) as (engine, (server,), _):
        server.trunk, server.version = 0, "default"
        check(engine.generate(REQUESTS, SAMPLING))
        assert server.version == "1"


@pytest.mark.parametrize("kind", KINDS)
def test_abort_ends_a_running_call(tmp_path, kind):
    with fleet(tmp_path, kind, options={"concurrency": 4}) as (engine, (server,), _):
        server.faults = ["", ""] + ["slow"] * 100
        results = []
        call = threading.Thread(target=lambda: results.append(engine.generate(REQUESTS, SAMPLING)))
        call.start()
        while len(server.sampled()) < 6:
            time.sleep(0.005)
        start = time.monotonic()
        engine.abort()
        call.join(5)
        assert time.monotonic() - start < 0.8  # less than one slow answer
        (result,) = results
        assert result.finish_reasons.count("abort") == len(REQUESTS) - 2
        for tokens, logprobs, reason in zip(
            result.tokens, result.logprobs, result.finish_reasons, strict=True
        ):
            assert (tokens == logprobs == []) == (reason == "abort")
        server.faults = []
        check(engine.generate(REQUESTS, SAMPLING))  # the engine goes on


def test_answers_with_other_weights_do_not_survive_an_abort(tmp_path):
    with fleet(tmp_path, options={"concurrency": 2}) as (engine, (server,), _):
        server.trunk = 0  # restarted, unnoticed so far
        server.faults = ["", ""] + ["slow"] * 100
        results = []
        call = threading.Thread(target=lambda: results.append(engine.generate(REQUESTS, SAMPLING)))
        call.start()
        while len(server.sampled()) < 4:
            time.sleep(0.005)
        engine.abort()
        call.join(5)
        assert results[0].finish_reasons == ["abort"] * len(REQUESTS)


def test_abort_without_a_call_ends_the_next_one_alone(tmp_path):
    with fleet(tmp_path) as (engine, (server,), _weights):
        asked = len(server.sampled())
        engine.abort()
        assert engine.generate(REQUESTS, SAMPLING).finish_reasons == ["abort"] * len(REQUESTS)
        assert len(server.sampled()) == asked
        check(engine.generate(REQUESTS, SAMPLING))


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_are_counted(tmp_path, kind):
    with fleet(tmp_path, kind, count=2, speculative=True) as (engine, _, _weights):
        result = engine.generate(REQUESTS, SAMPLING)
    pairs = zip(REQUESTS, expected(), strict=True)
    counts = [drafting(7, list(request.prompt), tokens) for request, tokens in pairs]
    passes, accepted = (sum(column) for column in zip(*counts, strict=True))
    assert 0 < accepted < passes
    assert (result.drafts.proposed, result.drafts.accepted) == ([passes], [accepted])
    assert (result.drafts.passes, result.drafts.tokens) == (passes, passes + accepted)


def test_without_drafts_a_pass_is_a_token(tmp_path):
    with fleet(tmp_path) as (engine, _, _weights):
        drafts = engine.generate(REQUESTS, SAMPLING).drafts
    assert drafts.passes == drafts.tokens == sum(len(tokens) - 1 for tokens in expected())
    assert drafts.acceptance_length == 1.0 and drafts.proposed == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_replaces_weights_and_deletes_older_ones(tmp_path, kind):
    with fleet(tmp_path, kind, count=2) as (engine, servers, weights):
        (tmp_path / "weights" / "notes.txt").write_text("the user's")
        (tmp_path / "weights" / "version-9.partial").mkdir()  # of a run that was killed
        weights.update(trunk=8, head=8)
        engine.update_weights(2)
        assert {server.trunk for server in servers} == {8}
        left = sorted(path.name for path in (tmp_path / "weights").iterdir())
        assert left == ["notes.txt", "version-2"]
        check_tokens = engine.generate(REQUESTS, SAMPLING).tokens
        assert check_tokens == expected(8) != expected(7)


CONTROL = {
    "vllm": ("/pause", "/collective_rpc", "/reset_prefix_cache", "/resume", "/v1/completions"),
    "sglang": ("/update_weights_from_disk", "/flush_cache", "/generate"),
}


@pytest.mark.parametrize("fault", ["drop", "unanswered", "500"])
@pytest.mark.parametrize(("kind", "path"), [(k, path) for k in KINDS for path in CONTROL[k]])
def test_a_call_that_is_lost_in_an_update_is_made_again(tmp_path, kind, path, fault):
    with fleet(tmp_path, kind, speculative=True) as (engine, (server,), weights):
        weights.update(trunk=8, head=8)
        server.lost = {path: [fault, fault], "/metrics": [fault]}
        engine.update_weights(2)
        assert not server.lost[path]
        result = engine.generate(REQUESTS, SAMPLING)
        check(result, 8)
        assert result.events == []
        assert not getattr(server, "paused", False)


def test_a_call_that_is_lost_again_and_again_is_told_with_its_path(tmp_path):
    with fleet(tmp_path, options={"retries": 2}) as (engine, (server,), _):
        server.lost = {"/resume": ["500"] * 100}
        with pytest.raises(EngineError, match=rf"{server.url}/resume: HTTP 500"):
            engine.update_weights(2)
        assert len(server.lost["/resume"]) == 97


def test_weights_that_can_not_be_loaded_are_told_with_their_folder(tmp_path):
    with fleet(tmp_path, options={"retries": 0}) as (engine, (server,), _):
        server.lost = {"/collective_rpc": ["500"]}
        says = rf"/collective_rpc: HTTP 500: 'no': can the server read {tmp_path}/weights/version-2"
        with pytest.raises(EngineError, match=says):
            engine.update_weights(2)
        assert not server.paused


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_lost_in_an_update_is_left_out_until_it_is_back(tmp_path, kind):
    options = {"retries": 1, "update_timeout": 1.0}
    with fleet(tmp_path, kind, count=2, options=options) as (engine, (one, other), weights):
        weights["trunk"] = 8
        gone = ["drop"] * 1000
        path = CONTROL[kind][0]
        other.lost = {path: gone, "/health": gone}
        engine.update_weights(2)
        result = engine.generate(REQUESTS, SAMPLING)
        check(result, 8)
        assert len(one.sampled()) == len(REQUESTS)
        (told,) = result.events
        assert told.startswith(f"rollout server {other.url} is left out: lost in an update")
        other.lost = {}
        weights["trunk"] = 9
        engine.update_weights(3)
        result = engine.generate(REQUESTS, SAMPLING)
        check(result, 9)
        assert other.sampled()
        assert result.events == [f"rollout server {other.url} is back"]


def test_a_server_that_crashes_with_an_update_is_waited_for(tmp_path):
    with fleet(tmp_path, options={"retries": 1}) as (engine, (server,), weights):
        weights["trunk"] = 8
        # it takes no new weights for a while, and does not answer
        server.lost = {"/pause": ["drop"] * 2, "/health": ["drop"] * 2}
        engine.update_weights(2)
        result = engine.generate(REQUESTS, SAMPLING)
        check(result, 8)
        assert [event.split(server.url)[1][:12] for event in result.events] == [
            " is left out",
            " is back",
        ]


def test_a_restart_is_told(tmp_path):
    with fleet(tmp_path) as (engine, (server,), _):
        server.trunk = 0
        result = engine.generate(REQUESTS, SAMPLING)
        check(result)
        assert result.events == [
            f"rollout server {server.url} had other weights than it was given: it gets them again"
        ]


def test_caches_of_old_weights_are_dropped(tmp_path):
    with fleet(tmp_path) as (engine, (server,), _):
        engine.update_weights(2)
        paths = [path.partition("?")[0] for path, _ in server.calls]
    order = ["/pause", "/collective_rpc", "/reset_prefix_cache", "/resume"]
    assert [path for path in paths if path in order] == order
    with fleet(tmp_path, "sglang") as (engine, (server,), _):
        engine.update_weights(2)
        paths = [path for path, _ in server.calls]
    assert paths.index("/update_weights_from_disk") < paths.index("/flush_cache")


def test_versions_grow(tmp_path):
    with (
        fleet(tmp_path) as (engine, _, _weights),
        pytest.raises(EngineError, match="version 1 is not newer than version 1"),
    ):
        engine.update_weights(1)


def test_nothing_is_generated_before_and_after_a_failed_update(tmp_path):
    with fleet(tmp_path) as (engine, (server,), weights):
        weights["trunk"], server.takes = 8, ()
        with pytest.raises(EngineError, match="old or partial weights"):
            engine.update_weights(2)
        with pytest.raises(EngineError, match="call update_weights"):
            engine.generate(REQUESTS, SAMPLING)
        server.takes = ("trunk",)
        engine.update_weights(3)
        assert engine.generate(REQUESTS, SAMPLING).tokens == expected(8)


def test_an_export_without_weights_is_refused(tmp_path):
    server = FakeVllm()
    settings = RemoteSettings("vllm", (server.url,), tmp_path, VOCAB, update_timeout=1.0)
    engine = RemoteEngine(settings, lambda folder: (folder / "config.json").write_text("{}"))
    with pytest.raises(EngineError, match=r"no \*\.safetensors"):
        engine.update_weights(1)
    assert not (tmp_path / "version-1").exists()
    server.close()


def test_a_server_that_never_comes_up_is_named(tmp_path):
    settings = RemoteSettings(
        "vllm", ("http://127.0.0.1:9",), tmp_path, VOCAB, update_timeout=0.2, timeout=0.2
    )
    with pytest.raises(EngineError, match=r"no server is up after 0\.2 s: http://127\.0\.0\.1:9"):
        RemoteEngine(settings, export(1, 1))


@pytest.mark.parametrize(
    ("kind", "fake", "says"),
    [
        ("vllm", {"development": False}, "VLLM_SERVER_DEV_MODE=1"),
        ("vllm", {"speculative": True, "extension": None}, "--worker-extension-cls"),
        ("sglang", {"deterministic": False}, "--enable-deterministic-inference"),
        ("sglang", {"speculative": True, "release": "0.5.10"}, r"0\.5\.10 updates no drafter"),
    ],
)
def test_a_server_that_can_not_do_the_work_is_refused(tmp_path, kind, fake, says):
    with pytest.raises(EngineError, match=says), fleet(tmp_path, kind, **fake):
        pass


@pytest.mark.parametrize(
    ("mode", "sampling", "works"),
    [
        ("raw_logprobs", SamplingSettings(1.0, 4, top_p=0.9), True),
        ("raw_logprobs", SamplingSettings(0.7, 4), False),
        ("processed_logprobs", SamplingSettings(0.7, 4), True),
        ("processed_logprobs", SamplingSettings(0.7, 4, top_k=5), False),
        ("processed_logprobs", SamplingSettings(0.001, 4), False),
        ("raw_logits", SamplingSettings(1.0, 4), False),
    ],
)
def test_settings_whose_logprobs_vllm_does_not_give_are_refused(tmp_path, mode, sampling, works):
    with fleet(tmp_path, mode=mode, probe=False) as (engine, _, _weights):
        expectation = contextlib.nullcontext() if works else pytest.raises(EngineError)
        with expectation:
            engine.generate(REQUESTS, sampling)


def test_the_fake_model_is_a_distribution():
    assert sum(2.718281828459045**value for value in log_probs(3, 4)) == pytest.approx(1.0)
