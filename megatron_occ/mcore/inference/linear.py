"""Linear layers of Megatron's modules, on the weights that these have now."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from megatron_occ.mcore.inference.rounding import Rounding


def tensor_of(module: Any, name: str = "weight") -> Tensor | None:
    """A module's parameter without autograd; None where the module has none.

    TransformerEngine's layers without a bias have an empty tensor in its place.
    """
    found = getattr(module, name, None)
    return None if found is None or not found.numel() else found.detach()


class Linear:
    """[t, i] to [t, o].

    Args:
        module: Megatron's layer, or this tensor-parallel rank's part of it.
        rounding: to FP8; None: as the weight is. A part of a layer's inputs is rounded by itself.

    Attributes:
        weight: [o, i] that inputs are multiplied with.
    """

    def __init__(self, module: Any, rounding: Rounding | None) -> None:
        weight = tensor_of(module)
        assert weight is not None, "a linear layer has a weight"
        self.weight = weight if rounding is None else rounding.weight(weight)
        self.bias, self.rounding = tensor_of(module, "bias"), rounding

    def __call__(self, values: Tensor) -> Tensor:
        """[t, i] to [t, o]."""
        return functional.linear(self.read(values), self.weight, self.bias)

    def read(self, values: Tensor) -> Tensor:
        """What is multiplied, of inputs [t, i]."""
        return values if self.rounding is None else self.rounding.inputs(values)
