"""Responses that no verifier could score: how many on all ranks, and why the first one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_occ.rl.interfaces import Collectives
from megatron_occ.rl.rewards import VerifierResult

# Ranks exchange tensors of one size; the verifier process cuts its texts at 500 characters.
_TEXT_BYTES = 2048


@dataclass
class Failures:
    """What became of scored responses.

    Args:
        scored: responses that verifiers were asked about.
        errors: those whose verifier failed.
        timeouts: those whose verifier took too long.
        first: verifier and text of the first error; "" without one.
    """

    scored: int = 0
    errors: int = 0
    timeouts: int = 0
    first: str = ""

    @classmethod
    def of(cls, names: Sequence[str], results: Sequence[VerifierResult]) -> Failures:
        """Those among ``results``, of the verifiers ``names``."""
        statuses = [result.status for result in results]
        errors = (
            f"verifier {name!r}: {result.detail}"
            for name, result in zip(names, results, strict=True)
            if result.status == "error"
        )
        counts = (statuses.count(status) for status in ("error", "timeout"))
        return cls(len(results), *counts, first=next(errors, ""))

    def add(self, other: Failures) -> None:
        """Count those of ``other``, which came later, as well."""
        self.scored += other.scored
        self.errors += other.errors
        self.timeouts += other.timeouts
        self.first = self.first or other.first

    def over_ranks(self, layout: Collectives) -> Failures:
        """Those of all data-parallel ranks, on every rank; called by all of them.

        Only the main rank of a data-parallel share asks the verifiers, and knows.
        """
        here = [float(count) for count in (self.scored, self.errors, self.timeouts)]
        total = torch.tensor(here, dtype=torch.float64, device=layout.device)
        layout.broadcast_model_parallel(layout.all_reduce_data_parallel(total))
        scored, errors, timeouts = (int(count) for count in total.tolist())
        first = self._first_of_ranks(layout) if errors else ""
        return Failures(scored, errors, timeouts, first)

    def _first_of_ranks(self, layout: Collectives) -> str:
        text = self.first.encode("utf-8", "replace")[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
        here = torch.tensor(list(text), dtype=torch.uint8, device=layout.device)
        texts = layout.broadcast_model_parallel(layout.gather_data_parallel(here))
        by_rank = [bytes(row).rstrip(b"\0") for row in texts.view(-1, _TEXT_BYTES).tolist()]
        # a character may have been cut in two at the end
        return next((row.decode("utf-8", "ignore") for row in by_rank if row), "")

    @property
    def share(self) -> float:
        """Of the responses that could not be scored, 0 where none was to be."""
        return (self.errors + self.timeouts) / max(1, self.scored)

    def check(self) -> None:
        """Refuse to go on with rewards that say nothing.

        Raises:
            ValueError: the verifier of every response failed.
        """
        if self.errors and self.errors == self.scored:
            raise ValueError(
                f"no response could be scored: all {self.errors} failed with an error, the first "
                f"in {self.first}. A verifier takes (response, answer) and returns a finite "
                "number: correct it (data.verifiers, data.verifier) or the answers in the data. A "
                "run that has begun goes on with --resume"
            )

    def events(self) -> list[str]:
        """A line about the errors, if there are any."""
        if not self.errors:
            return []
        count = f"{self.errors} of {self.scored} responses"
        return [f"{count} scored 0 because their verifier failed, the first in {self.first}"]
