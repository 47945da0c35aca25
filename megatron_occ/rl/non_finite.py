"""Updates with a gradient that is not finite: which responses were in them, and when it is enough.

Such an update is skipped on all ranks. Once in a while that is harmless; many in a row mean that
the weights, or the data, are spoilt.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_occ.rl.batch import MiniBatch, RolloutBatch, consecutive, masks_at_source
from megatron_occ.rl.interfaces import Actor
from megatron_occ.rl.stopping import Ranks

FOLDER = "non_finite"


class NonFiniteError(ValueError):
    """Too many updates in a row were skipped."""


class SkippedUpdates:
    """Counts skipped updates and writes a file for each; called by all ranks.

    Args:
        actor: the model, with the weights of the skipped update.
        ranks: all of the run.
        folder: of the run; takes ``non_finite/``. None: nothing is written.
        limit: skipped updates in a row that end the run; None: none do.
        decode: text of token ids.
    """

    def __init__(
        self,
        actor: Actor,
        ranks: Ranks,
        folder: Path | None,
        limit: int | None,
        decode: Callable[[list[int]], str],
    ) -> None:
        self.actor, self.ranks, self.limit, self.decode = actor, ranks, limit, decode
        self.folder = None if folder is None else folder / FOLDER
        self.in_a_row = 0

    def note(self, skipped: bool, step: int, update: int, mine: MiniBatch) -> None:
        """Take in an update.

        Args:
            skipped: its gradient was not finite, the same on all ranks.
            step: of the trainer, 1-based.
            update: of the step, 0-based.
            mine: what this rank had in it.
        """
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if skipped and self.folder is not None:
            self._write(step, update, mine)

    def check(self, step: int) -> None:
        """End the run where too many updates in a row were skipped, the last of them in ``step``.

        Raises:
            NonFiniteError: names the folder with the responses.
        """
        if self.limit is not None and self.in_a_row >= self.limit:
            raise NonFiniteError(
                f"the gradients of the last {self.in_a_row} updates were not finite "
                f"(max_skipped_updates={self.limit}): stopped after step {step}, with a "
                f"checkpoint. What was in them: {self.folder}"
            )

    def _write(self, step: int, update: int, mine: MiniBatch) -> None:
        reasons = self._reasons(mine)
        found = any(reasons)
        is_known = self.ranks.any_rank(found)
        layout = self.actor.layout
        if not layout.is_model_parallel_main or (is_known and not found):
            return
        rank = layout.data_parallel_rank
        assert self.folder is not None, "asked for by note"
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"step_{step:06d}_update_{update}_data_rank_{rank:04d}.jsonl"
        with file.open("w") as opened:
            for row, why in enumerate(reasons):
                if why or not is_known:
                    line = {"step": step, "update": update, "data_parallel_rank": rank, "row": row}
                    line |= {"not_finite": why, **self._readable(mine.rows, row)}
                    opened.write(json.dumps(line) + "\n")

    def _reasons(self, mine: MiniBatch) -> list[list[str]]:
        """For each sequence what of it is not finite, by another forward pass too."""
        rows = mine.rows
        present = self.actor.get_inference_log_probs(
            rows.ids,
            parts=consecutive(mine.sizes),
            lengths=mine.lengths,
            temperature=1.0,
            masks=masks_at_source(rows),
            routes=rows.routes,
        )
        # source frame: position t is about token t + 1
        ahead = torch.nn.functional.pad(rows.response_mask[:, 1:], (0, 1)) > 0
        values: dict[str, Tensor | None] = {
            "log-probs": torch.where(ahead, present, 0.0),
            "advantage": rows.advantages[:, None],
            "log-probs of the rollout": rows.rollout_logprobs,
            "old log-probs": _masked(rows.old_logprobs, ahead),
            "log-probs of the reference": _masked(rows.ref_logprobs, ahead),
        }
        bad = {
            name: (~torch.isfinite(value)).any(1).tolist()
            for name, value in values.items()
            if value is not None
        }
        return [[name for name in bad if bad[name][row]] for row in range(len(rows))]

    def _readable(self, rows: RolloutBatch, row: int) -> dict[str, Any]:
        ids, mask = rows.ids[row].tolist(), rows.response_mask[row] > 0
        end = int(rows.lengths()[row])
        begin = int(mask.int().argmax())
        return {
            "prompt": self.decode(ids[:begin]),
            "response": self.decode(ids[begin:end]),
            "advantage": str(float(rows.advantages[row])),
            "ids": ids[:end],
        }


def _masked(values: Tensor | None, mask: Tensor) -> Tensor | None:
    return None if values is None else torch.where(mask, values, 0.0)
