"""From an audit's record to its summary, against values that are known."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from audit_records import SIZE, World, aligned_world

from megatron_occ.audit.record import read_products
from megatron_occ.audit.summary import signal_labels, summarize


@pytest.fixture(scope="module")
def record():
    return aligned_world(signals=2, shared=0.0, own=0.3).record(samples=50, window=5)


@pytest.fixture(scope="module")
def summary(record):
    return summarize(json.loads(json.dumps(record)))


def covers(estimate, truth):
    """Whether the truth is within 3 standard errors."""
    return abs(estimate["value"] - truth) < 3 * estimate["error"]


def test_a_summary_is_json_without_nan(summary):
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert (summary["samples"], summary["rounds"], summary["pairs"]) == (50, 25, 235)
    assert summary["sequences"] == 50 * 128


def test_products_are_those_of_the_expected_gradients(summary):
    result = summary["results"]["euclidean"]
    signal = result["signals"][1]
    # |rl|^2 4, |signal|^2 1, noise 1 and 0.3 in each of 50 dimensions
    assert covers(result["rl"]["same"], 4 + 50) and covers(result["rl"]["cross"], 4)
    assert covers(signal["c_cross"], 2) and covers(signal["c_same"], 2)
    assert covers(signal["v2"], 1 + 50 * 0.09) and covers(signal["v2_cross"], 1)
    assert covers(signal["share"], (5.5 / 54) ** 0.5)
    assert covers(signal["ratio_cross"], 2 / 5.5)
    assert covers(signal["cosine_expected"], 1.0)
    assert result["rl"]["clear"] and signal["clear"]
    weight = aligned_world().scale
    assert covers(summary["results"]["adam"]["signals"][0]["c_cross"], 2 * weight.mean())


def test_groups_add_up_to_the_whole(summary):
    for result in summary["results"].values():
        assert sum(x["value"] for x in result["rl"]["groups"]["cross"]) == pytest.approx(
            result["rl"]["cross"]["value"]
        )
        for signal in result["signals"]:
            for key in ("c_same", "c_cross", "v2"):
                parts = signal["groups"][key]
                assert sum(x["value"] for x in parts) == pytest.approx(signal[key]["value"])
    # each group holds its share of the dimensions
    embedding, layer, output = summary["results"]["euclidean"]["signals"][0]["groups"]["c_cross"]
    assert covers(embedding, 0.8) and covers(layer, 0.8) and covers(output, 0.4)


def test_the_best_mixture_is_that_of_the_averaged_products(summary):
    result = summary["results"]["euclidean"]
    rl, rl_cross = (result["rl"][key]["value"] for key in ("same", "cross"))
    for signal in result["signals"]:
        c, v2, c_cross = (signal[key]["value"] for key in ("c_same", "v2", "c_cross"))
        mixture = signal["mixture"]
        weight = (rl * c_cross - c * rl_cross) / (v2 * rl_cross - c * c_cross)
        assert mixture["weight"]["value"] == pytest.approx(weight)
        assert mixture["share"]["value"] == pytest.approx(weight * (v2 / rl) ** 0.5)
        # the truth: S = diag(54, 5.5) and 2 off it, h = (4, 2)
        same, h = np.array([[54, 2], [2, 5.5]]), np.array([4, 2])
        gain = h @ np.linalg.solve(same, h) / (16 / 54) - 1
        assert mixture["gain"]["low"] < gain < mixture["gain"]["high"]
        assert mixture["gain"]["low"] < mixture["gain"]["value"] < mixture["gain"]["high"]


def test_the_gain_of_fixed_weights_is_that_of_the_averaged_products(summary):
    result = summary["results"]["euclidean"]
    rl, rl_cross = (result["rl"][key]["value"] for key in ("same", "cross"))
    for signal in result["signals"]:
        c, v2, c_cross = (signal[key]["value"] for key in ("c_same", "v2", "c_cross"))
        for weight in (0.1, 1.0):
            size = rl + 2 * weight * c + weight**2 * v2
            gain = (rl_cross + weight * c_cross) ** 2 / size / (rl_cross**2 / rl) - 1
            found = signal["gain_at"][f"{weight:g}"]
            assert found["value"] == pytest.approx(gain)
            assert -1 <= found["low"] < found["value"] < found["high"]
            # the truth: E|g|^2 54, c 2, v^2 5.5, |G|^2 4
            truth = (4 + 2 * weight) ** 2 / (54 + 4 * weight + 5.5 * weight**2) / (16 / 54) - 1
            assert found["low"] < truth < found["high"]


def test_noise_that_both_share_is_no_gain():
    """c within a mini-batch is far from 0, and no use: the best weight would subtract the noise."""
    world = aligned_world(shared=0.8, own=0.1)
    world.signals[0] = np.zeros(SIZE)
    signal = summarize(world.record(samples=60, window=6))["results"]["euclidean"]["signals"][0]
    assert signal["c_same"]["low"] > 30 and not signal["clear"]
    assert signal["mixture"]["weight"]["high"] < 0
    assert set(signal["mixture"]["gain"].values()) == {0.0}


def test_without_a_signal_in_rl_no_weight_is_measurable():
    world = World(np.zeros(SIZE), [np.zeros(SIZE)])
    summary = summarize(world.record(samples=20, window=3, seed=5))
    result = summary["results"]["euclidean"]
    assert not result["rl"]["clear"]
    assert result["signals"][0]["mixture"] is None and result["signals"][0]["gain_at"] is None
    assert result["signals"][0]["cosine_expected"] is None


def test_a_signal_without_a_gradient_leaves_gaps_and_no_errors(record):
    empty = copy.deepcopy(record)
    for sample in empty["samples"]:
        crosses = [cross for found in sample["cross"].values() for cross in found]
        for products in (*sample["same"].values(), *crosses):
            for key in {"c", "c_back", "v2"} & set(products):
                products[key][0] = [0.0, 0.0, 0.0]
    summary = summarize(empty)
    json.dumps(summary, allow_nan=False)
    signal = summary["results"]["euclidean"]["signals"][0]
    assert signal["ratio_same"]["value"] is None and signal["mixture"] is None
    assert signal["c_cross"]["value"] == 0.0 and not signal["clear"]
    assert summary["recommendation"]["signal"] == 1


def test_tails_and_spread_are_quantiles_over_mini_batches(record):
    changed = copy.deepcopy(record)
    for index, sample in enumerate(changed["samples"]):
        sample["tails"][1] = {"top": 0.6 if index < 10 else 0.2, "effective": index / 50}
    tail = summarize(changed)["tails"][1]
    assert tail["median"] == pytest.approx(0.2) and tail["heavy"] == pytest.approx(0.2)
    assert tail["high"] == pytest.approx(0.6) and tail["effective"] == pytest.approx(24.5 / 50)


def test_labels_name_the_depth_where_there_are_several():
    signals = [{"name": "ce", "depth": 1}, {"name": "ce", "depth": 2}]
    assert signal_labels(signals) == ["ce, depth 1", "ce, depth 2"]
    assert signal_labels(signals[:1]) == ["ce"]


def test_both_orders_of_a_pair_are_averaged(record):
    products = read_products(record, "euclidean")
    first = record["samples"][1]["cross"]["euclidean"][0]
    expected = (np.array(first["c"]) + np.array(first["c_back"])) / 2
    assert products.cross_c[0] == pytest.approx(expected)
    assert products.pairs[0].tolist() == [1, 0]


def test_a_number_that_is_not_finite_and_no_pair_are_refused(record):
    broken = copy.deepcopy(record)
    broken["samples"][3]["same"]["adam"]["v2"][0][1] = float("nan")
    with pytest.raises(ValueError, match="'v2' is not finite"):
        summarize(broken)
    for sample in broken["samples"]:
        sample["cross"] = {"euclidean": [], "adam": []}
    with pytest.raises(ValueError, match="no pair of mini-batches"):
        summarize(broken)
