"""Wrong data that only Megatron's readers meet: named, with the remedy, and nothing lost.

Continues the list of ``tests/unit/test_refusals.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_occ.config.identity import describe
from megatron_occ.data import CharTokenizer
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import load_weights
from megatron_occ.mcore.corpus import IndexedCorpus, write_corpus
from tests.mcore.conftest import VOCABULARY, small_config, write_checkpoint

ROOT = Path(__file__).parents[2]
DIGITS = CharTokenizer("0123456789")


def lines(path, *texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def corpus(tmp_path):
    write_corpus([lines(tmp_path / "good.jsonl", "0123", "4567")], tmp_path / "corpus", DIGITS)
    return tmp_path / "corpus"


def test_preprocessing_names_file_line_and_character_and_writes_nothing(tmp_path):
    source = lines(tmp_path / "bad.jsonl", "01", "02", "0x")
    command = [sys.executable, ROOT / "tools" / "preprocess_data.py", "--input", source]
    command += ["--output-prefix", tmp_path / "out", "--tokenizer", "char", "--alphabet", "012"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"error: {source}:3: character 'x' at position 1 of '0x'" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_missing_corpus_is_refused_with_its_files_and_the_tool(tmp_path):
    with pytest.raises(ValueError, match=r"no corpus at '.*gone': missing .*gone\.bin.* Write it"):
        IndexedCorpus(tmp_path / "gone", DIGITS)


def test_a_truncated_corpus_is_refused_with_both_sizes(corpus):
    file = Path(f"{corpus}.bin")
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=rf"corpus\.bin has {size - 3} bytes, .* says {size}"):
        IndexedCorpus(corpus, DIGITS)


def test_a_corpus_of_another_tokenizer_is_refused_with_both(corpus):
    with pytest.raises(ValueError, match=r"0123456789.*this run has .*'01'"):
        IndexedCorpus(corpus, CharTokenizer("01"))


@pytest.fixture
def checkpoint(layout, tmp_path):
    """A checkpoint, the actor that wrote it, and what it says of itself."""
    config = small_config(1)
    actor = MegatronGPTActor(
        config, VOCABULARY, layout, optimizer=config.rl.optimizer, total_updates=1
    )
    meta = describe(config, DIGITS.state(), {})
    path = write_checkpoint(tmp_path, 1, actor, {}, meta)
    return path, actor, meta


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"tokenizer": CharTokenizer("01").state()},
            r"tokenizer\.alphabet is .*, this run has '01'",
        ),
        ({"mtp_layers": 3}, "mtp_layers is 1, this run has 3"),
        ({"model": {"num_layers": 9}}, r"model\.num_layers is 2, this run has 9"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_the_weights_stay(checkpoint, change, named):
    path, actor, meta = checkpoint
    before = [parameter.clone() for parameter in actor.chunks[0].parameters()]
    with pytest.raises(ValueError, match=rf"{path}/meta\.json: {named}.*: give the checkpoint's"):
        load_weights(path, actor, {**meta, **change})
    pairs = zip(actor.chunks[0].parameters(), before, strict=True)
    assert all(torch.equal(parameter, old) for parameter, old in pairs)


def test_a_half_written_checkpoint_is_refused_with_its_folder(checkpoint):
    path, actor, meta = checkpoint
    (path / "meta.json").unlink()
    with pytest.raises(ValueError, match=f"{path} is not a complete checkpoint: .* no meta.json"):
        load_weights(path, actor, meta)


def test_a_hugging_face_folder_in_place_of_a_checkpoint_is_named_as_that(checkpoint, tmp_path):
    _, actor, meta = checkpoint
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    message = r"hf is not a complete checkpoint: it is a Hugging Face folder\. .* model\.from_hf in"
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "hf", actor, meta)
