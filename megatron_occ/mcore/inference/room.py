"""Where the tokens of rows lie in caches: a row in one piece, or in pages that are handed out.

Rows in one piece have room for the longest sequence each. With pages (PagedAttention, arXiv
2309.06180) a row takes what it needs as it grows, so that the same memory holds more rows. All
caches of a call share one room.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# tokens of a page: flash attention's kernels take multiples of 256; on a CPU there is no such limit
PAGE = {"cuda": 256}
OTHER_PAGE = 16


def send_numbers(target: Tensor, numbers: np.ndarray) -> None:
    """Copy what the host knows to a tensor on the device; the host does not wait."""
    values = torch.from_numpy(numbers)
    if target.is_cuda:
        # of pinned memory of its own: the copy is under way while the host goes on
        values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values)
    target.copy_(values, non_blocking=True)


class Room:
    """Rows in one piece.

    Args:
        rows: sequences.
        length: tokens of one at most.
        device: of the caches.

    Attributes:
        blocks, size: a cache is a tensor [blocks, size, ...].
        table: [rows, blocks of a row] blocks of each row, int32, zeros behind its last one; None: a
            block is a row.
    """

    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        self.rows, self.length = rows, length
        self.blocks, self.size = rows, length
        self.table: Tensor | None = None
        # [rows, 1] where each row begins, counted in tokens
        self._starts = torch.arange(rows, device=device).unsqueeze(1) * length

    def places(self, positions: Tensor) -> Tensor:
        """[n, q] places of positions in the first n rows, counted in tokens over all blocks."""
        return self._starts[: len(positions)] + positions

    def first(self, kept: Tensor, rows: int, length: int) -> Tensor:
        """The first tokens of the first rows of a cache's tensor, [rows, length, ...]."""
        return kept[:rows, :length]

    def of_row(self, kept: Tensor, row: int, length: int) -> Tensor:
        """The first tokens of a row of a cache's tensor, [length, ...]."""
        return kept[row, :length]

    def put(self, kept: Tensor, rows: Tensor, values: Tensor) -> None:
        """Write the first tokens [m, length, ...] of rows [m] into a cache's tensor."""
        kept[rows, : values.size(1)] = values

    def move(self, kept: Sequence[Tensor], rows: Tensor, targets: Tensor, length: int) -> None:
        """Bring the first tokens of rows [m] to other rows, in tensors of caches."""
        for each in kept:
            each[targets, :length] = each[rows, :length]

    def fitting(self, tokens: Sequence[int], ends: Sequence[int]) -> int:
        """How many of these rows may begin.

        Args:
            tokens: that each begins with.
            ends: and that it has at most.
        """
        return len(tokens)

    def admit(self, rows: Sequence[int], tokens: Sequence[int], ends: Sequence[int]) -> None:
        """Let rows begin; see :meth:`fitting`."""

    def lacks(self, tokens: np.ndarray) -> bool:
        """Whether there is no room for so many tokens [n] in the first n rows."""
        return False

    def reserve(self, tokens: np.ndarray) -> None:
        """Give the first n rows room for so many tokens [n]."""

    def release(self, rows: Sequence[int]) -> None:
        """Nothing in these rows is needed any more."""

    def renamed(self, rows: Sequence[int], targets: Sequence[int]) -> None:
        """Rows have other numbers from now on, all at the same time."""

    def send(self) -> None:
        """Let the device know what has changed; the host does not wait."""


class PagedRoom(Room):
    """Rows in pages.

    The first page is nobody's: rows without tokens, with which a captured cycle is filled up, write
    there, and so does the padding behind a prompt.

    Args:
        rows, length, device: see :class:`Room`.
        tokens: of all rows at most; at least ``length``.
        ahead: tokens that a row grows by in a cycle at most.
        size: tokens of a page; None: as attention's kernels want it.
    """

    def __init__(
        self,
        rows: int,
        length: int,
        device: torch.device,
        *,
        tokens: int,
        ahead: int,
        size: int | None = None,
    ) -> None:
        self.rows, self.length = rows, length
        self.size = size or PAGE.get(device.type, OTHER_PAGE)
        each = self._pages(length)
        assert tokens >= length, "one row can be finished"
        self.blocks = 1 + min(-(-tokens // self.size), rows * each)
        self.table = torch.zeros(rows, each, dtype=torch.int32, device=device)
        self._host = np.zeros((rows, each), dtype=np.int32)
        # pages of each row now, and at its end
        self._held, self._last = np.zeros((2, rows), dtype=np.int64)
        self._spare = self._pages(ahead)
        self._free = list(range(self.blocks - 1, 0, -1))
        self._is_sent = True

    @property
    def pages_left(self) -> int:
        """Pages that no row holds."""
        return len(self._free)

    def places(self, positions: Tensor) -> Tensor:
        """See :class:`Room`."""
        return self._places(self.table[: len(positions)], positions)

    def first(self, kept: Tensor, rows: int, length: int) -> Tensor:
        """See :class:`Room`; a copy."""
        count = self._pages(length)
        return kept[self.table[:rows, :count]].flatten(1, 2)[:, :length]

    def of_row(self, kept: Tensor, row: int, length: int) -> Tensor:
        """See :class:`Room`; a copy."""
        self.send()
        count = self._pages(length)
        return kept[self.table[row, :count]].flatten(0, 1)[:length]

    def put(self, kept: Tensor, rows: Tensor, values: Tensor) -> None:
        """See :class:`Room`."""
        positions = torch.arange(values.size(1), device=values.device).expand(len(rows), -1)
        places = self._places(self.table[rows], positions)
        kept.flatten(0, 1)[places.flatten()] = values.flatten(0, 1)

    def move(self, kept: Sequence[Tensor], rows: Tensor, targets: Tensor, length: int) -> None:
        """Nothing: the pages stay where they are, see :meth:`renamed`."""

    def fitting(self, tokens: Sequence[int], ends: Sequence[int]) -> int:
        """See :class:`Room`.

        All rows can grow for a cycle then, so that none has to give way at once.
        """
        taken, last = (self._pages(np.array(each, dtype=np.int64)) for each in (tokens, ends))
        grow = np.minimum(last - taken, self._spare)
        used = np.minimum(self._last - self._held, self._spare).sum()
        count = int((np.cumsum(taken + grow) + used <= self.pages_left).sum())
        # the only row has all pages
        is_first = len(taken) > 0 and not self._held.any()
        return max(count, int(is_first))

    def admit(self, rows: Sequence[int], tokens: Sequence[int], ends: Sequence[int]) -> None:
        """See :class:`Room`."""
        self._last[list(rows)] = self._pages(np.array(ends, dtype=np.int64))
        self._hand_out(rows, np.array(tokens, dtype=np.int64))

    def lacks(self, tokens: np.ndarray) -> bool:
        """See :class:`Room`."""
        lacking = self._pages(tokens) - self._held[: len(tokens)]
        return int(lacking.clip(min=0).sum()) > self.pages_left

    def reserve(self, tokens: np.ndarray) -> None:
        """See :class:`Room`."""
        self._hand_out(range(len(tokens)), tokens)

    def _hand_out(self, rows: Sequence[int], tokens: np.ndarray) -> None:
        lacking = (self._pages(tokens) - self._held[list(rows)]).clip(min=0)
        for row, count in zip(rows, lacking.tolist(), strict=True):
            if count == 0:
                continue
            held = self._held[row]
            self._host[row, held : held + count] = [self._free.pop() for _ in range(count)]
            self._held[row] += count
            self._is_sent = False

    def release(self, rows: Sequence[int]) -> None:
        """See :class:`Room`."""
        for row in rows:
            self._free += self._host[row, : self._held[row]].tolist()
        self._clear(rows)

    def renamed(self, rows: Sequence[int], targets: Sequence[int]) -> None:
        """See :class:`Room`."""
        for numbers in (self._host, self._held, self._last):
            numbers[list(targets)] = numbers[list(rows)]
        self._clear(sorted(set(rows) - set(targets)))

    def send(self) -> None:
        """See :class:`Room`."""
        if self._is_sent:
            return
        send_numbers(self.table, self._host)
        self._is_sent = True

    def _clear(self, rows: Sequence[int]) -> None:
        for numbers in (self._host, self._held, self._last):
            numbers[list(rows)] = 0
        self._is_sent = False

    def _pages(self, tokens: Any) -> Any:
        """Pages that a number of tokens takes, or each of an array of them."""
        return -(-tokens // self.size)

    def _places(self, table: Tensor, positions: Tensor) -> Tensor:
        pages = table.gather(1, positions // self.size).long()
        return pages * self.size + positions % self.size
