"""Proxies of the coefficient against the exact one of the same mini-batch, and across."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from audit_records import aligned_world

from megatron_occ.audit.proxies import EXACT, judged_proxies
from megatron_occ.audit.record import read_products


@pytest.fixture(scope="module")
def record():
    return aligned_world(shared=0.0, own=1.0).record(samples=30, window=3)


def judged(record):
    by_metric = {metric: read_products(record, metric) for metric in record["metrics"]}
    return {entry["proxy"]: entry for entry in judged_proxies(record, by_metric)}


def totals(record, key):
    return np.array([sum(s["same"]["euclidean"][key][0]) for s in record["samples"]])


def test_a_proxy_that_is_the_exact_value_agrees_always(record):
    # the record's "released" is c itself
    found = judged(record)["released formula"]["same"]
    assert found["samples"] == 30
    assert found["agreement"]["value"] == 1.0 and found["agreement"]["high"] == 1.0
    assert found["agreement"]["low"] == pytest.approx(0.8865, abs=1e-4)
    assert found["rank"]["value"] > 0.9


def test_the_opposite_never_agrees(record):
    opposite = copy.deepcopy(record)
    for sample, c in zip(opposite["samples"], totals(record, "c"), strict=True):
        sample["proxies"]["released"] = [-c]
    found = judged(opposite)["released formula"]["same"]
    assert found["agreement"]["value"] == 0.0 and found["rank"]["value"] < -0.9


def test_mini_batches_without_a_value_do_not_count(record):
    changed = copy.deepcopy(record)
    changed["samples"][1]["proxies"]["logprob"] = [0.0]
    # every second one is null, and a 0 has no sign
    assert judged(changed)["log-prob (paper)"]["same"]["samples"] == 14


def test_one_group_stands_in_for_all(record):
    same = [sample["same"]["euclidean"] for sample in record["samples"]]
    c = totals(record, "c")
    for name, group in (("embedding alone", 0), ("layer alone", 1)):
        hits = sum(x["c"][0][group] * total > 0 for x, total in zip(same, c, strict=True))
        assert judged(record)[name]["same"]["agreement"]["value"] == pytest.approx(hits / 30)


def test_first_and_last_layer_where_there_are_several(record):
    renamed = {**record, "groups": ["layer 1", "layer 2", "output"]}
    names = set(judged(renamed))
    assert {"first layer alone", "last layer alone"} <= names
    assert not {"embedding alone", "layer alone"} & names


def test_the_exact_value_is_a_proxy_of_the_one_across(record):
    found = judged(record)[EXACT]
    assert found["same"] is None
    across, counts = np.zeros(30), np.zeros(30)
    for index, sample in enumerate(record["samples"]):
        for cross in sample["cross"]["euclidean"]:
            both = (sum(cross["c"][0]) + sum(cross["c_back"][0])) / 2
            for end in (index, cross["other"]):
                across[end] += both
                counts[end] += 1
    agree = (np.sign(across / counts) == np.sign(totals(record, "c"))).mean()
    assert found["cross"]["agreement"]["value"] == pytest.approx(agree)
