"""Writing a text corpus as Megatron's indexed data set and drawing batches from it."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_occ.data import CharTokenizer
from megatron_occ.data.splits import mix64
from megatron_occ.mcore.corpus import IndexedCorpus, write_corpus

GSM8K = [
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72",
    "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\n#### 10",
    "It takes 2/2=<<2/2=1>>1 bolt of white fiber\n#### 3",
]
CHARACTERS = CharTokenizer("".join(sorted(set("".join(GSM8K)))))


class Numbers:
    """Reads "7 8 9" as the tokens 7, 8, 9."""

    eos_id = 1
    pad_id = 0

    def __init__(self, vocab_size: int = 1000) -> None:
        self.vocab_size = vocab_size

    def encode(self, text):
        return [int(word) for word in text.split() if word != "-"]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def state(self):
        return {"kind": "numbers", "vocab_size": self.vocab_size}


def write_lines(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def counting(lengths):
    """Documents of the given lengths whose tokens, from 2 on, are all different."""
    token = itertools.count(2)
    return [[next(token) for _ in range(length)] for length in lengths]


@pytest.fixture
def counted(tmp_path):
    """13 documents of 1 to 20 tokens, 106 in all, each followed by eos: 119 tokens."""
    documents = counting([1, 20, 2, 5, 1, 1, 13, 9, 17, 3, 8, 11, 15])
    texts = [" ".join(map(str, document)) for document in documents]
    write_corpus([write_lines(tmp_path / "n.jsonl", texts)], tmp_path / "n", Numbers())
    return tmp_path / "n", [[*document, 1] for document in documents]


def naive_epoch(documents, seed, epoch, length):
    """The sequences of an epoch in their order, with Python lists only."""

    def shuffled(size, key):
        return sorted(range(size), key=lambda index: mix64(index ^ key))

    key = mix64(mix64(seed) + epoch)
    stream = [token for d in shuffled(len(documents), key) for token in documents[d]]
    cuts = [stream[i * length : (i + 1) * length] for i in range(len(stream) // length)]
    return [cuts[i] for i in shuffled(len(cuts), mix64(key))]


@pytest.mark.parametrize("append_eod", [True, False])
def test_what_is_written_reads_back_as_the_same_tokens(tmp_path, append_eod):
    inputs = [
        write_lines(tmp_path / "a.jsonl", GSM8K[:2], key="answer"),
        write_lines(tmp_path / "b.jsonl", GSM8K[2:], key="answer"),
    ]
    prefix = tmp_path / "deep" / "gsm8k.v1"
    meta = write_corpus(inputs, prefix, CHARACTERS, key="answer", append_eod=append_eod)
    end = [1] if append_eod else []
    stored = IndexedDataset(str(prefix))
    assert [document.tolist() for document in stored] == [
        CHARACTERS.encode(text) + end for text in GSM8K
    ]
    assert stored.document_indices.tolist() == [0, 1, 2, 3]
    tokens = sum(map(len, GSM8K)) + 3 * len(end)
    assert meta == json.loads((tmp_path / "deep" / "gsm8k.v1.meta.json").read_text())
    assert (meta["documents"], meta["tokens"]) == (3, tokens)
    assert meta["sources"] == ["a.jsonl", "b.jsonl"]
    assert meta["tokenizer"] == CHARACTERS.state()
    assert meta["bytes"][".bin"] == 2 * tokens  # a small vocabulary takes two bytes a token
    files = sorted(path.name for path in prefix.parent.iterdir())
    assert files == ["gsm8k.v1.bin", "gsm8k.v1.idx", "gsm8k.v1.meta.json"]


def test_a_large_vocabulary_does_not_wrap_around(tmp_path):
    tokenizer = Numbers(vocab_size=151_936)
    source = write_lines(tmp_path / "a.jsonl", ["65535 65536 151935"])
    write_corpus([source], tmp_path / "a", tokenizer)
    ids, _ = IndexedCorpus(tmp_path / "a", tokenizer).batch(0, 1, 4)
    assert ids.tolist() == [[65535, 65536, 151935, 1]]


def test_shapes_types_and_mask(counted):
    ids, mask = IndexedCorpus(counted[0], Numbers()).batch(step=3, size=2, sequence_length=5)
    assert ids.shape == mask.shape == (2, 5)
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.float32)
    assert mask.tolist() == [[0.0, 1.0, 1.0, 1.0, 1.0]] * 2


@pytest.mark.parametrize("length", [2, 7, 16, 119])
def test_order_is_that_of_a_naive_implementation(counted, length):
    prefix, documents = counted
    corpus = IndexedCorpus(prefix, Numbers(), seed=4)
    assert (corpus.documents, corpus.tokens) == (13, 119)
    count = 119 // length
    for epoch in range(3):
        ids, _ = corpus.batch(epoch, count, length)
        assert ids.tolist() == naive_epoch(documents, 4, epoch, length)


def test_an_epoch_uses_every_token_once_but_for_a_tail(counted):
    prefix, documents = counted
    corpus = IndexedCorpus(prefix, Numbers())
    words = {token for document in documents for token in document if token != 1}
    dropped = []
    for epoch in range(6):
        used = corpus.batch(epoch, 119 // 16, 16)[0].flatten().tolist()
        without_eos = [token for token in used if token != 1]
        assert len(without_eos) == len(set(without_eos))
        assert used.count(1) <= len(documents)
        assert len(used) == 112  # 119 tokens, 7 too few for another sequence
        dropped.append(words - set(without_eos))
    assert len(set(map(frozenset, dropped))) > 1  # a different tail is left out each epoch
    assert not set.intersection(*dropped)


def test_rows_follow_the_text(counted):
    prefix, documents = counted
    after = {}
    for document in documents:
        after.update(itertools.pairwise(document))
    starts = {document[0] for document in documents}
    for row in IndexedCorpus(prefix, Numbers()).batch(0, 20, 11)[0].tolist():
        for token, following in itertools.pairwise(row):
            assert following in starts if token == 1 else following == after[token]


def test_a_batch_is_a_function_of_seed_and_step(counted):
    prefix, _ = counted
    # 17 sequences of 7 an epoch: batches of 3 cross the border between epochs.
    whole = [IndexedCorpus(prefix, Numbers(), seed=2).batch(step, 3, 7)[0] for step in range(20)]
    corpus = IndexedCorpus(prefix, Numbers(), seed=2)
    assert all(torch.equal(corpus.batch(step, 3, 7)[0], whole[step]) for step in (19, 0, 5, 6, 19))
    assert torch.equal(corpus.batch(0, 60, 7)[0], torch.cat(whole))
    assert not torch.equal(IndexedCorpus(prefix, Numbers(), seed=3).batch(0, 3, 7)[0], whole[0])
    epochs = [corpus.batch(epoch, 17, 7)[0].tolist() for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) != sorted(epochs[1])  # documents meet other neighbours


def test_fingerprint_notices_other_text(tmp_path, counted):
    prefix, documents = counted
    before = IndexedCorpus(prefix, Numbers()).fingerprint()
    assert before == IndexedCorpus(prefix, Numbers(), seed=9).fingerprint()
    texts = [" ".join(str(token) for token in document[:-1]) for document in documents]
    changed = [*texts[:-1], texts[-1].replace(texts[-1].split()[-1], "999")]
    for name, content in (("same", texts), ("changed", changed), ("swapped", texts[::-1])):
        source = write_lines(tmp_path / f"{name}.jsonl", content)
        write_corpus([source], tmp_path / name, Numbers())
        same = IndexedCorpus(tmp_path / name, Numbers()).fingerprint() == before
        assert same == (name == "same")


def test_fingerprint_notices_other_borders_between_the_same_tokens(tmp_path):
    prints = set()
    for name, texts in (("a", ["2 3", "4"]), ("b", ["2", "3 4"])):
        source = write_lines(tmp_path / f"{name}.jsonl", texts)
        write_corpus([source], tmp_path / name, Numbers(), append_eod=False)
        prints.add(IndexedCorpus(tmp_path / name, Numbers()).fingerprint())
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    assert len(prints) == 2


def test_too_short_a_corpus_and_bad_arguments(counted):
    corpus = IndexedCorpus(counted[0], Numbers())
    with pytest.raises(ValueError, match=r"119 tokens, fewer than one sequence of 120: .* 119$"):
        corpus.batch(0, 1, 120)
    for step, size, length in ((-1, 1, 8), (0, 0, 8), (0, 1, 1)):
        with pytest.raises(ValueError, match=f"step={step}, size={size}, sequence_length={length}"):
            corpus.batch(step, size, length)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        IndexedCorpus(counted[0], Numbers(), seed=-1)


def test_another_tokenizer_is_refused_naming_both(counted):
    with pytest.raises(ValueError, match=r"'vocab_size': 1000.*'vocab_size': 999"):
        IndexedCorpus(counted[0], Numbers(999))


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".meta.json"])
def test_missing_and_damaged_files_are_named(counted, suffix):
    prefix = str(counted[0])
    file = Path(prefix + suffix)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=f"{suffix}.* (copy all three|write the corpus) again"):
        IndexedCorpus(prefix, Numbers())
    file.unlink()
    with pytest.raises(ValueError, match=f"missing [^,]*{suffix}. Write it with"):
        IndexedCorpus(prefix, Numbers())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "bad.jsonl:2: not JSON"),
        ('{"txt": "5"}', "bad.jsonl:2: missing key 'text'"),
        ('{"text": "5 x"}', "bad.jsonl:2: invalid literal"),
        ('{"text": "-"}', "bad.jsonl:2: the tokenizer makes no token of '-'"),
        ('{"text": "5 1000"}', "bad.jsonl:2: token 1000 is outside .* 1000"),
    ],
)
def test_a_bad_line_leaves_what_was_there(tmp_path, counted, line, message):
    prefix = counted[0]
    files = sorted(tmp_path.iterdir())
    before = IndexedCorpus(prefix, Numbers()).fingerprint()
    bad = tmp_path / "bad.jsonl"
    bad.write_text(f'{{"text": "2 3"}}\n{line}\n')
    for name in ("fresh", prefix.name):
        with pytest.raises(ValueError, match=message):
            write_corpus([tmp_path / "n.jsonl", bad], tmp_path / name, Numbers(), force=True)
    assert sorted(tmp_path.iterdir()) == sorted([*files, bad])
    assert IndexedCorpus(prefix, Numbers()).fingerprint() == before


def test_a_replacement_cut_short_is_not_taken_for_a_corpus(tmp_path, counted, monkeypatch):
    replace = os.replace

    def killed_at_the_index(source, target):
        if str(target).endswith(".idx"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed_at_the_index)
    with pytest.raises(KeyboardInterrupt):
        write_corpus([tmp_path / "n.jsonl"], counted[0], Numbers(), force=True)
    with pytest.raises(ValueError, match=r"missing [^,]*\.meta\.json"):
        IndexedCorpus(counted[0], Numbers())
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_bad_targets_and_inputs_are_refused_before_any_work(tmp_path, counted):
    prefix, source = counted[0], tmp_path / "n.jsonl"
    with pytest.raises(ValueError, match=r"n\.bin, .*n\.idx, .*n\.meta\.json would be overwritten"):
        write_corpus([source], prefix, Numbers())
    with pytest.raises(ValueError, match="is a folder"):
        write_corpus([source], f"{tmp_path}/", Numbers())
    with pytest.raises(ValueError, match=r"no such input file: .*gone\.jsonl"):
        write_corpus([source, tmp_path / "gone.jsonl"], tmp_path / "out" / "x", Numbers())
    with pytest.raises(ValueError, match="none was given"):
        write_corpus([], tmp_path / "out" / "x", Numbers())
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def tool():
    file = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
    spec = importlib.util.spec_from_file_location("preprocess_data", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_writes_a_corpus_and_replaces_it_when_told(tmp_path, tool, capsys):
    source = write_lines(tmp_path / "a.jsonl", GSM8K, key="answer")
    prefix = tmp_path / "c"
    command = ["--input", str(source), "--key", "answer", "--output-prefix", str(prefix)]
    command += ["--tokenizer", "char", "--alphabet", CHARACTERS.alphabet]
    tool.main(command)
    tokens = sum(map(len, GSM8K)) + 3
    assert f"c: 3 documents, {tokens} tokens" in capsys.readouterr().out
    corpus = IndexedCorpus(prefix, CHARACTERS)
    text = "".join(map(CHARACTERS.decode, corpus.batch(0, 1, tokens)[0].tolist()))
    assert sorted(text) == sorted("".join(GSM8K))
    with pytest.raises(SystemExit, match=r"error: .*would be overwritten"):
        tool.main(command)
    tool.main([*command, "--force", "--no-append-eod"])
    assert IndexedCorpus(prefix, CHARACTERS).tokens == tokens - 3
    # What was opened before keeps reading the file that it opened.
    assert np.count_nonzero(corpus.batch(0, 1, tokens)[0].numpy() == 1) == 3


def test_the_command_ends_with_one_line_of_error(tmp_path, tool):
    source = write_lines(tmp_path / "a.jsonl", ["01", "02"])
    command = ["--input", str(source), "--output-prefix", str(tmp_path / "c")]
    with pytest.raises(SystemExit, match=r"^error: .*a\.jsonl:2: character '2' at position 1"):
        tool.main([*command, "--tokenizer", "char", "--alphabet", "01"])
    with pytest.raises(SystemExit, match=r"^error: tokenizer kind 'hf' takes path"):
        tool.main([*command, "--tokenizer", "hf"])
