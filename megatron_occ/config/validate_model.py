"""What the keys of ``model``, and those of its precision, must satisfy together."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_occ.config.keys import spell
from megatron_occ.config.schema import Config
from megatron_occ.config.schema_model import ModelConfig


def model_problems(config: Config) -> Iterator[str]:
    """Problems of the architecture, one message each.

    Args:
        config: a configuration whose single values are in range.
    """
    model = config.model
    yield from _mla(model) if model.mla.enabled else _heads(model)
    yield from _rotary_scaling(model)
    yield from _moe(model)
    if config.fp8.format != "none" and config.precision != "bf16":
        yield (
            f"fp8.format={config.fp8.format}: FP8 products are taken of bf16 activations, "
            f"precision={config.precision} has none. Give precision=bf16, or fp8.format=none"
        )


def _heads(model: ModelConfig) -> Iterator[str]:
    heads, groups, width = model.num_attention_heads, model.num_query_groups, model.kv_channels
    if width is None and model.hidden_size % heads:
        yield (
            f"model.num_attention_heads={heads}: does not divide "
            f"model.hidden_size={model.hidden_size}. Change one, or set model.kv_channels"
        )
    else:
        yield from _rotated(model, width or model.hidden_size // heads)
    if groups is not None and heads % groups:
        yield (
            f"model.num_query_groups={groups}: does not divide "
            f"model.num_attention_heads={heads}. Give a divisor of {heads}"
        )


def _rotated(model: ModelConfig, width: int) -> Iterator[str]:
    rotated = int(width * model.rotary_percent)
    if rotated % 2 == 0 and rotated > 0:
        return
    given = "null" if model.kv_channels is None else model.kv_channels
    yield (
        f"model.kv_channels={given}: a head is {width} wide, of which the rotary embedding turns "
        f"{rotated} (model.rotary_percent={model.rotary_percent}), and it needs an even width. "
        "Change model.kv_channels, or model.hidden_size or model.num_attention_heads"
    )


def _mla(model: ModelConfig) -> Iterator[str]:
    for name in ("num_query_groups", "kv_channels"):
        value = getattr(model, name)
        if value is not None:
            yield (
                f"model.{name}={value}: multi-head latent attention (model.mla.enabled=true) has "
                f"no such thing. Set model.{name}=null, and the widths in model.mla"
            )
    if model.qkv_bias:
        yield (
            "model.qkv_bias=true: multi-head latent attention (model.mla.enabled=true) has no "
            "query/key/value bias. Set model.qkv_bias=false"
        )
    if model.rotary_percent != 1.0:
        yield (
            f"model.rotary_percent={model.rotary_percent}: with model.mla.enabled=true "
            "model.mla.qk_rope_head_dim says which part is turned. Set model.rotary_percent=1.0"
        )
    if model.mla.qk_rope_head_dim % 2:
        yield (
            f"model.mla.qk_rope_head_dim={model.mla.qk_rope_head_dim}: the rotary embedding needs "
            f"an even width. Give {model.mla.qk_rope_head_dim + 1}"
        )
    yarn = model.mla.yarn
    if yarn.beta_fast < yarn.beta_slow:
        yield (
            f"model.mla.yarn.beta_fast={yarn.beta_fast}: is below model.mla.yarn.beta_slow="
            f"{yarn.beta_slow}. Swap them"
        )


def _rotary_scaling(model: ModelConfig) -> Iterator[str]:
    scaling = model.rotary_scaling
    if scaling.factor is None:
        return
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        yield (
            f"model.rotary_scaling.high_freq_factor={scaling.high_freq_factor}: is not above "
            f"model.rotary_scaling.low_freq_factor={scaling.low_freq_factor}. Swap them"
        )
    if model.mla.enabled:
        yield (
            f"model.rotary_scaling.factor={scaling.factor}: multi-head latent attention "
            "(model.mla.enabled=true) is scaled by model.mla.yarn. Set "
            "model.rotary_scaling.factor=null"
        )


def _moe(model: ModelConfig) -> Iterator[str]:
    moe = model.moe
    if moe.num_experts is None:
        return
    if moe.top_k > moe.num_experts:
        yield (
            f"model.moe.top_k={moe.top_k}: is more than model.moe.num_experts={moe.num_experts}. "
            "Lower it"
        )
    if moe.top_k == 1 and moe.score_function == "softmax":
        yield (
            "model.moe.top_k=1: the weight of a single expert is 1 under "
            "model.moe.score_function=softmax, and the router gets no gradient. Give "
            "model.moe.top_k=2, or model.moe.score_function=sigmoid"
        )
    if moe.first_dense_layers >= model.num_layers:
        yield (
            f"model.moe.first_dense_layers={moe.first_dense_layers}: leaves no MoE layer among "
            f"model.num_layers={model.num_layers}. Lower it, or model.moe.num_experts=null"
        )
    if moe.expert_bias and moe.score_function != "sigmoid":
        yield (
            "model.moe.expert_bias=true: is defined for sigmoid scores. Give "
            "model.moe.score_function=sigmoid, or model.moe.expert_bias=false"
        )
    if (moe.groups is None) != (moe.top_groups is None):
        yield (
            f"model.moe.groups={spell(moe.groups)}: goes together with model.moe.top_groups="
            f"{spell(moe.top_groups)}. Give both or neither"
        )
    elif moe.groups is not None and moe.top_groups is not None:
        yield from _groups(moe.num_experts, moe.top_k, moe.groups, moe.top_groups)


def _groups(experts: int, top_k: int, groups: int, top_groups: int) -> Iterator[str]:
    if experts % groups:
        yield (
            f"model.moe.groups={groups}: does not divide model.moe.num_experts={experts}. Give a "
            f"divisor of {experts}"
        )
        return
    if top_groups > groups:
        yield f"model.moe.top_groups={top_groups}: is more than model.moe.groups={groups}. Lower it"
        return
    if top_k % top_groups:
        # a group's score is the sum of its best top_k / top_groups experts
        yield (
            f"model.moe.top_groups={top_groups}: does not divide model.moe.top_k={top_k}. Give a "
            f"divisor of {top_k}"
        )
    elif top_groups * (experts // groups) < top_k:
        yield (
            f"model.moe.top_groups={top_groups}: groups of {experts // groups} experts "
            f"(model.moe.groups={groups}) hold fewer than model.moe.top_k={top_k} experts. Raise "
            "model.moe.top_groups, or lower model.moe.groups"
        )
