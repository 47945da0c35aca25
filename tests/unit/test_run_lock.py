"""One writer a run folder, whatever becomes of the one before."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from megatron_occ.commands import run_lock
from megatron_occ.commands.configuration import check_run_folder
from megatron_occ.commands.run_lock import LOCK_FILE, locked
from megatron_occ.config import ConfigError

HOLDER = """
import sys, time
from pathlib import Path
from megatron_occ.commands.run_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of ``tmp_path / "run"``."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_writer_is_refused_and_told_by_whom(tmp_path, holder):
    run = tmp_path / "run"
    message = rf"run_dir={run}: process {holder.pid} on \S+ since .* is writing to it"
    with pytest.raises(ConfigError, match=message), locked(run):
        pytest.fail("two writers")
    assert [path.name for path in run.iterdir()] == [LOCK_FILE]
    assert f"process {holder.pid} " in (run / LOCK_FILE).read_text()


def test_a_killed_writer_holds_nothing(tmp_path, holder):
    run = tmp_path / "run"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (run / LOCK_FILE).is_file()
    # what it left is no run, and no reason to ask for --resume
    check_run_folder(run, resume=False)
    with pytest.raises(ConfigError, match="holds no run"):
        check_run_folder(run, resume=True)
    with locked(run):
        assert f"process {holder.pid} " not in (run / LOCK_FILE).read_text()


def test_children_of_the_holder_do_not_hold_it(tmp_path):
    run = tmp_path / "run"
    (run / "content").mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    ) as child:
        with locked(run):
            pass
        with locked(run):
            assert (run / LOCK_FILE).is_file()
        child.stdin.close()
    assert [path.name for path in run.iterdir()] == ["content"]


def test_a_folder_without_a_run_is_gone_afterwards(tmp_path):
    with locked(tmp_path / "a" / "run"):
        assert (tmp_path / "a" / "run" / LOCK_FILE).is_file()
    assert not (tmp_path / "a" / "run").exists()
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").write_text("")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_other_ranks_leave_the_folder_alone(tmp_path, monkeypatch, holder):
    monkeypatch.setenv("RANK", "1")
    with locked(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / LOCK_FILE).is_file()


@pytest.mark.parametrize("name", ["file/run", "x" * 300])
def test_a_folder_that_cannot_be_made_is_told(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir=.*: can't be made: "), locked(tmp_path / name):
        pytest.fail("made")
    with pytest.raises(ConfigError, match="is a file: name a folder"), locked(tmp_path / "file"):
        pytest.fail("made")


def test_the_lock_of_another_machine_is_waited_for(tmp_path, holder, monkeypatch, caplog):
    """A file server keeps the lock of a machine that is gone for a while."""
    run = tmp_path / "run"
    monkeypatch.setattr(run_lock, "_LEASE", 0.3)
    monkeypatch.setattr(run_lock, "_AGAIN", 0.05)
    (run / LOCK_FILE).write_text("process 7 on elsewhere since yesterday\n")
    with pytest.raises(ConfigError, match="process 7 on elsewhere since yesterday"), locked(run):
        pytest.fail("two writers")
    assert caplog.text.count("process 7 on elsewhere since yesterday holds it: waiting") == 1
    monkeypatch.setattr(run_lock, "_LEASE", 60.0)
    threading.Timer(0.2, holder.kill).start()
    with locked(run):
        assert "elsewhere" not in (run / LOCK_FILE).read_text()
