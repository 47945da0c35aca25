"""Whether MTP moved the trunk in RL, said in a sentence by rules."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from megatron_occ.observe.exact_log import Estimate, ExactLog, coefficients, mean_of
from megatron_occ.observe.regime import TrunkRegime, trunk_regime
from megatron_occ.observe.run_data import RunData
from megatron_occ.observe.text import format_number, format_percent

# mean share of MTP's part, over all steps
_NOTICEABLE = 0.01
_CONSIDERABLE = 0.1
_AUDIT = "megatron-occ audit measures it on a checkpoint."


@dataclass(frozen=True)
class Verdict:
    """The answer in a word or two, the sentence that gives it, and what it rests on."""

    answer: str
    sentence: str
    reason: str = ""


def trunk_verdict(run: RunData) -> Verdict | None:
    """Whether MTP moved the trunk; None without an RL phase or a configuration that says how.

    - Nothing is sent: no. A fixed weight: not measured.
    - Lambda from log-probs: no if it was 0 in every step, else not measured.
    - Lambda from the gradients: no if it was 0 in every step; else by the mean share of the MTP
      part of the update, over measured steps and the mini-batches between in which it was nothing:
      hardly below 1%, a little below 10%, else yes.
    """
    regime = trunk_regime(run.rl_config)
    if regime is None or run.last_step("rl") is None:
        return None
    if regime.kind == "nothing":
        return Verdict("No", f"{regime.why}.")
    if regime.kind == "fixed":
        return Verdict(
            "Not measured",
            f"MTP's {regime.signal} acts on the trunk with the fixed weight "
            f"{format_number(regime.weight)}; what share of the update that is, was not measured.",
            _AUDIT,
        )
    if not coefficients(run):
        return Verdict("Not measured", "The log holds no coefficient λ yet.")
    return _exact(run, regime) if regime.kind == "exact" else _proxy(run, regime)


def acted_steps(lambdas: dict[float, list[float]]) -> tuple[int, int]:
    """Steps in which lambda, of each depth by step, was not 0, and all that logged it."""
    return sum(any(values) for values in lambdas.values()), len(lambdas)


def with_error(estimate: Estimate | None) -> str:
    """A mean with its standard error: 0.016 ± 0.0054."""
    if estimate is None:
        return "\N{EN DASH}"
    if estimate.count < 2:
        return format_number(estimate.value, 2)
    return f"{format_number(estimate.value, 2)} ± {format_number(estimate.error, 2)}"


def share_text(value: float) -> str:
    """A share in percent that does not round to 0 unless it is."""
    if value == 0:
        return "0%"
    return "below 0.1%" if 0 < value < 0.0005 else format_percent(value)


def _proxy(run: RunData, regime: TrunkRegime) -> Verdict:
    found = coefficients(run)
    acted, steps = acted_steps(found)
    if not acted:
        return Verdict("No", f"λ was 0 in {_all(steps)}: {_in_all_but_name(regime)}.")
    values = list(found.values())
    mean = statistics.fmean(statistics.fmean(lambdas) for lambdas in values)
    largest = max((value for lambdas in values for value in lambdas), key=abs)
    return Verdict(
        "Not measured",
        f"λ was not 0 in {acted} of {_steps(steps)}, {format_number(mean, 2)} on average and at "
        f"most {format_number(largest, 2)}; what share of the trunk's update that is, was not "
        "measured.",
        "This λ follows differences of log-probs, a proxy: neither the alignment of the gradients "
        f"nor their share was measured. {_AUDIT}",
    )


def _exact(run: RunData, regime: TrunkRegime) -> Verdict:
    log = ExactLog(run)
    acted, steps = acted_steps(log.acted())
    shares = [share for _, share in log.share()]
    if not shares:
        return Verdict("Not measured", "No mini-batch was measured yet.")
    passed = "gate and bounds" if regime.gate else "the bounds"
    reason = _alignment(log)
    of_steps = _steps(steps, measured=len(coefficients(run)) > steps)
    if not acted:
        sentence = f"MTP's gradient passed {passed} in none of {of_steps}"
        return Verdict("No", f"{sentence}: {_in_all_but_name(regime)}.", reason)
    mean, largest = statistics.fmean(shares) / regime.acts_every, max(shares)
    sentence = f"MTP's gradient passed {passed} in {acted} of {of_steps}"
    if mean < _NOTICEABLE:
        sentence += (
            f" and was at most {share_text(largest)} of RL's part of the trunk's {regime.of_what}, "
            f"{share_text(mean)} on average{_rhythm(regime)}: {_in_all_but_name(regime)}."
        )
        return Verdict("Hardly", sentence, reason)
    sentence += (
        f"; its part of the trunk's {regime.of_what} was {share_text(mean)} of RL's on average"
        f"{_rhythm(regime)}, at most {share_text(largest)} and {share_text(shares[-1])} in the end."
    )
    return Verdict("Yes" if mean >= _CONSIDERABLE else "A little", sentence, reason)


def _alignment(log: ExactLog) -> str:
    """Whether the gradients agree beyond their common noise, of each depth."""
    sentences = []
    for depth in log.depths:
        same, cross = (mean_of(log.cosines(depth, pairs)) for pairs in ("same", "cross"))
        who = f"Depth {depth}: " if len(log.depths) > 1 else ""
        if cross is None:
            sentences.append(
                f"{who}c was measured within mini-batches alone (cosine {with_error(same)}), where "
                "alignment and shared noise can't be told apart."
            )
            continue
        clear = "clear of 0" if cross.is_clear else "not clear of 0"
        text = (
            f"{who}RL's and MTP's gradients of independent mini-batches have a cosine of "
            f"{with_error(cross)}, {clear}"
        )
        if same is not None:
            text += f"; of the same mini-batch {format_number(same.value, 2)}"
        if same is not None and same.is_clear and _is_noise(same, cross):
            text += ", mostly shared noise"
        sentences.append(f"{text}.")
    return " ".join(sentences)


def _is_noise(same: Estimate, cross: Estimate) -> bool:
    """Whether less than half of the cosine within a mini-batch is alignment."""
    return cross.count > 1 and cross.value + 2 * cross.error < 0.5 * same.value


def _in_all_but_name(regime: TrunkRegime) -> str:
    if regime.own_head_loss:
        return "this run is detach in all but name"
    return "RL alone trained the trunk, in all but name"


def _rhythm(regime: TrunkRegime) -> str:
    if regime.acts_every == 1:
        return ""
    return f" (over all mini-batches; it acts in one of {regime.acts_every})"


def _all(steps: int) -> str:
    return "the only step" if steps == 1 else f"all {steps:,} steps"


def _steps(steps: int, *, measured: bool = False) -> str:
    return f"{steps:,} {'measured ' if measured else ''}step{'' if steps == 1 else 's'}"
