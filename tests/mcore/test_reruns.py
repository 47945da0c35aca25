"""Values of micro-batches where a module is run a second time."""

from __future__ import annotations

import torch

from megatron_occ.mcore.reruns import OfMicroBatch


def test_runs_with_a_graph_get_the_values_of_those_without_in_their_order():
    value: OfMicroBatch[str] = OfMicroBatch()
    for name in ("first", "second"):
        value.begin(name, trains=True)
        with torch.no_grad():
            assert value.take() == (name, False)
    assert [value.take(), value.take()] == [("first", True), ("second", True)]
    # nothing waits any more: a run with a graph is one of its own
    assert value.take() == ("second", False)


def test_nothing_waits_of_a_pass_that_does_not_train_or_of_an_earlier_mini_batch():
    value: OfMicroBatch[str] = OfMicroBatch()
    for trains in (False, True):
        value.begin("first", trains=trains)
        with torch.no_grad():
            value.take()
        if trains:
            value.forget()
            assert value.take() == (None, False)
        value.begin("second", trains=True)
        assert value.take() == ("second", False)
