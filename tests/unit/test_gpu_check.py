"""The command that checks a GPU: what its judges let pass, and what a section costs the others."""

from __future__ import annotations

import json
import math
import sys

import pytest

from tools.gpu import main as command
from tools.gpu.bounds import AIMS, LIMITS, SECTIONS, TOGETHER
from tools.gpu.judging import (
    judge_aim,
    judge_deviations,
    judge_engine,
    judge_gap,
    judge_metrics,
    judge_resume,
    judge_rewards,
)
from tools.gpu.main import chosen_sections, in_groups, run_all
from tools.gpu.results import BELOW, FAILED, INFO, OK, SKIPPED, Row, SectionResult, table
from tools.gpu.runner import run_section
from tools.gpu.session import Session, rows_file

CLOSE = {"loss": 1e-6, "lambda": 2e-6, "gradient": 3e-5}


def test_equal_numbers_pass():
    assert judge_deviations("dense", CLOSE, []).status == OK


@pytest.mark.parametrize("name", CLOSE)
@pytest.mark.parametrize("value", [2e-4, math.nan, math.inf])
def test_a_wrong_loss_lambda_or_gradient_fails(name, value):
    assert judge_deviations("dense", {**CLOSE, name: value}, []).status == FAILED


def test_a_parameter_that_is_compared_with_nothing_fails():
    row = judge_deviations("dense", CLOSE, ["mtp.layers.0.eh_proj.weight"])
    assert row.status == FAILED
    assert "eh_proj" in row.text
    assert judge_deviations("dense", {}, []).status == FAILED


@pytest.mark.parametrize(
    ("gap", "tokens", "status"),
    [(1e-5, 96, OK), (2e-4, 96, FAILED), (math.nan, 96, FAILED), (0.0, 0, FAILED)],
)
def test_the_engine_is_held_to_the_training_forward_pass(gap, tokens, status):
    assert judge_engine("dense", gap, tokens).status == status


def steps(count, **changes):
    return [{"phase": "rl", "step": n, "loss/main": 0.5, **changes} for n in range(count)]


def test_a_run_must_log_every_step_and_finite_numbers():
    assert judge_metrics("bf16", steps(20), 20).status == OK
    assert judge_metrics("bf16", steps(19), 20).status == FAILED
    row = judge_metrics("bf16", [*steps(19), *steps(1, **{"loss/main": math.nan})], 20)
    assert row.status == FAILED
    assert "loss/main" in row.text


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_gap_above_its_bound_fails(precision):
    assert judge_gap("run", precision, [0.004, 0.006], [0.05, 0.2]).status == OK
    assert judge_gap("run", precision, [0.4, 0.6], [0.9, 0.9]).status == FAILED
    assert judge_gap("run", precision, [0.004, 0.006], [0.05, 9.0]).status == FAILED
    assert judge_gap("run", precision, [0.004, math.nan], [0.05, 0.2]).status == FAILED


def test_rewards_are_compared_within_their_noise():
    base = [0.1, 0.3, 0.2, 0.4, 0.3, 0.5] * 3
    noisy = [value + (0.2 if n % 2 else -0.2) for n, value in enumerate(base)]
    assert judge_rewards("fp8", noisy, base).status == OK
    assert judge_rewards("fp8", [value - 0.15 for value in base], base).status == FAILED
    assert judge_rewards("fp8", base[1:], base).status == FAILED


def test_a_resumed_run_is_the_undisturbed_one_or_fails():
    assert judge_resume("resume", is_same=True, control_is_same=True).status == OK
    assert judge_resume("resume", is_same=False, control_is_same=True).status == FAILED
    inexact = judge_resume("resume", is_same=False, control_is_same=False)
    assert inexact.status == FAILED
    assert "two undisturbed runs" in inexact.text


@pytest.mark.parametrize("aim", AIMS)
def test_a_missed_aim_is_told_and_does_not_fail(aim):
    bound = AIMS[aim].bound
    worse, better = (1.5 * bound, 0.5 * bound)[:: 1 if AIMS[aim].is_most else -1]
    statuses = [
        judge_aim("part", aim, value, "text", judged=True).status
        for value in (better, bound, worse, math.nan)
    ]
    assert statuses == [OK, OK, BELOW, FAILED]
    assert judge_aim("part", aim, worse, "text", judged=False).status == INFO


def test_sections_fit_into_seven_minutes():
    groups = in_groups(SECTIONS)
    assert groups.count(["correct", "runs"]) == 1
    assert sum(max(LIMITS[section] for section in group) for group in groups) <= 7 * 60


def test_parts_are_chosen_by_name():
    assert chosen_sections(None) == {section: [] for section in SECTIONS}
    chosen = chosen_sections("runs,correct:dense,correct:MoE")
    assert list(chosen.items()) == [("correct", ["dense", "MoE"]), ("runs", [])]
    with pytest.raises(ValueError, match="--only corect: there are environment"):
        chosen_sections("corect")


def section_of(code, tmp_path, limit=30.0):
    """Run Python code as a section that has already found a row."""
    rows = tmp_path / "rows.json"
    found = json.dumps([Row("first", OK, "found").__dict__])
    code = f"import pathlib; pathlib.Path({str(rows)!r}).write_text({found!r})\n{code}"
    command = [sys.executable, "-c", code]
    return run_section("section", command, limit, tmp_path / "log", rows)


def test_a_section_that_hangs_is_cut_with_all_that_it_started(tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('busy', file=sys.stderr, flush=True); time.sleep(60)"
    )
    result = section_of(code, tmp_path, limit=1.5)
    assert result.seconds < 30
    assert [(row.part, row.status) for row in result.rows] == [("first", OK), ("process", FAILED)]
    assert result.rows[-1].text == "cut after 2 s: busy"


def test_a_section_that_dies_keeps_what_it_found(tmp_path):
    result = section_of("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", tmp_path)
    assert [(row.part, row.status) for row in result.rows] == [("first", OK), ("process", FAILED)]
    assert "exit -11" in result.rows[-1].text
    assert result.has_failed


def test_a_section_that_fails_leaves_the_others(tmp_path, monkeypatch):
    """The command goes on; what was found is in the file after each group of sections."""
    seen, before = [], {"correct": 1, "runs": 1, "training": 3, "rollouts": 4, "memory": 5}

    def run(name, command_line, limit, log, rows, environment):
        seen.append((name, environment.get("CUDA_VISIBLE_DEVICES")))
        if len(seen) <= len(SECTIONS) and name in before:
            entries = json.loads((tmp_path / "results.json").read_text())["sections"]
            assert len(entries) == before[name]
        status = FAILED if name == "correct" else OK
        return SectionResult(name, [Row("all", status, "text")], 1.0)

    monkeypatch.setattr(command, "run_section", run)
    results = run_all(chosen_sections(None), tmp_path, rehearse=True)
    assert sorted(seen[1:3]) == [("correct", ""), ("runs", "")]
    assert seen[:1] + seen[3:] == [(s, "") for s in SECTIONS if s not in TOGETHER]
    assert [result.has_failed for result in results] == [s == "correct" for s in SECTIONS]
    assert command.main(["--rehearse", "--out", str(tmp_path)]) == 1
    assert command.main(["--rehearse", "--out", str(tmp_path), "--only", "memory"]) == 0


def session(tmp_path, told, **changes):
    settings = dict(limit=60.0, rehearse=True, parts=[]) | changes
    return Session("training", tmp_path, told=told, **settings)


def test_a_part_that_raises_is_its_own_failure(tmp_path, capsys):
    def broken():
        yield Row("broken", OK, "first half")
        raise RuntimeError("out of memory")

    found = session(tmp_path, sys.stdout)
    found.run("broken", broken)
    found.run("next", lambda: [Row("next", OK, "fine", {"speed": 2.0})])
    late = session(tmp_path / "late", sys.stdout, limit=1.0)
    late.run("long", broken, needs=10.0)
    entries = json.loads(rows_file(tmp_path, "training").read_text())
    assert [entry["status"] for entry in entries] == [OK, FAILED, OK]
    assert "out of memory" in entries[1]["text"]
    assert found.numbers_of("training")["next"] == {"speed": 2.0}
    (entry,) = json.loads(rows_file(tmp_path / "late", "training").read_text())
    assert entry["status"] == SKIPPED
    assert "out of memory" in capsys.readouterr().out


def test_parts_that_were_not_asked_for_are_left_out(tmp_path):
    found = session(tmp_path, sys.stdout, parts=["wanted"])
    for part in ("wanted", "other"):
        found.run(part, lambda part=part: [Row(part, OK, "")])
    (entry,) = json.loads(rows_file(tmp_path, "training").read_text())
    assert entry["part"] == "wanted"


def test_the_table_has_a_line_for_each_row_and_counts():
    rows = [Row("dense", OK, "equal"), Row("MoE", SKIPPED, "no TransformerEngine")]
    text = table([SectionResult("correct", rows, 2.4), SectionResult("runs", [], 1.0)])
    assert text.splitlines()[1].split() == ["correct", "dense", "ok", "equal"]
    assert text.splitlines()[-1] == "1 ok, 1 skipped; 3 s"
