"""The balance loss of experts (``losses/balance.py``) in the routers of a training pass.

A forward hook on each router adds the loss's gradient to the router's logits, by way of the weights
that it returns: their values stay what they are. Megatron's own balancing losses are off. They are
means over a micro-batch, whose gradient is multiplied by its tokens for a schedule that divides by
those of the update; ours divides by nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_occ.losses.balance import balance_sum, highest, sequence_loads
from megatron_occ.mcore.placement import Placement
from megatron_occ.mcore.reruns import OfMicroBatch


@dataclass(frozen=True)
class BalanceTerm:
    """What the balance loss needs of a micro-batch.

    Args:
        ends: [b] tokens of each row; what follows is padding.
        weights: [1+K] of a token in the trunk's routers and in those of each MTP depth: the
            coefficient over the tokens of the update.
    """

    ends: Tensor
    weights: Tensor


@dataclass(frozen=True)
class _Part:
    """A micro-batch's tokens of one router on this rank.

    Args:
        sequences: [n] row of each token; b: of none, it is padding.
        lengths: [b] tokens of each row, on all ranks that share it.
        weight: of a token.
    """

    sequences: Tensor
    lengths: Tensor
    weight: Tensor


class _RouterHook:
    """Adds the loss to one router; runs of the router without a graph stay as they are.

    Attributes:
        part: of the micro-batch; None: no loss.
        sums: the loss without its weight, times tokens, and tokens, since they were last taken.
    """

    def __init__(self, router: TopKRouter) -> None:
        self.part: OfMicroBatch[_Part] = OfMicroBatch()
        self.sums: Tensor | None = None
        router.register_forward_hook(self)

    def __call__(self, router: TopKRouter, inputs: tuple, output: Any) -> Any:
        part, _ = self.part.take()
        if part is None or not torch.is_grad_enabled():
            return None
        weights, chosen = output
        # the router's own product once more: its graph leads to its weights and its input
        logits = router.gating(inputs[0]).flatten(0, -2)
        # not `chosen`, which a bias, groups and replay have a part in
        asked = highest(logits, router.topk, router.score_function)
        loads = sequence_loads(asked, part.sequences, part.lengths.numel())
        if (group := _sharing_ranks(router)).size() > 1:
            torch.distributed.all_reduce(loads, group=group)
        leaf = logits.detach().requires_grad_()
        value = balance_sum(
            leaf,
            loads,
            part.sequences,
            part.lengths,
            top_k=router.topk,
            score_function=router.score_function,
        )
        (slope,) = torch.autograd.grad(value, leaf)
        self._count(value, part)
        return _WithGradient.apply(weights, logits, slope * part.weight), chosen

    def pop_sums(self) -> Tensor | None:
        """:attr:`sums`, which start anew; [2] float64."""
        found, self.sums = self.sums, None
        return found

    def _count(self, value: Tensor, part: _Part) -> None:
        tokens = (part.sequences < part.lengths.numel()).sum()
        found = torch.stack((value.detach().double(), tokens.double()))
        self.sums = found if self.sums is None else self.sums + found


class _WithGradient(torch.autograd.Function):
    """The first argument as it is; the second gets the third as its gradient."""

    @staticmethod
    def forward(ctx, values, receiver, gradient):  # noqa: ANN001, ANN205
        ctx.save_for_backward(gradient)
        return values.view_as(values)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        (gradient,) = ctx.saved_tensors
        return grad, gradient, None


class Balance:
    """The routers of a model chunk: those of its decoder layers, and of its own MTP layers.

    Copies of MTP layers on the same weights have no hooks: their passes do not train the head.

    Args:
        chunk: an ``OCCGPTModel``.
    """

    def __init__(self, chunk: Any) -> None:
        self._trunk = _hooked(chunk.decoder)
        self._depths = _hooked(chunk.mtp) if chunk.mtp_process else []
        is_split = chunk.config.sequence_parallel
        self._group: ProcessGroup | None = chunk.pg_collection.tp if is_split else None

    def begin(self, term: BalanceTerm | None, placement: Placement, *, trains: bool) -> None:
        """Before the trunk's pass over a micro-batch.

        Args:
            term: of the micro-batch; None: the pass has no balance loss.
            placement: of its tokens.
            trains: a backward pass follows.
        """
        if self._trunk:
            part = None if term is None or not trains else self._part(term, placement, 0)
            _begin(self._trunk, [part] * len(self._trunk), trains)

    def begin_depths(self, term: BalanceTerm | None, placement: Placement, *, trains: bool) -> None:
        """Before a pass over the micro-batch's MTP layers that trains them, or does not."""
        parts: list[_Part | None] = [None] * len(self._depths)
        if term is not None and trains:
            parts = [self._part(term, placement, k + 1) for k in range(len(parts))]
        _begin(self._depths, parts, trains)

    def forget(self) -> None:
        """After a mini-batch."""
        for hook in (*self._trunk, *self._depths):
            hook.part.forget()

    def pop_sums(self) -> Tensor:
        """[2, 2] loss times tokens and tokens, of trunk and MTP layers, over their routers."""
        return torch.stack([_total(self._trunk), _total(self._depths)])

    def _part(self, term: BalanceTerm, placement: Placement, depth: int) -> _Part:
        """Of the trunk, 0, or of an MTP depth k, which reads token t + k beside position t."""
        rows, width = placement.size
        lengths = (term.ends - depth).clamp(min=0)
        row = placement.local // width
        # padding belongs to no row, and so to one without tokens
        ends = torch.cat((lengths, lengths.new_zeros(1)))
        is_inside = placement.local % width < ends[row]
        sequences = torch.where(is_inside, row, rows)
        if self._group is not None:
            sequences = sequences.chunk(self._group.size())[self._group.rank()]
        return _Part(sequences, lengths, term.weights[depth])


def _hooked(module: nn.Module) -> list[_RouterHook]:
    """Of all routers of a module, in the order of layers."""
    return [_RouterHook(each) for each in module.modules() if isinstance(each, TopKRouter)]


def _begin(hooks: Sequence[_RouterHook], parts: Sequence[_Part | None], trains: bool) -> None:
    for hook, part in zip(hooks, parts, strict=True):
        hook.part.begin(part, trains=trains)


def _total(hooks: Iterable[_RouterHook]) -> Tensor:
    found = [sums for hook in hooks if (sums := hook.pop_sums()) is not None]
    return torch.stack(found).sum(0).cpu() if found else torch.zeros(2, dtype=torch.float64)


def _sharing_ranks(router: TopKRouter) -> ProcessGroup:
    """Ranks that have other tokens of the same sequences."""
    return router.tp_cp_group if router.config.sequence_parallel else router.cp_group
