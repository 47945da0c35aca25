"""Rows of the embedded engine in pages: the same responses from less memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_occ.mcore.inference import room as room_module
from megatron_occ.mcore.inference.cache import Cache
from megatron_occ.mcore.inference.engine import Speculation
from megatron_occ.mcore.inference.room import PagedRoom, Room
from tests.mcore.test_generation import PLAIN, make_engine, prompts, requests, respond, settings
from tests.mcore.test_speculation import KINDS, model_of

CPU = torch.device("cpu")
# the longest prompt has 9 tokens
LONG = dict(max_response_length=24, stop_ids=(0,))
ROW = 9 + 24 + 2


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    monkeypatch.setattr(room_module, "OTHER_PAGE", 4)


def paged(model, many, *, tokens, slots=5, speculation=PLAIN, **changes):
    engine = make_engine(model, slots=slots, speculation=speculation, cache_tokens=tokens)
    return engine.generate(requests(many), settings(**LONG | changes))


def assert_same(found, expected):
    assert found.tokens == expected.tokens
    assert found.finish_reasons == expected.finish_reasons
    for one, other in zip(found.logprobs, expected.logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    for kind in ("states", "masks", "routes"):
        pairs = zip(getattr(found, kind), getattr(expected, kind), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafts", [0, 2])
def test_responses_are_those_of_whole_rows(layout, kind, drafts):
    model, many = model_of(layout, kind), prompts() * 3
    expected = respond(model, many, slots=5, **LONG)
    for tokens, is_tight in ((1000, False), (2 * ROW, True)):
        found = paged(model, many, tokens=tokens, speculation=Speculation(drafts))
        assert_same(found, expected)
        assert bool(found.events) == is_tight


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("dense", dict(keep_states=True)),
        ("moe", dict(keep_routes=True)),
        ("dense", dict(keep_masks=True, top_k=5)),
        ("mla", dict(stop_strings=("ab", "c"))),
        ("dense", dict(temperature=0)),
    ],
)
def test_what_is_kept_of_them_is_the_same_too(layout, kind, changes):
    model, many, drafts = model_of(layout, kind), prompts() * 3, Speculation(2)
    expected = respond(model, many, slots=5, speculation=drafts, **LONG | changes)
    found = paged(model, many, tokens=2 * ROW + 2, speculation=drafts, **changes)
    assert "had to begin again" in found.events[0]
    if changes.get("keep_routes"):
        # what drafts read behind a row's end hangs on how often it was drafted
        trunk = len(model.decoder.layers)
        for each in (found, expected):
            each.routes = [routes[:, :trunk] for routes in each.routes]
    assert_same(found, expected)


def test_one_row_s_room_is_enough_for_all(layout):
    model, many = model_of(layout), prompts()
    found = paged(model, many, tokens=ROW)
    assert_same(found, respond(model, many, slots=5, **LONG))


def test_a_response_that_begins_again_is_counted_once(layout):
    model, many = model_of(layout), prompts() * 3
    (told,) = paged(model, many, tokens=2 * ROW, stop_ids=()).events
    assert told.startswith("rollouts: ")
    assert told.endswith(" tokens were lost: rl.rollout.cache_tokens were used up")


def test_caches_have_as_many_tokens_as_are_given(layout, monkeypatch):
    made = []
    own = Cache.__init__
    monkeypatch.setattr(
        Cache, "__init__", lambda self, *a, **k: (own(self, *a, **k), made.append(self))[0]
    )
    paged(model_of(layout), prompts(), tokens=2 * ROW)
    rows = [cache for cache in made if cache.room.table is not None]
    sizes = {tensor.shape[:2].numel() for cache in rows for kept in cache.layers for tensor in kept}
    # 70 tokens in pages of 4, and the page that is nobody's
    assert sizes == {18 * 4 + 4}


def test_less_than_the_longest_row_is_refused(layout):
    engine = make_engine(model_of(layout), slots=2, cache_tokens=ROW - 1)
    with pytest.raises(ValueError, match=r"cache_tokens=34: .* takes 35\. Give at least as many"):
        engine.generate(requests(prompts()), settings(**LONG))


def test_no_page_is_held_twice():
    draw = np.random.default_rng(0)
    room = PagedRoom(6, 40, CPU, tokens=100, size=4)
    tokens = np.zeros(6, dtype=int)
    for _ in range(500):
        grown = np.minimum(tokens + draw.integers(0, 9, 6) * (draw.random(6) < 0.5), 40)
        if room.lacks(grown):
            rows = draw.choice(6, 2, replace=False)
            room.release(rows.tolist())
            tokens[rows] = 0
        else:
            room.reserve(range(6), grown)
            tokens = grown
        order = draw.permutation(6)
        room.renamed(order.tolist(), range(6))
        tokens = tokens[order]
        room.send()
        counts = -(-tokens // 4)
        held = [room.table[row, : counts[row]].tolist() for row in range(6)]
        flat = [page for pages in held for page in pages]
        assert len(set(flat)) == len(flat)
        assert 0 not in flat
        assert room.pages_left == 25 - len(flat)
        assert all(not room.table[row, counts[row] :].any() for row in range(6))


def test_rows_keep_what_was_written_wherever_they_go():
    whole, pages = Room(5, 20, CPU), PagedRoom(5, 20, CPU, tokens=60, size=4)
    pages.reserve([3, 0, 4], np.array([7, 20, 1]))
    pages.reserve([4], np.array([9]))
    pages.send()
    kept = [torch.zeros(room.blocks, room.size, 2) for room in (whole, pages)]
    positions = torch.arange(20).expand(5, -1)
    values = torch.randn(5, 20, 2)
    for room, cache in zip((whole, pages), kept, strict=True):
        cache.flatten(0, 1).index_copy_(0, room.places(positions).flatten(), values.flatten(0, 1))
        room.move([cache], torch.tensor([4, 3]), torch.tensor([1, 2]), 20)
        room.renamed([4, 3], [1, 2])
        room.send()
        for row, source, length in ((0, 0, 20), (1, 4, 9), (2, 3, 7)):
            assert torch.equal(room.of_row(cache, row, length), values[source, :length])
        assert torch.equal(room.first(cache, 3, 7), values[[0, 4, 3], :7])
        room.put(cache, torch.tensor([0, 2]), 2 * values[:2, :6])
        assert torch.equal(room.first(cache, 3, 6)[[0, 2]], 2 * values[:2, :6])


def test_rows_begin_where_each_can_grow_by_a_page():
    room = PagedRoom(8, 40, CPU, tokens=40, size=4)
    # ten pages: two and one to spare, five times three is too much
    assert room.fitting([5] * 8, used=0) == 3
    assert room.fitting([5] * 8, used=2) == 2
    assert room.fitting([40], used=0) == 1
    assert room.fitting([40], used=1) == 0
    assert room.fitting([], used=0) == 0
