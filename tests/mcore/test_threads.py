"""Threads of the CPU follow the model's size and the machine's load."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from megatron_occ.config import load_config
from megatron_occ.mcore.cpu import load, threads
from megatron_occ.mcore.cpu.load import Sample, cores, others_cores
from megatron_occ.mcore.cpu.threads import GRAIN, Threads, choose_threads, products

STAT = """cpu  100 0 100 1000 0 0 0 0 0 0
cpu0 {0} 0 50 500 20 0 0 10 7 0
cpu1 50 0 50 500 0 0 0 0 0 0
cpu2 900 0 0 0 0 0 0 0 0 0
intr 5
"""


@pytest.fixture(autouse=True)
def same_number_afterwards():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def fake_proc(tmp_path, user, children=()):
    task = tmp_path / "self" / "task" / "1"
    task.mkdir(parents=True, exist_ok=True)
    (tmp_path / "stat").write_text(STAT.format(user))
    (task / "children").write_text(" ".join(str(pid) for pid, _ in children))
    for pid, ticks in children:
        (tmp_path / str(pid)).mkdir(exist_ok=True)
        text = f"{pid} (a name) S {' '.join(['0'] * 10)} {ticks} 5 0"
        (tmp_path / str(pid) / "stat").write_text(text)
    return tmp_path


def test_a_sample_counts_the_processors_that_may_be_used(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "processors", lambda: [0, 1])
    tick = os.sysconf("SC_CLK_TCK")
    # guest time, the 7, is part of user time; waiting for a disk is idle
    first = Sample.now(fake_proc(tmp_path, 50))
    assert first.busy == pytest.approx((50 + 50 + 10 + 50 + 50) / tick)
    second = Sample.now(fake_proc(tmp_path, 350, children=[(7, 95)]))
    assert second.busy - first.busy == pytest.approx(300 / tick)
    assert second.own - first.own == pytest.approx(100 / tick, abs=0.05)


def test_others_are_what_is_busy_and_not_ours():
    assert others_cores(Sample(10.0, 100.0, 50.0), Sample(14.0, 107.0, 54.0)) == 0.75
    assert others_cores(Sample(10.0, 100.0, 50.0), Sample(14.0, 101.0, 54.0)) == 0.0


def test_a_system_that_does_not_tell_changes_nothing(tmp_path):
    assert Sample.now(tmp_path / "nowhere") is None
    silent = Threads(4, 4, adapts=True, sample=lambda: None)
    assert (silent.follow(), silent.number) == (None, 4)


def test_a_containers_quota_counts(tmp_path):
    own = len(load.processors())
    assert cores(tmp_path) == own
    for text, expected in (
        ("max 100000", own),
        ("50000 100000", 1),
        ("150000 100000", min(own, 2)),
    ):
        (tmp_path / "cpu.max").write_text(text)
        assert cores(tmp_path) == expected


class Machine:
    """Samples of a machine on which other processes keep ``others`` processors busy."""

    def __init__(self):
        self.time, self.others, self.busy = 0.0, 0.0, 0.0

    def __call__(self):
        return Sample(self.time, self.busy, 0.0)

    def passes(self, seconds):
        self.time += seconds
        self.busy += seconds * self.others


def test_a_thread_less_at_once_and_more_again_after_a_while():
    machine = Machine()
    chosen = Threads(4, 4, adapts=True, sample=machine)

    def follow(others, seconds=2.0):
        machine.others = others
        machine.passes(seconds)
        return chosen.follow(), chosen.number

    assert follow(0.4) == (None, 4)
    told, number = follow(0.6)
    assert number == torch.get_num_threads() == 3
    assert told.startswith("3 threads from here: other processes keep 0.6 of 4 processors busy")
    assert follow(3.9)[1] == 1
    assert follow(9.0) == (None, 1)
    # too short to say anything: the next one counts both
    assert follow(0.0, 0.5) == (None, 1)
    assert [follow(0.0)[1] for _ in range(3)] == [1, 1, 4]
    assert torch.get_num_threads() == 4
    # a lull of one step is none
    assert [follow(others)[1] for others in (2.0, 0.0, 2.0, 0.0, 0.0)] == [2] * 5


def test_one_thread_has_nothing_to_follow():
    machine = Machine()
    chosen = Threads(1, 4, adapts=True, sample=machine)
    machine.others = 4.0
    machine.passes(5.0)
    assert (chosen.follow(), chosen.number) == (None, 1)


def test_the_size_of_the_widest_product_bounds_the_number(monkeypatch):
    config = load_config([], ["pretrain.micro_batch_size=2", "pretrain.sequence_length=10"])
    config.model.hidden_size, config.model.ffn_hidden_size = 8, 100
    config.rl.micro_batch_size, config.rl.rollout.max_response_length = 3, 5
    assert products(config) == 20 * 8 * 100
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "cores", lambda: 8)
    torch.set_num_threads(8)
    assert choose_threads(config, world_size=1).number == 1
    config.model.ffn_hidden_size = 3 * GRAIN // (20 * 8)
    torch.set_num_threads(8)
    assert choose_threads(config, world_size=1).number == 3
    config.model.ffn_hidden_size *= 100
    torch.set_num_threads(8)
    assert choose_threads(config, world_size=1).number == 8
    torch.set_num_threads(8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    shared = choose_threads(config, world_size=16)
    assert (shared.number, torch.get_num_threads(), shared.follow()) == (2, 2, None)


def test_omp_num_threads_wins(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(3)
    chosen = choose_threads(load_config([], []), world_size=1)
    assert (chosen.number, torch.get_num_threads(), chosen.follow()) == (3, 3, None)


def test_a_busy_processor_is_seen_on_this_machine():
    """Not how busy: other processes come and go."""
    before = Sample.now()
    if before is None:
        pytest.skip("this system does not tell")
    busy = "import time; end = time.monotonic() + 1.0\nwhile time.monotonic() < end: pass"
    with subprocess.Popen([sys.executable, "-c", busy]) as process:
        while process.poll() is None:
            now = Sample.now()
    # as a child that is still there it is ours
    assert now.own - before.own > 0.05
    assert now.busy - before.busy > 0.05
