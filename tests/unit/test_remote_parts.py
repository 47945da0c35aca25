"""Weights that change while servers sample: responses go on, and each token knows its weights."""

from __future__ import annotations

import threading
import time

import pytest

from megatron_occ.rollout.engine import DraftStatistics, EngineError, Request, SamplingSettings
from megatron_occ.rollout.remote.fleet import Member
from megatron_occ.rollout.remote.gate import Gate
from megatron_occ.rollout.remote.parts import Part, fresh, joined, rest_of
from megatron_occ.rollout.remote.server import Answer
from megatron_occ.rollout.remote.workload import Workload
from megatron_occ.rollout.statistics import ServerWork, server_metrics
from megatron_occ.rollout.text import StopText
from tests.unit.fake_servers import log_probs
from tests.unit.test_remote_engine import KINDS, REQUESTS, SAMPLING, check, fleet

LONG = SamplingSettings(1.0, max_response_length=60)
TRUNKS = {1: 7, 2: 8, 3: 9}
HERE = (Member(None), 0)


def check_parts(result, requests=REQUESTS, length=60):
    """Every token once, with the log-prob of the weights that its version names."""
    assert [len(tokens) for tokens in result.tokens] == [length] * len(requests)
    for request, *rows in zip(
        requests, result.tokens, result.logprobs, result.versions, strict=True
    ):
        last = request.prompt[-1]
        for token, logprob, version in zip(*rows, strict=True):
            assert logprob == pytest.approx(log_probs(TRUNKS[version], last)[token], abs=1e-9)
            last = token
        assert rows[2] == sorted(rows[2])


def wait_for(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def asked(servers):
    return sum(len(server.sampled()) for server in servers)


def all_frozen(servers):
    """Every request is with a server."""
    wait_for(lambda: sum(server.waiting for server in servers) == len(REQUESTS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2])
def test_responses_go_on_under_new_weights(tmp_path, kind, count):
    with fleet(tmp_path, kind, count, frozen=20) as (engine, servers, weights):
        pending = engine.submit(REQUESTS, LONG)
        for version in (2, 3):
            all_frozen(servers)
            for server in servers:
                server.frozen = 20 if version == 2 else None
            weights["trunk"] = TRUNKS[version]
            engine.update_weights(version)
        result = pending.result()
        check_parts(result)
        assert result.versions == [[1] * 20 + [2] * 20 + [3] * 20] * len(REQUESTS)
        assert set(result.finish_reasons) == {"length"}
        # what was there is prompt now, and is not sampled again
        bodies = [body for server in servers for body in server.sampled()]
        prompts = [body.get("prompt", body.get("input_ids")) for body in bodies]
        assert sorted(map(len, prompts)) == [2] * 12 + [22] * 12 + [42] * 12


def test_an_update_without_anything_under_way_interrupts_nothing(tmp_path):
    with fleet(tmp_path) as (engine, (server,), weights):
        check(engine.generate(REQUESTS, SAMPLING))
        server.calls.clear()
        weights["trunk"] = 8
        engine.update_weights(2)
        assert [path for path, _ in server.calls if "pause" in path] == ["/pause?mode=abort"]
        result = engine.generate(REQUESTS, SAMPLING)
        assert {version for row in result.versions for version in row} == {2}


def test_what_was_asked_for_first_is_sent_first_and_a_call_that_waits_before_it(tmp_path):
    requests = [[Request([first], seed) for seed in range(4)] for first in (2, 3, 4)]
    with fleet(tmp_path, options={"concurrency": 1}, frozen=5) as (engine, (server,), _):
        pending = [engine.submit(each, LONG) for each in requests[:2]]
        wait_for(lambda: server.waiting)
        call = threading.Thread(target=engine.generate, args=(requests[2], LONG))
        call.start()
        wait_for(lambda: engine._workers._waiting.qsize() == 11)
        server.frozen = None
        server.interrupt()
        call.join(5)
        for each in pending:
            each.result()
        order = [body["prompt"][0] for body in server.sampled()]
    # the first request was ended by the server itself, and is asked for again
    assert order == [2, 2, 4, 4, 4, 4, 2, 2, 2, 3, 3, 3, 3]


def test_parts_of_a_server_with_other_weights_are_sampled_again(tmp_path):
    with fleet(tmp_path, frozen=20) as (engine, (server,), weights):
        server.trunk = 0  # restarted, unnoticed so far
        pending = engine.submit(REQUESTS, LONG)
        all_frozen([server])
        server.frozen = None
        weights["trunk"] = 8
        engine.update_weights(2)
        result = pending.result()
        check_parts(result)
        assert {version for row in result.versions for version in row} == {2}
        assert any("had other weights" in event for event in result.events)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_dies_in_the_middle_loses_nothing(tmp_path, kind):
    options = {"retries": 2, "update_timeout": 2.0}
    with fleet(tmp_path, kind, count=2, options=options, frozen=20) as (engine, servers, weights):
        one, other = servers
        pending = engine.submit(REQUESTS, LONG)
        all_frozen(servers)
        one.frozen = other.frozen = None
        gone = ["drop"] * 1000
        other.faults, other.lost = gone, {path: gone for path in PATHS}
        other.interrupt()
        weights["trunk"] = 8
        engine.update_weights(2)
        result = pending.result()
        check_parts(result)
        assert any("is left out" in event for event in result.events)


PATHS = ("/health", "/pause", "/resume", "/v1/completions", "/generate", "/abort_request")
PATHS += ("/update_weights_from_disk", "/flush_cache", "/collective_rpc", "/reset_prefix_cache")


def test_abort_ends_all_calls_under_way(tmp_path):
    with fleet(tmp_path, frozen=20) as (engine, (server,), _):
        pending = [engine.submit(REQUESTS, LONG) for _ in range(3)]
        wait_for(server.sampled)
        engine.abort()
        for each in pending:
            assert each.result().finish_reasons == ["abort"] * len(REQUESTS)
        server.frozen = None
        check(engine.generate(REQUESTS, SAMPLING))


def test_a_request_that_fails_for_good_is_told_by_its_own_call(tmp_path):
    with fleet(tmp_path, options={"retries": 0}) as (engine, (server,), _):
        server.faults = ["400"] * len(REQUESTS)
        pending = engine.submit(REQUESTS, SAMPLING)
        with pytest.raises(EngineError, match="prompt too long"):
            pending.result()
        server.faults = []
        check(engine.submit(REQUESTS, SAMPLING).result())


def test_an_update_that_fails_ends_what_is_under_way(tmp_path):
    with fleet(tmp_path, frozen=20) as (engine, (server,), weights):
        pending = engine.submit(REQUESTS, LONG)
        wait_for(server.sampled)
        weights["trunk"], server.takes = 8, ()
        with pytest.raises(EngineError, match="old or partial weights"):
            engine.update_weights(2)
        with pytest.raises(EngineError, match="call update_weights"):
            pending.result()
        wait_for(lambda: not any(thread.name == "rollout job" for thread in threading.enumerate()))


def test_what_was_asked_for_first_is_sent_first(tmp_path):
    rounds = [[Request([2, 3], 100 * n + i) for i in range(12)] for n in range(4)]
    with fleet(tmp_path, options={"concurrency": 12}, frozen=5) as (engine, (server,), _):
        pending = [engine.submit(requests, LONG) for requests in rounds]
        all_frozen([server])
        assert {body["seed"] for body in server.sampled()} == {one.seed for one in rounds[0]}
        engine.abort()
        for each in pending:
            each.result()


def part(tokens, version=1, reason="abort", source=HERE):
    return Part(Answer(tokens, [-1.0] * len(tokens), reason), version, source)


def test_the_rest_of_a_request_has_the_parts_as_prompt_and_random_numbers_of_its_own():
    request = Request([5, 6], seed=9)
    assert rest_of(request, [], LONG) is request
    rest = rest_of(request, [part([1, 2]), part([3])], LONG)
    assert list(rest.prompt) == [5, 6, 1, 2, 3]
    assert rest.max_response_length == 57
    seeds = {rest_of(request, [part([1] * n)], LONG).seed for n in range(1, 50)}
    assert len(seeds) == 49 and all(0 <= seed < 2**63 for seed in seeds)
    # whatever was drawn so far: a seed that depends on tokens would choose among responses
    assert rest.seed == rest_of(request, [part([7, 7, 7])], LONG).seed
    short = Request([5], seed=9, max_response_length=4)
    assert rest_of(short, [part([1, 2])], LONG).max_response_length == 2


def test_parts_behind_a_stale_one_do_not_count():
    member = Member(None)
    member.stale.add(2)
    parts = [part([epoch], source=(member, epoch)) for epoch in (1, 2, 3)]
    assert fresh(parts) == parts[:1]
    assert fresh(parts[:1]) == parts[:1]


def test_a_stop_string_that_two_parts_share_ends_the_response():
    stop = StopText(lambda tokens: "".join(map(chr, tokens)), ("END",))
    first, second = list(map(ord, "abE")), list(map(ord, "NDmore"))
    whole = joined([part(first, 4), part(second, 5, "length")], stop)
    assert whole.tokens == list(map(ord, "abEND"))
    assert (whole.finish_reason, whole.versions) == ("stop", [4, 4, 4, 5, 5])
    assert len(whole.logprobs) == 5
    without = joined([part(first, 4), part(second, 5, "length")], None)
    assert (len(without.tokens), without.finish_reason) == (9, "length")
    # the server looks within its own part
    alone = joined([part(first + second, 4, "length")], stop)
    assert len(alone.tokens) == 9


def test_the_gate_keeps_work_and_changes_apart():
    gate, stop, seen = Gate(), threading.Event(), []

    def work():
        with gate.passing(stop) as version:
            seen.append(version)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.02)
    assert seen == []
    gate.open(4)
    thread.join(5)
    assert seen == [4]
    with gate.passing(stop):
        gate.close()
        assert not gate.is_empty(0.01)
    assert gate.is_empty(0.0)
    stop.set()
    work()
    assert seen == [4, None]


def test_far_more_work_than_elsewhere_is_shared(tmp_path):
    same = [Request([2, 3], seed) for seed in range(60)]
    with fleet(tmp_path, count=2, options={"concurrency": 60}, frozen=5) as (engine, servers, _):
        pending = engine.submit(same, LONG)
        wait_for(lambda: asked(servers) == 60)
        # all of them are one group
        assert min(len(server.sampled()) for server in servers) >= 10
        engine.abort()
        pending.result()


def test_what_each_server_did_is_told(tmp_path):
    with fleet(tmp_path, count=2, speculative=True) as (engine, servers, _):
        result = engine.generate(REQUESTS, SAMPLING)
        assert [work.url for work in result.servers] == [server.url for server in servers]
        assert sum(work.requests for work in result.servers) == len(REQUESTS)
        assert sum(work.tokens for work in result.servers) == sum(map(len, result.tokens))
        assert {work.version for work in result.servers} == {1}
        assert sum(work.drafts.passes for work in result.servers) == result.drafts.passes > 0
        again = engine.generate(REQUESTS[:1], SAMPLING).servers
        assert sorted(work.requests for work in again) == [0, 1]


def test_work_is_counted_on_the_clients_clock():
    now = [0.0]
    load = Workload(lambda: now[0])
    now[0] = 2.0
    with load.request() as answered:
        now[0] = 5.0
        with load.request() as other:
            assert load.queue == 2
            now[0] = 6.0
            other(Answer([0] * 30, [-1.0] * 30, "stop"))
        now[0] = 7.0
        answered(Answer([0] * 20, [-1.0] * 20, "length"))
    now[0] = 10.0
    work = load.pop("http://a", 4)
    assert (work.span, work.busy, work.requests, work.tokens) == (10.0, 5.0, 2, 50)
    assert work.waited == 1.0 + 5.0
    work.drafts = DraftStatistics([10], [5], 10, 15)
    now[0] = 12.0
    later = load.pop("http://a", 6)
    assert (later.span, later.busy, later.requests) == (2.0, 0.0, 0)
    found = server_metrics([work, ServerWork("http://b", 6), later, ServerWork("http://b", 6)])
    assert found["server/1/version"] == 6 and found["server/2/tokens_per_second"] == 0
    assert found["server/1/tokens_per_second"] == 10
    assert found["server/1/idle"] == pytest.approx(1 - 5 / 12)
    assert found["server/1/request_seconds"] == 3
    assert found["server/1/acceptance_length"] == 1.5
    assert "server/2/acceptance_length" not in found
