"""Short rows do not pay for the attention of long ones, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_occ.mcore.inference import decoding
from megatron_occ.mcore.inference.attend import WORTH, long_rows, rows_to_swap
from megatron_occ.mcore.inference.engine import Speculation
from megatron_occ.mcore.inference.trunk import Placer
from tests.mcore.conftest import VOCABULARY, build_model, small_config
from tests.mcore.test_generation import make_engine, prompts, requests, settings


def price(needed, count):
    """Keys that are looked at when the first rows look again."""
    behind = max(needed[count:])
    return len(needed) * behind + count * (max(needed[:count]) if count else 0)


@pytest.mark.parametrize(
    ("needed", "count"),
    [
        ([10, 10, 10, 10], 0),
        # 4 * 10 + 1 * 100 keys in place of 4 * 100
        ([100, 10, 10, 10], 1),
        ([100, 90, 10, 10, 10, 10], 2),
        # the long row is not at the front: every cut pays for it
        ([10, 10, 10, 100], 0),
        # a second look costs more than it saves: 4 * 9 + 10 of 40
        ([10, 9, 9, 9], 0),
        ([7], 0),
    ],
)
def test_rows_that_look_again_by_hand(needed, count):
    found, cost = long_rows(np.array(needed))
    assert found == count
    assert cost == price(needed, count)


def test_the_cut_is_the_cheapest_one_that_saves_enough():
    generator = np.random.default_rng(0)
    for _ in range(200):
        needed = generator.geometric(0.05, size=generator.integers(1, 20)).tolist()
        best = min(range(len(needed)), key=lambda count: price(needed, count))
        saves = price(needed, best) <= WORTH * price(needed, 0)
        assert long_rows(np.array(needed))[0] == (best if saves else 0)


def test_swapping_brings_the_long_rows_to_the_front():
    needed = np.array([10, 11, 10, 100, 10, 90])
    front, behind = rows_to_swap(needed)
    assert (sorted(front), sorted(behind)) == ([0, 1], [3, 5])
    swapped = needed.copy()
    swapped[[*front, *behind]] = needed[[*behind, *front]]
    assert long_rows(swapped)[0] == 2
    assert rows_to_swap(swapped) == ([], [])


def test_rows_of_about_one_length_stay_where_they_are():
    assert rows_to_swap(np.array([10, 12, 11, 13])) == ([], [])


@pytest.mark.parametrize("kind", ["dense", "mla"])
@pytest.mark.parametrize("length", [0, 2])
def test_responses_of_very_uneven_lengths(layout, monkeypatch, kind, length):
    config = small_config()
    if kind == "mla":
        config.model.num_query_groups, config.model.mla.enabled = None, True
        config.model.mla.kv_lora_rank, config.model.mla.qk_head_dim = 8, 8
        config.model.mla.qk_rope_head_dim, config.model.mla.v_head_dim = 4, 6
    model = build_model(config, VOCABULARY, layout.device)
    spans, swaps = [], []
    at, swap = Placer.at, decoding.rows_to_swap
    monkeypatch.setattr(
        Placer,
        "at",
        lambda *args, **how: (found := at(*args, **how), spans.append(len(found.attend.spans)))[0],
    )
    monkeypatch.setattr(
        decoding, "rows_to_swap", lambda needed: (found := swap(needed), swaps.append(found))[0]
    )
    monkeypatch.setattr(decoding, "LOOK_EVERY", 1)
    limits = [4, 4, 60, 4, 4, 4, 50, *[4] * 30]
    wanted = requests([prompts()[i % 6] for i in range(len(limits))], limits=limits)
    arguments = settings(stop_ids=(), max_response_length=60)
    together = make_engine(model, slots=8, speculation=Speculation(length))
    found = together.generate(wanted, arguments)
    assert {1, 2} == set(spans)
    assert any(front for front, _ in swaps)
    alone = make_engine(model, slots=1).generate(wanted, arguments)
    assert found.tokens == alone.tokens
    for one, other in zip(found.logprobs, alone.logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
