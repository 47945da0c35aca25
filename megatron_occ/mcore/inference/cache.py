"""Keys and values of sequences, a row for each, and what a pass reads and writes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_occ.mcore.inference.attend import Attend
from megatron_occ.mcore.inference.room import Room


@dataclass(frozen=True)
class Tokens:
    """Tokens of one pass: ``n * q`` of them, q neighbours of each of the first n rows of a cache.

    Args:
        rows: n.
        each: q.
        places: [n * q] where a cache holds each token, see ``Room.places``.
        cos, sin: [n * q, 1, heads, width] of the positions, see :class:`Rotary`.
        half: pairs that are turned.
        attend: how they attend; None: all rows begin at their first token, and each looks at itself
            and those before it.
    """

    rows: int
    each: int
    places: Tensor
    cos: Tensor
    sin: Tensor
    half: int
    attend: Attend | None

    @property
    def is_causal(self) -> bool:
        """Whether all rows begin at their first token."""
        return self.attend is None


class Cache:
    """Tensors [blocks, size, ...], one or two for each attention layer.

    Args:
        shapes: for each layer the shapes of what it keeps of a token.
        room: where the tokens of rows lie in them.
        experts: for each layer the experts of a token that are kept behind these, 1 + each; None:
            of none.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[tuple[int, ...]]],
        room: Room,
        *,
        dtype: torch.dtype,
        device: torch.device,
        experts: Sequence[int] | None = None,
    ) -> None:
        self.room, self._device = room, device
        blocks, size = room.blocks, room.size
        # zeros: a masked position must not hold what is not a number
        self.layers = [
            [torch.zeros(blocks, size, *shape, dtype=dtype, device=device) for shape in layer]
            for layer in shapes
        ]
        for layer, count in zip(self.layers, experts or (), strict=False):
            if count:
                kept = torch.zeros(blocks, size, count, dtype=torch.int16, device=device)
                layer.append(kept)

    def copy_rows(
        self, source: Cache, rows: Sequence[int], targets: Sequence[int], length: int
    ) -> None:
        """Copy the first ``length`` tokens of rows of ``source``, in one piece, to rows of this."""
        rows, targets = self._on_device(rows, targets)
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            for to, of in zip(mine, theirs, strict=True):
                self.room.put(to, targets, of[rows, :length])

    def move(self, rows: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Bring the first ``length`` tokens of rows to other rows, all at the same time."""
        rows, targets = self._on_device(rows, targets)
        kept = [tensor for layer in self.layers for tensor in layer]
        self.room.move(kept, rows, targets, length)

    def _on_device(self, rows: Sequence[int], targets: Sequence[int]) -> tuple[Tensor, Tensor]:
        """To the device once, and not for each layer."""
        return torch.tensor((list(rows), list(targets)), device=self._device).unbind()


def write(cache: Tensor, places: Tensor, values: Tensor) -> None:
    """Put values [n * q, ...] at their places in a cache [blocks, size, ...]."""
    cache.flatten(0, 1).index_copy_(0, places, values)


class Rotary:
    """Cosines and sines by position (RoPE, 2104.09864), over whole heads.

    What is not turned (the rest of a head, a value beside queries and keys) has cosine 1 and sine
    0: one product over contiguous memory is faster than products of slices.

    Args:
        angles: [length, rotary / 2] of each position and pair.
        width: of a head.
        turned: heads side by side that are turned.
        kept: further ones that are not.
        dtype: of queries and keys.
    """

    def __init__(
        self, angles: Tensor, width: int, *, turned: int, kept: int, dtype: torch.dtype
    ) -> None:
        length, self.half = angles.shape
        cos = torch.ones(length, 1, turned + kept, width, dtype=dtype, device=angles.device)
        sin = torch.zeros_like(cos)
        # the sign belongs to the first half: x1 cos - x2 sin, x2 cos + x1 sin
        first, second = slice(0, self.half), slice(self.half, 2 * self.half)
        angles = angles[:, None, None]
        for part, sign in ((first, -1), (second, 1)):
            cos[:, :, :turned, part] = angles.cos().to(dtype)
            sin[:, :, :turned, part] = (sign * angles.sin()).to(dtype)
        self.cos, self.sin = cos, sin


def rotate(values: Tensor, tokens: Tokens) -> Tensor:
    """Turn [n * q, ., heads, width] by the tokens' positions."""
    half = tokens.half
    first, second, rest = values.split((half, half, values.size(-1) - 2 * half), dim=-1)
    return torch.addcmul(values * tokens.cos, torch.cat((second, first, rest), -1), tokens.sin)
