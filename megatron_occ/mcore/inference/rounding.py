"""Weights and inputs of products rounded to FP8, as an FP8 training run rounds them.

A scale is the largest power of two at which no value leaves the range of E4M3; TransformerEngine's
recipes make the same ones by blocks, and of whole tensors where it is told to
(``capabilities.check_machine``). Such a scale shifts exponents and no digits: a value of E4M3's
normal numbers is rounded alike whatever it shares its scale with. So a token may have one of its
own, and does not depend on those beside it, although training has one for all tokens of a tensor.
With scales that are no powers of two each rounds to another grid, and rollouts would be as far from
training as those in bf16.

A rounded value has four significant bits, so bf16 holds it exactly, and a product in bf16 is that
of an FP8 kernel up to the order of its sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from megatron_occ.config.schema import Config
from megatron_occ.config.sizes import fp8_layers

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
# rows and columns of a weight that share a scale in TransformerEngine's Float8BlockScaling
BLOCK = 128
# the bits of a float32's sign and exponent
_EXPONENT = -(1 << 23)


@dataclass(frozen=True)
class Rounding:
    """How products are rounded.

    Args:
        block: rows and columns of a weight, and columns of a token, that share a scale; None: a
            scale for each weight, and for each token.
        layers: numbers of the trunk's layers, from 1, whose products are; others stay as they are.
            MTP layers are all rounded, as Megatron-Core does it.
    """

    block: int | None
    layers: range

    def weight(self, weight: Tensor) -> Tensor:
        """A rounded copy of [o, i], in the precision of the weight."""
        return rounded(weight, self.block or weight.size(0), self.block or weight.size(1))

    def inputs(self, values: Tensor) -> Tensor:
        """A rounded copy of [t, i]: each token for itself."""
        return rounded(values, 1, self.block or values.size(1))


def rounding_from(config: Config) -> Rounding | None:
    """That of ``rl.rollout.fp8``; None: rollouts are not rounded."""
    if not config.rl.rollout.fp8:
        return None
    return Rounding(BLOCK if config.fp8.scaling == "block" else None, fp8_layers(config))


def rounded(values: Tensor, rows: int, columns: int) -> Tensor:
    """[n, m] with each tile of ``rows`` and ``columns`` rounded to E4M3 under a scale of its own.

    What is not finite makes its tile so.
    """
    n, m = values.shape
    if n % rows or m % columns:
        values = functional.pad(values, (0, -m % columns, 0, -n % rows))
    tiles = values.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    largest = tiles.abs().amax((1, 3), keepdim=True).float()
    # tiles of zeros have any scale
    scale = (LARGEST / largest).clamp(max=2.0**127)
    scale = (scale.view(torch.int32) & _EXPONENT).view(torch.float32)
    found = (tiles * scale).to(E4M3).to(values.dtype) / scale.to(values.dtype)
    return found.reshape(values.shape)[:n, :m]
