"""Where the tokens of a padded batch lie in the model's input: packing, alignment, context ranks.

Trainers and losses see sequences as rows of a padded batch [b, s]. The model may see them packed
into one row, padded to a multiple, and cut over context-parallel ranks, each of which holds two
chunks of every sequence, one from its front and its mirror image from its back, so that causal
attention is the same work for all (the order of TransformerEngine and Megatron-Core). A
:class:`Placement` moves integer ids (or kept states) in and log-probs out; activations are never
moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from megatron_occ.config.sizes import round_up


@dataclass(frozen=True)
class ContextRanks:
    """This rank among those that share a sequence."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    def gather(self, values: Tensor) -> list[Tensor]:
        """Values of all of them, in rank order, without gradient."""
        parts = [torch.empty_like(values) for _ in range(self.size)]
        torch.distributed.all_gather(parts, values.contiguous(), group=self.group)
        return parts


@dataclass(frozen=True)
class Placement:
    """Places of the b * s tokens of a padded batch; flat index i * s + t is token t of row i.

    A rank's n tokens are counted sequence first, as hidden states [length, rows, h] are laid out.

    Args:
        size: (b, s) of the padded batch.
        rows: of the model's input: b, or 1 if packed.
        local: [n] flat index of each of this rank's tokens; b * s stands for padding.
        origin: [b * s] place of each token among the tokens of all context-parallel ranks,
            concatenated; their number for a token that has none.
        packed: Megatron's description of a packed row, or None.
        ranks: context-parallel ranks.
    """

    size: tuple[int, int]
    rows: int
    local: Tensor
    origin: Tensor
    packed: PackedSeqParams | None
    ranks: ContextRanks

    def take(self, values: Tensor) -> Tensor:
        """This rank's part of constants [..., b, s], [..., n]; 0 in padding."""
        return functional.pad(values.flatten(-2), (0, 1)).index_select(-1, self.local)

    def take_states(self, states: Tensor) -> Tensor:
        """Hidden states [b, s, h] as the model lays them out, [length, rows, h]; 0 in padding."""
        whole = functional.pad(states.flatten(0, 1), (0, 0, 0, 1))
        return whole.index_select(0, self.local).unflatten(0, (-1, self.rows))

    def as_input(self, taken: Tensor) -> Tensor:
        """[..., n] in the shape of the model's input, [..., rows, length]."""
        return taken.unflatten(-1, (-1, self.rows)).transpose(-1, -2).contiguous()

    def put(self, values: Tensor) -> Tensor:
        """Values [..., n] of all context-parallel ranks as [..., b, s]; 0 where there is no token.

        Differentiable: each rank computes the same loss from the whole, so the gradient of this
        rank's part is all of its gradient.
        """
        if self.ranks.size > 1:
            values = _GatherContext.apply(values, self.ranks)
        whole = functional.pad(values, (0, 1)).index_select(-1, self.origin)
        return whole.unflatten(-1, self.size)

    def everywhere(self, values: Tensor) -> Tensor:
        """Constants [n, ...] of all context-parallel ranks, concatenated."""
        return values if self.ranks.size == 1 else torch.cat(self.ranks.gather(values))

    def ahead(self, values: Tensor, steps: int) -> Tensor:
        """Constants of the tokens ``steps`` further on in the same sequence, [n, ...].

        Where a sequence ends before, any row is returned.

        Args:
            values: of all ranks, from :meth:`everywhere`.
            steps: k.
        """
        last = self.origin.numel() - 1
        index = self.origin[(self.local + steps).clamp(max=last)]
        return values.index_select(0, index.clamp(max=values.size(0) - 1))


class _GatherContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, ranks):  # noqa: ANN001, ANN205
        ctx.ranks = ranks
        return torch.cat(ranks.gather(values), dim=-1)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        return grad.chunk(ctx.ranks.size, dim=-1)[ctx.ranks.rank], None


def place_padded(
    size: tuple[int, int],
    device: torch.device,
    *,
    multiple: int = 1,
    ranks: ContextRanks | None = None,
) -> Placement:
    """Rows stay rows, padded to a multiple of ``multiple``.

    Args:
        size: (b, s).
        device: of the indices.
        multiple: of the length, a multiple of 2 * ranks.size.
        ranks: context-parallel ranks.
    """
    ranks = ranks or ContextRanks()
    batch, length = size
    aligned = round_up(length, multiple)
    row = torch.arange(batch)
    parts = []
    for rank in range(ranks.size):
        position = _positions(aligned, rank, ranks.size)[:, None]
        index = torch.where(position < length, row * length + position, batch * length)
        parts.append(index.flatten())
    return _placement(size, batch, parts, None, ranks, device)


def place_packed(
    size: tuple[int, int],
    lengths: Sequence[int],
    device: torch.device,
    *,
    multiple: int = 1,
    total: int | None = None,
    ranks: ContextRanks | None = None,
) -> Placement:
    """All rows in one, each padded to a multiple of ``multiple``.

    Padding belongs to the sequence that it follows: attention is causal, so it changes nothing.

    Args:
        size: (b, s).
        lengths: tokens of each row, at most s.
        device: of the indices.
        multiple: of each sequence, a multiple of 2 * ranks.size.
        total: length of the packed row, a multiple of ``multiple``; the rest is padding.
        ranks: context-parallel ranks.
    """
    ranks = ranks or ContextRanks()
    batch, width = size
    spans = [
        (row * width, length, round_up(length, multiple)) for row, length in enumerate(lengths)
    ]
    rest = 0 if total is None else total - sum(aligned for _, _, aligned in spans)
    assert rest >= 0, f"{len(lengths)} sequences do not fit into {total} tokens"
    if rest:
        spans.append((0, 0, rest))
    parts = []
    for rank in range(ranks.size):
        pieces = []
        for start, length, aligned in spans:
            position = _positions(aligned, rank, ranks.size)
            pieces.append(torch.where(position < length, start + position, batch * width))
        parts.append(torch.cat(pieces))
    packed = _packed_parameters([aligned for _, _, aligned in spans], device)
    return _placement(size, 1, parts, packed, ranks, device)


def packed_length(lengths: Sequence[int], multiple: int) -> int:
    """Tokens of the packed row that holds sequences of these lengths."""
    return sum(round_up(length, multiple) for length in lengths)


def _positions(length: int, rank: int, size: int) -> Tensor:
    """Positions of a sequence that a context-parallel rank holds."""
    if size == 1:
        return torch.arange(length)
    chunks = torch.arange(length).chunk(2 * size)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))


def _packed_parameters(lengths: list[int], device: torch.device) -> PackedSeqParams:
    ends = torch.tensor(lengths).cumsum(0)
    bounds = functional.pad(ends, (1, 0)).to(device=device, dtype=torch.int32)
    longest = max(lengths)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _placement(
    size: tuple[int, int],
    rows: int,
    parts: list[Tensor],
    packed: PackedSeqParams | None,
    ranks: ContextRanks,
    device: torch.device,
) -> Placement:
    everywhere = torch.cat(parts)
    tokens = size[0] * size[1]
    origin = torch.full((tokens + 1,), everywhere.numel())
    origin[everywhere] = torch.arange(everywhere.numel())
    local = parts[ranks.rank].to(device, non_blocking=True)
    return Placement(size, rows, local, origin[:tokens].to(device), packed, ranks)
