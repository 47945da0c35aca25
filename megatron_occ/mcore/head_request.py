"""What a forward pass is asked of each head, and how the answers come from hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_occ.mcore.balance import BalanceTerm
from megatron_occ.mcore.placement import Placement
from megatron_occ.mcore.vocabulary.logprobs import (
    HeadTokens,
    TokenStatistics,
    VocabShard,
    head_statistics,
)


@dataclass(frozen=True)
class HeadRequest:
    """What a forward pass is to return of each head.

    Args:
        targets: [1+K, b, s] token ids in the source frame: position t of depth d predicts
            ``targets[d, :, t]``. [1, b, s] asks for the main head alone.
        passes: MTP passes as (gradient to trunk, gradient to head), see ``Regime.passes``; without
            any, the main head alone.
        temperature: divides main and MTP logits alike.
        entropy: return the main head's entropies.
        distance: None, ``soft_ce`` or ``tv``: distance of the last pass to the main head.
        leaks: passes that are cut off from the trunk have a gradient to the output layer.
        placement: of the b * s tokens in the model's input; None: as they are.
        states: [b, s, h] hidden states of the trunk that MTP layers read (``model.mtp_reads``): the
            trunk is not run, and no gradient reaches it. On one pipeline stage alone.
        frozen_trunk: no loss acts on what comes before the MTP block: it is run without a graph.
        main_head: False leaves out the main head, of which the loss has no part, and agreement.
        masks: [b, s, m] int32, source frame: 1 + the ids that the main head's softmax is over, then
            0; 0 alone: all. None: all, everywhere. MTP heads are over all ids always.
        routes: [b, s, routers of this rank, k] experts that tokens go to, see ``routing``; None:
            routers choose.
        record: gets the first router of a chunk and what the chunk's routers chose.
        balance: of the balance loss of experts; None: the pass has none.
    """

    targets: Tensor
    passes: tuple[tuple[bool, bool], ...] = ((True, True),)
    temperature: float = 1.0
    entropy: bool = False
    distance: str | None = None
    leaks: bool = False
    placement: Placement | None = None
    states: Tensor | None = None
    frozen_trunk: bool = False
    main_head: bool = True
    masks: Tensor | None = None
    routes: Tensor | None = None
    record: Callable[[int, Tensor], None] | None = None
    balance: BalanceTerm | None = None


def head_tokens(
    flat: list[Tensor], targets: Tensor, request: HeadRequest, placement: Placement
) -> tuple[list[HeadTokens], list[bool]]:
    """What the heads with states ``flat`` are asked, and which train the output layer.

    Args:
        flat: [n, h] of each head.
        targets: [1+K, n] of this rank.
        request: of the pass.
        placement: of the tokens.
    """
    depths, found, trains = targets.size(0) - 1, [], []
    if request.main_head:
        masks = None
        if request.masks is not None:
            masks = request.masks.to(placement.local.device).permute(2, 0, 1)
            masks = placement.take(masks).t()
        found.append(HeadTokens(flat[0], targets[0], request.entropy, depths > 0, masks))
        trains.append(True)
    for index, state in enumerate(flat[len(found) :]):
        # every pass predicts the same: the last one is compared with the main head
        is_last = request.main_head and index >= len(flat) - 1 - depths
        found.append(HeadTokens(state, targets[1 + index % depths], top_ids=is_last))
        to_trunk, to_head = request.passes[index // depths]
        trains.append(to_trunk or (to_head and request.leaks))
    return found, trains


def token_statistics(
    asked: list[HeadTokens],
    trains: list[bool],
    weight: Tensor,
    shard: VocabShard,
    temperature: float,
) -> list[TokenStatistics]:
    """Statistics of each head; ``trains`` says whose gradient reaches the output layer."""
    found = {}
    for rows, trained in ((weight, True), (weight.detach(), False)):
        members = [index for index, flag in enumerate(trains) if flag == trained]
        if members:
            heads = [asked[index] for index in members]
            found |= zip(members, head_statistics(heads, rows, shard, temperature), strict=True)
    return [found[index] for index in range(len(asked))]


def agreement(main: TokenStatistics, depths: list[TokenStatistics], placement: Placement) -> Tensor:
    """1.0 where a depth's top token is the main head's for the same target, [K, b, s]."""
    ids = torch.stack([main.top_ids, *(depth.top_ids for depth in depths)])
    # exact: a vocabulary has fewer than 2**24 ids
    top, *drafts = placement.put(ids.float())
    pairs = enumerate(drafts, start=1)
    # the last k positions wrap, callers mask them
    return torch.stack([(draft == top.roll(-k, dims=1)).float() for k, draft in pairs])
