"""The sections of the configuration that say what is built where: architecture, layout, FP8."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_occ.config import limits
from megatron_occ.config.options import option, section


@dataclass
class MoEConfig:
    num_experts: int | None = option(
        None, "routed experts (null: a dense model)", minimum=2, maximum=limits.EXPERTS
    )
    top_k: int = option(2, "experts per token", minimum=1, maximum=limits.EXPERTS)
    ffn_hidden_size: int | None = option(
        None, "width of an expert (null: model.ffn_hidden_size)", minimum=1, maximum=limits.WIDTH
    )
    shared_ffn_hidden_size: int | None = option(
        None, "total width of the shared experts (null: none)", minimum=1, maximum=limits.WIDTH
    )
    first_dense_layers: int = option(
        0, "layers before the first MoE layer", minimum=0, maximum=limits.LAYERS
    )
    score_function: str = option(
        "softmax", "score function of the router", choices=("softmax", "sigmoid")
    )
    expert_bias: bool = option(
        False, "bias added to sigmoid scores when experts are chosen (DeepSeek-V3)"
    )
    bias_update_rate: float = option(
        0.0,
        "change of that bias per update, towards a balanced load (0: it stays fixed)",
        minimum=0,
        maximum=limits.FACTOR,
    )
    scaling_factor: float | None = option(
        None, "factor of the routed experts' output", above=0, maximum=limits.FACTOR
    )
    groups: int | None = option(
        None, "groups of experts (null: no groups)", minimum=1, maximum=limits.EXPERTS
    )
    top_groups: int | None = option(
        None, "groups that a token's experts may come from", minimum=1, maximum=limits.EXPERTS
    )


@dataclass
class YarnConfig:
    factor: float | None = option(
        None,
        "factor by which the context is longer than in pretraining (null: not scaled)",
        above=1,
        maximum=limits.FACTOR,
    )
    original_max_position_embeddings: int = option(
        4096, "longest sequence before scaling", minimum=2, maximum=limits.TOKENS
    )
    beta_fast: float = option(
        32.0,
        "rotations in the original context above which a frequency is not scaled",
        above=0,
        maximum=limits.FACTOR,
    )
    beta_slow: float = option(
        1.0,
        "rotations in the original context below which a frequency is fully scaled",
        above=0,
        maximum=limits.FACTOR,
    )
    mscale: float = option(
        1.0,
        "scores are multiplied by (0.1 mscale ln(factor) + 1)**2",
        minimum=0,
        maximum=limits.FACTOR,
    )


@dataclass
class MLAConfig:
    enabled: bool = option(False, "multi-head latent attention (DeepSeek-V2)")
    q_lora_rank: int | None = option(
        None, "rank of the query projection (null: full rank)", minimum=1, maximum=limits.WIDTH
    )
    kv_lora_rank: int = option(
        512, "rank of the key/value projection", minimum=1, maximum=limits.WIDTH
    )
    qk_head_dim: int = option(
        128, "width of a query/key head without position", minimum=1, maximum=limits.WIDTH
    )
    qk_rope_head_dim: int = option(
        64, "width of a query/key head with position", minimum=2, maximum=limits.WIDTH
    )
    v_head_dim: int = option(128, "width of a value head", minimum=1, maximum=limits.WIDTH)
    norm_epsilon: float | None = option(
        None, "epsilon of the latents' norms (null: model.norm_epsilon)", above=0, maximum=1
    )
    yarn: YarnConfig = section(YarnConfig, "scaled rotary embedding (YaRN, arXiv 2309.00071)")


@dataclass
class RotaryScalingConfig:
    factor: float | None = option(
        None,
        "what slow channels are slowed down by (null: not scaled)",
        minimum=1,
        maximum=limits.FACTOR,
    )
    low_freq_factor: float = option(
        1.0, "turns in the original context, scaled up to there", above=0, maximum=limits.FACTOR
    )
    high_freq_factor: float = option(
        4.0, "turns in the original context, unscaled from there", above=0, maximum=limits.FACTOR
    )
    original_max_position_embeddings: int = option(
        8192, "longest sequence before scaling", minimum=2, maximum=limits.TOKENS
    )


@dataclass
class ModelConfig:
    from_hf: str | None = option(
        None,
        "Hugging Face folder that gives this section, MTP layers, tokenizer and first weights",
        reads="path",
    )
    num_layers: int = option(3, "transformer layers of the trunk", minimum=1, maximum=limits.LAYERS)
    hidden_size: int = option(96, "width of the residual stream", minimum=1, maximum=limits.WIDTH)
    ffn_hidden_size: int = option(384, "width of the gated MLP", minimum=1, maximum=limits.WIDTH)
    num_attention_heads: int = option(4, "attention heads", minimum=1, maximum=limits.WIDTH)
    num_query_groups: int | None = option(
        None, "key/value heads (null: as many as heads)", minimum=1, maximum=limits.WIDTH
    )
    kv_channels: int | None = option(
        None, "width of a head (null: hidden_size / heads)", minimum=1, maximum=limits.WIDTH
    )
    max_position_embeddings: int = option(
        64, "longest sequence, prompt and response", minimum=2, maximum=limits.TOKENS
    )
    rotary_base: int = option(
        10000, "base period of the rotary embedding", above=0, maximum=limits.BASE
    )
    rotary_percent: float = option(
        1.0, "share of each head that the rotary embedding rotates", above=0, maximum=1
    )
    rotary_scaling: RotaryScalingConfig = section(
        RotaryScalingConfig, "scaled rotary embedding of Llama 3.1 (arXiv 2407.21783)"
    )
    vocab_size: int | None = option(
        None,
        "rows of embedding and output layer (null: as many as token ids)",
        minimum=2,
        maximum=limits.VOCABULARY,
    )
    norm_epsilon: float = option(1e-5, "epsilon of RMSNorm", above=0, maximum=1)
    qk_layernorm: bool = option(False, "RMSNorm on queries and keys")
    qkv_bias: bool = option(False, "bias in the query/key/value projection")
    tie_embeddings: bool = option(True, "output layer shares the embedding's weight")
    mtp_reads: str = option(
        "after",
        "side of the trunk's final norm whose states MTP layers read (MiMo: before)",
        choices=("after", "before"),
    )
    init_std: float = option(
        0.02, "standard deviation of the initial weights", above=0, maximum=limits.FACTOR
    )
    init_device: str = option(
        "cpu",
        "where initial weights are drawn (cuda: faster, and other numbers on another layout)",
        choices=("cpu", "cuda"),
    )
    moe: MoEConfig = section(MoEConfig, "mixture of experts")
    mla: MLAConfig = section(MLAConfig, "multi-head latent attention")


@dataclass
class ParallelConfig:
    tensor: int = option(1, "ranks that share a layer", minimum=1, maximum=limits.RANKS)
    sequence: bool = option(
        False, "split norms and residual stream over the tensor-parallel ranks too"
    )
    pipeline: int = option(1, "pipeline stages", minimum=1, maximum=limits.LAYERS)
    virtual_pipeline: int = option(
        1,
        "model chunks a stage holds in turn (interleaved schedule)",
        minimum=1,
        maximum=limits.LAYERS,
    )
    pipeline_layout: str | None = option(
        None,
        "layers of each stage: E embedding, t layer, m MTP layer, L loss, e.g. Et*3|t*3|t*2m|L",
    )
    context: int = option(1, "ranks that share a sequence", minimum=1, maximum=limits.RANKS)
    expert: int = option(1, "ranks that share the experts", minimum=1, maximum=limits.EXPERTS)
    expert_tensor: int | None = option(
        None,
        "ranks that share one expert (null: as parallel.tensor)",
        minimum=1,
        maximum=limits.RANKS,
    )
    token_dispatcher: str = option(
        "auto",
        "how tokens get to experts (flex: by DeepEP; auto: alltoall on a GPU, else allgather)",
        choices=("auto", "allgather", "alltoall", "flex"),
    )
    grad_reduce_dtype: str = option(
        "fp32",
        "precision in which gradients are summed over micro-batches and ranks",
        choices=("fp32", "bf16"),
    )
    overlap_grad_reduce: bool = option(
        False, "reduce gradients over data-parallel ranks during the backward pass"
    )
    distributed_optimizer: bool = option(False, "split optimizer state over data-parallel ranks")
    overlap_param_gather: bool = option(
        False, "gather updated weights of data-parallel ranks during the next forward pass"
    )
    moments_dtype: str = option(
        "fp32", "precision in which Adam's moments are kept", choices=("fp32", "bf16")
    )
    optimizer_offload: float = option(
        0.0,
        "share of a rank's Adam moments that are kept, and updated with, on the host",
        minimum=0,
        maximum=1,
    )


@dataclass
class FP8Config:
    format: str = option(
        "none", "hybrid: E4M3 forward, E5M2 backward", choices=("none", "hybrid", "e4m3")
    )
    scaling: str = option(
        "delayed",
        "scales from past steps, from the tensor, or of each block",
        choices=("delayed", "current", "block"),
    )
    first_layers_bf16: int = option(
        0,
        "layers at the beginning of the trunk that stay in bf16",
        minimum=0,
        maximum=limits.LAYERS,
    )
    last_layers_bf16: int = option(
        0, "layers at the trunk's end that stay in bf16", minimum=0, maximum=limits.LAYERS
    )
