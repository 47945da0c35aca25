"""Tokenizers: characters for the generated tasks, Hugging Face files for everything else."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
# JSON can spell half of a pair, as in "\ud83d", and Python keeps it; UTF-8 has no such character.
_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer(Protocol):
    """What the package needs from a tokenizer. ``encode`` adds no special tokens.

    ``vocab_size`` is the highest id and one: with holes it is more than there are tokens.
    """

    vocab_size: int
    eos_id: int
    pad_id: int
    stop_ids: tuple[int, ...]

    def special_id(self, text: str) -> int | None:
        """Id of a special token that is written so; None where there is none."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, as ``encode`` gives them; raises where that would."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens dropped."""
        ...

    def state(self) -> dict[str, Any]:
        """What identifies the tokenizer, JSON-ready: saved with a checkpoint, compared on load."""
        ...


class CharTokenizer:
    """One token a character: pad 0, eos 1, then the alphabet in the given order from 2."""

    pad_id = 0
    eos_id = 1
    stop_ids = (eos_id,)
    _FIRST_CHARACTER = 2

    def __init__(self, alphabet: str) -> None:
        """Raises ValueError when the alphabet is empty or repeats a character."""
        if not alphabet:
            raise ValueError("alphabet is empty: give the characters the tokenizer shall know")
        repeated = sorted({char for char in alphabet if alphabet.count(char) > 1})
        if repeated:
            raise ValueError(f"alphabet {alphabet!r} repeats {', '.join(map(repr, repeated))}")
        self.alphabet = alphabet
        self.vocab_size = len(alphabet) + self._FIRST_CHARACTER
        self._ids = {char: id_ for id_, char in enumerate(alphabet, start=self._FIRST_CHARACTER)}

    def encode(self, text: str) -> list[int]:
        """One id a character. Raises ValueError for a character outside the alphabet."""
        try:
            return [self._ids[char] for char in text]
        except KeyError:
            position = next(i for i, char in enumerate(text) if char not in self._ids)
            raise ValueError(
                f"character {text[position]!r} at position {position} of {text!r:.80} is not in "
                f"the alphabet {self.alphabet!r}"
            ) from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """One id a character of each text. Raises ValueError as ``encode`` does."""
        return [self.encode(text) for text in texts]

    def special_id(self, text: str) -> int | None:
        """None: pad and eos are written as nothing."""
        return None

    def decode(self, ids: Sequence[int]) -> str:
        """Text without pad and eos.

        An id outside the vocabulary (the model's output layer may be padded to a larger size)
        becomes U+FFFD, so that it is seen and never verified as correct.
        """
        special = (self.pad_id, self.eos_id)
        return "".join(self._character(int(id_)) for id_ in ids if int(id_) not in special)

    def state(self) -> dict[str, Any]:
        """Kind and alphabet."""
        return {"kind": "char", "alphabet": self.alphabet}

    def _character(self, id_: int) -> str:
        if self._FIRST_CHARACTER <= id_ < self.vocab_size:
            return self.alphabet[id_ - self._FIRST_CHARACTER]
        return _UNKNOWN


class HFTokenizer:
    """A tokenizer from local Hugging Face files. Nothing is downloaded, no foreign code is run.

    Pad falls back to eos where the files define none. ``stop_ids`` are eos and, where the folder is
    a model's, ``eos_token_id`` of its ``generation_config.json`` and ``config.json``: the turns of
    a chat often end with another token than a text.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises ValueError when the files are missing, unreadable or define no eos token."""
        from transformers import AutoTokenizer

        name = os.fspath(path)
        # A name that is no local path would be looked up on the hub.
        if not os.path.exists(name):
            raise ValueError(f"no tokenizer in {name!r}: it does not exist, give a local folder")
        try:
            inner = AutoTokenizer.from_pretrained(
                name, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the library raises many kinds for bad files
            reason = _why_unreadable(name, error)
            raise ValueError(f"no tokenizer could be read from {name!r}: {reason}") from error
        if inner.eos_token_id is None:
            raise ValueError(f"the tokenizer in {name!r} has no eos token: set eos_token in it")
        self._inner = inner
        self._known = frozenset(inner.get_vocab().values())
        # not their number: there may be holes, and the highest id needs a row of the embedding
        self.vocab_size = max(self._known) + 1
        self.eos_id = inner.eos_token_id
        self.pad_id = inner.eos_token_id if inner.pad_token_id is None else inner.pad_token_id
        self.stop_ids = tuple(dict.fromkeys((self.eos_id, *_folder_stop_ids(Path(name)))))

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens. Raises ValueError for what is not Unicode text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens; several cores work on a long list.

        Raises ValueError for what is not Unicode text.
        """
        try:
            # not verbose: a text may be longer than the model that the tokenizer was made for
            return self._inner(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        except (TypeError, UnicodeEncodeError) as error:  # which one depends on the library
            text = next((text for text in texts if _SURROGATE.search(text)), None)
            if text is None:
                raise
            raise ValueError(
                f"{text!r:.80} is not Unicode text: it holds half of a surrogate pair"
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens, spaces left as they are.

        An id that no token has becomes U+FFFD: the library would drop it, and a wrong answer with
        one in it could be verified as correct.
        """
        texts = []
        for is_known, part in groupby((int(id_) for id_ in ids), key=self._known.__contains__):
            found = list(part)
            texts.append(self._text(found) if is_known else _UNKNOWN * len(found))
        return "".join(texts)

    def _text(self, ids: list[int]) -> str:
        return self._inner.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def special_id(self, text: str) -> int | None:
        """Id of a special token that is written so; None where there is none."""
        return next(
            (
                id_
                for id_, token in self._inner.added_tokens_decoder.items()
                if token.special and token.content == text
            ),
            None,
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether :meth:`chat` has a template."""
        return bool(self._inner.chat_template)

    def chat(self, messages: list[dict[str, str]], **kwargs: Any) -> str:
        """Text of a chat by the template of the files, up to where the model's turn begins.

        Args:
            messages: with "role" and "content".
            **kwargs: variables of the template.

        Raises:
            ValueError: there is no template, or it refuses the messages.
        """
        try:
            return self._inner.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **kwargs
            )
        except Exception as error:  # the template is a program of its own
            reason = " ".join(str(error).split())
            raise ValueError(f"the tokenizer's chat template fails: {reason:.200}") from error

    def state(self) -> dict[str, Any]:
        """Kind, special ids and a hash of the vocabulary; not the path, which may move."""
        vocabulary = json.dumps(self._inner.get_vocab(), sort_keys=True)
        return {
            "kind": "hf",
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "pad_id": self.pad_id,
            "vocab_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
        }


def _folder_stop_ids(folder: Path) -> list[int]:
    """What a model's folder says ends a response.

    Raises:
        ValueError: a value that is no id, with the file.
    """
    found = []
    for file in (folder / "generation_config.json", folder / "config.json"):
        if not file.is_file():
            continue
        try:
            given = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file}: is not a JSON object: {error}") from error
        ids = given if isinstance(given, list) else [] if given is None else [given]
        if not all(isinstance(id_, int) and not isinstance(id_, bool) and id_ >= 0 for id_ in ids):
            raise ValueError(f"{file}: eos_token_id = {given!r}: must be an id or a list of ids")
        found += ids
    return found


def _why_unreadable(path: str, error: Exception) -> str:
    """One line: the library's own text lists what it tried, over several."""
    if os.path.isdir(path) and not any(
        "token" in name or "vocab" in name for name in os.listdir(path)
    ):
        return (
            "it holds no tokenizer.json. Give the folder that save_pretrained of a tokenizer wrote"
        )
    return " ".join(str(error).split())


def build_tokenizer(
    kind: str, *, alphabet: str | None = None, path: str | os.PathLike[str] | None = None
) -> Tokenizer:
    """Make a tokenizer: "char" with an ``alphabet``, or "hf" with a local ``path``.

    Raises ValueError for an unknown kind and when the argument of the kind is missing or that of
    the other kind is given.
    """
    if kind == "char":
        if alphabet is None or path is not None:
            raise ValueError("tokenizer kind 'char' takes alphabet, and no path")
        return CharTokenizer(alphabet)
    if kind == "hf":
        if path is None or alphabet is not None:
            raise ValueError("tokenizer kind 'hf' takes path, and no alphabet")
        return HFTokenizer(path)
    raise ValueError(f"unknown tokenizer kind {kind!r}: use 'char' or 'hf'")
