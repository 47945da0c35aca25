"""Captured cycles: what they find is what cycles find that are run as they are.

:class:`Tape` stands in for CUDA graphs: while it captures it takes down the kernels with the
tensors that they were given, and runs them again on the very same tensors. What the host computed
in between stays as it was, as on a GPU, and a wait for the device is an error.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_occ.mcore.inference import room
from megatron_occ.mcore.inference.attend import BySpans, Span, Spans
from megatron_occ.mcore.inference.engine import Speculation
from megatron_occ.mcore.inference.graphs import Graphs
from megatron_occ.mcore.inference.slots import Slots
from megatron_occ.rollout import noise
from tests.mcore.test_generation import PLAIN, make_engine, prompts, requests, respond, settings
from tests.mcore.test_speculation import model_of

WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")


def tensors_of(values):
    return [each for each in tree_leaves(values) if isinstance(each, torch.Tensor)]


class Tape(TorchDispatchMode):
    """Takes kernels down, see above."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(wait in func.__name__ for wait in WAITS):
            raise RuntimeError(f"{func}: the host waits in a cycle that is captured")
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, found))
        return found

    def replay(self):
        for func, args, kwargs, found in self.calls:
            given = {each.untyped_storage().data_ptr() for each in tensors_of((args, kwargs))}
            for new, kept in zip(tensors_of(func(*args, **kwargs)), tensors_of(found), strict=True):
                # a view, or a tensor that was changed in place, is there already
                if kept.untyped_storage().data_ptr() not in given:
                    kept.copy_(new)


class TapeCapture:
    """Counts what it captures, and how often that is run."""

    captured = replayed = 0

    def __call__(self, cycle):
        with Tape() as tape:
            found = cycle()
        type(self).captured += 1
        # a graph does nothing while it is captured: what the tape did must not be needed
        for each in (found.tokens, found.logprobs, found.accepted):
            each.fill_(-7)

        def replay():
            type(self).replayed += 1
            tape.replay()

        return replay, found


class WholeRows(BySpans):
    """Masks over the whole cache, which need nothing of the host."""

    needs_host = False

    def look(self, positions, last, room, *, repeats):
        later = torch.arange(room.length) > positions.unsqueeze(-1)
        mask = torch.where(later, self.hidden, self.seen).unsqueeze(1).repeat(1, 1, self.share, 1)
        return Spans([Span(len(positions), room.length, mask)], room)


@pytest.fixture
def captured(monkeypatch):
    """Makes an engine that captures; the host's own kernels of random numbers are no kernels."""
    monkeypatch.setattr(noise, "_mixed", noise._mix_on_device)
    monkeypatch.setattr(TapeCapture, "captured", 0)
    monkeypatch.setattr(TapeCapture, "replayed", 0)

    def make(model, **arguments):
        engine = make_engine(model, **arguments)
        share = 4 if model.config.multi_latent_attention else 2
        engine.capture = TapeCapture
        engine._attention = WholeRows(share, dtype=torch.float32, device=torch.device("cpu"))
        return engine

    return make


CASES = {
    "no drafts": (PLAIN, {}),
    "one draft": (Speculation(1), {}),
    "more drafts than depths": (Speculation(3), {}),
    "rejection": (Speculation(2, coupled=False), {}),
    "top-p and strings": (Speculation(2), dict(top_p=0.8, stop_strings=("ab",))),
    "greedy": (Speculation(2), dict(temperature=0)),
    "states": (Speculation(2), dict(keep_states=True)),
}


@pytest.mark.parametrize("kind", ["dense", "mla", "before the norm"])
@pytest.mark.parametrize("case", CASES)
def test_captured_cycles_find_what_others_find(layout, captured, kind, case):
    drafts, changes = CASES[case]
    changes = dict(max_response_length=24, stop_ids=(0,)) | changes
    many, model = prompts() * 3, model_of(layout, kind)
    expected = respond(model, many, slots=5, speculation=drafts, **changes)
    found = captured(model, slots=5, speculation=drafts).generate(
        requests(many), settings(**changes)
    )
    assert found.tokens == expected.tokens
    assert found.drafts == expected.drafts
    for one, other in zip(found.logprobs, expected.logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    for one, other in zip(found.states, expected.states, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    # of 5, 4, 3, 2 and 1 rows, and far less often than they are run
    assert 1 <= TapeCapture.captured <= 5
    assert TapeCapture.replayed > 4 * TapeCapture.captured


@pytest.mark.parametrize("kind", ["dense", "mla"])
def test_captured_cycles_find_rows_in_pages(layout, captured, monkeypatch, kind):
    monkeypatch.setattr(room, "OTHER_PAGE", 4)
    many, model, drafts = prompts() * 3, model_of(layout, kind), Speculation(2)
    changes = dict(max_response_length=24, stop_ids=(0,))
    expected = respond(model, many, slots=5, **changes)
    engine = captured(model, slots=5, speculation=drafts, cache_tokens=68)
    found = engine.generate(requests(many), settings(**changes))
    assert found.tokens == expected.tokens
    assert TapeCapture.replayed > 4 * TapeCapture.captured > 0
    # some gave way to others, and pages went from row to row
    assert found.drafts.preempted > 0


def test_a_length_that_changes_is_a_cycle_of_its_own(layout, captured, monkeypatch):
    """Cycles without drafts leave more behind than a captured cycle catches up with."""
    model, long = model_of(layout), dict(max_response_length=40, stop_ids=())
    expected = respond(model, prompts(), **long)
    engine = captured(model, slots=6, speculation=Speculation(2))
    lengths = iter([2] * 3 + [0] * 12 + [2, 1, 2, 1] + [2] * 100)
    monkeypatch.setattr(engine.draft_length, "choose", lambda rows: next(lengths))
    found = engine.generate(requests(prompts()), settings(**long))
    assert found.tokens == expected.tokens
    assert sum(found.drafts.accepted) > 0
    assert TapeCapture.captured >= 3


def test_the_tape_notices_an_input_that_lies_elsewhere(layout, captured, monkeypatch):
    """Of each cycle anew: what was captured reads the first one."""
    own = Slots.send

    def anew(slots):
        own(slots)
        slots._numbers = slots._numbers.clone()

    model, long = model_of(layout), dict(max_response_length=24, stop_ids=())
    expected = respond(model, prompts(), **long)
    monkeypatch.setattr(Slots, "send", anew)
    assert respond(model, prompts(), **long).tokens == expected.tokens
    found = captured(model, slots=6).generate(requests(prompts()), settings(**long))
    assert found.tokens != expected.tokens


def test_the_tape_notices_a_wait():
    with pytest.raises(RuntimeError, match="the host waits"), Tape():
        torch.ones(3).sum().item()


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_cycles_that_the_host_has_a_part_in_are_not_captured(layout, captured, kind):
    model = model_of(layout, kind)
    engine = captured(model, slots=4, speculation=Speculation(1))
    if kind == "dense":
        engine._attention = None
    found = engine.generate(requests(prompts()), settings())
    assert found.tokens == respond(model, prompts(), speculation=Speculation(1)).tokens
    assert TapeCapture.captured == 0


def test_a_capture_that_fails_is_told_and_nothing_else_comes_of_it(layout, captured, caplog):
    class Failing(TapeCapture):
        def __call__(self, cycle):
            raise RuntimeError("operation not permitted\nwhen the stream is capturing")

    model, drafts = model_of(layout), Speculation(1)
    engine = captured(model, slots=4, speculation=drafts)
    engine.capture = Failing
    found = engine.generate(requests(prompts()), settings())
    assert found.tokens == respond(model, prompts(), speculation=drafts).tokens
    assert [record.getMessage() for record in caplog.records] == [
        "rollouts: no CUDA graphs in this call: operation not permitted"
    ]


def test_rows_are_padded_to_a_few_numbers():
    graphs = Graphs(TapeCapture(), 100)
    found = [graphs.padded(rows) for rows in range(1, 101)]
    assert sorted(set(found)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 100]
    assert all(rows <= padded <= 1.5 * rows for rows, padded in enumerate(found, 1))
