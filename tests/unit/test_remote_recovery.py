"""Servers that are lost and come back, in the middle of updates and stops: no token is credited to
weights that did not draw it, and nothing waits for a server that hangs."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from megatron_occ.rollout.engine import EngineError, Request
from megatron_occ.rollout.remote import RemoteEngine, RemoteSettings, workers
from megatron_occ.rollout.remote.job import pause_before
from megatron_occ.rollout.remote.parts import Part, joined
from megatron_occ.rollout.remote.server import Answer
from megatron_occ.rollout.text import StopText
from tests.unit.fake_servers import VOCAB, FakeVllm, export, score
from tests.unit.test_remote_engine import KINDS, REQUESTS, SAMPLING, check, fleet
from tests.unit.test_remote_parts import HERE, LONG, asked, check_parts, wait_for

GONE = ("/health", "/pause", "/resume", "/generate", "/abort_request", "/flush_cache")
GONE += ("/update_weights_from_disk", "/collective_rpc", "/reset_prefix_cache", "/metrics")
GONE += ("/v1/completions",)


def leave(server):
    """It does not answer, whatever it is asked."""
    server.lost = {path: ["drop"] * 100_000 for path in GONE}
    server.faults = ["drop"] * 100_000


def come_back(server):
    server.lost, server.faults = {}, []


def drawn_from(result, trunk):
    """How many responses have the log-probs of these weights."""
    rows = zip(REQUESTS, result.tokens, result.logprobs, strict=True)
    return sum(
        logprobs == pytest.approx(score(trunk, [request.prompt[-1], *tokens]), abs=1e-9)
        for request, tokens, logprobs in rows
    )


def hang(server):
    """It answers nothing more until the event is set."""
    go, answer = threading.Event(), server.answer
    server.answer = lambda *given: go.wait(300) and answer(*given)
    return go


def in_time(work, seconds=20):
    """What some work returns, if it is through by then."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, "it hangs, or failed"
    return found[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("probe", "trunks"), [(False, (7, 8)), (True, (7, 7.003, 7.006))])
def test_a_server_gets_what_it_missed_before_it_is_asked(tmp_path, kind, probe, trunks):
    # one update moves log-probs by less than two implementations differ
    options = {"retries": 1, "update_timeout": 1.0, "timeout": 1.0}
    given = {"count": 2, "probe": probe, "trunk": trunks[0], "options": options}
    with fleet(tmp_path, kind, **given) as (engine, (_, other), weights):
        leave(other)
        for version, trunk in enumerate(trunks[1:], start=2):
            weights["trunk"] = trunk
            engine.update_weights(version)
        assert drawn_from(engine.generate(REQUESTS, SAMPLING), trunks[-1]) == len(REQUESTS)
        come_back(other)
        # the look at its end takes it in
        told = engine.generate(REQUESTS, SAMPLING).events
        assert told == [f"rollout server {other.url} is back"]
        other.calls.clear()
        assert drawn_from(engine.generate(REQUESTS, SAMPLING), trunks[-1]) == len(REQUESTS)
        assert other.sampled()


def test_a_restart_is_known_by_what_was_loaded(tmp_path):
    # the probe alone can't tell: weights have moved by less than its tolerance
    with fleet(tmp_path, trunk=7.0) as (engine, (server,), weights):
        for version in range(2, 5):
            weights["trunk"] += 0.0005
            engine.update_weights(version)
        server.trunk, server.held, server.faults = 7.0, "", ["drop"]
        result = engine.generate(REQUESTS, SAMPLING)
        assert drawn_from(result, weights["trunk"]) == len(REQUESTS)
        assert [event.split(server.url)[1][:18] for event in result.events] == [
            " had other weights"
        ]


def slow_looks(server, seconds, ended):
    """Scoring takes a while, and a pause ends it."""
    complete = server.complete

    def slow(body, handler):
        if "prompt_logprobs" in body and server.interrupted.wait(seconds):
            ended.append(body)
            return 500, b"aborted"
        return complete(body, handler)

    server.complete = slow


@pytest.mark.parametrize("trunk", [7, 0], ids=["present", "other"])
def test_an_update_waits_for_a_look_and_leaves_it_alone(tmp_path, trunk):
    with fleet(tmp_path) as (engine, (server,), weights):
        ended = []
        slow_looks(server, 0.2, ended)
        server.trunk = trunk
        pending = engine.submit(REQUESTS, SAMPLING)
        wait_for(lambda: any("prompt_logprobs" in body for _, body in server.calls))
        weights["trunk"] = 8
        engine.update_weights(2)
        result = pending.result()
        assert ended == []
        # those of weights that nobody loaded are drawn again, after the update
        drawn = 7 if trunk == 7 else 8
        assert drawn_from(result, drawn) == len(REQUESTS)
        assert {v for row in result.versions for v in row} == {1 if trunk == 7 else 2}


def test_what_could_not_be_looked_at_does_not_count(tmp_path):
    options = {"retries": 1}
    with fleet(tmp_path, count=2, options=options) as (engine, (one, other), _):
        other.trunk = 0
        # it answers, but for what would tell its weights
        other.lost = {"/v1/completions": ["500"] * 1000}
        result = engine.generate(REQUESTS, SAMPLING)
        check(result)
        assert other.sampled() and len(one.sampled()) == len(REQUESTS)
        (told,) = result.events
        assert f"{other.url} is left out: {other.url}/v1/completions: HTTP 500" in told
        # nor does it end the run with an update
        for version in (2, 3):
            engine.update_weights(version)
        result = engine.generate(REQUESTS, SAMPLING)
        check(result)
        assert all(f"{other.url} stays left out: " in event for event in result.events)
        other.lost = {}
        engine.update_weights(4)
        check(engine.generate(REQUESTS, SAMPLING))
        assert len(other.sampled()) > len(REQUESTS) // 2


def test_a_server_that_can_not_get_the_weights_is_not_asked(tmp_path):
    with fleet(tmp_path, options={"retries": 1}) as (engine, (server,), _):
        # started anew, and it does not reach the folder
        server.trunk, server.held, server.faults = 0, "", ["drop"]
        server.lost = {"/collective_rpc": ["500"] * 1000}
        pending = engine.submit(REQUESTS, SAMPLING)
        with pytest.raises(EngineError, match=f"{server.url} has not got the weights"):
            pending.result()
        server.lost = {}
        engine.update_weights(2)
        check(engine.generate(REQUESTS, SAMPLING))


def test_a_server_that_comes_back_with_other_options_is_left_out(tmp_path):
    half = replace(SAMPLING, temperature=0.5)
    options = {"retries": 1, "update_timeout": 1.0, "timeout": 1.0}
    given = {"count": 2, "options": options, "mode": "processed_logprobs"}
    with fleet(tmp_path, **given) as (engine, (_, other), _):
        assert engine.generate(REQUESTS, half).events == []
        leave(other)
        engine.update_weights(2)
        engine.generate(REQUESTS, half)
        come_back(other)
        other.mode = "raw_logprobs"
        other.calls.clear()
        engine.update_weights(3)
        (told,) = engine.generate(REQUESTS, half).events
        assert f"{other.url} stays left out: " in told and "processed_logprobs" in told
        assert not other.sampled()


def test_a_server_that_hangs_does_not_hold_up_updates(tmp_path):
    options = {"retries": 1, "update_timeout": 300.0, "timeout": 0.5}
    with fleet(tmp_path, count=2, options=options) as (engine, (one, other), _):
        go = hang(other)
        engine.generate(REQUESTS[:4], SAMPLING)
        one.frozen = 20
        pending = engine.submit(REQUESTS, LONG)
        wait_for(lambda: one.waiting == len(REQUESTS))
        one.frozen = None
        in_time(lambda: engine.update_weights(2) or True)
        check_parts_of_seven(pending.result())
        go.set()


def check_parts_of_seven(result):
    """Version 2 has the weights of version 1."""
    assert {v for row in result.versions for v in row} == {1, 2}
    result.versions = [[1] * len(row) for row in result.versions]
    check_parts(result)


def test_a_request_at_a_server_that_is_left_out_is_sent_elsewhere_with_an_update(tmp_path):
    options = {"retries": 1, "update_timeout": 300.0, "timeout": 300.0}
    with fleet(tmp_path, count=2, options=options) as (engine, (_, other), _):
        go, complete = threading.Event(), other.complete
        other.complete = lambda *given: go.wait(300) and complete(*given)
        pending = engine.submit(REQUESTS, SAMPLING)
        wait_for(lambda: len(other.sampled()) == len(REQUESTS) // 2)
        leave(other)
        other.faults = []
        # as after a request that failed
        engine._fleet.recover(engine._fleet.members[1], 0, threading.Event())
        in_time(lambda: engine.update_weights(2) or True)
        come_back(other)
        go.set()
        check(in_time(pending.result))


@pytest.mark.parametrize("retries", [0, 1])
def test_a_stop_is_no_failure(tmp_path, retries):
    with fleet(tmp_path, options={"retries": retries}, frozen=5) as (engine, (server,), _):
        server.faults = ["500"] * retries
        pending = engine.submit(REQUESTS, LONG)
        wait_for(lambda: server.waiting == len(REQUESTS))
        engine.abort()
        assert pending.result().finish_reasons == ["abort"] * len(REQUESTS)


def test_a_job_that_fails_leaves_the_others_alone(tmp_path):
    with fleet(tmp_path, options={"retries": 0}, frozen=20) as (engine, (server,), _):
        pending = engine.submit(REQUESTS, LONG)
        wait_for(lambda: server.waiting == len(REQUESTS))
        server.faults = ["400"]
        with pytest.raises(EngineError, match="prompt too long"):
            engine.submit([Request([2, 3], 7)], LONG).result()
        server.frozen = None
        engine.update_weights(2)
        check_parts_of_seven(pending.result())


def test_after_a_stop_no_look_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 0.2)
    options = {"update_timeout": 300.0, "timeout": 300.0}
    with fleet(tmp_path, options=options) as (engine, (server,), _):
        slow_looks(server, 300, [])
        pending = engine.submit(REQUESTS, SAMPLING)
        wait_for(lambda: any("prompt_logprobs" in body for _, body in server.calls))
        engine.abort()
        # nobody knows what they came from
        assert in_time(pending.result).finish_reasons == ["abort"] * len(REQUESTS)


def test_after_a_stop_no_update_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 0.2)
    options = {"update_timeout": 300.0, "timeout": 300.0}
    with fleet(tmp_path, options=options) as (engine, (server,), _):
        go = hang(server)
        update = threading.Thread(target=engine.update_weights, args=(2,), daemon=True)
        update.start()
        wait_for(lambda: server.calls and server.calls[-1][0].startswith("/pause"))
        engine.abort()
        update.join(20)
        assert not update.is_alive()
        # nothing is asked for then
        calls = len(server.calls)
        result = engine.submit(REQUESTS, SAMPLING).result()
        assert result.finish_reasons == ["abort"] * len(REQUESTS)
        assert len(server.calls) == calls
        go.set()


def test_a_stop_before_an_update_holds_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 0.2)
    options = {"update_timeout": 300.0, "timeout": 300.0}
    with fleet(tmp_path, options=options) as (engine, (server,), _):
        go = hang(server)
        engine.abort()
        in_time(lambda: engine.update_weights(2) or True)
        result = engine.generate(REQUESTS, SAMPLING)
        assert result.finish_reasons == ["abort"] * len(REQUESTS)
        go.set()


def test_a_stop_holds_for_what_is_asked_next(tmp_path):
    with fleet(tmp_path, frozen=5) as (engine, (server,), _):
        pending = engine.submit(REQUESTS, LONG)
        wait_for(lambda: server.waiting == len(REQUESTS))
        engine.abort()
        # a validation, which goes before what was asked for
        assert engine.generate(REQUESTS, LONG).finish_reasons == ["abort"] * len(REQUESTS)
        assert pending.result().finish_reasons == ["abort"] * len(REQUESTS)


def test_an_update_that_fails_after_a_stop_is_no_error(tmp_path):
    with fleet(tmp_path) as (engine, (server,), _):
        answer = server.answer

        def refuse(path, body, handler):
            if path == "/reset_prefix_cache":
                engine.abort()
                return 200, {"success": False}
            return answer(path, body, handler)

        server.answer = refuse
        engine.update_weights(2)
        result = engine.submit(REQUESTS, SAMPLING).result()
        assert result.finish_reasons == ["abort"] * len(REQUESTS)
        server.answer = answer
        engine.update_weights(3)
        check(engine.generate(REQUESTS, SAMPLING))


def test_a_run_starts_with_the_servers_that_are_there(tmp_path):
    one, late = FakeVllm(), FakeVllm()
    leave(late)
    settings = RemoteSettings(
        *("vllm", (one.url, late.url), tmp_path, VOCAB), update_timeout=0.5, retries=1, timeout=5.0
    )
    engine = RemoteEngine(settings, export(7, 7))
    engine.update_weights(1)
    result = engine.generate(REQUESTS, SAMPLING)
    check(result)
    assert [event.split(late.url)[1][:24] for event in result.events] == [
        " is left out: it is not "
    ]
    come_back(late)
    engine.update_weights(2)
    late.calls.clear()
    result = engine.generate(REQUESTS, SAMPLING)
    check(result)
    assert late.sampled() and result.events == [f"rollout server {late.url} is back"]
    engine.close()
    for server in (one, late):
        server.close()


def test_tokens_of_interrupted_responses_are_counted(tmp_path):
    with fleet(tmp_path, frozen=20) as (engine, (server,), _):
        pending = engine.submit(REQUESTS, LONG)
        wait_for(lambda: server.waiting == len(REQUESTS))
        server.frozen = None
        engine.update_weights(2)
        result = pending.result()
        assert asked([server]) == 2 * len(REQUESTS)
        (work,) = result.servers
        assert (work.tokens, work.requests) == (60 * len(REQUESTS), len(REQUESTS))


def test_pauses_grow_up_to_half_a_minute():
    pauses = [pause_before(failures, 0.5) for failures in (1, 2, 3, 6, 7, 8, 1025)]
    assert pauses == [0.5, 1.0, 2.0, 16.0, 30.0, 30.0, 30.0]


def test_only_the_edges_of_parts_are_searched():
    seen = []

    def decode(tokens):
        seen.append(len(tokens))
        return "".join(map(chr, tokens))

    def parts(*texts):
        answers = [Answer(list(map(ord, text)), [-1.0] * len(text), "abort") for text in texts]
        return [Part(answer, 1, HERE) for answer in answers]

    stop = StopText(decode, ("END", "STOP"))
    long = "x" * 3000
    assert len(joined(parts(long, long, long), stop).tokens) == 9000
    assert len(seen) <= 2 * stop.window and max(seen) <= stop.window
    cut = joined(parts(long + "ST", "O", "P" + long), stop)
    assert len(cut.tokens) == 3004 and cut.finish_reason == "stop"
    # one within a part, far from an edge, would have ended it
    assert len(joined(parts("a", long + "END" + long), stop).tokens) == 6004
