"""A number that is not finite on one rank: no rank makes the update, and the next one is made."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.layout_cases import PP2, TP2, read
from benchmarks.layout_runs import _actor, mini_batches
from megatron_occ.mcore.startup import initialize
from megatron_occ.rl.update import PolicyUpdater
from tests.mcore.distributed import run_ranks
from tests.mcore.test_exact import MODELS

OCC = ("mtp.preset=occ", "mtp.num_layers=1")
MOE = (*OCC, *(word for word in MODELS["moe"] if word.startswith("model.")))


def parameters(actor):
    return [p.detach().clone() for chunk in actor.chunks for p in chunk.parameters()]


def skip_and_go_on(model, layout, spoilt_rank):
    """Whether updates were skipped, and whether they left the weights alone."""
    config = read(model, layout)
    initialize(config)
    actor = _actor(config)
    updater, found = PolicyUpdater(config, actor), []
    for step, batch in enumerate(mini_batches(config, actor)[:2]):
        if step == 0 and torch.distributed.get_rank() == spoilt_rank:
            advantages = batch.rows.advantages.clone()
            advantages[0] = torch.nan
            batch = replace(batch, rows=replace(batch.rows, advantages=advantages))
        before = parameters(actor)
        skipped = updater.run_update(batch).skipped
        pairs = zip(before, parameters(actor), strict=True)
        found.append((skipped, all(torch.equal(old, new) for old, new in pairs)))
        assert all(torch.isfinite(p).all() for p in parameters(actor))
    return found


@pytest.mark.parametrize("spoilt_rank", [0, 1])
@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (OCC, ()),
        (OCC, ("parallel.distributed_optimizer=true", "parallel.overlap_grad_reduce=true")),
        (OCC, (TP2,)),
        (OCC, (PP2,)),
        (MOE, ("parallel.expert=2",)),
    ],
)
def test_no_rank_makes_the_update_and_the_next_one_is_made(model, layout, spoilt_rank):
    # the loss is computed on the last stage, whatever the first one holds
    rank = 1 if PP2 in layout else spoilt_rank
    results = run_ranks(skip_and_go_on, 2, model, layout, rank)
    assert results == [[(True, True), (False, False)]] * 2
