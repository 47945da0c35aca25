"""Evaluation of a set: every response of all ranks on the main one, and the figures of the set."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_occ.data.prompt_stream import PromptStream
from megatron_occ.data.prompts import PromptRecord
from megatron_occ.rl.evaluation import Amount, Answered, answer
from megatron_occ.rl.interfaces import Collectives
from megatron_occ.rl.pass_rates import Figure, majority_at, mean_over_problems, pass_at
from megatron_occ.rl.rewards import FULL_SCORE, Question, Votes
from megatron_occ.rl.sampler import Sampler
from megatron_occ.rollout import DraftStatistics
from megatron_occ.rollout.engine import LENGTH

Entry = dict[str, Any]


@dataclass
class Assessment:
    """What an evaluation says of a set.

    Args:
        figures: by name: ``avg@k``, ``pass@1`` to ``pass@k``, ``maj@k``, ``truncated`` (share of
            responses that were cut off) and ``length`` (tokens); empty but on the main rank.
        problems: how many.
        notes: what a reader has to know, for example why there is no ``maj@k``.
        drafts: of this rank.
    """

    figures: dict[str, Figure] = field(default_factory=dict)
    problems: int = 0
    notes: list[str] = field(default_factory=list)
    drafts: DraftStatistics = field(default_factory=DraftStatistics)


def assess(
    sampler: Sampler,
    stream: PromptStream,
    amount: Amount,
    seed: int,
    write: Callable[[Entry], None],
) -> Assessment:
    """Evaluate a sampler's actor on a set; called by all ranks.

    Args:
        sampler: samples and scores.
        stream: the problems.
        amount: how many of them, and of responses to each.
        seed: of sampling, see :func:`answer`.
        write: takes, on the main rank, each problem with its responses, in order.

    Raises:
        ValueError: a prompt does not fit, or the verifier of every response failed.
    """
    answered = answer(sampler, stream, amount, seed)
    found = Assessment(
        problems=len(answered.records),
        notes=answered.samples.warnings(),
        drafts=answered.samples.drafts,
    )
    layout = sampler.actor.layout
    if not layout.is_model_parallel_main:
        return found
    own = _entries(answered, stream, _votes(sampler, answered))
    table = _Table()
    for entry in in_order(own, len(answered.records), layout):
        if layout.is_main:
            write(entry)
            table.add(entry)
    if layout.is_main:
        found.figures, notes = table.figures()
        found.notes += notes
    return found


def _votes(sampler: Sampler, answered: Answered) -> list[Votes]:
    """Of this rank's problems."""
    size, samples = answered.size, answered.samples
    questions = []
    for place, number in enumerate(answered.mine):
        record, rows = answered.records[number], slice(place * size, (place + 1) * size)
        right = [score >= FULL_SCORE for score in samples.scores[rows]]
        texts = [sampler.without_stop(text) for text in samples.texts[rows]]
        questions.append(Question(record.task_name, texts, record.answer, right))
    return sampler.verifiers.votes(questions)


def _entries(answered: Answered, stream: PromptStream, votes: list[Votes]) -> list[Entry]:
    """This rank's problems with their responses, as JSON can hold them."""
    size = answered.size
    return [
        {
            **_problem(answered.records[number], number, stream),
            "votes_problem": votes[place].problem,
            "responses": [
                _response(answered, place * size + copy, votes[place], copy) for copy in range(size)
            ],
        }
        for place, number in enumerate(answered.mine)
    ]


def _problem(record: PromptRecord, number: int, stream: PromptStream) -> Entry:
    return {
        "problem": number,
        "place": stream.place(record),
        "prompt": record.prompt,
        "answer": record.answer,
        "verifier": record.task_name,
    }


def _response(answered: Answered, row: int, votes: Votes, copy: int) -> Entry:
    samples = answered.samples
    return {
        "sample": copy,
        "response": samples.texts[row],
        "score": samples.scores[row],
        "correct": samples.scores[row] >= FULL_SCORE,
        "tokens": len(samples.tokens[row]),
        "truncated": samples.finish_reasons[row] == LENGTH,
        **({} if votes.problem else {"read": votes.answers[copy], "group": votes.groups[copy]}),
        **({"verifier_failure": samples.problems[row]} if samples.problems[row] else {}),
    }


def in_order(own: list[Entry], count: int, layout: Collectives) -> Iterator[Entry]:
    """Entries of all data-parallel ranks, of which rank r of R holds those r, r + R, ...

    Sent a problem of each rank at a time: all responses at once may be more than a device has room
    for.

    Args:
        own: of this rank.
        count: of all ranks.
        layout: this rank's place.
    """
    ranks = layout.data_parallel_size
    for turn in range(-(-count // ranks)):
        mine = own[turn] if turn < len(own) else None
        yield from (entry for entry in _gathered(mine, layout) if entry is not None)


def _gathered(entry: Entry | None, layout: Collectives) -> list[Entry | None]:
    if layout.data_parallel_size == 1:
        return [entry]
    # plain ASCII: no byte of it is 0, which fills up
    here = torch.frombuffer(bytearray(json.dumps(entry).encode("ascii")), dtype=torch.uint8)
    longest = torch.tensor(float(len(here)), dtype=torch.float64, device=layout.device)
    size = int(layout.all_reduce_data_parallel(longest, maximum=True))
    padded = torch.zeros(size, dtype=torch.uint8)
    padded[: len(here)] = here
    rows = layout.gather_data_parallel(padded.to(layout.device)).cpu().view(-1, size)
    return [json.loads(row.numpy().tobytes().rstrip(b"\0")) for row in rows]


class _Table:
    """The numbers of all responses."""

    def __init__(self) -> None:
        self._rows: dict[str, list[list[float]]] = {
            name: [] for name in ("score", "correct", "truncated", "tokens", "group")
        }
        self._without_votes = ""

    def add(self, entry: Entry) -> None:
        """The next problem."""
        for name, rows in self._rows.items():
            if name != "group" or not entry["votes_problem"]:
                rows.append([float(response[name]) for response in entry["responses"]])
        if entry["votes_problem"] and not self._without_votes:
            self._without_votes = f"{entry['votes_problem']} ({entry['place']})"

    def figures(self) -> tuple[dict[str, Figure], list[str]]:
        """Those of :class:`Assessment`, and what there is to say of them."""
        values = {
            name: torch.tensor(rows, dtype=torch.float64) for name, rows in self._rows.items()
        }
        samples = values["score"].shape[1]
        by_problem = {f"avg@{samples}": values["score"].mean(1)}
        by_problem |= self._passes(values["correct"] > 0, samples)
        notes = []
        if samples > 1 and self._without_votes:
            notes.append(f"maj@{samples} is left out: {self._without_votes}")
        elif samples > 1:
            by_problem[f"maj@{samples}"] = majority_at(values["group"].long())
        by_problem |= {"truncated": values["truncated"].mean(1), "length": values["tokens"].mean(1)}
        return {name: mean_over_problems(each) for name, each in by_problem.items()}, notes

    def _passes(self, correct: Tensor, samples: int) -> dict[str, Tensor]:
        return {f"pass@{k}": pass_at(correct, k) for k in range(1, samples + 1)}
