"""The configuration: every key, its default, its range and one line of help. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_occ.config import limits
from megatron_occ.config.options import option, section
from megatron_occ.config.recompute import MODULES
from megatron_occ.config.schema_data import DataConfig, TokenizerConfig
from megatron_occ.config.schema_eval import EvalConfig
from megatron_occ.config.schema_loss import (
    AdvantageConfig,
    CorrectionConfig,
    DynamicSamplingConfig,
    OverlongConfig,
    PolicyLossConfig,
)
from megatron_occ.config.schema_model import FP8Config, ModelConfig, ParallelConfig
from megatron_occ.config.schema_mtp import MTPConfig
from megatron_occ.config.schema_observe import AlertsConfig, LogConfig, ProfileConfig
from megatron_occ.config.schema_pretrain import OptimizerConfig, PretrainConfig
from megatron_occ.config.schema_run import PhaseLimitsConfig


@dataclass
class SpeculativeConfig:
    mode: str = option(
        "auto",
        "drafts by the MTP head: where they pay by measurement, always, or never",
        choices=("auto", "fixed", "off"),
    )
    draft_length: int = option(
        3,
        "tokens of a draft (auto: at most); behind depth K the last depth goes on",
        minimum=1,
        maximum=limits.DRAFT,
    )
    acceptance: str = option(
        "coupled",
        "drafts that plain sampling would draw (same tokens), or speculative sampling (same "
        "distribution, more accepted)",
        choices=("coupled", "rejection"),
    )


@dataclass
class ServerConfig:
    urls: list[str] = option([], "base URLs, e.g. ['http://node7:8000']; they serve this run alone")
    weights_dir: str | None = option(
        None,
        "folder for weights, the same path on all machines (null: rollout_weights in run_dir)",
        reads="path",
    )
    transfer: str = option(
        "folder",
        "how weights get there: a folder in weights_dir, or out of the main rank's memory, mapped "
        "by servers of its machine (memory) or fetched by others (network)",
        choices=("folder", "memory", "network"),
    )
    timeout: float = option(600.0, "seconds a response may take", above=0, maximum=limits.SECONDS)
    update_timeout: float = option(
        900.0,
        "seconds a server may take to come up or to load weights",
        above=0,
        maximum=limits.SECONDS,
    )
    retries: int = option(
        3, "times a failed request is sent again", minimum=0, maximum=limits.WORKERS
    )
    concurrency: int = option(
        64, "concurrent requests, over all servers", minimum=1, maximum=limits.REQUESTS
    )
    gap_mean: float = option(
        0.05,
        "mean gap to the trainer's log-probs, in nats, that is put down to rounding",
        above=0,
        maximum=limits.FACTOR,
    )
    gap_max: float = option(
        2.0, "largest gap of one token, in nats", above=0, maximum=limits.FACTOR
    )
    draft_share: float = option(
        0.5,
        "drafts' acceptance, as a share of the run's best, that tells old heads (0: no check)",
        minimum=0,
        maximum=1,
    )
    require_seeds: bool = option(True, "refuse a server that ignores the seeds of requests")


@dataclass
class RolloutConfig:
    engine: str = option(
        "megatron",
        "who samples: the training processes, or servers of their own",
        choices=("megatron", "vllm", "sglang"),
    )
    max_response_length: int = option(
        32, "maximum tokens in a response", minimum=1, maximum=limits.TOKENS
    )
    temperature: float = option(
        1.0,
        "sampling temperature; divides main and MTP logits",
        minimum=limits.COLDEST,
        maximum=limits.FACTOR,
    )
    top_p: float = option(
        1.0, "nucleus sampling: probability mass kept (1: all)", above=0, maximum=1
    )
    top_k: int | None = option(
        None, "number of most likely tokens kept (null: all)", minimum=1, maximum=limits.VOCABULARY
    )
    stop: list[str] = option(
        [], "texts that end a response; a special token's counts as its id", reads="text"
    )
    stop_ids: list[int] = option(
        [],
        "token ids that end a response, besides those of the folder",
        minimum=0,
        maximum=limits.VOCABULARY,
    )
    batch_size: int = option(
        512,
        "concurrent sequences per data-parallel rank (engine=megatron)",
        minimum=1,
        maximum=limits.SEQUENCES,
    )
    cache_tokens: int | None = option(
        None,
        "tokens of all these in the caches, in pages (null: room for the longest sequence in each)",
        minimum=1,
        maximum=limits.TOKENS,
    )
    cuda_graphs: bool = option(
        True, "decode by CUDA graphs (engine=megatron; dense models on one rank of a GPU)"
    )
    fp8: bool = option(
        False,
        "round weights and inputs of products as FP8 training does (engine=megatron; "
        "fp8.scaling=block or current)",
    )
    speculative: SpeculativeConfig = section(
        SpeculativeConfig, "speculative decoding of engine=megatron"
    )
    server: ServerConfig = section(ServerConfig, "servers of engine=vllm and sglang")
    log_samples: int = option(
        8, "responses per step written to rollouts.jsonl", minimum=0, maximum=limits.SEQUENCES
    )


@dataclass
class ValidationConfig:
    every: int = option(
        25,
        "RL steps between validations (0: only before and after)",
        minimum=0,
        maximum=limits.STEPS,
    )
    problems: int = option(
        512, "held-out problems of each set", minimum=1, maximum=limits.SEQUENCES
    )
    samples: int = option(
        1, "samples per problem, the k of avg@k and pass@k", minimum=1, maximum=limits.SEQUENCES
    )
    temperature: float = option(
        1.0, "sampling temperature (0: greedy)", minimum=0, maximum=limits.FACTOR
    )


@dataclass
class AsyncConfig:
    max_lag: int = option(
        0,
        "steps that sampling may be ahead of training (0: each waits for the other)",
        minimum=0,
        maximum=limits.LAG,
    )


@dataclass
class RLConfig:
    init_from: str | None = option(
        None,
        "checkpoint folder of the policy (null: pretrain first, for pretrain.steps)",
        reads="path",
    )
    train_trunk: bool = option(
        True,
        "false: a stage before RL that trains the MTP head alone, on responses of a policy that "
        "stays as it is",
    )
    steps: int = option(100, "rollout steps", minimum=1, maximum=limits.STEPS)
    algorithm: str | None = option(
        None,
        "published setting: sets advantage, loss and (dapo) dynamic sampling",
        choices=(
            "grpo",
            "dapo",
            "gspo",
            "dr_grpo",
            "rloo",
            "reinforce_pp",
            "reinforce_pp_baseline",
            "cispo",
            "sapo",
            "dppo",
        ),
    )
    prompts_per_step: int = option(
        32, "prompts per step, over all ranks", minimum=1, maximum=limits.SEQUENCES
    )
    samples_per_prompt: int = option(
        16, "samples per prompt (the group)", minimum=1, maximum=limits.SEQUENCES
    )
    mini_batches: int = option(4, "updates per step", minimum=1, maximum=limits.SEQUENCES)
    micro_batch_size: int = option(
        128, "sequences per forward pass", minimum=1, maximum=limits.SEQUENCES
    )
    micro_batch_tokens: int | None = option(
        None,
        "maximum tokens in a packed micro-batch (null: padded, rl.micro_batch_size sequences)",
        minimum=2,
        maximum=limits.TOKENS,
    )
    old_logprobs: str = option(
        "training",
        "old log-probs: a forward pass of the training model, or those that the rollout sampled "
        "with (no such pass)",
        choices=("training", "rollout"),
    )
    routing_replay: str = option(
        "none",
        "experts that tokens go to in old log-probs and update: each pass's own choice; in the "
        "update those of the old log-probs (training, R2); in both those of the rollout (R3)",
        choices=("none", "training", "rollout"),
    )
    balance_loss: float = option(
        0.0,
        "the same as pretrain.balance_loss, in updates of RL",
        minimum=0,
        maximum=limits.FACTOR,
    )
    advantage: AdvantageConfig = section(AdvantageConfig, "advantages")
    loss: PolicyLossConfig = section(PolicyLossConfig, "policy loss")
    correction: CorrectionConfig = section(
        CorrectionConfig,
        "correction by the ratio of old policy to rollout policy, exp(old - rollout log-probs)",
    )
    rollout: RolloutConfig = section(RolloutConfig, "generation")
    async_: AsyncConfig = section(AsyncConfig, "sampling while training goes on")
    dynamic_sampling: DynamicSamplingConfig = section(DynamicSamplingConfig, "dynamic sampling")
    overlong: OverlongConfig = section(OverlongConfig, "overlong reward shaping")
    validation: ValidationConfig = section(ValidationConfig, "validation")
    optimizer: OptimizerConfig = section(OptimizerConfig, "optimizer of RL")
    save_every: int = option(25, "RL steps between checkpoints", minimum=1, maximum=limits.STEPS)


@dataclass
class Config:
    run_dir: str = option("runs/default", "folder the run writes to", reads="path")
    seed: int = option(0, "seed of weights, data and sampling", minimum=0, maximum=2**31 - 1)
    precision: str = option(
        "fp32", "precision of parameters and activations", choices=("fp32", "bf16")
    )
    fusions: str = option(
        "auto",
        "fused kernels that compute the same: where they are installed, or never (to find a fault)",
        choices=("auto", "off"),
    )
    attention_backend: str = option(
        "auto",
        "kernels of attention: one of TransformerEngine's, or torch's (local)",
        choices=("auto", "flash", "fused", "unfused", "local"),
    )
    recompute: str = option(
        "none",
        "activations recomputed in the backward pass: of none, of some modules, of whole layers",
        choices=("none", "selective", "full"),
    )
    recompute_modules: list[str] = option(
        [], "modules whose activations recompute=selective computes again", choices=MODULES
    )
    recompute_layers: int | None = option(
        None,
        "first layers of each model chunk that recompute=full is for (null: all, MTP layers too)",
        minimum=1,
        maximum=limits.LAYERS,
    )
    keep_checkpoints: int = option(
        2, "number of newest checkpoints kept for each phase", minimum=1, maximum=limits.STEPS
    )
    keep_best: int = option(
        0,
        "number of checkpoints of best pass@1 kept besides",
        minimum=0,
        maximum=limits.STEPS,
    )
    keep_every: int | None = option(
        None,
        "checkpoints kept besides: those of multiples of this step (null: none)",
        minimum=1,
        maximum=limits.STEPS,
    )
    save_in_background: bool = option(
        True, "train on while a checkpoint is written (holds a copy of the state in host memory)"
    )
    max_skipped_updates: int | None = option(
        10,
        "updates with a non-finite gradient in a row that end a run (null: none do)",
        minimum=1,
        maximum=limits.STEPS,
    )
    phase_limits: PhaseLimitsConfig = section(
        PhaseLimitsConfig, "seconds in a phase after which a rank ends the run (null: no limit)"
    )
    model: ModelConfig = section(ModelConfig, "architecture")
    tokenizer: TokenizerConfig = section(TokenizerConfig, "tokenizer")
    data: DataConfig = section(DataConfig, "data")
    parallel: ParallelConfig = section(ParallelConfig, "layout")
    fp8: FP8Config = section(FP8Config, "FP8 matrix products by TransformerEngine")
    mtp: MTPConfig = section(MTPConfig, "multi-token prediction in RL")
    pretrain: PretrainConfig = section(PretrainConfig, "pretraining")
    rl: RLConfig = section(RLConfig, "reinforcement learning with verifiable rewards")
    log: LogConfig = section(LogConfig, "where metrics go besides metrics.jsonl")
    alerts: AlertsConfig = section(AlertsConfig, "limits of RL's metrics that are told")
    profile: ProfileConfig = section(ProfileConfig, "trace of some steps")
    eval: EvalConfig = section(EvalConfig, "evaluation, where it differs from RL's validation")
