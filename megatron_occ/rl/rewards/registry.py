"""Verifiers by name: the built-in ones, and those that users register."""

from __future__ import annotations

import difflib
import importlib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from megatron_occ.rl.rewards.text import arithmetic_verifier, exact_verifier

Verifier = Callable[[str, str], float]

# A response that scores this or more is correct; less is partial credit.
FULL_SCORE = 1.0


class NotAScore(ValueError):
    """A verifier returned something else than a finite number."""


@dataclass(frozen=True)
class RegisteredVerifier:
    """``path`` ("module:function") for a worker process to import; ``inline`` when set is the
    function itself, safe to call in the trainer's own process. ``votes`` is the path of what reads
    and groups the answers of several responses, where the verifier knows answers."""

    path: str
    inline: Verifier | None = None
    votes: str | None = None


def import_path(function: Verifier) -> str:
    """The "module:function" under which another process can import ``function``.

    Raises ValueError for a lambda, a local function, a method of an object, or one defined in the
    script that is being run.
    """
    module = getattr(function, "__module__", None)
    qualified = getattr(function, "__qualname__", None)
    remedy = "define it at the top level of a module that can be imported"
    if not module or not qualified:
        raise ValueError(f"verifier {function!r} is not a function: {remedy}")
    if module == "__main__":
        raise ValueError(
            f"verifier {qualified} is defined in the script that runs, which a verifier process "
            f"cannot import without running it again: {remedy}, next to the script for example"
        )
    path = f"{module}:{qualified}"
    try:
        found = load_verifier(path)
    except ValueError as error:
        raise ValueError(f"verifier {path} cannot be imported by name: {remedy}") from error
    if found is not function:
        raise ValueError(f"verifier {path} imports as something else: {remedy}")
    return path


def load_verifier(path: str) -> Verifier:
    """Import the function at "module:function". Raises ValueError when that is not possible."""
    module_name, separator, qualified = path.partition(":")
    if not (separator and module_name and qualified):
        raise ValueError(f"verifier path {path!r} is not of the form 'module:function'")
    try:
        found = importlib.import_module(module_name)
        for name in qualified.split("."):
            found = getattr(found, name)
    except Exception as error:  # importing runs the user's module, which may raise anything
        raise ValueError(
            f"verifier {path!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise ValueError(f"verifier {path!r} is not a function but {type(found).__name__}")
    return found


_EXACT = RegisteredVerifier(import_path(exact_verifier), inline=exact_verifier)
_ARITHMETIC = RegisteredVerifier(import_path(arithmetic_verifier), inline=arithmetic_verifier)
_VERIFIERS: dict[str, RegisteredVerifier] = {
    "exact": _EXACT,
    "arithmetic": _ARITHMETIC,
    "math": RegisteredVerifier(
        "megatron_occ.rl.rewards.math.verifier:math_verifier",
        votes="megatron_occ.rl.rewards.math.votes:math_votes",
    ),
    # the `data_source` of DAPO's prompts
    "math_dapo": RegisteredVerifier(
        "megatron_occ.rl.rewards.math.verifier:math_dapo_verifier",
        votes="megatron_occ.rl.rewards.math.votes:math_dapo_votes",
    ),
    # The generated tasks: `task_name` in the data picks the verifier.
    "reversed_multiplication": _ARITHMETIC,
    "reversed_addition": _ARITHMETIC,
    "star_paths": _ARITHMETIC,
    "reasoning_gym": RegisteredVerifier(
        "megatron_occ.rl.rewards.reasoning_gym:reasoning_gym_verifier"
    ),
}


def register_verifier(name: str, function: Verifier | str) -> None:
    """Make a verifier available as ``name``, the ``task_name`` of prompts that shall use it.

    ``function(response, answer)`` returns a finite number: ``FULL_SCORE`` or more for a correct
    response, anything below for the others. Give the function, or its path as
    "module:function", which is imported only where it runs. ``VerifierPool`` runs it in a process
    of its own. Raises ValueError for a name that is taken or has a ":", a malformed path, and a
    function that another process could not import.
    """
    if not name or ":" in name:
        raise ValueError(f"verifier name {name!r} must not be empty or contain ':'")
    if isinstance(function, str):
        if not all(function.partition(":")):
            raise ValueError(f"verifier path {function!r} is not of the form 'module:function'")
        entry = RegisteredVerifier(function)
    else:
        entry = RegisteredVerifier(import_path(function))
    if _VERIFIERS.get(name, entry) != entry:
        raise ValueError(f"verifier name {name!r} is taken by {_VERIFIERS[name].path}")
    _VERIFIERS[name] = entry


def lookup(name: str) -> RegisteredVerifier:
    """The entry of a registered name.

    A path such as "module:function" is not looked up: names come from data files, and those must
    not choose what code is run. Raises ValueError for an unknown name, with the closest known one.
    """
    if name in _VERIFIERS:
        return _VERIFIERS[name]
    if ":" in name:
        raise ValueError(
            f"{name!r} is not the name of a verifier: use register_verifier(name, {name!r}) first"
        )
    close = difflib.get_close_matches(name, _VERIFIERS, n=1)
    hint = f": did you mean {close[0]!r}?" if close else ":"
    raise ValueError(f"unknown verifier {name!r}{hint} known: {', '.join(sorted(_VERIFIERS))}")


def verifier_names() -> frozenset[str]:
    """Names that are known."""
    return frozenset(_VERIFIERS)


def get_verifier(name: str) -> Verifier:
    """The verifier function itself, ``(response, answer) -> float``.

    It runs in the caller's process without a time limit: for model output use ``VerifierPool``.
    Raises ValueError for an unknown name, or when a user's verifier cannot be imported.
    """
    entry = lookup(name)
    return entry.inline or load_verifier(entry.path)


def register_verifiers(verifiers: dict[str, str]) -> None:
    """Make the user's verifiers known by name; one that can't be imported is told before any work.

    Modules are also looked for in the current folder, which ``python -m`` does and a console script
    does not. Verifier processes inherit the search path.
    """
    if verifiers and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name, path in verifiers.items():
        register_verifier(name, path)
        get_verifier(name)


def checked_score(value: object) -> float:
    """A verifier's return value as a float. Raises NotAScore unless it is a finite number."""
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    kind = type(value).__name__
    raise NotAScore(f"the verifier returned {value!r:.80} ({kind}), not a finite number")
