"""Sets by name, and the section ``eval``: what is taken over, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_occ.config import ConfigError, files_not_found, load_config, validate
from megatron_occ.config.evaluation import EvalSettings, eval_settings, set_title

TINY = Path(__file__).parents[2] / "conf" / "rl" / "tiny.yaml"
FILES = ("data.task={name: null, params: {}}", "tokenizer.alphabet=ab", "pretrain.steps=0")


def problems(*overrides, command="eval"):
    config = load_config([TINY], list(overrides))
    try:
        validate(config, command=command)
    except ConfigError as error:
        return error.problems
    return []


def test_null_is_what_rl_says():
    given = ["rl.validation={samples: 3, temperature: 0.5, problems: 7}"]
    given += ["rl.rollout={top_p: 0.7, top_k: 5, max_response_length: 9}"]
    config = load_config([TINY], given)
    taken_over = EvalSettings(3, 7, 0.5, 0.7, 5, 9, "rl.rollout.max_response_length")
    assert eval_settings(config) == taken_over
    # of a file all problems
    assert eval_settings(load_config([TINY], [*given, *FILES])).problems is None
    own = "eval={samples: 4, problems: 2, temperature: 0.0, top_p: 1.0, top_k: 0}"
    config = load_config([TINY], [*given, own, "eval.max_response_length=8"])
    assert eval_settings(config) == EvalSettings(
        4, 2, 0.0, 1.0, None, 8, "eval.max_response_length"
    )


@pytest.mark.parametrize(
    ("overrides", "what", "remedy"),
    [
        (["eval.max_response_length=16"], "eval.max_response_length=16: leaves no room", "raise"),
        (["eval={temperature: 0.0, top_p: 0.9}"], "eval.top_p=0.9: has no effect", "=null"),
        (["eval={temperature: 0.0, top_k: 3}"], "eval.top_k=3: has no effect", "eval.top_k=null"),
        (["eval={temperature: 0.0, samples: 2}"], "eval.samples=2: at temperature 0", "samples=1"),
        ([*FILES, "data.validation_prompts={}"], "data.validation_prompts={}: no file", "at least"),
        (
            [*FILES, "data.validation_prompts={a.jsonl: 2}"],
            "data.validation_prompts.a.jsonl=2: must be the file of the set 'a.jsonl'",
            "{name: file.jsonl}",
        ),
        (
            [*FILES, "data.validation_prompts={a/b: x.jsonl}"],
            "data.validation_prompts: 'a/b' is no name for a set",
            "{name: x.jsonl}",
        ),
        (
            [*FILES, "data.validation_prompts={average: x.jsonl}"],
            "data.validation_prompts.average=x.jsonl: is the column",
            "another name",
        ),
        ([*FILES], "data.validation_prompts=null: there is nothing to validate on", "Hold out"),
    ],
)
def test_what_is_refused(overrides, what, remedy):
    (message,) = problems(*overrides)
    assert message.startswith(what) and remedy in message


def test_sets_are_accepted_and_training_prompts_are_not_asked_for():
    sets = "data.validation_prompts={aime24: a.jsonl, math-500: b.parquet}"
    assert problems(*FILES, sets) == []
    (message,) = problems(*FILES, sets, command="rl")
    assert message.startswith("data.prompts=null")
    (message,) = problems("data.validation_prompts={a: x}")
    assert message.startswith("data.validation_prompts={a: 'x'}: data.task.name=reversed_addition")


def test_rl_checks_the_section_where_it_uses_it():
    long = "eval.max_response_length=16"
    assert problems(long, command="rl") == []
    (message,) = problems(long, "eval.after_rl=true", command="rl")
    assert message.startswith(long)


def test_files_of_sets_are_looked_for_by_value(tmp_path):
    there = tmp_path / "there.jsonl"
    there.touch()
    sets = f"data.validation_prompts={{a: {there}, b: gone.jsonl}}"
    assert files_not_found(load_config([TINY], [sets])) == ["data.validation_prompts=gone.jsonl"]


def test_a_set_is_called_by_its_name_or_what_it_comes_from():
    assert set_title(load_config([TINY], []), "") == "reversed_addition"
    alone = load_config([TINY], [*FILES, "data.validation_prompts=data/aime_2024.jsonl"])
    assert set_title(alone, "") == "aime_2024"
    assert set_title(alone, "x") == "x"
