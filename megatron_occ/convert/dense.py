"""Dense models as Hugging Face folders: Llama and Qwen2, and MiMo where there is an MTP layer.

Names and formulas of MiMo are those that servers read, ``mimo.py`` and ``mimo_mtp.py`` in
``vllm/model_executor/models`` and ``sglang/srt/models``. With h the trunk's state and e the
embedding of the next token, its MTP layer is

    final_layernorm(Block(input_proj [hidden_layernorm(h); token_layernorm(e)])),

where Megatron-Core's has [e; h] (``eh_proj``, as DeepSeek-V3, arXiv 2412.19437, equation 21).

The h of Megatron-Core and of SGLang has passed the trunk's final norm, that of vLLM has not. Norm
after norm is one norm whose weight is the product, up to a factor that depends on the token, the
root mean square of what the first one gives. That is near the root mean square of the first
norm's weight, which is divided out here, so that drafts on vLLM are nearly those of the trainer,
and exactly those where the norm's weights are equal. Responses are the same in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_occ.config.schema import Config
from megatron_occ.config.schema_model import ModelConfig
from megatron_occ.config.validate_servers import architecture

_MIMO, _LLAMA = "MiMoForCausalLM", "LlamaForCausalLM"
# parts of a layer that are the same tensor on both sides
_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}


def hugging_face_config(config: Config, vocab_size: int, eos_id: int) -> dict[str, Any]:
    """Content of ``config.json``.

    MiMo says that its model type is Qwen2's, whose settings it has: servers go by the architecture,
    and read the folder without code of its own.

    Args:
        config: of the run; ``validate`` has accepted it for servers.
        vocab_size: ids that take part in the softmax.
        eos_id: end of text.
    """
    model, name = config.model, architecture(config)
    heads, groups, channels = _heads(model)
    content = {
        "architectures": [name],
        "model_type": "llama" if name == _LLAMA else "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": channels,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": float(model.rotary_base),
        "attention_bias": name != _LLAMA,
        # vLLM's MTP layer reads an output layer of its own
        "tie_word_embeddings": model.tie_embeddings and name != _MIMO,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "torch_dtype": "bfloat16" if config.precision == "bf16" else "float32",
    }
    return content | ({"num_nextn_predict_layers": 1} if name == _MIMO else {})


def hugging_face_tensors(
    tensors: Mapping[str, Tensor], config: Config, vocab_size: int, *, prenorm: bool = False
) -> dict[str, Tensor]:
    """Weights by their name in safetensors.

    Args:
        tensors: whole tensors by their key in a distributed checkpoint, where the layers of the
            trunk are stacked, [layers, ...]; other keys are left alone.
        config: as for :func:`hugging_face_config`.
        vocab_size: ids that take part in the softmax; padding of the vocabulary is cut off.
        prenorm: the reader's MTP layer gets the trunk's state before the final norm, see the
            module.
    """
    model, name = config.model, architecture(config)
    embedding = tensors["embedding.word_embeddings.weight"][:vocab_size]
    output = tensors["output_layer.weight"][:vocab_size] if not model.tie_embeddings else embedding
    norm = tensors["decoder.final_layernorm.weight"]
    found = {"model.embed_tokens.weight": embedding, "model.norm.weight": norm}
    if name == _MIMO or not model.tie_embeddings:
        found["lm_head.weight"] = output
    biased = name != _LLAMA
    stacked = _below(tensors, "decoder.layers.")
    for index in range(model.num_layers):
        layer = {key: tensor[index] for key, tensor in stacked.items()}
        found |= _layer(f"model.layers.{index}.", layer, model, biased=biased)
    if name == _MIMO:
        found |= _mtp_layer(_below(tensors, "mtp.layers.0."), model, norm if prenorm else None)
    # tensors of a file must not share memory
    return {key: tensor.detach().clone().contiguous() for key, tensor in found.items()}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }


def _heads(model: ModelConfig) -> tuple[int, int, int]:
    """Attention heads, key/value groups, channels of a head."""
    heads = model.num_attention_heads
    return heads, model.num_query_groups or heads, model.kv_channels or model.hidden_size // heads


def _layer(
    prefix: str, layer: Mapping[str, Tensor], model: ModelConfig, *, biased: bool
) -> dict[str, Tensor]:
    """One decoder layer; without bias where the reader has one, it is zero."""
    found = {prefix + theirs: layer[ours] for ours, theirs in _LAYER.items()}
    gate, up = layer["mlp.linear_fc1.weight"].chunk(2)
    found |= {f"{prefix}mlp.gate_proj.weight": gate, f"{prefix}mlp.up_proj.weight": up}
    weight = layer["self_attention.linear_qkv.weight"]
    found |= _queries_keys_values(prefix, "weight", weight, model)
    if biased:
        bias = layer.get("self_attention.linear_qkv.bias")
        if bias is None:
            bias = weight.new_zeros(weight.size(0))
        found |= _queries_keys_values(prefix, "bias", bias, model)
    return found


def _queries_keys_values(
    prefix: str, kind: str, joined: Tensor, model: ModelConfig
) -> dict[str, Tensor]:
    """Megatron-Core keeps the rows of each key/value group together: queries, key, value."""
    heads, groups, channels = _heads(model)
    blocks = joined.reshape(groups, heads // groups + 2, channels, *joined.shape[1:])
    parts = blocks.split((heads // groups, 1, 1), dim=1)
    return {
        f"{prefix}self_attn.{name}.{kind}": part.flatten(0, 2)
        for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True)
    }


def _mtp_layer(
    layer: Mapping[str, Tensor], model: ModelConfig, before: Tensor | None
) -> dict[str, Tensor]:
    """MiMo's MTP layer; ``before``: weight of the norm that its reader leaves out."""
    prefix = "model.mtp_layers.0."
    hidden_norm = layer["hnorm.weight"]
    if before is not None:
        wide = before.float()
        product = hidden_norm.float() * wide / wide.square().mean().sqrt()
        hidden_norm = product.to(hidden_norm.dtype)
    embedding, hidden = layer["eh_proj.weight"].chunk(2, dim=1)
    found = {
        "token_layernorm.weight": layer["enorm.weight"],
        "hidden_layernorm.weight": hidden_norm,
        "input_proj.weight": torch.cat((hidden, embedding), dim=1),
        "final_layernorm.weight": layer["final_layernorm.weight"],
    }
    block = _layer(prefix, _below(layer, "transformer_layer."), model, biased=True)
    return {prefix + key: tensor for key, tensor in found.items()} | block
