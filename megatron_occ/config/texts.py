"""Texts that stand for a missing value, or that no file can be called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# what other languages and YAML call null; YAML 1.2 reads none and nil, and all of them in quotes,
# as texts
_NULLS = ("none", "null", "nil", "~")
_LONGEST_NAME = 255  # bytes: NAME_MAX of Linux and of the file systems in use on it
_LONGEST_PATH = 4095  # bytes: PATH_MAX of Linux, without its final zero


def means_null(value: Any) -> bool:
    """Whether a value is a text that a user writes for null: ``None``, ``none``, ``'null'``."""
    return isinstance(value, str) and value.strip().casefold() in _NULLS


def text_problem(value: Any, reads: str, remedy: str) -> str | None:
    """What is wrong with the texts of a value that has the right type, or None.

    Args:
        value: a text, or a list or mapping of texts and other values.
        reads: what the texts are: ``name``, ``path`` (a name of a file or folder), ``text`` (passed
            on as it is, so that it may be empty or blank), or ``values`` (a mapping whose values
            are somebody else's: ``none`` may be a word there, Python's ``None`` is not).
        remedy: what to write for a missing value.
    """
    for text in _texts(value, names=reads == "path"):
        if text == "None" or (reads != "values" and means_null(text)):
            what = "a text" if text == value else f"{text!r} in it is a text"
            return f"{what}, not a missing value. {remedy}"
        if reads in ("name", "path") and not text.strip():
            return f"{'a blank' if text else 'an empty'} text names nothing. {remedy}"
        problem = _path_problem(text) if reads == "path" else None
        if problem:
            return problem
    return None


def _texts(value: Any, *, names: bool) -> Iterator[str]:
    """The texts of a value at any depth; of a mapping its values, and its names if they count."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry, names=names)
    elif isinstance(value, dict):
        yield from value if names else ()
        for entry in value.values():
            yield from _texts(entry, names=names)


def _path_problem(text: str) -> str | None:
    if "\0" in text:
        return "no file has a zero character in its name. Leave it out"
    longest = max(len(part) for part in text.encode(errors="surrogatepass").split(b"/"))
    if longest > _LONGEST_NAME:
        return (
            f"a file or folder has a name of at most {_LONGEST_NAME} bytes, and one here has "
            f"{longest}. Shorten it"
        )
    if (length := len(text.encode(errors="surrogatepass"))) > _LONGEST_PATH:
        return f"a path has at most {_LONGEST_PATH} bytes, and this one has {length}. Shorten it"
    return None
