"""What came out of a study, in sentences and as a table of text."""

from __future__ import annotations

import math

from megatron_occ.compare import statistics
from megatron_occ.compare.analysis import MAIN, Comparison, Difference, Outcome
from megatron_occ.observe.text import format_number, format_percent, format_points

_LEVEL = 0.05
# outcomes that a terminal has no room for
_PAGE_ONLY = ("area", "early", "best@", "agreement/")


def conclusion(comparison: Comparison) -> list[str]:
    """What the study says about final pass@1, nulls as plainly as wins; one sentence each."""
    found = comparison.differences.get(MAIN, [])
    reference = comparison.reference.name
    if not found:
        return [f"No seed of {reference} and of another arm is finished yet."]
    if all(d.interval is None for d in found):
        return [_too_few(found, reference)]
    above = [d for d in found if d.verdict == "above"]
    below = [d for d in reversed(found) if d.verdict == "below"]
    sentences = [_wins(above, found, reference)]
    if below:
        names = _and([_effect(d) for d in below])
        sentences.append(f"Worse than {reference}, by intervals that exclude 0: {names}.")
    sentences.append(_by_chance(found, above + below))
    alike = [d.arm for d in found if d.is_nothing]
    if alike:
        sentences.append(f"Equal to {reference} in every seed: {_and(alike)}.")
    early = [d.arm for d in found if d.interval is None]
    if early:
        sentences.append(f"Not judged, with too few seeds for an interval: {_and(early)}.")
    return sentences


def _too_few(found: list[Difference], reference: str) -> str:
    seeds = max(len(d.by_seed) for d in found)
    largest = max(found, key=lambda d: abs(d.mean))
    return (
        f"{_count(seeds, 'seed')}: no interval is given below {statistics.MIN_SEEDS}, so whether "
        f"an arm beats {reference} is open. The largest difference is {_effect(largest)}."
    )


def _wins(above: list[Difference], found: list[Difference], reference: str) -> str:
    if above:
        names = _and([_effect(d) for d in above])
        return f"Better than {reference}, by an interval that excludes 0: {names}."
    different = [d for d in found if not d.is_nothing] or found
    closest = max(different, key=lambda d: (d.interval or (-math.inf,))[0])
    return (
        f"No arm beats {reference} with an interval that excludes 0; the closest is "
        f"{_effect(closest)}."
    )


def _by_chance(found: list[Difference], shown: list[Difference]) -> str:
    count = sum(d.interval is not None for d in found)
    expected = format_number(_LEVEL * count, 2)
    text = (
        f"{_count(count, 'arm')} compared at 95%: if none differed at all, {expected} such "
        "intervals would be expected all the same"
    )
    if not shown:
        return text + "."
    firm = [d.arm for d in shown if d.p_of_all <= _LEVEL]
    which = _and(firm) if firm else "none of them"
    verb = "stands" if len(firm) < 2 else "stand"
    return f"{text}; with that allowed for {which} {verb} (p of all at most {_LEVEL})."


def _effect(difference: Difference) -> str:
    text = f"{difference.arm} {format_points(difference.mean)} points"
    if difference.interval is not None:
        text += f" {interval_text(difference)}"
    return text


def interval_text(difference: Difference, percent: bool = True) -> str:
    """``[-0.4, +1.2]``, in points for a share; a dash without one."""
    if difference.interval is None:
        return "\N{EN DASH}"
    low, high = (amount(value, percent) for value in difference.interval)
    return f"[{low}, {high}]"


def amount(value: float, percent: bool) -> str:
    """A difference with its sign."""
    if not math.isfinite(value):
        return "\N{EN DASH}"
    if percent:
        text = format_points(value)
        return "0.0" if text[1:] == "0.0" else text
    text = format_number(value, 2)
    return f"\N{MINUS SIGN}{text[1:]}" if value < 0 else f"+{text}" if value > 0 else text


def p_text(value: float) -> str:
    """A p-value with two decimals, three below 0.1."""
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def level_text(value: float, outcome: Outcome) -> str:
    """An arm's value of an outcome."""
    if not math.isfinite(value):
        return "\N{EN DASH}"
    return format_percent(value) if outcome.percent else format_number(value)


def table(comparison: Comparison) -> list[str]:
    """The arms, best final pass@1 first, one line each under a line of titles.

    The last four columns are the paired difference of final pass@1 to the reference, in points.
    """
    shown = [o for o in comparison.outcomes if not o.name.startswith(_PAGE_ONLY)]
    difference = f"\N{MINUS SIGN} {comparison.reference.name}"
    head = ["arm", "seeds", *(o.title for o in shown), difference, "95% interval", "p", "p of all"]
    rows = [head, *(_row(comparison, name, shown) for name in ranked(comparison))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def ranked(comparison: Comparison) -> list[str]:
    """Arms with a finished run, best final pass@1 first; those without a value last."""
    arms = [arm for arm in comparison.arms.values() if arm.finished()]
    value = {arm.name: arm.level(MAIN)[0] for arm in arms}
    return sorted(value, key=lambda name: -value[name] if math.isfinite(value[name]) else math.inf)


def _row(comparison: Comparison, name: str, shown: list[Outcome]) -> list[str]:
    arm, difference = comparison.arms[name], comparison.difference(MAIN, name)
    cells = [name, str(len(arm.finished()))]
    cells += [level_text(arm.level(o.name)[0], o) for o in shown]
    if difference is None:
        return [*cells, *["\N{EN DASH}"] * 4]
    numbers = [amount(difference.mean, True), interval_text(difference)]
    return [*cells, *numbers, p_text(difference.p), p_text(difference.p_of_all)]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
