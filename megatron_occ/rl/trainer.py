"""Reinforcement learning with verifiable rewards, in the terms of NeMo-Aligner's GRPO trainer.

``fit`` reads top to bottom: roll out, compute old log-probs, update, validate, save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_occ.config.schema import Config
from megatron_occ.observe.metrics import MetricsLogger, RolloutLog
from megatron_occ.observe.progress import Progress, Timers
from megatron_occ.rl.batch import MiniBatch
from megatron_occ.rl.evaluation import Validation
from megatron_occ.rl.exchange import distribute
from megatron_occ.rl.head_rows import HeadRows
from megatron_occ.rl.head_update import HeadUpdater
from megatron_occ.rl.profiling import StepProfiler
from megatron_occ.rl.rollouts import Rollouts, RolloutSource
from megatron_occ.rl.stopping import StopRequested
from megatron_occ.rl.stragglers import times_over_ranks
from megatron_occ.rl.supervision import Supervision
from megatron_occ.rl.update import PolicyUpdater

# what the progress bar shows of what there is
SHOWN = {
    "reward": "reward/mean",
    "accuracy": "rollout/accuracy",
    "entropy": "entropy",
    "lambda": "lambda/mtp_1",
    "head loss": "loss/head_mtp_1",
}


class GRPOTrainer:
    """The RL loop over an :class:`~megatron_occ.rl.update.PolicyUpdater`.

    Args:
        config: the run's configuration.
        updater: updates the policy, or its head alone.
        rollouts: draws prompts and samples responses.
        validate: measures the current policy.
        logger: of metrics and events.
        rollout_log: of sampled responses.
        save: writes a checkpoint of the given finished step.
        supervision: looks after the loop.
    """

    def __init__(
        self,
        config: Config,
        updater: PolicyUpdater | HeadUpdater,
        rollouts: RolloutSource,
        *,
        validate: Callable[[], Validation],
        logger: MetricsLogger,
        rollout_log: RolloutLog,
        save: Callable[[int], None],
        supervision: Supervision | None = None,
    ) -> None:
        self.config, self.updater, self.rollouts = config, updater, rollouts
        self.validate, self.save = validate, save
        self.supervision = supervision or Supervision()
        self.logger, self.rollout_log = logger, rollout_log
        self.layout = updater.actor.layout
        self.timers = Timers(self.supervision.phase)
        self.profiler = StepProfiler(config, "rl", self.layout)
        self.step = 0
        self.validation_is_due = True
        self._saved_step = 0
        self._logged_at = time.perf_counter()

    def fit(self) -> None:
        """Run the remaining steps.

        Raises:
            StopRequested: the run was asked to end. The finished steps are in a checkpoint; of the
                one under way nothing stays, and it is drawn again identically.
            NonFiniteError: too many updates in a row were skipped; the steps are in a checkpoint.
        """
        self._logged_at = time.perf_counter()
        with self.supervision.at_work(self.rollouts.abort, self._save_if_new, self._tell_stop):
            self._run()

    def _save_if_new(self) -> None:
        if self.step > self._saved_step:
            self._save()

    def _tell_stop(self, text: str) -> None:
        self.logger.event(self.step, text, kind="stopped")

    def _run(self) -> None:
        rl = self.config.rl
        self._end_if_asked()
        self._finish_step()
        with Progress(rl.steps, "rl", self.step, enabled=self.layout.is_main) as progress:
            while self.step < rl.steps:
                self._end_if_asked()
                self._warn(self.step + 1, self.supervision.begin_step(self.step + 1))
                with self.profiler.step(self.step + 1, self.timers):
                    metrics = self.run_step()
                self.step += 1
                self._log(metrics)
                progress.update(self.step, _shown(metrics))
                is_last = self.step == rl.steps
                self.validation_is_due = is_last or _is_due(self.step, rl.validation.every)
                self.supervision.end_if_spoilt(self.step)
                self._finish_step()

    def _finish_step(self) -> None:
        """What follows a step, at a resumption too: validation and checkpoint if due."""
        rl = self.config.rl
        if self.validation_is_due:
            self.run_validation()
            self.validation_is_due = False
        is_due = self.step == rl.steps or _is_due(self.step, rl.save_every)
        if is_due and self.step > self._saved_step:
            self._save()

    def _save(self) -> None:
        with self.timers("save"):
            self.save(self.step)
        self._saved_step = self.step

    def _end_if_asked(self) -> None:
        self.supervision.end_if_asked(self.layout)

    def run_step(self) -> dict[str, float]:
        """One rollout step with its updates; returns metrics."""
        every = self.config.rl.loss.kl_reference_every
        if every is not None and self.step > 0 and self.step % every == 0:
            self.updater.actor.keep_reference()
        rollouts = self._rollouts()
        self._warn(self.step + 1, rollouts.events)
        self.rollout_log.write(self.step + 1, rollouts.samples)
        with self.timers("logprobs"):
            mini_batches = distribute(
                rollouts.batch,
                rollouts.owners,
                self.config.rl,
                self.updater.actor,
                parts=self.updater.parts,
            )
            mini_batches = self.updater.compute_logprobs(mini_batches)
            gap = {}
            if not self.updater.reuses_rollout:
                gap = self.updater.logprob_gap(mini_batches)
        with self.timers("train"):
            metrics = self.run_training(mini_batches, rollouts.head)
        return {**rollouts.metrics, **gap, **metrics}

    def _rollouts(self) -> Rollouts:
        """Those of the step; none, and the prompts go back, where the run is asked to end."""
        position = self.rollouts.position
        try:
            return self.rollouts.generate(
                self.timers,
                after_round=self._end_if_asked,
                steps_left=self.config.rl.steps - self.step,
            )
        except StopRequested:
            self.rollouts.position = position
            raise

    def run_training(
        self, mini_batches: Sequence[MiniBatch], head: HeadRows | None = None
    ) -> dict[str, float]:
        """One update for each mini-batch; returns their mean metrics.

        Args:
            mini_batches: of the step.
            head: responses that train the head, a share of them in each update.
        """
        updates, gap = [], {}
        for number, mini_batch in enumerate(mini_batches):
            share = None if head is None else head.share(number, len(mini_batches))
            update = self.updater.run_update(mini_batch, share)
            self.supervision.after_update(update.skipped, self.step + 1, number, mini_batch)
            self._warn(self.step + 1, update.events)
            updates.append(update.metrics)
            gap |= update.gap
        return _means(updates) | gap

    def run_validation(self) -> dict[str, float]:
        """Validate the current policy and log the result."""
        with self.timers("validation"):
            metrics, events = self.validate()
        # its responses may have been cut off by the signal
        self._end_if_asked()
        self.logger.log("validation", self.step, metrics)
        self._warn(self.step, events)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Position in the data and calibration state."""
        return {
            "step": self.step,
            "validation_is_due": self.validation_is_due,
            "position": self.rollouts.position,
            "calibration": self.updater.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.step, self.rollouts.position = state["step"], state["position"]
        # absent from checkpoints of earlier versions, which were written after it
        self.validation_is_due = state.get("validation_is_due", False)
        self._saved_step = -1 if self.validation_is_due else self.step
        self.updater.load_state_dict(state["calibration"])

    def _log(self, metrics: dict[str, float]) -> None:
        times = self.timers.pop()
        tokens = metrics.pop("rollout/tokens")
        # since the last line: validation and saving belong to the step that comes after them
        now = time.perf_counter()
        metrics["time/step"], self._logged_at = now - self._logged_at, now
        # sampling goes on all the time, and the time of the rollout is what is waited for it
        sampled = metrics["time/step"] if self.config.rl.async_.max_lag else times["time/rollout"]
        metrics["rollout/tokens_per_second"] = tokens / max(sampled, 1e-9)
        metrics.update(times)
        metrics.update(times_over_ranks(times, self.layout))
        self.logger.log("rl", self.step, metrics)

    def _warn(self, step: int, events: list[str]) -> None:
        for event in events:
            self.logger.event(step, event)


def _means(updates: list[dict[str, float]]) -> dict[str, float]:
    """Of each metric over the updates that have it."""
    found: dict[str, list[float]] = {}
    for metrics in updates:
        for name, value in metrics.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _shown(metrics: dict[str, float]) -> dict[str, float]:
    return {name: metrics[key] for name, key in SHOWN.items() if key in metrics}


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
