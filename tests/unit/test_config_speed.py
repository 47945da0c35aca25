"""Keys of speed and memory: what can't act is refused with key, value and remedy."""

from __future__ import annotations

import pytest
import torch

from megatron_occ.config.recompute import MODULES
from megatron_occ.config.validate_optimizer import LARGEST_DECAY
from tests.unit.test_config_layouts import MLA, MOE, problems

SELECTIVE = "recompute=selective"
FP8 = "precision=bf16 fp8.format=hybrid model.hidden_size=64 model.ffn_hidden_size=64"
ROUNDED = "rl.rollout.fp8=true"

SPLIT = "parallel.distributed_optimizer=true"
LOW = f"parallel.moments_dtype=bf16 {SPLIT}"
HOST = f"parallel.optimizer_offload=0.5 {SPLIT}"

# overrides, start of the one message, remedy
REFUSED = [
    ("attention_backend=flash", "attention_backend=flash: these kernels", "precision=bf16, or att"),
    ("attention_backend=fused", "attention_backend=fused: these kernels", "attention_backend=auto"),
    (
        "parallel.grad_reduce_dtype=bf16",
        "parallel.grad_reduce_dtype=bf16: gradients are summed",
        "Give precision=bf16, or parallel.grad_reduce_dtype=fp32",
    ),
    (
        "parallel.moments_dtype=bf16",
        "parallel.moments_dtype=bf16: Megatron-Core has it in its distributed optimizer alone",
        "Give parallel.distributed_optimizer=true, or parallel.moments_dtype=fp32",
    ),
    (
        f"{LOW} rl.optimizer.beta2=0.999",
        "rl.optimizer.beta2=0.999: in bf16 rounding undoes such a decay",
        "Give at most 0.992, or parallel.moments_dtype=fp32",
    ),
    (
        f"{LOW} pretrain.optimizer.beta1=0.997",
        "pretrain.optimizer.beta1=0.997: in bf16 rounding undoes such a decay",
        "Give at most 0.992, or parallel.moments_dtype=fp32",
    ),
    (
        "parallel.optimizer_offload=0.5 precision=bf16",
        "parallel.optimizer_offload=0.5: the ranks would each update the whole model",
        "Give parallel.distributed_optimizer=true, or parallel.optimizer_offload=0",
    ),
    (
        HOST,
        "parallel.optimizer_offload=0.5: Megatron-Core takes main weights of 16-bit",
        "Give precision=bf16, or parallel.optimizer_offload=0",
    ),
    (
        f"{LOW} {HOST} precision=bf16",
        "parallel.moments_dtype=bf16: with parallel.optimizer_offload=0.5 torch's Adam",
        "Give parallel.moments_dtype=fp32, or parallel.optimizer_offload=0",
    ),
    (
        f"parallel.token_dispatcher=flex {MOE}",
        "parallel.token_dispatcher=flex: no other rank has experts",
        "Give parallel.expert=2 or more",
    ),
    (SELECTIVE, "recompute_modules=[]: recompute=selective has nothing", "recompute=full or none"),
    (
        f"{SELECTIVE} recompute_modules=[mlp,mlp]",
        "recompute_modules=['mlp', 'mlp']: names a module twice",
        "Leave one out",
    ),
    (
        f"{SELECTIVE} recompute_modules=[mla_up_proj]",
        "recompute_modules=['mla_up_proj']: the model has no mla_up_proj",
        "give model.mla.enabled=true",
    ),
    (
        f"{SELECTIVE} recompute_modules=[layernorm]",
        "recompute_modules=['layernorm']: the model has no layernorm of its own",
        "give model.moe.num_experts or model.mla.enabled=true",
    ),
    (
        f"{SELECTIVE} {MOE} recompute_modules=[mlp]",
        "recompute_modules=['mlp']: the model has no mlp",
        "give model.moe.first_dense_layers above 0",
    ),
    (
        f"{SELECTIVE} recompute_modules=[moe]",
        "recompute_modules=['moe']: the model has no moe",
        "give model.moe.num_experts",
    ),
    (
        f"{SELECTIVE} {MOE} recompute_modules=[shared_experts]",
        "recompute_modules=['shared_experts']: the model has no shared_experts",
        "give model.moe.shared_ffn_hidden_size",
    ),
    (
        f"{SELECTIVE} {MOE} recompute_modules=[moe,moe_act]",
        "recompute_modules=['moe', 'moe_act']: moe holds moe_act already",
        "Leave moe_act out",
    ),
    (
        f"{SELECTIVE} attention_backend=local recompute_modules=[core_attn]",
        "recompute_modules=['core_attn']: attention_backend=local keeps nothing",
        "attention_backend=unfused",
    ),
    (
        f"{SELECTIVE} {FP8} {MOE} recompute_modules=[moe_act]",
        "recompute_modules=['moe_act']: fp8.scaling=delayed",
        "fp8.scaling=current or block",
    ),
    (
        f"{FP8} {ROUNDED}",
        "rl.rollout.fp8=true: fp8.scaling=delayed rounds by the scales of earlier passes",
        "Give fp8.scaling=current or block, or rl.rollout.fp8=false",
    ),
    (
        f"{FP8} {ROUNDED} fp8.scaling=current {MOE}",
        "rl.rollout.fp8=true: rollouts of model.moe.num_experts=8 run experts",
        "Give rl.rollout.fp8=false",
    ),
    (
        "recompute=full recompute_layers=3",
        "recompute_layers=3: no model chunk has more than 2 transformer layers",
        "Give at most 2, or null",
    ),
    (
        "recompute=full parallel.pipeline=2 recompute_layers=2 mtp.num_layers=1",
        "recompute_layers=2: no model chunk has more than 1 transformer layer.",
        "Give at most 1, or null",
    ),
]
ACCEPTED = [
    "parallel.grad_reduce_dtype=bf16 precision=bf16",
    LOW,
    f"{LOW} precision=bf16 rl.optimizer.beta2=0.992",
    # without the phase that it is of
    f"{LOW} pretrain.optimizer.beta2=0.999 rl.init_from=c",
    f"{HOST} precision=bf16 rl.optimizer.beta2=0.999",
    f"parallel.token_dispatcher=alltoall {MOE}",
    "attention_backend=flash precision=bf16",
    "attention_backend=unfused",
    f"{SELECTIVE} recompute_modules=[mlp]",
    f"{SELECTIVE} recompute_modules=[core_attn]",
    f"{SELECTIVE} {MLA} model.num_query_groups=null recompute_modules=[mla_up_proj,layernorm]",
    f"{SELECTIVE} {MOE} recompute_modules=[moe,layernorm]",
    f"{SELECTIVE} {FP8} fp8.scaling=current {MOE} recompute_modules=[moe_act]",
    "recompute=full recompute_layers=2",
    f"{FP8} {ROUNDED} fp8.scaling=current",
    f"{FP8} {ROUNDED} fp8.scaling=current {MLA} model.num_query_groups=null",
    f"{FP8} {ROUNDED} fp8.scaling=block model.hidden_size=128 model.ffn_hidden_size=128",
]


@pytest.mark.parametrize(("given", "start", "remedy"), REFUSED)
def test_what_can_not_act_is_refused(given, start, remedy):
    (message,) = problems(given, ranks=2 if "pipeline=2" in given else 1)
    assert message.startswith(start)
    assert remedy in message


@pytest.mark.parametrize("given", ACCEPTED)
def test_what_can_act_is_accepted(given):
    assert problems(given) == []


def test_a_module_that_megatron_does_not_know_is_refused_with_those_it_knows():
    (message,) = problems(f"{SELECTIVE} recompute_modules=[attention]")
    assert f"a list of any of {', '.join(MODULES)}" in message


def test_decays_that_are_refused_in_bf16_are_those_that_rounding_can_undo():
    numbers = torch.arange(128, dtype=torch.float64) / 128 + 1

    def stops_at(beta):
        """Where second moments end that fall towards 1, rounded at each update."""
        moments = 16 * numbers
        for _ in range(3000):
            moments = (beta * moments + (1 - beta)).bfloat16().double()
        return moments.max()

    assert stops_at(0.95) < 1.1
    assert stops_at(0.992) <= stops_at(LARGEST_DECAY) <= 2
    assert stops_at(0.996) > 8
