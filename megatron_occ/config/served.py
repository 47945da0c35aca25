"""What rollout servers are given of a model: its architecture there, and its MTP layers."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_occ.config.keys import spell
from megatron_occ.config.load import flat_values
from megatron_occ.config.schema import Config
from megatron_occ.config.schema_model import MLAConfig, ModelConfig, MoEConfig

# their MTP layer is part of the architecture, and servers draft with it
WITH_HEAD = ("MiMoForCausalLM", "Glm4MoeForCausalLM", "DeepseekV3ForCausalLM")
# of the latents' norms in DeepSeek-V3
LATENT_EPSILON = 1e-6
# key, whether it does not fit, what the architecture is like, a value that fits
_Row = tuple[str, bool, str, str]


def architecture(config: Config) -> str:
    """Hugging Face architecture that the weights are exported as.

    MiMo is Qwen2 with one MTP layer of Qwen2's decoder layer (arXiv 2505.07608).
    """
    model = config.model
    if model.mla.enabled:
        return "DeepseekV3ForCausalLM"
    if model.moe.num_experts is not None:
        softmax = model.moe.score_function == "softmax"
        return "Qwen3MoeForCausalLM" if softmax else "Glm4MoeForCausalLM"
    if model.qk_layernorm:
        return "Qwen3ForCausalLM"
    if config.mtp.num_layers > 0 and _usual_width(model):
        return "MiMoForCausalLM"
    return "Qwen2ForCausalLM" if model.qkv_bias else "LlamaForCausalLM"


def served_depths(config: Config) -> int:
    """MTP depths that servers are given: the first one, if the architecture has any.

    They draft further tokens with the first depth again: MiMo's drafter in vLLM uses no other, and
    SGLang's of DeepSeek takes no folder with two.
    """
    return min(1, config.mtp.num_layers) if architecture(config) in WITH_HEAD else 0


def served_warnings(config: Config) -> Iterator[str]:
    """What becomes of MTP layers that servers are not given."""
    depths, name = config.mtp.num_layers, architecture(config)
    engine = config.rl.rollout.engine
    if engine == "megatron" or depths == served_depths(config):
        return
    if name in WITH_HEAD:
        yield (
            f"mtp.num_layers={depths}: rl.rollout.engine={engine} gets the first depth alone, and "
            "servers draft further tokens with it again. The other depths are trained all the same"
        )
        return
    yield (
        f"mtp.num_layers={depths}: rl.rollout.engine={engine} gets the weights as {name}, which "
        "has no MTP layers: servers sample from the trunk without drafts of the head, which is "
        "trained all the same. Start them without speculative decoding"
    )


def architecture_problems(config: Config) -> Iterator[str]:
    """What the architecture on the servers has no place for, one message each."""
    values, name = flat_values(config), architecture(config)
    for key, is_wrong, what, remedy in _rows(config, name):
        if is_wrong:
            yield (
                f"{key}={spell(values[key])}: rl.rollout.engine={config.rl.rollout.engine} gets "
                f"the weights as {name}, {what}. Give {key}={remedy}, or rl.rollout.engine=megatron"
            )


def _rows(config: Config, name: str) -> Iterator[_Row]:
    model = config.model
    if name == "DeepseekV3ForCausalLM":
        yield from _latent(model)
    else:
        yield from _heads(model, name)
    if name == "Qwen3MoeForCausalLM":
        yield from _softmax(model)
    elif name != "MiMoForCausalLM" and name in WITH_HEAD:
        before = model.mtp_reads == "before" and config.mtp.num_layers > 0
        what = "whose MTP layer reads the trunk's state after the final norm"
        yield "model.mtp_reads", before, what, "after"
        yield from _sigmoid(model.moe, model.ffn_hidden_size)


def _heads(model: ModelConfig, name: str) -> Iterator[_Row]:
    part = name != "Glm4MoeForCausalLM" and model.rotary_percent != 1
    yield "model.rotary_percent", part, "which has no part of a head left unturned", "1.0"
    biased = name in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM") and model.qkv_bias
    yield "model.qkv_bias", biased, "which has no bias of queries, keys and values", "false"
    other = name == "Qwen2ForCausalLM" and not _usual_width(model)
    what = "which has no heads of another width than hidden_size / heads"
    yield "model.kv_channels", other, what, "null"


def _softmax(model: ModelConfig) -> Iterator[_Row]:
    moe = model.moe
    yield "model.qk_layernorm", not model.qk_layernorm, "whose queries and keys have norms", "true"
    shared = moe.shared_ffn_hidden_size is not None
    yield "model.moe.shared_ffn_hidden_size", shared, "which has no shared experts", "null"
    scaled = moe.scaling_factor not in (None, 1.0)
    yield "model.moe.scaling_factor", scaled, "which has no factor of experts' output", "null"
    yield "model.moe.groups", moe.groups is not None, "which has no groups of experts", "null"


def _sigmoid(moe: MoEConfig, ffn_hidden_size: int) -> Iterator[_Row]:
    """Experts of DeepSeek-V3's kind, which GLM-4.5 has too."""
    if moe.num_experts is None:
        return
    softmax = moe.score_function == "softmax"
    yield "model.moe.score_function", softmax, "which has no softmax scores", "sigmoid"
    if not softmax:
        what = "whose experts are chosen with a bias"
        yield "model.moe.expert_bias", not moe.expert_bias, what, "true"
    yield "model.moe.top_k", moe.top_k == 1, "where the weight of a single expert is 1", "2"
    width, shared = moe.ffn_hidden_size or ffn_hidden_size, moe.shared_ffn_hidden_size or 0
    what = f"whose shared experts are as wide as the others, {width}"
    yield "model.moe.shared_ffn_hidden_size", shared % width > 0, what, str(width)
    groups, chosen = moe.groups or 1, moe.top_groups or 1
    other = chosen < groups and moe.top_k not in (1, 2 * chosen)
    what = "whose groups are chosen by their best two experts"
    yield "model.moe.top_k", other, what, str(2 * chosen)


def _latent(model: ModelConfig) -> Iterator[_Row]:
    mla = model.mla
    dense = model.moe.num_experts is None
    yield "model.mla.enabled", dense, "which has no latent attention without experts", "false"
    yield "model.qk_layernorm", not model.qk_layernorm, "whose latents have norms", "true"
    other = (mla.norm_epsilon or model.norm_epsilon) != LATENT_EPSILON
    what = f"whose norms of latents have the epsilon {LATENT_EPSILON}"
    yield "model.mla.norm_epsilon", other, what, str(LATENT_EPSILON)
    yield "model.mla.yarn.mscale", _unscaled(mla), "which has no scaling without it", "1.0"


def _unscaled(mla: MLAConfig) -> bool:
    return mla.yarn.factor is not None and mla.yarn.mscale == 0


def _usual_width(model: ModelConfig) -> bool:
    return model.kv_channels in (None, model.hidden_size // model.num_attention_heads)
