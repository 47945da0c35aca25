"""Rows of a step dealt over ranks: what moves, what stays, and what each update consists of."""

from __future__ import annotations

import pytest
import torch

from megatron_occ.rl.batch import RolloutBatch
from megatron_occ.rl.exchange import distribute
from tests.unit.fake_layouts import FakeLayout, run_ranks
from tests.unit.fakes import FakeActor
from tests.unit.rl_setup import DYNAMIC, has_an_a, make_trainer, rl_config

ROWS, WIDTH = 16, 12
LENGTHS = [3, 12, 7, 5, 5, 9, 2, 11, 4, 4, 12, 6, 8, 3, 10, 7]


def step_rows(rows):
    """Row r of the step: every token and number says r, and it has LENGTHS[r] tokens."""
    index = torch.tensor(rows, dtype=torch.long)
    mask = torch.arange(WIDTH) < torch.tensor([LENGTHS[row] for row in rows]).view(-1, 1)
    ids = index.view(-1, 1).expand(-1, WIDTH).clone()
    masks = (ids.unsqueeze(2) * torch.tensor([1, 2])).int()
    # of three layers, and too large for a byte
    routes = 300 * ids.view(-1, WIDTH, 1, 1) + torch.arange(6).view(3, 2)
    return RolloutBatch(
        ids,
        mask.float(),
        -ids.float(),
        index + 0.5,
        sampling_masks=masks,
        routes=routes.to(torch.int16),
    )


def deal(owners, *overrides, layout=None, multiple=1, count_multiple=1):
    """This rank's mini-batches (two) of a step whose row r is held by rank ``owners[r]``."""
    actor = FakeActor(layout=layout)
    actor.sequence_multiple, actor.micro_batch_multiple = multiple, count_multiple
    held = [row for row, owner in enumerate(owners) if owner == actor.layout.data_parallel_rank]
    config = rl_config("rl.micro_batch_size=2", *overrides)
    return distribute(step_rows(held), owners, config.rl, actor)


def names(mini):
    """The rows in a mini-batch; checks that everything of a row travelled with it."""
    rows = mini.rows.advantages.sub(0.5).long().tolist()
    for name in ("ids", "response_mask", "rollout_logprobs", "sampling_masks", "routes"):
        assert torch.equal(getattr(mini.rows, name), getattr(step_rows(rows), name)), name
    return rows


def ranks_deal(ranks, owners, *overrides, **settings):
    def work(layout):
        return deal(owners, *overrides, layout=layout, **settings), layout.gathered

    return run_ranks(ranks, work)


def test_one_rank_keeps_its_rows_in_padded_micro_batches():
    first, second = deal([0] * ROWS)
    assert (names(first), names(second)) == (list(range(8)), list(range(8, 16)))
    assert first.sizes == second.sizes == [2, 2, 2, 2]
    assert first.lengths is None


def test_rows_that_lie_evenly_stay_where_they_are():
    results = ranks_deal(2, [row // 4 % 2 for row in range(ROWS)])
    held = [[names(mini) for mini in minis] for minis, _ in results]
    assert held == [[[0, 1, 2, 3], [8, 9, 10, 11]], [[4, 5, 6, 7], [12, 13, 14, 15]]]
    assert [gathered for _, gathered in results] == [0, 0]


@pytest.mark.parametrize(
    "owners",
    [
        [0] * 8 + [1] * 8,  # each rank holds a whole mini-batch
        [1] * ROWS,  # dynamic sampling: one rank has all that is of use
        [0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 0],
    ],
)
def test_a_mini_batch_consists_of_the_same_rows_on_any_layout(owners):
    results = ranks_deal(2, owners)
    for number, expected in enumerate((range(8), range(8, 16))):
        parts = [names(minis[number]) for minis, _ in results]
        assert [len(part) for part in parts] == [4, 4]
        assert sorted(parts[0] + parts[1]) == list(expected)
        assert all(minis[number].sizes == [2, 2] for minis, _ in results)


def test_a_row_moves_only_if_its_rank_has_too_many():
    owners = [0, 0, 1, 0, 0, 0, 1, 0, *[row // 4 % 2 for row in range(8, 16)]]
    (first, _), (second, _) = ranks_deal(2, owners)
    assert names(first[0]) == [0, 1, 3, 4]
    assert names(second[0]) == [2, 5, 6, 7]


@pytest.mark.parametrize("owners", [[0] * ROWS, [row % 2 for row in range(ROWS)]])
def test_packed_micro_batches_are_planned_over_all_ranks(owners):
    results = ranks_deal(2, owners, "rl.micro_batch_tokens=16", count_multiple=2, multiple=4)
    for number, expected in enumerate((range(8), range(8, 16))):
        minis = [minis[number] for minis, _ in results]
        assert sorted(names(minis[0]) + names(minis[1])) == list(expected)
        assert len(minis[0].sizes) == len(minis[1].sizes)
        assert len(minis[0].sizes) % 2 == 0
        for mini in minis:
            assert mini.lengths == [LENGTHS[row] for row in names(mini)]
            for rows, lengths in mini.micro_batches():
                assert sum(-(-length // 4) * 4 for length in lengths) <= 16
                assert rows.ids.shape == (len(lengths), max(lengths))


def test_a_sequence_over_the_budget_ends_the_run_with_the_remedy():
    with pytest.raises(ValueError, match=r"rl\.micro_batch_tokens=10: a sequence has 12 tokens"):
        deal([0] * ROWS, "rl.micro_batch_tokens=10")


LAYOUTS = {
    "dynamic": (*DYNAMIC, "rl.mini_batches=4", "rl.micro_batch_size=1"),
    "dynamic packed": (*DYNAMIC, "rl.micro_batch_tokens=16"),
    "packed": ("rl.micro_batch_tokens=16", "rl.mini_batches=4"),
}


@pytest.mark.parametrize("overrides", LAYOUTS.values(), ids=LAYOUTS)
def test_two_steps_of_two_ranks_are_those_of_one(overrides):
    """The whole loop, sampling from the updated policy included; some groups have no spread."""

    def run(layout):
        config = rl_config("mtp.preset=occ_decoupled", "rl.rollout.log_samples=0", *overrides)
        trainer = make_trainer(config, FakeActor(layout=layout, seed=2), has_an_a)
        trainer.fit()
        return [metrics for phase, _, metrics in trainer.recorder.lines if phase == "rl"]

    expected = run(FakeLayout())
    dropped = sum(metrics["rollout/dropped_groups"] for metrics in expected)
    assert (dropped > 0) == (DYNAMIC[0] in overrides)
    for lines in run_ranks(2, run):
        for metrics, reference in zip(lines, expected, strict=True):
            for name, value in reference.items():
                if not name.startswith("time/") and "second" not in name:
                    assert metrics[name] == pytest.approx(value, abs=1e-6), name
