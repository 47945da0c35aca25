"""The profiler's window: its steps, its ranks, its table, and that it costs nothing when off."""

from __future__ import annotations

import gzip
import json
import logging
from dataclasses import dataclass

import pytest
import torch

from megatron_occ.config import ConfigError, check_resumed, load_config, validate
from megatron_occ.observe.progress import Timers
from megatron_occ.rl.profiling import StepProfiler, operator_table
from tests.unit.fake_layouts import FakeLayout
from tests.unit.rl_setup import four_updates


def profiler(tmp_path, *overrides, phase="rl", rank=0):
    config = load_config([], [f"run_dir={tmp_path}", *overrides])
    return StepProfiler(config, phase, FakeLayout(rank, 2))


def run(profiler, steps, timers=None):
    for step in steps:
        with profiler.step(step, timers):
            torch.ones(3) * step


def written(tmp_path):
    return sorted(path.name for path in (tmp_path / "profile").glob("*"))


def annotations(tmp_path):
    (path,) = (tmp_path / "profile").glob("*.json.gz")
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "user_annotation"]


def test_the_window_alone_is_traced_with_its_steps_and_their_parts(tmp_path):
    timers = Timers()
    traced = profiler(tmp_path, "profile.steps=[2,3]")
    for step in (1, 2, 3, 4):
        with traced.step(step, timers), timers("train"):
            torch.ones(2, 2) @ torch.ones(2, 2)
    assert annotations(tmp_path) == ["rl step 2", "train", "rl step 3", "train"]
    assert written(tmp_path) == ["rl_steps_2_to_3_rank_0.json.gz", "rl_steps_2_to_3_rank_0.txt"]
    table = (tmp_path / "profile" / "rl_steps_2_to_3_rank_0.txt").read_text()
    (row,) = [line for line in table.splitlines() if line.endswith(" aten::mm")]
    assert row.split()[2] == "2"  # calls: one in each step
    assert timers.pop().keys() == {"time/train"}


def test_other_ranks_and_phases_write_nothing(tmp_path):
    run(profiler(tmp_path, "profile.steps=[1,2]", rank=1), [1, 2])
    run(profiler(tmp_path, "profile.steps=[1,2]", phase="pretrain"), [1, 2])
    assert written(tmp_path) == []
    run(profiler(tmp_path, "profile.steps=[1,2]", "profile.ranks=[1]", rank=1), [1, 2])
    assert written(tmp_path)[0] == "rl_steps_1_to_2_rank_1.json.gz"


def test_without_a_window_the_profiler_is_never_touched(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("profiler used")

    monkeypatch.setattr(torch.profiler, "profile", refuse)
    monkeypatch.setattr(torch.profiler, "record_function", refuse)
    run(profiler(tmp_path), range(1, 4), Timers())
    run(profiler(tmp_path, "profile.steps=[9,9]"), range(1, 4), Timers())


def test_a_run_resumed_inside_the_window_traces_the_rest(tmp_path):
    run(profiler(tmp_path, "profile.steps=[2,5]"), [4, 5, 6])
    assert written(tmp_path)[0] == "rl_steps_4_to_5_rank_0.json.gz"


def test_a_phase_that_ends_early_ends_the_window(tmp_path, caplog):
    cut = profiler(tmp_path, "profile.steps=[2,5]")
    run(cut, [1, 2, 3])
    cut.close(3)
    assert written(tmp_path)[0] == "rl_steps_2_to_3_rank_0.json.gz"
    with caplog.at_level(logging.WARNING):
        profiler(tmp_path, "profile.steps=[7,8]").close(3)
    assert "profile.steps=[7, 8]: no trace, rl ended at step 3" in caplog.text


def test_a_profiler_that_fails_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    (tmp_path / "profile").write_text("a file in the way")
    run(profiler(tmp_path, "profile.steps=[1,1]"), [1, 2])
    assert "the trace can't be written" in caplog.text

    def broken(**kwargs):
        raise RuntimeError("busy")

    monkeypatch.setattr(torch.profiler, "profile", broken)
    run(profiler(tmp_path, "profile.steps=[1,1]"), [1, 2])
    assert "the profiler does not start: busy" in caplog.text


def test_the_trainer_traces_its_steps(tmp_path):
    trainer, _ = four_updates("rl.steps=2", "profile.steps=[2,2]", f"run_dir={tmp_path}")
    trainer.fit()
    parts = ["rollout", "update_weights", "reward", "logprobs", "train"]
    assert annotations(tmp_path) == ["rl step 2", *parts]


@dataclass
class Average:
    key: str
    count: int
    self_cpu_time_total: float
    self_device_time_total: float = 0.0
    is_user_annotation: bool = False


def test_the_table_is_sorted_by_the_operators_own_time_on_the_device_if_there_is_one():
    events = [
        Average("train", 1, 9000.0, is_user_annotation=True),
        Average("small", 3, 1000.0, 250.0),
        Average("large", 2, 500.0, 750.0),
    ]
    lines = [line.split() for line in operator_table(events).splitlines()]
    assert lines[0] == ["device", "ms", "host", "ms", "share", "calls", "operator"]
    assert lines[1] == ["0.75", "0.50", "75.0%", "2", "large"]
    assert lines[2] == ["0.25", "1.00", "25.0%", "3", "small"]
    for event in events:
        event.self_device_time_total = 0.0
    lines = [line.split() for line in operator_table(events).splitlines()]
    assert lines[1] == ["1.00", "66.7%", "3", "small"]
    assert "1.50 in all, by 2 operators" in operator_table(events)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["profile.steps=[3]"], "must be the first and the last step"),
        (["profile.steps=[5,3]"], "must be the first and the last step"),
        (["profile.steps=[8,11]", "rl.steps=10"], r"ends at step 10 \(rl.steps\)"),
        (["profile.steps=[1,2]", "profile.ranks=[]"], "no rank would write"),
        (["profile.steps=[1,2]", "profile.ranks=[0,4]"], "there are ranks 0 to 0. Leave out 4"),
        (["profile.ranks=[0,1]"], "has no effect with profile.steps=\\[\\]"),
        (
            ["profile.phase=pretrain", "profile.steps=[5,9]", "pretrain.steps=8"],
            r"ends at step 8 \(pretrain.steps\)",
        ),
    ],
)
def test_a_window_that_is_never_reached_is_refused(overrides, text):
    with pytest.raises(ConfigError, match=text):
        validate(load_config([], overrides), command="rl")


def test_a_window_of_a_phase_that_does_not_run_is_left_alone():
    config = load_config([], ["profile.steps=[90,99]", "rl.steps=10"])
    validate(config, command="pretrain")


def test_a_resumed_run_refuses_a_new_window_that_is_over():
    before, done = load_config(), {"rl": 10, "pretrain": 0}
    past = load_config([], ["profile.steps=[10,12]"])
    with pytest.raises(ConfigError, match="10 steps are done"):
        check_resumed(before, past, done=done)
    ahead = load_config([], ["profile.steps=[11,12]"])
    assert check_resumed(before, ahead, done=done) == ["profile.steps was [], is [11, 12]"]
    # its own window is no reason to refuse a run
    assert check_resumed(past, past, done=done) == []
