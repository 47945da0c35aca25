"""Layouts that must give the numbers of one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_occ.config import Config, load_config

_MODEL = (
    "pretrain.steps=0",
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.ffn_hidden_size=48",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.max_position_embeddings=64",
    # large enough that every position matters
    "model.init_std=0.15",
    "rl.samples_per_prompt=4",
    "rl.prompts_per_step=4",
    "rl.mini_batches=2",
    "rl.micro_batch_size=2",
    "rl.optimizer.lr=0.01",
    # Adam divides by the root of a variance: with a small epsilon rounding of a tiny gradient
    # becomes a step of full size
    "rl.optimizer.eps=1.0",
    "rl.optimizer.beta1=0.5",
)
# statistics of the same mini-batch: lambda is not 0 from the first update on
CURRENT = "mtp.trunk.statistics=current"
DENSE = ("mtp.preset=occ_decoupled", CURRENT)
HEAD = ("mtp.preset=head_only",)
COUPLED = ("mtp.preset=occ", CURRENT)
SOFT_CE = (
    "mtp.trunk.signal=policy",
    "mtp.trunk.coefficient=occ",
    "mtp.head.signal=soft_ce",
    CURRENT,
)
_BOUNDED = ("mtp.trunk.signal=policy", "mtp.trunk.weighting=truncated", "mtp.head.signal=ce")
# softmax over what a token was drawn from: at most so many ids
MASKED = ("rl.loss.sampling_mask=true", "rl.rollout.top_k=6")
CISPO = (
    *_BOUNDED,
    *MASKED,
    "rl.algorithm=cispo",
    "rl.loss.top_entropy=0.5",
    "rl.correction.reject=token",
    "rl.correction.reject_low=0.3",
    "rl.correction.reject_high=3",
)
SAPO = (
    *_BOUNDED,
    *MASKED,
    "rl.algorithm=sapo",
    "rl.loss.top_entropy=0.5",
    "rl.correction.weights=sequence",
    "rl.correction.low=0.5",
    "rl.correction.high=2",
)
MOE = (
    *DENSE,
    "model.moe.num_experts=4",
    "model.moe.top_k=2",
    "model.moe.ffn_hidden_size=24",
    "model.moe.shared_ffn_hidden_size=16",
    "model.moe.first_dense_layers=1",
    "model.moe.score_function=sigmoid",
    "model.moe.expert_bias=true",
)
# large enough that gradients of routers are those of this loss
BALANCED = (*MOE, "rl.balance_loss=0.5")
# experts of the trunk and of MTP layers given
REPLAYED = (*MOE, "rl.routing_replay=rollout")
# of the trunk, as the old log-probs chose them
TAKEN = (*MOE[len(DENSE) :], "mtp.preset=detach", "rl.routing_replay=training")
MLA = (
    *DENSE,
    "model.num_query_groups=null",
    "model.mla.enabled=true",
    "model.mla.q_lora_rank=16",
    "model.mla.kv_lora_rank=16",
    "model.mla.qk_head_dim=8",
    "model.mla.qk_rope_head_dim=4",
    "model.mla.v_head_dim=6",
    "model.qk_layernorm=true",
)
UNTIED = ("model.tie_embeddings=false",)
PACKED = ("rl.micro_batch_tokens=64",)
# as MiMo's MTP layers
BEFORE = ("model.mtp_reads=before",)
SPLIT = ("parallel.distributed_optimizer=true", "parallel.overlap_grad_reduce=true")
SEQUENCE = ("parallel.sequence=true",)


@dataclass(frozen=True)
class Case:
    """A layout.

    Args:
        name: as printed.
        ranks: processes.
        model: settings shared with the single process that it is compared with.
        layout: settings of its own.
    """

    name: str
    ranks: int
    model: tuple[str, ...]
    layout: tuple[str, ...]

    @property
    def config(self) -> Config:
        """Its configuration."""
        return read(self.model, self.layout)


def _case(name: str, ranks: int, model: tuple[str, ...], *layout: Any) -> Case:
    flat = [item for part in layout for item in ([part] if isinstance(part, str) else part)]
    return Case(name, ranks, model, tuple(flat))


def _depths(count: int) -> tuple[str, ...]:
    return (f"mtp.num_layers={count}",)


TP2, PP2, CP2 = "parallel.tensor=2", "parallel.pipeline=2", "parallel.context=2"
CASES = (
    _case("1 process, packed", 1, DENSE + _depths(2), PACKED),
    _case("1 process, full recompute", 1, DENSE + _depths(2), "recompute=full"),
    _case("1 process, full recompute, packed", 1, DENSE + _depths(2), "recompute=full", PACKED),
    _case("TP2", 2, DENSE + _depths(2), TP2),
    _case("TP2, untied, K=3", 2, DENSE + UNTIED + _depths(3), TP2),
    _case("TP2 + SP, packed", 2, DENSE + _depths(2), TP2, SEQUENCE, PACKED),
    _case("TP2 + SP, sampling masks", 2, DENSE + MASKED + _depths(2), TP2, SEQUENCE, PACKED),
    _case("PP2, sampling masks", 2, DENSE + MASKED + _depths(2), PP2),
    _case(
        "TP2 + SP, full recompute", 2, DENSE + UNTIED + _depths(1), TP2, SEQUENCE, "recompute=full"
    ),
    _case("PP2, tied", 2, DENSE + _depths(1), PP2),
    _case("PP2, untied, packed, K=2", 2, DENSE + UNTIED + _depths(2), PP2, PACKED),
    _case("PP2, full recompute", 2, DENSE + _depths(2), PP2, "recompute=full"),
    _case(
        "PP2, layout Ettt|tmmL",
        2,
        DENSE + UNTIED + _depths(2),
        PP2,
        "parallel.pipeline_layout=Et*3|tmmL",
    ),
    _case("PP2 x VPP2, tied", 2, DENSE + _depths(2), PP2, "parallel.virtual_pipeline=2"),
    _case(
        "PP2 x VPP2, coupled OCC",
        2,
        COUPLED + UNTIED + _depths(1),
        PP2,
        "parallel.virtual_pipeline=2",
    ),
    _case(
        "PP2 x VPP2, a chunk without layers",
        2,
        DENSE + _depths(2),
        PP2,
        "parallel.virtual_pipeline=2",
        "parallel.pipeline_layout=Ett|tt||mmL",
    ),
    _case(
        "PP2 x VPP2, MTP reads before the norm, a chunk without layers",
        2,
        DENSE + BEFORE + _depths(2),
        PP2,
        "parallel.virtual_pipeline=2",
        "parallel.pipeline_layout=Ett|tt||mmL",
    ),
    _case("TP2 + SP, MTP reads before the norm", 2, DENSE + BEFORE + _depths(2), TP2, SEQUENCE),
    _case("CP2, packed, MTP reads before the norm", 2, DENSE + BEFORE + _depths(2), CP2, PACKED),
    _case("CP2", 2, DENSE + _depths(2), CP2),
    _case("CP2, packed, K=3", 2, DENSE + UNTIED + _depths(3), CP2, PACKED),
    _case("CP2, packed, soft CE head", 2, SOFT_CE + _depths(2), CP2, PACKED),
    _case("CP2, packed, CISPO, tokens rejected", 2, CISPO + _depths(2), CP2, PACKED),
    _case("DP2, packed, SAPO, weights of sequences", 2, SAPO + _depths(2), PACKED),
    _case("CP2, full recompute", 2, DENSE + _depths(2), CP2, "recompute=full"),
    _case("DP2", 2, DENSE + _depths(2)),
    _case(
        "DP2, overlapped reduction, packed",
        2,
        DENSE + _depths(2),
        "parallel.overlap_grad_reduce=true",
        PACKED,
    ),
    _case(
        "DP2, distributed optimizer",
        2,
        DENSE + _depths(2),
        "parallel.distributed_optimizer=true",
        "parallel.overlap_grad_reduce=true",
    ),
    _case(
        "DP2, overlapped gathers, packed",
        2,
        DENSE + UNTIED + _depths(2),
        SPLIT,
        "parallel.overlap_param_gather=true",
        PACKED,
    ),
    _case(
        "PP2, no MTP training, overlapped reduction",
        2,
        ("mtp.preset=none", *UNTIED, *_depths(1)),
        PP2,
        "parallel.overlap_grad_reduce=true",
    ),
    _case("DP2, head alone, distributed optimizer", 2, HEAD + _depths(2), SPLIT),
    _case("TP2 + SP, head alone, packed", 2, HEAD + _depths(2), TP2, SEQUENCE, PACKED),
    _case("CP2, head alone, full recompute", 2, HEAD + _depths(2), CP2, "recompute=full"),
    _case("PP2, head alone, distributed optimizer", 2, HEAD + _depths(2), PP2, SPLIT),
    _case(
        "PP2 x VPP2, head alone",
        2,
        HEAD + UNTIED + _depths(1),
        PP2,
        "parallel.virtual_pipeline=2",
    ),
    _case(
        "PP3, head alone, MTP stage of its own",
        3,
        HEAD + UNTIED + _depths(2),
        "parallel.pipeline=3",
        "parallel.pipeline_layout=Et*4|mm|L",
    ),
    _case(
        "PP3, MTP reads before the norm, MTP stage of its own",
        3,
        DENSE + UNTIED + BEFORE + _depths(2),
        "parallel.pipeline=3",
        "parallel.pipeline_layout=Et*4|mm|L",
    ),
    _case(
        "PP3, head alone, MTP reads before the norm, MTP stage of its own",
        3,
        HEAD + UNTIED + BEFORE + _depths(2),
        "parallel.pipeline=3",
        "parallel.pipeline_layout=Et*4|mm|L",
    ),
    _case("MoE, EP2, head alone", 2, (*MOE[len(DENSE) :], *HEAD, *_depths(1)), "parallel.expert=2"),
    _case(
        "1 process, MoE, experts replayed, recompute", 1, REPLAYED + _depths(2), "recompute=full"
    ),
    _case(
        "MoE, EP2, experts replayed, packed", 2, REPLAYED + _depths(2), "parallel.expert=2", PACKED
    ),
    _case("MoE, TP2 + SP, experts replayed", 2, REPLAYED + _depths(2), TP2, SEQUENCE),
    _case(
        "MoE, PP2, experts replayed, packed, recompute",
        2,
        REPLAYED + _depths(2),
        PP2,
        PACKED,
        "recompute=full",
    ),
    _case(
        "MoE, PP2 x VPP2, experts replayed, recompute",
        2,
        REPLAYED + _depths(1),
        PP2,
        "parallel.virtual_pipeline=2",
        "recompute=full",
    ),
    _case(
        "MoE, TP2 + SP, experts replayed, recompute of experts",
        2,
        REPLAYED + _depths(2),
        TP2,
        SEQUENCE,
        "recompute=selective",
        "recompute_modules=[moe]",
    ),
    _case("MoE, TP2 + SP, experts of old log-probs", 2, TAKEN + _depths(2), TP2, SEQUENCE),
    _case("MoE, CP2, experts of old log-probs, packed", 2, TAKEN + _depths(2), CP2, PACKED),
    _case(
        "MoE, PP2 x VPP2, experts of old log-probs, first layers again",
        2,
        TAKEN + _depths(1),
        PP2,
        "parallel.virtual_pipeline=2",
        "recompute=full",
        "recompute_layers=1",
    ),
    _case(
        "MoE, PP3, experts replayed, MTP stage of its own",
        3,
        REPLAYED + UNTIED + _depths(2),
        "parallel.pipeline=3",
        "parallel.pipeline_layout=Etttt|mm|L",
        PACKED,
    ),
    _case(
        "1 process, MoE, balance loss, recompute, packed",
        1,
        BALANCED + _depths(2),
        "recompute=full",
        PACKED,
    ),
    _case("MoE, DP2, balance loss, packed", 2, BALANCED + _depths(2), SPLIT, PACKED),
    _case("MoE, EP2, balance loss", 2, BALANCED + _depths(2), "parallel.expert=2"),
    _case("MoE, TP2 + SP, balance loss", 2, BALANCED + _depths(2), TP2, SEQUENCE),
    _case("MoE, CP2, balance loss, packed", 2, BALANCED + _depths(2), CP2, PACKED),
    _case(
        "MoE, PP2, balance loss, packed, recompute",
        2,
        BALANCED + _depths(2),
        PP2,
        PACKED,
        "recompute=full",
    ),
    _case(
        "MoE, TP2 + SP, balance loss, recompute of experts",
        2,
        BALANCED + _depths(2),
        TP2,
        SEQUENCE,
        "recompute=selective",
        "recompute_modules=[moe]",
    ),
    _case(
        "MoE, CP2, balance loss, head alone",
        2,
        (*BALANCED[len(DENSE) :], *HEAD, *_depths(2)),
        CP2,
    ),
    _case(
        "MoE, TP2 x CP2 + SP, balance loss, packed",
        4,
        BALANCED + _depths(2),
        TP2,
        CP2,
        SEQUENCE,
        PACKED,
    ),
    _case("MoE, CP2, experts replayed, packed", 2, REPLAYED + _depths(2), CP2, PACKED),
    _case("MoE, EP2", 2, MOE + _depths(1), "parallel.expert=2"),
    _case("MoE, TP2 + SP, packed", 2, MOE + UNTIED + _depths(2), TP2, SEQUENCE, PACKED),
    _case("MLA, TP2", 2, MLA + _depths(1), TP2),
    _case("MLA, CP2, packed", 2, MLA + UNTIED + _depths(2), CP2, PACKED),
    _case(
        "PP3, MTP stage of its own",
        3,
        DENSE + UNTIED + _depths(2),
        "parallel.pipeline=3",
        "parallel.pipeline_layout=Et*4|mm|L",
    ),
    _case(
        "PP3, MTP stage of its own, tied, packed",
        3,
        DENSE + _depths(1),
        "parallel.pipeline=3",
        "parallel.pipeline_layout=Et*4|m|L",
        PACKED,
    ),
    _case("TP2 x PP2", 4, DENSE + _depths(2), TP2, PP2),
    _case("TP2 x PP2, MTP reads before the norm", 4, DENSE + BEFORE + _depths(2), TP2, PP2),
    _case("TP2 x CP2 + SP, packed", 4, DENSE + UNTIED + _depths(2), TP2, CP2, SEQUENCE, PACKED),
    _case("PP2 x CP2, packed", 4, DENSE + _depths(1), PP2, CP2, PACKED),
    _case(
        "DP2 x PP2, overlapped reduction",
        4,
        ("mtp.preset=detach", *UNTIED, *_depths(2)),
        PP2,
        "parallel.overlap_grad_reduce=true",
    ),
    _case(
        "MoE, TP2 x EP2 + SP",
        4,
        MOE + _depths(1),
        TP2,
        SEQUENCE,
        "parallel.expert=2",
        "parallel.expert_tensor=1",
    ),
    _case(
        "MoE, EP2, experts split over DP2, packed",
        4,
        MOE + _depths(1),
        "parallel.expert=2",
        "parallel.expert_tensor=2",
        PACKED,
    ),
    _case("MoE, PP2 x EP2, packed", 4, MOE + UNTIED + _depths(2), PP2, "parallel.expert=2", PACKED),
    _case("MLA, TP2 x PP2", 4, MLA + _depths(1), TP2, PP2),
)


def read(model: tuple[str, ...], layout: tuple[str, ...] = ()) -> Config:
    """Configuration of a model under a layout."""
    packed = any(item.startswith("rl.micro_batch_tokens") for item in layout)
    base = [item for item in _MODEL if not (packed and item.startswith("rl.micro_batch_size"))]
    return load_config([], [*base, *model, *layout])
