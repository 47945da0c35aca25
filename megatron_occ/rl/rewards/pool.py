"""Scoring responses under a time limit, with verifiers that may hang, crash or exhaust memory."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from megatron_occ.config.machine import processors
from megatron_occ.rl.rewards.registry import RegisteredVerifier, lookup
from megatron_occ.rl.rewards.worker import VerifierWorker, WorkerDied, WorkerTimeout

# No model writes more in one response; it bounds what is copied to a verifier process.
MAX_RESPONSE_CHARS = 2_000_000

Item = tuple[str, str, str]
Reply = TypeVar("Reply")


@dataclass(frozen=True)
class VerifierResult:
    """A score, and how it came about; ``detail`` says what went wrong. Not "ok" scores 0.0."""

    score: float
    status: Literal["ok", "error", "timeout"]
    detail: str = ""


@dataclass(frozen=True)
class Question:
    """Which of several responses to a prompt agree.

    Args:
        name: of the verifier or task.
        responses: whole texts.
        answer: the reference.
        right: of each response, whether it was scored as correct.
    """

    name: str
    responses: Sequence[str]
    answer: str
    right: Sequence[bool]


@dataclass(frozen=True)
class Votes:
    """Answers that were read of responses, and which of them agree.

    Args:
        answers: text of each; "" where none was read.
        groups: of each: 0 where the response is correct, -1 without an answer, and from 1 on a
            number that wrong answers which say the same have in common.
        problem: why there are none; "" where there are.
    """

    answers: Sequence[str] = ()
    groups: Sequence[int] = ()
    problem: str = ""


def cores_of_rank() -> int:
    """Cores of this process: what Slurm gave it, or its share of the node; at least 1."""
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if given.isdigit() and "SLURM_PROCID" in os.environ:
        return max(1, int(given))
    return max(1, len(processors()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class VerifierPool:
    """Scores responses; whatever a verifier does, the run goes on and the failure is told.

    The built-in text comparisons run in the caller's process. "math" and users' verifiers run in
    ``workers`` processes, started at first use (importing a verifier may take seconds), kept for
    later calls, and killed and started again when an item runs over ``timeout_seconds``. On Linux
    a verifier may allocate ``memory_gib`` on top of what its import took; None lifts that limit
    (CUDA, for one, reserves far more address space than it uses).

    Can be used from any thread; concurrent calls of ``score`` take turns. Close it when done, or
    use it as a context manager; if the trainer dies the processes end by themselves.
    """

    def __init__(
        self,
        timeout_seconds: float = 5.0,
        workers: int = 1,
        memory_gib: float | None = 4.0,
    ) -> None:
        """Raises ValueError for a limit that is not positive and finite, or workers < 1."""
        _check_positive("timeout_seconds", timeout_seconds)
        if memory_gib is not None:
            _check_positive("memory_gib", memory_gib)
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise ValueError(f"workers must be an integer of at least 1, got {workers!r}")
        memory_bytes = None if memory_gib is None else int(memory_gib * 2**30)
        self._timeout = timeout_seconds
        self._workers = [VerifierWorker(memory_bytes) for _ in range(workers)]
        self._loaded_once: set[str] = set()
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the verifier processes. The pool cannot be used afterwards."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.kill()

    def score(self, items: Sequence[Item]) -> list[VerifierResult]:
        """Score (verifier or task name, response, reference answer) items; results in their order.

        Raises ValueError for an unknown verifier name, for a user's verifier that cannot be
        imported the first time it is needed, and when the pool is closed. Nothing that a verifier
        does with an item raises.
        """
        entries = [lookup(name) for name, _, _ in items]
        with self._lock:
            if self._closed:
                raise ValueError("the verifier pool is closed: make a new one")
            results: list[VerifierResult | None] = [
                _score_here(entry, response, answer)
                for entry, (_, response, answer) in zip(entries, items, strict=True)
            ]
            waiting = deque(i for i, result in enumerate(results) if result is None)

            def ask(worker: VerifierWorker, position: int) -> VerifierResult:
                _, response, answer = items[position]
                path = entries[position].path
                limit = self._timeout
                return self._scored(path, lambda: worker.ask(path, response, answer, limit))

            self._in_processes(ask, results, waiting)
        return results

    def votes(self, questions: Sequence[Question]) -> list[Votes]:
        """Which responses agree; of a verifier that does not know answers, that it does not.

        The time limit holds for each response, of a question's for all together. Nothing that
        becomes of a question raises.

        Raises:
            ValueError: an unknown verifier, or the pool is closed.
        """
        paths = [lookup(question.name).votes for question in questions]
        with self._lock:
            if self._closed:
                raise ValueError("the verifier pool is closed: make a new one")
            found: list[Votes | None] = [
                None if path else Votes(problem=f"verifier {question.name!r} reads no answers")
                for path, question in zip(paths, questions, strict=True)
            ]

            def ask(worker: VerifierWorker, position: int) -> Votes:
                question, path = questions[position], paths[position]
                assert path is not None, "only what has one waits"
                texts = [_short(text) for text in question.responses]
                given = (texts, question.answer, list(question.right))
                limit = self._timeout * len(texts)
                reply = self._reply(path, lambda: worker.call(path, given, limit))
                if isinstance(reply, VerifierResult):
                    return Votes(problem=reply.detail)
                return Votes(*zip(*reply["value"], strict=True))

            waiting = deque(i for i, votes in enumerate(found) if votes is None)
            self._in_processes(ask, found, waiting)
        return found

    def _in_processes(
        self,
        ask: Callable[[VerifierWorker, int], Reply],
        results: list[Reply | None],
        waiting: deque[int],
    ) -> None:
        """Fill in the results of the ``waiting`` positions, each worker taking the next one."""

        def serve(worker: VerifierWorker) -> None:
            while True:
                try:
                    position = waiting.popleft()
                except IndexError:
                    return
                results[position] = ask(worker, position)

        workers = self._workers[: len(waiting)]
        if len(workers) == 1:
            serve(workers[0])
        elif workers:
            with ThreadPoolExecutor(max_workers=len(workers)) as threads:
                list(threads.map(serve, workers))

    def _scored(self, path: str, ask: Callable[[], dict[str, Any]]) -> VerifierResult:
        reply = self._reply(path, ask)
        return reply if isinstance(reply, VerifierResult) else VerifierResult(reply["score"], "ok")

    def _reply(
        self, path: str, ask: Callable[[], dict[str, Any]]
    ) -> dict[str, Any] | VerifierResult:
        """What a worker says; where that is no answer, the failed result."""
        try:
            reply = ask()
        except WorkerTimeout as error:
            return VerifierResult(0.0, "timeout", str(error))
        except WorkerDied as error:
            return VerifierResult(0.0, "error", str(error))
        except ValueError as error:
            # A verifier that never could be imported is a mistake in the set-up, to be told at
            # once. One that could, and cannot after a restart, is a failure like any other.
            if path not in self._loaded_once:
                raise
            return VerifierResult(0.0, "error", str(error))
        self._loaded_once.add(path)
        return VerifierResult(0.0, "error", reply["error"]) if "error" in reply else reply


def _short(text: str) -> str:
    """A response that is no response is taken for an empty one, as scoring takes it for wrong."""
    return text if len(text) <= MAX_RESPONSE_CHARS else ""


def _score_here(entry: RegisteredVerifier, response: str, answer: str) -> VerifierResult | None:
    """The result of what needs no process: bad items and inline verifiers; None for the rest."""
    for what, text in (("response", response), ("answer", answer)):
        if not isinstance(text, str):
            return VerifierResult(0.0, "error", f"{what} is {type(text).__name__}, not text")
        if len(text) > MAX_RESPONSE_CHARS:
            detail = f"{what} has {len(text)} characters, the limit is {MAX_RESPONSE_CHARS}"
            return VerifierResult(0.0, "error", detail)
    if entry.inline is None:
        return None
    return VerifierResult(entry.inline(response, answer), "ok")


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value}")
