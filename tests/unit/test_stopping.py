"""A run that is asked to stop loses nothing, whatever it was at."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from megatron_occ.rl.evaluation import Validation
from megatron_occ.rl.stopping import StopRequested, StopSignal
from megatron_occ.rl.supervision import Supervision
from tests.unit.fakes import FakeActor
from tests.unit.rl_setup import make_trainer, rl_config, varied
from tests.unit.test_pretraining import make_trainer as make_pretrainer

SETTINGS = ("rl.steps=4", "rl.save_every=3", "rl.validation.every=2", "mtp.preset=occ")
CLOCKS = ("time/", "rollout/tokens_per_second")


class Attempt:
    """A trainer of the same run each time; what it saves is in ``saved`` by step.

    ``moment`` names the call, and ``number`` which of its calls, in which the signal comes.
    """

    def __init__(self, saved, moment=None, number=1, signals=1):
        self.saved, self.moment, self.left, self.signals = saved, moment, number, signals
        self.stop, self.actor = StopSignal(), FakeActor(seed=2)
        self.trainer = make_trainer(
            rl_config(*SETTINGS),
            self.actor,
            varied,
            validate=self._validate,
            save=self._save,
            supervision=Supervision(stop=self.stop),
        )
        own = self.actor.generate, self.actor.finish_training_step
        self.actor.generate = lambda *given: self._hit("rollouts", own[0](*given))
        self.actor.finish_training_step = lambda *given: self._hit("update", own[1](*given))
        if saved:
            state, self.actor.model, self.actor.version = copy.deepcopy(saved[max(saved)])
            self.trainer.load_state_dict(state)

    def run(self):
        with self.stop.installed(tells=False):
            self.trainer.fit()
        return self

    @property
    def lines(self):
        lines = self.trainer.recorder.lines
        return [
            (phase, step, {k: v for k, v in metrics.items() if not k.startswith(CLOCKS)})
            for phase, step, metrics in lines
        ]

    def _validate(self):
        return self._hit("validation", Validation({"avg@1": 0.0}, []))

    def _save(self, step):
        state = self.trainer.state_dict(), self.actor.model, self.actor.version
        self.saved[step] = copy.deepcopy(state)
        self._hit("save", None)

    def _hit(self, name, result):
        if name == self.moment:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)
        return result


@pytest.mark.parametrize(
    ("moment", "number", "done"),
    [
        ("rollouts", 1, 0),
        ("rollouts", 3, 2),
        ("update", 3, 2),
        ("validation", 1, 0),
        ("validation", 2, 2),
        ("validation", 3, 4),
        ("save", 1, 3),
    ],
)
def test_a_stopped_and_resumed_run_equals_an_undisturbed_one(moment, number, done):
    whole, saved = {}, {}
    expected = Attempt(whole).run()
    cut = Attempt(saved, moment, number)
    with pytest.raises(StopRequested):
        cut.run()
    assert cut.trainer.step == done
    assert list(saved)[-1:] == ([done] if done else [])
    assert cut.actor.aborted
    assert cut.trainer.recorder.events[-1] == (
        done,
        "asked to stop by SIGTERM: ended after this step",
    )
    resumed = Attempt(saved).run()
    # a run without a checkpoint begins anew, and its log with it
    assert (cut.lines if done else []) + resumed.lines == expected.lines
    torch.testing.assert_close(saved[4][0], whole[4][0], rtol=0, atol=0)
    for name, value in saved[4][1].state_dict().items():
        assert torch.equal(value, whole[4][1].state_dict()[name]), name


def test_a_signal_in_the_last_save_lets_the_run_finish():
    saved = {}
    Attempt(saved, "save", 2).run()
    assert list(saved) == [3, 4]


def test_pretraining_saves_the_step_under_way():
    stop = StopSignal()
    trainer, logger, saved = make_pretrainer("save_every=5", supervision=Supervision(stop=stop))
    own = trainer.run_step

    def run_step():
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return own()

    trainer.run_step = run_step
    with stop.installed(tells=False), pytest.raises(StopRequested):
        trainer.fit()
    assert (trainer.step, saved) == (3, [3])
    assert logger.events == [(3, "asked to stop by SIGUSR1: ended after this step")]


SPANS = ("time/", "tokens_per_second")


def measured_every_second_step(stop, at=None):
    """A pretraining loop, to which the signal comes in one of its validations."""
    supervision = Supervision(stop=stop)
    trainer, logger, saved = make_pretrainer(
        "validate_every=2", "save_every=4", "log_every=2", rates=[], supervision=supervision
    )
    seen, aborted = [], threading.Event()

    def validate():
        seen.append(trainer.step)
        if trainer.step == at:
            os.kill(os.getpid(), signal.SIGTERM)
            assert aborted.wait(10)
            return Validation({"pass@1": 0.0}, ["cut short"])
        return Validation({"pass@1": trainer.step / 100}, [])

    trainer.validate, trainer.abort = validate, aborted.set
    return trainer, logger, saved, seen


@pytest.mark.parametrize("at", [2, 4, 8])
def test_a_validation_of_pretraining_is_cut_short_and_made_again(at):
    def lines(logger):
        return [
            (step, {k: v for k, v in metrics.items() if not k.startswith(SPANS)})
            for _, step, metrics in logger.lines
        ]

    whole, expected, all_saved, _ = measured_every_second_step(StopSignal())
    whole.fit()
    stop = StopSignal()
    cut, before, saved, _ = measured_every_second_step(stop, at)
    with stop.installed(tells=False), pytest.raises(StopRequested):
        cut.fit()
    assert (cut.step, saved[-1]) == (at, at)
    assert before.events == [(at, "asked to stop by SIGTERM: ended after this step")]
    resumed, after, saved_again, seen = measured_every_second_step(StopSignal())
    resumed.actor = cut.actor
    resumed.load_state_dict(copy.deepcopy(cut.state_dict()))
    resumed.fit()
    assert seen == [step for step in (2, 4, 6, 8) if step >= at]
    assert lines(before) + lines(after) == lines(expected)
    # with the step's own checkpoint again, now that it is measured
    assert saved_again == sorted({at, *(step for step in all_saved if step >= at)})
    assert not resumed.validation_is_due


def test_before_a_trainer_watches_the_signal_ends_what_goes_on():
    stop, before = StopSignal(), signal.getsignal(signal.SIGTERM)

    def work():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    with pytest.raises(StopRequested), stop.installed(tells=False):
        work()
    assert signal.getsignal(signal.SIGTERM) == before


SECOND = """
import multiprocessing, os, signal, time
from megatron_occ.rl.stopping import StopSignal
stop = StopSignal()
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
child.start()
with stop.installed(tells=True), stop.watched(lambda: None):
    print(child.pid, flush=True)
    while True:
        time.sleep(1)
"""


def test_a_second_signal_ends_the_process_and_its_children_at_once():
    command = [sys.executable, "-c", SECOND]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        child = int(process.stdout.readline())
        process.terminate()
        assert "SIGTERM: the run ends after the update under way" in process.stderr.readline()
        assert process.poll() is None
        process.terminate()
        assert process.wait(10) == 128 + signal.SIGTERM
        # until the kernel has taken it away
        deadline = time.monotonic() + 10
        while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
            time.sleep(0.01)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
