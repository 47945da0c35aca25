"""Which prompts belong to which step of RL: a function of the step alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence

from megatron_occ.config.words import counted
from megatron_occ.data.prompts import (
    PromptFile,
    PromptOptions,
    PromptRecord,
    read_prompt_file,
    renumbered,
)
from megatron_occ.data.splits import first_problem, mix64
from megatron_occ.data.tasks import Task

Source = str | os.PathLike[str] | Task | Sequence[PromptFile]


class PromptStream:
    """The prompts of each RL step, as a function of the step alone, so that resuming is exact.

    - Files, "train": each epoch is a permutation derived from (seed, epoch); step t takes the
      positions t*n to t*n + n - 1 of the epochs laid end to end, so keep n the same in a run. No
      prompt comes twice within n positions, across the end of an epoch neither. Files with weights
      have epochs of their own, and take turns by weight.
    - Files, "validation": file order, once; the seed has no effect.
    - Task: step t takes the problems t*n to t*n + n - 1 of the split. In "train" each seed has its
      own range of problems (seed 0 starts at problem 0); "validation" is the same for every seed.
    """

    def __init__(
        self,
        source: Source,
        seed: int = 0,
        split: str = "train",
        options: PromptOptions | None = None,
    ) -> None:
        """Open a source.

        Args:
            source: a task from ``build_task``, files that were read, or the path of one.
            seed: of the order.
            split: "train" or "validation".
            options: for a path.

        Raises:
            ValueError: a bad file (see ``read_prompt_file``), split or seed.
        """
        self._first = first_problem(split, seed)
        self._seed = seed
        self._split = split
        self._task: Task | None = None
        self._records: list[PromptRecord] = []
        self._turns: _Turns | None = None
        if isinstance(source, (str, os.PathLike)):
            source = [read_prompt_file(source, options)]
        if isinstance(source, Sequence):
            self.files = list(source)
            self._records = renumbered(record for file in self.files for record in file.records)
            self._turns = _Turns(_groups(self.files, self._records), seed)
            self._fingerprint = _files_fingerprint(self.files)
        else:
            self.files = []
            self._task = source
            self._fingerprint = _task_fingerprint(source)

    @property
    def size(self) -> int | None:
        """Number of prompts in files, None for a generated task."""
        return None if self._task is not None else len(self._records)

    def records(self, n: int) -> list[PromptRecord]:
        """All prompts of files in their order; of a generated task the first ``n``."""
        return list(self._records) if self._task is None else self.prompts_for_step(0, n)

    def place(self, record: PromptRecord) -> str:
        """Where a prompt comes from: "file:line", or the task and the problem's number in it."""
        if self._task is None:
            return record.place
        return f"{self._task.name}, {self._split} problem {record.index}"

    def task_names(self) -> dict[str, str]:
        """Names of the verifiers that the prompts ask for, and the place of the first that does."""
        first = {record.task_name: record for record in reversed(self.records(1))}
        return {name: self.place(record) for name, record in first.items()}

    def fingerprint(self) -> str:
        """SHA-256 of the files' bytes, or of the task's name, parameters and first problems.

        Saved with a checkpoint and compared on resume: a different value means different prompts.
        """
        return self._fingerprint

    def prompts_for_step(self, step: int, n: int) -> list[PromptRecord]:
        """The ``n`` prompts of ``step`` (0-based); the same call gives the same prompts.

        Raises:
            ValueError: a negative step, n < 1, more than a file has, or a validation step past the
                end.
        """
        if step < 0 or n < 1:
            raise ValueError(f"need step >= 0 and n >= 1, got step={step}, n={n}")
        positions = range(step * n, step * n + n)
        if self._task is not None:
            return [self._generated(self._task, position) for position in positions]
        if self._split == "validation":
            return self._in_file_order(positions)
        assert self._turns is not None
        return self._turns.records(positions)

    def _generated(self, task: Task, position: int) -> PromptRecord:
        index = self._first + position
        problem = task.problem(self._split, index)
        return PromptRecord(problem.prompt, problem.answer, problem.task_name, index)

    def _in_file_order(self, positions: range) -> list[PromptRecord]:
        if positions.stop > len(self._records):
            raise ValueError(
                f"validation has {counted(len(self._records), 'prompt')}, number {positions.stop} "
                "was asked for; validate on fewer"
            )
        return self._records[positions.start : positions.stop]


class _Epochs:
    """Permutations of some records, one after the other, derived from seed and epoch."""

    def __init__(self, records: Sequence[PromptRecord], seed: int) -> None:
        self._records, self._seed = records, seed
        self._window = 0
        self._orders: dict[int, list[int]] = {}

    def record(self, position: int, window: int) -> PromptRecord:
        epoch, offset = divmod(position, len(self._records))
        return self._records[self._order(epoch, window)[offset]]

    def _order(self, epoch: int, window: int) -> list[int]:
        if window != self._window:
            self._window, self._orders = window, {}
        known = max((kept for kept in self._orders if kept <= epoch), default=-1)
        for number in range(known + 1, epoch + 1):
            order = _permutation(len(self._records), self._seed, number)
            if number > 0:
                order = _apart(self._orders[number - 1], order, window)
            # a step seldom touches more than two epochs; others can be derived again
            self._orders = {n: kept for n, kept in self._orders.items() if n == number - 1}
            self._orders[number] = order
        return self._orders[epoch]


def _apart(before: Sequence[int], order: Sequence[int], window: int) -> list[int]:
    """``order`` with what comes too soon after its place in ``before`` put off.

    Within ``window`` positions across the border no entry comes twice. That works out for any
    window up to the number of entries: fewer are barred from a position than are left for it.
    """
    size = len(before)
    last = {entry: place - size for place, entry in enumerate(before)}
    waiting, found = list(order), []
    while len(found) < min(window - 1, size):
        place = len(found)
        pick = next(i for i, entry in enumerate(waiting) if place - last[entry] >= window)
        found.append(waiting.pop(pick))
    return found + waiting


class _Turns:
    """Groups of records that take turns by weight, so that each has its share early on."""

    def __init__(self, groups: Sequence[tuple[float, Sequence[PromptRecord]]], seed: int) -> None:
        total = sum(weight for weight, _ in groups)
        self._shares = [weight / total for weight, _ in groups]
        self._sizes = [len(records) for _, records in groups]
        self._epochs = [
            _Epochs(records, mix64(seed + number) if number else seed)
            for number, (_, records) in enumerate(groups)
        ]
        # of each position: its group, and how many of that group came before
        self._schedule: list[tuple[int, int]] = []
        self._drawn = [0] * len(groups)

    def records(self, positions: range) -> list[PromptRecord]:
        self._check(len(positions))
        self._extend(positions.stop)
        return [
            self._epochs[group].record(number, min(len(positions), self._sizes[group]))
            for group, number in self._schedule[positions.start : positions.stop]
        ]

    def _check(self, n: int) -> None:
        for share, size in zip(self._shares, self._sizes, strict=True):
            # a group may be one ahead of its share at either end of a step
            needed = n if len(self._shares) == 1 else min(n, int(share * n) + 2)
            if size < needed:
                raise ValueError(
                    f"one step takes {needed} of the file's {size}, and would have the same prompt "
                    "twice"
                )

    def _extend(self, stop: int) -> None:
        """The group that is furthest behind its share comes next."""
        while len(self._schedule) < stop:
            position = len(self._schedule) + 1
            behind = [s * position - d for s, d in zip(self._shares, self._drawn, strict=True)]
            group = max(range(len(behind)), key=behind.__getitem__)
            self._schedule.append((group, self._drawn[group]))
            self._drawn[group] += 1


def _groups(
    files: Sequence[PromptFile], records: Sequence[PromptRecord]
) -> list[tuple[float, Sequence[PromptRecord]]]:
    """Weight and records of each file, one group of all where there are no weights."""
    if all(file.weight is None for file in files):
        return [(1.0, records)]
    groups, start = [], 0
    for file in files:
        stop = start + len(file.records)
        groups.append((file.weight or 0.0, records[start:stop]))
        start = stop
    return groups


def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    # Sorting by a hash needs no library's shuffle, which may change between versions.
    key = mix64(mix64(seed) + epoch)
    return sorted(range(size), key=lambda index: mix64(key ^ index))


def _files_fingerprint(files: Sequence[PromptFile]) -> str:
    if len(files) == 1:
        return files[0].fingerprint
    text = "\n".join(f"{file.fingerprint} {file.weight}" for file in files)
    return hashlib.sha256(text.encode()).hexdigest()


def _task_fingerprint(task: Task) -> str:
    # The problems are part of it, so that a change of the generator's code is noticed as well.
    problems = [task.problem("train", index) for index in range(4)]
    content = {
        "task": task.name,
        "params": task.params(),
        "problems": [[problem.prompt, problem.solution, problem.answer] for problem in problems],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
