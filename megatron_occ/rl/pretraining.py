"""Pretraining: next-token and MTP cross-entropy over a corpus, resumable at any checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_occ.config.schema import Config
from megatron_occ.losses.heads import Normalizers
from megatron_occ.losses.pretraining import PretrainLoss
from megatron_occ.observe.metrics import MetricsLogger
from megatron_occ.observe.progress import Progress
from megatron_occ.rl.batch import MiniBatch, RolloutBatch, head_masks, sequence_ends
from megatron_occ.rl.evaluation import Validation
from megatron_occ.rl.interfaces import Actor
from megatron_occ.rl.profiling import StepProfiler
from megatron_occ.rl.reports import SKIPPED, on_host, update_metrics
from megatron_occ.rl.supervision import Supervision

PASS_RATE = "pass@1"
_BOTH = ((True, True),)


class Corpus(Protocol):
    """Batches as a function of the step: [size, length] ids and token-aligned loss mask."""

    def batch(self, step: int, size: int, sequence_length: int) -> tuple[Tensor, Tensor]: ...


class PretrainTrainer:
    """The pretraining loop.

    Args:
        config: the run's configuration.
        actor: the model.
        corpus: batches.
        validate: measures ``pass@1`` on held-out problems.
        logger: of metrics and events.
        save: writes a checkpoint of the given finished step.
        supervision: looks after the loop.
        abort: cuts a validation short; called in a thread of its own.
    """

    def __init__(
        self,
        config: Config,
        actor: Actor,
        corpus: Corpus,
        *,
        validate: Callable[[], Validation],
        logger: MetricsLogger,
        save: Callable[[int], None],
        supervision: Supervision | None = None,
        abort: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.actor, self.corpus = config, actor, corpus
        self.validate, self.abort = validate, abort
        self.logger, self.save = logger, save
        self.supervision = supervision or Supervision()
        self.loss = PretrainLoss(config.pretrain.mtp_weight)
        self.profiler = StepProfiler(config, "pretrain", actor.layout)
        self.step, self.finished = 0, False
        # of a step that is not logged yet: its validation may be due, or was cut short
        self._metrics: dict[str, float] | None = None
        self._saved_step = self._logged_step = 0
        self._logged_at = self._trained_at = time.perf_counter()

    def fit(self) -> None:
        """Run the remaining steps, or those until the pass rate is reached.

        Raises:
            StopRequested: the run was asked to end. The finished steps are in a checkpoint; a
                validation that was cut short is made again.
        """
        self._logged_at, self._logged_step = time.perf_counter(), self.step
        with self.supervision.at_work(self.abort, self._save_if_new, self._tell_stop):
            self._run()

    def _save_if_new(self) -> None:
        if self.step > self._saved_step:
            self._save()

    def _save(self) -> None:
        with self.supervision.phase("save"):
            self.save(self.step)
        self._saved_step = self.step

    def _tell_stop(self, text: str) -> None:
        self.logger.event(self.step, text, kind="stopped")

    def _run(self) -> None:
        settings, layout = self.config.pretrain, self.actor.layout
        if not self.finished:
            self.supervision.end_if_asked(layout)
        with Progress(settings.steps, "pretrain", self.step, enabled=layout.is_main) as progress:
            while not self.finished:
                if self._metrics is None:
                    self._train()
                self._complete(progress)
                if not self.finished:
                    self.supervision.end_if_asked(layout)
        self.profiler.close(self.step)

    def _train(self) -> None:
        for told in self.supervision.begin_step(self.step + 1):
            self.logger.event(self.step + 1, told)
        with self.profiler.step(self.step + 1), self.supervision.phase("pretrain"):
            self._metrics = self.run_step()
        self.step += 1
        self._trained_at = time.perf_counter()

    def _complete(self, progress: Progress) -> None:
        """What follows an update, at a resumption too: validation, log and checkpoint if due."""
        settings = self.config.pretrain
        assert self._metrics is not None, "of the update before"
        metrics = self._metrics | self._measured()
        self._metrics = None
        self.finished = self.step == settings.steps or self._is_reached(metrics)
        shown = {"loss": metrics["loss/main"], "lr": metrics["lr"]}
        progress.update(self.step, shown | _pass_rate(metrics))
        if self.finished or self.step % settings.log_every == 0 or _pass_rate(metrics):
            self.logger.log("pretrain", self.step, metrics | self._times())
        self.supervision.end_if_spoilt(self.step)
        if self.finished or self.step % settings.save_every == 0 or self._saved_step < 0:
            self._save()

    @property
    def validation_is_due(self) -> bool:
        """Whether the last step still lacks its validation and its line of the log."""
        return self._metrics is not None

    def _times(self) -> dict[str, float]:
        """Of an update since the last line of the log; none right after a resumption."""
        updates = self.step - self._logged_step
        seconds = self._trained_at - self._logged_at
        self._logged_at, self._logged_step = time.perf_counter(), self.step
        if not updates:
            return {}
        tokens = self.config.pretrain.batch_size * self.config.pretrain.sequence_length
        return {"time/step": seconds / updates, "tokens_per_second": tokens * updates / seconds}

    def _measured(self) -> dict[str, float]:
        every = self.config.pretrain.validate_every
        if every == 0 or self.step % every:
            return {}
        start = time.perf_counter()
        with self.supervision.phase("validation"):
            metrics, events = self.validate()
        # its responses may have been cut off by the signal
        self.supervision.end_if_asked(self.actor.layout)
        for event in events:
            self.logger.event(self.step, event)
        return {PASS_RATE: metrics[PASS_RATE], "time/validation": time.perf_counter() - start}

    def _is_reached(self, metrics: dict[str, float]) -> bool:
        target = self.config.pretrain.stop_at_pass_rate
        if target is None or metrics.get(PASS_RATE, 0.0) < target:
            return False
        self.logger.event(
            self.step, f"pretraining ends at pass@1 {metrics[PASS_RATE]:.3f}, asked for {target}"
        )
        return True

    def run_step(self) -> dict[str, float]:
        """One update; returns its metrics."""
        settings, layout, depths = self.config.pretrain, self.actor.layout, self.actor.num_depths
        ids, token_mask = self.corpus.batch(
            self.step, settings.batch_size, settings.sequence_length
        )
        own = slice(layout.data_parallel_rank, None, layout.data_parallel_size)
        ids, token_mask = ids[own].to(layout.device), token_mask[own].to(layout.device)
        masks = head_masks(token_mask, depths)
        counts = layout.all_reduce_data_parallel(Normalizers.count(masks))
        normalizers = Normalizers.from_counts(counts)
        size = settings.micro_batch_size
        passes = _BOTH if depths else ()
        parts = (ids.split(size), masks.split(size, dim=1), sequence_ends(token_mask).split(size))
        batches = [
            self.actor.micro_batch(part, mask, ends=ends, passes=passes)
            for part, mask, ends in zip(*parts, strict=True)
        ]
        report = self.actor.get_loss_and_metrics(
            batches, lambda outputs, mask: self.loss(outputs, mask, normalizers)
        )
        step = self.actor.finish_training_step()
        if step.skipped:
            self.logger.event(self.step + 1, SKIPPED)
        mine = MiniBatch.padded(_rows(ids, token_mask), size)
        self.supervision.after_update(step.skipped, self.step + 1, 0, mine)
        return update_metrics(on_host(report), step) | self.actor.pop_routing_metrics()

    def state_dict(self) -> dict[str, Any]:
        """Position in the data, and metrics of a step that is not logged."""
        return {"step": self.step, "finished": self.finished, "metrics": self._metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.step = state["step"]
        # a run that is asked for more steps goes on, unless it ended by its pass rate
        ended_early = state["finished"] and self.config.pretrain.stop_at_pass_rate is not None
        self._metrics = state.get("metrics")
        # what the step still lacks is saved with it
        self._saved_step = self.step if self._metrics is None else -1
        is_over = ended_early or self.step >= self.config.pretrain.steps
        self.finished = is_over and self._metrics is None


def _rows(ids: Tensor, token_mask: Tensor) -> RolloutBatch:
    """Text as rows without advantages, to be looked at."""
    return RolloutBatch(
        ids, token_mask.float(), torch.zeros_like(ids, dtype=torch.float32), ids.new_zeros(len(ids))
    )


def _pass_rate(metrics: dict[str, float]) -> dict[str, float]:
    return {PASS_RATE: metrics[PASS_RATE]} if PASS_RATE in metrics else {}
