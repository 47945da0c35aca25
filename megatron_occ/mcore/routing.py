"""The experts of each token: taken down in one pass, and chosen again in another.

A router's choice is not continuous: rounding, or an update, sends a token to another expert, and
its log-prob jumps. Replaying the choices of the rollout (R3, arXiv 2510.11370) or of the old
log-probs (R2, arXiv 2512.01374) takes that jump out of the ratio. The weights of the chosen experts
are still the router's: they are computed from its present scores, which the gradient flows through.

Megatron asks an object in the router for the experts, ``RouterReplay``; :class:`Choices` takes its
place. Choices are written as 1 + the expert, and 0 where the router is to choose for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_occ.config.schema_model import MoEConfig
from megatron_occ.mcore.placement import Placement
from megatron_occ.mcore.reruns import OfMicroBatch
from megatron_occ.rl.batch import route_dtype

TopK = Callable[..., tuple[Tensor, Tensor]]


class Choices:
    """What one router is to choose, and what it chose.

    Attributes:
        chosen: [n, k] experts of the last pass.
        counts: choices that were replayed, and how many of them the router would not have made.
    """

    def __init__(self) -> None:
        self.chosen: Tensor | None = None
        self.counts: Tensor | None = None
        self._wanted: OfMicroBatch[Tensor] = OfMicroBatch()

    def begin(self, wanted: Tensor | None, *, trains: bool) -> None:
        """Before a micro-batch.

        Args:
            wanted: [n, k] choices; None: the router chooses.
            trains: a backward pass follows.
        """
        self._wanted.begin(wanted, trains=trains)

    def forget(self) -> None:
        """After a mini-batch: nothing is to be run again, and routers choose for themselves."""
        self._wanted.forget()
        self.chosen = None

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: TopK | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See Megatron's ``RouterReplay``: values and experts [n, k] from scores [n, experts]."""
        assert default_compute_topk is not None, "Megatron hands on how it would choose"
        values, own = default_compute_topk(
            scores, topk, num_groups=num_groups, group_topk=group_topk
        )
        wanted, is_again = self._wanted.take()
        self.chosen = own
        if wanted is None:
            return values, own
        is_replayed = wanted > 0
        self.chosen = torch.where(is_replayed, wanted.long() - 1, own)
        if self._wanted.trains and not is_again:
            self._count(is_replayed, own)
        return scores.gather(1, self.chosen), self.chosen

    def _count(self, is_replayed: Tensor, own: Tensor) -> None:
        kept = (self.chosen.unsqueeze(2) == own.unsqueeze(1)).any(2)
        found = torch.stack((is_replayed.sum(), (is_replayed & ~kept).sum()))
        self.counts = found if self.counts is None else self.counts + found


def place_choices(module: nn.Module) -> list[Choices]:
    """Put :class:`Choices` into all routers of a module; returns them in the order of layers."""
    found = []
    for router in module.modules():
        if isinstance(router, TopKRouter):
            router.router_replay = Choices()
            found.append(router.router_replay)
    return found


class Routing:
    """The routers of a model chunk.

    Args:
        chunk: an ``OCCGPTModel``.
        first: routers of this rank's chunks before it.

    Attributes:
        count: routers of the trunk's layers here, and behind them one of each MTP layer here.
    """

    def __init__(self, chunk: Any, first: int) -> None:
        self.first, self.trunk = first, place_choices(chunk.decoder)
        # of each MTP block on the chunk's weights, by its identity: its own, and copies
        self._blocks: dict[int, list[Choices]] = {}
        depths = len(self._of_block(chunk.mtp)) if chunk.mtp_process else 0
        self.count = len(self.trunk) + depths
        is_split = chunk.config.sequence_parallel
        self._group: ProcessGroup | None = chunk.pg_collection.tp if is_split else None
        self._topk = chunk.config.moe_router_topk
        self._of_depths: list[Tensor | None] = [None] * depths

    def forget(self) -> None:
        """After a mini-batch."""
        self._of_depths = [None] * len(self._of_depths)
        for choices in (*self.trunk, *self._in_blocks()):
            choices.forget()

    def begin(self, routes: Tensor | None, placement: Placement, *, trains: bool) -> None:
        """Before the trunk's pass over a micro-batch.

        Args:
            routes: [b, s, routers of this rank, k] choices; None: routers choose.
            placement: of the tokens.
            trains: a backward pass follows.
        """
        wanted: Sequence[Tensor | None] = [None] * self.count
        if routes is not None and self.count:
            own = routes[:, :, self.first : self.first + self.count].to(placement.local.device)
            taken = placement.take(own.permute(2, 3, 0, 1))
            wanted = [layer.t() for layer in self._part(taken)]
        self._of_depths = list(wanted[len(self.trunk) :])
        for choices, layer in zip(self.trunk, wanted, strict=False):
            choices.begin(layer, trains=trains)

    def begin_depths(self, block: nn.Module, *, trains: bool) -> None:
        """Before a pass over the micro-batch's MTP layers.

        Args:
            block: the chunk's MTP block, or another one on its weights.
            trains: a backward pass follows.
        """
        for choices, layer in zip(self._of_block(block), self._of_depths, strict=True):
            choices.begin(layer, trains=trains)

    def recorded(self, placement: Placement) -> Tensor:
        """Choices of the trunk's last pass, [b, s, count, k] int32; 0 for MTP layers."""
        made = [1 + choices.chosen.t().int() for choices in self.trunk]
        if not made:
            size = (*placement.size, self.count, self._topk)
            return torch.zeros(size, dtype=torch.int32, device=placement.local.device)
        made = torch.stack(made)
        if self._group is not None:
            parts = [torch.empty_like(made) for _ in range(self._group.size())]
            torch.distributed.all_gather(parts, made, group=self._group)
            made = torch.cat(parts, dim=2)
        made = torch.cat((made, made.new_zeros(len(self._of_depths), *made.shape[1:])))
        return placement.put(made).permute(2, 3, 0, 1)

    def pop_counts(self) -> Tensor:
        """[2, 2] what :class:`Choices` counted, of the trunk and of MTP layers; float64."""
        return torch.stack([_pop(self.trunk), _pop(self._in_blocks())])

    def _of_block(self, block: nn.Module) -> list[Choices]:
        if id(block) not in self._blocks:
            self._blocks[id(block)] = place_choices(block)
        return self._blocks[id(block)]

    def _in_blocks(self) -> list[Choices]:
        return [choices for routers in self._blocks.values() for choices in routers]

    def _part(self, taken: Tensor) -> Tensor:
        """[..., n] of this rank's tokens where tensor-parallel ranks split the sequence."""
        if self._group is None:
            return taken
        return taken.chunk(self._group.size(), dim=-1)[self._group.rank()]


class RouteLog:
    """Choices of all rows of a pass, on the host.

    Args:
        size: rows, tokens, routers of this rank.
        moe: section ``model.moe``.

    Attributes:
        routes: [n, s, routers, k], of :func:`route_dtype`.
    """

    def __init__(self, size: tuple[int, int, int], moe: MoEConfig) -> None:
        self.routes = torch.zeros(*size, moe.top_k, dtype=route_dtype(moe.num_experts))

    def of(self, rows: list[int]) -> Callable[[int, Tensor], None]:
        """Takes a micro-batch's choices [b, s', routers, k], chunk by chunk."""

        def take(first: int, made: Tensor) -> None:
            span = slice(first, first + made.size(2))
            self.routes[rows, : made.size(1), span] = made.to(self.routes)

        return take


def _pop(routers: Sequence[Choices]) -> Tensor:
    found = [choices.counts for choices in routers if choices.counts is not None]
    for choices in routers:
        choices.counts = None
    total = torch.stack(found).sum(0) if found else torch.zeros(2)
    return total.double().cpu()
