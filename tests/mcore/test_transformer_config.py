"""Every option of architecture, layout and precision reaches Megatron-Core: none is ignored."""

from __future__ import annotations

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.enums import AttnBackend

from megatron_occ.config import load_config
from megatron_occ.config.keys import leaves
from megatron_occ.losses.heads import LossReport
from megatron_occ.mcore import transformer_config as module
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.head_request import HeadRequest
from megatron_occ.mcore.provider import build_chunks
from megatron_occ.mcore.startup import initialize, shutdown
from megatron_occ.mcore.transformer_config import transformer_config
from tests.mcore.conftest import VOCABULARY, positions, random_ids, small_config

MOE = ("model.moe.num_experts=8", "model.moe.ffn_hidden_size=24", "model.num_layers=4")
SIGMOID = (*MOE, "model.moe.score_function=sigmoid", "model.moe.expert_bias=true")
GROUPS = (*MOE, "model.moe.top_k=2")
MLA = ("model.mla.enabled=true", "model.num_query_groups=null")
YARN = (*MLA, "model.mla.yarn.factor=4")
FP8 = ("precision=bf16", "fp8.format=hybrid")
CURRENT = (*FP8, "fp8.scaling=current")
PP2 = ("parallel.pipeline=2", "model.num_layers=4", "mtp.num_layers=1")
TP2 = ("parallel.tensor=2",)

# option and value, what it goes with, Megatron's name and value
REACHES = (
    ("model.moe.num_experts=8", MOE, "num_moe_experts", 8),
    ("model.moe.num_experts=8", MOE, "moe_router_dtype", "fp32"),
    ("model.moe.top_k=3", MOE, "moe_router_topk", 3),
    ("model.moe.ffn_hidden_size=40", MOE, "moe_ffn_hidden_size", 40),
    ("model.moe.shared_ffn_hidden_size=16", MOE, "moe_shared_expert_intermediate_size", 16),
    ("model.moe.first_dense_layers=2", MOE, "moe_layer_freq", [0, 0, 1, 1]),
    ("model.moe.score_function=sigmoid", MOE, "moe_router_score_function", "sigmoid"),
    ("model.moe.expert_bias=true", SIGMOID, "moe_router_enable_expert_bias", True),
    ("model.moe.bias_update_rate=0.5", SIGMOID, "moe_router_bias_update_rate", 0.5),
    ("model.moe.scaling_factor=2.5", MOE, "moe_router_topk_scaling_factor", 2.5),
    ("model.moe.groups=4", (*GROUPS, "model.moe.top_groups=2"), "moe_router_num_groups", 4),
    ("model.moe.top_groups=2", (*GROUPS, "model.moe.groups=4"), "moe_router_group_topk", 2),
    ("model.mla.enabled=true", MLA, "multi_latent_attention", True),
    ("model.mla.q_lora_rank=20", MLA, "q_lora_rank", 20),
    ("model.mla.yarn.factor=4", MLA, "rope_type", "yarn"),
    ("model.mla.yarn.factor=4", MLA, "rotary_scaling_factor", 4.0),
    (
        "model.mla.yarn.original_max_position_embeddings=9",
        YARN,
        "original_max_position_embeddings",
        9,
    ),
    ("model.mla.yarn.beta_fast=9", YARN, "beta_fast", 9.0),
    ("model.mla.yarn.beta_slow=0.5", YARN, "beta_slow", 0.5),
    ("model.mla.yarn.mscale=0.7", YARN, "mscale", 0.7),
    ("model.mla.yarn.mscale=0.7", YARN, "mscale_all_dim", 0.7),
    ("model.mla.kv_lora_rank=24", MLA, "kv_lora_rank", 24),
    ("model.mla.qk_head_dim=12", MLA, "qk_head_dim", 12),
    ("model.mla.qk_rope_head_dim=6", MLA, "qk_pos_emb_head_dim", 6),
    ("model.mla.v_head_dim=10", MLA, "v_head_dim", 10),
    ("parallel.tensor=2", (), "tensor_model_parallel_size", 2),
    ("parallel.sequence=true", TP2, "sequence_parallel", True),
    ("parallel.pipeline=2", PP2, "pipeline_model_parallel_size", 2),
    ("parallel.virtual_pipeline=2", PP2, "virtual_pipeline_model_parallel_size", 2),
    ("parallel.context=2", (), "context_parallel_size", 2),
    ("parallel.expert=2", MOE, "expert_model_parallel_size", 2),
    ("parallel.expert_tensor=2", (*MOE, "parallel.expert=2"), "expert_tensor_parallel_size", 2),
    ("fp8.format=e4m3", FP8, "fp8", "e4m3"),
    ("fp8.scaling=delayed", FP8, "fp8_recipe", "delayed"),
    ("fp8.scaling=current", FP8, "fp8_recipe", "tensorwise"),
    ("fp8.scaling=block", FP8, "fp8_recipe", "blockwise"),
    ("model.moe.num_experts=8", MOE, "moe_token_dispatcher_type", "allgather"),
    ("fusions=off", (), "apply_rope_fusion", False),
    ("fusions=off", (), "use_te_activation_func", False),
    ("recompute=none", (), "recompute_granularity", None),
    ("fp8.first_layers_bf16=2", CURRENT, "first_last_layers_bf16", True),
    ("fp8.first_layers_bf16=2", CURRENT, "num_layers_at_start_in_bf16", 2),
    ("fp8.first_layers_bf16=2", CURRENT, "num_layers_at_end_in_bf16", 0),
    ("fp8.last_layers_bf16=2", CURRENT, "first_last_layers_bf16", True),
    ("fp8.last_layers_bf16=2", CURRENT, "num_layers_at_end_in_bf16", 2),
    ("fp8.last_layers_bf16=0", CURRENT, "first_last_layers_bf16", False),
    ("recompute=full", (), "recompute_granularity", "full"),
    ("recompute=full", (), "recompute_method", "uniform"),
    ("recompute_layers=2", ("recompute=full",), "recompute_method", "block"),
    ("recompute_layers=2", ("recompute=full",), "recompute_num_layers", 2),
    ("recompute=selective", ("recompute_modules=[mlp]",), "recompute_granularity", "selective"),
    ("recompute_modules=[mlp]", ("recompute=selective",), "recompute_modules", ["mlp"]),
    ("precision=bf16", (), "params_dtype", torch.bfloat16),
)
# tested below
ELSEWHERE = {
    "parallel.pipeline_layout",
    "parallel.token_dispatcher",
    "parallel.overlap_grad_reduce",
    "parallel.grad_reduce_dtype",
    "parallel.distributed_optimizer",
    # tests/mcore/test_moments.py and test_offload.py
    "parallel.moments_dtype",
    "parallel.optimizer_offload",
    "parallel.overlap_param_gather",
    "attention_backend",
    # set in the modules, which tests/mcore/test_convert_engine.py compares with transformers
    "model.mla.norm_epsilon",
}


def test_no_option_is_missing_here():
    sections = (
        "model.moe.",
        "model.mla.",
        "parallel.",
        "fp8.",
        "recompute",
        "fusions",
        "attention",
    )
    listed = {given.partition("=")[0] for given, *_ in REACHES} | ELSEWHERE
    assert {key for key in leaves() if key.startswith(sections)} <= listed


@pytest.mark.parametrize(("given", "beside", "name", "value"), REACHES, ids=[r[0] for r in REACHES])
def test_an_option_reaches_megatron(layout, given, beside, name, value):
    assert getattr(transformer_config(load_config([], [*beside, given])), name) == value


@pytest.mark.parametrize("name", ["auto", "flash", "fused", "unfused", "local"])
def test_kernels_of_attention_are_chosen_where_there_is_a_choice(layout, name, monkeypatch):
    config = load_config([], [f"attention_backend={name}"])
    assert transformer_config(config).attention_backend == AttnBackend.auto
    monkeypatch.setattr(module, "uses_transformer_engine", lambda: True)
    assert transformer_config(config).attention_backend == AttnBackend[name]


@pytest.mark.parametrize(
    ("given", "name"),
    [("auto", "alltoall"), ("allgather", "allgather"), ("alltoall", "alltoall"), ("flex", "flex")],
)
def test_what_takes_tokens_to_experts_is_chosen_on_a_gpu(layout, given, name, monkeypatch):
    config = load_config([], [*MOE, f"parallel.token_dispatcher={given}"])
    assert transformer_config(config).moe_token_dispatcher_type == "allgather"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert transformer_config(config).moe_token_dispatcher_type == name


def test_a_pipeline_layout_reaches_megatron(layout):
    layout = transformer_config(
        load_config([], [*PP2, "parallel.pipeline_layout=Et|tttmL"])
    ).pipeline_model_parallel_layout
    assert [len(layout.get_layer_id_list(pp_rank=rank, vp_stage=0)) for rank in (0, 1)] == [1, 3]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("distributed", [False, True])
def test_reduction_and_optimizer_are_as_given(overlap, distributed):
    config = load_config(
        [],
        [
            f"parallel.overlap_grad_reduce={overlap}".lower(),
            f"parallel.distributed_optimizer={distributed}".lower(),
        ],
    )
    layout = initialize(config)
    try:
        actor = MegatronGPTActor(
            config, VOCABULARY, layout, optimizer=config.rl.optimizer, total_updates=1
        )
        (wrapped,) = actor.wrapped
        assert wrapped.ddp_config.overlap_grad_reduce is overlap
        parts = actor.optimizer.megatron.chained_optimizers
        assert [isinstance(part, DistributedOptimizer) for part in parts] == [distributed]
    finally:
        shutdown()


@pytest.mark.parametrize("overlap", [False, True])
def test_gathers_are_overlapped_as_given(overlap):
    """What they do then: tests/mcore/test_weight_gathers.py."""
    config = small_config()
    config.parallel.distributed_optimizer = config.parallel.overlap_grad_reduce = True
    config.parallel.overlap_param_gather = overlap
    layout = initialize(config)
    try:
        actor = MegatronGPTActor(
            config, VOCABULARY, layout, optimizer=config.rl.optimizer, total_updates=1
        )
        (wrapped,) = actor.wrapped
        assert wrapped.ddp_config.overlap_param_gather is overlap
    finally:
        shutdown()


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("distributed", [False, True])
def test_gradients_are_summed_in_the_precision_that_is_given(name, dtype, distributed):
    config = small_config()
    config.precision, config.parallel.grad_reduce_dtype = "bf16", name
    config.parallel.distributed_optimizer = distributed
    layout = initialize(config)
    try:
        actor = MegatronGPTActor(
            config, VOCABULARY, layout, optimizer=config.rl.optimizer, total_updates=1
        )
        batch = actor.micro_batch(random_ids(), None, passes=((False, True),))
        parameters = list(actor.chunks[0].parameters())
        before = [parameter.detach().clone() for parameter in parameters]
        actor.get_loss_and_metrics([batch], lambda outputs, _: _report(outputs))
        assert {parameter.main_grad.dtype for parameter in parameters} == {dtype}
        report = actor.finish_training_step()
        assert report.trunk_norm > 0 and not report.skipped
        changed = [not torch.equal(*pair) for pair in zip(before, parameters, strict=True)]
        assert any(changed)
    finally:
        shutdown()


def _report(outputs):
    values = [outputs.logprobs, *outputs.passes]
    return sum(value.mean() for value in values), LossReport({}, None)


def test_rotary_percent_turns_that_part_of_a_head(layout):
    config = load_config([], ["model.rotary_percent=0.5"])  # heads are 24 wide
    (model,) = build_chunks(config, VOCABULARY, layout.device)
    assert model.rotary_pos_emb.inv_freq.numel() == 24 * 0.5 / 2


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        ((), VOCABULARY),
        (("tokenizer.unused_rows=true",), 40),
        # a server draws from all rows
        (("rl.rollout.engine=vllm", "rl.rollout.server.urls=[http://a]"), 40),
    ],
)
def test_rows_beyond_the_tokenizer_take_part_where_asked_for(layout, given, ids):
    config = load_config([], ["model.vocab_size=40", *given])
    (model,) = build_chunks(config, VOCABULARY, layout.device)
    assert model.embedding.word_embeddings.weight.size(0) == 40
    assert model.valid_vocab_size == ids
    tokens = random_ids(1, 6)
    targets = torch.arange(ids).view(-1, 1).expand(-1, 6)
    request = HeadRequest(targets.unsqueeze(0))
    rows = tokens.expand(ids, -1)
    with torch.no_grad():
        found = model.eval()(rows, positions(rows), None, request=request).logprobs
    torch.testing.assert_close(found.exp().sum(0), torch.ones(6))


def test_a_model_that_no_memory_holds_is_named(layout):
    config = load_config([], ["model.hidden_size=1000000", "mtp.num_layers=0"])
    with pytest.raises(ValueError, match=r"does not fit in the memory of cpu.*--dry-run prints"):
        build_chunks(config, 10**9, layout.device)  # beyond the address space


def test_a_rank_without_an_id_is_refused(layout):
    config = load_config([], ["model.vocab_size=60"])
    config.parallel.tensor = 2
    with pytest.raises(ValueError, match="leaves a rank without any of the 23 token ids"):
        build_chunks(config, VOCABULARY, layout.device)
