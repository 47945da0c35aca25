"""The helper that runs a function on several ranks."""

from __future__ import annotations

import time

import pytest
import torch

from tests.mcore.distributed import RankError, run_ranks


def total(value):
    result = torch.tensor([value + torch.distributed.get_rank()])
    torch.distributed.all_reduce(result)
    return {"total": result, "threads": torch.get_num_threads()}


def fail_on_one(rank, waiting):
    if torch.distributed.get_rank() == rank:
        raise ValueError(f"planned on rank {rank}")
    time.sleep(waiting)
    torch.distributed.barrier()


def test_results_come_back_by_rank():
    for result in run_ranks(total, 3, 10):
        assert result["total"].tolist() == [33]
        assert result["threads"] == 1


@pytest.mark.parametrize("waiting", [0, 600])
def test_the_first_error_is_raised_and_nobody_is_waited_for(waiting):
    with pytest.raises(RankError, match=r"rank 1 of 2:(.|\n)*ValueError: planned on rank 1"):
        run_ranks(fail_on_one, 2, 1, waiting)


def test_a_rank_that_does_not_end_is_killed():
    with pytest.raises(RankError, match="time limit 1 s"):
        run_ranks(fail_on_one, 1, -1, 600, timeout=1)
