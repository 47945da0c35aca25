"""A setting that another one switches off is refused, and what a preset sets never is."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_occ.config import PRESETS, ConfigError, load_config, save_config, validate
from megatron_occ.config.switches import SWITCHES
from megatron_occ.config.switches_rl import RL_ALONE_SWITCHES, RL_SWITCHES

TINY = Path(__file__).parents[2] / "conf" / "rl" / "tiny.yaml"


def problems(overrides: list[str], command: str = "rl") -> list[str]:
    config = load_config([TINY], overrides)
    try:
        validate(config, command=command)
    except ConfigError as error:
        return error.problems
    return []


SERVER = {
    "urls": "['http://a:1']",
    "weights_dir": "/shared",
    "transfer": "memory",
    "timeout": 5,
    "update_timeout": 5,
    "retries": 1,
    "concurrency": 2,
    "gap_mean": 0.1,
    "gap_max": 1,
    "draft_share": 0.1,
    "require_seeds": "false",
}
EXACT = {
    "every": 8,
    "pairs": "same",
    "parts": 4,
    "per": "layer",
    "metric": "euclidean",
    "gate": 1,
    "share": 0.1,
    "share_cap": 0.1,
    "control": "random",
}
SERVED = (
    "rl.rollout.engine=vllm rl.rollout.server.urls=['http://a:1'] rl.rollout.batch_size=512 "
    "rl.rollout.speculative.mode=auto rl.rollout.speculative.draft_length=3"
)
WITHOUT_A_POLICY_THAT_LEARNS = (
    "rl.algorithm=dapo",
    "rl.old_logprobs=rollout",
    "rl.optimizer.clip_grad=2",
    "rl.advantage.baseline=leave_one_out",
    "rl.advantage.normalize=false",
    "rl.advantage.without_failures=true",
    "rl.loss.aggregation=sequence",
    "rl.loss.clip_low=0.1",
    "rl.loss.clip_high=0.1",
    "rl.loss.dual_clip=3",
    "rl.loss.kind=sapo",
    "rl.correction.weights=token",
    "rl.correction.reject=token",
    "rl.correction.veto=0.1",
    "rl.loss.top_entropy=0.2",
    "rl.loss.sampling_mask=true",
    "rl.routing_replay=training",
    "rl.loss.entropy_coefficient=0.1",
    "rl.loss.kl_coefficient=0.1",
    "rl.loss.kl_kind=k2",
    "rl.loss.kl_reference_every=5",
    "rl.loss.kl_importance=true",
    "rl.loss.kl_input_clamp=5",
    "rl.loss.kl_output_clamp=5",
    "rl.dynamic_sampling.enabled=true",
    "rl.dynamic_sampling.max_rounds=8",
    "rl.dynamic_sampling.spread_of=reward",
    "rl.overlong.buffer=2",
    "rl.overlong.leave_out=true",
    "rl.overlong.penalty=0.5",
)
SWITCHED_OFF = [
    (
        "model.num_layers=2",
        "parallel.token_dispatcher=alltoall",
        "model.moe.num_experts=null",
        "model.moe.num_experts",
    ),
    (
        "parallel.overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true",
        "parallel.distributed_optimizer=false",
        "parallel.distributed_optimizer=true",
    ),
    (
        "parallel.distributed_optimizer=true",
        "parallel.overlap_param_gather=true",
        "parallel.overlap_grad_reduce=false",
        "parallel.overlap_grad_reduce=true",
    ),
    ("recompute=full", "recompute_modules=[mlp]", "recompute=full", "recompute=selective"),
    ("recompute=none", "recompute_layers=1", "recompute=none", "recompute=full"),
    ("mtp.preset=occ", "mtp.trunk.weight=0.5", "coefficient=occ, set by mtp.preset=occ", "=0.1"),
    ("mtp.preset=occ", "mtp.trunk.weight=0", "mtp.trunk.coefficient=occ", "mtp.trunk.lambda_plus"),
    ("mtp.preset=policy", "mtp.trunk.ema=0.5", "coefficient=fixed", "mtp.trunk.coefficient=occ"),
    ("mtp.preset=ce", "mtp.trunk.lambda_plus=2", "coefficient=fixed", "lambda_plus=1.0"),
    ("mtp.preset=ce", "mtp.trunk.statistics=current", "coefficient=fixed", "statistics=previous"),
    ("mtp.preset=none", "mtp.trunk.estimator=released", "coefficient=fixed", "estimator=logprob"),
    ("mtp.preset=detach", "mtp.trunk.clamp=[null,1]", "coefficient=fixed", "clamp=[0.0, null]"),
    ("mtp.preset=detach", "mtp.trunk.weight=0.5", "mtp.trunk.signal=none", "mtp.trunk.signal=ce"),
    ("mtp.preset=none", "mtp.head.weight=0.5", "mtp.head.signal=none", "mtp.head.signal=ce"),
    ("mtp.preset=occ", "mtp.head.weight=0.5", "mtp.head.signal=same_as_trunk", "weight=0.1"),
    ("mtp.preset=occ", "mtp.head.states=rollout", "mtp.head.signal=same_as_trunk", "soft_ce or tv"),
    ("mtp.preset=occ", "mtp.head.cut_output_layer=false", "same_as_trunk", "mtp.head.signal=ce"),
    ("mtp.num_layers=0 mtp.preset=none", "mtp.head.clip_grad=2", "mtp.num_layers=0", "or more"),
    ("mtp.num_layers=0 mtp.preset=none", "pretrain.mtp_weight=0.3", "mtp.num_layers=0", "0.1"),
    ("", "rl.loss.tau_positive=2", "rl.loss.kind=clipped", "rl.loss.kind=sapo"),
    ("rl.algorithm=cispo", "rl.loss.tau_negative=2", "rl.loss.kind=cispo", "rl.loss.kind=sapo"),
    ("rl.algorithm=sapo", "rl.loss.divergence=kl", "rl.loss.kind=sapo", "rl.loss.kind=dppo"),
    ("", "rl.loss.divergence_limit=0.1", "rl.loss.kind=clipped", "rl.loss.kind=dppo"),
    ("rl.algorithm=dppo", "rl.loss.clip_low=0.1", "rl.loss.kind=dppo", "clipped or cispo"),
    ("rl.algorithm=sapo", "rl.loss.clip_high=0.1", "rl.loss.kind=sapo", "clipped or cispo"),
    ("rl.algorithm=cispo", "rl.loss.dual_clip=3", "rl.loss.kind=cispo", "rl.loss.kind=clipped"),
    ("rl.algorithm=rloo", "rl.advantage.normalize_over=step", "normalize=false", "=true"),
    ("", "rl.correction.high=2", "rl.correction.weights=none", "token or sequence"),
    ("", "rl.correction.low=0.5", "rl.correction.weights=none", "token or sequence"),
    ("", "rl.correction.outside=mask", "rl.correction.weights=none", "token or sequence"),
    ("", "rl.correction.reject_high=2", "rl.correction.reject=none", "or geometric"),
    ("", "rl.correction.reject_low=0.2", "rl.correction.reject=none", "or geometric"),
    ("", "rl.loss.kl_importance=true", "rl.loss.kl_coefficient=0", "kl_coefficient above 0"),
    ("pretrain.steps=0 rl.init_from=c", "pretrain.label_noise=0.1", "pretrain.steps=0", "or more"),
    (
        "data.corpus=c data.task.name=null data.task.params={} data.prompts=p "
        "data.validation_prompts=v tokenizer.alphabet=ab",
        "pretrain.label_noise=0.1",
        "data.corpus=c",
        "data.corpus=null",
    ),
    ("rl.init_from=c", "model.init_device=cuda", "rl.init_from=c", "rl.init_from=null"),
    ("mtp.preset=none rl.init_from=c", "mtp.head.clip_grad=2", "mtp.head.signal=none", "=1.0"),
    ("", "rl.dynamic_sampling.max_rounds=8", "rl.dynamic_sampling.enabled=false", "enabled=true"),
    ("rl.algorithm=grpo", "rl.dynamic_sampling.max_rounds=8", "enabled=false", "max_rounds=4"),
    ("rl.overlong.buffer=4", "rl.dynamic_sampling.spread_of=reward", "enabled=false", "=true"),
    ("rl.algorithm=dapo", "rl.dynamic_sampling.spread_of=reward", "buffer=0", "buffer=1 or more"),
    ("", "rl.overlong.penalty=0.5", "rl.overlong.buffer=0", "rl.overlong.buffer=1 or more"),
    ("", "rl.loss.kl_kind=k2", "rl.loss.kl_coefficient=0", "rl.loss.kl_coefficient above 0"),
    ("", "rl.loss.kl_reference_every=5", "rl.loss.kl_coefficient=0", "kl_coefficient above 0"),
    ("", "rl.loss.kl_input_clamp=5", "rl.loss.kl_coefficient=0", "rl.loss.kl_coefficient above 0"),
    ("", "rl.loss.kl_output_clamp=5", "rl.loss.kl_coefficient=0", "rl.loss.kl_coefficient above 0"),
    ("", "data.verifier=exact", "data.task.name=reversed_addition", "data.task.name=null"),
    ("", "data.verifiers={a: 'm:f'}", "data.task.name=reversed_addition", "data.verifiers={}"),
    *(
        ("", f"data.{key}={value}", "data.task.name=reversed_addition", "data.task.name=null")
        for key, value in {
            "max_prompt_tokens": 9,
            "fields.prompt": "p",
            "fields.answer": "a",
            "fields.task_name": "t",
            "chat.apply": "always",
            "chat.system": "s",
            "chat.suffix": "s",
            "chat.kwargs": "{a: 1}",
        }.items()
    ),
    ("model.from_hf=f", "model.init_device=cuda", "model.from_hf=f", "model.from_hf=null"),
    ("", "model.moe.top_k=1", "model.moe.num_experts=null", "model.moe.top_k=2"),
    ("", "model.moe.ffn_hidden_size=8", "model.moe.num_experts=null", "ffn_hidden_size=null"),
    ("", "model.moe.shared_ffn_hidden_size=8", "model.moe.num_experts=null", "_size=null"),
    ("", "model.moe.first_dense_layers=1", "model.moe.num_experts=null", "first_dense_layers=0"),
    ("", "model.moe.score_function=sigmoid", "model.moe.num_experts=null", "=softmax"),
    ("", "model.moe.expert_bias=true", "model.moe.num_experts=null", "expert_bias=false"),
    ("", "model.moe.bias_update_rate=0.1", "model.moe.num_experts=null", "update_rate=0.0"),
    (
        "model.moe.num_experts=4",
        "model.moe.bias_update_rate=0.1",
        "expert_bias=false",
        "expert_bias=true",
    ),
    ("", "rl.balance_loss=0.1", "model.moe.num_experts=null", "rl.balance_loss=0.0"),
    ("", "pretrain.balance_loss=0.1", "model.moe.num_experts=null", "pretrain.balance_loss=0.0"),
    (
        "pretrain.steps=0 rl.init_from=c model.moe.num_experts=4",
        "pretrain.balance_loss=0.1",
        "pretrain.steps=0",
        "pretrain.steps=1 or more",
    ),
    ("", "model.moe.scaling_factor=2.0", "model.moe.num_experts=null", "scaling_factor=null"),
    ("", "model.moe.groups=2", "model.moe.num_experts=null", "model.moe.groups=null"),
    ("", "model.moe.top_groups=1", "model.moe.num_experts=null", "model.moe.top_groups=null"),
    ("", "model.mla.q_lora_rank=8", "model.mla.enabled=false", "model.mla.q_lora_rank=null"),
    ("", "model.mla.kv_lora_rank=8", "model.mla.enabled=false", "model.mla.enabled=true"),
    ("", "model.mla.qk_head_dim=8", "model.mla.enabled=false", "model.mla.qk_head_dim=128"),
    ("", "model.mla.qk_rope_head_dim=8", "model.mla.enabled=false", "qk_rope_head_dim=64"),
    ("", "model.mla.v_head_dim=8", "model.mla.enabled=false", "model.mla.v_head_dim=128"),
    ("", "model.mla.yarn.factor=4", "model.mla.enabled=false", "model.mla.yarn.factor=null"),
    *(
        ("", f"model.mla.yarn.{key}=7", "model.mla.yarn.factor=null", "model.mla.yarn.factor")
        for key in ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale")
    ),
    ("", "model.mla.norm_epsilon=1e-6", "model.mla.enabled=false", "norm_epsilon=null"),
    *(
        ("", f"model.rotary_scaling.{key}=7", "rotary_scaling.factor=null", "rotary_scaling.factor")
        for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    ),
    *(
        ("", given, "log.wandb.mode=off", "log.wandb.mode=offline")
        for given in ("log.wandb.project=p", "log.wandb.entity=e", "log.wandb.name=n")
    ),
    *(
        ("", given, "log.mlflow.uri=null", "log.mlflow.uri")
        for given in ("log.mlflow.experiment=e", "log.mlflow.name=n")
    ),
    *(
        ("", given, "profile.steps=[]", "profile.steps=[first, last]")
        for given in ("profile.phase=pretrain", "profile.ranks=[1]")
    ),
    ("", "fp8.scaling=current", "fp8.format=none", "fp8.format=hybrid or e4m3"),
    ("", "rl.rollout.fp8=true", "fp8.format=none", "fp8.format=hybrid or e4m3"),
    *(
        ("precision=bf16 fp8.format=hybrid", f"fp8.{name}=1", "fp8.scaling=delayed", "or block")
        for name in ("first_layers_bf16", "last_layers_bf16")
    ),
    (
        "rl.micro_batch_tokens=16 rl.micro_batch_size=128",
        "rl.micro_batch_size=4",
        "rl.micro_batch_tokens=16",
        "rl.micro_batch_tokens=null",
    ),
    (
        "rl.rollout.speculative.mode=off",
        "rl.rollout.speculative.draft_length=2",
        "rl.rollout.speculative.mode=off",
        "rl.rollout.speculative.draft_length=3",
    ),
    (
        "mtp.num_layers=0 mtp.preset=none",
        "rl.rollout.speculative.acceptance=rejection",
        "mtp.num_layers=0",
        "mtp.num_layers=1 or more",
    ),
    *(
        ("", f"rl.rollout.server.{key}={value}", "rl.rollout.engine=megatron", "=vllm or sglang")
        for key, value in SERVER.items()
    ),
    (
        f"{SERVED} rl.rollout.server.transfer=network",
        "rl.rollout.server.weights_dir=/shared",
        "rl.rollout.server.transfer=network",
        "transfer=folder",
    ),
    (SERVED, "rl.rollout.batch_size=32", "rl.rollout.engine=vllm", "rl.rollout.engine=megatron"),
    (SERVED, "rl.rollout.cache_tokens=5000", "rl.rollout.engine=vllm", "engine=megatron"),
    (SERVED, "rl.rollout.cuda_graphs=false", "rl.rollout.engine=vllm", "cuda_graphs=true"),
    (
        f"{SERVED} precision=bf16 fp8.format=e4m3 fp8.scaling=current",
        "rl.rollout.fp8=true",
        "rl.rollout.engine=vllm",
        "rl.rollout.fp8=false",
    ),
    (SERVED, "rl.rollout.speculative.mode=off", "rl.rollout.engine=vllm", "mode=auto"),
    (SERVED, "rl.rollout.speculative.draft_length=2", "rl.rollout.engine=vllm", "length=3"),
    (
        SERVED.replace("vllm", "sglang"),
        "rl.rollout.speculative.acceptance=rejection",
        "rl.rollout.engine=sglang",
        "acceptance=coupled",
    ),
    *(
        ("mtp.preset=occ", f"mtp.trunk.exact.{key}={value}", "estimator=logprob", "occ_exact")
        for key, value in EXACT.items()
    ),
    ("mtp.preset=detach", "mtp.trunk.exact.gate=1", "coefficient=fixed", "coefficient=occ"),
    ("mtp.preset=occ_exact", "mtp.trunk.statistics=current", "estimator=exact", "=logprob"),
    ("mtp.preset=occ_exact", "mtp.trunk.dual_clip=3", "weighting=unit", "weighting=ppo"),
    ("mtp.preset=policy", "mtp.trunk.ratio_cap=3", "weighting=ppo", "weighting=truncated"),
    *(
        ("mtp.preset=head_only", given, "rl.train_trunk=false, set by", "rl.train_trunk=true")
        for given in WITHOUT_A_POLICY_THAT_LEARNS
    ),
    ("pretrain.steps=0", "pretrain.validate_every=5", "pretrain.steps=0", "validate_every=0"),
    ("pretrain.steps=0", "pretrain.stop_at_pass_rate=0.5", "pretrain.steps=0", "rate=null"),
]


@pytest.mark.parametrize(("base", "given", "switch", "remedy"), SWITCHED_OFF)
def test_a_setting_that_another_one_switches_off_is_refused(base, given, switch, remedy):
    assert problems(base.split()) == []
    (message,) = problems([*base.split(), given])
    what, _, advice = message.partition(". Give ")
    assert what.startswith(f"{given.partition('=')[0]}=") and "has no effect with" in what
    assert switch in what
    assert remedy in advice


def test_every_key_of_the_table_is_tried():
    tried = {given.partition("=")[0] for _, given, _, _ in SWITCHED_OFF}
    table = {key for s in SWITCHES + RL_SWITCHES + RL_ALONE_SWITCHES for key in s.keys}
    # these two need more than one other key
    assert table - tried == {"data.task.params", "data.corpus"}


def test_a_switch_that_overrides_its_preset_is_not_laid_on_the_preset():
    given = ["rl.algorithm=dapo", "rl.dynamic_sampling={enabled: false, max_rounds: 8}"]
    (message,) = problems(given)
    assert "has no effect with rl.dynamic_sampling.enabled=false. Give" in message


def test_a_corpus_without_pretraining_is_refused():
    given = ["data.task={name: null, params: {}}", "data.prompts=p", "data.validation_prompts=v"]
    given += ["tokenizer.alphabet=ab", "data.corpus=c"]
    assert problems(given) == []
    (message,) = problems([*given, "pretrain.steps=0"])
    assert message.startswith("data.corpus=c: has no effect with pretrain.steps=0. Give")


def test_parameters_of_a_task_that_is_not_there_are_refused():
    given = ["data.task.name=null", "data.prompts=p", "data.validation_prompts=v"]
    given += ["tokenizer.alphabet=ab", "rl.init_from=c"]
    (message,) = problems(given)
    assert message == (
        "data.task.params={digits: 1, terms: 3}: has no effect with data.task.name=null. "
        "Give data.task.params={}, its default, or data.task.name"
    )
    assert problems([*given, "data.task.params={}"]) == []


def test_a_setting_of_rl_does_not_disturb_the_other_commands():
    given = ["rl.overlong.penalty=0.5", "mtp.preset=ce", "mtp.trunk.ema=0.5"]
    assert problems(given, "pretrain") == problems(given, "eval") == []
    assert len(problems(given, "rl")) == len(problems(given, "demo")) == 2


@pytest.mark.parametrize("preset", sorted(PRESETS["mtp.preset"].keys() - {"head_only"}))
@pytest.mark.parametrize("algorithm", PRESETS["rl.algorithm"])
def test_a_saved_regime_is_accepted_again(preset, algorithm, tmp_path):
    given = [f"mtp.preset={preset}", f"rl.algorithm={algorithm}"]
    if "policy" in PRESETS["mtp.preset"][preset].values() and algorithm in (
        "cispo",
        "sapo",
        "dppo",
    ):
        given.append("mtp.trunk.weighting=unit")
    config = load_config([TINY], given)
    save_config(config, tmp_path / "config.yaml")
    loaded = load_config([tmp_path / "config.yaml"])
    assert loaded == config
    validate(loaded, command="rl")


@pytest.mark.parametrize("preset", PRESETS["mtp.preset"])
def test_one_file_serves_a_sweep_over_regimes(preset, tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text("mtp: {num_layers: 2, preset: policy, head: {clip_grad: 0.5}}\n")
    config = load_config([TINY, path], [f"mtp.preset={preset}"])
    validate(config, command="rl")
    assert config.mtp.trunk.weight == (1.0 if preset == "policy" else 0.1)
