"""One call of the embedded engine: requests into rows, and cycles until all are answered."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice, takewhile

import numpy as np
import torch

from megatron_occ.mcore.inference.attend import rows_to_swap
from megatron_occ.mcore.inference.passes import Passes
from megatron_occ.mcore.inference.prefill import Prefix, choose_prompts
from megatron_occ.mcore.inference.slots import Begun, Slots, Verified
from megatron_occ.mcore.layout import Layout
from megatron_occ.rollout import DraftStatistics, Generation, Request, SamplingSettings
from megatron_occ.rollout.draft_length import DraftLength
from megatron_occ.rollout.engine import ABORT, LENGTH, STOP

# cycles between looks at which rows are long: they grow slowly
LOOK_EVERY = 8


class Decoding:
    """State of one call.

    All ranks that share the model hold the same rows and take the same steps.

    Args:
        requests: at least one on some rank that shares experts with this one.
        sampling: of all requests.
        slots: empty rows.
        passes: through the model, over these rows.
        layout: this rank's place.
        draft_length: decides how much is drafted.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        sampling: SamplingSettings,
        slots: Slots,
        passes: Passes,
        layout: Layout,
        draft_length: DraftLength,
    ) -> None:
        self.requests, self.sampling = requests, sampling
        self.slots, self.passes, self.layout = slots, passes, layout
        self.company, self.draft_length = passes.trunk.company, draft_length
        self.prompts = [tuple(request.prompt) for request in requests]
        self.waiting = deque(range(len(requests)))
        self.prefix: Prefix | None = None
        # the request in each row
        self.owners: list[int | None] = [None] * slots.rows
        self.active = self.cycles = 0
        # responses that wait to go on, by request
        self.begun: dict[int, Begun] = {}
        self.generation = Generation(
            [[] for _ in requests], [[] for _ in requests], [ABORT] * len(requests)
        )
        if sampling.keep_states and passes.state is not None:
            self.generation.states = [torch.empty(0)] * len(requests)
        if sampling.keep_routes:
            self.generation.routes = [torch.empty(0)] * len(requests)
        if sampling.keep_masks:
            self.generation.masks = [torch.empty(0)] * len(requests)

    def run(self, aborted: threading.Event) -> Generation:
        """Answer all requests; after ``aborted`` is set, with what is in the rows."""
        length = self.draft_length.limit
        while True:
            self._admit(reads=length > 0)
            length, goes_on = self._decide(aborted)
            if not goes_on:
                break
            self._make_room(length)
            self._cycle(length)
        self._answer({row: ABORT for row in range(self.active)})
        return self.generation

    def _decide(self, aborted: threading.Event) -> tuple[int, bool]:
        """Draft length of the next cycle and whether there is one, on all ranks alike."""
        length = self.draft_length.choose(self.active) if self.active else 0
        length, ends = self.layout.decide(length, aborted.is_set())
        decided = [length, int(ends), int(self.active > 0)]
        length, stops, anyone = self.company.largest(decided)
        return length, bool(anyone and not stops)

    def _cycle(self, length: int) -> None:
        """Draft, verify, commit."""
        started, drafts = time.perf_counter(), DraftStatistics()
        if self.passes.attends_by_spans and self.cycles % LOOK_EVERY == 0:
            self._bring_long_rows_forward()
        self.cycles += 1
        # a rank without sequences keeps those company that share its experts
        rows = max(self.active, 1) if self.company.shares else self.active
        verified = self.passes.draft_and_verify(rows, length)
        if not self.active:
            return
        self._commit(slice(0, self.active), verified.first(self.active), drafts)
        seconds = time.perf_counter() - started
        self.draft_length.observe(self.active, length, seconds, drafts)
        self.generation.drafts.add(drafts)

    def _admit(self, *, reads: bool) -> None:
        """Fill free rows with waiting requests; then the rows in use are the first ones."""
        while True:
            free = [row for row, owner in enumerate(self.owners) if owner is None]
            count = self._fitting(min(len(free), len(self.waiting)))
            needs = count > 0 and not self._is_read(self.waiting[0])
            anyone, needed = self.company.largest([count, int(needs)])
            if not anyone:
                break
            if needed:
                self._read(count if needs else 0, reads)
            if count:
                self._start(free[:count])
        self._compact()

    def _fitting(self, count: int) -> int:
        """How many of the next ``count`` requests there is room for."""
        return self.passes.room.fitting(*self._sizes(islice(self.waiting, count)))

    def _sizes(self, requests: Iterable[int]) -> tuple[list[int], list[int]]:
        """Tokens that rows of these requests begin with, and have at most."""
        tokens, ends = [], []
        for index in requests:
            request = self.requests[index]
            # with the token that is drawn after the prompt
            tokens.append(len(self.prompts[index]) + 1)
            ends.append(len(request.prompt) + self._limit(request) + self.draft_length.limit)
        return tokens, ends

    def _is_read(self, request: int) -> bool:
        return self.prefix is not None and self.prompts[request] in self.prefix.rows

    def _read(self, count: int, reads: bool) -> None:
        """Prefill the prompts of the next ``count`` requests and some more; 0: keep company."""
        prompts = [(0,)]
        if count:
            # its samples are all on their way: two caches of prompts need not be there at once
            self.prefix = None
            wanted = {self.prompts[index] for index in islice(self.waiting, count)}
            # rows get free one at a time: read ahead, not a prompt for each of them
            ahead = max(len(wanted), self.slots.rows // 4)
            prompts = choose_prompts((self.prompts[index] for index in self.waiting), ahead)
        longest = self.company.largest([max(map(len, prompts))])[0]
        found = self.passes.prefill(prompts, longest, reads=reads)
        if count:
            self.prefix = found

    def _start(self, free: list[int]) -> None:
        """Put waiting requests whose prompts are read into free rows, and draw first tokens."""
        assert self.prefix is not None, "prompts are read before requests start"
        chosen = []
        while len(chosen) < len(free) and self.waiting and self._is_read(self.waiting[0]):
            chosen.append(self.waiting.popleft())
        picked = [self.requests[index] for index in chosen]
        prompts = [self.prompts[index] for index in chosen]
        limits = [self._limit(request) for request in picked]
        rows = free[: len(chosen)]
        self.passes.room.admit(rows, *self._sizes(chosen))
        begun = [self.begun.pop(index, None) for index in chosen]
        seeds = [request.seed for request in picked]
        self.slots.admit(rows, prompts, limits, seeds, begun)
        for row, index in zip(rows, chosen, strict=True):
            self.owners[row] = index
        sources = [self.prefix.rows[prompt] for prompt in prompts]
        self._commit(rows, self.passes.first_tokens(self.prefix, sources, rows), None)

    def _limit(self, request: Request) -> int:
        own, limit = request.max_response_length, self.sampling.max_response_length
        return limit if own is None else min(own, limit)

    def _commit(
        self, rows: list[int] | slice, verified: Verified, drafts: DraftStatistics | None
    ) -> None:
        """Append tokens, and answer what they finish."""
        stopped, finished = self.slots.commit(rows, verified, drafts)
        numbers = range(self.slots.rows)[rows] if isinstance(rows, slice) else rows
        ended = np.flatnonzero(finished).tolist()
        self._answer({numbers[i]: STOP if stopped[i] else LENGTH for i in ended})

    def _answer(self, reasons: dict[int, str]) -> None:
        """Answer the requests in these rows, and free the rows."""
        rows = list(reasons)
        for kept, read in (
            (self.generation.states, self.passes.states),
            (self.generation.masks, self.slots.masks_of),
            (self.generation.routes, self.passes.routes),
        ):
            for row, values in zip(rows, read(rows) if kept else (), strict=bool(kept)):
                kept[self.owners[row]] = values
        found = self.slots.responses(rows)
        for (row, reason), (tokens, logprobs) in zip(reasons.items(), found, strict=True):
            owner = self.owners[row]
            assert owner is not None, "a free row has nothing to answer"
            self.generation.tokens[owner] = tokens
            self.generation.logprobs[owner] = logprobs
            self.generation.finish_reasons[owner] = reason
            self._free(row)

    def _make_room(self, length: int) -> None:
        """Let rows grow by the tokens of a cycle; where there is no room, some give way."""
        wanted = self.slots.known[: self.active] + length
        if self.passes.room.lacks(wanted):
            self._put_back(wanted)
            wanted = self.slots.known[: self.active] + length
        self.passes.room.reserve(wanted)

    def _put_back(self, wanted: np.ndarray) -> None:
        """Let the shortest responses wait until the others have room; they go on from their tokens.

        Drawn anew they would be others where tokens hang on how much was drafted, and short ones
        preferred: a response that has ended is never put back.

        Args:
            wanted: tokens of each row in use.
        """
        made = wanted - self.slots.start[: self.active]
        for row in np.argsort(made, kind="stable").tolist():
            self._let_wait(row)
            wanted[row] = 0
            if not self.passes.room.lacks(wanted):
                break
        self._compact()

    def _let_wait(self, row: int) -> None:
        owner = self.owners[row]
        assert owner is not None, "a free row has nothing to go on with"
        tokens, self.begun[owner] = self.slots.take_out(row)
        self.prompts[owner] = tuple(self.requests[owner].prompt) + tuple(tokens)
        # behind those that are read already: reading it first would throw them away
        read = sum(1 for _ in takewhile(self._is_read, self.waiting))
        self.waiting.insert(read, owner)
        self.generation.drafts.preempted += 1
        self._free(row)

    def _free(self, row: int) -> None:
        self.owners[row] = None
        self.passes.room.release([row])

    def _bring_long_rows_forward(self) -> None:
        """So that they can attend on their own, see ``attend.long_rows``."""
        front, behind = rows_to_swap(self.slots.known[: self.active]) if self.active else ([], [])
        if not front:
            return
        length = int(self.slots.known[behind].max())
        self.passes.move([*front, *behind], [*behind, *front], length)
        for one, other in zip(front, behind, strict=True):
            self.owners[one], self.owners[other] = self.owners[other], self.owners[one]

    def _compact(self) -> None:
        """Move rows in use into the holes before them."""
        self.active = sum(owner is not None for owner in self.owners)
        holes = [row for row in range(self.active) if self.owners[row] is None]
        if not holes:
            return
        used = [row for row, owner in enumerate(self.owners) if owner is not None]
        moved = [row for row in used if row >= self.active]
        self.passes.move(moved, holes, int(self.slots.known[moved].max()))
        for row, hole in zip(moved, holes, strict=True):
            self.owners[hole], self.owners[row] = self.owners[row], None
