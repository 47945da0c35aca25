"""Tasks of the package ``reasoning-gym``: its generators here, its verifiers in ``rl/rewards``."""

from __future__ import annotations

import hashlib
import importlib
import json
from functools import cached_property, lru_cache
from importlib.metadata import version
from typing import Any

from megatron_occ.data.splits import SPLITS, DrawnSplits
from megatron_occ.data.tasks.common import Problem, UnknownTask, check_int, did_you_mean

PREFIX = "reasoning_gym:"
VERIFIER = "reasoning_gym"
# The version whose verifiers were read for REFUSED. What another one does to a response is unknown.
READ_VERSION = "0.1.25"
# Problems that a task has unless its parameter `size` says otherwise: some datasets give no more
# than `size` problems, none takes longer to make with more of them.
DEFAULT_SIZE = 1_000_000
_ALPHABET_PROBLEMS = 256
_KEPT_ENTRIES = 1024

_EVAL = "its verifier hands the response to eval()"
_SYMPY = "its verifier hands the response to sympy's parse_expr, which calls eval()"
_CHANGES = "its problems depend on the order of a set, which another process has in another order"
# A response is data and never run, in whatever process; and a verifier process makes the problem
# again. Found by two processes with different PYTHONHASHSEED.
REFUSED = {
    "binary_matrix": _EVAL,
    "n_queens": _EVAL,
    "spiral_matrix": _EVAL,
    "string_insertion": _EVAL,
    "countdown": _SYMPY,
    "intermediate_integration": _SYMPY,
    "polynomial_multiplication": _SYMPY,
    "puzzle24": _SYMPY,
    "simple_integration": _SYMPY,
    "composite": "it hands the response to the verifiers of other tasks, of which some call eval()",
    "codeio": _CHANGES,
    "isomorphic_strings": _CHANGES,
    "knight_swap": _CHANGES,
    "list_functions": _CHANGES,
    "ransom_note": _CHANGES,
    "word_ladder": _CHANGES,
}


class ReasoningGym:
    """A dataset of ``reasoning-gym``: the question is the prompt, its answer the solution.

    Position p of the dataset is a function of (seed, p), but small problems come again at other
    positions and under other seeds. So it is the question's hash that splits train and validation,
    and the positions are drawn. A response ends at the tokenizer's eos, because answers may have
    any character.

    ``Problem.answer`` is JSON that names the problem, from which ``score`` makes it again, with all
    that its verifier wants to know.
    """

    stop = ""

    def __init__(self, name: str, **params: Any) -> None:
        """``params`` are the dataset's configuration, with ``seed`` (0) and ``size``.

        Raises ValueError (for an unknown or refused name UnknownTask) when the package is missing
        or of another version than the one that was read, and for a bad parameter.
        """
        if name in REFUSED:
            raise UnknownTask(f"{PREFIX}{name} is refused: {REFUSED[name]}")
        self.name = PREFIX + name
        self._params = {"seed": 0, "size": DEFAULT_SIZE, **params}
        check_int("seed", self._params["seed"], 0, None)
        check_int("size", self._params["size"], 1, None)
        self._dataset = _open(name, self._params)
        self.entry = lru_cache(_KEPT_ENTRIES)(self._dataset.__getitem__)
        self._splits = DrawnSplits(
            [len(self._dataset)], self._params["seed"], tuple, same=self._question_hash
        )

    def params(self) -> dict[str, Any]:
        """The parameters that ``build_task`` needs to make this task again."""
        return dict(self._params)

    @cached_property
    def alphabet(self) -> str:
        """Characters of the first problems of both splits, in order; others may follow."""
        found: set[str] = set()
        for split in SPLITS:
            for index in range(_ALPHABET_PROBLEMS):
                problem = self.problem(split, index)
                found.update(problem.prompt, problem.solution)
        return "".join(sorted(found))

    def problem(self, split: str, index: int) -> Problem:
        """Problem ``index`` of ``split``: always the same one, whatever was drawn before.

        Its solution is empty where the dataset has none. Raises ValueError for an unknown split or
        an index that the split does not have.
        """
        (position,) = self._splits.values(split, index)
        entry = self.entry(position)
        reference = {
            "task": self.name,
            "params": self._params,
            "position": position,
            "sha256": _identity(entry),
            "answer": entry["answer"],
        }
        return Problem(
            prompt=entry["question"] + "\n",
            solution=entry["answer"] or "",
            answer=json.dumps(reference),
            task_name=VERIFIER,
        )

    def score(self, response: str, reference: dict[str, Any]) -> float:
        """The dataset's own score of a response: 1.0 is correct, less is partial credit.

        What is scored is the text in the last ``<answer>...</answer>``, without one the whole
        response, without white space around it. Raises ValueError for the reference of a problem
        that this dataset does not make.
        """
        entry = self.entry(reference["position"])
        if _identity(entry) != reference["sha256"]:
            raise ValueError(f"{self.name} makes another problem of {reference} in this process")
        return self._dataset.score_answer(_committed_answer(response), entry)

    def _question_hash(self, position: tuple[int, ...]) -> tuple[int, ...]:
        digest = hashlib.sha256(self.entry(position[0])["question"].encode()).digest()
        return (int.from_bytes(digest[:8], "big"),)


def _open(name: str, params: dict[str, Any]) -> Any:
    try:
        package = importlib.import_module("reasoning_gym")
        datasets = importlib.import_module("reasoning_gym.factory").DATASETS
    except ModuleNotFoundError as error:
        raise UnknownTask(
            f"{PREFIX}{name} needs the package reasoning-gym: {error}. "
            "Install it with pip install megatron-occ[reasoning]"
        ) from error
    installed = version("reasoning-gym")
    if installed != READ_VERSION:
        raise UnknownTask(
            f"{PREFIX}{name}: reasoning-gym {installed} is installed, and only the verifiers of "
            f"{READ_VERSION} are known not to run responses as code. Install it with pip install "
            "megatron-occ[reasoning]"
        )
    if name not in datasets:
        known = sorted(set(datasets) - set(REFUSED))
        raise UnknownTask(f"unknown task {PREFIX}{name}{did_you_mean(name, known)}")
    try:
        return package.create_dataset(name, **params)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"{PREFIX}{name} can't be made of {params}: {error}") from error


def _committed_answer(response: str) -> str:
    _, opened, rest = response.rpartition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    return (answer if opened and closed else response).strip()


def _identity(entry: dict[str, Any]) -> str:
    return hashlib.sha256(f"{entry['question']}\n{entry['answer']}".encode()).hexdigest()
