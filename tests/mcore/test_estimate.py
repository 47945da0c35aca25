"""Parameters and memory of a rank of any layout: against hand counts and really built models."""

from __future__ import annotations

import pytest
import torch
from megatron.core import parallel_state as state

from megatron_occ.config import Config, load_config, validate
from megatron_occ.mcore.estimate.ranks import RankEstimate, estimate, last_stage_rank
from megatron_occ.mcore.estimate.whole import model_parameters
from megatron_occ.mcore.provider import build_chunks
from megatron_occ.mcore.startup import initialize
from tests.mcore.distributed import run_ranks

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the dry run hides CUDA from its process; here it is in use"
)

VOCABULARY = 22
# h = 32, f = 48, 4 heads and 2 groups of width 8
DENSE = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4}
DENSE |= {"num_query_groups": 2, "tie_embeddings": False, "qkv_bias": True}
MOE = {"num_experts": 4, "ffn_hidden_size": 24, "shared_ffn_hidden_size": 40}
MOE |= {"first_dense_layers": 1}
MLA = {"enabled": True, "q_lora_rank": 6, "kv_lora_rank": 10, "qk_head_dim": 8, "v_head_dim": 12}
MLA |= {"qk_rope_head_dim": 4}


def make_config(*overrides: str, moe: bool = False, **model: object) -> Config:
    config = load_config([], list(overrides))
    for name, value in {**DENSE, **model}.items():
        setattr(config.model, name, value)
    for name, value in (MOE if moe else {}).items():
        setattr(config.model.moe, name, value)
    return config


# per layer: two norms, qkv [(4 + 2 * 2) * 8, 32] with bias, projection [32, 32]; MLP 3 * 32 * 48
ATTENTION_SPLIT = 64 * 32 + 64 + 32 * 32
NORMS = 2 * 32
MLP_SPLIT = 3 * 32 * 48
EXPERT = 3 * 32 * 24
SHARED = 3 * 32 * 40
ROUTER = 4 * 32


def test_parameters_of_a_dense_model_by_hand_under_tensor_and_pipeline_parallelism():
    config = make_config("parallel={tensor: 2, pipeline: 2}", "mtp.num_layers=2")
    first, last = (estimate(config, VOCABULARY, 4, rank) for rank in (0, 3))
    layer = NORMS + (ATTENTION_SPLIT + MLP_SPLIT) // 2
    # enorm, hnorm, final norm, projection [32, 64] over two ranks
    mtp_layer = 3 * 32 + 32 * 64 // 2 + layer
    assert first.parameters == {"embedding": 11 * 32, "trunk": 2 * layer}
    assert last.parameters == {
        "embedding": 11 * 32,  # the MTP layers' copy
        "trunk": 2 * layer + 32,  # and the final norm
        "MTP": 2 * mtp_layer,
        "output layer": 11 * 32,
    }
    assert first.chunks == ["embedding, layers 1-2"]
    (contents,) = last.chunks
    assert contents.startswith("layers 3-4, MTP depths 1-2") and "output layer" in contents


def test_parameters_of_a_mixture_of_experts_by_hand_under_expert_and_pipeline_parallelism():
    config = make_config("parallel={expert: 2, pipeline: 2}", moe=True)
    first, last = (estimate(config, VOCABULARY, 4, rank) for rank in (0, 3))
    common = NORMS + ATTENTION_SPLIT
    assert first.parameters == {
        "embedding": 22 * 32,
        "trunk": (common + MLP_SPLIT) + (common + SHARED + ROUTER),  # a dense and a MoE layer
        "trunk experts": 2 * EXPERT,
    }
    assert last.parameters == {
        "embedding": 22 * 32,
        "trunk": 2 * (common + SHARED + ROUTER) + 32,
        "trunk experts": 2 * 2 * EXPERT,
        "MTP": 3 * 32 + 32 * 64 + common + SHARED + ROUTER,
        "MTP experts": 2 * EXPERT,
        "output layer": 22 * 32,
    }
    assert last.coordinates["expert"] == 1 and last.groups["expert"] == [2, 3]


REAL = {
    "tensor and pipeline": make_config("parallel={tensor: 2, pipeline: 2}"),
    "tied": make_config("parallel={tensor: 2, pipeline: 2}", tie_embeddings=True),
    "interleaved": make_config(
        "parallel={pipeline: 2, virtual_pipeline: 2, tensor: 2, sequence: true}"
    ),
    "stage of MTP layers": make_config(
        "parallel={pipeline: 4, pipeline_layout: Et*2|t*2|m|L}", "mtp.num_layers=1"
    ),
    "experts": make_config(
        "parallel={tensor: 2, sequence: true, expert: 2, expert_tensor: 1, pipeline: 2}", moe=True
    ),
    "shared experts": make_config(
        "parallel={tensor: 2, sequence: true, expert: 2, context: 2}", moe=True
    ),
}


def build_all(configs: dict[str, Config]) -> dict[str, tuple[dict[str, int], int]]:
    """For each layout: entries by name on this rank, and those that no other rank counts."""
    built = {}
    for name, config in configs.items():
        initialize(config)
        built[name] = built_parameters(config)
        state.destroy_model_parallel()
    return built


def built_parameters(config: Config) -> tuple[dict[str, int], int]:
    counts, unique = {}, 0
    for chunk in build_chunks(config, VOCABULARY, torch.device("cpu")):
        for name, parameter in chunk.named_parameters():
            counts[name] = counts.get(name, 0) + parameter.numel()
            copied = name.startswith("embedding") and not chunk.pre_process
            tied = name.startswith("output") and config.model.tie_embeddings
            if is_first_owner(name, parameter) and not (copied or tied):
                unique += parameter.numel()
    return counts, unique


def is_first_owner(name: str, parameter: torch.Tensor) -> bool:
    split = getattr(parameter, "tensor_model_parallel", False)
    if ".experts." in name:
        shard = state.get_expert_tensor_parallel_rank() == 0 or split
        return shard and state.get_expert_data_parallel_rank() == 0
    shard = state.get_tensor_model_parallel_rank() == 0 or split
    return shard and state.get_data_parallel_rank(with_context_parallel=True) == 0


@pytest.fixture(scope="module")
def built() -> list[dict[str, tuple[dict[str, int], int]]]:
    return run_ranks(build_all, 4, REAL, timeout=300)


@pytest.mark.parametrize("name", REAL)
def test_the_estimate_counts_what_four_ranks_really_build(name, built):
    config = REAL[name]
    validate(config, command="eval", world_size=4)
    for rank in range(4):
        found, (counts, _) = estimate(config, VOCABULARY, 4, rank), built[rank][name]
        assert found.total_parameters == sum(counts.values())
        heads = [count for key, count in counts.items() if "mtp." in key]
        experts = [count for key, count in counts.items() if ".experts." in key]
        assert (by_part(found, "MTP"), by_part(found, "experts")) == (sum(heads), sum(experts))
    whole = make_config()
    whole.model = config.model
    single = estimate(whole, VOCABULARY, 1, 0)
    assert sum(rank[name][1] for rank in built) == single.total_parameters
    assert model_parameters(config, VOCABULARY).total == single.parameters


def by_part(found: RankEstimate, word: str) -> int:
    return sum(count for part, count in found.parameters.items() if word in part)


def test_latent_attention_by_hand():
    config = make_config(num_query_groups=None, qkv_bias=False)
    for name, value in MLA.items():
        setattr(config.model.mla, name, value)
    found = estimate(config, VOCABULARY, 1, 0)
    down = 32 * 6 + 32 * (10 + 4)
    up = 6 * 4 * (8 + 4) + 10 * 4 * (8 + 12)
    layer = NORMS + down + up + 4 * 12 * 32 + MLP_SPLIT
    assert found.parameters["trunk"] == 4 * layer + 32


def test_a_layout_of_512_ranks_leaves_nothing_behind():
    config = make_config(
        "parallel={tensor: 2, pipeline: 4, context: 2, pipeline_layout: Et|t|t|tmL}"
    )
    found = estimate(config, VOCABULARY, 512, 131)
    assert found.coordinates == {"tensor": 1, "context": 1, "data": 0, "pipeline": 1}
    assert found.groups["pipeline"] == [3, 131, 259, 387] and len(found.groups["data"]) == 32
    assert last_stage_rank(config, 512, 131) == 387
    assert not torch.distributed.is_initialized()


# arXiv 2205.05198: a layer keeps sbh(34 + 5as/h) bytes. Ours has no dropout masks (2 sbh) and no
# score matrix; a gated MLP of width 8h/3 keeps what its plain one of width 4h does.
PAPER = {"hidden_size": 96, "ffn_hidden_size": 256, "num_query_groups": None, "num_layers": 4}
SBH = 2 * 64 * 96


def paper_layout(*overrides: str, world_size: int = 1, rank: int = 0) -> RankEstimate:
    given = ["precision=bf16", "mtp={num_layers: 0, preset: none}", "rl.micro_batch_size=2"]
    config = make_config(*given, *overrides, **PAPER)
    return estimate(config, 96, world_size, rank)


@pytest.mark.parametrize(
    ("overrides", "ranks", "plain"),
    [
        ([], 1, 32.0),
        (["parallel.tensor=2"], 2, 8 + 24 / 2),  # the paper's 10 + 24 / t, less two masks
        (["parallel={tensor: 2, sequence: true}"], 2, 32 / 2),
        (["parallel.context=4"], 4, 32 / 4),
    ],
)
def test_activations_are_those_of_the_papers_formulas(overrides, ranks, plain):
    use = paper_layout(*overrides, world_size=ranks).memory
    split = {"parallel.context=4": 4, "parallel={tensor: 2, sequence: true}": 2}
    inputs = 2 / split.get("".join(overrides), 1)
    assert use.activations == (4 * plain * SBH, 4 * inputs * SBH + plain * SBH)
    assert use.training["activations"] == use.activations[0]
    recomputed = paper_layout(*overrides, "recompute=full", world_size=ranks).memory
    assert recomputed.training["activations"] == use.activations[1]


# bytes a token of one layer, h = 96, f = 256, 4 heads: 32 h without recompute
RECOMPUTED = [
    # the MLP's input, gate, up and product, of one layer at a time
    ("recompute=selective recompute_modules=[mlp]", 4 * (32 * 96 - 2 * (96 + 3 * 256)), 96 + 768),
    # kernels that keep no scores have nothing to compute again
    ("recompute=selective recompute_modules=[core_attn]", 4 * 32 * 96, 0),
    ("attention_backend=unfused", 4 * (32 * 96 + 2 * 4 * 64), 0),
    (
        "attention_backend=unfused recompute=selective recompute_modules=[core_attn]",
        4 * 32 * 96,
        4 * 64,
    ),
    ("recompute=full recompute_layers=1", 3 * 32 * 96 + 2 * 96, 16 * 96),
]


@pytest.mark.parametrize(("given", "each", "once"), RECOMPUTED)
def test_activations_follow_what_is_recomputed(given, each, once):
    use = paper_layout(*given.split()).memory
    # two sequences of 64 tokens, two bytes an element
    assert use.training["activations"] == 128 * (each + 2 * once)


def test_recompute_in_layers_with_experts_and_latent_attention_by_hand():
    experts = ["recompute=selective", "model.moe={num_experts: 4, ffn_hidden_size: 24, top_k: 2}"]
    experts += ["model.moe.shared_ffn_hidden_size=40", "mtp={num_layers: 0, preset: none}"]
    latent = {"num_query_groups": None, "qkv_bias": False}

    def each(*modules: str) -> float:
        config = make_config(*experts, f"recompute_modules=[{','.join(modules)}]", **latent)
        for name, value in MLA.items():
            setattr(config.model.mla, name, value)
        config.rl.micro_batch_size = 1
        use = estimate(config, VOCABULARY, 1, 0).memory
        return use.training["activations"] / (4 * config.model.max_position_embeddings)

    # core_attn drops nothing; the rest is kept by all layers and needed by one
    whole = each("core_attn")
    dropped = {
        "moe": 2 * (32 + 3 * 24) + 3 * 40,
        "moe_act": 2 * 24,
        "shared_experts": 3 * 40,
        "layernorm": 2 * 32,
        "mla_up_proj": 4 * (12 + 12 + 12),
    }
    for module, elements in dropped.items():
        assert each(module) == whole - 4 * elements + elements, module


@pytest.mark.parametrize(
    ("layout", "flights"),
    [
        ("{pipeline: 4}", [4, 3, 2, 1]),
        # the paper's p + (p - 1) / m on the first stage
        ("{pipeline: 2, virtual_pipeline: 2}", [2.5, 1.5]),
    ],
)
def test_micro_batches_in_flight(layout, flights):
    stages = len(flights)
    uses = [
        paper_layout(f"parallel={layout}", world_size=stages, rank=rank).memory
        for rank in range(stages)
    ]
    assert [use.in_flight for use in uses] == flights
    layers = 4 // stages
    for use in uses:
        assert use.training["activations"] == use.in_flight * layers * 32 * SBH
    one = ["rl.prompts_per_step=1", "rl.samples_per_prompt=2", "rl.mini_batches=1"]
    few = paper_layout(f"parallel={layout}", *one, world_size=stages).memory
    assert few.in_flight == 1, "there is one micro-batch"


def test_weights_gradients_and_optimizer_take_18_bytes_a_parameter_or_6_and_12_over_the_replicas():
    whole = paper_layout(world_size=4)
    assert sum(whole.memory.resident.values()) == 18 * whole.total_parameters
    split = paper_layout("parallel={context: 2, distributed_optimizer: true}", world_size=4)
    assert sum(split.memory.resident.values()) == (6 + 12 / 4) * whole.total_parameters
    config = make_config()
    single = estimate(config, VOCABULARY, 1, 0)
    assert sum(single.memory.resident.values()) == 16 * single.total_parameters
    eight = paper_layout("fp8.format=hybrid", "rl.loss.kl_coefficient=0.1").memory.resident
    assert eight["FP8 weights and transposes"] == 2 * whole.parameters["trunk"]
    assert eight["reference policy"] == 2 * whole.total_parameters


def test_gradients_in_bf16_take_two_bytes_and_four_more_while_the_optimizer_needs_them():
    wide = paper_layout(world_size=4)
    narrow = paper_layout("parallel.grad_reduce_dtype=bf16", world_size=4)
    count = wide.total_parameters
    assert narrow.memory.resident["gradients, bf16"] == 2 * count
    resident = [sum(each.memory.resident.values()) for each in (narrow, wide)]
    assert resident == [16 * count, 18 * count]
    # activations are gone then: the larger of the two counts
    for rows in (1, 32):
        given = [f"rl.micro_batch_size={rows}", "rl.mini_batches=1"]
        plain = paper_layout(*given).memory.training
        found = paper_layout(*given, "parallel.grad_reduce_dtype=bf16").memory.training
        assert sum(found.values()) == max(sum(plain.values()), 4 * count)
        assert (found == plain) == (rows == 32)


def test_moments_in_bf16_take_4_bytes_of_an_entry_and_those_on_the_host_none_here():
    layout = "parallel={{context: 2, distributed_optimizer: true{}}}"
    full, low, half, host = (
        paper_layout(layout.format(more), world_size=4)
        for more in (
            "",
            ", moments_dtype: bf16",
            ", optimizer_offload: 0.5",
            ", optimizer_offload: 1",
        )
    )
    share = full.total_parameters // 4
    assert full.memory.resident["Adam moments, fp32"] == 8 * share
    assert low.memory.resident["Adam moments, bf16"] == 4 * share
    resident = [sum(each.memory.resident.values()) for each in (full, low, half, host)]
    assert [(resident[0] - each) / share for each in resident] == [0, 4, 4, 8]
    # two moments, a main weight and a gradient of each; at the start copies of all four shares
    found = [each.memory.host.get("optimizer", 0) / share for each in (full, low, half, host)]
    assert found == [0, 0, (4 * 6 + 4) / 2, 4 * 6 + 4]
    # in fp32 what stays, when there are no moments yet
    start = [sum(each.memory.start.values()) / share for each in (full, low, half, host)]
    assert start == [0, 0, (4 * 4 - 8) / 2, 0]
    assert half.memory.peak >= sum(half.memory.resident.values()) + 4 * share


def test_layers_that_stay_in_bf16_have_no_fp8_weights():
    given = ("fp8.format=hybrid", "fp8.scaling=current")
    kept = ("fp8.first_layers_bf16=2", "fp8.last_layers_bf16=1")
    everywhere, inside = (
        paper_layout(*given, *more).memory.resident["FP8 weights and transposes"]
        for more in ((), kept)
    )
    # all but the final norm of 96 entries is in equal layers
    layer = (everywhere - 2 * 96) / PAPER["num_layers"]
    assert everywhere - inside == 3 * layer


def test_rollouts_in_fp8_have_a_rounded_copy_of_what_they_multiply():
    given = ("fp8.format=e4m3", "fp8.scaling=current", "rl.rollout.fp8=true")
    name = "weights rounded to FP8"
    plain = paper_layout(*given[:2])
    whole = paper_layout(*given, "rl.rollout.speculative.mode=fixed", "mtp.num_layers=1")
    parts = whole.parameters
    assert name not in plain.memory.generation
    assert whole.memory.generation[name] == 2 * (parts["trunk"] + parts["MTP"])
    # MTP layers that draft nothing are not rounded, nor are layers that stay in bf16
    off = paper_layout(*given, "rl.rollout.speculative.mode=off", "mtp.num_layers=1")
    assert off.memory.generation[name] == 2 * parts["trunk"]
    kept = paper_layout(*given, "fp8.last_layers_bf16=1", "mtp.num_layers=0", "mtp.preset=none")
    layers = PAPER["num_layers"]
    assert kept.memory.generation[name] == pytest.approx(
        2 * parts["trunk"] * (layers - 1) / layers, rel=1e-3
    )


def test_a_head_trained_alone_needs_gradients_and_moments_of_its_own_alone():
    given = ("rl.init_from=c", "rl.rollout.speculative.mode=off")
    whole, alone = (
        estimate(make_config(*given, preset), VOCABULARY, 1, 0)
        for preset in ("mtp.preset=detach", "mtp.preset=head_only")
    )
    head, everything = alone.parameters["MTP"], alone.total_parameters
    assert sum(whole.memory.resident.values()) == 16 * everything
    assert sum(alone.memory.resident.values()) == 4 * everything + 12 * head
    assert alone.memory.generation == whole.memory.generation
    # the MTP layer is of the kind of the trunk's, with five more tensors of the model's width
    assert 0 < alone.memory.training["activations"] < whole.memory.training["activations"] / 2
    # pretraining, which comes first, trains everything
    first = estimate(make_config("mtp.preset=head_only"), VOCABULARY, 1, 0)
    assert sum(first.memory.resident.values()) == 16 * everything


def test_experts_are_split_over_their_own_replicas():
    config = make_config(
        "precision=bf16", "parallel={expert: 2, distributed_optimizer: true}", moe=True
    )
    found = estimate(config, VOCABULARY, 4, 0)
    experts = by_part(found, "experts")
    updated = (found.total_parameters - experts) / 4 + experts / 2
    assert found.memory.resident["Adam moments, fp32"] == 8 * updated


def test_rollouts_by_hand():
    given = ("rl.rollout.batch_size=12", "parallel={tensor: 2, pipeline: 2}")
    config = make_config(*given, "rl.rollout.speculative.mode=off")
    use, last = (estimate(config, VOCABULARY, 4, rank).memory for rank in (0, 2))
    # rows, tokens, groups, keys and values, layers of the stage, bytes; two ranks share the groups
    cache = 12 * 64 * 2 * (8 + 8) * 2 * 4 // 2
    assert use.generation == {"KV cache": cache}
    assert use.peak == sum(use.resident.values()) + max(sum(use.training.values()), cache)
    rows = -(-VOCABULARY // 2) * 2
    assert last.generation == {"KV cache": cache, "logits": 32 * 12 * rows}
    paged = make_config(*given, "rl.rollout.speculative.mode=off", "rl.rollout.cache_tokens=300")
    # in place of 12 * 64 tokens
    pages = estimate(paged, VOCABULARY, 4, 0).memory.generation
    assert pages == {"KV cache": cache * 300 // (12 * 64)}
    drafting = make_config(*given, "rl.rollout.speculative.draft_length=2")
    more = estimate(drafting, VOCABULARY, 4, 2).memory.generation
    # of each depth the cache of a layer, and its input
    depths, hidden = drafting.mtp.num_layers, drafting.model.hidden_size
    assert more == {
        "KV cache": cache,
        "drafts: cache, hidden states": 12 * 64 * 4 * depths * (2 * (8 + 8) // 2 + hidden),
        "logits": 3 * 32 * 12 * rows,
    }
    assert estimate(config, VOCABULARY, 4, 0, command="eval").memory.training == {}
    pretraining = estimate(config, VOCABULARY, 4, 0, command="pretrain").memory
    assert pretraining.generation == {} and pretraining.micro_batch_tokens == 128 * 48
    config.rl.rollout.engine = "vllm"
    assert estimate(config, VOCABULARY, 4, 0).memory.generation == {}


def test_sampling_masks_by_hand():
    masks = "rl.rollout.batch_size=12", "rl.rollout.top_k=9", "rl.loss.sampling_mask=true"
    config = make_config(*masks)
    rows = config.rl.prompts_per_step * config.rl.samples_per_prompt
    use = estimate(config, VOCABULARY, 1, 0).memory
    assert use.generation["sampling masks"] == 4 * 12 * 64 * 9
    # as drawn, as dealt, and for the pass of old log-probs
    assert use.host == {"sampling masks": 3 * 4 * rows * 64 * 9}
    evaluation = estimate(config, VOCABULARY, 1, 0, command="eval").memory
    assert "sampling masks" not in evaluation.generation
    config.rl.rollout.top_k = 10 * VOCABULARY
    most = estimate(config, VOCABULARY, 1, 0).memory.generation["sampling masks"]
    assert 4 * 12 * 64 * VOCABULARY <= most < 1.1 * 4 * 12 * 64 * VOCABULARY


@pytest.mark.parametrize(("experts", "width"), [(4, 1), (300, 2)])
def test_replayed_experts_by_hand(experts, width):
    given = ("rl.rollout.batch_size=12", "mtp.num_layers=2", "rl.routing_replay=rollout")
    config = make_config(*given, moe=True)
    config.model.moe.num_experts = experts
    routers = config.model.num_layers - config.model.moe.first_dense_layers + 2
    each = 64 * routers * config.model.moe.top_k
    rows = config.rl.prompts_per_step * config.rl.samples_per_prompt
    use = estimate(config, VOCABULARY, 1, 0).memory
    assert use.generation["experts of tokens"] == 2 * 12 * each
    assert use.host == {"experts of tokens": 3 * width * rows * each}
    config.rl.routing_replay = "training"
    use = estimate(config, VOCABULARY, 1, 0).memory
    assert "experts of tokens" not in use.generation
    assert use.host == {"experts of tokens": width * rows * each}
    assert estimate(config, VOCABULARY, 1, 0, command="eval").memory.host == {}


def test_latent_attention_keeps_latents_whole_on_every_rank():
    config = make_config(
        "rl.rollout.batch_size=12",
        "parallel.tensor=2",
        "rl.rollout.speculative.mode=off",
        "model.mla={enabled: true, kv_lora_rank: 16, qk_rope_head_dim: 4}",
        "model.num_query_groups=null",
    )
    found = estimate(config, VOCABULARY, 2, 0).memory.generation["KV cache"]
    assert found == 12 * 64 * (16 + 4) * config.model.num_layers * 4


def test_kept_gradients_of_the_exact_estimator_by_hand():
    def copies(*overrides, world_size=1, command="rl", **given):
        config = make_config("mtp.preset=occ_exact", "mtp.num_layers=2", *overrides)
        found = estimate(config, VOCABULARY, world_size, 0, command=command, **given)
        held = found.parameters.items()
        entries = sum(n for name, n in held if command != "audit" or not name.startswith("MTP"))
        return found.memory.resident.get("copies of gradients, fp32", 0) / (4 * entries)

    # RL's and both depths': of the parts before, and of the present one
    assert copies() == pytest.approx(2 * 3)
    assert copies("mtp.trunk.exact.pairs=same", "mtp.trunk.lambda_plus=1") == pytest.approx(2)
    assert copies("parallel.distributed_optimizer=true", world_size=4) == pytest.approx(
        2 * 3 / 4, rel=0.01
    )
    # six signals of two depths and RL's, with those of eight mini-batches
    assert copies(command="audit") == pytest.approx(13 * 9)
    assert copies(command="audit", window=1) == pytest.approx(13 * 2)
    assert copies(command="pretrain") == 0
