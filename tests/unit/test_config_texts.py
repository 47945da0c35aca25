"""Texts that a user writes for a missing value: refused by every key with texts."""

from __future__ import annotations

import json

import pytest
import yaml

from megatron_occ.config import Config, ConfigError, load_config, validate
from megatron_occ.config.keys import leaves
from megatron_occ.config.texts import text_problem

TEXTS = [
    leaf
    for leaf in leaves().values()
    if (leaf.item or leaf.kind) in (str, dict) and "choices" not in leaf.limits
]
CHOICES = [leaf for leaf in leaves().values() if "choices" in leaf.limits]
BY_KEY = pytest.mark.parametrize("leaf", TEXTS, ids=lambda leaf: leaf.key)


def values_with(leaf, text):
    """Values of a key's type that hold a text where the key reads texts."""
    alone = [text] if leaf.kind is str or leaf.or_text else []
    listed = [["a", text]] if leaf.kind is list else []
    mapped = [{"x": text}] if leaf.kind is dict else []
    return alone + listed + mapped


def nested(key, value):
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def test_every_key_with_texts_is_among_those_tried():
    known = {"run_dir", "rl.init_from", "model.from_hf", "data.corpus", "tokenizer.path"}
    known |= {"rl.rollout.server.urls", "data.prompts", "data.chat.kwargs"}
    assert known <= {leaf.key for leaf in TEXTS}
    assert {leaf.key for leaf in TEXTS} | {leaf.key for leaf in CHOICES} == {
        leaf.key for leaf in leaves().values() if (leaf.item or leaf.kind) in (str, dict)
    }


@BY_KEY
def test_a_word_for_null_is_refused_from_the_command_line(leaf):
    words = ["None", "none", "null", "NULL", "nil", "~", " None "]
    # of values that are passed on, others may be words: a chat template may have a choice none
    texts = ["None"] if leaf.reads == "values" else words
    for value in [value for text in texts for value in values_with(leaf, text)]:
        override = f"{leaf.key}={json.dumps(value)}"
        with pytest.raises(ConfigError) as error:
            load_config([], [override])
        assert str(error.value).startswith(f"override {override!r}: {leaf.key} = ")
        assert "a text, not a missing value" in str(error.value)
        remedy = "Use null" if leaf.nullable or leaf.reads == "values" else "Leave "
        assert remedy in str(error.value)


@BY_KEY
def test_a_word_for_null_is_refused_from_a_file_by_line(leaf, tmp_path):
    file = tmp_path / "a.yaml"
    for value in values_with(leaf, "None"):
        file.write_text(yaml.safe_dump(nested(leaf.key, value)))
        line = leaf.key.count(".") + 1
        with pytest.raises(ConfigError) as error:
            load_config([file])
        assert str(error.value).startswith(f"{file}:{line}: {leaf.key} = ")


@BY_KEY
@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_an_empty_or_blank_name_is_refused_and_a_text_may_be_one(leaf, text):
    for value in values_with(leaf, text):
        overrides = [f"{leaf.key}={json.dumps(value)}"]
        if leaf.reads in ("text", "values"):
            load_config([], overrides)
            continue
        with pytest.raises(ConfigError, match=f"{leaf.key} = .* text names nothing"):
            load_config([], overrides)


def test_texts_that_may_be_blank_are_those_passed_on_as_they_are():
    free = {"data.chat.system", "data.chat.suffix", "rl.rollout.stop"}
    assert {leaf.key for leaf in TEXTS if leaf.reads == "text"} == free
    kept = load_config([], ["data.chat.system=''", r'rl.rollout.stop=["\n\n"]'])
    assert (kept.data.chat.system, kept.rl.rollout.stop) == ("", ["\n\n"])


@pytest.mark.parametrize("word", ["null", "Null", "NULL", "~", ""])
def test_null_of_yaml_is_null(word):
    assert load_config([], [f"rl.init_from={word}"]).rl.init_from is None


@pytest.mark.parametrize("leaf", CHOICES, ids=lambda leaf: leaf.key)
def test_a_choice_called_none_stays_and_others_say_null(leaf):
    text = "none" if leaf.kind is str else ["none"]
    if "none" in leaf.limits["choices"]:
        load_config([], [f"{leaf.key}={json.dumps(text)}"])
        return
    with pytest.raises(ConfigError, match=r"must be (one|a list of any) of") as error:
        load_config([], [f"{leaf.key}={json.dumps(text)}"])
    assert str(error.value).endswith("Use null") == leaf.nullable


def test_numbers_that_may_be_null_say_so():
    with pytest.raises(ConfigError, match=r"must be an integer >= 1 and .* or null\. Use null$"):
        load_config([], ["data.max_prompt_tokens=None"])
    with pytest.raises(ConfigError, match=r"a list of numbers .* or null\. Use null$"):
        load_config([], ["mtp.trunk.clamp=[None, 1]"])
    with pytest.raises(ConfigError, match=r"must be an integer >= 1.*, not a string$"):
        load_config([], ["rl.steps=None"])


def test_a_word_of_a_chat_template_is_kept():
    given = load_config([], ["data.chat.kwargs={reasoning_effort: none}"])
    assert given.data.chat.kwargs == {"reasoning_effort": "none"}


def test_a_name_within_a_mapping_is_refused_at_any_depth():
    with pytest.raises(ConfigError, match=r"'None' in it is a text.*Use null, or leave it out"):
        load_config([], ["data.task.params={a: {b: [1, None]}}"])
    with pytest.raises(ConfigError, match="'none' in it is a text"):
        load_config([], ["data.prompts={none: 2, a.jsonl: 1}"])


def test_a_configuration_made_in_python_is_checked_too():
    config = Config()
    config.rl.init_from = "None"
    with pytest.raises(ConfigError, match=r"rl.init_from = 'None': a text.*Use null"):
        validate(config, command="rl")


@pytest.mark.parametrize(
    "leaf", [leaf for leaf in TEXTS if leaf.reads == "path"], ids=lambda leaf: leaf.key
)
def test_a_path_that_no_file_can_have_is_refused_in_one_short_sentence(leaf):
    for name, problem in (
        ("a" * 300, "at most 255 bytes, and one here has 300. Shorten it"),
        ("/".join(["ab"] * 1500), "at most 4095 bytes, and this one has 4499. Shorten it"),
        ("a\0b", "no file has a zero character in its name"),
    ):
        config = Config()
        section, _, field = leaf.key.rpartition(".")
        node = config
        for part in section.split(".") if section else ():
            node = getattr(node, part)
        setattr(node, field, name)
        with pytest.raises(ConfigError) as error:
            validate(config, command="rl")
        assert f"{leaf.key} = " in str(error.value)
        assert problem in str(error.value)
        assert len(str(error.value)) < 300


def test_lengths_of_paths_are_counted_in_bytes_and_end_with_the_limit():
    assert text_problem("é" * 127 + "a", "path", "") is None
    assert "has 256" in text_problem("é" * 128, "path", "")
    assert text_problem("/".join(["a" * 255] * 15), "path", "") is None  # 3839 bytes
