"""Pretraining text: written and read as Megatron-Core's indexed data set.

On disk a corpus is ``PREFIX.bin`` (token ids, one document after the other) and ``PREFIX.idx``
(lengths and offsets), the format of every Megatron tool, and ``PREFIX.meta.json``: which tokenizer
wrote it, how much there is, from which files. The meta file is removed first and written last, so
a corpus that has one is whole.

Batches are cut here and not by Megatron's ``GPTDataset``, which runs on the CPU as well, but
- shuffles all epochs of a run together: asking for more steps changes the batches of the first
  ones, so a run that is resumed to go on for longer sees other data than it would have seen;
- writes its order to a cache folder beside the corpus (often a read-only share), by rank 0 while
  the other ranks wait, and reads it back with pickle allowed;
- replaces tokens of the text that equal the pad token by token 0, without loss.
An order derived from (seed, epoch) is a few lines and leaves nothing behind.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from tqdm import tqdm

from megatron_occ.config.words import counted
from megatron_occ.data import Tokenizer
from megatron_occ.data.jsonl import read_jsonl, text_field
from megatron_occ.data.splits import mix64

_BIN, _IDX, _META = ".bin", ".idx", ".meta.json"
# At both ends of the tokens, enough to notice another corpus; all of them may be terabytes.
_FINGERPRINT_BYTES = 1 << 20

StrPath = str | os.PathLike[str]


def write_corpus(
    inputs: Sequence[StrPath],
    prefix: StrPath,
    tokenizer: Tokenizer,
    *,
    key: str = "text",
    append_eod: bool = True,
    force: bool = False,
) -> dict[str, Any]:
    """Tokenize JSON lines into ``prefix.bin``, ``prefix.idx`` and ``prefix.meta.json``.

    It is written to a temporary folder beside the target and renamed at the end: an error leaves
    what was there. Progress is shown on stderr if that is a terminal.

    Args:
        inputs: files with one JSON object a line, each line a document.
        prefix: path without suffix; missing folders are created.
        tokenizer: its ``vocab_size`` picks the type of a token on disk (uint16 or int32).
        key: name of the text in the object.
        append_eod: end each document with the tokenizer's eos token. Leave it out only for texts
            that bring their own end marker: documents then follow each other as they are.
        force: replace an existing corpus.

    Returns:
        What ``prefix.meta.json`` holds: documents, tokens, tokenizer, append_eod, sources, bytes.

    Raises:
        ValueError: a corpus is there already, an input is missing, or a line (named) is bad.
    """
    prefix = os.fspath(prefix)
    _check_target(prefix, force)
    _check_inputs(inputs)
    target = Path(prefix)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
        temporary = os.path.join(folder, target.name)
        documents = _documents(inputs, key, tokenizer, append_eod)
        lengths = _write_tokens(temporary, documents, DType.optimal_dtype(tokenizer.vocab_size))
        meta = {
            "documents": len(lengths),
            "tokens": sum(lengths),
            "tokenizer": tokenizer.state(),
            "append_eod": append_eod,
            "sources": [Path(path).name for path in inputs],
            "bytes": {suffix: os.path.getsize(temporary + suffix) for suffix in (_BIN, _IDX)},
        }
        Path(temporary + _META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        Path(prefix + _META).unlink(missing_ok=True)
        for suffix in (_BIN, _IDX, _META):
            os.replace(temporary + suffix, prefix + suffix)
    return meta


class IndexedCorpus:
    """Batches of a corpus on disk, as a function of (seed, step) alone: no state to save.

    An epoch is all documents in an order of its own, end to end, cut into sequences that are drawn
    in an order of their own. The tokens after the last whole sequence are left out of that epoch.
    A row may hold several documents, and attention crosses their borders. Tokens stay on disk; an
    epoch's order takes 16 bytes a document and 8 bytes a sequence.
    """

    def __init__(self, prefix: StrPath, tokenizer: Tokenizer, seed: int = 0) -> None:
        """Opens the corpus that ``write_corpus`` wrote to ``prefix``.

        Raises ValueError for a negative seed, missing or damaged files, and a corpus written with
        another tokenizer.
        """
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self._prefix = os.fspath(prefix)
        self._seed = seed
        _check_tokenizer(self._prefix, _read_meta(self._prefix), tokenizer)
        self._data = IndexedDataset(self._prefix)
        self._fingerprint = _fingerprint(self._prefix)
        self.documents = len(self._data)
        self.tokens = int(self._data.sequence_lengths.sum(dtype=np.int64))
        # A batch seldom touches more than two epochs; older orders can be derived again.
        self._document_order = functools.lru_cache(maxsize=2)(self._make_document_order)
        self._sequence_order = functools.lru_cache(maxsize=2)(self._make_sequence_order)

    def fingerprint(self) -> str:
        """SHA-256 of the index, the number of tokens' bytes and the first and last MiB of them.

        Saved with a checkpoint and compared on resume: a different value means different text.
        """
        return self._fingerprint

    def batch(
        self, step: int, size: int, sequence_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequences ``step * size`` to ``step * size + size - 1``, counted over all epochs.

        Returns ``ids`` [size, sequence_length] int64 and ``loss_mask`` [size, sequence_length]
        float32. The mask is aligned with the tokens: 1 where the token itself is to be predicted,
        which is everywhere but in the first column. Raises ValueError when an argument is out of
        range or the corpus is shorter than one sequence.
        """
        if step < 0 or size < 1 or sequence_length < 2:
            raise ValueError(
                "need step >= 0, size >= 1 and sequence_length >= 2, got "
                f"step={step}, size={size}, sequence_length={sequence_length}"
            )
        count = self.tokens // sequence_length
        if count == 0:
            raise ValueError(
                f"corpus {self._prefix} has {counted(self.tokens, 'token')}, fewer than one "
                f"sequence of {sequence_length}: add text, or lower the sequence length to at most "
                f"{self.tokens}"
            )
        rows = []
        for number in range(step * size, step * size + size):
            epoch, position = divmod(number, count)
            start = int(self._sequence_order(epoch, count)[position]) * sequence_length
            rows.append(self._read(epoch, start, sequence_length))
        ids = torch.from_numpy(np.stack(rows))
        loss_mask = torch.ones(ids.shape, dtype=torch.float32)
        loss_mask[:, 0] = 0.0
        return ids, loss_mask

    def _read(self, epoch: int, start: int, length: int) -> np.ndarray:
        """``length`` tokens of the epoch's stream of documents from token ``start`` on."""
        documents, ends = self._document_order(epoch)
        place = int(np.searchsorted(ends, start, side="right"))
        offset = start - (int(ends[place - 1]) if place else 0)
        tokens = np.empty(length, dtype=np.int64)
        filled = 0
        while filled < length:
            piece = self._data.get(int(documents[place]), offset)[: length - filled]
            tokens[filled : filled + len(piece)] = piece
            filled += len(piece)
            place, offset = place + 1, 0
        return tokens

    def _make_document_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents in the order of the epoch, and where each ends in the epoch's stream."""
        documents = _permutation(self.documents, self._key(epoch))
        return documents, np.cumsum(self._data.sequence_lengths[documents], dtype=np.int64)

    def _make_sequence_order(self, epoch: int, count: int) -> np.ndarray:
        # Hashed once more, so that documents and sequences are not shuffled alike.
        return _permutation(count, mix64(self._key(epoch)))

    def _key(self, epoch: int) -> int:
        return mix64(mix64(self._seed) + epoch)


def _permutation(size: int, key: int) -> np.ndarray:
    # Sorting by a hash needs no library's shuffle, which may change between versions. The hash is
    # one to one, so there are no ties. On an array the arithmetic of mix64 wraps at 64 bits.
    return np.argsort(mix64(np.arange(size, dtype=np.uint64) ^ np.uint64(key)))


def _check_target(prefix: str, force: bool) -> None:
    if not os.path.basename(prefix) or os.path.isdir(prefix):
        raise ValueError(f"output prefix {prefix!r} is a folder: add a name, as in folder/name")
    present = [prefix + suffix for suffix in (_BIN, _IDX, _META) if os.path.exists(prefix + suffix)]
    if present and not force:
        raise ValueError(
            f"{', '.join(present)} would be overwritten: give another prefix, or --force"
        )


def _check_inputs(inputs: Sequence[StrPath]) -> None:
    # At once: a wrong name must not come to light after an hour of tokenizing the other files.
    missing = [os.fspath(path) for path in inputs if not os.path.isfile(path)]
    if missing or not inputs:
        raise ValueError(f"no such input file: {', '.join(missing) or 'none was given'}")


def _documents(
    inputs: Sequence[StrPath], key: str, tokenizer: Tokenizer, append_eod: bool
) -> Iterator[list[int]]:
    end = [tokenizer.eos_id] if append_eod else []
    with tqdm(unit=" documents", disable=None, dynamic_ncols=True) as bar:
        for path in inputs:
            name = os.fspath(path)
            bar.set_description_str(Path(name).name)
            for number, record in read_jsonl(name):
                where = f"{name}:{number}"
                yield _encode(text_field(record, key, where), tokenizer, where) + end
                bar.update()


def _encode(text: str, tokenizer: Tokenizer, where: str) -> list[int]:
    try:
        ids = tokenizer.encode(text)
    except (ValueError, TypeError) as error:  # TypeError: Hugging Face, for a lone surrogate
        raise ValueError(f"{where}: {error}") from error
    if not ids:
        raise ValueError(f"{where}: the tokenizer makes no token of {text!r:.80}")
    # The type on disk follows the vocabulary, and a larger id would silently wrap around.
    if max(ids) >= tokenizer.vocab_size:
        raise ValueError(
            f"{where}: token {max(ids)} is outside the tokenizer's vocabulary of "
            f"{tokenizer.vocab_size}: mend the tokenizer's files"
        )
    return ids


def _write_tokens(prefix: str, documents: Iterator[list[int]], dtype: type) -> list[int]:
    """Writes ``.bin`` and ``.idx``; returns the documents' lengths."""
    builder = IndexedDatasetBuilder(prefix + _BIN, dtype=dtype)
    with closing(builder.data_file):
        for ids in documents:
            builder.add_item(torch.tensor(ids, dtype=torch.int64))
            builder.end_document()
        builder.finalize(prefix + _IDX)
    return builder.sequence_lengths


def _read_meta(prefix: str) -> dict[str, Any]:
    missing = [prefix + s for s in (_BIN, _IDX, _META) if not os.path.isfile(prefix + s)]
    if missing:
        raise ValueError(
            f"no corpus at {prefix!r}: missing {', '.join(missing)}. Write it with "
            "tools/preprocess_data.py, and give its --output-prefix"
        )
    file = prefix + _META
    try:
        meta = json.loads(Path(file).read_text(encoding="utf-8"))
        sizes = {suffix: meta["bytes"][suffix] for suffix in (_BIN, _IDX)}
        meta["tokenizer"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: cannot be read ({error!r}): write the corpus again") from error
    for suffix, size in sizes.items():
        found = os.path.getsize(prefix + suffix)
        if found != size:
            raise ValueError(
                f"{prefix + suffix} has {found} bytes, {file} says {size}: the copy is incomplete "
                "or the files are of different corpora; copy all three again"
            )
    return meta


def _check_tokenizer(prefix: str, meta: dict[str, Any], tokenizer: Tokenizer) -> None:
    if meta["tokenizer"] != tokenizer.state():
        raise ValueError(
            f"corpus {prefix} was written with tokenizer {meta['tokenizer']}, this run has "
            f"{tokenizer.state()}: give that tokenizer, or write the corpus again with this one"
        )


def _fingerprint(prefix: str) -> str:
    digest = hashlib.sha256()
    with open(prefix + _IDX, "rb") as file:
        while block := file.read(_FINGERPRINT_BYTES):
            digest.update(block)
    with open(prefix + _BIN, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(size.to_bytes(8, "little"))
        for start in (0, max(0, size - _FINGERPRINT_BYTES)):
            file.seek(start)
            digest.update(file.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()
