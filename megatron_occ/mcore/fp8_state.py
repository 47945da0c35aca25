"""Scales and histories of FP8's delayed scaling, as tensors.

TransformerEngine keeps them in a module's extra state, which is a pickle: it refuses to load one,
and so do we. They are those of a rank: another layout starts its histories anew, as it does its
random state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_occ.config.schema import Config

# of TransformerEngine's modules: of weights and inputs, and of gradients
_DIRECTIONS = ("scaling_fwd", "scaling_bwd")
_TENSORS = ("scale", "amax_history")
# tensors of a matrix product that have a scale in the forward pass: input, weight, output
_FORWARD = 3


def has_scaling_state(config: Config) -> bool:
    """Whether a run's FP8 depends on what earlier passes have seen."""
    return config.fp8.format != "none" and config.fp8.scaling == "delayed"


def scaling_state(chunks: Iterable[nn.Module]) -> dict[str, Tensor]:
    """Scales and histories by chunk and module, on the CPU; none of modules that never ran."""
    return {
        f"{name}.{direction}.{kind}": getattr(module.fp8_meta[direction], kind).cpu()
        for name, module in _modules(chunks)
        for direction in _DIRECTIONS
        if direction in module.fp8_meta
        for kind in _TENSORS
    }


@torch.no_grad()
def load_scaling_state(chunks: Iterable[nn.Module], state: dict[str, Tensor], recipe: Any) -> None:
    """Take over what :func:`scaling_state` gave.

    Args:
        chunks: of the same model and layout.
        state: of all its modules.
        recipe: TransformerEngine's, of delayed scaling.

    Raises:
        ValueError: the state has tensors of modules that are not there.
    """
    left = dict(state)
    for name, module in _modules(chunks):
        scale = left.get(f"{name}.scaling_fwd.scale")
        if scale is None:
            continue
        # what a forward pass sets up first, see TransformerEngineBaseModule.init_fp8_metadata
        module.fp8_meta["num_gemms"] = len(scale) // _FORWARD
        module.init_fp8_meta_tensors(recipe)
        for direction in _DIRECTIONS:
            for kind in _TENSORS:
                value = left.pop(f"{name}.{direction}.{kind}")
                getattr(module.fp8_meta[direction], kind).copy_(value)
    if left:
        raise ValueError(f"FP8 scales of modules that this model lacks: {sorted(left)[:3]}")


def _modules(chunks: Iterable[nn.Module]) -> Iterator[tuple[str, Any]]:
    for index, chunk in enumerate(chunks):
        for name, module in chunk.named_modules():
            if hasattr(module, "fp8_meta"):
                yield f"{index}.{name}", module
