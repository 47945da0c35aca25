"""Training forward passes in FP8 as TransformerEngine rounds them, by hooks and by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_occ.mcore.mtp_layer import inner_layer

# Megatron's names of the layers that TransformerEngine multiplies in FP8
LINEAR = (
    "linear_qkv",
    "linear_proj",
    "linear_fc1",
    "linear_fc2",
    "linear_q_proj",
    "linear_q_down_proj",
    "linear_q_up_proj",
    "linear_kv_down_proj",
    "linear_kv_up_proj",
)


def e4m3(values):
    """The nearest of 4 exponent bits with the bias 7 and 3 mantissa bits, the even one of two."""
    _, exponent = torch.frexp(values)
    step = torch.ldexp(torch.ones_like(values), (exponent - 1).clamp(min=-6) - 3)
    return (values / step).round() * step


def on_grid(values, largest):
    """Scaled by the largest power of two that keeps ``largest``, which is not 0, at 448 at most."""
    exponent = (448 / largest.double()).log2().floor()
    return (e4m3(values.double() * 2**exponent) / 2**exponent).to(values.dtype)


def by_tiles(values, rows, columns):
    """Each tile of a matrix on a grid of its own."""
    found = values.clone()
    for top in range(0, values.size(0), rows):
        for left in range(0, values.size(1), columns):
            tile = values[top : top + rows, left : left + columns]
            if tile.any():
                found[top : top + rows, left : left + columns] = on_grid(tile, tile.abs().max())
    return found


def whole(values):
    """All values on one grid."""
    return on_grid(values, values.abs().max())


def of_inputs(values, block):
    """As training rounds [..., i]: one grid for a tensor, or one for each token and block."""
    if block is None:
        return whole(values)
    blocks = values.split(block, dim=-1)
    return torch.cat([on_grid(each, each.abs().amax(-1, keepdim=True)) for each in blocks], dim=-1)


@contextmanager
def fp8_training(model, block, layers) -> Iterator[None]:
    """The model's forward passes round inputs and weights.

    Args:
        model: whose modules are changed for the time.
        block: see ``Rounding``.
        layers: of the trunk, by number from 1.
    """
    chosen = [layer for layer in model.decoder.layers if layer.layer_number in layers]
    depths = model.mtp.layers if hasattr(model, "mtp") else []
    modules = [
        module
        for layer in (*chosen, *map(inner_layer, depths))
        for name, module in layer.named_modules()
        if name.rpartition(".")[2] in LINEAR
    ] + [depth.eh_proj for depth in depths]
    weights = [module.weight.data for module in modules]
    hooks = []
    for module, weight in zip(modules, weights, strict=True):
        module.weight.data = by_tiles(weight, block, block) if block else whole(weight)
        hooks.append(
            module.register_forward_pre_hook(
                lambda _, given: (of_inputs(given[0], block), *given[1:])
            )
        )
    try:
        yield
    finally:
        for module, weight, hook in zip(modules, weights, hooks, strict=True):
            module.weight.data = weight
            hook.remove()
