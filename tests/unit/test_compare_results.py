"""From run folders to results, from results to numbers, and the sentences and page about them."""

from __future__ import annotations

import json
import math

import pytest

from megatron_occ.commands.compare import show
from megatron_occ.compare.analysis import analyse, outcome_of
from megatron_occ.compare.page import render_page
from megatron_occ.compare.results import collect, read_results, write_results
from megatron_occ.compare.runs import study_runs
from megatron_occ.compare.study import read_study
from megatron_occ.compare.wording import conclusion, table
from tests.unit.compare_results import made_up_results, made_up_run
from tests.unit.test_compare_study import CONF
from tests.unit.test_observe_report import Page, put

STUDY = """
base: conf/rl/tiny.yaml
arms:
  detach: [mtp.preset=detach]
  ce: [mtp.preset=ce]
"""


def run_of(validation):
    steps, values = zip(*validation, strict=True)
    return {"validation": {"step": list(steps), "pass@1": list(values)}, "finished": True}


def test_outcomes_of_a_curve_by_hand():
    run = run_of([(0, 0.4), (50, 0.9), (100, 0.6), (150, 0.7), (160, 0.8), (200, 0.6)])
    # the last quarter is after step 150
    assert outcome_of(run, "final") == pytest.approx(0.7)
    assert outcome_of(run, "best") == 0.9
    # trapezoids: 50 * 0.65 + 50 * 0.75 + 50 * 0.65 + 10 * 0.75 + 40 * 0.7, over 200 steps
    assert outcome_of(run, "area") == pytest.approx(138 / 200)
    curve = run_of([(0, 0.1), (10, 0.2), (20, 0.4), (30, 0.6), (60, 0.9)])
    assert outcome_of(curve, "early") == pytest.approx(0.3)
    assert math.isnan(outcome_of(run_of([(0, 0.1), (60, 0.9)]), "early"))
    assert math.isnan(outcome_of(run, "final@4"))


def test_best_is_not_the_value_before_rl():
    assert outcome_of(run_of([(0, 0.9), (10, 0.5)]), "best") == 0.5


def two_arms(seeds, *gains, **changes):
    runs = [
        made_up_run(arm, seed, gain=gain + 0.001 * (seed % 3) * (arm != "detach"), **changes)
        for seed in seeds
        for arm, gain in zip(("detach", "ce", "occ"), gains, strict=False)
    ]
    return made_up_results(["detach", "ce", "occ"][: len(gains)], seeds, runs)


def test_differences_are_paired_by_seed():
    results = two_arms(range(6), 0.2, 0.25)
    for run in results["runs"]:  # a seed's own luck, the same in both arms
        run["validation"]["pass@1"] = [v + 0.1 * run["seed"] for v in run["validation"]["pass@1"]]
    found = analyse(results).difference("final", "ce")
    # 0.05 and 0.001 * (seed % 3), times 1 - 0.5^(8x/300) in the last quarter: all but 1%
    assert found.by_seed[0] == pytest.approx(0.05, rel=0.02)
    assert found.by_seed[5] - found.by_seed[3] == pytest.approx(0.002, rel=0.02)
    assert found.verdict == "above"
    assert found.p == pytest.approx(2 / 64)


def test_only_finished_runs_and_common_seeds_count():
    results = two_arms(range(4), 0.2, 0.25)
    results["runs"][7]["finished"] = False  # ce seed 3
    del results["runs"][0]  # detach seed 0
    comparison = analyse(results)
    assert sorted(comparison.difference("final", "ce").by_seed) == [1, 2]
    assert comparison.arms["ce"].level("final")[0] > 0.6
    assert "Left out, not finished: ce seed 3." in render_page(comparison)


def test_an_arm_without_a_metric_has_no_difference_in_it():
    results = two_arms(range(5), 0.2, 0.25)
    for run in results["runs"]:
        if run["arm"] == "ce":
            del run["means"]["agreement/mtp_1"]
    comparison = analyse(results)
    assert comparison.difference("agreement/mtp_1", "ce") is None
    assert comparison.difference("entropy", "ce") is not None
    assert "MTP agreement" in render_page(comparison)


def test_runs_that_were_not_paired_are_named():
    results = two_arms(range(5), 0.2, 0.25)
    assert analyse(results).unpaired == []
    results["runs"][3]["first_rollouts"] = "other"
    assert analyse(results).unpaired == ["ce seed 1"]
    assert "were not those of detach in ce seed 1" in render_page(analyse(results))


def test_a_win_is_told_with_how_likely_chance_makes_one():
    found = conclusion(analyse(two_arms(range(8), 0.2, 0.25, 0.15)))
    assert found[0].startswith("Better than detach, by an interval that excludes 0: ce +5.0 points")
    assert found[1].startswith(
        "Worse than detach, by intervals that exclude 0: occ \N{MINUS SIGN}4.9"
    )
    assert "2 arms compared at 95%: if none differed at all, 0.10 such intervals" in found[2]
    assert "ce and occ stand" in found[2]


def test_a_null_is_told_as_one():
    results = two_arms(range(8), 0.2, 0.2)
    for run in results["runs"]:
        if run["arm"] == "ce":  # up in even seeds, down in odd ones
            shift = 0.02 if run["seed"] % 2 else -0.021
            run["validation"]["pass@1"] = [v + shift for v in run["validation"]["pass@1"]]
    found = conclusion(analyse(results))
    assert found[0].startswith(
        "No arm beats detach with an interval that excludes 0; the closest is"
    )
    assert len(found) == 2


def test_arms_that_did_the_same_or_are_not_far_enough_are_told_apart_from_nulls():
    results = two_arms(range(8), 0.2, 0.25, 0.2)
    by_seed = {r["seed"]: r for r in results["runs"] if r["arm"] == "detach"}
    for run in results["runs"]:
        if run["arm"] == "occ":
            run["validation"] = by_seed[run["seed"]]["validation"]
    found = conclusion(analyse(results))
    assert "Equal to detach in every seed: occ." in found
    results["runs"] = [r for r in results["runs"] if r["arm"] != "ce" or r["seed"] < 4]
    found = conclusion(analyse(results))
    assert "Not judged, with too few seeds for an interval: ce." in found
    # nothing that differs has an interval
    assert "the closest is ce" in found[0]


def test_few_seeds_leave_it_open():
    comparison = analyse(two_arms(range(4), 0.2, 0.9))
    assert comparison.difference("final", "ce").interval is None
    (text,) = conclusion(comparison)
    assert text.startswith("4 seeds: no interval is given below 5, so whether an arm beats detach")
    assert "Better" not in render_page(comparison)


def test_no_pair_yet_is_told_too():
    results = two_arms(range(2), 0.2, 0.3)
    results["runs"] = [run for run in results["runs"] if run["arm"] == "ce"]
    comparison = analyse(results)
    assert conclusion(comparison) == ["No seed of detach and of another arm is finished yet."]
    Page(render_page(comparison))


def test_the_table_has_a_line_for_each_arm_best_first():
    lines = table(analyse(two_arms(range(8), 0.2, 0.25, 0.15)))
    assert [line.split()[:2] for line in lines] == [
        ["arm", "seeds"],
        ["ce", "8"],
        ["detach", "8"],
        ["occ", "8"],
    ]
    assert "70.0%" in lines[1] and "+5.0" in lines[1] and "0.008" in lines[1]


def test_the_page_is_whole_and_escapes_what_others_wrote():
    results = two_arms(range(8), 0.2, 0.25, 0.15)
    results["name"] = "<script>alert(1)</script>"
    results["arms"]["ce"]["overrides"] = ["data.verifier='<b>'"]
    results["config"] = "run_dir: <img>\n"
    page = Page(render_page(analyse(results)))
    assert page.open == []
    assert "script" not in page.tags and "img" not in page.tags
    # three forests at least, a card for each arm but the reference with two plots
    assert page.tags.count("svg") > 10
    text = "".join(page.text)
    assert "<script>alert(1)</script>" in text and "data.verifier='<b>'" in text
    assert "4.9" in text


def logged(folder, last_accuracy, finished=True):
    lines = [{"phase": "validation", "step": 0, "time": 1.0, "pass@1": 0.25, "pass@4": 0.5}]
    for step in range(1, 5):
        times = {"time/rollout": 1.0, "time/train": float(step), "time/validation": 99.0}
        values = {"entropy": 1.0 / step, "reward/mean": 0.5, "lambda/mtp_1": 0.1 * step, **times}
        lines.append({"phase": "rl", "step": step, "time": 1.0 + step, **values})
    lines.append(
        {"phase": "validation", "step": 4, "time": 6.0, "pass@1": last_accuracy, "pass@4": 0.75}
    )
    if finished:
        lines.append({"phase": "event", "step": 4, "time": 7.0, "kind": "finished", "message": ""})
    put(folder, "metrics.jsonl", lines)
    put(folder, "rollouts.jsonl", [{"step": 1, "prompt": "1+1=", "response": "2", "reward": 1.0}])


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.replace("conf/rl", str(CONF / "rl")))
    return read_study(path, [f"folder={tmp_path / 'out'}", "seeds=2"])


def test_results_hold_what_the_run_folders_say(study, tmp_path):
    runs = study_runs(study, "start")
    logged(runs[0].folder, 0.5)
    logged(runs[1].folder, 0.75, finished=False)
    results = collect(study, runs, "start")
    first, second = results["runs"]
    assert (first["arm"], first["seed"], first["finished"], first["steps"]) == (
        "detach",
        0,
        True,
        4,
    )
    assert (second["arm"], second["finished"]) == ("ce", False)
    assert first["validation"] == {"step": [0, 4], "pass@1": [0.25, 0.5], "pass@4": [0.5, 0.75]}
    # over all steps, and over the last quarter of them: step 4
    assert first["means"]["entropy"] == [pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4, 1e-5), 0.25]
    assert first["means"]["lambda/mtp_1"] == [0.25, 0.4]
    assert first["curves"]["lambda/mtp_1"] == [[1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4]]
    # 1 + step, the median of four; validation is not part of it
    assert first["seconds_per_step"] == 3.5
    assert first["first_rollouts"] == second["first_rollouts"]
    assert results["arms"]["ce"]["differs"]["mtp.trunk.signal"] == ["none", "ce"]

    path = tmp_path / "results.json"
    write_results(results, path)
    assert read_results(path) == json.loads(json.dumps(results))
    # a line for each run: a change of one shows as one
    assert sum(line.startswith('{"arm"') for line in path.read_text().splitlines()) == 2


def test_the_page_is_written_again_from_results_alone(tmp_path, capsys):
    path = tmp_path / "some.json"
    write_results(two_arms(range(8), 0.2, 0.25), path)
    show(read_results(path), path)
    assert (tmp_path / "some.html").is_file()
    printed = capsys.readouterr().out
    assert "Better than detach" in printed and str(tmp_path / "some.html") in printed


HEAD = {"format": 1, "name": "s", "seeds": [0], "config": "", "reference": "a", "runs": []}
ARM = {"overrides": [], "differs": {}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format": 99, "runs": []}',
        '{"runs": []}',
        '{"format": 1, "runs": []}',
        json.dumps(HEAD | {"arms": {"b": ARM}}),
        json.dumps(HEAD | {"arms": {"a": {}}}),
        json.dumps(HEAD | {"arms": {"a": ARM}, "runs": [{}]}),
    ],
)
def test_something_else_is_no_results(tmp_path, text):
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"some\.json: not "):
        read_results(path)
