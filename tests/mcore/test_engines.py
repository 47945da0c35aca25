"""The engine that the configuration names: its settings, and what servers are tested with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_occ.config import load_config
from megatron_occ.data.prompt_stream import PromptStream
from megatron_occ.data.tasks import build_task
from megatron_occ.data.tokenizers import build_tokenizer
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.inference.engine import MegatronEngine
from megatron_occ.mcore.inference.graphs import CUDACapture
from megatron_occ.mcore.inference.rounding import Rounding
from megatron_occ.mcore.main_rank import MainRank
from megatron_occ.phases.engines import ProbeMaterial, build_engine, remote_settings

SERVED = ("rl.rollout.engine=sglang", "rl.rollout.server.urls=['http://a:1','http://b:1']")
TASK = build_task("reversed_multiplication")
TOKENIZER = build_tokenizer("char", alphabet=TASK.alphabet)


def build(layout, *overrides):
    config = load_config([], ["model.num_layers=1", *overrides])
    return MegatronGPTActor(
        config, TOKENIZER.vocab_size, layout, optimizer=config.rl.optimizer, total_updates=1
    )


def test_settings_are_those_of_the_configuration(monkeypatch):
    given = {
        "timeout": 7.0,
        "update_timeout": 8.0,
        "retries": 1,
        "concurrency": 3,
        "gap_mean": 0.01,
        "gap_max": 0.5,
        "draft_share": 0.25,
        "require_seeds": False,
    }
    keys = [f"rl.rollout.server.{key}={str(value).lower()}" for key, value in given.items()]
    settings = remote_settings(load_config([], [*SERVED, *keys, "run_dir=some/run"]), 17)
    assert {key: getattr(settings, key) for key in given} == given
    assert settings.server == "sglang" and settings.urls == ("http://a:1", "http://b:1")
    assert settings.weights_dir == Path.cwd() / "some" / "run" / "rollout_weights"
    assert settings.vocab_size == 17 and settings.api_key is None
    assert settings.transfer == "folder"
    network = ["rl.rollout.engine=vllm", "rl.rollout.server.transfer=network"]
    assert remote_settings(load_config([], [*SERVED, *network]), 17).transfer == "network"
    monkeypatch.setenv("ROLLOUT_API_KEY", "word")
    other = ["model.vocab_size=20", "rl.rollout.server.weights_dir=/shared"]
    settings = remote_settings(load_config([], [*SERVED, *other]), 17)
    assert settings.vocab_size == 20 and settings.api_key == "word"
    assert settings.weights_dir == Path("/shared") and "word" not in repr(settings)


def test_the_embedded_engine_is_the_default(layout):
    actor = build(layout, "rl.rollout.batch_size=5")
    engine = build_engine(actor.config, actor, TOKENIZER, PromptStream(TASK))
    assert isinstance(engine, MegatronEngine) and engine.slots == 5


@pytest.mark.parametrize(
    ("device", "keys", "captures"),
    [
        ("cpu", (), False),
        ("cuda", (), True),
        ("cuda", ("rl.rollout.cuda_graphs=false",), False),
        ("cuda", ("parallel.tensor=2",), False),
        ("cuda", ("model.moe.num_experts=4",), False),
    ],
)
def test_cycles_are_captured_on_a_gpu_where_they_can_be(layout, device, keys, captures):
    actor = build(layout)
    actor.layout = replace(layout, device=torch.device(device))
    config = load_config([], ["model.num_layers=1", *keys])
    engine = build_engine(config, actor, TOKENIZER, PromptStream(TASK))
    assert engine.capture is (CUDACapture if captures else None)


def test_the_engine_rounds_what_the_configuration_says(layout):
    actor = build(layout)
    given = ["precision=bf16", "model.num_layers=3", "fp8.format=e4m3", "fp8.scaling=block"]
    for more, rounding in (
        ((), None),
        (("rl.rollout.fp8=true", "fp8.first_layers_bf16=1"), Rounding(128, range(2, 4))),
    ):
        config = load_config([], [*given, *more])
        assert build_engine(config, actor, TOKENIZER, PromptStream(TASK)).rounding == rounding


def one_token_prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "1", "answer": "1"}\n{"prompt": "23*4", "answer": "92"}\n')
    return PromptStream(file)


@pytest.mark.parametrize("source", ["task", "file"])
def test_a_probe_has_the_present_weights_logprobs_of_prompts(layout, tmp_path, source):
    prompts = PromptStream(TASK) if source == "task" else one_token_prompts(tmp_path)
    actor = build(layout)
    material = ProbeMaterial(actor, MainRank(), TOKENIZER, prompts)
    probe = material.probe()
    assert len(probe.sequences) == 16 and len(probe.draft_prompts) <= 4
    assert all(prompt in [s[1:] for s in probe.sequences] for prompt in probe.draft_prompts)
    for shift in (0.0, 0.1):
        with torch.no_grad():
            next(iter(actor.chunks[0].parameters())).add_(shift)
        material.score()
        found = probe.reference(probe.sequences)
        for tokens, row in zip(probe.sequences, found, strict=True):
            ids = torch.tensor([tokens])
            alone = actor.get_inference_log_probs(ids, parts=[[0]], lengths=None, temperature=1.0)
            assert row == pytest.approx(alone[0, :-1].tolist(), abs=1e-5)


def test_a_probe_fits_the_positions_of_the_model(layout, tmp_path):
    actor = build(layout, "model.max_position_embeddings=12", "rl.rollout.max_response_length=4")
    probe = ProbeMaterial(actor, MainRank(), TOKENIZER, one_token_prompts(tmp_path)).probe()
    assert probe.draft_tokens == 4
    # the check of sampling takes eight tokens
    assert max(map(len, probe.draft_prompts)) + 8 <= 12
    assert all(len(tokens) >= 2 for tokens in probe.sequences)
