"""RL prompts: reading them from a file, and which ones belong to which step."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from megatron_occ.data.jsonl import read_jsonl, text_field
from megatron_occ.data.splits import first_problem, mix64
from megatron_occ.data.tasks import Task

DEFAULT_TASK_NAME = "math"
_FINAL_ANSWER_MARK = "####"


@dataclass(frozen=True)
class PromptRecord:
    """A prompt, its reference answer, the verifier to use, and its place in the source.

    ``index`` is the 0-based position among the prompts of the file, or the problem's index in the
    generated split. ``line`` counts all lines of the file from 1; None for a generated problem.
    """

    prompt: str
    answer: str
    task_name: str
    index: int
    line: int | None = None


def extract_final_answer(text: str) -> str:
    """What follows the last ``####`` (the GSM8K convention), else the whole text; stripped."""
    return text.rpartition(_FINAL_ANSWER_MARK)[2].strip()


def read_prompts(
    path: str | os.PathLike[str], default_task_name: str = DEFAULT_TASK_NAME
) -> list[PromptRecord]:
    """Read prompts from JSON lines with ``prompt`` (or ``question``), ``answer``, ``task_name``.

    ``task_name`` picks the verifier and defaults to ``default_task_name``. An answer with a worked
    solution that ends in ``#### 42`` is cut down to ``42``. Blank lines are skipped. Raises
    ValueError naming file and line for a line that is not a JSON object, a missing key, a value
    that is empty or not text; and naming the file when it is missing or empty.
    """
    records = []
    for number, line in read_jsonl(path):
        where = f"{os.fspath(path)}:{number}"
        key = "question" if "question" in line and "prompt" not in line else "prompt"
        prompt = text_field(line, key, where)
        answer = extract_final_answer(text_field(line, "answer", where))
        if not answer:
            raise ValueError(f"{where}: 'answer' has nothing after {_FINAL_ANSWER_MARK!r}")
        task_name = default_task_name
        if "task_name" in line:
            task_name = text_field(line, "task_name", where)
        records.append(PromptRecord(prompt, answer, task_name, len(records), number))
    return records


class PromptStream:
    """The prompts of each RL step, as a function of the step alone, so that resuming is exact.

    ``source`` is a path to JSON lines or a task from ``build_task``.

    - File, "train": each epoch is a permutation derived from (seed, epoch); step t takes the
      positions t*n to t*n + n - 1 of the epochs laid end to end, so keep n the same in a run.
    - File, "validation": file order, once; the seed has no effect.
    - Task: step t takes the problems t*n to t*n + n - 1 of the split. In "train" each seed has its
      own range of problems (seed 0 starts at problem 0); "validation" is the same for every seed.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Task,
        seed: int = 0,
        split: str = "train",
        default_task_name: str = DEFAULT_TASK_NAME,
    ) -> None:
        """Raises ValueError for a bad file (see ``read_prompts``), split or seed."""
        self._first = first_problem(split, seed)
        self._seed = seed
        self._split = split
        self._task: Task | None = None
        self._path = ""
        self._records: list[PromptRecord] = []
        self._epoch_orders: dict[int, list[int]] = {}
        if isinstance(source, (str, os.PathLike)):
            self._path = os.fspath(source)
            self._records = read_prompts(source, default_task_name)
            self._fingerprint = hashlib.sha256(Path(source).read_bytes()).hexdigest()
        else:
            self._task = source
            self._fingerprint = _task_fingerprint(source)

    @property
    def size(self) -> int | None:
        """Number of prompts in a file, None for a generated task."""
        return None if self._task is not None else len(self._records)

    def records(self, n: int) -> list[PromptRecord]:
        """All prompts of a file in its order; of a generated task the first ``n``."""
        return list(self._records) if self._task is None else self.prompts_for_step(0, n)

    def place(self, record: PromptRecord) -> str:
        """Where a prompt comes from: "file:line", or the task and the problem's number in it."""
        if self._task is None:
            return f"{self._path}:{record.line}"
        return f"{self._task.name}, {self._split} problem {record.index}"

    def task_names(self) -> dict[str, str]:
        """Names of the verifiers that the prompts ask for, and the place of the first that does."""
        first = {record.task_name: record for record in reversed(self.records(1))}
        return {name: self.place(record) for name, record in first.items()}

    def fingerprint(self) -> str:
        """SHA-256 of the file's bytes, or of the task's name, parameters and first problems.

        Saved with a checkpoint and compared on resume: a different value means different prompts.
        """
        return self._fingerprint

    def prompts_for_step(self, step: int, n: int) -> list[PromptRecord]:
        """The ``n`` prompts of ``step`` (0-based); the same call gives the same prompts.

        Raises ValueError for a negative step, n < 1, or a validation step past the end.
        """
        if step < 0 or n < 1:
            raise ValueError(f"need step >= 0 and n >= 1, got step={step}, n={n}")
        positions = range(step * n, step * n + n)
        if self._task is not None:
            return [self._generated(self._task, position) for position in positions]
        if self._split == "validation":
            return self._in_file_order(positions)
        return [self._shuffled(position) for position in positions]

    def _generated(self, task: Task, position: int) -> PromptRecord:
        index = self._first + position
        problem = task.problem(self._split, index)
        return PromptRecord(problem.prompt, problem.answer, problem.task_name, index)

    def _in_file_order(self, positions: range) -> list[PromptRecord]:
        if positions.stop > len(self._records):
            raise ValueError(
                f"validation has {len(self._records)} prompts, number {positions.stop} was asked "
                "for; validate on fewer"
            )
        return self._records[positions.start : positions.stop]

    def _shuffled(self, position: int) -> PromptRecord:
        epoch, offset = divmod(position, len(self._records))
        if epoch not in self._epoch_orders:
            # A step seldom touches more than two epochs; older orders can be derived again.
            self._epoch_orders = {
                e: order for e, order in self._epoch_orders.items() if e == epoch - 1
            }
            self._epoch_orders[epoch] = _permutation(len(self._records), self._seed, epoch)
        return self._records[self._epoch_orders[epoch][offset]]


def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    # Sorting by a hash needs no library's shuffle, which may change between versions.
    key = mix64(mix64(seed) + epoch)
    return sorted(range(size), key=lambda index: mix64(key ^ index))


def _task_fingerprint(task: Task) -> str:
    # The problems are part of it, so that a change of the generator's code is noticed as well.
    problems = [task.problem("train", index) for index in range(4)]
    content = {
        "task": task.name,
        "params": task.params(),
        "problems": [[problem.prompt, problem.solution, problem.answer] for problem in problems],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
