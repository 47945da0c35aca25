"""A rank that waits too long says who is missing, and ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_occ.rl.watchdog import Watchdog, describe


class FakeStore(dict):
    """A store in one process; with ``hangs`` it never answers."""

    hangs = False

    def set(self, key, value):
        self[key] = value.encode()

    def get(self, key):
        return self[key]

    def check(self, keys):
        while self.hangs:
            time.sleep(0.1)
        return all(key in self for key in keys)


@pytest.mark.parametrize(
    ("places", "told"),
    [
        (
            {0: "train of step 3", 1: "rollout of step 3", 2: "train of step 3", 3: "start-up"},
            "not there: rank 1 in rollout of step 3; rank 3 in start-up",
        ),
        ({0: "train of step 3"}, "all ranks are there"),
        (
            {0: "train of step 3", **{rank: "save of step 2" for rank in range(1, 12)}},
            "not there: ranks 1, 2, 3, 4, 5, 6, 7, 8 and 3 more in save of step 2",
        ),
    ],
)
def test_the_message_names_ranks_and_places(places, told):
    text = describe(0, "train", 3, 61.4, 60.0, places)
    first = "rank 0 has been in train of step 3 for 61 s (phase_limits.train=60); "
    assert text == first + told


def test_a_store_that_does_not_answer_is_rank_0s():
    assert "rank 0, which keeps the places" in describe(2, "train", 3, 61.4, 60.0, None)


@pytest.mark.parametrize("hangs", [False, True])
def test_a_phase_beyond_its_limit_ends_the_rank(capfd, monkeypatch, hangs):
    monkeypatch.setattr("megatron_occ.rl.watchdog._POLL", 0.02)
    monkeypatch.setattr("megatron_occ.rl.watchdog._ANSWER", 0.2)
    ended, store = threading.Event(), FakeStore()
    store.hangs = hangs
    other = Watchdog(store, 1, 2, {"rollout": 1e9})
    dog = Watchdog(store, 0, 2, {"rollout": None, "train": 0.1}, end=ended.set)
    for each in (other, dog):
        each.begin_step(4)
    with dog.phase("rollout"):
        time.sleep(0.3)
    assert not ended.is_set()
    with other.phase("rollout"), dog.phase("train"):
        assert ended.wait(10)
    told = capfd.readouterr().err
    assert "megatron-occ: error: rank 0 has been in train of step 4 for 0 s" in told
    assert ("not there: rank 1 in rollout of step 4" in told) is not hangs
    # where this rank stands, line by line
    assert "test_watchdog.py" in told
    other.close()


def test_an_inner_phase_has_its_own_limit_and_the_outer_one_goes_on_after_it(monkeypatch):
    monkeypatch.setattr("megatron_occ.rl.watchdog._POLL", 0.02)
    ended = threading.Event()
    dog = Watchdog(None, 0, 1, {"inner": None, "outer": 0.4}, end=ended.set)
    with dog.phase("outer"):
        with dog.phase("inner"):
            assert not ended.wait(0.2)
        assert ended.wait(10)


def test_between_phases_ranks_wait_too(monkeypatch):
    monkeypatch.setattr("megatron_occ.rl.watchdog._POLL", 0.02)
    ended = threading.Event()
    dog = Watchdog(None, 0, 1, {"train": None, "other": 0.2}, end=ended.set)
    # start-up has no limit
    assert not ended.wait(0.4)
    dog.begin_step(1)
    with dog.phase("train"):
        assert not ended.wait(0.4)
    assert ended.wait(10)


STOPPED = """
import os, signal, sys, threading, time
from megatron_occ.rl import watchdog
watchdog._POLL, watchdog._LATE = 0.02, 0.3
dog = watchdog.Watchdog(None, 0, 1, {"train": 1.0})
dog.begin_step(1)
with dog.phase("train"):
    print("in", flush=True)
    sys.stdin.readline()
    if "hang" in sys.argv:
        time.sleep(60)
"""


@pytest.mark.parametrize(("words", "status"), [((), 0), (("hang",), 124)])
def test_the_time_in_which_the_process_was_stopped_does_not_count(words, status):
    command = [sys.executable, "-c", STOPPED, *words]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout.readline() == "in\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        process.send_signal(signal.SIGCONT)
        process.communicate("go on\n", timeout=30)
    assert process.returncode == status
