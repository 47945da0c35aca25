"""Alerts: the step at which each limit is crossed, worked out by hand, and that it is told once."""

from __future__ import annotations

import json
import math

import pytest

from megatron_occ.config import ConfigError, check_resumed, load_config
from megatron_occ.observe import MetricsLogger, write_report
from megatron_occ.observe.alerts import Alerts, straggler_metrics
from megatron_occ.rl.stragglers import times_over_ranks
from tests.unit.fake_layouts import FakeLayout, run_ranks

LIMITS = "entropy logprob_gap acceptance length_burst verifier_failures straggler correction"
OFF = dict.fromkeys(LIMITS.split())


def alerts(**limits):
    given = {**OFF, **limits}
    texts = [f"alerts.{name}={'null' if v is None else v}" for name, v in given.items()]
    return Alerts(load_config([], texts).alerts)


def told(watch, steps):
    """Steps, counted from 1, at which something is told."""
    return [number for number, metrics in enumerate(steps, start=1) if watch.check(metrics)]


def course(name, values):
    return [{name: value} for value in values]


def test_entropy_is_told_when_the_last_five_steps_are_below_a_share_of_the_first_ten():
    # the first ten have mean 1; the mean of the last five falls by 0.2 a step
    values = [0.5, 1.5] * 5 + [1.0] * 5 + [0.0] * 5
    # means of the last five after steps 15 to 20: 1, 0.8, 0.6, 0.4, 0.2, 0
    assert told(alerts(entropy=0.5), course("entropy", values)) == [18]
    assert told(alerts(entropy=0.1), course("entropy", values)) == [20]
    assert told(alerts(entropy=0.5), course("entropy", values[:17])) == []


@pytest.mark.parametrize(
    ("metric", "what"),
    [
        ("rejected/tokens", "are rejected"),
        ("weight/high", "have a weight above the range"),
        ("weight/low", "have a weight below the range"),
    ],
)
def test_a_large_share_of_corrected_tokens_is_told(metric, what):
    values = [0.05, 0.2, 0.3]
    assert told(alerts(correction=0.1), course(f"correction/{metric}", values)) == [2]
    assert told(alerts(), course(f"correction/{metric}", values)) == []
    (text,) = alerts(correction=0.1).check({f"correction/{metric}": 0.25})
    assert text.endswith(f"25.0% of response tokens {what} (alerts.correction=0.1)")


def test_nothing_is_told_before_there_are_enough_steps():
    assert told(alerts(entropy=0.5), course("entropy", [1.0] * 10 + [0.0] * 4)) == []
    assert told(alerts(entropy=0.5), course("entropy", [1.0] * 10 + [0.0] * 5)) == [15]


def test_acceptance_counts_the_steps_with_drafts_alone():
    steps = course("draft/accepted_1", [0.8] * 10) + [{}] * 7
    steps += course("draft/accepted_1", [0.4] * 5)
    watch = alerts(acceptance=0.7)
    (text,) = [text for step in steps for text in watch.check(step)]
    assert "40.0% of first drafts accepted over 5 steps, of 80.0% at the start" in text
    assert "alerts.acceptance=0.7" in text
    assert told(alerts(acceptance=0.7), steps) == [22]
    # 0.6 of 0.8 is three quarters
    mild = course("draft/accepted_1", [0.8] * 10 + [0.6] * 9)
    assert told(alerts(acceptance=0.7), mild) == []


def test_a_limit_is_told_once_a_crossing_and_not_again_for_hovering_around_it():
    def steps(*gaps):
        return told(alerts(logprob_gap=0.05), course("logprob_gap/mean", gaps))

    # clearly below is below 0.04, ten steps in a row
    assert steps(0.03, 0.06, 0.07, *[0.045] * 20, 0.06) == [2]
    assert steps(0.06, *[0.03] * 9, 0.045, *[0.03] * 9, 0.06) == [1]
    assert steps(0.06, *[0.03] * 10, 0.06, 0.06) == [1, 12]


def test_verifier_failures_are_a_share_of_the_responses():
    shares = course("verifier/failed", [0.0, 0.1, 0.11, 0.5])
    assert told(alerts(verifier_failures=0.1), shares) == [3]


def test_a_length_burst_is_measured_against_the_steps_before_it():
    lengths = [1000.0] + [100.0] * 4 + [500.0]
    # the mean before is 280, and 560 would be a burst
    burst = alerts(length_burst=2.0)
    assert told(burst, course("rollout/length_mean", lengths)) == []
    assert told(burst, course("rollout/length_mean", [100.0] * 20 + [200.0, 211.0])) == [22]
    # growing by 3% a step, the 20 steps before are never half as long
    slow = [100 * 1.03**step for step in range(60)]
    assert told(alerts(length_burst=2.0), course("rollout/length_mean", slow)) == []
    assert told(alerts(length_burst=2.0), course("rollout/length_mean", [1.0] * 4 + [9.0])) == []


def test_values_that_are_not_finite_say_nothing():
    values = [1.0] * 10 + [math.nan, math.inf] * 20
    assert told(alerts(entropy=0.5), course("entropy", values)) == []
    assert told(alerts(logprob_gap=0.05), course("logprob_gap/mean", [math.nan])) == []


def test_all_off_tells_nothing():
    steps = course("entropy", [1.0] * 10 + [0.0] * 10) + course("logprob_gap/mean", [9.0])
    assert told(alerts(), steps) == []


# --- stragglers ----------------------------------------------------------------------------------


def test_the_slowest_rank_is_compared_with_the_median_one():
    # seconds of rollout, reward, logprobs, train; the longest step is 10 s
    found = straggler_metrics([[2, 1, 1, 4], [3, 0, 1, 4], [5, 0, 1, 4]])
    assert found["time/rollout_behind"] == pytest.approx(0.2)  # 5 - 3 of 10
    assert found["time/rollout_slowest"] == 2
    assert found["time/reward_behind"] == pytest.approx(0.1)
    assert found["time/reward_slowest"] == 0
    assert found["time/train_behind"] == 0
    # of two ranks the quicker one counts as median
    assert straggler_metrics([[1, 0, 0, 1], [3, 0, 0, 1]])["time/rollout_behind"] == 0.5
    assert straggler_metrics([[0, 0, 0, 0]])["time/rollout_behind"] == 0


def test_a_straggler_is_the_same_rank_three_steps_in_a_row():
    def step(rank, behind):
        return {"time/rollout_behind": behind, "time/rollout_slowest": float(rank)}

    uneven = [step(0, 0.5), step(0, 0.5), step(1, 0.5), step(0, 0.5), step(0, 0.5)]
    assert told(alerts(straggler=0.25), uneven) == []
    slow = [step(3, 0.5), step(3, 0.3), step(3, 0.4), step(3, 0.4)]
    assert told(alerts(straggler=0.25), slow) == [3]
    assert told(alerts(straggler=0.35), slow) == []
    watch = alerts(straggler=0.25)
    texts = [text for each in slow for text in watch.check(each)]
    assert texts == [
        "rank 3 is slow in rollout: 30.0% of a step or more behind the median rank for 3 steps "
        "(alerts.straggler=0.25)"
    ]


def test_times_are_gathered_from_all_ranks_and_not_by_a_single_one():
    def work(layout):
        return times_over_ranks({"time/rollout": 1.0 + layout.data_parallel_rank}, layout)

    results = run_ranks(3, work)
    assert results[0] == results[1] == results[2]
    assert results[0]["time/rollout_behind"] == pytest.approx(1 / 3)  # 3 - 2 of 3
    assert results[0]["time/rollout_slowest"] == 2
    assert times_over_ranks({"time/rollout": 1.0}, FakeLayout()) == {}


# --- in a run ------------------------------------------------------------------------------------


def lines_of(tmp_path, kind):
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("kind") == kind]


def test_an_alert_is_an_event_of_its_step_and_stands_in_the_report(tmp_path):
    logger = MetricsLogger(tmp_path, alerts=alerts(logprob_gap=0.05))
    logger.log("rl", 6, {"logprob_gap/mean": 0.01})
    logger.log("rl", 7, {"logprob_gap/mean": 0.08})
    logger.log("pretrain", 8, {"logprob_gap/mean": 9.0})
    (alert,) = lines_of(tmp_path, "alert")
    assert alert["step"] == 7
    assert alert["message"] == (
        "log-probs of rollout and training are 0.08 nats apart on average (alerts.logprob_gap=0.05)"
    )
    assert "0.08 nats apart" in write_report(tmp_path).read_text()


def test_a_resumed_run_knows_its_beginning_and_what_it_has_told(tmp_path):
    def begin():
        return MetricsLogger(tmp_path, alerts=alerts(entropy=0.5, logprob_gap=0.05))

    logger = begin()
    for step in range(1, 14):
        logger.log("rl", step, {"entropy": 1.0, "logprob_gap/mean": 0.1})
    assert [line["step"] for line in lines_of(tmp_path, "alert")] == [1]

    resumed = begin()
    resumed.truncate_after(12)
    for step in range(13, 18):
        resumed.log("rl", step, {"entropy": 0.0, "logprob_gap/mean": 0.1})
    # steps 11 to 15 are 1, 1, 0, 0, 0; the gap was told before
    assert [line["step"] for line in lines_of(tmp_path, "alert")] == [1, 15]


def test_limits_out_of_range_are_refused_and_may_change_on_resume():
    with pytest.raises(ConfigError, match=r"alerts.length_burst = 1.0: must be a number > 1"):
        load_config([], ["alerts.length_burst=1.0"])
    assert check_resumed(load_config(), load_config([], ["alerts.entropy=null"])) == [
        "alerts.entropy was 0.1, is None"
    ]
