"""Drafts by the MTP depths: one after the other, and the last one again on its own output.

Notation, as in docs/method.md: depth j at position t reads the hidden state of depth j - 1 (the
trunk for j = 1) at t and the embedding of token t + j, and predicts token t + j + 1. With ``known``
tokens in a row, each draft step works at position T = known - 2: depth 1 reads the last known
token, depth 2 the first draft, and so on; what depth j > 1 computed at the end was computed on
drafts, and is computed again on what was committed. Past the last depth K, that depth goes on from
its own output at T + 1, T + 2 ..., as vLLM and SGLang do with DeepSeek-V3's single depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_occ.mcore.inference.cache import Cache, Tokens, write
from megatron_occ.mcore.inference.layers import MTPModule
from megatron_occ.mcore.inference.room import Room
from megatron_occ.mcore.inference.trunk import Placer, Trunk
from megatron_occ.mcore.mtp_layer import inner_layer

# tokens of a row that the depths catch up with at once
PIECE = 256
Pick = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Known:
    """[n] tokens of each row so far, for the host and for the device."""

    host: np.ndarray
    device: Tensor


class DraftState:
    """What the depths remember of each row.

    Args:
        drafter: has the depths.
        room: where the tokens of rows lie.

    Attributes:
        cache: of the depths' attention layers, and behind them ``hidden``.
        hidden: for each depth its input, the hidden states of the one before, [blocks, size, h].
        done: [K, rows] last position whose entry in the depth's cache is final, -1: none; known to
            the host.
    """

    def __init__(self, drafter: Drafter, room: Room) -> None:
        trunk, depths = drafter.trunk, len(drafter.modules)
        shapes = [module.layer.attention.cached for module in drafter.modules]
        shapes += [[(trunk.config.hidden_size,)]] * depths
        self.cache = Cache(
            shapes,
            room,
            dtype=trunk.dtype,
            device=torch.cuda.current_device(),
            experts=[module.layer.experts for module in drafter.modules],
        )
        self.hidden = [kept for (kept,) in self.cache.layers[depths:]]
        self.done = np.full((depths, room.rows), -1)

    def copy_rows(
        self, source: DraftState, rows: Sequence[int], targets: Sequence[int], length: int
    ) -> None:
        """Take over rows of ``source``, of which ``length`` tokens count."""
        self.cache.copy_rows(source.cache, rows, targets, length)
        self.done[:, targets] = source.done[:, rows]

    def move(self, rows: Sequence[int], targets: Sequence[int], length: int) -> None:
        """See ``Cache.move``."""
        self.cache.move(rows, targets, length)
        self.done[:, targets] = self.done[:, rows]

    def drafted(self, known: np.ndarray, steps: int) -> None:
        """The first n rows, of ``known`` [n] tokens, were drafted for ``steps`` times."""
        for depth in range(min(steps, len(self.done))):
            self.done[depth, : len(known)] = known - 2 - depth


class Drafter:
    """The MTP depths of the last stage.

    Args:
        trunk: of this rank; its last chunk holds depths, embedding and output layer.
    """

    def __init__(self, trunk: Trunk) -> None:
        self.trunk, self.company = trunk, trunk.company
        self.modules = [
            MTPModule(
                layer,
                inner_layer(layer),
                trunk.config,
                trunk.tensor,
                self.company,
                keeps=trunk.keeps_experts,
                rounding=trunk.rounding,
            )
            for layer in trunk.chunks[-1].mtp.layers
        ]

    def new_state(self, room: Room) -> DraftState:
        """For empty rows."""
        return DraftState(self, room)

    def read_prompts(
        self, placer: Placer, state: DraftState, ids: Tensor, known: np.ndarray, longest: int
    ) -> None:
        """Run all depths over rows whose trunk states are there, as far as tokens are known.

        Args:
            placer: makes the tokens of a pass.
            state: of the rows.
            ids: [rows, length] tokens.
            known: [n] tokens of each row.
            longest: the largest of them, of all ranks that read at the same time.
        """
        depths, rows = len(self.modules), len(known)
        each = longest - depths
        if each > 0:
            tokens = placer.from_start(state.cache, rows, each)
            places = torch.arange(each, device=ids.device).expand(rows, each)
            for depth in range(depths):
                self._run(depth, state, ids, places, tokens)
        state.done[:, :rows] = (known - 1 - depths).clip(min=-1)

    def limits(self, steps: int) -> list[int]:
        """Tokens that each depth lacks at most after a cycle of ``steps`` drafts or a prompt."""
        depths = len(self.modules)
        return [max(steps + 1, depths) + depth for depth in range(depths)]

    def catch_up(
        self,
        placer: Placer,
        state: DraftState,
        ids: Tensor,
        known: np.ndarray,
        limits: Sequence[int] | None,
    ) -> list[int]:
        """Read what is far behind, in pieces.

        Args:
            placer, state, ids: see :meth:`read_prompts`.
            known: [n] tokens of each row.
            limits: for each depth the tokens that it may lack afterwards, see :meth:`limits`; None:
                a piece.

        Returns:
            The tokens that each depth lacks then.
        """
        rows, depths = len(known), len(self.modules)
        limits = limits or [PIECE] * depths
        while True:
            needed = self._lacking(state, known - 2)
            if all(lacks <= limit for lacks, limit in zip(needed, limits, strict=True)):
                return needed
            done = state.done[:, :rows]
            goal = np.minimum(done.min(0) + PIECE, known - 1 - depths)
            on_device = torch.from_numpy(goal).to(ids.device, copy=True)
            for depth, each in enumerate(self._lacking(state, goal)):
                places = _up_to(on_device, each)
                tokens = placer.at(state.cache, places, goal.clip(min=0), repeats=True)
                self._run(depth, state, ids, places, tokens)
            state.done[:, :rows] = np.maximum(done, goal)

    def draft(
        self,
        placer: Placer,
        state: DraftState,
        ids: Tensor,
        known: Known,
        needed: Sequence[int],
        steps: int,
        pick: Pick,
    ) -> None:
        """Draft ``steps`` tokens for each row, into ``ids`` behind the known ones.

        Nothing changes but tensors, and those of the host are read by ``Attention`` alone:
        ``DraftState.drafted`` notes that it has been.

        Args:
            placer, state, ids: see :meth:`read_prompts`.
            known: tokens of each row.
            needed: tokens that each depth reads, all that it lacks among them.
            pick: from hidden states [n, h] and the number of the draft, 0-based, to ids [n].
        """
        depths, rows = len(self.modules), len(known.host)
        last, hidden = known.host - 2, None
        for step in range(steps):
            if step < depths:
                places = _up_to(known.device - 2, needed[step])
                tokens = placer.at(state.cache, places, last, repeats=True)
                hidden = self._run(step, state, ids, places, tokens)
            else:
                ahead = step - depths + 1
                places = _up_to(known.device - 2 + ahead, 1)
                tokens = placer.at(state.cache, places, last + ahead)
                hidden = self._run(depths - 1, state, ids, places, tokens, hidden)
            drafted = pick(hidden, step)
            ids[:rows].scatter_(1, (known.device + step).unsqueeze(1), drafted.unsqueeze(1))

    def _lacking(self, state: DraftState, goal: np.ndarray) -> list[int]:
        """Positions up to ``goal`` that a row lacks at most, for each depth; at least 1."""
        lacking = (goal - state.done[:, : len(goal)]).max(1).clip(min=1)
        return self.company.largest(lacking.tolist())

    def _run(
        self,
        depth: int,
        state: DraftState,
        ids: Tensor,
        places: Tensor,
        tokens: Tokens,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """One depth (0-based) at ``places`` [n, q]; returns the last place's output [n, h].

        Args:
            hidden: its input [n, h]; None: what the depth before left in the state.
        """
        rows = tokens.rows
        self.company.meet(tokens.rows * tokens.each)
        if hidden is None:
            hidden = state.hidden[depth].flatten(0, 1)[tokens.places]
        read = ids[:rows].gather(1, places + depth + 1)
        embedded = self.trunk.embed(read, -1)
        output = self.modules[depth](embedded, hidden, tokens, state.cache.layers[depth])
        if depth + 1 < len(self.modules):
            write(state.hidden[depth + 1], tokens.places, output)
        return output.view(rows, tokens.each, -1)[:, -1]


def _up_to(last: Tensor, count: int) -> Tensor:
    """[n, count] positions up to ``last`` [n]; a row with fewer repeats position 0."""
    return (last.unsqueeze(1) + torch.arange(1 - count, 1, device=last.device)).clamp_(min=0)
