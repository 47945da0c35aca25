"""The whole model, the largest rank of all, what makes it fit, and groups that cross nodes."""

from __future__ import annotations

import pytest
import torch

from megatron_occ.config import validate
from megatron_occ.mcore.estimate.largest import (
    changes_that_help,
    distinct_stage_ranks,
    largest,
)
from megatron_occ.mcore.estimate.nodes import crossing_warnings
from megatron_occ.mcore.estimate.ranks import RankEstimate, estimate
from megatron_occ.mcore.estimate.whole import model_parameters
from tests.mcore.test_estimate import (
    ATTENTION_SPLIT,
    EXPERT,
    MLA,
    MLP_SPLIT,
    NORMS,
    REAL,
    ROUTER,
    SHARED,
    VOCABULARY,
    make_config,
)

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the dry run hides CUDA from its process; here it is in use"
)

EMBEDDING = VOCABULARY * 32
LAYER = NORMS + ATTENTION_SPLIT + MLP_SPLIT
MOE_LAYER = NORMS + ATTENTION_SPLIT + SHARED + ROUTER
# enorm, hnorm, final norm, projection [32, 64]
MTP = 3 * 32 + 32 * 64


@pytest.mark.parametrize("depths", [0, 1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_a_dense_model_by_hand(depths, tied):
    config = make_config(
        "parallel={tensor: 2, pipeline: 2}",
        f"mtp.num_layers={depths}",
        "mtp.preset=none",
        tie_embeddings=tied,
    )
    expected = {"embedding": EMBEDDING, "trunk": 4 * LAYER + 32}
    expected |= {"MTP": depths * (MTP + LAYER)} if depths else {}
    expected |= {} if tied else {"output layer": EMBEDDING}
    found = model_parameters(config, VOCABULARY)
    assert found.total == expected
    assert found.active == expected


@pytest.mark.parametrize(("dense", "layers"), [(0, 4), (1, 4), (3, 9)])
def test_a_mixture_of_experts_by_hand(dense, layers):
    config = make_config("mtp.num_layers=2", moe=True, num_layers=layers)
    config.model.moe.first_dense_layers = dense
    config.model.moe.top_k = 3
    moe = layers - dense
    common = {
        "embedding": EMBEDDING,
        "trunk": dense * LAYER + moe * MOE_LAYER + 32,
        "MTP": 2 * (MTP + MOE_LAYER),
        "output layer": EMBEDDING,
    }
    found = model_parameters(config, VOCABULARY)
    assert found.total == common | {
        "trunk experts": moe * 4 * EXPERT,
        "MTP experts": 2 * 4 * EXPERT,
    }
    assert found.active == common | {
        "trunk experts": moe * 3 * EXPERT,
        "MTP experts": 2 * 3 * EXPERT,
    }


def test_latent_attention_by_hand():
    config = make_config("mtp.num_layers=1", num_query_groups=None, qkv_bias=False)
    for name, value in MLA.items():
        setattr(config.model.mla, name, value)
    down = 32 * 6 + 32 * (10 + 4)
    up = 6 * 4 * (8 + 4) + 10 * 4 * (8 + 12)
    layer = NORMS + down + up + 4 * 12 * 32 + MLP_SPLIT
    found = model_parameters(config, VOCABULARY).total
    assert (found["trunk"], found["MTP"]) == (4 * layer + 32, MTP + layer)


def test_rows_of_a_padded_vocabulary_are_not_the_models():
    config = make_config("parallel.tensor=4", num_query_groups=None)
    assert estimate(config, VOCABULARY, 4, 0).parameters["embedding"] * 4 == 24 * 32
    assert model_parameters(config, VOCABULARY).total["embedding"] == 22 * 32


STAGES = REAL | {
    "many alike": make_config("parallel.pipeline=8", num_layers=16),
    "none alike": make_config(
        "parallel={pipeline: 5, pipeline_layout: Et|tt|ttt|t|mmL}", "mtp.num_layers=2", num_layers=7
    ),
    "dense beside MoE": make_config(
        "parallel={pipeline: 4, virtual_pipeline: 2}", moe=True, num_layers=8
    ),
    "interleaved and uneven": make_config(
        "parallel={pipeline: 2, virtual_pipeline: 2, pipeline_layout: E|tt|t|tmL}",
    ),
}


@pytest.mark.parametrize("name", STAGES)
def test_no_rank_of_any_stage_is_larger_than_the_largest(name):
    config, stages = STAGES[name], STAGES[name].parallel.pipeline
    size = 4 // stages if 4 % stages == 0 else 1
    world_size = size * stages
    validate(config, command="eval", world_size=world_size)
    everyone = [estimate(config, VOCABULARY, world_size, rank) for rank in range(world_size)]
    chosen = distinct_stage_ranks(config, world_size, size - 1)
    assert {rank % size for rank in chosen} == {size - 1}
    peak = largest([everyone[rank] for rank in chosen]).memory.peak
    assert peak == max(entry.memory.peak for entry in everyone)
    kinds = [tuple(entry.parameters.items()) for entry in everyone]
    assert {kinds[rank] for rank in chosen} == set(kinds)


def test_stages_that_are_alike_are_built_once():
    config = make_config("parallel.pipeline=64", num_layers=128)
    assert distinct_stage_ranks(config, 128, 0) == [0, 2, 126]
    # layers 1-2, 3 and 4 are dense in an interleaved mixture: 0, 1 and 2 on one stage each
    moe = make_config("parallel={pipeline: 4, virtual_pipeline: 2}", moe=True, num_layers=16)
    moe.model.moe.first_dense_layers = 3
    assert distinct_stage_ranks(moe, 4, 0) == [0, 1, 2, 3]
    moe.model.moe.first_dense_layers = 0
    assert distinct_stage_ranks(moe, 4, 0) == [0, 1, 3]


def every_kind(config, world_size: int, command: str = "rl") -> list[RankEstimate]:
    ranks = distinct_stage_ranks(config, world_size, 0)
    return [estimate(config, VOCABULARY, world_size, rank, command=command) for rank in ranks]


def helped(config, world_size: int, limit: int, command: str = "rl") -> dict[str, int]:
    found = changes_that_help(config, every_kind(config, world_size, command), command, 8, limit)
    return {" ".join(f"{k}={v}" for k, v in change.items()): peak for change, peak in found}


def test_a_change_that_is_named_leads_to_the_peak_that_is_said():
    given = ["parallel={tensor: 2, pipeline: 2}", "rl.init_from=c", "rl.micro_batch_size=32"]
    config = make_config(*given)
    now = largest(every_kind(config, 8)).memory.peak
    found = helped(config, 8, limit=now // 2)
    assert set(found) >= {"recompute=full", "parallel.distributed_optimizer=True"}
    for change, peak in found.items():
        again = make_config(*given, *change.lower().split())
        validate(again, command="rl", world_size=8)
        assert largest(every_kind(again, 8)).memory.peak == peak < now


def test_of_a_size_the_largest_value_that_fits_is_named():
    # what follows from micro-batches alone: 8 sequences of a rank in an update
    config = make_config(
        "rl={prompts_per_step: 2, samples_per_prompt: 4, mini_batches: 1, micro_batch_size: 8}",
        "recompute=full",
        "rl.rollout.batch_size=1",
        "rl.rollout.speculative.mode=off",
    )
    peaks = {}
    for size in (8, 4, 2, 1):
        config.rl.micro_batch_size = size
        peaks[size] = estimate(config, VOCABULARY, 1, 0).memory.peak
    config.rl.micro_batch_size = 8
    assert helped(config, 1, limit=peaks[2]) == {"rl.micro_batch_size=2": peaks[2]}
    assert helped(config, 1, limit=peaks[2] - 1) == {"rl.micro_batch_size=1": peaks[1]}
    assert helped(config, 1, limit=1) == {"rl.micro_batch_size=1": peaks[1]}


def test_two_changes_are_named_together_where_one_is_not_enough():
    # servers sample: activations are all there is besides weights and optimizer
    given = ["rl.rollout.engine=vllm", "rl.rollout.server.urls=['http://host:8000']"]
    given += ["rl.init_from=c", "rl.rollout.batch_size=512"]
    config = make_config(*given, "rl.micro_batch_size=16")
    single = helped(config, 1, limit=1)
    assert set(single) == {
        "recompute=full",
        "rl.micro_batch_size=1",
        "recompute=full rl.micro_batch_size=1",
    }
    best = min(peak for change, peak in single.items() if " " not in change)
    assert single["recompute=full rl.micro_batch_size=1"] < best
    # one that is enough alone is not joined by another
    assert [change for change in helped(config, 1, limit=best) if " " in change] == []


def test_what_validation_refuses_is_not_proposed():
    """Interleaved, the micro-batches of a rank are a multiple of two stages: 4 or 12, never 3."""
    sizes = "rl={prompts_per_step: 4, samples_per_prompt: 3, mini_batches: 1, micro_batch_size: 6}"
    config = make_config("parallel={pipeline: 2, virtual_pipeline: 2}", sizes, "rl.init_from=c")
    config.rl.rollout.speculative.mode = "off"
    config.rl.rollout.batch_size = 1
    validate(config, command="rl", world_size=2)
    peaks = {}
    for size in (4, 3):
        config.rl.micro_batch_size = size
        peaks[size] = largest(every_kind(config, 2)).memory.peak
    config.rl.micro_batch_size = 6
    assert peaks[3] < peaks[4]
    assert "rl.micro_batch_size=3" in helped(config, 2, limit=peaks[4])


# 2 experts' groups of 4 lie over tensor and data ranks: 0 1 2 3 and 4 5 6 7
OVER_DATA = "{tensor: 2, expert: 4, expert_tensor: 1}"
SPLIT = "{expert: 4, expert_tensor: 2}"
CROSSING = [
    ("{tensor: 4}", False, 8, 4, {}),
    ("{tensor: 4}", False, 12, 6, {"tensor": "1 of 3 groups, such as ranks 4 5 6 7"}),
    ("{tensor: 4, pipeline: 3}", False, 12, 8, {}),
    ("{tensor: 2, context: 4}", False, 16, 4, {"context": "4 of 4 groups, such as ranks 0 2 4 6"}),
    ("{tensor: 16}", False, 16, 8, {"tensor": "the group, ranks 0 1 ... 15"}),
    (OVER_DATA, True, 8, 4, {}),
    (OVER_DATA, True, 8, 3, {"tensor": "1 of 4 groups, such as ranks 2 3", "expert": "2 of 2"}),
    (SPLIT, True, 8, 4, {"expert": "2 of 2 groups, such as ranks 0 2 4 6"}),
    ("{tensor: 4}", True, 4, 2, dict.fromkeys(("tensor", "expert tensor"), "the group, ranks 0")),
    ("{tensor: 4}", False, 4, 8, {}),
]


@pytest.mark.parametrize(("layout", "moe", "ranks", "node", "crossing"), CROSSING)
def test_groups_that_cross_nodes(layout, moe, ranks, node, crossing):
    config = make_config(f"parallel={layout}", moe=moe)
    found = crossing_warnings(config, ranks, node)
    assert [text.partition(" ranks")[0] for text in found] == list(crossing)
    for text, (name, which) in zip(found, crossing.items(), strict=True):
        assert text.startswith(f"{name} ranks cross nodes of {node}: {which}")
        assert " on nodes 0 to 1. Such a group " in text
        assert text.endswith(f" a divisor of {node}")


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("node", [1, 2, 3])
def test_the_groups_that_cross_nodes_are_those_of_megatron(name, node):
    config = REAL[name]
    crossing = set()
    for rank in range(4):
        for axis, ranks in estimate(config, VOCABULARY, 4, rank).groups.items():
            if len({one // node for one in ranks}) > 1:
                crossing.add(axis.replace("_", " "))
    inner = crossing & {"tensor", "context", "expert tensor", "expert"}
    texts = crossing_warnings(config, 4, node)
    assert {text.partition(" ranks")[0] for text in texts} == inner


def test_deepseek_v3_has_the_parameters_that_its_report_says():
    """671B in all and 37B active, the MTP layer left out (arXiv 2412.19437, abstract)."""
    config = make_config("mtp.num_layers=1", qkv_bias=False)
    sizes = {"num_layers": 61, "hidden_size": 7168, "ffn_hidden_size": 18432}
    sizes |= {"num_attention_heads": 128, "num_query_groups": None}
    latent = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_head_dim": 128, "v_head_dim": 128}
    experts = {"num_experts": 256, "top_k": 8, "ffn_hidden_size": 2048}
    experts |= {"shared_ffn_hidden_size": 2048, "first_dense_layers": 3}
    for section, values in {"model": sizes, "mla": latent, "moe": experts}.items():
        owner = config.model if section == "model" else getattr(config.model, section)
        for name, value in values.items():
            setattr(owner, name, value)
    config.model.mla.enabled, config.model.mla.qk_rope_head_dim = True, 64
    found = model_parameters(config, 129280)
    without = [
        sum(count for part, count in table.items() if not part.startswith("MTP"))
        for table in (found.total, found.active)
    ]
    assert without[0] == pytest.approx(671e9, abs=0.5e9)
    assert without[1] == pytest.approx(37e9, abs=0.6e9)
