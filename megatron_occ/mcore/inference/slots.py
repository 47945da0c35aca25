"""Tokens of the sequences that are being generated, a row for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_occ.mcore.inference.room import send_numbers
from megatron_occ.rollout import DraftStatistics, row_keys, token_keys
from megatron_occ.rollout.text import StopText


@dataclass(frozen=True)
class Verified:
    """What a pass over drafts came to.

    Args:
        tokens: [n, q] tokens to commit, the first ``accepted`` + 1 of each row.
        logprobs: [n, q] of them.
        accepted: [n] drafts that stay, 0 .. q - 1; -1: the row has to be looked at ``again``, since
            its tokens were not drawn from all that they should be drawn from.
        masks: [n, q, m] ids that each was drawn from, see ``Generation``; None: not kept.
        again: gives the same with nothing left to look at; waits for the device.
    """

    tokens: Tensor
    logprobs: Tensor
    accepted: Tensor
    masks: Tensor | None = None
    again: Callable[[], Verified] | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, in the order of the arguments."""
        return self.tokens, self.logprobs, self.accepted, self.masks

    def first(self, rows: int) -> Verified:
        """The first ``rows`` rows."""
        if rows == len(self.tokens):
            return self
        cut = Verified(*(each if each is None else each[:rows] for each in self.tensors()))
        again = self.again
        return replace(cut, again=lambda: again().first(rows)) if again else cut

    def with_rows(self, rows: Tensor, found: Verified) -> Verified:
        """With other findings in rows [m]."""
        pairs = zip(self.tensors(), found.tensors(), strict=True)
        return Verified(*(a if a is None else a.index_copy(0, rows, b) for a, b in pairs))


@dataclass(frozen=True)
class Begun:
    """A response that was taken out of its row, and goes on in another one.

    Args:
        logprobs: [n] of its tokens.
        masks: [n, m] ids that each was drawn from; None: not kept.
        tail: its last tokens, for the stop strings.
    """

    logprobs: Tensor
    masks: Tensor | None
    tail: list[int]


def pad_right(prompts: Sequence[Sequence[int]], width: int, device: torch.device) -> Tensor:
    """[n, width] token ids, behind each prompt zeros."""
    padded = [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]
    return torch.tensor(padded, device=device)


class Slots:
    """Rows of tokens, filled again as soon as one is finished.

    Tokens and log-probs lie on the device; how far each row has come is known to the host, which
    decides on it, and is sent to the device once a cycle.

    Args:
        rows: sequences at once.
        length: tokens of a row at most, with room for drafts behind the last one.
        stop_ids: ids that end a response.
        stop_text: finds stop strings; None: there are none.
        mask_width: ids that a token was drawn from at most, where they are kept; 0: they are not.
        device: of the tensors.

    Attributes:
        ids: [rows, length] tokens; drafts lie behind the known ones.
        known: [rows] tokens so far.
    """

    def __init__(
        self,
        rows: int,
        length: int,
        *,
        stop_ids: Sequence[int],
        stop_text: StopText | None,
        mask_width: int = 0,
        device: torch.device,
    ) -> None:
        self.rows, self.length, self.device = rows, length, device
        self.ids = torch.zeros(rows, length, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(rows, length, device=device)
        self._per_token = [self.ids, self.logprobs]
        self.masks: Tensor | None = None
        if mask_width:
            self.masks = torch.zeros(rows, length, mask_width, dtype=torch.int32, device=device)
            self._per_token.append(self.masks)
        # of the random numbers, see `rollout.noise`
        self.keys = torch.zeros(rows, dtype=torch.long, device=device)
        # a row that was never filled looks like one of two tokens, which is finished
        self.start, self.known, self.end = np.full((3, rows), 2)
        self.stop, self.stop_text = np.array(stop_ids, dtype=np.int64), stop_text
        # the last tokens of each response, for the stop strings
        self.tails: list[list[int]] = [[] for _ in range(rows)]
        # tokens so far and of the prompt, as the device has them: always at the same place
        self._numbers = torch.full((2, rows), 2, device=device)
        self._is_sent = True

    def admit(
        self,
        rows: Sequence[int],
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        seeds: Sequence[int],
        begun: Sequence[Begun | None],
    ) -> None:
        """Put prompts into rows.

        Args:
            rows: free ones.
            prompts: their tokens, and behind them those of a response that was begun.
            limits: response tokens at most.
            seeds: of the responses.
            begun: the rest of these, see :meth:`take_out`.
        """
        lengths = np.array([len(prompt) for prompt in prompts])
        targets, width = torch.tensor(rows, device=self.device), int(lengths.max())
        self.ids[targets, :width] = pad_right(prompts, width, self.device)
        self.keys[targets] = row_keys(seeds).to(self.device)
        self.start[rows] = self.known[rows] = lengths
        self.end[rows] = lengths + np.array(limits)
        for row, part in zip(rows, begun, strict=True):
            self.tails[row] = []
            if part is not None:
                self._go_on(row, part)
        self._is_sent = False

    def _go_on(self, row: int, begun: Begun) -> None:
        count, known = len(begun.logprobs), self.known[row]
        self.start[row] -= count
        self.end[row] -= count
        self.logprobs[row, known - count : known] = begun.logprobs
        if self.masks is not None:
            self.masks[row, known - count : known] = begun.masks
        self.tails[row] = begun.tail

    def take_out(self, row: int) -> tuple[list[int], Begun]:
        """The response in a row so far: its tokens, and what else :meth:`admit` needs to go on."""
        made = slice(self.start[row], self.known[row])
        masks = None if self.masks is None else self.masks[row, made].clone()
        begun = Begun(self.logprobs[row, made].clone(), masks, self.tails[row])
        return self.ids[row, made].tolist(), begun

    def send(self) -> None:
        """Tell the device how far rows have come, if it does not know; the host does not wait."""
        if self._is_sent:
            return
        send_numbers(self._numbers, np.stack((self.known, self.start)))
        self._is_sent = True

    def known_on_device(self, rows: Sequence[int] | slice) -> Tensor:
        """[n] tokens so far."""
        self.send()
        return self._numbers[0, rows]

    def token_keys(self, rows: Sequence[int] | slice, count: int) -> Tensor:
        """Keys of the random numbers of the next ``count`` tokens of rows, [n, count]."""
        self.send()
        known, start = self._numbers[:, rows]
        ahead = torch.arange(count, device=self.device)
        return token_keys(self.keys[rows], (known - start).unsqueeze(1) + ahead)

    def commit(
        self, rows: Sequence[int] | slice, verified: Verified, drafts: DraftStatistics | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Append verified tokens, up to the first that ends a response, or to the limit.

        Args:
            rows: n of them.
            verified: of these rows.
            drafts: counts on; None: these are the first tokens of responses.

        Returns:
            Two flags [n]: ended by a stop token or string; finished.
        """
        known = self.known[rows]
        tokens, accepted = self._append(rows, verified)
        if (accepted < 0).any():
            tokens, accepted = self._append(rows, verified.again())
        ends = self._ends(rows, tokens, accepted)
        # tokens before the first that ends the response, and that one
        until = (ends.cumsum(1) - ends == 0).sum(1)
        count = np.minimum(np.minimum(accepted + 1, until), self.end[rows] - known)
        self.known[rows] = known + count
        self._is_sent = False
        stopped = (ends & (np.arange(tokens.shape[1]) < count[:, None])).any(1)
        if drafts is not None:
            _count(drafts, accepted, count, tokens.shape[1] - 1)
        return stopped, stopped | (self.known[rows] >= self.end[rows])

    def _append(
        self, rows: Sequence[int] | slice, verified: Verified
    ) -> tuple[np.ndarray, np.ndarray]:
        """Put tokens and log-probs behind the known ones.

        Returns:
            For the host, which waits here, tokens [n, q] and the drafts that stay [n].
        """
        offsets = torch.arange(verified.tokens.size(1), device=self.device)
        places = self.known_on_device(rows).unsqueeze(1) + offsets
        new = [verified.tokens, verified.logprobs]
        new += [] if verified.masks is None else [verified.masks]
        if isinstance(rows, slice):
            for kept, values in zip(self._per_token, new, strict=True):
                index = places if values.dim() == 2 else places.unsqueeze(2).expand_as(values)
                kept[rows].scatter_(1, index, values)
        else:
            row = torch.tensor(rows, device=self.device).unsqueeze(1)
            for kept, values in zip(self._per_token, new, strict=True):
                kept[row, places] = values
        host = torch.cat((verified.tokens, verified.accepted.unsqueeze(1)), dim=1).cpu().numpy()
        return host[:, :-1], host[:, -1]

    def _ends(
        self, rows: Sequence[int] | slice, tokens: np.ndarray, accepted: np.ndarray
    ) -> np.ndarray:
        """[n, q] whether a response ends with this new token, if it gets there."""
        ends = (tokens[:, :, None] == self.stop).any(-1)
        if self.stop_text is None:
            return ends
        numbers = range(self.rows)[rows] if isinstance(rows, slice) else rows
        for row, found, new, kept in zip(numbers, ends, tokens.tolist(), accepted, strict=True):
            for index, token in enumerate(new[: kept + 1]):
                self.tails[row] = [*self.tails[row], token][-self.stop_text.window :]
                if found[index]:
                    break
                found[index] = self.stop_text.ends(self.tails[row])
        return ends

    def responses(self, rows: Sequence[int]) -> list[tuple[list[int], list[float]]]:
        """Tokens and log-probs of the responses in these rows so far."""
        if not rows:
            return []
        picked = torch.tensor(rows, device=self.device)
        spans = zip(self.start[list(rows)], self.known[list(rows)], strict=True)
        lists = zip(self.ids[picked].tolist(), self.logprobs[picked].tolist(), spans, strict=True)
        return [(ids[a:b], logprobs[a:b]) for ids, logprobs, (a, b) in lists]

    def masks_of(self, rows: Sequence[int]) -> list[Tensor]:
        """See ``Generation.masks``, of the responses in these rows so far."""
        assert self.masks is not None, "masks are not kept"
        found = []
        for row in rows:
            mask = self.masks[row, self.start[row] : self.known[row]]
            longest = int((mask > 0).sum(-1).max()) if len(mask) else 0
            found.append(mask[:, :longest].to("cpu", copy=True))
        return found

    def move(self, rows: Sequence[int], targets: Sequence[int]) -> None:
        """Copy rows to other places, all at the same time."""
        places = torch.tensor((list(rows), list(targets)), device=self.device)
        for values in (*self._per_token, self.keys):
            values[places[1]] = values[places[0]]
        for numbers in (self.start, self.known, self.end):
            numbers[targets] = numbers[rows]
        tails = [self.tails[row] for row in rows]
        for target, tail in zip(targets, tails, strict=True):
            self.tails[target] = tail
        self._is_sent = False


def _count(drafts: DraftStatistics, accepted: np.ndarray, count: np.ndarray, proposed: int) -> None:
    """Count drafts; those behind the end of a response were not needed and don't count."""
    drafts.passes += len(count)
    drafts.tokens += int(count.sum())
    if proposed == 0:
        return
    depths = np.arange(1, proposed + 1)
    cut, kept = (count <= accepted)[:, None], np.minimum(accepted, count)[:, None]
    decided = ~cut | (depths <= count[:, None])
    drafts.add(DraftStatistics(decided.sum(0).tolist(), (depths <= kept).sum(0).tolist()))
