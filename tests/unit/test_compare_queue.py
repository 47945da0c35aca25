"""Several runs at once: order, failures, interruption, and one process as it really is."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from megatron_occ.commands.compare import terminated_as_interrupted
from megatron_occ.compare.live import Live, last_step
from megatron_occ.compare.process import BusyError, RunProcess, run_environment
from megatron_occ.compare.queue import work_off
from megatron_occ.compare.runs import RunSpec


def specs(count):
    return [RunSpec(f"run {i}", Path(f"f{i}"), Path(f"l{i}"), "rl", (), ()) for i in range(count)]


class Fake:
    """A run that ends with ``code`` when it is looked at for the ``looks``-th time."""

    def __init__(self, code, looks):
        self.code, self.looks, self.stopped = code, looks, False

    def poll(self):
        self.looks -= 1
        return self.code if self.looks <= 0 else None

    def stop(self):
        self.stopped = True

    def last_lines(self):
        return ["what happened"]


class Machine:
    """Starts fakes, and writes down which ran together."""

    def __init__(self, codes=None, busy=()):
        self.codes, self.busy = codes or {}, busy
        self.started, self.slots, self.fakes = [], [], {}

    def __call__(self, run, slot):
        if run.title in self.busy:
            raise BusyError
        self.started.append(run.title)
        self.slots.append(slot)
        looks = 2 + len(self.started) % 3
        self.fakes[run.title] = Fake(self.codes.get(run.title, 0), looks)
        return self.fakes[run.title]


def nothing(tally, ended):
    pass


def test_runs_start_in_order_and_never_more_than_asked_for():
    machine, together, ends = Machine(), [], []

    def watch(tally, ended):
        together.append(sorted(tally.running))
        if ended is not None:
            ends.append(ended.title)

    tally = work_off(specs(7), 3, machine, watch, pause=0)
    assert machine.started == [f"run {i}" for i in range(7)]
    assert max(map(len, together)) == 3
    assert set(machine.slots) == {0, 1, 2}
    assert sorted(ends) == sorted(run.title for run in tally.finished) == machine.started
    assert tally.all_well


def test_a_failure_costs_one_run():
    tally = work_off(specs(6), 2, Machine({"run 3": 7}), nothing, pause=0)
    assert [(f.run.title, f.code, f.last_lines) for f in tally.failed] == [
        ("run 3", 7, ["what happened"])
    ]
    assert len(tally.finished) == 5 and not tally.all_well


def test_when_the_first_three_all_fail_the_others_are_not_tried():
    machine = Machine({f"run {i}": 1 for i in range(9)})
    tally = work_off(specs(9), 1, machine, nothing, pause=0)
    assert len(machine.started) == 3
    assert [run.title for run in tally.not_tried] == [f"run {i}" for i in range(3, 9)]


def test_failures_after_a_success_stop_nothing():
    machine = Machine({f"run {i}": 1 for i in range(1, 9)})
    tally = work_off(specs(9), 1, machine, nothing, pause=0)
    assert (len(tally.finished), len(tally.failed), tally.not_tried) == (1, 8, [])


def test_what_another_process_does_is_left_to_it():
    tally = work_off(specs(3), 1, Machine(busy=("run 1",)), nothing, pause=0)
    assert [run.title for run in tally.busy] == ["run 1"]
    assert len(tally.finished) == 2 and tally.all_well


def test_an_interrupted_study_stops_its_runs():
    machine = Machine()

    def interrupt(tally, ended):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work_off(specs(4), 2, machine, interrupt, pause=0)
    assert [machine.fakes[title].stopped for title in machine.started] == [True, True]


@dataclasses.dataclass(frozen=True)
class Script(RunSpec):
    """A run that is a piece of Python."""

    code: str = ""

    def words(self):
        return [sys.executable, "-c", self.code]


def script(folder, code):
    return Script("a run", folder / "run", folder / "logs" / "a.log", "rl", (), (), code=code)


def ended(process):
    for _ in range(600):
        code = process.poll()
        if code is not None:
            return code
        time.sleep(0.05)
    raise AssertionError("it does not end")


def test_a_process_has_its_environment_log_and_status(tmp_path):
    code = "import os, sys; print(os.environ['OMP_NUM_THREADS']); sys.exit('it broke')"
    run = script(tmp_path, code)
    process = RunProcess(run, run_environment(0, 3, os.environ))
    assert ended(process) == 1
    assert process.last_lines() == ["3", "it broke"]
    again = RunProcess(script(tmp_path, "print('second')"), dict(os.environ))
    assert ended(again) == 0
    # of this attempt alone, while the log has both
    assert again.last_lines() == ["second"]
    assert "it broke" in run.log.read_text()


def test_a_run_is_done_by_one_process_at_a_time(tmp_path):
    run = script(tmp_path, "import time; time.sleep(60)")
    first = RunProcess(run, dict(os.environ))
    with pytest.raises(BusyError):
        RunProcess(run, dict(os.environ))
    first.stop()
    done = RunProcess(script(tmp_path, ""), dict(os.environ))
    assert ended(done) == 0


def test_a_run_is_no_rank_of_the_job_that_started_it_and_takes_a_device_of_its_own():
    job = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "1", "HOME": "/h"}
    assert run_environment(0, 2, job) == {"HOME": "/h", "OMP_NUM_THREADS": "2"}
    gpus = {"CUDA_VISIBLE_DEVICES": "4,5,7"}
    seen = [run_environment(slot, 1, gpus)["CUDA_VISIBLE_DEVICES"] for slot in range(4)]
    assert seen == ["4", "5", "7", "4"]
    # no device is none, not all of them
    assert run_environment(0, 1, {"CUDA_VISIBLE_DEVICES": ""})["CUDA_VISIBLE_DEVICES"] == ""


def test_without_a_terminal_there_is_a_line_for_each_run_that_ends():
    stream = io.StringIO()
    machine = Machine({"run 1": 1})
    work_off(specs(3), 1, machine, Live(3, 10, stream), pause=0)
    assert stream.getvalue().splitlines() == [
        "1/3 run 0: finished",
        "2/3 run 1: FAILED",
        "3/3 run 2: finished",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_a_line_says_how_far_the_runs_are(tmp_path):
    run = script(tmp_path, "")
    run.folder.mkdir()
    lines = [f'{{"phase": "rl", "step": {step}}}\n' for step in (1, 2, 5)]
    (run.folder / "metrics.jsonl").write_text("".join(lines) + '{"phase": "rl", "st')
    assert last_step(run.folder) == 5
    assert last_step(tmp_path) == 0
    stream = Terminal()
    work_off([run], 1, lambda *_: Fake(0, 3), Live(1, 20, stream), pause=0)
    assert "0/1  a run 5/20" in stream.getvalue()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_of_slurm_ends_a_study_as_ctrl_c_does(number):
    before = signal.getsignal(number)

    def be_terminated():
        with terminated_as_interrupted():
            os.kill(os.getpid(), number)
            time.sleep(5)

    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        be_terminated()
    assert signal.getsignal(number) is before
