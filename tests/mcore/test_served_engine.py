"""One rank talks to the servers: every rank gets its share's responses, and every error."""

from __future__ import annotations

import pytest
import torch

from megatron_occ.config.schema import Config
from megatron_occ.mcore.main_rank import MainRank
from megatron_occ.mcore.served_engine import ServedEngine
from megatron_occ.mcore.startup import initialize, shutdown
from megatron_occ.rollout import DraftStatistics, EngineError, Generation, Request, SamplingSettings
from tests.mcore.distributed import run_ranks

SAMPLING = SamplingSettings(1.0, 4)


class Recorder:
    """An engine that answers each request with its seed, and fails where told to."""

    def __init__(self, refused=()):
        self.refused, self.asked, self.versions, self.closed = refused, [], [], False

    def generate(self, requests, sampling):
        assert sampling == SAMPLING
        self.asked.append([request.seed for request in requests])
        if any(request.seed < 0 for request in requests):
            raise EngineError("a request failed for good")
        tokens = [[request.seed] for request in requests]
        logprobs = [[-float(request.seed)] for request in requests]
        drafts = DraftStatistics([len(requests)], [1], 2, 3)
        return Generation(tokens, logprobs, ["stop"] * len(requests), drafts)

    def update_weights(self, version):
        if version in self.refused:
            raise EngineError(f"version {version} did not arrive")
        self.versions.append(version)

    def close(self):
        self.closed = True


def start(parallel, engine, prepare=lambda: None):
    config = Config()
    for key, value in parallel.items():
        setattr(config.parallel, key, value)
    layout = initialize(config)
    return layout, ServedEngine(layout, MainRank(), prepare, lambda: engine)


def message_of(call, *arguments):
    try:
        call(*arguments)
    except EngineError as error:
        return str(error)
    return None


def one_run(parallel):
    prepared, recorder = [], Recorder(refused=(5,))
    layout, engine = start(parallel, recorder, lambda: prepared.append(len(recorder.versions)))
    share = layout.data_parallel_rank
    for version in (0, 0, 3):
        engine.update_weights(version)
    # shares of different sizes: 1 and 2 requests
    seeds = [10 * (share + 1) + index for index in range(share + 1)]
    found = engine.generate([Request([1], seed) for seed in seeds], SAMPLING)
    failed = message_of(engine.generate, [Request([1], -share)], SAMPLING)
    refused = message_of(engine.update_weights, 5)
    engine.update_weights(6)
    engine.close()
    return {
        "share": share,
        "seeds": seeds,
        "found": found,
        "messages": (failed, refused),
        "prepared": len(prepared),
        "recorder": (recorder.asked, recorder.versions, recorder.closed),
    }


LAYOUTS = {
    "data": (2, {}),
    "tensor and data": (4, {"tensor": 2}),
    "context and data": (4, {"context": 2}),
    "pipeline and data": (4, {"pipeline": 2}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_gets_the_responses_of_its_share(name):
    ranks, parallel = LAYOUTS[name]
    results = run_ranks(one_run, ranks, parallel)
    assert {result["share"] for result in results} == {0, 1}
    for result in results:
        found = result["found"]
        assert found.tokens == [[seed] for seed in result["seeds"]]
        assert found.logprobs == [[-float(seed)] for seed in result["seeds"]]
        assert found.finish_reasons == ["stop"] * len(result["seeds"])
        # counted once over the shares
        assert found.drafts.proposed == ([3] if result["share"] == 0 else [])
        assert result["messages"] == ("a request failed for good", "version 5 did not arrive")
        # version 0 once
        assert result["prepared"] == 4
    assert results[0]["recorder"] == ([[10, 20, 21], [0, -1]], [0, 3, 6], True)
    for result in results[1:]:
        assert result["recorder"] == ([], [], False)


def no_engine():
    def connect():
        raise EngineError("no server is up")

    layout = initialize(Config())
    with pytest.raises(EngineError, match="no server is up"):
        ServedEngine(layout, MainRank(), lambda: None, connect)
    return True


def test_servers_that_are_not_there_end_all_ranks():
    assert run_ranks(no_engine, 2) == [True, True]


def fault_of_the_main_rank():
    main = MainRank()
    with pytest.raises(ZeroDivisionError if main.is_this else EngineError, match="division"):
        main.run(lambda: 1 // 0)
    return main.run(lambda: ["first", "second"])


def test_a_fault_in_the_work_is_raised_as_it_was_on_the_main_rank():
    assert run_ranks(fault_of_the_main_rank, 2) == ["first", "second"]


def test_one_process_needs_no_other():
    recorder = Recorder()
    try:
        _, engine = start({}, recorder)
        engine.update_weights(1)
        found = engine.generate([Request([1], 7)], SAMPLING)
        assert found.tokens == [[7]] and recorder.versions == [1]
    finally:
        shutdown()
    assert not torch.distributed.is_initialized()
