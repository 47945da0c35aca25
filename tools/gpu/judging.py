"""What a measurement means: pure functions from numbers to rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tools.gpu.bounds import (
    AIMS,
    DEVIATION,
    ENGINE_GAP,
    LIVE,
    LOGPROB_GAP,
    REWARD_ERRORS,
    REWARD_SLACK,
)
from tools.gpu.results import BELOW, FAILED, INFO, OK, Row


def judge_deviations(
    part: str, deviations: Mapping[str, float], without_counterpart: Sequence[str]
) -> Row:
    """Two devices compute the same.

    Args:
        part: of the table.
        deviations: relative, by what was compared; NaN never passes.
        without_counterpart: parameters that were compared with nothing.
    """
    text = ", ".join(f"{name} {value:.1e}" for name, value in deviations.items())
    good = all(value <= DEVIATION for value in deviations.values())
    if without_counterpart:
        names = ", ".join(without_counterpart[:3])
        text = f"{len(without_counterpart)} parameters compared with nothing ({names}); {text}"
    status = OK if good and deviations and not without_counterpart else FAILED
    return Row(part, status, f"{text} (bound {DEVIATION:g})", dict(deviations))


def judge_engine(part: str, gap: float, tokens: int) -> Row:
    """The engine's log-probs in fp32 are those of training; ``gap`` is the largest in nats."""
    status = OK if gap <= ENGINE_GAP and tokens > 0 else FAILED
    text = f"largest gap {gap:.1e} nats over {tokens} tokens (bound {ENGINE_GAP:g})"
    return Row(part, status, text, {"gap": gap, "tokens": tokens})


def judge_metrics(part: str, lines: Sequence[Mapping[str, Any]], steps: int) -> Row:
    """A run came to its end, and all that it logged is finite."""
    wrong = sorted(
        {
            name
            for entry in lines
            for name, value in entry.items()
            if isinstance(value, float) and not math.isfinite(value)
        }
    )
    found = sum(entry.get("phase") == "rl" for entry in lines)
    if wrong:
        return Row(part, FAILED, f"not finite: {', '.join(wrong[:5])}", {"steps": found})
    if found != steps:
        return Row(part, FAILED, f"{found} of {steps} RL steps logged", {"steps": found})
    return Row(part, OK, f"{found} RL steps, all metrics finite", {"steps": found})


def judge_gap(part: str, precision: str, means: Sequence[float], maxima: Sequence[float]) -> Row:
    """``logprob_gap`` of all steps of a run, in nats; ``precision`` is bf16 or fp8."""
    mean, largest = statistics.fmean(means), max(maxima)
    mean_bound, largest_bound = LOGPROB_GAP[precision]
    # NaN compares as False
    good = mean <= mean_bound and largest <= largest_bound
    text = f"logprob_gap mean {mean:.2g}, largest {largest:.2g}"
    bounds = f"(bounds {mean_bound:g}, {largest_bound:g})"
    return Row(part, OK if good else FAILED, f"{text} {bounds}", {"mean": mean, "max": largest})


def judge_rewards(part: str, rewards: Sequence[float], base: Sequence[float]) -> Row:
    """Mean rewards of the steps of two runs that see the same prompts."""
    if len(rewards) != len(base) or len(base) < 2:
        return Row(part, FAILED, f"{len(rewards)} rewards against {len(base)}")
    differences = [a - b for a, b in zip(rewards, base, strict=True)]
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    bound = max(REWARD_ERRORS * error, REWARD_SLACK)
    text = (
        f"mean reward {statistics.fmean(rewards):.3f} against {statistics.fmean(base):.3f}: "
        f"{mean:+.3f} (bound {bound:.3f})"
    )
    return Row(part, OK if abs(mean) <= bound else FAILED, text, {"difference": mean})


def judge_resume(part: str, *, is_same: bool, control_is_same: bool) -> Row:
    """A resumed run ends as the undisturbed one, bit for bit.

    Args:
        part: of the table.
        is_same: as the undisturbed run.
        control_is_same: two undisturbed runs are the same.
    """
    if is_same:
        return Row(part, OK, "checkpoint, metrics and rollouts equal bit for bit")
    if control_is_same:
        return Row(part, FAILED, "differs from the undisturbed run")
    return Row(part, FAILED, "differs, but so do two undisturbed runs: kernels are not exact")


def judge_live(part: str, live: Mapping[str, int], expected: Mapping[str, int]) -> Row:
    """Tensors that are there between updates, against the estimate of each use in bytes."""
    deviations = {name: live[name] / expected[name] - 1 for name in expected if name in live}
    text = ", ".join(f"{name} {value:+.1%}" for name, value in deviations.items())
    good = bool(deviations) and all(abs(value) <= LIVE for value in deviations.values())
    return Row(part, OK if good else FAILED, f"{text} of the estimate", deviations)


def judge_aim(part: str, aim: str, value: float, text: str, *, judged: bool, **numbers: Any) -> Row:
    """A measurement against its aim.

    Args:
        part: of the table.
        aim: name in ``AIMS``.
        value: what was measured.
        text: in front of it.
        judged: False where the aim is not meant for this machine.
        numbers: kept with the row.
    """
    bound = AIMS[aim]
    sign = "<=" if bound.is_most else ">="
    text = f"{text}: {value:.2f}{bound.unit}"
    numbers = {**numbers, aim: value}
    if not math.isfinite(value) or value < 0:
        return Row(part, FAILED, text, numbers)
    if not judged:
        return Row(part, INFO, text, numbers)
    good = value <= bound.bound if bound.is_most else value >= bound.bound
    return Row(part, OK if good else BELOW, f"{text} (aim {sign} {bound.bound:g})", numbers)
