"""The embedded engine on imported weights against transformers: it has rotary tables of its own."""

from __future__ import annotations

import pytest
import torch

from megatron_occ.mcore.inference.engine import MegatronEngine, Speculation
from megatron_occ.mcore.provider import build_inference_chunk
from megatron_occ.rollout import Request, SamplingSettings
from tests.mcore.conftest import random_ids
from tests.mcore.convert_folders import load_model, make_folder
from tests.mcore.test_convert_families import convert, load

LIMIT = 40


@pytest.mark.parametrize("name", ["llama 3.1", "glm flash", "qwen3 moe"])
def test_responses_have_the_logprobs_of_transformers(layout, tmp_path, name):
    folder = make_folder(tmp_path / "hf", name)
    config = convert(folder, tmp_path / "mcore", "init:1")
    (chunk,) = load(tmp_path / "mcore", config, layout).chunks
    copy = build_inference_chunk(chunk, config)
    engine = MegatronEngine(
        lambda: [copy.refresh()], layout, slots=2, speculation=Speculation(1), decode=str
    )
    prompts = [random_ids(1, 5, seed=i)[0].tolist() for i in range(2)]
    requests = [Request(prompt, 100 + i, None) for i, prompt in enumerate(prompts)]
    found = engine.generate(requests, SamplingSettings(1.0, LIMIT, stop_ids=()))
    reference = load_model(folder)
    for prompt, tokens, logprobs in zip(prompts, found.tokens, found.logprobs, strict=True):
        assert len(tokens) == LIMIT
        ids = torch.tensor([prompt + tokens])
        with torch.no_grad():
            expected = reference(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        expected = expected.gather(-1, torch.tensor(tokens).unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-5, rtol=1e-5)
