"""Metrics and rollout logs: valid JSON whatever the values, no doubled lines after a resume."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_occ.observe import MetricsLogger, RolloutLog
from megatron_occ.observe.jsonl import JsonlFile, read_records


def strict_lines(path):
    """Parse as a strict JSON reader would: bare NaN or Infinity is an error."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def make_logger(run_dir, **options):
    return MetricsLogger(run_dir, **options)


def test_a_line_holds_phase_step_time_and_metrics_and_is_on_disk_at_once(tmp_path):
    make_logger(tmp_path / "new" / "run").log("rl", 3, {"reward/mean": 0.5, "problems": 7})
    (line,) = strict_lines(tmp_path / "new" / "run" / "metrics.jsonl")
    assert line.pop("time") > 1e9
    assert line == {"phase": "rl", "step": 3, "reward/mean": 0.5, "problems": 7.0}


def test_values_that_are_not_finite_become_strings(tmp_path):
    metrics = {"a": float("nan"), "b": float("inf"), "c": float("-inf")}
    make_logger(tmp_path).log("rl", 1, metrics)
    RolloutLog(tmp_path).write(1, [{"reward": float("nan"), "more": [float("inf")]}])
    (line,) = strict_lines(tmp_path / "metrics.jsonl")
    assert (line["a"], line["b"], line["c"]) == ("nan", "inf", "-inf")
    (sample,) = strict_lines(tmp_path / "rollouts.jsonl")
    assert sample == {"step": 1, "reward": "nan", "more": ["inf"]}


def test_unknown_phases_and_reserved_names_are_refused(tmp_path):
    logger = make_logger(tmp_path)
    with pytest.raises(ValueError, match=r"'train'.*pretrain, rl, validation"):
        logger.log("train", 1, {})
    with pytest.raises(ValueError, match="step"):
        logger.log("rl", 1, {"step": 2.0})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_event_is_logged_as_a_warning_and_as_a_line(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        make_logger(tmp_path).event(9, "lambda of depth 1 is not finite")
    assert "step 9: lambda of depth 1 is not finite" in caplog.text
    (line,) = strict_lines(tmp_path / "metrics.jsonl")
    assert (line["phase"], line["step"]) == ("event", 9)
    assert line["message"] == "lambda of depth 1 is not finite"


def test_other_ranks_write_nothing(tmp_path, caplog):
    logger = MetricsLogger(tmp_path, is_main=False)
    rollouts = RolloutLog(tmp_path, is_main=False)
    logger.log("rl", 1, {"x": 1.0})
    logger.event(1, "message")
    rollouts.write(1, [{"prompt": "p"}])
    assert logger.truncate_after(0) == rollouts.truncate_after(0) == 0
    logger.finish(1)
    logger.close()
    assert list(tmp_path.iterdir()) == []
    assert not caplog.records


def test_resume_drops_later_steps_and_a_half_written_line(tmp_path):
    before = make_logger(tmp_path)
    for step in (1, 2, 3, 4):
        before.log("rl", step, {"x": float(step)})
    before.log("validation", 4, {"pass@1": 0.5})
    before.event(4, "late")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "rl", "step": 2, "x"')

    after = make_logger(tmp_path)
    assert after.truncate_after(2) == 5
    after.log("rl", 3, {"x": 30.0})

    lines = strict_lines(tmp_path / "metrics.jsonl")
    assert [(line["phase"], line["step"]) for line in lines] == [
        ("rl", 1),
        ("rl", 2),
        ("event", 2),
        ("rl", 3),
    ]
    assert lines[2]["kind"] == "resumed"
    assert lines[3]["x"] == 30.0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_two_step_counters_of_one_folder_are_truncated_apart(tmp_path):
    logger = make_logger(tmp_path)
    logger.log("pretrain", 900, {"x": 1.0})
    logger.event(900, "of pretraining")
    logger.log("rl", 1, {"x": 1.0})
    logger.event(2, "of rl")
    assert logger.truncate_after(1, phase="rl") == 1
    kept = [(line["phase"], line["step"]) for line in strict_lines(tmp_path / "metrics.jsonl")]
    assert kept == [("pretrain", 900), ("event", 900), ("rl", 1), ("event", 1)]
    assert logger.truncate_after(800, phase="pretrain") == 2
    with pytest.raises(ValueError, match="validation"):
        logger.truncate_after(1, phase="validation")


@pytest.mark.parametrize(
    ("phase", "is_due", "kept"),
    [
        ("pretrain", False, ["pretrain 2", "event 2", "event 2"]),
        ("pretrain", True, ["event 2", "event 2"]),
        ("rl", False, ["rl 2", "validation 2", "event 2"]),
        ("rl", True, ["rl 2", "event 2"]),
    ],
)
def test_a_validation_that_is_made_again_is_not_doubled(tmp_path, phase, is_due, kept):
    logger = make_logger(tmp_path)
    logger.log(phase, 2, {"x": 1.0})
    if phase == "rl":
        logger.log("validation", 2, {"x": 1.0})
    else:
        logger.event(2, "skipped")
    logger.log(phase, 3, {"x": 1.0})
    logger.truncate_after(2, phase, validation_is_due=is_due)
    lines = strict_lines(tmp_path / "metrics.jsonl")
    assert [f"{line['phase']} {line['step']}" for line in lines] == kept


def test_without_a_checkpoint_nothing_of_the_phase_stays(tmp_path):
    logger = make_logger(tmp_path)
    logger.log("pretrain", 5, {"x": 1.0})
    logger.event(0, "resumed with a change", kind="resumed")
    logger.log("validation", 0, {"pass@1": 0.5})
    logger.event(0, "of rl")
    logger.event(0, "resumed with another", kind="resumed")
    logger.log("rl", 1, {"x": 1.0})
    assert logger.truncate_after(None) == 3
    lines = strict_lines(tmp_path / "metrics.jsonl")
    assert [line.get("message", line["phase"]) for line in lines] == [
        "pretrain",
        "resumed with a change",
        "resumed with another",
        "rl began anew: it had no checkpoint yet",
    ]
    # a phase that had not begun has nothing to tell
    assert logger.truncate_after(None) == 0
    assert len(strict_lines(tmp_path / "metrics.jsonl")) == 4


def test_appending_after_a_kill_does_not_join_the_broken_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = json.dumps({"phase": "rl", "step": 1, "time": 1.0}) + "\n"
    path.write_text(whole + "x" * 200_000)  # longer than one block of the backward search
    make_logger(tmp_path).log("rl", 2, {})
    assert [line["step"] for line in strict_lines(path)] == [1, 2]


def test_a_file_that_is_one_broken_line_is_emptied(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    path.write_text('{"step": 1, "prom')
    RolloutLog(tmp_path).write(5, [{"prompt": "p"}])
    assert strict_lines(path) == [{"step": 5, "prompt": "p"}]


def test_rollouts_of_later_steps_are_dropped_on_resume(tmp_path):
    rollouts = RolloutLog(tmp_path)
    for step in (1, 2, 3):
        rollouts.write(step, [{"prompt": f"{step}a"}, {"prompt": f"{step}b"}])
    assert rollouts.truncate_after(1) == 4
    rollouts.write(2, [{"prompt": "again"}])
    prompts = [line["prompt"] for line in strict_lines(tmp_path / "rollouts.jsonl")]
    assert prompts == ["1a", "1b", "again"]


def test_text_with_any_character_keeps_one_sample_per_line(tmp_path):
    text = "line\nbreak \u2028 \x00 é \udc00"
    RolloutLog(tmp_path).write(1, [{"response": text}])
    (line,) = (tmp_path / "rollouts.jsonl").read_bytes().splitlines()
    assert json.loads(line)["response"] == text


def test_import_stays_light():
    code = (
        "import sys, megatron_occ.observe\n"
        "print([m for m in ('torch', 'tensorboard', 'megatron.core') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_deleted_file_is_begun_anew_and_a_deleted_folder_is_an_error(tmp_path, caplog):
    logger = MetricsLogger(tmp_path / "run")
    logger.log("rl", 1, {"loss": 1.0})
    (tmp_path / "run" / "metrics.jsonl").unlink()
    logger.log("rl", 2, {"loss": 2.0})
    assert [line["step"] for line in read_records(tmp_path / "run" / "metrics.jsonl")] == [2]
    assert "was deleted while the run wrote to it: begun anew" in caplog.text
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=f"the folder was deleted .*{tmp_path}/run"):
        logger.log("rl", 3, {"loss": 3.0})
    assert not (tmp_path / "run").exists()


def test_a_full_disk_names_the_file():
    full = JsonlFile(Path("/dev/full"))
    with Path("/dev/full").open("ab") as full._file:
        with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
            full.append({"step": 1})
        full.close()
