"""Parallel layouts and architectures: what contradicts itself is refused, what fits is accepted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_occ.config import ConfigError, load_config, validate
from megatron_occ.config.pipeline import parse_layout
from megatron_occ.config.sizes import model_parallel_size, sequence_multiple

TINY = Path(__file__).parents[2] / "conf" / "rl" / "tiny.yaml"
MOE = "model.moe.num_experts=8"
MLA = "model.mla={enabled: true, kv_lora_rank: 8, qk_head_dim: 8, qk_rope_head_dim: 4}"
PP4 = "parallel.pipeline=4 model.num_layers=4 mtp.num_layers=2"
FP8 = "precision=bf16 fp8={format: hybrid, scaling: current} model.num_layers=4"
STATES = "mtp.head={signal: tv, states: rollout}"
VPP = "parallel.pipeline=2 parallel.virtual_pipeline=2 model.num_layers=4"


def problems(overrides: str | list[str], ranks: int = 1, command: str = "rl") -> list[str]:
    if isinstance(overrides, str):
        overrides = _split(overrides)
    try:
        validate(load_config([TINY], overrides), command=command, world_size=ranks)
    except ConfigError as error:
        return error.problems
    return []


def _split(text: str) -> list[str]:
    """Overrides apart at spaces that begin another one: ``{a: 1, b: 2}`` stays together."""
    words: list[str] = []
    for word in text.split(" "):
        if "=" in word or not words:
            words.append(word)
        else:
            words[-1] += f" {word}"
    return words


# overrides, ranks, start of the one message, remedy
LAYOUTS = [
    # sizes and ranks
    (
        f"{FP8} fp8.last_layers_bf16=3 parallel.pipeline=2",
        2,
        "fp8.last_layers_bf16=3: Megatron-Core takes at most 2",
        "fewer stages",
    ),
    ("parallel.pipeline=2", 3, "parallel.pipeline=2: does not divide the 3 ranks", "multiple of 2"),
    ("parallel.context=2", 1, "parallel.context=2: does not divide the 1 rank of", "multiple of 2"),
    (
        "parallel.tensor=2 parallel.pipeline=2 parallel.context=2",
        12,
        "parallel.tensor=2, parallel.pipeline=2, parallel.context=2: does not divide the 12 ranks",
        "(a sequence is shared by 8 ranks). Give sizes whose product divides 12",
    ),
    ("parallel.sequence=true", 1, "parallel.sequence=true: parallel.tensor=1", "=false"),
    (
        "parallel.tensor=2 model.hidden_size=33 model.kv_channels=8",
        2,
        "model.hidden_size=33: is not divisible by parallel.tensor=2",
        "Change one",
    ),
    # states of rollouts
    (
        f"{STATES} rl.rollout.engine=vllm rl.rollout.server.urls=['http://host:8000'] "
        "rl.rollout.batch_size=512",
        1,
        "mtp.head.states=rollout: servers (rl.rollout.engine=vllm)",
        "mtp.head.states=training, or rl.rollout.engine=megatron",
    ),
    (
        f"{STATES} parallel.pipeline=2",
        2,
        "mtp.head.states=rollout: with parallel.pipeline=2 the states are on the last stage",
        "mtp.head.states=training",
    ),
    (
        f"{STATES} parallel.expert=2 {MOE}",
        2,
        "mtp.head.states=rollout: with parallel.expert=2 ranks that share experts",
        "mtp.head.states=training",
    ),
    # stages
    ("parallel.virtual_pipeline=2", 1, "parallel.virtual_pipeline=2: with parallel.pipeline=1", ""),
    ("parallel.pipeline=4", 4, "model.num_layers=2: is not divisible by the 4 chunks", "_layout"),
    (
        "parallel.pipeline=2 parallel.virtual_pipeline=2",
        2,
        "model.num_layers=2: is not divisible by the 4 chunks",
        "parallel.pipeline_layout",
    ),
    ("parallel.pipeline_layout=EttmL", 1, "parallel.pipeline_layout=EttmL", "_layout=null"),
    # interleaving: 16 sequences an update in RL, 32 in pretraining, on one data-parallel rank
    (
        f"{VPP} rl.micro_batch_size=16",
        2,
        "rl.micro_batch_size=16: makes 1 micro-batch a rank",
        "multiple of parallel.pipeline=2. Give another rl.micro_batch_size, or",
    ),
    (
        f"{VPP} pretrain.micro_batch_size=32",
        2,
        "pretrain.micro_batch_size=32: makes 1 micro-batch a rank",
        "parallel.virtual_pipeline=1",
    ),
    # experts
    ("parallel.expert=2", 2, "parallel.expert=2: model.moe.num_experts=null", "leave parallel.ex"),
    ("parallel.expert_tensor=2", 2, "parallel.expert_tensor=2: model.moe.num_experts=null", ""),
    (
        "model.moe.num_experts=7 parallel.expert=2",
        2,
        "model.moe.num_experts=7: is not divisible by parallel.expert=2",
        "Change one",
    ),
    (f"{MOE} parallel.tensor=2", 2, "parallel.sequence=false: Megatron-Core", "sequence=true"),
    (
        f"{MOE} parallel.expert=4 parallel.expert_tensor=2",
        4,
        "parallel.expert=4: times the ranks of one expert, 2, is 8, which does not divide "
        "the 4 ranks of a pipeline stage",
        "Change parallel.expert or parallel.expert_tensor",
    ),
    (
        f"{MOE} parallel.expert=2 parallel.pipeline=2",
        2,
        "parallel.expert=2: times the ranks of one expert, 1, is 2",
        "the 1 rank of a pipeline stage",
    ),
    (
        f"{MOE} parallel.expert_tensor=2",
        2,
        "parallel.expert_tensor=2: with parallel.expert=1 Megatron-Core adds up the gradients",
        "Leave it out, or raise parallel.expert",
    ),
    (
        f"{MOE} parallel.tensor=2 parallel.sequence=true parallel.expert_tensor=1",
        2,
        "parallel.expert_tensor=1: with parallel.expert=1 Megatron-Core adds up the gradients",
        "Leave it out, or raise parallel.expert",
    ),
    (
        f"{MOE} parallel.expert=2 parallel.expert_tensor=2 model.moe.ffn_hidden_size=7",
        4,
        "model.moe.ffn_hidden_size=7: is not divisible by the 2 ranks that share an expert",
        "parallel.expert_tensor",
    ),
    (
        f"{MOE} parallel.expert=2 parallel.expert_tensor=2 model.ffn_hidden_size=7",
        4,
        "model.ffn_hidden_size=7: is not divisible by the 2 ranks that share an expert",
        "parallel.expert_tensor",
    ),
    (
        f"{MOE} parallel.tensor=2 parallel.sequence=true model.moe.shared_ffn_hidden_size=9",
        2,
        "model.moe.shared_ffn_hidden_size=9: is not divisible by parallel.tensor=2",
        "Change one",
    ),
    # packed micro-batches
    ("rl.micro_batch_tokens=15", 1, "rl.micro_batch_tokens=15: a sequence may have", "least 16"),
    (
        "rl.micro_batch_tokens=16 parallel.context=3 rl.prompts_per_step=6",
        3,
        "rl.micro_batch_tokens=16: a sequence may have model.max_position_embeddings=16 tokens, "
        "padded to a multiple of 6",
        "Give at least 18",
    ),
]


@pytest.mark.parametrize(("given", "ranks", "what", "remedy"), LAYOUTS, ids=[r[0] for r in LAYOUTS])
def test_a_layout_that_cannot_work_is_the_one_problem_reported(given, ranks, what, remedy):
    if "micro_batch_tokens" in given:
        given += " rl.micro_batch_size=128"
    (message,) = problems(given, ranks)
    assert message.startswith(what) and remedy in message


# parallel.pipeline_layout for 4 layers, 2 MTP layers and 4 chunks
PIPELINES = [
    ("Et|tt|tx|mmL", "x has no meaning there", "Use E (embedding)"),
    ("Et|tt|t*n|mmL", "* n has no meaning there", "x*n and (...)*n for repetition"),
    ("Et|tt|tmmL", "has 3 chunks", "parallel.virtual_pipeline=1 make 4"),
    ("Et|tt||t|mmL", "has 5 chunks", "Change one"),
    (
        "Et|tt|tt|mmL",
        "has 5 transformer layers (t), and the model has 4 (model.num_layers=4)",
        "Change one of them",
    ),
    ("Et||tt|mmL", "has 3 transformer layers (t), and the model has 4", "Change one of them"),
    (
        "Et|tt|t|mL",
        "has 1 MTP layer (m), and the model has 2 (mtp.num_layers=2)",
        "Change one of them",
    ),
    (
        "tE|tt|t|mmL",
        "in order are t E t*3 m*2 L, the model's are E t*4 m*2 L",
        "Give these in this order",
    ),
    ("Et|tt|mm|tL", "in order are E t*3 m*2 t L", "Give these in this order"),
    ("Et|tt|t|Lmm", "in order are E t*4 L m*2", "Give these in this order"),
    ("t|tt|t|mmL", "in order are t*4 m*2 L", "Give these in this order"),
    ("Et|tt|t|mm", "in order are E t*4 m*2", "Give these in this order"),
    ("Ett|tt|m|mL", "the MTP layers lie in 2 chunks", "Put all into one"),
    ("Et|tt|tmm|L", "MTP layers share chunk tmm with other layers", "Put them next to L"),
    ("Ettttmm|||L", "MTP layers share chunk Ettttmm", "a chunk of their own"),
]


@pytest.mark.parametrize(("layout", "what", "remedy"), PIPELINES, ids=[r[0] for r in PIPELINES])
def test_a_pipeline_layout_that_megatron_computes_wrongly_or_refuses_is_refused(
    layout, what, remedy
):
    (message,) = problems([*PP4.split(), f"parallel.pipeline_layout={layout}"], 4)
    assert message.startswith(f"parallel.pipeline_layout={layout}: ")
    assert what in message and remedy in message


def test_a_layout_with_a_wrong_number_of_both_kinds_names_both():
    layers, heads = problems([*PP4.split(), "parallel.pipeline_layout=Et*9|t|t|mL"], 4)
    assert "has 11 transformer layers (t), and the model has 4" in layers
    assert "has 1 MTP layer (m), and the model has 2" in heads


@pytest.mark.parametrize("layout", ["Ett|tt|m|L", "Et|t|tt|m||L"])
def test_the_chunk_of_mtp_layers_ends_a_stage_other_than_the_first(layout):
    """Chunks alternate between two stages: the first layout has ``m`` on stage 0, the second in
    the middle of stage 1."""
    chunks = layout.count("|") + 1
    given = ["model.num_layers=4", "parallel.pipeline=2", f"parallel.pipeline_layout={layout}"]
    (message,) = problems([*given, f"parallel.virtual_pipeline={chunks // 2}"], 2)
    assert "must be the last chunk of its stage, and not on the first stage. Move it" in message


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [
        (f"{PP4} parallel.pipeline_layout=Ett|tt|mm|L", 4),
        (f"{PP4} parallel.pipeline_layout=E|(tt|)*2mmL", 4),
        (f"{PP4} parallel.pipeline_layout=Et,t*2|t||mmL", 4),
        (f"{VPP} parallel.pipeline_layout=Et|t|tt|mL", 2),
        (VPP, 2),
        (f"{VPP} rl.micro_batch_tokens=16 rl.micro_batch_size=128", 2),
        ("parallel.tensor=2 parallel.sequence=true parallel.context=2", 4),
        ("parallel.context=2 rl.micro_batch_tokens=16 rl.micro_batch_size=128", 2),
        (f"{MOE} parallel.expert=4 parallel.expert_tensor=1", 4),
        (f"{MOE} parallel.tensor=2 parallel.sequence=true parallel.expert=2", 4),
        (f"{MOE} parallel.tensor=2 parallel.sequence=true parallel.expert=2 "
         "parallel.expert_tensor=1", 2),
        (f"{MOE} parallel.expert=2 parallel.context=2", 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["rl", "pretrain", "eval"])
def test_layouts_that_fit_are_accepted(overrides, ranks, command):
    assert problems(overrides, ranks, command) == []


MODELS = [
    ("model.rotary_percent=0.4", "model.kv_channels=null: a head is 8 wide, of which", "turns 3"),
    ("model.rotary_percent=0.1", "model.kv_channels=null: a head is 8 wide, of which", "turns 0"),
    (f"{MLA} model.num_query_groups=2", "model.num_query_groups=2: multi-head latent", "=null"),
    (f"{MLA} model.kv_channels=16", "model.kv_channels=16: multi-head latent", "model.mla"),
    (f"{MLA} model.qkv_bias=true", "model.qkv_bias=true: multi-head latent", "qkv_bias=false"),
    (f"{MLA} model.rotary_percent=0.5", "model.rotary_percent=0.5: with model.mla", "=1.0"),
    ("model.mla={enabled: true, qk_rope_head_dim: 5}", "model.mla.qk_rope_head_dim=5", "Give 6"),
    (
        f"{MLA} model.mla.yarn.factor=4 model.mla.yarn.beta_fast=0.5",
        "model.mla.yarn.beta_fast=0.5: is below model.mla.yarn.beta_slow=1.0",
        "Swap them",
    ),
    (
        "model.rotary_scaling.factor=8 model.rotary_scaling.high_freq_factor=1",
        "model.rotary_scaling.high_freq_factor=1.0: is not above",
        "Swap them",
    ),
    (
        f"{MLA} model.rotary_scaling.factor=8",
        "model.rotary_scaling.factor=8.0: multi-head latent attention",
        "model.rotary_scaling.factor=null",
    ),
    (f"{MOE} model.moe.top_k=9", "model.moe.top_k=9: is more than model.moe.num_ex", "Lower"),
    (
        f"{MOE} model.moe.top_k=1",
        "model.moe.top_k=1: the weight of a single expert is 1",
        "model.moe.score_function=sigmoid",
    ),
    (f"{MOE} model.moe.first_dense_layers=2", "model.moe.first_dense_layers=2: leaves", "Lower"),
    (
        f"{MOE} model.moe.expert_bias=true",
        "model.moe.expert_bias=true: is defined for sigmoid scores",
        "model.moe.score_function=sigmoid",
    ),
    (f"{MOE} model.moe.groups=2", "model.moe.groups=2: goes together", "Give both or neither"),
    (f"{MOE} model.moe.top_groups=2", "model.moe.groups=null: goes together with", "top_groups=2"),
    (f"{MOE} model.moe.groups=3 model.moe.top_groups=1", "model.moe.groups=3: does not", "of 8"),
    (f"{MOE} model.moe.groups=2 model.moe.top_groups=4", "model.moe.top_groups=4: is", "Lower"),
    (
        f"{MOE} model.moe.groups=4 model.moe.top_groups=2 model.moe.top_k=3",
        "model.moe.top_groups=2: does not divide model.moe.top_k=3",
        "divisor of 3",
    ),
    (
        f"{MOE} model.moe.groups=8 model.moe.top_groups=1",
        "model.moe.top_groups=1: groups of 1 experts (model.moe.groups=8) hold fewer",
        "Raise model.moe.top_groups",
    ),
    ("fp8.format=hybrid", "fp8.format=hybrid: FP8 products", "precision=bf16"),
    (
        "fp8.format=e4m3 precision=bf16 model.hidden_size=40",
        "model.hidden_size=40: over 1 ranks is not a multiple of 16",
        "Give a multiple of 16, or fp8.format=none",
    ),
    (
        "fp8={format: e4m3, scaling: block} precision=bf16 model.hidden_size=128",
        "model.ffn_hidden_size=64: over 1 ranks is not a multiple of 128",
        "fp8.scaling=block",
    ),
    (
        f"{FP8} fp8.first_layers_bf16=3 fp8.last_layers_bf16=1",
        "fp8.first_layers_bf16=3 and fp8.last_layers_bf16=1: leave no layer of 4 for FP8",
        "fp8.format=none",
    ),
]


@pytest.mark.parametrize(("given", "what", "remedy"), MODELS, ids=[row[0] for row in MODELS])
def test_an_architecture_that_contradicts_itself_is_the_one_problem_reported(given, what, remedy):
    (message,) = problems(given)
    assert message.startswith(what) and remedy in message


@pytest.mark.parametrize(
    "given",
    [
        MLA,
        f"{MLA} model.hidden_size=34",  # heads have widths of their own
        f"{MOE} model.moe.groups=4 model.moe.top_groups=2",
        f"{MOE} model.moe.score_function=sigmoid model.moe.expert_bias=true",
        "model.rotary_percent=0.3",  # of 8 channels 2.4, so 2
        f"{MLA} model.mla.yarn.factor=4 model.mla.yarn.beta_fast=1",  # as Kimi K2 has it
        "fp8.format=hybrid precision=bf16",
        "model.num_query_groups=2 model.vocab_size=64",
    ],
)
def test_architectures_that_fit_are_accepted(given):
    assert problems(given) == []


def test_layouts_are_read_as_megatron_reads_them():
    assert parse_layout("Et*3|(tt|)*2,m|L") == ["Ettt", "tt", "tt", "m", "L"]
    assert parse_layout("E| t*2 |L") == ["E", "tt", "L"]


@pytest.mark.parametrize(
    ("given", "share", "multiple"),
    [
        ("seed=0", 1, 1),
        ("parallel.tensor=4", 4, 1),
        ("parallel.tensor=4 parallel.sequence=true", 4, 4),
        ("parallel.context=2", 2, 4),
        ("parallel.tensor=2 parallel.sequence=true parallel.context=2", 4, 8),
        ("parallel.pipeline=2 parallel.context=3", 6, 6),
        ("fp8.format=hybrid", 1, 16),
        ("fp8.format=hybrid parallel.context=2 parallel.tensor=2 parallel.sequence=true", 4, 64),
        ("fp8={format: e4m3, scaling: block} parallel.context=2", 2, 256),
    ],
)
def test_sizes_of_a_layout_by_hand(given, share, multiple):
    config = load_config([], _split(given))
    assert (model_parallel_size(config), sequence_multiple(config)) == (share, multiple)


def test_packing_is_refused_where_the_interleaved_schedule_needs_equal_counts():
    overrides = (
        "parallel.pipeline=2",
        "parallel.virtual_pipeline=2",
        "model.num_layers=4",
        "rl.prompts_per_step=3",
        "rl.samples_per_prompt=4",
        "rl.mini_batches=4",
        "rl.micro_batch_tokens=4096",
    )
    config = load_config([], ["pretrain.steps=0", *overrides])
    message = "parallel.virtual_pipeline=2: an update has 3 sequences"
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(config, command="rl", world_size=2)
