"""Character and Hugging Face tokenizers."""

from __future__ import annotations

import json

import pytest

from megatron_occ.config import load_config
from megatron_occ.data import CharTokenizer, build_task, build_tokenizer
from megatron_occ.data.from_config import read_stops


def test_characters_follow_pad_and_eos():
    tokenizer = CharTokenizer("0a=")
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 5)
    assert tokenizer.encode("a=0a") == [3, 4, 2, 3]
    assert tokenizer.decode([3, 4, 2, 1, 0, 0]) == "a=0"
    assert tokenizer.encode("") == []
    assert tokenizer.encode_batch(["a", "", "=0"]) == [[3], [], [4, 2]]
    assert json.loads(json.dumps(tokenizer.state())) == {"kind": "char", "alphabet": "0a="}


def test_unknown_character_is_named_with_its_position():
    with pytest.raises(ValueError, match="character 'x' at position 2 "):
        CharTokenizer("01").encode("01x1")


def test_an_id_outside_the_vocabulary_shows_in_the_text():
    assert CharTokenizer("01").decode([2, 4, 3, -1]) == "0\ufffd1\ufffd"


@pytest.mark.parametrize(("alphabet", "message"), [("", "empty"), ("0120", "repeats '0'")])
def test_bad_alphabets_are_refused(alphabet, message):
    with pytest.raises(ValueError, match=message):
        CharTokenizer(alphabet)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("word", {}, "unknown tokenizer kind 'word'"),
        ("char", {}, "takes alphabet"),
        ("char", {"alphabet": "01", "path": "x"}, "takes alphabet"),
        ("hf", {"alphabet": "01"}, "takes path"),
        ("hf", {"path": "nobody/no-such-model"}, "does not exist"),
    ],
)
def test_build_tokenizer_refuses_what_it_would_ignore(kind, arguments, message):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=message):
        build_tokenizer(kind, **arguments)


@pytest.fixture
def hf_folder(tmp_path):
    """A word-level tokenizer written as the two files that Hugging Face reads."""
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "one": 3, "two": 4}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": word, "special": True, **special}
        for word, i in words.items()
        if word.startswith("<")
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_hf_tokenizer_reads_local_files(hf_folder):
    pytest.importorskip("transformers")
    tokenizer = build_tokenizer("hf", path=hf_folder)
    assert tokenizer.vocab_size == 5
    assert tokenizer.eos_id == 1
    assert tokenizer.pad_id == 1, "no pad token in the files: eos takes its place"
    assert tokenizer.encode("two one") == [4, 3]
    assert tokenizer.encode_batch(["two one", "", "one"]) == [[4, 3], [], [3]]
    with pytest.raises(ValueError, match=r"'one \\ud83d' is not Unicode text"):
        tokenizer.encode_batch(["two", "one \ud83d"])
    assert tokenizer.decode([4, 3, 1]) == "two one"
    state = tokenizer.state()
    assert "path" not in json.dumps(state)

    text = (hf_folder / "tokenizer.json").read_text().replace('"two"', '"three"')
    (hf_folder / "tokenizer.json").write_text(text)
    assert build_tokenizer("hf", path=hf_folder).state() != state


def test_a_vocabulary_with_holes_is_as_large_as_its_highest_id(hf_folder):
    text = (hf_folder / "tokenizer.json").read_text().replace('"two": 4', '"two": 9')
    (hf_folder / "tokenizer.json").write_text(text)
    tokenizer = build_tokenizer("hf", path=hf_folder)
    assert tokenizer.vocab_size == 10
    assert tokenizer.encode("two one") == [9, 3]
    # ids that no token has are seen: the library would drop them
    assert (
        tokenizer.decode([3, 7, 11, 9, 1])
        == "one\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}two"
    )
    assert tokenizer.decode([]) == ""


def test_hf_tokenizer_without_eos_or_files_is_refused(hf_folder, tmp_path_factory):
    pytest.importorskip("transformers")
    (hf_folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    with pytest.raises(ValueError, match="no eos token"):
        build_tokenizer("hf", path=hf_folder)
    with pytest.raises(ValueError, match=r"no tokenizer could be read from .*no tokenizer\.json"):
        build_tokenizer("hf", path=tmp_path_factory.mktemp("nothing"))
    (hf_folder / "tokenizer.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"^no tokenizer could be read from '[^']*': [^\n]+$"):
        build_tokenizer("hf", path=hf_folder)


def test_what_a_model_s_folder_says_ends_a_response(hf_folder):
    tokenizer = build_tokenizer("hf", path=hf_folder)
    eos = tokenizer.eos_id
    assert tokenizer.stop_ids == (eos,)
    (hf_folder / "config.json").write_text('{"model_type": "x", "eos_token_id": 3}')
    (hf_folder / "generation_config.json").write_text(f'{{"eos_token_id": [{eos}, 4]}}')
    assert build_tokenizer("hf", path=hf_folder).stop_ids == (eos, 4, 3)
    (hf_folder / "generation_config.json").write_text('{"eos_token_id": ["x"]}')
    with pytest.raises(
        ValueError, match=r"generation_config\.json: eos_token_id = \['x'\]: must be"
    ):
        build_tokenizer("hf", path=hf_folder)


def test_special_tokens_are_known_by_their_text(hf_folder):
    tokenizer = build_tokenizer("hf", path=hf_folder)
    text = tokenizer._inner.eos_token
    assert tokenizer.special_id(text) == tokenizer.eos_id
    assert tokenizer.special_id("a") is None
    assert build_tokenizer("char", alphabet="a").special_id("a") is None


def test_what_ends_a_response_is_put_together(hf_folder):
    tokenizer = build_tokenizer("hf", path=hf_folder)
    text = tokenizer._inner.eos_token
    config = load_config([], [f"rl.rollout.stop=['{text}', END]", "rl.rollout.stop_ids=[2]"])
    stops = read_stops(config, None, tokenizer)
    assert (set(stops.ids), stops.texts) == ({tokenizer.eos_id, 2}, ("END",))
    assert str(stops).endswith(" and the texts 'END'")
    task = build_task("reversed_addition")
    characters = build_tokenizer("char", alphabet=task.alphabet)
    assert read_stops(load_config(), task, characters).ids == (1, *characters.encode(task.stop))
    with pytest.raises(
        ValueError, match=r"^rl\.rollout\.stop_ids=\[99999\]: the tokenizer has ids"
    ):
        read_stops(load_config([], ["rl.rollout.stop_ids=[99999]"]), None, tokenizer)
