"""The shipped cluster configurations train: a step each, of a model of toy size on one process.

What is left of them is what a user keeps: precision, recompute, packing, algorithm, regime.
"""

from __future__ import annotations

import math

import pytest

from tests.e2e.conftest import ROOT, metrics

CONF = ROOT / "conf" / "rl"
TOY = (
    "rl.init_from=null",
    "tokenizer={kind: char, path: null}",
    "data={prompts: null, validation_prompts: null, task: {name: reversed_addition}}",
    "pretrain.steps=0",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=48",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.kv_channels=8",
    "model.vocab_size=null",
    "model.max_position_embeddings=32",
    "parallel={tensor: 1, sequence: false, pipeline: 1, context: 1}",
    "rl.steps=1",
    "rl.prompts_per_step=8",
    "rl.samples_per_prompt=4",
    "rl.micro_batch_tokens=64",
    "rl.rollout.max_response_length=9",
    "rl.overlong.buffer=4",
    # before the first answer is right
    "rl.loss.entropy_coefficient=0.01",
    "rl.optimizer.warmup_steps=0",
    "rl.validation={every: 0, problems: 8, samples: 1}",
)
EXPERTS = (
    "model.moe={num_experts: 8, top_k: 2, ffn_hidden_size: 16, shared_ffn_hidden_size: 16}",
    "parallel={expert: 1, expert_tensor: null}",
)


@pytest.mark.parametrize("name", ["dapo_mimo_7b", "dapo_glm45_air"])
def test_a_shipped_recipe_trains(run, name):
    more = EXPERTS if "glm" in name else ()
    folder = run("rl", name, "mtp.preset=occ_decoupled", *TOY, *more, config=CONF / f"{name}.yaml")
    (line,) = metrics(folder, "rl")
    assert line["grad_norm/trunk"] > 0
    assert line["update/skipped"] == 0
    assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
