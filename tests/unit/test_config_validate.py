"""Contradictions are refused before anything is built, with key, value and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_occ.config import Config, ConfigError, derive, load_config, validate

CONF = Path(__file__).parents[2] / "conf"
TINY = CONF / "rl" / "tiny.yaml"


def problems(overrides: list[str], command: str = "rl", world_size: int = 1) -> list[str]:
    config = load_config([TINY], overrides)
    try:
        validate(config, command=command, world_size=world_size)
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("command", ["pretrain", "rl", "demo", "eval"])
def test_the_tiny_configuration_is_accepted_on_up_to_four_ranks(command, world_size):
    assert problems([], command, world_size) == []
    assert problems(["parallel.tensor=2"], command, 2 * world_size) == []


@pytest.mark.parametrize("preset", ["none", "detach", "ce", "policy", "occ", "occ_decoupled"])
@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "gspo"])
def test_every_preset_is_accepted_with_one_and_two_depths(preset, algorithm):
    given = [f"mtp.preset={preset}", f"rl.algorithm={algorithm}"]
    assert problems(given) == [] and problems([*given, "mtp.num_layers=2"]) == []


@pytest.mark.parametrize("world_size", [1, 2])
def test_defaults_and_examples_are_accepted(world_size):
    validate(load_config([CONF / "demo.yaml"]), command="demo", world_size=world_size)
    validate(load_config([CONF / "planning.yaml"]), command="rl")
    validate(Config(), command="demo")
    validate(load_config([CONF / "pretrain" / "tiny.yaml"]), command="pretrain", world_size=4)


REFUSED = [
    # the MTP regime
    ("mtp.num_layers=0", "mtp.num_layers=0: there is no MTP layer", "mtp.preset=none"),
    ("mtp.num_layers=0 mtp.preset=detach", "mtp.num_layers=0", "mtp.preset=none"),
    ("mtp.preset=ce mtp.trunk.weight=0", "mtp.trunk.weight=0", "above 0"),
    ("mtp.preset=detach mtp.head.weight=0", "mtp.head.weight=0", "above 0"),
    ("mtp.trunk={signal: ce, coefficient: occ}", "mtp.trunk.coefficient=occ", "=fixed"),
    (
        "mtp.head.signal=same_as_trunk",
        "mtp.head.signal=same_as_trunk",
        "mtp.head.signal=ce",
    ),
    (
        "mtp.trunk.signal=policy mtp.head.signal=tv rl.train_trunk=false",
        "mtp.trunk.signal=policy: rl.train_trunk=false leaves the trunk",
        "mtp.preset=head_only",
    ),
    *(
        (
            f"rl.train_trunk=false mtp.head.signal={signal}",
            f"mtp.head.signal={signal}: with rl.train_trunk=false",
            "mtp.head.signal=soft_ce (mtp.preset=head_only) or tv",
        )
        for signal in ("none", "same_as_trunk", "ce", "policy")
    ),
    (
        "mtp.preset=detach mtp.head.states=rollout",
        "mtp.head.states=rollout: mtp.head.signal=ce is about",
        "soft_ce or tv",
    ),
    (
        "mtp.head={signal: policy, states: rollout}",
        "mtp.head.states=rollout: mtp.head.signal=policy is about",
        "mtp.head.states=training",
    ),
    (
        "mtp.preset=occ rl.mini_batches=1",
        "rl.mini_batches=1: with mtp.trunk.coefficient=occ",
        "rl.mini_batches=2",
    ),
    (
        "mtp.preset=occ mtp.trunk.estimator=released mtp.trunk.statistics=current",
        "mtp.trunk.statistics=current",
        "mtp.trunk.estimator=logprob",
    ),
    (
        "mtp.preset=occ mtp.trunk.estimator=released mtp.trunk.ema=0.9",
        "mtp.trunk.ema=0.9",
        "mtp.trunk.ema=0",
    ),
    (
        "mtp.preset=occ mtp.trunk.clamp=[0.0]",
        "mtp.trunk.clamp=[0.0]: needs two entries",
        "[0.0, null]",
    ),
    ("mtp.preset=occ mtp.trunk.clamp=[2,1]", "mtp.trunk.clamp=[2.0, 1.0]", "Swap"),
    (
        "mtp.preset=occ mtp.trunk.clamp=[null,0]",
        "mtp.trunk.clamp=[null, 0.0]",
        "upper bound above 0",
    ),
    # the model
    ("model.hidden_size=34", "model.num_attention_heads=4", "model.kv_channels"),
    ("model.kv_channels=7", "model.kv_channels=7: a head is 7 wide", "even"),
    ("model.hidden_size=12", "model.kv_channels=null: a head is 3 wide", "even"),
    ("model.num_query_groups=3", "model.num_query_groups=3", "divisor of 4"),
    # lengths
    ("pretrain.sequence_length=17", "pretrain.sequence_length=17", "model.max_position_embeddings"),
    ("rl.rollout.max_response_length=16", "rl.rollout.max_response_length=16", "Lower"),
    ("rl.rollout.cache_tokens=20", "rl.rollout.cache_tokens=20: the longest sequence", "or null"),
    (
        "rl.rollout.cache_tokens=9000 rl.rollout.batch_size=8",
        "rl.rollout.cache_tokens=9000: is no less than rl.rollout.batch_size=8 of",
        "a larger batch_size, or null",
    ),
    ("rl.overlong.buffer=10", "rl.overlong.buffer=10", "at most 9"),
    ("rl.overlong.buffer=4 rl.overlong.penalty=0", "rl.overlong.penalty=0", "overlong.buffer=0"),
    # batches
    ("rl.mini_batches=3", "rl.mini_batches=3", "Change"),
    ("rl.micro_batch_size=3", "rl.micro_batch_size=3", "Give rl.micro_batch_size=2"),
    ("rl.micro_batch_size=100", "rl.micro_batch_size=100", "Give rl.micro_batch_size=16"),
    (
        "pretrain.micro_batch_size=24",
        "pretrain.micro_batch_size=24",
        "pretrain.micro_batch_size=16",
    ),
    ("rl.samples_per_prompt=1", "rl.samples_per_prompt=1: a group of one", "at least 2"),
    (
        "rl.dynamic_sampling={enabled: true, max_rounds: 1}",
        "rl.dynamic_sampling.max_rounds=1",
        "rl.dynamic_sampling.enabled=false",
    ),
    # from advantages to the loss
    (
        "rl.algorithm=cispo mtp.preset=occ",
        "rl.loss.kind=cispo: mtp.trunk.weighting=ppo",
        "mtp.trunk.weighting=truncated",
    ),
    (
        "rl.loss.kind=sapo rl.loss.aggregation=gspo",
        "rl.loss.kind=sapo: is defined token by token",
        "another aggregation",
    ),
    (
        "rl.loss.kl_coefficient=0.1 rl.loss.kl_importance=true rl.loss.kl_kind=k2",
        "rl.loss.kl_importance=true: rl.loss.kl_kind=k2",
        "rl.loss.kl_kind=k3",
    ),
    (
        "rl.algorithm=dppo rl.loss.divergence_limit=1",
        "rl.loss.divergence_limit=1",
        "rl.loss.divergence=kl",
    ),
    (
        "rl.advantage.baseline=none",
        "rl.advantage.baseline=none: the standard deviation",
        "rl.advantage.normalize_over=step",
    ),
    (
        "rl.algorithm=reinforce_pp rl.dynamic_sampling.enabled=true",
        "rl.dynamic_sampling.enabled=true: drops groups",
        "rl.advantage.baseline=mean",
    ),
    (
        "rl.correction.weights=token rl.correction.low=3 rl.correction.high=2",
        "rl.correction.low=3",
        "raise the other",
    ),
    ("rl.correction.reject=token", "rl.correction.reject=token: without bounds", "=none"),
    (
        "rl.correction.weights=token rl.correction.outside=mask",
        "rl.correction.outside=mask: without bounds",
        "rl.correction.outside=truncate",
    ),
    (
        "rl.correction.veto=0.1 rl.old_logprobs=rollout",
        "rl.correction.veto=0.1: compares",
        "rl.old_logprobs=training",
    ),
    (
        "rl.loss.top_entropy=0.2 rl.old_logprobs=rollout",
        "rl.loss.top_entropy=0.2: entropies come",
        "rl.old_logprobs=training",
    ),
    (
        "rl.algorithm=gspo rl.loss.top_entropy=0.2",
        "rl.loss.top_entropy=0.2: chooses tokens",
        "another aggregation",
    ),
    (
        "rl.loss.sampling_mask=true",
        "rl.loss.sampling_mask=true: rl.rollout.top_p=1.0 and rl.rollout.top_k=null leave all",
        "rl.rollout.top_p=0.9",
    ),
    (
        "rl.loss.sampling_mask=true rl.rollout.top_p=0.9",
        "rl.loss.sampling_mask=true: keeps the ids that a token was drawn from, as many as "
        "rl.rollout.top_k=null allows",
        "rl.rollout.top_k=64, say, 1,024 at most",
    ),
    (
        "rl.loss.sampling_mask=true rl.rollout.top_k=1025",
        "rl.loss.sampling_mask=true: keeps the ids that a token was drawn from, as many as "
        "rl.rollout.top_k=1025 allows",
        "rl.rollout.top_k=64, say, 1,024 at most",
    ),
    (
        "rl.loss.sampling_mask=true rl.rollout.top_k=9 rl.rollout.engine=vllm "
        "rl.rollout.server.urls=[http://a:1] rl.rollout.batch_size=512",
        "rl.loss.sampling_mask=true: rl.rollout.engine=vllm does not return",
        "rl.rollout.engine=megatron",
    ),
    (
        "rl.routing_replay=training rl.old_logprobs=rollout model.moe.num_experts=4",
        "rl.routing_replay=training: experts come",
        "rl.old_logprobs=training",
    ),
    (
        "rl.balance_loss=0.1 model.moe.num_experts=4 model.moe.top_k=4",
        "rl.balance_loss=0.1: with model.moe.top_k=4 every token goes to all",
        "a smaller model.moe.top_k",
    ),
    (
        "pretrain.balance_loss=0.1 model.moe.num_experts=4 model.moe.top_k=4",
        "pretrain.balance_loss=0.1: with model.moe.top_k=4 every token goes to all",
        "pretrain.balance_loss=0",
    ),
    (
        "rl.balance_loss=0.1 model.moe.num_experts=4 mtp.preset=occ_exact",
        "rl.balance_loss=0.1: would be part of RL's gradient",
        "rl.balance_loss=0, or another estimator",
    ),
    # optimizers: 2 steps of 2 updates in RL, 60 in pretraining
    ("rl.optimizer.min_lr=1e-5", "rl.optimizer.min_lr=1e-05", "rl.optimizer.schedule=cosine"),
    (
        "rl.optimizer={schedule: cosine, min_lr: 1.0}",
        "rl.optimizer.min_lr=1.0: is more than rl.optimizer.lr=0.0003",
        "Lower",
    ),
    ("rl.optimizer.warmup_steps=5", "rl.optimizer.warmup_steps=5", "at most 4"),
    ("pretrain.optimizer.warmup_steps=61", "pretrain.optimizer.warmup_steps=61", "at most 60"),
    # data
    ("pretrain.mtp_weight=0", "pretrain.mtp_weight=0", "mtp.num_layers=0"),
    ("rl.rollout.stop=['']", "rl.rollout.stop=['']: an empty text", "Leave it out"),
    ("data.prompts=p.jsonl", "data.prompts=p.jsonl: data.task.name=reversed_addition", "=null"),
    ("data.corpus=c", "data.corpus=c: data.task.name=reversed_addition", "data.task.name=null"),
    ("data.validation_prompts=v", "data.validation_prompts=v", "data.validation_prompts=null"),
    ("tokenizer.kind=hf", "tokenizer.kind=hf", "tokenizer.path"),
    ("tokenizer={kind: hf, path: x, alphabet: ab}", "tokenizer.alphabet", "null"),
    ("tokenizer.path=x", "tokenizer.path=x", "tokenizer.kind=hf"),
]


@pytest.mark.parametrize(("overrides", "what", "remedy"), REFUSED, ids=[r[0] for r in REFUSED])
def test_a_contradiction_is_the_one_problem_reported(overrides, what, remedy):
    split = [o for o in overrides.replace(", ", ",").split(" ") if "=" in o]
    split = [overrides] if "{" in overrides else split
    (message,) = problems(split)
    assert message.startswith(what) and remedy in message


@pytest.mark.parametrize(
    ("overrides", "world_size", "what"),
    [
        (["parallel.tensor=2"], 3, "parallel.tensor=2: does not divide the 3 ranks"),
        (["parallel.tensor=2"], 1, "parallel.tensor=2: does not divide the 1 rank of"),
        (["parallel.tensor=3"], 3, "model.num_attention_heads=4"),
        (["parallel.tensor=4", "model.num_query_groups=2"], 4, "model.num_query_groups=2"),
        (["parallel.tensor=4", "model.ffn_hidden_size=66"], 4, "model.ffn_hidden_size=66"),
        (["rl.mini_batches=2"], 16, "rl.prompts_per_step=8: RL has 16"),
        (["rl.mini_batches=32"], 2, "rl.mini_batches=32"),
        (["rl.micro_batch_size=16"], 2, "rl.micro_batch_size=16"),
        (["pretrain.batch_size=33", "pretrain.micro_batch_size=1"], 2, "pretrain.batch_size=33"),
    ],
)
def test_layouts_that_do_not_divide_are_refused(overrides, world_size, what):
    assert any(message.startswith(what) for message in problems(overrides, "rl", world_size))


def test_without_a_task_each_command_asks_for_its_own_data():
    bare = ["data.task={name: null, params: {}}", "tokenizer.alphabet=ab"]
    assert [p.split(":")[0] for p in problems(bare, "pretrain")] == ["data.corpus=null"]
    assert [p.split(":")[0] for p in problems(bare, "rl")] == [
        "data.corpus=null",
        "data.prompts=null",
    ]
    assert [p.split(":")[0] for p in problems([*bare, "rl.init_from=ckpt"])] == [
        "data.prompts=null"
    ]
    prompts = [*bare, "rl.init_from=ckpt", "data.prompts=p"]
    assert [p.split(":")[0] for p in problems(prompts)] == ["data.validation_prompts=null"]
    assert problems([*prompts, "data.validation_prompts=v"]) == []
    assert problems([*bare, "data.corpus=c"], "pretrain") == []
    (message,) = problems(["data.task={name: null, params: {}}", "data.corpus=c"], "pretrain")
    assert message.startswith("tokenizer.alphabet=null")


def test_only_what_the_command_uses_is_checked():
    assert problems(["pretrain.sequence_length=17", "rl.init_from=ckpt"]) == []
    assert problems(["pretrain.sequence_length=17", "pretrain.steps=0"]) == []
    assert problems(["rl.micro_batch_size=3", "mtp.trunk.signal=ce"], "pretrain") == []
    assert problems(["rl.micro_batch_size=3"], "eval") == []
    assert problems(["pretrain.steps=0"], "pretrain") == [
        "pretrain.steps=0: there is nothing to do. Give at least 1"
    ]


def test_no_mtp_layer_is_accepted_with_the_preset_none_and_frozen_layers_too():
    assert problems(["mtp.num_layers=0", "mtp.preset=none", "pretrain.mtp_weight=0"]) == []
    assert problems(["mtp.num_layers=1", "mtp.preset=none"]) == []
    assert problems(["mtp.preset=policy", "rl.mini_batches=1"]) == []


@pytest.mark.parametrize(
    "given",
    [
        "pretrain.sequence_length=16",  # model.max_position_embeddings
        "rl.overlong.buffer=8",  # rl.rollout.max_response_length
        "rl.overlong.penalty=0",  # off with buffer 0
        "rl.samples_per_prompt=2",
        "mtp.preset=head_only",
        "rl.dynamic_sampling={enabled: true, max_rounds: 2}",
        "rl.optimizer={schedule: linear, min_lr: 3e-4}",  # the learning rate itself
        "rl.optimizer.warmup_steps=4",
        "mtp={preset: occ, trunk: {clamp: [1, 1]}}",
        "mtp={preset: occ, trunk: {statistics: current, ema: 0.9}}",
        "mtp={preset: occ, trunk: {estimator: released}}",
        "mtp.trunk={signal: ce, coefficient: fixed, weight: 0.3}",
        "mtp={preset: occ, trunk: {lambda_plus: 0.1}}",
        "mtp.head={signal: tv, weight: 0.5}",
        "rl.loss={kl_coefficient: 0.1, kl_kind: k2}",
        "rl.overlong={buffer: 4, penalty: 0.5}",
        "rl.dynamic_sampling.max_rounds=1",  # off, and never more than a round
        "mtp={num_layers: 0, preset: none, trunk: {weight: 0}, head: {weight: 0}}",
        "mtp={preset: none, head: {clip_grad: 0.5}}",  # pretraining trains the head
    ],
)
def test_values_at_the_limit_are_accepted(given):
    assert problems([given]) == []


def test_a_head_that_is_trained_alone_needs_no_group():
    given = ["mtp.preset=head_only", "rl.samples_per_prompt=1", "rl.prompts_per_step=32"]
    assert problems(given) == problems([*given, "mtp.head.states=rollout"]) == []
    (message,) = problems([*given, "mtp.preset=detach"])
    assert message.startswith("rl.samples_per_prompt=1: a group of one has no baseline")


def test_a_batch_that_does_not_divide_is_reported_once():
    (message,) = problems(["pretrain.batch_size=50"], "pretrain", world_size=4)
    assert message.startswith("pretrain.batch_size=50: pretrain has 4 data-parallel ranks")


def test_all_problems_are_reported_together():
    config = load_config(
        [TINY], ["mtp.preset=occ", "rl.mini_batches=1", "pretrain.sequence_length=99"]
    )
    with pytest.raises(ConfigError) as caught:
        validate(config, command="rl")
    assert len(caught.value.problems) == 2
    assert str(caught.value).startswith("2 problems in the configuration:\n  - pretrain.sequence")


def test_a_configuration_changed_in_python_is_checked_like_a_loaded_one():
    config = Config()
    config.rl.steps = "12"
    config.model.num_layers = 0
    with pytest.raises(ConfigError) as caught:
        validate(config, command="eval")
    assert [p.split(":")[0] for p in caught.value.problems] == [
        "model.num_layers = 0",
        "rl.steps = '12'",
    ]
    config = Config()
    config.mtp.preset = "occ"  # not expanded: only load_config does that
    with pytest.raises(ConfigError, match=r"contradicts mtp\.preset = occ"):
        validate(config, command="rl")
    with pytest.raises(ValueError, match="command='train'"):
        validate(Config(), command="train")


def test_derived_sizes_by_hand():
    # 64 prompts * 8 samples = 512 sequences, 4 mini-batches of 128, on 8 / 2 = 4 ranks.
    overrides = ["parallel.tensor=2", "rl.micro_batch_size=8", "pretrain.micro_batch_size=16"]
    config = load_config([CONF / "demo.yaml"], overrides)
    validate(config, command="demo", world_size=8)
    sizes = derive(config, 8)
    assert (sizes.data_parallel, sizes.rank_prompts) == (4, 16)
    assert (sizes.step_sequences, sizes.rank_step_sequences) == (512, 128)
    assert (sizes.mini_batch, sizes.rank_mini_batch, sizes.micro_batches) == (128, 32, 4)
    assert (sizes.rank_pretrain_batch, sizes.pretrain_micro_batches) == (32, 2)
    assert (sizes.rl_updates, sizes.pretrain_updates) == (600, 1000)
