"""What an audit recommends, by its rules."""

from __future__ import annotations

import pytest
from audit_records import aligned_world

from megatron_occ.audit.recommendation import recommend, tail_warnings
from megatron_occ.audit.summary import summarize


def estimate(value, error):
    low, high = value - 2 * error, value + 2 * error
    return {"value": value, "error": error, "low": low, "high": high}


def _gain(value, low, high, low_of_all=None):
    bottom = low if low_of_all is None else low_of_all
    return {"value": value, "low": low, "high": high, "low_of_all": bottom}


def signal(c, error, gain=None):
    mixture = {
        "weight": estimate(0.3, 0.1),
        "share": estimate(0.12, 0.02),
        "gain": _gain(*gain) if gain else None,
    }
    return {
        "clear": abs(c) > 2 * error,
        "c_cross": estimate(c, error),
        "cosine_cross": estimate(c, error),
        "mixture": mixture if gain else None,
    }


def advice(*signals, rl_clear=True):
    rl = {"clear": rl_clear, "cross": estimate(0.01, 0.02)}
    return recommend(
        {
            "samples": 64,
            "signals": ["ce", "truncated", "unit"][: len(signals)],
            "judged_in": "adam",
            "results": {"adam": {"rl": rl, "signals": list(signals)}},
        }
    )


def test_no_alignment_keeps_mtp_out():
    found = advice(signal(0.1, 0.1), signal(0.3, 0.2), signal(-0.9, 0.1))
    assert (found["action"], found["signal"]) == ("detach", None)
    assert "mtp.preset=detach" in found["text"]
    # the closest is the one with most standard errors above 0
    assert "none of the 3 signals" in found["text"] and "'truncated'" in found["text"]


def test_an_alignment_without_a_measurable_rl_signal_asks_for_more():
    found = advice(signal(0.1, 0.1), signal(0.5, 0.1), rl_clear=False)
    assert found["action"] == "measure"
    assert "'truncated' is aligned" in found["text"] and "not measurable" in found["text"]
    both = advice(signal(0.5, 0.1), signal(0.5, 0.1), rl_clear=False)
    assert "'ce' and 'truncated' are aligned" in both["text"]


def test_the_best_gain_among_the_aligned_is_named():
    found = advice(
        signal(0.5, 0.1, (0.02, 0.01, 0.04)),
        signal(0.4, 0.1, (0.05, 0.02, 0.09)),
        signal(0.1, 0.1, (0.5, 0.1, 0.9)),
    )
    assert (found["action"], found["signal"]) == ("mix", 1)
    for part in ("'truncated'", "weight 0.30 ± 0.10", "12% of RL's", "5.0% ", "2.0% to 9.0%"):
        assert part in found["text"]


def test_a_signal_that_is_clear_goes_before_a_larger_gain_that_is_not():
    found = advice(signal(0.5, 0.1, (0.25, 0.0, 1.2)), signal(0.5, 0.1, (0.2, 0.06, 0.45)))
    assert (found["action"], found["signal"]) == ("mix", 1)
    assert "the best of 2 signals too" in found["text"]


def test_the_best_of_several_has_to_be_clear_for_their_number():
    # by itself its interval excludes 0
    found = advice(signal(0.5, 0.1, (0.05, 0.001, 0.1, 0.0)), signal(0.1, 0.1))
    assert (found["action"], found["signal"]) == ("detach", 0)
    assert "nothing beyond noise for the best of 2" in found["text"]


@pytest.mark.parametrize("gain", [(0.03, 0.0, 0.1), (0.004, 0.002, 0.009)])
def test_a_gain_within_noise_or_below_a_percent_is_none(gain):
    found = advice(signal(0.5, 0.1, gain))
    assert (found["action"], found["signal"]) == ("detach", 0)
    assert "nothing beyond noise" in found["text"]


def test_it_is_one_sentence():
    for found in (
        advice(signal(0.1, 0.1)),
        advice(signal(0.5, 0.1), rl_clear=False),
        advice(signal(0.5, 0.1, (0.05, 0.02, 0.09))),
        advice(signal(0.5, 0.1, (0.004, 0.0, 0.009))),
    ):
        assert found["text"].endswith(".") and ". " not in found["text"]


def test_heavy_tails_are_warned_of():
    tails = [
        {"median": 0.1, "high": 0.4, "heavy": 0.0},
        {"median": 0.2, "high": 0.9, "heavy": 0.05},
    ]
    found = tail_warnings({"signals": ["unit", "ppo"], "tails": tails})
    assert len(found) == 1 and "'ppo' is heavy-tailed: in 5.0%" in found[0]


def test_a_record_with_a_strong_and_a_useless_signal_recommends_the_strong_one():
    world = aligned_world(signals=2, shared=0.0, own=0.2)
    world.signals[0] = 0 * world.signals[0]
    found = summarize(world.record(samples=40, window=4))["recommendation"]
    assert (found["action"], found["signal"]) == ("mix", 1)
