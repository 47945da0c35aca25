"""The shipped examples run as their docstrings say, and show what they claim."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import mtp_head
from megatron_occ.config import load_config, validate
from megatron_occ.data.prompt_stream import PromptStream
from megatron_occ.data.prompts import PromptOptions
from megatron_occ.data.tokenizers import build_tokenizer
from megatron_occ.rl.rewards import VerifierPool, register_verifier

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


# what it has to set up in TRL is no part of the page
LINES = {"occ_in_trl.py": 170}


def output(*command: str | Path) -> str:
    """Standard output of Python started in the repository root."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.name)
def test_examples_stay_short(script):
    assert len(script.read_text().splitlines()) < LINES.get(script.name, 85)


def test_the_losses_train_a_model_of_the_users_own():
    lines = re.findall(
        r"^step +(\d+)  reward (\S+)  lambda (\S+) (\S+)$",
        output(ROOT / "examples" / "losses_in_your_trainer.py"),
        re.MULTILINE,
    )
    rewards = [float(reward) for _, reward, *_ in lines]
    lambdas = [float(value) for line in lines for value in line[2:]]
    # a sixth of the tokens is right by chance
    assert rewards[0] < 0.35
    assert rewards[-1] > 0.9
    assert any(abs(value) > 0.01 for value in lambdas)


def test_the_audit_of_a_users_own_model_tells_noise_from_alignment():
    text = output(ROOT / "examples" / "audit_your_model.py")
    for metric in ("Euclidean metric", "Adam's metric"):
        table = text[text.index(metric) :].splitlines()
        row = next(line for line in table if line.startswith("policy, no ratio"))
        same, cross = (
            [float(number) for number in part.split(" ± ")]
            for part in re.findall(r"\S+ ± \S+", row)[:2]
        )
        # aligned, and less than one mini-batch says
        assert cross[0] > 3 * cross[1]
        assert cross[0] + 2 * cross[1] < same[0]
    assert text.splitlines()[-1].startswith(
        "Keep MTP's gradient out of the trunk (mtp.preset=detach): after 40 mini-batches"
    )


def test_occ_in_trl_trains_and_measures():
    pytest.importorskip("trl", reason="TRL is not in the development environment")
    code = "import sys; sys.path.insert(0, 'examples'); import occ_in_trl; occ_in_trl.main(15)"
    lines = re.findall(
        r"^update +\d+  reward (\S+)  losses: .* c/v2 (\S+) \+- (\S+)  lambda (\S+)  share (\S+)%$",
        output("-c", code),
        re.MULTILINE,
    )
    rewards = [float(reward) for reward, *_ in lines]
    assert rewards[-1] > rewards[0] + 0.1
    for _, raw, error, used, share in lines:
        raw, error, used, share = map(float, (raw, error, used, share))
        assert math.isfinite(raw) and (used == 0) == (share == 0)
        assert used == 0 or used == raw > 2 * error - 2e-3


class Decoder(torch.nn.Module):
    """What the MTP head asks of a model of transformers."""

    def __init__(self, head):
        super().__init__()
        self.embedding, self.output = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False)
        self.mtp = head(4)

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.output


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    model = Decoder(mtp_head.MTPHead)
    return model, torch.randn(2, 7, 4, requires_grad=True), torch.randint(5, (2, 7))


def test_the_mtp_head_predicts_from_two_tokens_before(decoder):
    model, hidden, ids = decoder
    found = mtp_head.mtp_logprobs(model, hidden, ids, 3, 0.5, train="trunk")
    for row in range(2):
        for place, t in enumerate((4, 5, 6)):
            state = model.mtp(hidden[row, t - 2], model.embedding(ids[row, t - 1]))
            expected = (model.output(state) / 0.5).log_softmax(-1)[ids[row, t]]
            assert found[row, place].item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("train", ["trunk", "head"])
def test_the_mtp_head_sends_its_gradient_one_way(decoder, train):
    model, hidden, ids = decoder
    mtp_head.mtp_logprobs(model, hidden, ids, 3, 1.0, train=train).sum().backward()
    trunk = mtp_head.trunk_parameters(model)
    assert len(trunk) == 2
    assert all((x.grad is not None) == (train == "trunk") for x in (hidden, *trunk))
    assert all((p.grad is not None) == (train == "head") for p in model.mtp.parameters())


def test_the_verifier_scores_the_share_of_equal_positions():
    lines = output(ROOT / "examples" / "own_verifier.py").splitlines()
    scores = [float(line.rpartition(" ")[2]) for line in lines[1:]]
    # of "aa.": itself, without the stop, first letter wrong, all wrong and too long, nothing
    assert scores == [1.0, 0.67, 0.67, 0.0, 0.0]


def test_the_verifier_works_in_the_pool_under_its_name(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    register_verifier("example_echo", "examples.own_verifier:echo")
    with VerifierPool() as pool:
        items = [("example_echo", text, "ab.") for text in ("ab.", "ab", "", "ab.d")]
        results = pool.score(items)
    assert [result.score for result in results] == pytest.approx([1.0, 2 / 3, 0.0, 0.75])
    assert all(result.status == "ok" for result in results)


def test_the_configuration_of_the_verifier_fits_its_data(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(["examples/own_verifier.yaml"])
    validate(config, command="rl")
    assert config.data.verifiers == {"echo": "examples.own_verifier:echo"}
    tokenizer = build_tokenizer("char", alphabet=config.tokenizer.alphabet)
    sets = []
    for split, path in (("train", config.data.prompts), ("validation", None)):
        source = path or config.data.validation_prompts
        options = PromptOptions(verifier=config.data.verifier)
        stream = PromptStream(source, 0, split, options)
        records = stream.prompts_for_step(0, stream.size)
        assert {record.task_name for record in records} == {"echo"}
        for record in records:
            ids = tokenizer.encode(record.prompt) + tokenizer.encode(record.answer)
            assert len(ids) + 1 <= config.model.max_position_embeddings
            assert record.prompt[:-1] + "." == record.answer
        sets.append({record.prompt for record in records})
    assert not sets[0] & sets[1]
    assert len(sets[0] | sets[1]) == 16


def test_data_files_are_one_object_a_line():
    for path in (ROOT / "examples" / "data").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            assert set(json.loads(line)) == {"prompt", "answer"}
