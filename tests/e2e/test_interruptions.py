"""Killed and stopped runs lose nothing: a part of what tools/interruptions.py does."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from tests.e2e.conftest import ROOT, TINY, read_lines
from tools.interruptions import OVERRIDES, Job, children, compare_interrupted, lines, session

FEW = ("pretrain.steps=10", "rl.steps=6")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Of two ranks; the first test does the undisturbed run."""
    folder = tmp_path_factory.mktemp("job")
    return Job(folder, 2, TINY, (*OVERRIDES, *FEW, "parallel.tensor=2"))


@pytest.mark.parametrize(("kind", "moments"), [("KILL", ("checkpoint",)), ("TERM", ("rl",))])
def test_an_interrupted_run_equals_an_undisturbed_one(job, capsys, kind, moments):
    assert compare_interrupted(job, moments, kind, seed=1) == []
    assert len(capsys.readouterr().out.splitlines()) > len(moments)
    if kind == "TERM":
        stopped = [x for x in read_lines(job.folder / "cut_TERM" / "metrics.jsonl") if "kind" in x]
        assert any(line["kind"] == "stopped" for line in stopped)


def start(folder, *arguments, **options):
    """A run in one process, with its output in a file."""
    command = [sys.executable, "-m", "megatron_occ", "rl", "--config", str(TINY)]
    command += [f"run_dir={folder}", *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, **options)


@contextmanager
def endless(folder, *arguments, **options):
    """A run that ends by a signal, or with the test."""
    more = ("pretrain.steps=100000", "pretrain.log_every=1", *arguments)
    with start(folder, *more, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def left_running(leader):
    """Processes of a session that do not end within ten seconds."""
    deadline = time.monotonic() + 10
    while session(leader) and time.monotonic() < deadline:
        time.sleep(0.1)
    return session(leader)


def wait_for_steps(folder, process):
    while process.poll() is None and not lines(folder):
        time.sleep(0.05)
    assert process.poll() is None


def test_sigterm_ends_with_a_checkpoint_a_sentence_and_nothing_left_running(tmp_path):
    folder = tmp_path / "run"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with endless(folder, "pretrain.save_every=5", **pipes) as process:
        wait_for_steps(folder, process)
        # a second one, fresh or resumed, is refused, and the first goes on
        for more in ((), ("--resume",)):
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            second = start(folder, "pretrain.steps=100000", *more, **pipes)
            _, told = second.communicate(timeout=120)
            assert second.returncode == 1
            assert f"process {process.pid} on " in told
            assert "is writing to it" in told
        process.send_signal(signal.SIGUSR1)
        # until the last process that holds the pipe has ended
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 75
    assert left_running(process.pid) == []
    step = lines(folder)[-1]["step"]
    newest = folder / "checkpoints" / "pretrain" / f"step_{step:06d}"
    assert f"stopped as asked: the same command with --resume goes on from {newest}" in output
    assert (newest / "checksums.json").is_file()


def test_a_killed_run_leaves_no_process(tmp_path):
    folder = tmp_path / "run"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with endless(folder, "pretrain.save_every=1", **quiet) as process:
        while process.poll() is None and not any(folder.glob("checkpoints/*/step_*[0-9]")):
            time.sleep(0.05)
        assert children(process.pid)
        process.kill()
        process.wait()
    assert left_running(process.pid) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB; its tests need the right to mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_told_and_leaves_whole_checkpoints(small_disk):
    folder = small_disk / "run"
    more = ("pretrain.steps=100", "pretrain.save_every=10", "keep_checkpoints=20")
    process = start(folder, *more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    told = output.splitlines()[-1]
    assert told.startswith("megatron-occ: error: ")
    assert "could not be written: " in told
    assert "MB were free): the same command with --resume goes on from " in told
    assert "Traceback" not in output
    assert not list(folder.glob("checkpoints/*/*.tmp"))
    # with fewer of them there is room, and the run goes on
    for old in sorted(folder.glob("checkpoints/pretrain/step_*"))[:-1]:
        shutil.rmtree(old)
    last = start(folder, *more[:2], "keep_checkpoints=1", "--resume", stdout=subprocess.PIPE)
    last.communicate(timeout=200)
    assert last.returncode == 0


def test_a_rank_that_hangs_is_named_by_the_others(tmp_path):
    limits = [f"phase_limits.{name}=5" for name in ("pretrain", "other", "save")]
    more = ("parallel.tensor=2", "pretrain.steps=100000", "pretrain.log_every=1", *limits)
    job = Job(tmp_path, 2, TINY, more)
    process = job.start("run")
    try:
        wait_for_steps(tmp_path / "run", process)
        os.kill(children(process.pid)[1], signal.SIGSTOP)
        assert process.wait(120) != 0
    finally:
        for left in session(process.pid):
            os.kill(left, signal.SIGKILL)
    output = (tmp_path / "run.log").read_text()
    assert re.search(
        r"rank 0 has been in (pretrain|other|save) of step \d+ for \d+ s \(phase_limits", output
    )
