"""Invertible changes of layout between Hugging Face tensors and one of Megatron-Core's.

Each moves numbers and computes none, so that a round trip is exact to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_occ.config.schema_model import ModelConfig

Shape = tuple[int, ...]


class Transform(Protocol):
    """From one or more of their tensors to one of ours, and back."""

    def shapes(self, ours: Shape, model: ModelConfig) -> list[Shape]:
        """Shapes of their tensors, from that of ours."""
        ...

    def join(self, theirs: Sequence[Tensor], model: ModelConfig) -> Tensor:
        """Our tensor from theirs."""
        ...

    def split(self, ours: Tensor, model: ModelConfig) -> list[Tensor]:
        """Their tensors from ours."""
        ...


class Rename:
    """The same tensor."""

    def shapes(self, ours: Shape, model: ModelConfig) -> list[Shape]:
        return [ours]

    def join(self, theirs: Sequence[Tensor], model: ModelConfig) -> Tensor:
        (tensor,) = theirs
        return tensor

    def split(self, ours: Tensor, model: ModelConfig) -> list[Tensor]:
        return [ours]


class GateUp:
    """Gate over up: Megatron-Core has one matrix for both halves of a gated MLP."""

    def shapes(self, ours: Shape, model: ModelConfig) -> list[Shape]:
        half = (ours[0] // 2, *ours[1:])
        return [half, half]

    def join(self, theirs: Sequence[Tensor], model: ModelConfig) -> Tensor:
        return torch.cat(list(theirs))

    def split(self, ours: Tensor, model: ModelConfig) -> list[Tensor]:
        return list(ours.chunk(2))


class QueryKeyValue:
    """Three matrices (or biases) against one whose rows go by key/value group.

    Megatron-Core keeps the rows of each group together: its queries, its key, its value.
    """

    def shapes(self, ours: Shape, model: ModelConfig) -> list[Shape]:
        heads, groups, channels = head_sizes(model)
        return [(count * channels, *ours[1:]) for count in (heads, groups, groups)]

    def join(self, theirs: Sequence[Tensor], model: ModelConfig) -> Tensor:
        _, groups, _ = head_sizes(model)
        parts = [part.unflatten(0, (groups, -1)) for part in theirs]
        return torch.cat(parts, dim=1).flatten(0, 1)

    def split(self, ours: Tensor, model: ModelConfig) -> list[Tensor]:
        heads, groups, channels = head_sizes(model)
        sizes = [heads // groups * channels, channels, channels]
        parts = ours.unflatten(0, (groups, -1)).split(sizes, dim=1)
        return [part.flatten(0, 1) for part in parts]


class PlainQueryKeyValue:
    """One matrix on both sides; theirs has all queries first, then all keys, then all values."""

    def shapes(self, ours: Shape, model: ModelConfig) -> list[Shape]:
        return [ours]

    def join(self, theirs: Sequence[Tensor], model: ModelConfig) -> Tensor:
        (tensor,) = theirs
        sizes = [shape[0] for shape in QKV.shapes(tuple(tensor.shape), model)]
        return QKV.join(tensor.split(sizes), model)

    def split(self, ours: Tensor, model: ModelConfig) -> list[Tensor]:
        return [torch.cat(QKV.split(ours, model))]


class SwapHalves:
    """Halves of the columns exchanged.

    Megatron-Core's MTP projection reads [embedding; hidden state] (DeepSeek-V3, arXiv 2412.19437,
    equation 21), MiMo's reads [hidden state; embedding]. A wrong order survives a round trip.
    """

    def shapes(self, ours: Shape, model: ModelConfig) -> list[Shape]:
        return [ours]

    def join(self, theirs: Sequence[Tensor], model: ModelConfig) -> Tensor:
        (tensor,) = theirs
        return torch.cat(tensor.chunk(2, dim=1)[::-1], dim=1)

    def split(self, ours: Tensor, model: ModelConfig) -> list[Tensor]:
        return [torch.cat(ours.chunk(2, dim=1)[::-1], dim=1)]


RENAME, GATE_UP, QKV = Rename(), GateUp(), QueryKeyValue()
PLAIN_QKV, SWAP_HALVES = PlainQueryKeyValue(), SwapHalves()


def head_sizes(model: ModelConfig) -> tuple[int, int, int]:
    """Attention heads, key/value groups, channels of a head."""
    heads = model.num_attention_heads
    return heads, model.num_query_groups or heads, model.kv_channels or model.hidden_size // heads


def dequantize_blocks(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """fp32 from an fp8 matrix with a scale for each block (DeepSeek-V3's ``weight_scale_inv``).

    Args:
        weight: [m, n] float8.
        scale: [ceil(m / block[0]), ceil(n / block[1])], multiplies its block.
        block: rows and columns of a block.

    Raises:
        ValueError: another number of scales.
    """
    rows, columns = weight.shape
    expected = (-(-rows // block[0]), -(-columns // block[1]))
    if tuple(scale.shape) != expected:
        raise ValueError(f"has {list(scale.shape)} scales, blocks of {block} need {list(expected)}")
    result = weight.float()
    for index, row in enumerate(range(0, rows, block[0])):
        # a strip at a time: the scales of a whole matrix would take as much room as it does
        factors = scale[index].float().repeat_interleave(block[1])[:columns]
        result[row : row + block[0]] *= factors
    return result
