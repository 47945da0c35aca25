"""Progress without a terminal, and timers."""

from __future__ import annotations

import io

import pytest

from megatron_occ.observe import Progress, Timers, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_without_a_terminal_it_prints_plain_lines_every_five_percent(clock):
    stream = io.StringIO()
    with Progress(200, "rl", stream=stream) as bar:
        for step in range(1, 201):
            clock[0] += 2.0
            bar.update(step, {"reward": 0.51234})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 20
    assert "\r" not in stream.getvalue()
    assert lines[0] == "rl 10/200 (5%)  reward 0.512  6 min 20 s left"
    assert lines[-1].startswith("rl 200/200 (100%)")


def test_a_resumed_run_estimates_from_its_own_steps(clock):
    stream = io.StringIO()
    bar = Progress(100, "rl", initial=90, stream=stream)
    clock[0] += 10.0
    bar.update(95)
    assert stream.getvalue() == "rl 95/100 (95%)  10.0 s left\n"


def test_short_work_prints_nothing_and_long_work_begins_after_five_seconds(clock):
    stream = io.StringIO()
    with Progress(20, "import", stream=stream) as bar:
        for step in range(1, 21):
            clock[0] += 0.24
            bar.update(step)
    assert stream.getvalue() == ""
    with Progress(20, "import", stream=stream) as bar:
        for step in range(1, 21):
            clock[0] += 0.26
            bar.update(step)
    assert stream.getvalue() == "import 20/20 (100%)  0 ms left\n"


def test_the_last_step_is_always_shown(clock):
    stream = io.StringIO()
    bar = Progress(45, "rl", stream=stream)  # 45 is not a multiple of 45 // 20
    for step in range(1, 46):
        clock[0] += 1.0
        bar.update(step)
    assert stream.getvalue().splitlines()[-1].startswith("rl 45/45 (100%)")


def test_on_a_terminal_it_is_a_bar_with_the_numbers():
    stream = Terminal()
    bar = Progress(10, "rl", initial=4, stream=stream)
    bar.update(10, {"reward": 0.25})
    bar.close()
    last = stream.getvalue().split("\r")[-1]
    assert "10/10" in last
    assert "reward=0.25" in last


def test_disabled_it_prints_nothing():
    stream = Terminal()
    with Progress(10, "rl", enabled=False, stream=stream) as bar:
        bar.update(10, {"reward": 1.0})
    assert stream.getvalue() == ""


def test_timers_add_up_per_phase_and_start_again_after_pop(clock):
    timers = Timers()
    for seconds in (2.0, 3.0):
        with timers("rollout"):
            clock[0] += seconds
    with timers("train"):
        clock[0] += 7.0
    assert timers.pop() == {"time/rollout": 5.0, "time/train": 7.0}
    assert timers.pop() == {}


def test_timers_count_a_block_that_raises(clock):
    timers = Timers()

    def fail():
        with timers("reward"):
            clock[0] += 1.5
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert timers.pop() == {"time/reward": 1.5}
