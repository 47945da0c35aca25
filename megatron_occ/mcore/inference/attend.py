"""Attention of a pass's tokens to the rows of a cache, each token up to its own position.

An :class:`Attention` is chosen once for an engine, see ``kernels.py``; for each pass it gives an
:class:`Attend`, which the layers call. :class:`BySpans` runs everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from megatron_occ.mcore.inference.room import Room

# part of the price of one look at all rows that a second look at some must stay below
WORTH = 0.9
# keys of a mask: CUDA's attention kernels copy one whose rows are not aligned, in each layer
ALIGNED = {"cuda": 8}


class Attend(Protocol):
    """Attention of the tokens of one pass, in every layer."""

    def __call__(self, query: Tensor, kept: Tensor, scale: float | None = None) -> Tensor:
        """Contexts [n, q, groups, share, d].

        Args:
            query: [n, q, groups, share, d], of the first n rows of the cache.
            kept: [blocks, size, groups, 2, d] keys and values of the cache, those of the pass's own
                tokens among them; or [blocks, size, groups, 1, d] where the key is the value.
            scale: of the scores; None: 1 / sqrt(d).
        """
        ...


class Attention(Protocol):
    """A way to attend.

    Attributes:
        name: for the log.
        needs_host: whether a pass is made of numbers that the host has to know.
    """

    name: str
    needs_host: bool

    def look(self, positions: Tensor, last: np.ndarray, room: Room, *, repeats: bool) -> Attend:
        """For tokens at positions [n, q] of the first n rows.

        Args:
            positions: neighbours in each row.
            last: [n] the last position of each row, for the host; not read unless ``needs_host``.
            room: where the cache holds the rows.
            repeats: a row may begin with several times position 0.
        """
        ...


def keys_and_values(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Of what a cache keeps, [..., 2, d] or [..., 1, d], both as [..., d]."""
    both = kept.unbind(3)
    return both[0], both[-1]


@dataclass(frozen=True)
class Span:
    """Rows that attend together.

    Args:
        rows: m, the first ones.
        keys: positions that they look at, from 0.
        mask: [m, 1, share * q, keys] 0 where a token may look and -inf elsewhere, once for each
            head that shares a key.
    """

    rows: int
    keys: int
    mask: Tensor


@dataclass(frozen=True)
class Spans:
    """All rows, and again the first ones, which look further."""

    spans: list[Span]
    room: Room

    def __call__(self, query: Tensor, kept: Tensor, scale: float | None = None) -> Tensor:
        """See :class:`Attend`."""
        n, q, groups, share, width = query.shape
        # one query block a group: its heads are further rows of it
        folded = query.permute(0, 2, 3, 1, 4).reshape(n, groups, share * q, width)
        found = []
        for span in self.spans:
            rows = self.room.first(kept, span.rows, span.keys)
            key, value = keys_and_values(rows.transpose(1, 2))
            found.append(
                functional.scaled_dot_product_attention(
                    folded[: span.rows], key, value, attn_mask=span.mask, scale=scale
                )
            )
        context, *again = found
        for part in again:
            context[: part.size(0)] = part
        return context.view(n, groups, share, q, -1).permute(0, 3, 1, 2, 4)


class BySpans:
    """Masks over as many keys as the longest row of a span has.

    Args:
        share: heads that share a key.
        dtype: of queries and keys.
        device: of everything.
    """

    name, needs_host = "masks over the longest row", True

    def __init__(self, share: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.share, self.multiple = share, ALIGNED.get(device.type, 1)
        self.seen, self.hidden = torch.tensor((0.0, -torch.inf), dtype=dtype, device=device)

    def look(self, positions: Tensor, last: np.ndarray, room: Room, *, repeats: bool) -> Spans:
        """See :class:`Attention`."""
        needed, spans = last + 1, []
        count, _ = long_rows(needed)
        needed = np.minimum(-(-needed // self.multiple) * self.multiple, room.length)
        cuts = [(len(needed), int(needed[count:].max()))]
        if count:
            cuts.append((count, int(needed[:count].max())))
        for rows, keys in cuts:
            later = torch.arange(keys, device=positions.device) > positions[:rows].unsqueeze(-1)
            mask = torch.where(later, self.hidden, self.seen).unsqueeze(1)
            if self.share > 1:
                mask = mask.repeat(1, 1, self.share, 1)
            spans.append(Span(rows, keys, mask))
        return Spans(spans, room)


def long_rows(needed: np.ndarray) -> tuple[int, float]:
    """How many rows at the front attend on their own, so that the others don't pay for them.

    All rows look at as many keys as the longest of the others needs, and the first ones then look
    again, at all that they need.

    Args:
        needed: [n] keys that each row looks at.

    Returns:
        That number, 0: no row; and the price of attention, in keys.
    """
    rows, whole = len(needed), len(needed) * int(needed.max())
    # no cut is cheaper than what the rows need themselves
    if needed.sum() > WORTH * whole:
        return 0, float(whole)
    price = rows * np.maximum.accumulate(needed[::-1])[::-1]
    price[1:] += np.arange(1, rows) * np.maximum.accumulate(needed)[:-1]
    best = int(price.argmin())
    if price[best] > WORTH * whole:
        return 0, float(whole)
    return best, float(price[best])


def rows_to_swap(needed: np.ndarray) -> tuple[list[int], list[int]]:
    """Short rows at the front and long rows behind that had better change places, if any."""
    order = np.argsort(-needed, kind="stable")
    count, price = long_rows(needed[order])
    if count == 0 or long_rows(needed)[1] <= price / WORTH:
        return [], []
    wanted = order[:count]
    behind = wanted[wanted >= count]
    front = np.setdiff1d(np.arange(count), wanted)
    return front.tolist(), behind.tolist()
