"""``data.verifiers``: names and paths are checked before anything is imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_occ.config import ConfigError, load_config, to_yaml, validate

TINY = Path(__file__).parents[2] / "conf" / "rl" / "tiny.yaml"
# a generated task has its own verifier, so the problems come from files
FILES = [
    "data={task: {name: null, params: {}}, prompts: p.jsonl, validation_prompts: v.jsonl}",
    "tokenizer.alphabet=ab",
    "pretrain.steps=0",
]


def test_names_and_paths_are_read_from_files_and_overrides(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("data:\n  verifiers:\n    unit: my.module:check\n")
    config = load_config([TINY, path], [*FILES, "data.verifiers.other-1=m:Scores.exact"])
    validate(config, command="rl")
    assert config.data.verifiers == {"unit": "my.module:check", "other-1": "m:Scores.exact"}
    saved = tmp_path / "b.yaml"
    saved.write_text(to_yaml(config))
    assert load_config([saved]) == config


@pytest.mark.parametrize(
    ("verifiers", "message"),
    [
        ("{unit: checks.py}", "must be 'module:function'"),
        ("{unit: 'my/checks:f'}", "must be 'module:function'"),
        ("{unit: 'm:f()'}", "must be 'module:function'"),
        ("{unit: 'm: f'}", "must be 'module:function'"),
        ("{unit: 3}", "data.verifiers.unit=3"),
        ("{unit: null}", "data.verifiers.unit=null"),
        ("{'a:b': 'm:f'}", "Rename it"),
        ("{'': 'm:f'}", "Rename it"),
    ],
)
@pytest.mark.parametrize("command", ["rl", "eval"])
def test_malformed_ones_are_refused(verifiers, message, command):
    config = load_config([TINY], [*FILES, f"data.verifiers={verifiers}"])
    with pytest.raises(ConfigError) as refused:
        validate(config, command=command)
    assert len(refused.value.problems) == 1
    assert message in str(refused.value)
