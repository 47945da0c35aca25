"""The experts that a response's tokens went to, from the caches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_occ.mcore.inference.cache import Cache
from megatron_occ.mcore.inference.drafter import DraftState
from megatron_occ.mcore.inference.slots import Slots
from megatron_occ.mcore.inference.trunk import Trunk
from megatron_occ.rl.batch import route_dtype


def routes_of(
    trunk: Trunk, cache: Cache, state: DraftState | None, slots: Slots, rows: Sequence[int]
) -> list[Tensor]:
    """Choices of the prompts and responses in these rows, see ``Generation.routes``.

    The last token was not read. MTP layers have read what they drafted behind.

    Args:
        trunk: of this rank.
        cache: of its layers.
        state: of the depths, where this rank drafts.
        slots: the rows.
        rows: of responses.
    """
    return [_of_row(trunk, cache, state, row, int(slots.known[row])) for row in rows]


def _of_row(trunk: Trunk, cache: Cache, state: DraftState | None, row: int, known: int) -> Tensor:
    found, first = [], 0
    for chunk, layers in zip(trunk.chunks, trunk.layers, strict=True):
        own = zip(layers, cache.layers[first : first + len(layers)], strict=True)
        first += len(layers)
        found += [
            cache.room.of_row(kept[-1], row, known - 1) for layer, kept in own if layer.experts
        ]
        if chunk.mtp_process:
            found += _of_depths(trunk, state, row, known)
    dtype = route_dtype(trunk.config.num_moe_experts)
    if not found:
        return torch.zeros(known - 1, 0, trunk.config.moe_router_topk, dtype=dtype)
    return torch.stack(found, dim=1).to(device="cpu", dtype=dtype)


def _of_depths(trunk: Trunk, state: DraftState | None, row: int, known: int) -> list[Tensor]:
    depths, found = trunk.config.mtp_num_layers or 0, []
    for depth in range(depths):
        experts = trunk.config.moe_router_topk
        made = torch.zeros(
            known - 1, experts, dtype=torch.int16, device=torch.cuda.current_device()
        )
        if state is not None:
            # depth d at position t has read token t + d + 1
            read = min(int(state.done[depth, row]) + 1, known - 1 - depth)
            if read > 0:
                kept = state.cache.layers[depth][-1]
                made[:read] = state.cache.room.of_row(kept, row, read)
        found.append(made)
    return found
