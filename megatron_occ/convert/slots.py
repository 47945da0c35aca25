"""Every tensor of a model, as Megatron-Core's distributed checkpoints hold it; pure arithmetic.

``tests/mcore/test_convert_slots.py`` holds the list against the sharded state of real models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_occ.config.schema_model import ModelConfig
from megatron_occ.convert.transforms import head_sizes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """One parameter, and the part of a checkpoint's tensor that it is.

    Args:
        name: of the parameter in a model on one process; expert e is ``mlp.experts.<e>.``.
        key: of the checkpoint's tensor.
        shape: of the parameter.
        whole: of the checkpoint's tensor: equal layers, and the experts of a layer, are stacked.
        offset: first entry of the parameter in it.
        single: fp32 whatever the precision of the model.
    """

    name: str
    key: str
    shape: Shape
    whole: Shape
    offset: Shape
    single: bool = False

    @property
    def box(self) -> Shape:
        """Shape of the part: that of the parameter with the stacked dimensions in front."""
        return (1,) * (len(self.whole) - len(self.shape)) + self.shape


def model_slots(model: ModelConfig, depths: int, vocab_size: int) -> dict[str, Slot]:
    """Slots by parameter name.

    Args:
        model: section ``model``.
        depths: MTP depths K.
        vocab_size: rows of embedding and output layer.
    """
    width, slots = model.hidden_size, []
    table = (vocab_size, width)
    slots.append(_plain("embedding.word_embeddings.weight", table))
    # with experts the layers are not alike: none is stacked
    count = model.num_layers if model.moe.num_experts is None else 0
    for index in range(model.num_layers):
        is_dense = index < model.moe.first_dense_layers
        slots += _layer(
            model, f"decoder.layers.{index}.", is_dense=is_dense, stacked=(index, count)
        )
    slots.append(_plain("decoder.final_layernorm.weight", (width,)))
    for depth in range(depths):
        prefix = f"mtp.layers.{depth}."
        slots += [_plain(f"{prefix}{name}.weight", (width,)) for name in ("enorm", "hnorm")]
        slots.append(_plain(f"{prefix}eh_proj.weight", (width, 2 * width)))
        is_dense = model.moe.first_dense_layers >= model.num_layers
        slots += _layer(model, f"{prefix}transformer_layer.", is_dense=is_dense)
        slots.append(_plain(f"{prefix}final_layernorm.weight", (width,)))
    if not model.tie_embeddings:
        slots.append(_plain("output_layer.weight", table))
    return {slot.name: slot for slot in slots}


def _plain(name: str, shape: Shape, *, single: bool = False) -> Slot:
    return Slot(name, name, shape, shape, (0,) * len(shape), single)


def _layer(
    model: ModelConfig, prefix: str, *, is_dense: bool, stacked: tuple[int, int] = (0, 0)
) -> Iterator[Slot]:
    index, count = stacked
    attention = _latent_attention(model) if model.mla.enabled else _attention(model)
    dense = is_dense or model.moe.num_experts is None
    parts = {**attention, **(_dense_mlp(model) if dense else _expert_mlp(model))}
    for name, shape in parts.items():
        if count:
            key = f"decoder.layers.{name}"
            yield Slot(prefix + name, key, shape, (count, *shape), (index, *(0,) * len(shape)))
        else:
            yield _plain(prefix + name, shape, single=name.endswith("expert_bias"))
    if not dense:
        yield from _experts(model, prefix)


def _attention(model: ModelConfig) -> dict[str, Shape]:
    heads, groups, channels = head_sizes(model)
    width, rows = model.hidden_size, (heads + 2 * groups) * channels
    at = "self_attention."
    parts: dict[str, Shape] = {
        f"{at}linear_qkv.layer_norm_weight": (width,),
        f"{at}linear_qkv.weight": (rows, width),
        f"{at}linear_proj.weight": (width, heads * channels),
    }
    if model.qkv_bias:
        parts[f"{at}linear_qkv.bias"] = (rows,)
    if model.qk_layernorm:
        parts |= {f"{at}q_layernorm.weight": (channels,), f"{at}k_layernorm.weight": (channels,)}
    return parts


def _latent_attention(model: ModelConfig) -> dict[str, Shape]:
    mla, width, heads = model.mla, model.hidden_size, model.num_attention_heads
    at, queries = "self_attention.", heads * (mla.qk_head_dim + mla.qk_rope_head_dim)
    parts: dict[str, Shape] = {
        "input_layernorm.weight": (width,),
        f"{at}linear_proj.weight": (width, heads * mla.v_head_dim),
        f"{at}linear_kv_down_proj.weight": (mla.kv_lora_rank + mla.qk_rope_head_dim, width),
        f"{at}linear_kv_up_proj.weight": (
            heads * (mla.qk_head_dim + mla.v_head_dim),
            mla.kv_lora_rank,
        ),
    }
    if mla.q_lora_rank is None:
        parts[f"{at}linear_q_proj.weight"] = (queries, width)
    else:
        parts[f"{at}linear_q_down_proj.weight"] = (mla.q_lora_rank, width)
        parts[f"{at}linear_q_up_proj.weight"] = (queries, mla.q_lora_rank)
    if model.qk_layernorm:
        parts[f"{at}linear_kv_up_proj.layer_norm_weight"] = (mla.kv_lora_rank,)
        if mla.q_lora_rank is not None:
            parts[f"{at}linear_q_up_proj.layer_norm_weight"] = (mla.q_lora_rank,)
    return parts


def _dense_mlp(model: ModelConfig) -> dict[str, Shape]:
    width, inner = model.hidden_size, model.ffn_hidden_size
    return {
        "mlp.linear_fc1.layer_norm_weight": (width,),
        "mlp.linear_fc1.weight": (2 * inner, width),
        "mlp.linear_fc2.weight": (width, inner),
    }


def _expert_mlp(model: ModelConfig) -> dict[str, Shape]:
    """What a MoE layer has once."""
    moe, width = model.moe, model.hidden_size
    parts: dict[str, Shape] = {
        "pre_mlp_layernorm.weight": (width,),
        "mlp.router.weight": (moe.num_experts, width),
    }
    if moe.expert_bias:
        parts["mlp.router.expert_bias"] = (moe.num_experts,)
    if moe.shared_ffn_hidden_size is not None:
        shared = moe.shared_ffn_hidden_size
        parts["mlp.shared_experts.linear_fc1.weight"] = (2 * shared, width)
        parts["mlp.shared_experts.linear_fc2.weight"] = (width, shared)
    return parts


def _experts(model: ModelConfig, prefix: str) -> Iterator[Slot]:
    moe, width = model.moe, model.hidden_size
    inner = moe.ffn_hidden_size or model.ffn_hidden_size
    shapes = {"linear_fc1.weight": (2 * inner, width), "linear_fc2.weight": (width, inner)}
    for expert in range(moe.num_experts):
        for name, shape in shapes.items():
            key = f"{prefix}mlp.experts.experts.{name}"
            whole, offset = (moe.num_experts, *shape), (expert, 0, 0)
            yield Slot(f"{prefix}mlp.experts.{expert}.{name}", key, shape, whole, offset)
