"""Prompts, read once for all of their samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_occ.mcore.inference.cache import Cache, write
from megatron_occ.mcore.inference.drafter import Drafter, DraftState
from megatron_occ.mcore.inference.room import Room
from megatron_occ.mcore.inference.slots import pad_right
from megatron_occ.mcore.inference.trunk import Placer, Trunk

# tokens, padding included, of a pass over prompts
BUDGET = 16384


@dataclass
class Prefix:
    """Prompts that were read and whose samples are not all on their way yet.

    Args:
        rows: row of each prompt.
        cache: of the trunk.
        state: of the depths, where this rank drafts.
        last: [prompts, h] hidden states of the prompts' last tokens, on the last stage.
        longest: tokens of the longest prompt.
    """

    rows: dict[tuple[int, ...], int]
    cache: Cache
    state: DraftState | None
    last: Tensor | None
    longest: int


def choose_prompts(waiting: Iterable[tuple[int, ...]], wanted: int) -> list[tuple[int, ...]]:
    """The next ``wanted`` different prompts, fewer where they would pass the token budget.

    Args:
        waiting: prompt of each request, in order.
    """
    chosen: dict[tuple[int, ...], None] = {}
    longest = 0
    for prompt in waiting:
        if prompt in chosen:
            continue
        longest = max(longest, len(prompt))
        if chosen and (len(chosen) == wanted or longest * (len(chosen) + 1) > BUDGET):
            break
        chosen[prompt] = None
    return list(chosen)


def prefill(
    trunk: Trunk,
    drafter: Drafter | None,
    placer: Placer,
    prompts: Sequence[tuple[int, ...]],
    *,
    longest: int,
    reads: bool,
) -> Prefix:
    """Read prompts in one pass.

    Args:
        trunk: of this rank.
        drafter: of this rank, if it drafts.
        placer: makes the tokens of a pass.
        prompts: padded to the longest; what a padding token computes is never looked at.
        longest: tokens of the longest, of all ranks that read at the same time.
        reads: let the depths read the prompts too; if not they do at the first draft.
    """
    device = torch.cuda.current_device()
    ids = pad_right(prompts, longest, device)
    known = np.array([len(prompt) for prompt in prompts])
    room = Room(len(prompts), longest, device)
    cache = trunk.new_cache(room)
    tokens = placer.from_start(cache, len(prompts), longest)
    trunk.company.meet(ids.numel())
    states = trunk.forward(ids, tokens, cache)
    last = None
    if states is not None:
        by_row = states.main.view(len(prompts), longest, -1)
        last = by_row[range(len(prompts)), (known - 1).tolist()]
    state = None
    if drafter is not None:
        state = drafter.new_state(room)
        write(state.hidden[0], tokens.places, states.read)
        if reads:
            drafter.read_prompts(placer, state, ids, known, longest)
    rows = {prompt: row for row, prompt in enumerate(prompts)}
    return Prefix(rows, cache, state, last, longest)
