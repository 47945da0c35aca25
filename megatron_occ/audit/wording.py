"""Estimates as text, and the columns that table and page have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_occ.observe.text import format_number

MISSING = "\N{EN DASH}"
METRICS = {"euclidean": "Euclidean metric", "adam": "Adam's metric"}


def amount(estimate: dict[str, Any] | None, digits: int = 2) -> str:
    """A value with its standard error: 0.040 ± 0.0040."""
    if estimate is None or estimate["value"] is None:
        return MISSING
    text = format_number(estimate["value"], digits)
    if estimate["error"] is None:
        return text
    return f"{text} ± {format_number(estimate['error'], 2)}"


def interval(estimate: dict[str, Any]) -> str:
    """The ends of an interval."""
    if estimate["low"] is None:
        return MISSING
    return f"{format_number(estimate['low'], 2)} to {format_number(estimate['high'], 2)}"


def percent(value: float | None) -> str:
    """A fraction in percent, with more decimals the smaller it is: 12%, 1.2%, 0.12%."""
    if value is None:
        return MISSING
    size = abs(100 * value)
    if size < 0.005:
        return "0%"
    return f"{100 * value:.{0 if size >= 10 else 1 if size >= 1 else 2}f}%"


def percent_interval(estimate: dict[str, Any]) -> str:
    """The ends of an interval of a fraction."""
    if estimate["low"] is None:
        return MISSING
    return f"{percent(estimate['low'])} to {percent(estimate['high'])}"


def metric_title(metric: str) -> str:
    """Name of a metric in a headline."""
    return METRICS.get(metric, metric)


def _share(estimate: dict[str, Any]) -> str:
    return percent(estimate["value"])


def _weight(signal: dict[str, Any]) -> str:
    mixture = signal["mixture"]
    return "not measurable" if mixture is None else amount(mixture["weight"])


def _gain(signal: dict[str, Any]) -> str:
    if signal["mixture"] is None:
        return "not measurable"
    gain = signal["mixture"]["gain"]
    if not gain["high"]:
        return "none"
    return f"{percent(gain['value'])} ({percent_interval(gain)})"


def _gain_at_one(signal: dict[str, Any]) -> str:
    gains = signal["gain_at"]
    if gains is None:
        return "not measurable"
    value, low, high = (f"{100 * gains['1'][key]:+.0f}%" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


# title and cell of each column; one argument, the signal's entry in `results`
COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("c same", lambda s: amount(s["c_same"])),
    ("c cross", lambda s: amount(s["c_cross"])),
    ("v²", lambda s: amount(s["v2"])),
    ("cosine same", lambda s: format_or_missing(s["cosine_same"])),
    ("c/v² same", lambda s: format_or_missing(s["ratio_same"])),
    ("c/v² cross", lambda s: format_or_missing(s["ratio_cross"])),
    ("share at 1", lambda s: _share(s["share"])),
    ("gain at 1", _gain_at_one),
    ("best weight", _weight),
    ("gain", _gain),
)


def format_or_missing(estimate: dict[str, Any] | None) -> str:
    """A value without its error."""
    if estimate is None or estimate["value"] is None:
        return MISSING
    return format_number(estimate["value"], 2)


def rl_line(summary: dict[str, Any], metric: str) -> str:
    """RL's own gradient in a sentence."""
    rl = summary["results"][metric]["rl"]
    text = (
        f"RL's gradient: |g|² {amount(rl['same'], 3)} in one mini-batch, {amount(rl['cross'])} "
        f"between two, {percent(rl['signal_share']['value'])} of it"
    )
    return text if rl["clear"] else f"{text}, which is not clear of 0"


def counts_line(summary: dict[str, Any]) -> str:
    """What was measured, in a line."""
    return (
        f"{summary['samples']:,} mini-batches of {summary['rounds']:,} rounds, "
        f"{summary['sequences']:,} responses, {summary['tokens']:,} tokens, "
        f"{summary['pairs']:,} pairs"
    )
