"""The shipped examples run as their docstrings say, and show what they claim."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_occ.config import load_config, validate
from megatron_occ.data.prompts import PromptStream
from megatron_occ.data.tokenizers import build_tokenizer
from megatron_occ.rl.rewards import VerifierPool, register_verifier

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def output(script: Path) -> str:
    """Standard output of a script started in the repository root."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.name)
def test_examples_stay_short(script):
    assert len(script.read_text().splitlines()) < 85


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
        stream = PromptStream(source, 0, split, default_task_name=config.data.verifier)
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
