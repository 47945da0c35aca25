"""From a step's rollouts to this rank's mini-batches: the cut, and the exchange between ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_occ.config.schema import RLConfig
from megatron_occ.rl.batch import MiniBatch, RolloutBatch, consecutive
from megatron_occ.rl.interfaces import Actor, Collectives
from megatron_occ.rl.packing import plan_micro_batches

Plan = list[list[list[int]]]  # of a mini-batch: [rank][micro-batch][row of the step]


def distribute(
    batch: RolloutBatch, owners: Sequence[int], config: RLConfig, actor: Actor, *, parts: int = 1
) -> list[MiniBatch]:
    """Cut a step into mini-batches, and take this rank's part of each.

    Mini-batch m is the m-th part of the step's rows in their global order, on any layout. Without
    ``rl.micro_batch_tokens`` every rank gets as many rows of it, in padded micro-batches of
    ``rl.micro_batch_size``, and nothing is exchanged where the rows lie evenly already. With it,
    micro-batches are planned over all ranks, see :func:`plan_micro_batches`.

    Args:
        batch: the rows that this rank holds, in global order, as wide on all ranks.
        owners: the data-parallel rank that holds each row of the step, in global order.
        config: section ``rl``.
        actor: the policy, for its layout and what it asks of micro-batches.
        parts: cut each mini-batch into as many, of consecutive rows; a micro-batch lies in one.

    Raises:
        ValueError: a sequence does not fit the token budget, see :func:`plan_micro_batches`.
    """
    step = _Step(owners, actor.layout)
    size = len(owners) // (config.mini_batches * parts)
    spans = [range(start, start + size) for start in range(0, len(owners), size)]
    lengths = None
    if config.micro_batch_tokens is None:
        plans = [_padded_plan(rows, step, config.micro_batch_size) for rows in spans]
    else:
        lengths = step.in_global_order(batch.lengths()).tolist()
        plans = [_packed_plan(rows, lengths, config.micro_batch_tokens, actor) for rows in spans]
    mine = step.exchange(batch, plans)
    pieces = _cut(mine, [plan[step.rank] for plan in plans], lengths)
    return pieces if parts == 1 else _joined(pieces, mine, parts)


def _joined(pieces: list[MiniBatch], rows: RolloutBatch, parts: int) -> list[MiniBatch]:
    """Mini-batches of ``parts`` pieces each, whose rows follow each other in ``rows``."""
    groups = [pieces[start : start + parts] for start in range(0, len(pieces), parts)]
    spans = consecutive(sum(len(piece.rows) for piece in group) for group in groups)
    return [
        MiniBatch.joined(group, rows.rows(span.start, span.stop))
        for group, span in zip(groups, spans, strict=True)
    ]


def _packed_plan(rows: range, lengths: list[int], budget: int, actor: Actor) -> Plan:
    plan = plan_micro_batches(
        lengths[rows.start : rows.stop],
        ranks=actor.layout.data_parallel_size,
        budget=budget,
        multiple=actor.sequence_multiple,
        count_multiple=actor.micro_batch_multiple,
    )
    return [[[rows[index] for index in part] for part in parts] for parts in plan]


def _padded_plan(rows: range, step: _Step, size: int) -> Plan:
    """As many rows for each rank, of those that it holds where there are enough."""
    assert len(rows) % step.ranks == 0, "validate refuses other sizes"
    share = len(rows) // step.ranks
    held = [[row for row in rows if step.owners[row] == rank] for rank in range(step.ranks)]
    spare = [row for part in held for row in part[share:]]
    plan = []
    for part in held:
        missing = max(0, share - len(part))
        mine = sorted(part[:share] + spare[:missing])
        spare = spare[missing:]
        plan.append([mine[start : start + size] for start in range(0, share, size)])
    return plan


def _cut(batch: RolloutBatch, mine: Plan, lengths: list[int] | None) -> list[MiniBatch]:
    """``batch`` in mini-batches; ``mine`` is [mini-batch][micro-batch][row of the step]."""
    mini_batches, start = [], 0
    for parts in mine:
        rows = [row for part in parts for row in part]
        sizes = [len(part) for part in parts]
        own = None if lengths is None else [lengths[row] for row in rows]
        mini_batches.append(MiniBatch(batch.rows(start, start + len(rows)), sizes, own))
        start += len(rows)
    return mini_batches


class _Step:
    """Which rank holds which row of a step, and the exchange of rows.

    Args:
        owners: rank of each row, in global order; a rank's own rows are in this order too.
        layout: this rank's place.
    """

    def __init__(self, owners: Sequence[int], layout: Collectives) -> None:
        self.owners, self.layout = owners, layout
        self.rank, self.ranks = layout.data_parallel_rank, layout.data_parallel_size
        self._room = max(Counter(owners).values())
        seen: Counter[int] = Counter()
        self._places = []  # of each row in what `_gather` returns
        for owner in owners:
            self._places.append(owner * self._room + seen[owner])
            seen[owner] += 1

    def in_global_order(self, values: Tensor) -> Tensor:
        """Values of all rows of the step, from those of this rank's rows."""
        return self._take(values, range(len(self.owners)))

    def exchange(self, batch: RolloutBatch, plans: Sequence[Plan]) -> RolloutBatch:
        """The rows that the plans give this rank, in their order."""
        wanted = [
            [row for plan in plans for part in plan[rank] for row in part]
            for rank in range(self.ranks)
        ]
        held = [
            [row for row, owner in enumerate(self.owners) if owner == rank]
            for rank in range(self.ranks)
        ]
        if wanted == held:  # compared for all ranks: each of them takes part in a gather, or none
            return batch
        # one field at a time: the whole step is never in memory at once
        return batch.map(lambda values: self._take(values, wanted[self.rank]))

    def _take(self, values: Tensor, rows: Sequence[int]) -> Tensor:
        """[n, ...] of this rank's rows to [len(rows), ...] of the given rows of the step.

        What lies on the host, masks and routes, comes through the device in slices, as bytes: all
        rows of the step are there at once, and not every kind of number can be sent.
        """
        if values.dim() < 3:
            return self._picked(values, rows)
        found = [
            self._picked(_as_bytes(part, self.layout.device), rows).cpu().view(values.dtype)
            for part in values.unbind(2)
        ]
        return torch.stack(found, 2) if found else values.new_empty(len(rows), *values.shape[1:])

    def _picked(self, values: Tensor, rows: Sequence[int]) -> Tensor:
        padding = (0, 0) * (values.dim() - 1) + (0, self._room - len(values))
        gathered = self.layout.gather_data_parallel(F.pad(values, padding))
        places = [self._places[row] for row in rows]
        return gathered[torch.tensor(places, device=values.device)]


def _as_bytes(values: Tensor, device: torch.device) -> Tensor:
    return values.clone(memory_format=torch.contiguous_format).to(device).view(torch.uint8)
