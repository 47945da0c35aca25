"""Answers of servers are untrusted data: each field is checked before it is used."""

from __future__ import annotations

import math
from typing import Any

from megatron_occ.rollout.remote.http import EXCERPT, TransportError

# above 0 only by rounding of the server's log-softmax
LARGEST_LOGPROB = 1e-3


class Field:
    """A value of an answer, with the path that error messages name.

    Methods raise:
        TransportError: the value is missing or not of the kind asked for; a retry is allowed.
    """

    def __init__(self, value: Any, url: str, path: str = "") -> None:
        self.value, self.url, self.path = value, url, path

    def wrong(self, wanted: str) -> TransportError:
        """Error that says what the field should hold and what it holds."""
        held = repr(self.value)[:EXCERPT]
        return TransportError(
            f"{self.url}: field {self.path or 'answer'}: wanted {wanted}, got {held}", retry=True
        )

    def __getitem__(self, key: str | int) -> Field:
        name = f"{self.path}[{key}]" if isinstance(key, int) else f"{self.path}.{key}".lstrip(".")
        if isinstance(key, int):
            if len(self.items()) <= key:
                raise Field(None, self.url, name).wrong("an entry")
            return Field(self.value[key], self.url, name)
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        if key not in self.value:
            raise Field(None, self.url, name).wrong("a value (the field is missing)")
        return Field(self.value[key], self.url, name)

    def get(self, key: str) -> Field | None:
        """Field of an object, None where it is missing or null."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        return self[key] if self.value.get(key) is not None else None

    def items(self) -> list[Any]:
        """The value as a list."""
        if not isinstance(self.value, list):
            raise self.wrong("a list")
        return self.value

    def integer(self, low: int = 0, high: int | None = None) -> int:
        """The value as an int in [low, high]."""
        value, limit = self.value, math.inf if high is None else high
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= limit:
            raise self.wrong(f"a whole number from {low}" + ("" if high is None else f" to {high}"))
        return value

    def logprob(self) -> float:
        """The value as a finite log-prob."""
        value = self.value
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.wrong("a log-prob")
        if not -math.inf < value <= LARGEST_LOGPROB:
            raise self.wrong("a finite log-prob, at most 0")
        return float(value)

    def text(self) -> str:
        """The value as a string."""
        if not isinstance(self.value, str):
            raise self.wrong("a string")
        return self.value

    def tokens(self, vocab_size: int) -> list[int]:
        """The value as a list of token ids."""
        return [self[i].integer(0, vocab_size - 1) for i in range(len(self.items()))]

    def of_length(self, length: int) -> Field:
        """The field itself, if it is a list of this length."""
        if len(self.items()) != length:
            raise self.wrong(f"{length} entries, one for each token, not {len(self.value)}")
        return self
