"""Forward and backward pass of heads over tiles of logits, see ``logprobs.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_occ.mcore.vocabulary import fused
from megatron_occ.mcore.vocabulary.tiles import SoftmaxSums, Tiles, VocabShard, blocks

# elements: 16 MiB in fp32
ADDED_AT_ONCE = 2**22


def local_sums(
    hidden: Tensor,
    targets: Tensor,
    masks: Tensor | None,
    weight: Tensor,
    shard: VocabShard,
    tiles: Tiles,
    wanted: tuple[bool, bool],
) -> SoftmaxSums:
    """Softmax sums of one head's tokens over this rank's columns.

    Args:
        hidden: [n, h].
        targets: [n].
        masks: [n, m], see ``logprobs.HeadTokens``.
        weight: [size of the shard, h].
        shard: this rank's part of the vocabulary.
        tiles: two copies of a tile if entropies are wanted, unless they are fused.
        wanted: whether entropies and whether top ids are.
    """
    if not (weight.size(0) and hidden.size(0)):
        return SoftmaxSums.none(hidden, *wanted)
    parts = []
    for rows in blocks(hidden.size(0), tiles.rows):
        sums = None
        for columns in blocks(weight.size(0), tiles.columns):
            removed = None if masks is None else shard.removed(masks[rows], columns)
            factors = hidden[rows], weight[columns], removed
            position = shard.locate(targets[rows], columns)
            found = _tile_sums(factors, position, shard.start + columns.start, tiles, wanted)
            sums = found if sums is None else sums.merge(found)
        parts.append(sums)
    return SoftmaxSums.concatenate(parts)


def _tile_sums(
    factors: tuple[Tensor, Tensor, Tensor | None],
    position: tuple[Tensor, Tensor],
    first_id: int,
    tiles: Tiles,
    wanted: tuple[bool, bool],
) -> SoftmaxSums:
    if tiles.fused:
        logits = tiles.products(*factors)
        return fused.tile_sums(logits, position, first_id, tiles.temperature, wanted)
    logits = tiles.logits(*factors)
    want_entropy, want_top = wanted
    maximum, top = logits.max(-1) if want_top else (logits.amax(-1), None)
    top_ids = top + first_id if want_top else None
    column, owned = position
    picked = torch.where(owned, logits.gather(-1, column[:, None]).squeeze(-1), 0.0)
    centred = logits.sub_(maximum[:, None])
    if not want_entropy:
        return SoftmaxSums(maximum, centred.exp_().sum(-1), picked, None, top_ids)
    exps = torch.exp(centred, out=tiles.memory(logits.shape, 1))
    total = exps.sum(-1)
    return SoftmaxSums(maximum, total, picked, exps.mul_(centred).sum(-1), top_ids)


@dataclass
class HeadGradient:
    """One head in the backward pass: upstream gradients, and the sum for its hidden states.

    ``scale`` and ``slope`` are the gradients of log-prob and entropy, divided by the temperature.
    """

    hidden: Tensor
    targets: Tensor
    masks: Tensor | None
    log_z: Tensor
    scale: Tensor
    slope: Tensor | None
    # slope * entropy + scale
    offset: Tensor | None
    total: Tensor | None = None

    @staticmethod
    def start(
        saved: Sequence[Tensor | None], upstream: Sequence[Tensor | None], temperature: float
    ) -> HeadGradient | None:
        """None if nothing flows back into this head."""
        *tokens, log_z, entropy = saved
        grad_logprobs, grad_entropy = upstream
        if grad_logprobs is None and grad_entropy is None:
            return None
        scale = torch.zeros_like(log_z) if grad_logprobs is None else grad_logprobs / temperature
        if grad_entropy is None:
            return HeadGradient(*tokens, log_z, scale, None, None)
        slope = grad_entropy / temperature
        return HeadGradient(*tokens, log_z, scale, slope, slope * entropy + scale)

    def allocate(self, one_block: bool, size: int) -> None:
        """Make room for the gradient of the hidden states: in fp32 if it is a sum over blocks."""
        new = torch.empty_like if size else torch.zeros_like
        self.total = new(self.hidden, dtype=self.hidden.dtype if one_block else self.log_z.dtype)

    def of_logits(
        self, weight: Tensor, columns: slice, rows: slice, shard: VocabShard, tiles: Tiles
    ) -> Tensor:
        """Gradient of undivided logits [rows, columns], in the precision of matrix products.

        Args:
            weight: [v_local, h].
            columns: of the tile, rows of the weight.
            rows: of the head's tokens.
            shard: this rank's part of the vocabulary.
            tiles: the next one overwrites what is returned.
        """
        removed = None if self.masks is None else shard.removed(self.masks[rows], columns)
        factors = self.hidden[rows], weight[columns], removed
        position = shard.locate(self.targets[rows], columns)
        if tiles.fused:
            return self._fused(tiles.products(*factors), rows, position, tiles)
        logits = tiles.logits(*factors)
        log_probs = logits.sub_(self.log_z[rows, None])
        scale = self.scale[rows, None]
        if self.slope is None:
            grad = log_probs.exp_().mul_(-scale)
        else:
            # d H / d logit = -p (log p + H)
            grad = torch.exp(log_probs, out=tiles.memory(logits.shape, 1))
            slope, offset = self.slope[rows, None], self.offset[rows, None]
            grad.mul_(log_probs.mul_(-slope).sub_(offset))
        # d log p_y / d logit = onehot(y) - p
        column, owned = position
        grad.scatter_add_(-1, column[:, None], scale * owned[:, None])
        return tiles.narrowed(grad)

    def _fused(
        self, logits: Tensor, rows: slice, position: tuple[Tensor, Tensor], tiles: Tiles
    ) -> Tensor:
        terms = None if self.slope is None else (self.slope[rows], self.offset[rows])
        of_rows = self.log_z[rows], self.scale[rows]
        return fused.logit_gradient(logits, position, tiles.temperature, *of_rows, terms)

    def finish(self) -> Tensor | None:
        """Gradient of the hidden states; gives up the sum."""
        total, self.total = self.total, None
        return None if total is None else total.to(self.hidden.dtype)


def run_backward(
    heads: list[HeadGradient],
    weight: Tensor,
    shard: VocabShard,
    tiles: Tiles,
    need_weight: bool,
) -> Tensor | None:
    """Fill the heads' totals; returns the gradient of the weight if needed, [v_local, h]."""
    pieces = [(head, rows) for head in heads for rows in blocks(head.hidden.size(0), tiles.rows)]
    if not pieces:
        return None
    grad_weight = torch.empty_like(weight) if need_weight else None
    sums = None
    if need_weight:
        grad_weight[shard.size :] = 0
        if len(pieces) > 1 and heads[0].log_z.dtype != weight.dtype:
            sums = heads[0].log_z.new_empty(tiles.columns, weight.size(1))
    for columns in blocks(shard.size, tiles.columns):
        block, total = weight[columns], None
        if need_weight:
            total = grad_weight[columns] if sums is None else sums[: block.size(0)]
        for i, (head, rows) in enumerate(pieces):
            hidden = head.hidden[rows]
            grad = head.of_logits(weight, columns, rows, shard, tiles)
            if head.total is not None:
                _add_product(head.total[rows], grad, block, tiles, first=columns.start == 0)
            if need_weight:
                _add_product(total, grad.t(), hidden, tiles, first=i == 0)
        if sums is not None:
            grad_weight[columns] = total
    return grad_weight


def _add_product(total: Tensor, left: Tensor, right: Tensor, tiles: Tiles, *, first: bool) -> None:
    """Add ``left @ right`` to a total that may be of higher precision; the first one sets it."""
    if total.dtype == left.dtype:
        torch.mm(left, right, out=total) if first else total.addmm_(left, right)
        return
    product = left @ right
    if first:
        total.copy_(product)
        return
    if tiles.fused:
        fused.add(total, product)
        return
    # on the CPU a sum of two precisions makes a copy of the lower one in the higher
    for rows in blocks(total.size(0), max(1, ADDED_AT_ONCE // total.size(1))):
        total[rows] += product[rows]
