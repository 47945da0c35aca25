"""Checkpoints written while training goes on, by Megatron-Core's asynchronous saving.

Each rank forks a process that holds its tensors as they were and writes them. When all are done,
the main rank completes the folder and gives it its final name.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from megatron_occ.config.identity import free_settings
from megatron_occ.convert.kinds import CHECKPOINT_FILE
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import FORMAT, describe_layout, sharded_state
from megatron_occ.mcore.checkpoint_folder import (
    Keep,
    checkpoint_name,
    gather_checksums,
    remove_old,
    replace_folder,
)
from megatron_occ.mcore.checkpoint_process import in_own_process, what_updates_change
from megatron_occ.mcore.cpu.forking import not_inherited, regions
from megatron_occ.mcore.fp8_state import has_scaling_state
from megatron_occ.mcore.versions import installed_version

# what Megatron says where a writer has ended without a word
_NO_RESULT = "results_queue should not be empty"

# the one that is writing: Megatron has a single queue for what its writers report, and a second
# save would take the first one's reports for its own
_busy: list[CheckpointWriter] = []


def finish_writing() -> None:
    """Wait for a checkpoint that is being written; called by all ranks before any other save."""
    for writer in list(_busy):
        writer.finish()


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; what there was of it is gone."""


class CheckpointWriter:
    """Writes the checkpoints of a phase, one at a time; every method is called by all ranks.

    Args:
        folder: of the phase's checkpoints; created when missing.
        actor: weights and optimizer.
        meta: JSON-ready; see ``config.identity.describe``.
        keep: which checkpoints stay.
        background: return from :meth:`save` when the state is held; False: when it is written.
        scores: of validated steps, larger is better; asked on the main rank.
    """

    def __init__(
        self,
        folder: Path,
        actor: MegatronGPTActor,
        meta: dict[str, Any],
        *,
        keep: Keep,
        background: bool,
        scores: Callable[[], Mapping[int, float]] = dict,
    ) -> None:
        self.folder, self.actor, self.meta = folder, actor, meta
        self.keep, self.background, self.scores = keep, background, scores
        self._queue = AsyncCallsQueue()
        self._step: int | None = None

    def save(self, step: int, trainer_state: dict[str, Any]) -> Path:
        """Begin to write ``folder/step_NNNNNN``, after the one before is done; returns its path.

        Args:
            step: of the trainer.
            trainer_state: plain values and tensors, equal on all ranks.

        Raises:
            CheckpointWriteError: a rank could not write its part, of this one or the one before.
        """
        finish_writing()
        path = self._temporary(step)
        self._on_main_rank(step, lambda: _make_empty(path))
        state = sharded_state(self.actor, loading=False)
        # nothing is updated while it is waited for
        owned = regions(what_updates_change(self.actor)) if self.background else set()
        state["trainer"] = trainer_state
        request = dist_checkpointing.save(
            state, str(path), async_sharded_save=True, **_own_strategy()
        )
        with not_inherited(owned):
            self._queue.schedule_async_request(in_own_process(request, path, owned))
        self._step = step
        _busy.append(self)
        if not self.background:
            self.finish()
        return self._target(step)

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint has been begun and not completed."""
        return self._step is not None

    def poll(self) -> None:
        """Complete what is written by now.

        Raises:
            CheckpointWriteError: a rank could not write its part.
        """
        if self._step is not None and self._finalized(self._step, blocking=False):
            self._complete(self._step)

    def finish(self) -> None:
        """Wait for what is being written, and complete it; raises as :meth:`poll`."""
        if self._step is not None and self._finalized(self._step, blocking=True):
            self._complete(self._step)

    def abandon(self) -> None:
        """Leave what is being written incomplete; a rank may do it alone."""
        for call in self._queue.async_calls:
            call.async_caller.close(abort=True)
        self._queue.async_calls.clear()
        self._leave()

    def _finalized(self, step: int, *, blocking: bool) -> bool:
        try:
            return bool(self._queue.maybe_finalize_async_calls(blocking=blocking))
        except CheckpointException as error:
            self.abandon()
            free = shutil.disk_usage(self.folder).free / 1e6
            if self.actor.layout.is_main:
                shutil.rmtree(self._temporary(step), ignore_errors=True)
            # a traceback of each rank, which ends with what was wrong
            reason = str(error).strip().rpartition("\n")[2]
            if _NO_RESULT in reason:
                reason = "the process that wrote it ended before it was done (out of memory?)"
            raise CheckpointWriteError(
                f"{self._target(step)} could not be written: {reason} ({free:,.0f} MB were free)"
            ) from error

    def _leave(self) -> None:
        self._step = None
        if self in _busy:
            _busy.remove(self)

    def _complete(self, step: int) -> None:
        self._leave()
        self._on_main_rank(step, lambda: self._finish_folder(step))

    def _finish_folder(self, step: int) -> None:
        path, config = self._temporary(step), self.actor.config
        content = {
            **self.meta,
            "layout": describe_layout(config, self.actor.layout.world_size),
            "step": step,
            "free": free_settings(config),
            "format": FORMAT,
            "has_checksums": True,
            "fp8_scaling": has_scaling_state(config),
            "megatron_core": installed_version(),
        }
        (path / CHECKPOINT_FILE).write_text(json.dumps(content, indent=1))
        gather_checksums(path)
        replace_folder(path, self._target(step))
        # scores are read from the whole log
        scores = self.scores() if self.keep.best else {}
        remove_old(self.folder, self.keep, scores)

    def _on_main_rank(self, step: int, work: Callable[[], None]) -> None:
        """Work with the folder, while the others wait; what fails there fails on all ranks."""
        problem = ""
        if self.actor.layout.is_main:
            try:
                work()
            except OSError as error:
                problem = str(error)
                shutil.rmtree(self._temporary(step), ignore_errors=True)
        if self.actor.layout.any_rank(bool(problem)):
            raise CheckpointWriteError(
                f"{self._target(step)} could not be written: {problem or 'see rank 0'}"
            )

    def _target(self, step: int) -> Path:
        return self.folder / checkpoint_name(step)

    def _temporary(self, step: int) -> Path:
        return self._target(step).with_suffix(".tmp")


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _own_strategy() -> dict[str, Any]:
    """One writer a rank, by Megatron's own code.

    Newer versions do so unless they are to use a package of its own; older ones have two, which
    take a processor more from training.
    """
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        return {"async_strategy": "mcore"}
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    return {"sharded_strategy": strategy}
