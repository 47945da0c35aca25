"""Logits of [n, h] hidden states in tiles of tokens and vocabulary ids, and sums over the tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

# logit of an id that the softmax leaves out: finite, so that no difference of two is no number
REMOVED = -1e30


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the vocabulary: ids ``start .. start + size - 1``.

    ``size`` leaves out padding rows that only make the vocabulary divisible; it may be 0.
    """

    start: int
    size: int
    group: ProcessGroup | None = None

    def reduce(self, values: Tensor, operation: ReduceOp.RedOpType = ReduceOp.SUM) -> Tensor:
        """All-reduce over tensor-parallel ranks, in place; returns it."""
        if self.group is not None:
            all_reduce(values, op=operation, group=self.group)
        return values

    def locate(self, ids: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """Column of each id in a block of this rank's columns, and whether the block has it."""
        local = ids - (self.start + columns.start)
        owned = (local >= 0) & (local < columns.stop - columns.start)
        return torch.where(owned, local, 0), owned

    def removed(self, masks: Tensor, columns: slice) -> Tensor:
        """[n, columns] what a softmax leaves out of a block of this rank's columns.

        Args:
            masks: [n, m] 1 + the ids that it is over, then 0; 0 alone: all ids.
            columns: of the block.
        """
        width = columns.stop - columns.start
        local = masks.long() - (1 + self.start + columns.start)
        elsewhere = (masks == 0) | (local < 0) | (local >= width)
        removed = (masks[:, :1] > 0).repeat(1, width + 1)
        return removed.scatter_(1, local.masked_fill_(elsewhere, width), False)[:, :width]


def blocks(length: int, size: int) -> list[slice]:
    """Slices of at most ``size`` that cover ``length``."""
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]


def tile_shape(tokens: int, vocabulary: int, width: int, elements: int) -> tuple[int, int]:
    """Rows and columns of a tile: all of both if they fit, else about as many of each.

    A block of the weight [columns, width] has no more elements than a tile.
    """
    fitting = max(1, elements // max(1, tokens))
    if vocabulary > fitting:
        edge = 1 << elements.bit_length() // 2
        # a power of two: matrix products are slow with odd strides
        vocabulary = min(vocabulary, max(edge, 1 << fitting.bit_length() - 1))
    columns = max(1, min(vocabulary, elements // width))
    return max(1, min(tokens, elements // columns)), columns


class Tiles:
    """The memory of one tile, used for one tile after the other.

    Fresh memory for each would cost the CPU more than the arithmetic on it. On a GPU ``fused.py``
    reads logits as they are multiplied, and no copy is needed.
    """

    def __init__(
        self,
        like: Tensor,
        shape: tuple[int, int],
        temperature: float,
        copies: int,
        *,
        fused: bool = False,
    ) -> None:
        """Allocate.

        Args:
            like: gives device and precision of matrix products.
            shape: rows and columns of the largest tile.
            temperature: divides the logits.
            copies: tiles in fp32 (or wider, if ``like`` is).
            fused: :meth:`products` alone are asked for.
        """
        self.rows, self.columns = shape
        self.temperature, self.fused = temperature, fused
        wide = torch.promote_types(like.dtype, torch.float32)
        size = self.rows * self.columns
        self._wide = [like.new_empty(size, dtype=wide) for _ in range(0 if fused else copies)]
        self._narrow = like.new_empty(size) if fused or like.dtype != wide else None

    def products(self, hidden: Tensor, weight: Tensor, removed: Tensor | None = None) -> Tensor:
        """[rows, h] and [columns, h] to undivided logits in the precision of matrix products.

        ``removed`` [rows, columns]: ids that a softmax leaves out, see ``VocabShard.removed``.
        """
        shape = (hidden.size(0), weight.size(0))
        logits = torch.mm(hidden, weight.t(), out=_view(self._narrow, shape))
        return logits if removed is None else logits.masked_fill_(removed, REMOVED)

    def logits(
        self, hidden: Tensor, weight: Tensor, removed: Tensor | None = None, *, copy: int = 0
    ) -> Tensor:
        """As :meth:`products`, divided by the temperature, in the given copy."""
        shape = (hidden.size(0), weight.size(0))
        wide = self.memory(shape, copy)
        if self._narrow is None:
            torch.mm(hidden, weight.t(), out=wide)
        else:
            wide.copy_(self.products(hidden, weight))
        if removed is not None:
            wide.masked_fill_(removed, REMOVED)
        return wide if self.temperature == 1.0 else wide.div_(self.temperature)

    def memory(self, shape: tuple[int, int], copy: int) -> Tensor:
        """A copy's memory, as a tile of this shape."""
        return _view(self._wide[copy], shape)

    def narrowed(self, values: Tensor) -> Tensor:
        """A tile in the precision of matrix products; the next tile overwrites it."""
        if self._narrow is None:
            return values
        return _view(self._narrow, values.shape).copy_(values)


def _view(memory: Tensor, shape: tuple[int, int]) -> Tensor:
    return memory[: shape[0] * shape[1]].view(shape)


@dataclass(frozen=True)
class SoftmaxSums:
    """Sums over some columns for each token, relative to the largest logit in them; each [n].

    ``total`` sums exp(x) and ``weighted`` exp(x) x over centred logits x; ``picked`` is the logit
    of the target, 0 where it is not among these columns.
    """

    maximum: Tensor
    total: Tensor
    picked: Tensor
    weighted: Tensor | None
    top_ids: Tensor | None

    @staticmethod
    def none(like: Tensor, entropy: bool, top_ids: bool) -> SoftmaxSums:
        """Sums over no columns: a rank may hold nothing but padding. ``like``: [n, h]."""
        zeros = like.new_zeros(like.size(0), dtype=torch.promote_types(like.dtype, torch.float32))
        # finite: infinity times a total of 0 would be no number
        lowest = torch.full_like(zeros, torch.finfo(zeros.dtype).min)
        ids = torch.zeros_like(zeros, dtype=torch.long) if top_ids else None
        return SoftmaxSums(lowest, zeros, zeros, zeros if entropy else None, ids)

    @staticmethod
    def concatenate(parts: list[SoftmaxSums]) -> SoftmaxSums:
        """Sums of consecutive tokens."""
        if len(parts) == 1:
            return parts[0]
        fields = zip(*(vars(part).values() for part in parts), strict=True)
        return SoftmaxSums(*(None if field[0] is None else torch.cat(field) for field in fields))

    def merge(self, other: SoftmaxSums) -> SoftmaxSums:
        """Sums over both sets of columns; ``other`` has the higher ids."""
        maximum = torch.maximum(self.maximum, other.maximum)
        total, weighted = self._centred_at(maximum)
        other_total, other_weighted = other._centred_at(maximum)
        weighted = None if weighted is None else weighted + other_weighted
        top_ids = self.top_ids
        if top_ids is not None:
            # the lowest id wins a tie, as argmax does
            top_ids = torch.where(other.maximum > self.maximum, other.top_ids, top_ids)
        picked = self.picked + other.picked
        return SoftmaxSums(maximum, total + other_total, picked, weighted, top_ids)

    def across(self, shard: VocabShard) -> SoftmaxSums:
        """Sums over the columns of all tensor-parallel ranks."""
        if shard.group is None:
            return self
        maximum = shard.reduce(self.maximum.clone(), ReduceOp.MAX)
        parts = [x for x in (self.picked, *self._centred_at(maximum)) if x is not None]
        picked, total, *weighted = shard.reduce(torch.stack(parts)).unbind()
        top_ids = self.top_ids
        if top_ids is not None:
            beaten = self.maximum < maximum
            top_ids = top_ids.masked_fill(beaten, torch.iinfo(top_ids.dtype).max)
            top_ids = shard.reduce(top_ids, ReduceOp.MIN)
        return SoftmaxSums(maximum, total, picked, weighted[0] if weighted else None, top_ids)

    def _centred_at(self, maximum: Tensor) -> tuple[Tensor, Tensor | None]:
        shift = self.maximum - maximum
        scale = shift.exp()
        if self.weighted is None:
            return self.total * scale, None
        return self.total * scale, (self.weighted + self.total * shift) * scale
