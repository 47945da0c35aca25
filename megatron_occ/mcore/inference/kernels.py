"""Kernels that read each row's own length, and which one an engine takes.

On a CUDA device the first one that is there and agrees with :class:`BySpans` on a few random rows
is taken. Elsewhere masks are as fast.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_occ.mcore.inference.attend import Attend, Attention, BySpans, keys_and_values
from megatron_occ.mcore.inference.room import OTHER_PAGE, PAGE, PagedRoom, Room

logger = logging.getLogger(__name__)

# (query [n, q, heads, d], key and value [blocks, size, groups, .], lengths [n] int32, scale, table
# [n, blocks of a row] or None, see `Room`)
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, float | None, Tensor | None], Tensor]
# keys and queries of a block mask's block
BLOCK = 128
# rows of the trial, its positions, and how far contexts of about 1 may be apart
TRIAL_LENGTHS, TRIAL_ROWS, TRIAL_LENGTH = (5, 590, 1, 256), 6, 600
AGREES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class RowLengths:
    """Attention by a kernel that knows how long each row is, the new tokens at its end.

    Args:
        kernel: see ``Kernel``.
        lengths: [n] int32.
        source: [n, q] the token whose context each token has, see ``ByRowLengths``; None: its own.
        table: see ``Kernel``.
    """

    kernel: Kernel
    lengths: Tensor
    source: Tensor | None
    table: Tensor | None

    def __call__(self, query: Tensor, kept: Tensor, scale: float | None = None) -> Tensor:
        """See ``Attend``."""
        key, value = keys_and_values(kept)
        context = self.kernel(query.flatten(2, 3), key, value, self.lengths, scale, self.table)
        if self.source is not None:
            index = self.source[:, :, None, None].expand_as(context)
            context = context.gather(1, index)
        return context.unflatten(2, query.shape[2:4])


class ByRowLengths:
    """Attention by row length.

    A kernel counts positions back from a row's end: of tokens that repeat position 0 it takes all
    but the last for such before the row's beginning, which see nothing. They get what the last one
    gets.

    Args:
        name: of the kernel.
        kernel: see ``Kernel``.
    """

    needs_host = False

    def __init__(self, name: str, kernel: Kernel) -> None:
        self.name, self.kernel = name, kernel

    def look(self, positions: Tensor, last: np.ndarray, room: Room, *, repeats: bool) -> RowLengths:
        """See ``Attention``."""
        each, source = positions.size(1), None
        lengths = positions[:, -1] + 1
        if repeats and each > 1:
            own = torch.arange(each, device=positions.device)
            source = own.maximum((each - lengths).unsqueeze(1))
        table = room.table if room.table is None else room.table[: len(positions)]
        return RowLengths(self.kernel, lengths.int(), source, table)


def flash_attention() -> Kernel:
    """flash-attn's kernel for decoding.

    Raises:
        ImportError: it is not installed.
    """
    from flash_attn import flash_attn_with_kvcache

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: Tensor,
        scale: float | None,
        table: Tensor | None,
    ) -> Tensor:
        if table is None:
            key, value, pages = key[: len(query)], value[: len(query)], {}
        else:
            pages = dict(block_table=table)
        return flash_attn_with_kvcache(
            query, key, value, cache_seqlens=lengths, softmax_scale=scale, causal=True, **pages
        )

    return kernel


def torch_flash() -> Kernel:
    """The flash attention that torch brings, over ragged rows.

    By torch's operator: its public form, ``torch.nn.attention.varlen``, took its arguments one
    release after the other.
    """
    forward = torch.ops.aten._flash_attention_forward

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: Tensor,
        scale: float | None,
        table: Tensor | None,
    ) -> Tensor:
        (rows, each), length = query.shape[:2], key.size(1)
        begins = torch.arange(rows + 1, dtype=torch.int32, device=query.device)
        if table is None:
            key, value, pages = key.flatten(0, 1), value.flatten(0, 1), {}
        else:
            length, pages = length * table.size(1), dict(block_table=table)
        ends = begins * each, begins * length, each, length
        context, *_ = forward(
            query.flatten(0, 1),
            key,
            value,
            *ends,
            0.0,
            True,
            False,
            scale=scale,
            seqused_k=lengths,
            **pages,
        )
        return context.unflatten(0, (rows, each))

    return kernel


class ByBlocks:
    """FlexAttention (2412.05496): whole blocks of keys behind a row's end are never read.

    Args:
        compiled: False: without a kernel of its own, for tests.
    """

    name, needs_host = "FlexAttention", False

    def __init__(self, *, compiled: bool = True) -> None:
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        self.masks = BlockMask
        self.attend = torch.compile(flex_attention, dynamic=True) if compiled else flex_attention

    def look(self, positions: Tensor, last: np.ndarray, room: Room, *, repeats: bool) -> Attend:
        """See ``Attention``.

        Raises:
            NotImplementedError: rows lie in pages.
        """
        if room.table is not None:
            raise NotImplementedError("pages are not read by FlexAttention here")
        (rows, each), length = positions.shape, room.length
        # [n, 1, query blocks] keys that the last token of a block looks at
        ends = torch.arange(BLOCK - 1, each - 1 + BLOCK, BLOCK, device=positions.device)
        needed = positions[:, ends.clamp(max=each - 1)].unsqueeze(1) + 1
        counts = ((needed + BLOCK - 1) // BLOCK).int()
        blocks = torch.arange(-(-length // BLOCK), dtype=torch.int32, device=positions.device)

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key <= positions[row, query]

        mask = self.masks.from_kv_blocks(
            counts,
            blocks.expand(*counts.shape, -1).contiguous(),
            BLOCK_SIZE=BLOCK,
            mask_mod=sees,
            seq_lengths=(each, length),
            compute_q_blocks=False,
        )

        def attend(query: Tensor, kept: Tensor, scale: float | None = None) -> Tensor:
            key, value = keys_and_values(kept[:rows].transpose(1, 2))
            context = self.attend(
                query.flatten(2, 3).transpose(1, 2),
                key,
                value,
                block_mask=mask,
                scale=scale,
                enable_gqa=query.size(3) > 1,
            )
            return context.transpose(1, 2).unflatten(2, query.shape[2:4])

        return attend


@dataclass(frozen=True)
class Shapes:
    """What is attended to.

    Args:
        groups: keys of a token, on this rank.
        share: heads of each.
        width: of a head.
    """

    groups: int
    share: int
    width: int


def candidates() -> Iterator[tuple[str, Callable[[], Attention]]]:
    """Kernels by name, the fastest first."""
    yield "flash-attn", lambda: ByRowLengths("flash-attn", flash_attention())
    yield "torch's flash", lambda: ByRowLengths("torch's flash", torch_flash())
    yield ByBlocks.name, ByBlocks


def choose_attention(
    shapes: Shapes, *, dtype: torch.dtype, device: torch.device, paged: bool = False
) -> Attention:
    """The first kernel that works here, and says so in the log; masks on a CPU.

    Args:
        shapes: what is attended to.
        dtype, device: of queries and keys.
        paged: rows lie in pages.
    """
    masks = BySpans(shapes.share, dtype=dtype, device=device)
    if device.type != "cuda":
        return masks
    for name, make in candidates():
        # whatever it is that is missing, or that a kernel can't do: there is another one
        try:
            attention = make()
            gap = trial(attention, shapes, dtype=dtype, device=device, paged=paged)
        except Exception as error:
            logger.info("rollouts: no %s: %s", name, str(error).split("\n", maxsplit=1)[0])
            continue
        if gap <= AGREES[dtype]:
            logger.info("rollouts: attention by %s", name)
            return attention
        logger.warning("rollouts: no %s: it is off by %.2g, see AGREES", name, gap)
    level = logging.WARNING if paged else logging.INFO
    how = "rows are copied out of their pages, and " if paged else ""
    logger.log(level, "rollouts: attention by %s; %scycles are no CUDA graphs", masks.name, how)
    return masks


def trial(
    attention: Attention,
    shapes: Shapes,
    *,
    dtype: torch.dtype,
    device: torch.device,
    paged: bool = False,
) -> float:
    """Largest distance between an attention's contexts and those of masks, on random rows."""
    draw = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=draw).to(device=device, dtype=dtype)

    masks = BySpans(shapes.share, dtype=dtype, device=device)
    lengths = np.array(TRIAL_LENGTHS)
    room = _trial_pages(lengths, device) if paged else Room(TRIAL_ROWS, TRIAL_LENGTH, device)
    kept = random(room.blocks, room.size, shapes.groups, 2, shapes.width)
    last, gaps = lengths - 1, []
    for each in (1, 3):
        query = random(len(last), each, shapes.groups, shapes.share, shapes.width)
        ends = torch.tensor(last).to(device).unsqueeze(1)
        positions = (ends + torch.arange(1 - each, 1, device=device)).clamp_(min=0)
        found, expected = (
            kind.look(positions, last, room, repeats=True)(query, kept)
            for kind in (attention, masks)
        )
        gaps.append((found - expected).abs().max())
    # not a number is no agreement
    return float(torch.stack(gaps).float().nan_to_num(nan=torch.inf).max())


def _trial_pages(lengths: np.ndarray, device: torch.device) -> PagedRoom:
    """Rows whose pages do not follow each other."""
    size = PAGE.get(device.type, OTHER_PAGE)
    tokens = TRIAL_ROWS * (TRIAL_LENGTH + size)
    room = PagedRoom(TRIAL_ROWS, TRIAL_LENGTH, device, tokens=tokens, ahead=1)
    # a row takes its first page, and the others when each has one
    for most in (1, TRIAL_LENGTH):
        room.reserve(lengths.clip(max=most))
    room.send()
    return room
