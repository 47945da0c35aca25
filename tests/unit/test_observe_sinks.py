"""Sinks in processes of their own: what they get, and that no fault of theirs reaches the run."""

from __future__ import annotations

import json
import math
import os
import resource
import time

import pytest

from megatron_occ.cli import main
from megatron_occ.commands import configuration
from megatron_occ.config import ConfigError, load_config, validate
from megatron_occ.observe import MetricsLogger, sink_process
from megatron_occ.observe.outlet import Outlet
from megatron_occ.observe.outlets import is_installed, missing_packages, open_outlets
from megatron_occ.observe.sink_process import RETRY_SECONDS, Feeder
from megatron_occ.observe.sinks import mlflow_name
from tests.unit.fake_sinks import NeverOpens


def outlet(tmp_path, kind, **options):
    options = {"patience": 30.0, **options}
    return Outlet(
        "fake",
        f"tests.unit.fake_sinks:{kind}",
        {"path": str(tmp_path / "calls")},
        log=tmp_path / "sinks" / "fake.log",
        **options,
    )


def calls(tmp_path):
    path = tmp_path / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def lines_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def log_steps(logger, steps):
    for step in steps:
        logger.log("rl", step, {"x": float(step)})


def ended(outlet):
    outlet.begin_end(finished=True)
    return outlet.close()


def wait_for_answers(outlet):
    while outlet._unanswered:
        outlet._pull()
        time.sleep(0.01)


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_sink_gets_every_line_and_its_end(tmp_path):
    logger = MetricsLogger(tmp_path, outlets=[outlet(tmp_path, "Recording")])
    logger.log("rl", 1, {"pass@1": 0.5, "bad": math.inf})
    logger.event(1, "not a line of metrics")
    logger.log("validation", 2, {"y": 2})
    logger.finish(2)
    (opened,), first, second, end = calls(tmp_path)
    assert (opened, end) == ("open", ["close", True])
    assert first[:2] + first[3:] == ["rl", 1, {"pass@1": 0.5, "bad": math.inf}]
    assert first[2] == lines_of(tmp_path)[0]["time"]
    assert second[:2] + second[3:] == ["validation", 2, {"y": 2.0}]
    assert lines_of(tmp_path)[-1]["kind"] == "finished"
    assert "a package that prints" in (tmp_path / "sinks" / "fake.log").read_text()


def test_closing_without_the_end_says_so_to_the_sink(tmp_path):
    logger = MetricsLogger(tmp_path, outlets=[outlet(tmp_path, "Recording")])
    log_steps(logger, [1])
    logger.close()
    logger.close()
    assert calls(tmp_path)[-1] == ["close", False]
    assert len(calls(tmp_path)) == 3


def test_a_sink_that_raises_loses_that_line_alone_and_is_told_once(tmp_path):
    logger = MetricsLogger(tmp_path, outlets=[outlet(tmp_path, "RaisesAtTwo")])
    log_steps(logger, [1, 2, 3, 2])
    logger.finish(3)
    assert [call[1] for call in calls(tmp_path)[1:-1]] == [1, 3]
    told = [line["message"] for line in lines_of(tmp_path) if line.get("kind") == "sink"]
    text = "fake: ConnectionError: no route to host. Nothing is missing"
    assert sum(text in message for message in told) == 1
    assert told[-1].endswith("fake lost 2 of 4 lines")
    assert [line["x"] for line in lines_of(tmp_path) if "x" in line] == [1.0, 2.0, 3.0, 2.0]
    assert lines_of(tmp_path)[-1]["kind"] == "finished"


def test_a_sink_that_never_opens_costs_nothing_but_its_lines(tmp_path):
    logger = MetricsLogger(tmp_path, outlets=[outlet(tmp_path, "NeverOpens")])
    log_steps(logger, [1, 2, 3])
    logger.finish(3)
    assert calls(tmp_path) == [["open"]]
    (told,) = [line["message"] for line in lines_of(tmp_path) if line.get("kind") == "sink"][-1:]
    assert told.endswith("fake lost 3 of 3 lines")


def test_a_sink_that_blocks_for_ever_is_told_and_stopped(tmp_path):
    now = [0.0]
    blocked = outlet(tmp_path, "Blocks", patience=60.0, clock=lambda: now[0])
    pid = blocked._process.pid
    logger = MetricsLogger(tmp_path, outlets=[blocked])
    log_steps(logger, [1, 2])
    assert not [line for line in lines_of(tmp_path) if "kind" in line]
    now[0] = 61.0
    log_steps(logger, [3, 4])
    (told,) = [line["message"] for line in lines_of(tmp_path) if "kind" in line]
    assert "fake: has not taken a line for 60 s" in told
    blocked._patience = 0.2
    logger.finish(4)
    assert is_gone(pid)
    kinds = [line["kind"] for line in lines_of(tmp_path) if "kind" in line]
    assert kinds == ["sink", "sink", "finished"]
    assert "fake lost 4 of 4 lines" in lines_of(tmp_path)[-2]["message"]


def test_a_sink_that_is_slow_at_times_is_not_told(tmp_path):
    now = [0.0]
    slow = outlet(tmp_path, "Recording", clock=lambda: now[0])
    logger = MetricsLogger(tmp_path, outlets=[slow])
    log_steps(logger, [1])
    wait_for_answers(slow)
    # an hour between two steps is not the sink's
    now[0] = 3600.0
    log_steps(logger, [2])
    logger.finish(2)
    assert [line["kind"] for line in lines_of(tmp_path) if "kind" in line] == ["finished"]


def test_lines_beyond_the_room_are_dropped_and_counted(tmp_path):
    blocked = outlet(tmp_path, "Blocks", room=1000, patience=0.2)
    big = {"x" * 5000: 1.0}
    for step in range(200):
        blocked.put("rl", step, 0.0, big)
    # a pipe holds 64 KiB and one more line is pending
    assert 150 < blocked.lost < 200
    assert len(blocked._pending) < 1000 + 2 * 5100
    ended(blocked)
    assert blocked.lost == blocked.lines == 200


def test_a_sink_that_hangs_at_its_end_is_stopped(tmp_path):
    hanging = outlet(tmp_path, "BlocksAtTheEnd", patience=0.5)
    hanging.put("rl", 1, 0.0, {"x": 1.0})
    wait_for_answers(hanging)
    pid = hanging._process.pid
    told = ended(hanging)
    assert "was not done 0.5 s after the run's end, and was stopped" in told
    assert "lost" not in told
    assert is_gone(pid)


def test_a_process_that_dies_is_told_and_not_started_again(tmp_path):
    dying = outlet(tmp_path, "Dies")
    told = ""
    for step in range(1000):
        told = told or dying.put("rl", step, 0.0, {"x": 1.0})
        if told:
            break
        time.sleep(0.02)
    assert "its process ended with signal 9" in told
    assert "fake.log" in told
    assert dying.put("rl", 1, 0.0, {}) == ""
    assert ended(dying) == f"fake lost {dying.lines} of {dying.lines} lines"


def test_a_folder_that_can_not_be_written_is_no_reason_to_stop(tmp_path):
    (tmp_path / "sinks").write_text("a file in the way")
    logger = MetricsLogger(tmp_path, outlets=[outlet(tmp_path, "Recording")])
    log_steps(logger, [1])
    logger.finish(1)
    texts = [line.get("message", "") for line in lines_of(tmp_path)]
    assert "fake: could not be started" in texts[1]


def test_a_killed_run_leaves_no_process(tmp_path):
    left = outlet(tmp_path, "Recording")
    left.put("rl", 1, 0.0, {"x": 1.0})
    process = left._process
    # what the kernel does to the pipes of a killed process
    process.stdin.close()
    assert process.wait(20) == 0
    assert calls(tmp_path)[-1] == ["close", False]


def test_lines_end_with_the_run_also_where_its_forks_hold_the_pipe_open(monkeypatch):
    monkeypatch.setattr(sink_process, "WATCH_SECONDS", 0.01)
    source, target = os.pipe()
    parents = iter([7, 7, 7, 1])
    os.write(target, b'{"a": 1}\n{"b": 2}\n{"half')
    assert list(sink_process.lines_of(source, lambda: next(parents))) == [b'{"a": 1}', b'{"b": 2}']
    assert next(parents, None) is None
    for end in (source, target):
        os.close(end)


def test_a_sink_that_did_not_open_is_tried_again_after_a_minute(tmp_path):
    now = [0.0]
    feeder = Feeder(lambda: NeverOpens(tmp_path / "calls"), clock=lambda: now[0])
    line = {"phase": "rl", "step": 1, "time": 0.0, "values": {}}
    for seconds in (0.0, 1.0, RETRY_SECONDS + 0.5, RETRY_SECONDS + 1.0):
        now[0] = seconds
        assert feeder.write(line) == "PermissionError: not logged in"
    assert calls(tmp_path) == [["open"], ["open"]]
    assert feeder.close(finished=True) == ""


# --- what a configuration asks for --------------------------------------------------------------


def test_sinks_without_their_package_are_refused_with_what_to_install():
    config = load_config([], ["log.wandb.mode=offline", "log.mlflow.uri=sqlite:///a.db"])
    found = missing_packages(config.log, lambda name: name == "tensorboard")
    assert found == [
        "log.wandb.mode=offline: the package wandb is not installed. Install it with `pip install "
        "wandb`, or give log.wandb.mode=off",
        "log.mlflow.uri=sqlite:///a.db: the package mlflow is not installed. Install it with "
        "`pip install mlflow`, or give log.mlflow.uri=null",
    ]
    assert missing_packages(load_config().log, lambda name: name == "tensorboard") == []
    assert "log.tensorboard=false" in missing_packages(load_config().log, lambda name: False)[0]


def test_a_missing_package_ends_the_command_before_the_run_has_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(
        configuration, "missing_packages", lambda log: missing_packages(log, lambda name: False)
    )
    with pytest.raises(SystemExit) as caught:
        main(["rl", f"run_dir={tmp_path / 'run'}"])
    assert "log.tensorboard=true: the package tensorboard is not installed" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_named_like_a_package_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "surely_not_a_package").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not is_installed("surely_not_a_package")
    assert is_installed("json")


def test_keys_of_a_sink_that_is_off_are_refused():
    for override in ("log.wandb.project=mine", "log.mlflow.name=mine"):
        with pytest.raises(ConfigError, match="has no effect"):
            validate(load_config([], [override]), command="rl")
    validate(load_config([], ["log.wandb.project=p", "log.wandb.mode=offline"]), command="rl")


def test_nothing_is_started_that_is_not_asked_for(tmp_path):
    assert open_outlets(load_config([], ["log.tensorboard=false"]).log, tmp_path, {}) == []


def test_names_for_mlflow_have_the_characters_it_takes():
    assert mlflow_name("validation/pass@1") == "validation/pass_at_1"
    assert mlflow_name("exact/c:same[1]") == "exact/c_same_1_"


# --- the packages themselves, where they are installed ------------------------------------------


def test_tensorboard_tags_carry_the_phase_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    logger = MetricsLogger(tmp_path, outlets=open_outlets(load_config().log, tmp_path, {}))
    logger.log("rl", 4, {"entropy": 0.5})
    logger.log("validation", 4, {"validation/pass@1": 0.25})
    logger.finish(4)
    (path,) = (tmp_path / "tensorboard").iterdir()
    found = {
        value.tag: (event.step, value.tensor.float_val[0])
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
    }
    assert found == {"rl/entropy": (4, 0.5), "validation/pass@1": (4, 0.25)}
    # a process that printed nothing leaves no log
    assert not list((tmp_path / "sinks").iterdir())


def start_twice(tmp_path, *overrides):
    log = load_config([], ["log.tensorboard=false", *overrides]).log
    settings = {f"section.key_{n}": n for n in range(150)}
    for step in (1, 2):
        logger = MetricsLogger(tmp_path, outlets=open_outlets(log, tmp_path, settings))
        logger.log("rl", step, {"pass@1": step / 4, "bad": math.nan})
        logger.finish(step)
    assert {line["kind"] for line in lines_of(tmp_path) if "kind" in line} == {"finished"}


def test_wandb_offline_keeps_the_id_of_the_run(tmp_path):
    pytest.importorskip("wandb")
    start_twice(tmp_path, "log.wandb.mode=offline", "log.wandb.project=p")
    name = json.loads((tmp_path / "sinks" / "wandb.json").read_text())["id"]
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert [folder.name.rpartition("-")[2] for folder in folders] == [name, name]
    assert all((folder / f"run-{name}.wandb").stat().st_size > 0 for folder in folders)


def test_mlflow_goes_on_with_the_same_run(tmp_path):
    pytest.importorskip("mlflow.tracking")
    pytest.importorskip("sqlalchemy")
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    start_twice(tmp_path, f"log.mlflow.uri={uri}", "log.mlflow.experiment=e")
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", tmp_path.name)
    history = client.get_metric_history(run.info.run_id, "rl/pass_at_1")
    assert sorted((point.step, point.value) for point in history) == [(1, 0.25), (2, 0.5)]
    assert len(run.data.params) == 150


def test_a_run_with_more_open_files_than_select_takes_ends_well(tmp_path):
    """As one of many ranks has, whose connections are files too."""
    low, high = resource.getrlimit(resource.RLIMIT_NOFILE)
    if high < 1500:
        pytest.skip("this machine allows no process 1,500 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(low, 1500), high))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        sink = outlet(tmp_path, "Recording")
        sink.put("rl", 1, 0.0, {"x": 1.0})
        assert ended(sink) == ""
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (low, high))
    assert calls(tmp_path)
