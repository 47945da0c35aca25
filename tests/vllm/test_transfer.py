"""Weights that reach a real vLLM out of the trainer's memory, without a folder."""

from __future__ import annotations

import pytest

from megatron_occ.mcore.memory_export import MemoryExport
from megatron_occ.rl import trainer
from megatron_occ.rollout.remote.arrival import TRIES
from megatron_occ.rollout.remote.bucket_server import BucketServer
from megatron_occ.rollout.remote.store import Store
from tests.e2e.conftest import metrics, read_lines
from tests.vllm.test_vllm import at, events

WAYS = ("memory", "network")


def over(way, *servers):
    """Overrides that name the servers and the way to them."""
    return [*at(*servers), f"rl.rollout.server.transfer={way}"]


def small_buckets(monkeypatch):
    """Many of them, and several to a tensor."""
    make_room = MemoryExport._make_room

    def make_small_room(self, plan):
        self._bucket = 10_000
        make_room(self, plan)

    monkeypatch.setattr(MemoryExport, "_make_room", make_small_room)


@pytest.mark.parametrize("way", WAYS)
def test_steps_with_new_weights_after_each(run, trained, servers, monkeypatch, way):
    small_buckets(monkeypatch)
    folder = run("rl", "run", f"rl.init_from={trained[0]}", "rl.steps=4", *over(way, *servers))
    lines = metrics(folder, "rl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    # as with a folder
    assert max(line["logprob_gap/mean"] for line in lines) < 1e-5
    assert max(line["logprob_gap/max"] for line in lines) < 1e-3
    assert min(line["draft/acceptance_length"] for line in lines) > 1.2
    times = [x for x in read_lines(folder / "metrics.jsonl") if x["phase"] == "rl"]
    assert all(0 < x["time/update_weights"] < x["time/rollout"] for x in times if "time/step" in x)
    assert not (folder / "rollout_weights").exists()


@pytest.mark.parametrize(
    ("part", "says"), [("trunk", "serves old"), ("head", "drafts with old weights of the head")]
)
def test_an_update_that_leaves_out_a_part_is_refused(
    run, trained, servers, monkeypatch, part, says
):
    put, first = Store.put, {}

    def put_partly(self, name, tensor):
        if ("mtp" in name) == (part == "head"):
            tensor = first.setdefault(name, tensor.clone())
        put(self, name, tensor)

    monkeypatch.setattr(Store, "put", put_partly)
    # whose head moves with the first step
    start = (f"rl.init_from={trained[0]}", "mtp.preset=detach")
    with pytest.raises(SystemExit, match=f"{servers[0].url} {says}"):
        run("rl", "run", *start, *over("memory", servers[0]))
    assert len(metrics(run.folder / "run", "rl")) == 1


class Damage:
    """Turns a bit of so many buckets, from one of them on."""

    def __init__(self, first, count):
        self.first, self.count, self.seen = first, count, 0

    def __call__(self, found):
        self.seen += 1
        if not self.first <= self.seen < self.first + self.count:
            return found
        spoilt = bytearray(found)
        spoilt[len(spoilt) // 2] ^= 4
        return memoryview(spoilt)


def damaging(monkeypatch, damage):
    start = BucketServer.__init__
    monkeypatch.setattr(BucketServer, "__init__", lambda self: start(self, damage))


def test_a_damaged_bucket_is_asked_for_again(run, trained, servers, monkeypatch):
    small_buckets(monkeypatch)
    damage = Damage(5, 2)
    damaging(monkeypatch, damage)
    folder = run("rl", "run", f"rl.init_from={trained[0]}", *over("network", servers[0]))
    assert damage.seen > 7
    assert max(line["logprob_gap/mean"] for line in metrics(folder, "rl")) < 1e-5


def test_buckets_that_stay_damaged_are_refused_and_the_next_run_is_served(
    run, trained, servers, monkeypatch
):
    small_buckets(monkeypatch)
    with monkeypatch.context() as patch:
        # in the middle of the trunk
        damaging(patch, Damage(10, 10 * TRIES))
        once = "rl.rollout.server.retries=0"
        with pytest.raises(SystemExit, match="checksum"):
            run("rl", "bad", f"rl.init_from={trained[0]}", once, *over("network", servers[0]))
    folder = run("rl", "good", f"rl.init_from={trained[0]}", *over("network", servers[0]))
    assert max(line["logprob_gap/mean"] for line in metrics(folder, "rl")) < 1e-5


class KillInTheMiddle:
    """Kills and starts a server again when it is asked for a bucket in a later update.

    Args:
        server: to kill.
        buckets: after so many, of all updates together.
    """

    def __init__(self, server, buckets):
        self.server, self.left = server, buckets

    def __call__(self, found):
        self.left -= 1
        if not self.left:
            self.server.kill()
            self.server.start()
        return found


def test_a_server_that_is_killed_while_it_fetches_comes_back_whole(
    run, trained, servers, monkeypatch
):
    small_buckets(monkeypatch)
    step, server = trainer.GRPOTrainer.run_step, servers[0]
    # in the second update: one takes about 80 for each of two servers
    kill = KillInTheMiddle(server, 250)
    damaging(monkeypatch, kill)

    def step_with_both(self):
        if self.step == 2:
            server.wait()
        return step(self)

    monkeypatch.setattr(trainer.GRPOTrainer, "run_step", step_with_both)
    folder = run(
        "rl", "run", f"rl.init_from={trained[0]}", "rl.steps=3", *over("network", *servers)
    )
    assert kill.left < 0
    assert max(line["logprob_gap/mean"] for line in metrics(folder, "rl")) < 1e-5
    told = [text.split(f"{server.url} ")[1] for text in events(folder) if server.url in text]
    assert told[0].startswith("is left out: lost in an update of its weights")
    assert "is back" in told
