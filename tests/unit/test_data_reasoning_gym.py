"""Tasks of reasoning-gym: wiring with a package of the same shape, safety with the real one."""

from __future__ import annotations

import ast
import inspect
import json
import sys
import textwrap

import pytest

from megatron_occ.data import CharTokenizer, PromptStream, build_task
from megatron_occ.data.corpus import TaskCorpus
from megatron_occ.data.from_config import read_task
from megatron_occ.data.tasks import UnknownTask
from megatron_occ.data.tasks.reasoning_gym import READ_VERSION, REFUSED
from megatron_occ.rl.rewards import VerifierPool, get_verifier
from megatron_occ.rl.rewards.reasoning_gym import _task
from tests.unit.rl_setup import rl_config

FAKE = """
import random
from dataclasses import dataclass

@dataclass
class Config:
    low: int = 10
    seed: int = 0
    size: int = 500

class Adding:
    def __init__(self, config):
        assert config.low >= 0, "low must not be negative"
        self.config = config
    def __len__(self):
        return self.config.size
    def __getitem__(self, index):
        if index >= self.config.size:
            raise IndexError(index)
        rng = random.Random(self.config.seed + index)
        a, b = (rng.randrange(self.config.low, 100) for _ in range(2))
        return {"question": f"{a}+{b}?", "answer": str(a + b), "metadata": {"sum": a + b}}
    def score_answer(self, answer, entry):
        if answer == "hang":
            while True:
                pass
        return max(0.0, 1 - abs(int(answer) - entry["metadata"]["sum"]) / 4)

class Mute(Adding):
    def __getitem__(self, index):
        return {**super().__getitem__(index), "answer": None}

class Same(Adding):
    def __getitem__(self, index):
        return {"question": "1+1?", "answer": "2", "metadata": {"sum": 2}}

DATASETS = {"adding": Adding, "mute": Mute, "same": Same, "countdown": Adding}
"""
CREATE = """
from reasoning_gym.factory import DATASETS, Config
def create_dataset(name, **params):
    return DATASETS[name](Config(**params))
"""


@pytest.fixture
def forget(monkeypatch):
    """No trace of a package reasoning_gym, before and after."""

    def clear() -> None:
        _task.cache_clear()
        for name in [name for name in sys.modules if name.split(".")[0] == "reasoning_gym"]:
            del sys.modules[name]

    saved = {name: module for name, module in sys.modules.items() if "reasoning_gym" in name}
    clear()
    yield
    clear()
    sys.modules.update({name: module for name, module in saved.items() if name not in sys.modules})


@pytest.fixture
def fake(forget, tmp_path, monkeypatch):
    """A package on the search path, which verifier processes inherit; returns its metadata."""
    package, metadata = tmp_path / "reasoning_gym", tmp_path / "reasoning_gym-1.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text(CREATE)
    (package / "factory.py").write_text(FAKE)
    written = metadata / "METADATA"
    written.write_text(f"Metadata-Version: 2.1\nName: reasoning-gym\nVersion: {READ_VERSION}\n")
    monkeypatch.syspath_prepend(tmp_path)
    return written


def test_problems_are_those_of_the_dataset_and_a_function_of_split_and_index(fake):
    task = build_task("reasoning_gym:adding", seed=3, low=20)
    again = build_task(task.name, **task.params())
    for split in ("train", "validation"):
        forward = [task.problem(split, index) for index in range(30)]
        assert [again.problem(split, index) for index in reversed(range(30))] == forward[::-1]
        for problem in forward:
            a, b = map(int, problem.prompt.removesuffix("?\n").split("+"))
            assert min(a, b) >= 20 and problem.solution == str(a + b)
            assert problem.task_name == "reasoning_gym"
            assert json.loads(problem.answer)["answer"] == problem.solution
    assert task.alphabet == "\n+0123456789?"
    assert task.stop == ""


def test_a_question_is_in_one_split_though_it_comes_at_many_positions(fake):
    # 8,100 questions at a million positions: each comes again, also under other seeds
    held_out = [
        build_task("reasoning_gym:adding", seed=seed).problem("validation", index).prompt
        for seed in (0, 1)
        for index in range(5)
    ]
    task = build_task("reasoning_gym:adding")
    held_out += [task.problem("validation", index).prompt for index in range(600)]
    assert len(set(held_out[10:])) == 600
    for seed in (0, 1):
        train = build_task("reasoning_gym:adding", seed=seed)
        drawn = {train.problem("train", index).prompt for index in range(5000)}
        assert len(drawn) > 3000
        assert not drawn & set(held_out)
    with pytest.raises(ValueError, match=r"validation problem 3000 .* only [78]\d\d held-out"):
        task.problem("validation", 3000)


def test_a_dataset_with_too_few_questions_ends_in_an_error(fake):
    task = build_task("reasoning_gym:same", size=3)
    with pytest.raises(ValueError, match=r"held-out|held out"):
        task.problem("validation", 1)


def test_verifier_process_scores_by_the_dataset_with_partial_credit(fake):
    problem = build_task("reasoning_gym:adding", seed=5).problem("train", 7)
    right = int(problem.solution)
    responses = (str(right), f" {right}\n", str(right + 1), "no number")
    tagged = f"3 no <answer>4</answer> rather <answer> {right} </answer> done"
    items = [("reasoning_gym", text, problem.answer) for text in (*responses, tagged)]
    with VerifierPool(timeout_seconds=30) as pool:
        results = pool.score(items)
        refused = problem.answer.replace("adding", "countdown")
        other = problem.answer.replace('"position": ', '"position": 1')
        changed = problem.answer.replace('"sha256": "', '"sha256": "0')
        references = (refused, other, changed, "17")
        broken = pool.score([("reasoning_gym", "1", text) for text in references])
    assert [result.score for result in results] == [1.0, 1.0, 0.75, 0.0, 1.0]
    assert [result.status for result in results] == ["ok", "ok", "ok", "error", "ok"]
    assert [result.status for result in broken] == ["error"] * 4
    expected = ("parse_expr", "IndexError", "another problem", "not the answer")
    for result, text in zip(broken, expected, strict=True):
        assert text in result.detail


def test_verifier_that_hangs_is_ended(fake):
    problem = build_task("reasoning_gym:adding").problem("train", 0)
    with VerifierPool(timeout_seconds=30) as pool:
        pool.score([("reasoning_gym", "1", problem.answer)])
        pool._timeout = 0.2
        hung = pool.score([("reasoning_gym", "hang", problem.answer)])
    assert (hung[0].score, hung[0].status) == (0.0, "timeout")


def test_stream_and_corpus_take_the_task(fake):
    task = build_task("reasoning_gym:adding")
    tokenizer = CharTokenizer(task.alphabet)
    record = PromptStream(task).prompts_for_step(0, 1)[0]
    problem = task.problem("train", 0)
    assert (record.prompt, record.task_name) == (problem.prompt, "reasoning_gym")
    assert get_verifier(record.task_name)(problem.solution, record.answer) == 1.0
    ids, mask = TaskCorpus(task, tokenizer).batch(0, 1, 16)
    text = problem.prompt + problem.solution
    assert ids[0, : len(text) + 1].tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
    assert mask.sum() == len(problem.solution) + 1
    silent = build_task("reasoning_gym:mute")
    with pytest.raises(ValueError, match="reasoning_gym:mute has problems without a solution"):
        TaskCorpus(silent, tokenizer).batch(0, 1, 16)


@pytest.mark.parametrize(
    ("name", "params", "key", "message"),
    [
        ("addin", "{}", "name", "did you mean 'adding'"),
        ("countdown", "{}", "name", "refused: .* parse_expr, which calls eval"),
        ("adding", "{lo: 2}", "params", "lo"),
        ("adding", "{low: -1}", "params", "low must not be negative"),
        ("adding", "{seed: -1}", "params", "seed must be at least 0, got -1"),
        ("adding", "{size: 0}", "params", "size must be at least 1, got 0"),
    ],
)
def test_bad_names_and_parameters_are_refused(fake, name, params, key, message):
    config = rl_config(f"data.task={{name: 'reasoning_gym:{name}', params: {params}}}")
    with pytest.raises(ValueError, match=rf"data\.task\.{key}: .*{message}"):
        read_task(config)


def test_another_version_is_refused(fake):
    fake.write_text("Metadata-Version: 2.1\nName: reasoning-gym\nVersion: 9.1\n")
    with pytest.raises(UnknownTask, match=rf"9\.1 is installed, .* {READ_VERSION} are known"):
        build_task("reasoning_gym:adding")


def test_missing_package_is_an_error_that_names_the_extra(forget, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UnknownTask, match=r"pip install megatron-occ\[reasoning\]"):
        build_task("reasoning_gym:chain_sum")


# These run code too, but never a response: the problem's own expression (bitwise_arithmetic), the
# reference (number_sorting), or the package's parser of that name (propositional_logic).
_RUN_NO_RESPONSE = {"bitwise_arithmetic", "number_sorting", "propositional_logic"}
_RUNNERS = {"eval", "exec", "parse_expr", "sympify", "S", "compile", "__import__"}


def called_names(function: object) -> set[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {call.id if isinstance(call, ast.Name) else getattr(call, "attr", "") for call in calls}


def reached(dataset: type) -> set[str]:
    """Names called by ``score_answer``, and by what it calls of its class and module."""
    module, seen, waiting = sys.modules[dataset.__module__], set(), ["score_answer"]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        found = getattr(dataset, name, None) or getattr(module, name, None)
        if inspect.isfunction(found) and found.__module__.startswith("reasoning_gym"):
            waiting.extend(called_names(found))
    return seen


def test_every_verifier_of_the_real_package_that_runs_a_response_is_refused():
    pytest.importorskip("reasoning_gym")
    from reasoning_gym.factory import DATASETS

    runners = {name for name, (found, _) in DATASETS.items() if reached(found) & _RUNNERS}
    refused = {name for name, reason in REFUSED.items() if "eval()" in reason}
    assert runners - _RUN_NO_RESPONSE == refused - {"composite"}


@pytest.mark.parametrize("name", ["chain_sum", "path_star", "spell_backward", "maze"])
def test_tasks_of_the_real_package_score_their_own_answers(name):
    pytest.importorskip("reasoning_gym")
    task = build_task(f"reasoning_gym:{name}")
    for split in ("train", "validation"):
        problem = task.problem(split, 3)
        assert get_verifier("reasoning_gym")(problem.solution, problem.answer) == 1.0
        assert get_verifier("reasoning_gym")("???", problem.answer) < 1.0
