"""Keys that act only while another one is on: those of all commands."""

from __future__ import annotations

from megatron_occ.config.switch import Switch, all_but, is_given, is_one_of

_YARN = (
    "yarn.original_max_position_embeddings",
    "yarn.beta_fast",
    "yarn.beta_slow",
    "yarn.mscale",
)
SWITCHES = (
    Switch(
        "model.moe.num_experts",
        is_one_of(None),
        (
            *all_but("model.moe", "num_experts"),
            "parallel.token_dispatcher",
            "pretrain.balance_loss",
        ),
        "model.moe.num_experts",
    ),
    Switch(
        "model.moe.expert_bias",
        is_one_of(False),
        ("model.moe.bias_update_rate",),
        "model.moe.expert_bias=true",
    ),
    Switch(
        "model.mla.enabled",
        is_one_of(False),
        all_but("model.mla", "enabled", *_YARN),
        "model.mla.enabled=true",
    ),
    Switch(
        "model.mla.yarn.factor",
        is_one_of(None),
        tuple(f"model.mla.{name}" for name in _YARN),
        "model.mla.yarn.factor",
    ),
    Switch(
        "model.rotary_scaling.factor",
        is_one_of(None),
        all_but("model.rotary_scaling", "factor"),
        "model.rotary_scaling.factor",
    ),
    Switch(
        "recompute",
        is_one_of("none", "full"),
        ("recompute_modules",),
        "recompute=selective",
    ),
    Switch(
        "recompute",
        is_one_of("none", "selective"),
        ("recompute_layers",),
        "recompute=full",
    ),
    Switch(
        "parallel.distributed_optimizer",
        is_one_of(False),
        ("parallel.overlap_param_gather",),
        "parallel.distributed_optimizer=true",
    ),
    # otherwise all weights are one bucket, whose gather ends before the first layer
    Switch(
        "parallel.overlap_grad_reduce",
        is_one_of(False),
        ("parallel.overlap_param_gather",),
        "parallel.overlap_grad_reduce=true",
    ),
    Switch(
        "model.from_hf", is_given, ("model.init_device",), "model.from_hf=null (random weights)"
    ),
    Switch(
        "fp8.format",
        is_one_of("none"),
        (*all_but("fp8", "format"), "rl.rollout.fp8"),
        "fp8.format=hybrid or e4m3",
    ),
    # one scale for all layers of a step: Megatron-Core refuses it as well
    Switch(
        "fp8.scaling",
        is_one_of("delayed"),
        ("fp8.first_layers_bf16", "fp8.last_layers_bf16"),
        "fp8.scaling=current or block",
    ),
    Switch(
        "mtp.num_layers",
        is_one_of(0),
        (
            "pretrain.mtp_weight",
            "mtp.head.clip_grad",
            *all_but("rl.rollout.speculative", "mode"),
        ),
        "mtp.num_layers=1 or more",
        zero=0,
    ),
    Switch(
        "pretrain.steps",
        is_one_of(0),
        (
            "pretrain.validate_every",
            "pretrain.stop_at_pass_rate",
            "pretrain.label_noise",
            "pretrain.balance_loss",
            "data.corpus",
        ),
        "pretrain.steps=1 or more",
    ),
    Switch(
        "data.corpus",
        is_given,
        ("pretrain.label_noise",),
        "data.corpus=null (noise is added to generated solutions)",
    ),
    Switch(
        "rl.rollout.speculative.mode",
        is_one_of("off"),
        all_but("rl.rollout.speculative", "mode"),
        "rl.rollout.speculative.mode=auto or fixed",
    ),
    Switch(
        "rl.rollout.engine",
        is_one_of("megatron"),
        all_but("rl.rollout.server"),
        "rl.rollout.engine=vllm or sglang",
    ),
    Switch(
        "rl.rollout.server.transfer",
        is_one_of("memory", "network"),
        ("rl.rollout.server.weights_dir",),
        "rl.rollout.server.transfer=folder",
    ),
    Switch(
        "rl.rollout.engine",
        is_one_of("vllm", "sglang"),
        (
            "rl.rollout.batch_size",
            "rl.rollout.cache_tokens",
            "rl.rollout.cuda_graphs",
            "rl.rollout.fp8",
            *all_but("rl.rollout.speculative"),
        ),
        "rl.rollout.engine=megatron (drafts of a server are an option of its start)",
    ),
    Switch("data.task.name", is_one_of(None), ("data.task.params",), "data.task.name"),
    Switch(
        "log.wandb.mode", is_one_of("off"), all_but("log.wandb", "mode"), "log.wandb.mode=offline"
    ),
    Switch(
        "profile.steps", is_one_of([]), all_but("profile", "steps"), "profile.steps=[first, last]"
    ),
    Switch("log.mlflow.uri", is_one_of(None), all_but("log.mlflow", "uri"), "log.mlflow.uri"),
    Switch(
        "data.task.name",
        is_given,
        (
            "data.verifier",
            "data.verifiers",
            "data.max_prompt_tokens",
            *all_but("data.fields"),
            *all_but("data.chat"),
        ),
        "data.task.name=null and data.prompts (a generated task has its own verifier)",
    ),
)
