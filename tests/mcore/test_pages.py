"""Rows of the embedded engine in pages: the same responses from less memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_occ.mcore.inference import room as room_module
from megatron_occ.mcore.inference.cache import Cache
from megatron_occ.mcore.inference.engine import Speculation
from megatron_occ.mcore.inference.room import PagedRoom, Room
from megatron_occ.mcore.inference.slots import Slots
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
        assert bool(found.drafts.preempted) == is_tight


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
    assert found.drafts.preempted > 0
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


def test_a_response_goes_on_from_its_tokens(layout, monkeypatch):
    """No token is drawn twice, whatever draws it: short responses would be preferred."""
    drawn, moved = [], []
    own, out = Slots.commit, Slots.take_out

    def commit(slots, *given):
        before = slots.known.sum()
        found = own(slots, *given)
        drawn.append(slots.known.sum() - before)
        return found

    monkeypatch.setattr(Slots, "commit", commit)
    monkeypatch.setattr(
        Slots, "take_out", lambda *given: (found := out(*given), moved.append(len(found[0])))[0]
    )
    drafts = Speculation(2, coupled=False)
    found = paged(model_of(layout), prompts() * 3, tokens=2 * ROW, speculation=drafts, stop_ids=())
    assert sum(drawn) == sum(map(len, found.tokens)) == 18 * 24
    assert found.drafts.preempted == len(moved) > 0
    # some had come a long way
    assert max(moved) > 4


def test_the_shortest_give_way_one_by_one(layout, monkeypatch):
    out, taken = Slots.take_out, []

    def take_out(slots, row):
        lengths = slots.known - slots.start
        taken.append((lengths[row], min(lengths[: len(many)])))
        return out(slots, row)

    many = [[3], [4]]
    monkeypatch.setattr(Slots, "take_out", take_out)
    # of ten pages both take nine each at their ends
    engine = make_engine(model_of(layout), slots=2, cache_tokens=40)
    found = engine.generate(
        requests(many, limits=[33, 33]), settings(max_response_length=33, stop_ids=())
    )
    assert [len(tokens) for tokens in found.tokens] == [33, 33]
    assert found.drafts.preempted == 1
    assert all(length == least for length, least in taken)


def test_rows_that_cannot_grow_need_no_page_to_spare(layout):
    """As many at once as there are whole rows in the same memory."""
    most = []
    many = prompts() * 2
    engine = make_engine(model_of(layout), slots=12, cache_tokens=12 * 12)
    choose = engine.draft_length.choose
    engine.draft_length.choose = lambda rows: (most.append(rows), choose(rows))[1]
    engine.generate(requests(many), settings(max_response_length=3, stop_ids=()))
    assert max(most) == 12


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
    room = PagedRoom(6, 40, CPU, tokens=100, ahead=8, size=4)
    tokens = np.zeros(6, dtype=int)
    for _ in range(500):
        grown = np.minimum(tokens + draw.integers(0, 9, 6) * (draw.random(6) < 0.5), 40)
        if room.lacks(grown):
            rows = draw.choice(6, 2, replace=False)
            room.release(rows.tolist())
            tokens[rows] = 0
        else:
            room.reserve(grown)
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
    whole, pages = Room(5, 20, CPU), PagedRoom(5, 20, CPU, tokens=60, ahead=1, size=4)
    pages.admit([3, 0, 4], [7, 20, 1], [20] * 3)
    pages.reserve(np.array([20, 0, 0, 7, 9]))
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


def test_rows_begin_where_each_can_grow_for_a_cycle():
    room = PagedRoom(8, 40, CPU, tokens=40, ahead=3, size=4)
    # ten pages: two and one to spare each
    assert room.fitting([5] * 8, [40] * 8) == 3
    # nothing to spare for rows that end in what they begin with
    assert room.fitting([5] * 8, [8] * 8) == 5
    assert room.fitting([40], [40]) == 1
    assert room.fitting([], []) == 0
    room.admit([2, 4], [5, 5], [40, 7])
    # six are left, one of them for the first of these
    assert room.fitting([5] * 8, [40] * 8) == 1
    assert room.fitting([5] * 8, [8] * 8) == 2
    assert room.fitting([40], [40]) == 0
    far = PagedRoom(8, 40, CPU, tokens=40, ahead=9, size=4)
    # drafts longer than a page: three to spare
    assert far.fitting([5] * 8, [40] * 8) == 2
