"""Weights out of memory: all of them arrive as they were sent, or none is used."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace

import pytest
import torch

from megatron_occ.rollout.engine import EngineError, Request, SamplingSettings
from megatron_occ.rollout.remote import Probe, RemoteEngine, RemoteSettings
from megatron_occ.rollout.remote import arrival as arriving
from megatron_occ.rollout.remote.bucket_server import BucketServer
from megatron_occ.rollout.remote.carriers import MemoryCarrier
from megatron_occ.rollout.remote.manifest import Piece
from megatron_occ.rollout.remote.store import Store
from tests.unit.fake_servers import EOS, VOCAB, FakeVllm, sample, score

SAMPLING = SamplingSettings(1.0, max_response_length=12, stop_ids=(EOS,))
REQUESTS = [Request([2 + i // 2, 3], seed=100 + i) for i in range(12)]
WAYS = ("memory", "network")
# bytes of a bucket, and elements of tensors that take several
BUCKET, LARGE = 256, 300


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(arriving, "PAUSE", 0.001)


def filled(weights):
    """Room with the weights of the fake model, between tensors larger than a bucket."""
    tensors = {
        "layers": torch.arange(float(LARGE)),
        "trunk": torch.tensor([float(weights["trunk"])]),
        "norm": torch.ones(LARGE, dtype=torch.bfloat16),
        "head": torch.tensor([float(weights["head"])]),
    }
    pieces = [Piece(n, t.dtype, tuple(t.shape), n in ("norm", "head")) for n, t in tensors.items()]
    store = Store(pieces, BUCKET)
    for name, tensor in tensors.items():
        store.put(name, tensor)
    return store


@contextlib.contextmanager
def fleet(tmp_path, way="network", count=1, probe=True, find=lambda found: found, **fakes):
    """Engine with weights loaded, its servers, the weights, and the carrier's stores."""
    servers = [FakeVllm(**fakes) for _ in range(count)]
    weights, stores = {"trunk": 7, "head": 7}, []
    settings = RemoteSettings(
        "vllm",
        tuple(server.url for server in servers),
        tmp_path / "weights",
        VOCAB,
        timeout=5.0,
        update_timeout=5.0,
        backoff=0.01,
        sampling_z=0.0,
        transfer=way,
    )
    material = Probe(
        [[2, 3, 4, 5, 6], [7, 8, 9]],
        lambda asked: [score(weights["trunk"], tokens) for tokens in asked],
        draft_prompts=[[3], [5], [8]],
        head=lambda: weights["head"],
    )

    def take():
        stores.append(filled(weights))
        return stores[-1]

    carrier = MemoryCarrier(take, BucketServer(find) if way == "network" else None)
    try:
        engine = RemoteEngine(settings, carrier, material if probe else None)
        engine.update_weights(1)
        yield engine, servers, weights, stores
        engine.close()
        assert not any(store.total and is_open(store) for store in stores)
    finally:
        for server in servers:
            server.close()


def is_open(store):
    return os.path.exists(store.path)


def check(engine, trunk):
    wanted = [sample(trunk, list(r.prompt), r.seed, 12, [EOS]) for r in REQUESTS]
    assert engine.generate(REQUESTS, SAMPLING).tokens == wanted


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [1, 3])
def test_updates_reach_all_servers_and_old_ones_are_given_up(tmp_path, way, count):
    with fleet(tmp_path, way, count, speculative=True) as (engine, servers, weights, stores):
        for version in (2, 5):
            weights.update(trunk=version, head=version)
            engine.update_weights(version)
            assert [(s.trunk, s.head, s.paused) for s in servers] == [(version, version, 0)] * count
            check(engine, version)
            assert [is_open(store) for store in stores] == [False] * (len(stores) - 1) + [True]
    assert not (tmp_path / "weights").exists()


def test_the_log_says_how_much_it_was(tmp_path, caplog):
    with caplog.at_level("INFO"), fleet(tmp_path) as (engine, _, _, _):
        engine.update_weights(2)
    assert "weights of version 2: 0.0 MB in 8 buckets; offered in " in caplog.text


@pytest.mark.parametrize("part", ["trunk", "head"])
def test_a_part_that_is_left_old_is_noticed(tmp_path, part):
    with fleet(tmp_path, speculative=True) as (engine, (server,), weights, _):
        server.takes = tuple({"trunk", "head"} - {part})
        weights.update(trunk=3, head=3)
        with pytest.raises(EngineError, match="old"):
            engine.update_weights(2)
        with pytest.raises(EngineError, match="call update_weights"):
            engine.generate(REQUESTS, SAMPLING)


class Damage:
    """Turns a bit of so many buckets, once ``begin`` was called."""

    def __init__(self, count):
        self.left, self.begun = count, False

    def __call__(self, found):
        if not self.begun or not self.left:
            return found
        self.left -= 1
        return memoryview(bytes([found[0] ^ 1]) + bytes(found[1:]))


def test_a_damaged_bucket_is_fetched_again(tmp_path):
    damage = Damage(arriving.TRIES - 1)
    with fleet(tmp_path, count=1, find=damage) as (engine, (server,), weights, _):
        damage.begun, weights["trunk"] = True, 3
        engine.update_weights(2)
        assert not damage.left and server.trunk == 3
        check(engine, 3)


@pytest.mark.parametrize("way", WAYS)
def test_what_stays_damaged_is_not_used_until_an_update_is_whole(tmp_path, monkeypatch, way):
    damage, seal = Damage(1000), Store.seal

    def seal_and_spoil(self, version):
        manifest = seal(self, version)
        if way == "memory" and version == 2:
            self.span(0, BUCKET)[BUCKET // 2] ^= 16
        return manifest

    monkeypatch.setattr(Store, "seal", seal_and_spoil)
    with fleet(tmp_path, way, find=damage) as (engine, (server,), weights, stores):
        damage.begun, weights["trunk"] = True, 3
        with pytest.raises(EngineError, match="checksum"):
            engine.update_weights(2)
        assert server.trunk == 7 and server.held == ""
        with pytest.raises(EngineError, match="call update_weights"):
            engine.generate(REQUESTS, SAMPLING)
        damage.begun = False
        engine.update_weights(3)
        check(engine, 3)
        assert [is_open(store) for store in stores] == [False, False, True]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("end", ["die", "stop"])
def test_a_server_that_ends_in_the_middle_gets_all_of_it_again(tmp_path, way, end):
    with fleet(tmp_path, way, 2, speculative=True) as (engine, servers, weights, _):
        weights.update(trunk=3, head=3)
        servers[1].ends = [end]
        engine.update_weights(2)
        assert [(server.trunk, server.head) for server in servers] == [(3, 3)] * 2
        assert servers[0].held == servers[1].held != ""
        check(engine, 3)


@pytest.mark.parametrize("fault", ["drop", "unanswered", "500"])
def test_a_call_that_is_lost_is_made_again(tmp_path, fault):
    with fleet(tmp_path) as (engine, (server,), weights, _):
        weights["trunk"] = 3
        server.lost["/collective_rpc"] = [fault]
        engine.update_weights(2)
        check(engine, 3)


def test_half_new_weights_are_noticed_where_no_log_prob_tells(tmp_path):
    with fleet(tmp_path, count=2, probe=False) as (engine, servers, _, _):
        for server in servers:
            server.calls.clear()
        # as after a loading that did not end
        servers[1].held = ""
        events = engine.generate(REQUESTS, SAMPLING).events
        assert events == [
            f"rollout server {servers[1].url} had other weights than it was given: it gets them "
            "again"
        ]
        assert servers[1].held == servers[0].held
        # what it had answered does not count
        assert sum(len(server.sampled()) for server in servers) == 1.5 * len(REQUESTS)
        assert engine.generate(REQUESTS, SAMPLING).events == []


def test_a_restarted_server_fetches_the_present_weights(tmp_path):
    with fleet(tmp_path) as (engine, (server,), weights, _):
        weights["trunk"] = 3
        engine.update_weights(2)
        server.trunk, server.held = 7, ""
        result = engine.generate(REQUESTS, SAMPLING)
        assert any("had other weights" in event for event in result.events)
        check(engine, 3)


def test_a_drafter_has_only_its_buckets_fetched():
    asked = []
    store = filled({"trunk": 1, "head": 2})
    manifest = store.seal(4)

    def note(found):
        asked.append(len(found))
        return found

    server, url = BucketServer(note), FakeVllm()
    server.add(manifest, store)
    place = server.url_for(url.url, 4)
    source = arriving.NetworkSource(manifest, place)
    whole = dict(arriving.tensors_of(manifest, source))
    count = len(manifest.checksums)
    assert len(asked) == count == 8 and sum(asked) == manifest.total
    assert torch.equal(whole["layers"], torch.arange(float(LARGE)))
    asked.clear()
    alone = dict(arriving.tensors_of(manifest, source, for_drafter=True))
    assert list(alone) == ["norm", "head"] and float(alone["head"]) == 2
    assert len(asked) == len({b for p in manifest.tensors[2:] for b in manifest.buckets_of(p)}) < 8
    source.close()
    for wrong in (place.replace("/4", "/5"), place[:-3] + "x/4"):
        with pytest.raises(arriving.ArrivalError, match=r"bucket 0 of 8 did not arrive.*404"):
            arriving.NetworkSource(manifest, wrong).span(manifest.tensors[0])
    server.close()
    with pytest.raises(arriving.ArrivalError, match="did not arrive"):
        arriving.NetworkSource(manifest, place).span(manifest.tensors[0])
    store.close()
    url.close()


def test_a_server_of_another_machine_is_told_to_use_the_network(tmp_path, monkeypatch):
    with fleet(tmp_path, "memory") as (engine, _, _, _):
        monkeypatch.setattr(arriving, "this_machine", lambda: "another")
        with pytest.raises(EngineError, match=r"not on this machine.*use network"):
            engine.update_weights(2)


def test_memory_that_is_not_there_is_told(monkeypatch):
    store = filled({"trunk": 1, "head": 2})
    manifest = store.seal(1)
    place = {"kind": "memory", "machine": arriving.this_machine(), "path": store.path}
    longer = replace(manifest, total=manifest.total + 64)
    with pytest.raises(arriving.ArrivalError, match="bytes, wanted"):
        arriving.MemorySource(longer, place)
    store.close()
    with pytest.raises(arriving.ArrivalError, match="as the same user"):
        arriving.MemorySource(manifest, place)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(EngineError, match=r"no memory for 0\.00 GB.*transfer=folder"):
        filled({"trunk": 1, "head": 2})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"extension": None}, "transfer=memory needs the worker extension"),
        ({"extension": "mine.Other"}, "needs the worker extension"),
    ],
)
def test_a_server_without_the_extension_is_refused(tmp_path, change, says):
    with pytest.raises(EngineError, match=says), fleet(tmp_path, "memory", **change):
        pass


def test_settings_that_can_not_work_are_refused(tmp_path):
    arguments = (("http://a:1",), tmp_path, VOCAB)
    with pytest.raises(EngineError, match="SGLang reads folders alone"):
        RemoteSettings("sglang", *arguments, transfer="memory")
    with pytest.raises(EngineError, match="one of folder, memory, network"):
        RemoteSettings("vllm", *arguments, transfer="nccl")
