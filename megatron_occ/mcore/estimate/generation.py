"""Bytes of the embedded rollout engine, besides the weights."""

from __future__ import annotations

from megatron_occ.config.pipeline import drafts_on_last_stage
from megatron_occ.config.schema import Config
from megatron_occ.config.sizes import derive
from megatron_occ.mcore.estimate.held import Held, element_bytes, head_widths
from megatron_occ.mcore.inference.sampler import CHUNK_LOGITS
from megatron_occ.rl.batch import route_dtype

# logits and log-probs in fp32; in 64 bits random digits or times, and two steps to probabilities
_LOGIT_BYTES = 32


def generation_memory(config: Config, held: Held, world_size: int, command: str) -> dict[str, int]:
    """Caches of a batch of rollouts, each as long as may be or in pages, and logits, by use.

    Prompts that wait for a slot are not counted.
    """
    settings, width = config.rl.rollout, element_bytes(config)
    share = -(-derive(config, world_size).rank_step_sequences // config.parallel.context)
    rows = min(settings.batch_size, share)
    tokens = rows * config.model.max_position_embeddings
    tokens = min(tokens, settings.cache_tokens or tokens)
    each = _cached_elements(config)
    layers = held.dense_layers + held.moe_layers
    use = {"KV cache": int(tokens * each * layers * width)}
    use |= mask_memory(config, held.vocabulary, rows, command)
    choices = routed_choices(config, held, tokens, command)
    if choices and config.rl.routing_replay == "rollout":
        use["experts of tokens"] = 2 * choices
    drafts, depths = 0, config.mtp.num_layers
    if settings.speculative.mode != "off" and drafts_on_last_stage(config):
        drafts = settings.speculative.draft_length
    runs_head = drafts or config.mtp.head.states == "rollout"
    if settings.fp8:
        left_out = 0 if runs_head else held.parameters.get("MTP", 0)
        use["weights rounded to FP8"] = (held.fp8_matrices - left_out) * width
    if not held.has_output:
        return use
    if runs_head:
        kept = depths * (each + config.model.hidden_size)
        use["drafts: cache, hidden states"] = int(tokens * kept * width)
    logits = rows * (drafts + 1) * held.vocabulary * config.parallel.tensor
    use["logits"] = min(CHUNK_LOGITS, logits) * _LOGIT_BYTES
    return use


def host_memory(config: Config, held: Held, rows: int, command: str) -> dict[str, int]:
    """What lies on the host between the phases of a step of so many rows, at its peak.

    As it was drawn, as it was dealt to this rank, and as one tensor for the pass that computes old
    log-probs; experts that this pass takes down are there once. Steps that are sampled ahead lie
    there too, as they were drawn.
    """
    drawn = 3 + config.rl.async_.max_lag
    masks = mask_memory(config, held.vocabulary, rows, command)
    found = {name: drawn * size for name, size in masks.items()}
    tokens = rows * config.model.max_position_embeddings
    choices = routed_choices(config, held, tokens, command)
    if choices:
        copies = drawn if config.rl.routing_replay == "rollout" else 1
        width = route_dtype(config.model.moe.num_experts).itemsize
        found["experts of tokens"] = copies * choices * width
    return found


def mask_memory(config: Config, vocabulary: int, rows: int, command: str) -> dict[str, int]:
    """The ids that tokens of rows were drawn from, 32 bits each, where they are kept."""
    keeps = config.rl.train_trunk and config.rl.loss.sampling_mask
    if not keeps or command in ("pretrain", "eval"):
        return {}
    most = min(config.rl.rollout.top_k, vocabulary * config.parallel.tensor)
    return {"sampling masks": 4 * rows * config.model.max_position_embeddings * most}


def routed_choices(config: Config, held: Held, tokens: int, command: str) -> int:
    """Experts of tokens in the layers of a rank, where they are kept; 0: they are not.

    MTP layers have the trunk's kind of last layer.
    """
    moe = config.model.moe
    if config.rl.routing_replay == "none" or command in ("pretrain", "eval"):
        return 0
    routers = held.moe_layers + config.mtp.num_layers * held.has_mtp
    return tokens * routers * moe.top_k


def _cached_elements(config: Config) -> float:
    """What a layer keeps of a token on a tensor-parallel rank."""
    model = config.model
    if model.mla.enabled:
        return model.mla.kv_lora_rank + model.mla.qk_rope_head_dim
    _, key, value = head_widths(config)
    groups = model.num_query_groups or model.num_attention_heads
    return groups * (key + value) / config.parallel.tensor
