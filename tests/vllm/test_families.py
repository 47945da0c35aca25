"""RL on a real vLLM with models of other families than MiMo: experts, latent attention, depths."""

from __future__ import annotations

import statistics

import pytest

from tests.e2e.conftest import metrics, read_lines
from tests.vllm.conftest import MODEL, MTP, VllmProcess, at, train

SIGMOID = (
    "model.moe.num_experts=4",
    "model.moe.ffn_hidden_size=64",
    "model.moe.shared_ffn_hidden_size=64",
    "model.moe.first_dense_layers=1",
    "model.moe.score_function=sigmoid",
    "model.moe.expert_bias=true",
    "model.moe.scaling_factor=1.5",
)
# vLLM's kernel for latent attention on the CPU is made for latents of this width alone
LATENT = (
    "model.mla.enabled=true",
    "model.mla.kv_lora_rank=512",
    "model.mla.qk_rope_head_dim=64",
    "model.mla.qk_head_dim=32",
    "model.mla.v_head_dim=64",
    "model.mla.q_lora_rank=32",
    "model.num_query_groups=null",
    "model.qk_layernorm=true",
    "model.norm_epsilon=1e-6",
)
# where the CPU has AMX, it would take another one, for bf16 alone
REFERENCE = {"attention_backend": "CPU_MLA"}
FAMILIES = {
    "mimo, two depths": (("mtp.num_layers=2",), MTP, ()),
    "qwen3 moe": (
        ("model.qk_layernorm=true", "model.moe.num_experts=4", "model.moe.ffn_hidden_size=64"),
        None,
        (),
    ),
    "glm": ((*SIGMOID, "model.rotary_percent=0.5"), MTP, ()),
    "deepseek": (
        (*SIGMOID, *LATENT),
        MTP | REFERENCE,
        ("--attention-backend", REFERENCE["attention_backend"]),
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_five_steps(run, tmp_path, capsys, name):
    settings, drafting, more = FAMILIES[name]
    model = (*MODEL, *settings)
    checkpoint, exported = train(tmp_path, 100, *model)
    server = VllmProcess(exported, tmp_path / "server.log", drafting, more)
    try:
        server.wait()
        start = (f"rl.init_from={checkpoint}", "rl.steps=5", "rl.optimizer.lr=1e-3")
        folder = run("rl", "served", *start, *at(server, model=model))
    finally:
        server.kill()
    lines = metrics(folder, "rl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    mean, largest = (max(x[f"logprob_gap/{kind}"] for x in lines) for kind in ("mean", "max"))
    assert mean < 1e-5 and largest < 1e-3
    lengths = [line.get("draft/acceptance_length", 1.0) for line in lines]
    assert min(lengths) > 1.1 or drafting is None
    timed = read_lines(folder / "metrics.jsonl")
    seconds = statistics.median(x["time/step"] for x in timed if x["phase"] == "rl")
    with capsys.disabled():
        print(
            f"\n{name}: log-prob gap {mean:.1e} on average, {largest:.1e} at most, acceptance "
            f"length {lengths[0]:.2f} to {lengths[-1]:.2f}, {seconds:.2f} s a step"
        )
