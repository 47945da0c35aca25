"""Settings of the model that Megatron-Core's configuration has no place for, set in its modules."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor, nn

from megatron_occ.config.schema_model import ModelConfig, RotaryScalingConfig

ModuleT = TypeVar("ModuleT", bound=nn.Module)
# where the norm of a latent is: fused into the projection behind it, or on its own
_LATENT_NORMS = ("linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")


def adjusted(module: ModuleT, model: ModelConfig) -> ModuleT:
    """The module with ``model.rotary_scaling`` and ``model.mla.norm_epsilon``.

    Rotary frequencies are those of the host wherever Megatron made the module: a device may round
    another way, and a resumed run would not turn as the one before it.

    Args:
        module: Megatron's GPT, or a part of it; changed in place.
        model: section ``model``.
    """
    rotary = getattr(module, "rotary_pos_emb", None)
    if rotary is not None:
        rotary.inv_freq = _frequencies(2 * rotary.inv_freq.numel(), model)
    if model.mla.norm_epsilon is not None:
        for part in module.modules():
            if isinstance(part, MLASelfAttention):
                _set_epsilon(part, model.mla.norm_epsilon)
    return module


def _frequencies(width: int, model: ModelConfig) -> Tensor:
    """[width / 2] base^(-2 i / width) (Su et al. 2104.09864), in Megatron's order of operations."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    found = 1.0 / model.rotary_base**exponents
    scaled = model.rotary_scaling.factor is not None
    return scaled_frequencies(found, model.rotary_scaling) if scaled else found


def _set_epsilon(attention: MLASelfAttention, epsilon: float) -> None:
    for name in _LATENT_NORMS:
        norm = getattr(attention, name, None)
        if hasattr(norm, "eps"):
            norm.eps = epsilon


def scaled_frequencies(frequencies: Tensor, scaling: RotaryScalingConfig) -> Tensor:
    """Frequencies of Llama 3.1's longer context, in the order of operations of transformers.

    Channels that turn often in the original context stay, those that hardly turn are divided by
    the factor, a ramp between them. Megatron-Core has the same for one set of numbers alone.

    Args:
        frequencies: [width / 2] of the original context.
        scaling: section ``model.rotary_scaling``, with a factor.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original, factor = scaling.original_max_position_embeddings, scaling.factor
    waves = 2 * math.pi / frequencies
    found = torch.where(waves > original / low, frequencies / factor, frequencies)
    share = (original / waves - low) / (high - low)
    ramp = (1 - share) * found / factor + share * found
    is_between = ~(waves < original / high) & ~(waves > original / low)
    return torch.where(is_between, ramp, found)
