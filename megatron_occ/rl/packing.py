"""Micro-batches of sequences of different length under a token budget; plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapreplace

from megatron_occ.config.sizes import round_up
from megatron_occ.config.words import counted

Bin = list[int]


def plan_micro_batches(
    lengths: Sequence[int],
    *,
    ranks: int,
    budget: int,
    multiple: int = 1,
    count_multiple: int = 1,
) -> list[list[Bin]]:
    """Cut the sequences of a mini-batch into micro-batches, as many on every rank.

    The smallest count is taken that fits. Longest sequence first, each goes to the micro-batch with
    the fewest tokens so far (Graham 1969: the fullest has at most 4/3 of the tokens that the best
    cut would give it). Micro-batches are then dealt in rounds of one for each rank, the fullest
    to the rank with the fewest tokens: two ranks differ by at most as much as the fullest and the
    emptiest micro-batch do.

    No micro-batch is empty: Megatron's schedule has no such thing, and a made-up sequence would
    cost time. Where the number of sequences is a multiple of ``ranks * count_multiple``, a cut
    exists for all lengths within the budget (equal counts of one sequence, at worst), so a run
    that starts does not end here.

    Args:
        lengths: tokens of each sequence, at least 1.
        ranks: data-parallel ranks.
        budget: tokens of a micro-batch at most.
        multiple: each sequence is padded to a multiple of this, and counted so.
        count_multiple: a rank's number of micro-batches is a multiple of this.

    Returns:
        Row indices, [rank][micro-batch][row], rows in ascending order. The same input gives the
        same plan on every rank; reordering the input gives micro-batches of the same lengths.

    Raises:
        ValueError: a sequence longer than the budget, or too few sequences to cut evenly.
    """
    assert min(lengths, default=1) >= 1, f"a sequence without tokens: {min(lengths)}"
    aligned = [round_up(length, multiple) for length in lengths]
    _check_longest(lengths, aligned, budget)
    step = ranks * count_multiple
    fewest = -(-sum(aligned) // (budget * step)) * step
    for count in range(max(fewest, step), len(aligned) + 1, step):
        bins = _fill(aligned, count)
        loads = [sum(aligned[row] for row in rows) for rows in bins]
        if max(loads) <= budget:
            return _deal(bins, loads, ranks)
    raise ValueError(
        f"rl.micro_batch_tokens={budget}: the {len(aligned)} sequences of an update can't be cut "
        f"into micro-batches of at most so many tokens, a multiple of {step} of them "
        f"({counted(ranks, 'data-parallel rank')}). Make the sequences of an update a multiple of "
        f"{step} (rl.prompts_per_step, rl.samples_per_prompt, rl.mini_batches), or raise "
        "rl.micro_batch_tokens"
    )


def _check_longest(lengths: Sequence[int], aligned: list[int], budget: int) -> None:
    if max(aligned, default=0) > budget:
        row = aligned.index(max(aligned))
        padded = "" if aligned[row] == lengths[row] else f", {aligned[row]} with padding"
        raise ValueError(
            f"rl.micro_batch_tokens={budget}: a sequence has "
            f"{counted(lengths[row], 'token')}{padded}. Give at least {aligned[row]}, or lower "
            "rl.rollout.max_response_length"
        )


def _fill(lengths: list[int], count: int) -> list[Bin]:
    """Rows in ``count`` bins: longest first, each into the least loaded one."""
    bins: list[Bin] = [[] for _ in range(count)]
    loads = [(0, index) for index in range(count)]  # a heap
    for row in _longest_first(lengths):
        load, index = loads[0]
        bins[index].append(row)
        heapreplace(loads, (load + lengths[row], index))
    return [sorted(rows) for rows in bins]


def _deal(bins: list[Bin], loads: list[int], ranks: int) -> list[list[Bin]]:
    """Rounds of one bin for each rank, the fullest to the least loaded rank."""
    dealt: list[list[Bin]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    order = _longest_first(loads)
    for start in range(0, len(order), ranks):
        lightest = sorted(range(ranks), key=lambda rank: (totals[rank], rank))
        for rank, index in zip(lightest, order[start : start + ranks], strict=True):
            dealt[rank].append(bins[index])
            totals[rank] += loads[index]
    return dealt


def _longest_first(lengths: list[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
