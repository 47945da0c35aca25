"""Weights of MTP layers that a checkpoint does not bring."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_occ.config.schema_model import ModelConfig
from megatron_occ.convert.slots import Slot
from megatron_occ.convert.transforms import Shape


class Fresh:
    """In a move, in a transform's place: there is nothing to transform."""

    def shapes(self, ours: Shape, model: ModelConfig) -> list[Shape]:
        return []

    def join(self, theirs: Sequence[Tensor], model: ModelConfig) -> Tensor:
        raise AssertionError("made by fresh_weights")

    def split(self, ours: Tensor, model: ModelConfig) -> list[Tensor]:
        raise AssertionError("never written back")


FRESH = Fresh()


def fresh_weights(slot: Slot, model: ModelConfig) -> Tensor:
    """As Megatron-Core initialises, fp32, the same numbers whenever and wherever it is called.

    Norms 1, biases 0, matrices normal with standard deviation ``model.init_std``, those at the end
    of a residual branch divided by sqrt(2 layers).
    """
    if len(slot.shape) == 1:
        is_norm = "norm" in slot.name
        return torch.ones(slot.shape) if is_norm else torch.zeros(slot.shape)
    seed = int.from_bytes(hashlib.sha256(slot.name.encode()).digest()[:4], "little")
    std = model.init_std
    if slot.name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * model.num_layers)
    return torch.randn(slot.shape, generator=torch.Generator().manual_seed(seed)) * std
