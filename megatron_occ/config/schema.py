"""The configuration: every key, its default, its range and one line of help. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_occ.config.options import option, section
from megatron_occ.config.schema_eval import EvalConfig
from megatron_occ.config.schema_model import FP8Config, ModelConfig, ParallelConfig
from megatron_occ.config.schema_mtp import MTPConfig
from megatron_occ.config.schema_observe import AlertsConfig, LogConfig, ProfileConfig


@dataclass
class TokenizerConfig:
    kind: str = option(
        "char", "char, or hf for a local Hugging Face folder", choices=("char", "hf")
    )
    alphabet: str | None = option(None, "characters of a char tokenizer (null: the task's own)")
    path: str | None = option(None, "folder of a Hugging Face tokenizer")
    unused_rows: bool = option(
        False,
        "rows of the output layer beyond the tokenizer's ids take part in softmax and are drawn "
        "(with a rollout server they always do)",
    )


@dataclass
class TaskConfig:
    name: str | None = option("reversed_multiplication", "generated task (null: use data.prompts)")
    params: dict[str, Any] = option({}, "parameters of the generated task, e.g. {digits_a: 3}")


@dataclass
class FieldsConfig:
    prompt: str | None = option(None, "prompt, text or messages (null: recognised)")
    answer: str | None = option(None, "reference answer (null: recognised)")
    task_name: str | None = option(None, "name of the verifier (null: task_name, if there is one)")


@dataclass
class ChatConfig:
    apply: str = option(
        "auto",
        "whose prompts get the tokenizer's chat template: those that are messages, or text too",
        choices=("auto", "always"),
    )
    system: str | None = option(None, "system message before each chat (null: none)")
    suffix: str = option("", "text appended to each prompt, inside the user's message of a chat")
    kwargs: dict[str, Any] = option({}, "variables of the template, e.g. {enable_thinking: false}")


@dataclass
class DataConfig:
    task: TaskConfig = section(TaskConfig, "generated problems")
    corpus: str | None = option(None, "pretraining text: path prefix written by preprocess_data.py")
    prompts: str | dict[str, Any] | None = option(
        None, "RL prompts: jsonl, json or parquet, or several, {a.jsonl: 2, b.parquet: 1} by weight"
    )
    validation_prompts: str | dict[str, Any] | None = option(
        None, "held-out prompts: jsonl, json or parquet, or several sets, {aime24: a.jsonl} by name"
    )
    fields: FieldsConfig = section(FieldsConfig, "which fields of a record hold what")
    chat: ChatConfig = section(ChatConfig, "chat template and text around prompts")
    max_prompt_tokens: int | None = option(
        None,
        "drop training prompts longer than this (null: a prompt that does not fit is an error)",
        minimum=1,
    )
    verifier: str = option("math", "verifier for records without a task_name")
    verifiers: dict[str, Any] = option(
        {}, "your own verifiers, by task_name, e.g. {echo: 'my_module:echo_verifier'}"
    )
    verifier_timeout: float = option(
        5.0, "time limit of a verifier, in seconds per response", above=0
    )
    verifier_workers: int | None = option(
        None, "verifier processes per rank (null: its share of the node's cores)", minimum=1
    )


@dataclass
class OptimizerConfig:
    lr: float = option(1e-3, "peak learning rate", above=0)
    min_lr: float = option(0.0, "learning rate at the end of the decay", minimum=0)
    schedule: str = option(
        "constant", "decay after the warm-up", choices=("constant", "cosine", "linear")
    )
    warmup_steps: int = option(0, "updates of linear warm-up", minimum=0)
    weight_decay: float = option(0.0, "decoupled weight decay", minimum=0)
    beta1: float = option(0.9, "Adam's first decay", minimum=0, below=1)
    beta2: float = option(0.95, "Adam's second decay", minimum=0, below=1)
    eps: float = option(1e-8, "Adam's epsilon", above=0)
    clip_grad: float = option(
        1.0,
        "gradient norm of trunk and shared parameters is clipped to this (0: no clipping)",
        minimum=0,
    )


@dataclass
class PretrainConfig:
    steps: int = option(750, "updates", minimum=0)
    batch_size: int = option(128, "sequences per update, over all ranks", minimum=1)
    micro_batch_size: int = option(128, "sequences per forward pass", minimum=1)
    sequence_length: int = option(48, "tokens per sequence", minimum=2)
    mtp_weight: float = option(
        0.1, "weight of the MTP cross-entropy, averaged over depths", minimum=0
    )
    optimizer: OptimizerConfig = section(OptimizerConfig, "optimizer of pretraining")
    save_every: int = option(250, "updates between checkpoints", minimum=1)
    log_every: int = option(10, "updates between lines of metrics", minimum=1)
    validate_every: int = option(
        0,
        "updates between measurements of pass@1, as in rl.validation on other problems (0: never)",
        minimum=0,
    )
    stop_at_pass_rate: float | None = option(
        None, "end pretraining at this pass@1, for RL to start from", above=0, maximum=1
    )


@dataclass
class AdvantageConfig:
    baseline: str = option("mean", "group baseline", choices=("mean", "leave_one_out"))
    normalize: bool = option(True, "divide by the group's standard deviation (false: Dr.GRPO)")


@dataclass
class PolicyLossConfig:
    aggregation: str = option(
        "token", "how token losses are averaged", choices=("token", "sequence", "gspo")
    )
    clip_low: float = option(0.2, "lower clip of the ratio", above=0, below=1)
    clip_high: float = option(0.28, "upper clip of the ratio", above=0)
    dual_clip: float | None = option(None, "bound for negative advantages (null: off)", above=1)
    importance_cap: float | None = option(
        None,
        "cap of the truncated importance weights against rollout log-probs (null: off)",
        above=0,
    )
    entropy_coefficient: float = option(0.0, "weight of the entropy bonus", minimum=0)
    kl_coefficient: float = option(
        0.0, "weight of the KL penalty to the reference policy", minimum=0
    )
    kl_kind: str = option(
        "k3",
        "estimator of the KL (k1 is for rewards: in a loss its expected gradient is 0)",
        choices=("k2", "k3"),
    )


@dataclass
class SpeculativeConfig:
    mode: str = option(
        "auto",
        "drafts by the MTP head: where they pay by measurement, always, or never",
        choices=("auto", "fixed", "off"),
    )
    draft_length: int = option(
        3, "tokens of a draft (auto: at most); behind depth K the last depth goes on", minimum=1
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
        None, "folder for weights, the same path on all machines (null: rollout_weights in run_dir)"
    )
    timeout: float = option(600.0, "seconds a response may take", above=0)
    update_timeout: float = option(
        900.0, "seconds a server may take to come up or to load weights", above=0
    )
    retries: int = option(3, "times a failed request is sent again", minimum=0)
    concurrency: int = option(64, "concurrent requests, over all servers", minimum=1)
    gap_mean: float = option(
        0.05, "mean gap to the trainer's log-probs, in nats, that is put down to rounding", above=0
    )
    gap_max: float = option(2.0, "largest gap of one token, in nats", above=0)
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
    max_response_length: int = option(32, "maximum tokens in a response", minimum=1)
    temperature: float = option(1.0, "sampling temperature; divides main and MTP logits", above=0)
    top_p: float = option(
        1.0, "nucleus sampling: probability mass kept (1: all)", above=0, maximum=1
    )
    top_k: int | None = option(None, "number of most likely tokens kept (null: all)", minimum=1)
    stop: list[str] = option([], "texts that end a response; a special token's counts as its id")
    stop_ids: list[int] = option([], "token ids that end a response, besides those of the folder")
    batch_size: int = option(
        512, "concurrent sequences per data-parallel rank (engine=megatron)", minimum=1
    )
    speculative: SpeculativeConfig = section(
        SpeculativeConfig, "speculative decoding of engine=megatron"
    )
    server: ServerConfig = section(ServerConfig, "servers of engine=vllm and sglang")
    log_samples: int = option(8, "responses per step written to rollouts.jsonl", minimum=0)


@dataclass
class DynamicSamplingConfig:
    enabled: bool = option(False, "replace groups whose rewards have no spread (DAPO)")
    max_rounds: int = option(4, "maximum rounds of rollouts per step", minimum=1)


@dataclass
class OverlongConfig:
    buffer: int = option(
        0, "tokens before the limit over which the penalty grows (0: off)", minimum=0
    )
    penalty: float = option(1.0, "penalty at the limit", minimum=0)


@dataclass
class ValidationConfig:
    every: int = option(25, "RL steps between validations (0: only before and after)", minimum=0)
    problems: int = option(512, "held-out problems of each set", minimum=1)
    samples: int = option(1, "samples per problem, the k of avg@k and pass@k", minimum=1)
    temperature: float = option(1.0, "sampling temperature (0: greedy)", minimum=0)


@dataclass
class RLConfig:
    init_from: str | None = option(
        None, "checkpoint folder of the policy (null: pretrain first, for pretrain.steps)"
    )
    train_trunk: bool = option(
        True,
        "false: a stage before RL that trains the MTP head alone, on responses of a policy that "
        "stays as it is",
    )
    steps: int = option(100, "rollout steps", minimum=1)
    algorithm: str | None = option(
        None,
        "published setting: sets advantage, loss and (dapo) dynamic sampling",
        choices=("grpo", "dapo", "gspo"),
    )
    prompts_per_step: int = option(32, "prompts per step, over all ranks", minimum=1)
    samples_per_prompt: int = option(16, "samples per prompt (the group)", minimum=1)
    mini_batches: int = option(4, "updates per step", minimum=1)
    micro_batch_size: int = option(128, "sequences per forward pass", minimum=1)
    micro_batch_tokens: int | None = option(
        None,
        "maximum tokens in a packed micro-batch (null: padded, rl.micro_batch_size sequences)",
        minimum=2,
    )
    old_logprobs: str = option(
        "training",
        "old log-probs: a forward pass of the training model, or those that the rollout sampled "
        "with (no such pass)",
        choices=("training", "rollout"),
    )
    advantage: AdvantageConfig = section(AdvantageConfig, "advantages")
    loss: PolicyLossConfig = section(PolicyLossConfig, "policy loss")
    rollout: RolloutConfig = section(RolloutConfig, "generation")
    dynamic_sampling: DynamicSamplingConfig = section(DynamicSamplingConfig, "dynamic sampling")
    overlong: OverlongConfig = section(OverlongConfig, "overlong reward shaping")
    validation: ValidationConfig = section(ValidationConfig, "validation")
    optimizer: OptimizerConfig = section(OptimizerConfig, "optimizer of RL")
    save_every: int = option(25, "RL steps between checkpoints", minimum=1)


@dataclass
class Config:
    run_dir: str = option("runs/default", "folder the run writes to")
    seed: int = option(0, "seed of weights, data and sampling", minimum=0, maximum=2**31 - 1)
    precision: str = option(
        "fp32", "precision of parameters and activations", choices=("fp32", "bf16")
    )
    recompute: str = option(
        "none", "activations recomputed in the backward pass", choices=("none", "full")
    )
    keep_checkpoints: int = option(2, "number of newest checkpoints kept for each phase", minimum=1)
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
