"""One sentence on what to do with MTP's gradient, by rules; and warnings."""

from __future__ import annotations

from typing import Any

from megatron_occ.audit.wording import amount, interval, percent, percent_interval
from megatron_occ.observe.text import format_percent

# a gain whose interval ends below this is none
LEAST_GAIN = 0.01
# share of mini-batches with a heavy tail from which there is a warning
_OFTEN = 0.01
_OUT = "Keep MTP's gradient out of the trunk (mtp.preset=detach)"


def recommend(summary: dict[str, Any]) -> dict[str, Any]:
    """`action`, `signal` (index or null) and `text`, one sentence.

    Rules, in the metric `judged_in`, the first that applies:

    1. No signal's alignment c between mini-batches is 2 standard errors above 0: `detach`.
    2. RL's own expected gradient is not clear of 0, so that no weight is: `measure` more.
    3. Of no signal of rule 1 the interval of the expected gain, widened for the number of signals
       looked at, excludes 0 and ends above 1%: `detach`.
    4. Else `mix` in the one of these with the best expected gain, with its best weight.

    Args:
        summary: of :func:`~megatron_occ.audit.summary.summarize`, without this and the warnings.
    """
    found = summary["results"][summary["judged_in"]]["signals"]
    aligned = [i for i, s in enumerate(found) if s["clear"] and s["c_cross"]["value"] > 0]
    after = f"after {summary['samples']} mini-batches"
    if not aligned:
        return _choice("detach", None, f"{_OUT}: {after} {_none_aligned(summary, found)}.")
    gains = {i: found[i]["mixture"]["gain"] for i in aligned if found[i]["mixture"] is not None}
    if not gains:
        rl = summary["results"][summary["judged_in"]]["rl"]["cross"]
        verb = "is" if len(aligned) == 1 else "are"
        text = (
            f"{_OUT} until more is measured: {after} {_names(summary, aligned)} {verb} aligned "
            f"with RL's gradient, but RL's own signal is not measurable (|G|² = {amount(rl)}), "
            "and without it no weight is."
        )
        return _choice("measure", None, text)
    clear = [i for i, g in gains.items() if g["low_of_all"] > 0 and g["high"] >= LEAST_GAIN]
    best = max(clear or gains, key=lambda index: gains[index]["value"])
    name, gain = f"'{summary['signals'][best]}'", gains[best]
    expected = f"{percent(gain['value'])} (95% interval {percent_interval(gain)})"
    if not clear:
        text = (
            f"{_OUT}: {after} the best signal, {name}, is aligned with RL's gradient, but the gain "
            f"to expect of the best step over RL alone is {expected}, nothing beyond noise for "
            f"the best of {len(found)}."
        )
        return _choice("detach", best, text)
    weight, share = (found[best]["mixture"][key] for key in ("weight", "share"))
    text = (
        f"Let {name} reach the trunk with weight {amount(weight)} (95% interval "
        f"{interval(weight)}), {percent(share['value'])} of RL's part of the update: {after} the "
        f"gain to expect of the best step over RL alone is {expected}, clear of 0 for the best of "
        f"{len(found)} signals too."
    )
    return _choice("mix", best, text)


def tail_warnings(summary: dict[str, Any]) -> list[str]:
    """A sentence for each signal in which a few tokens are the whole gradient."""
    return [
        f"'{name}' is heavy-tailed: in {format_percent(tail['heavy'])} of the mini-batches the top "
        "0.1% of tokens hold more than half of the sum of squared weights (median "
        f"{format_percent(tail['median'])}, 99th percentile {format_percent(tail['high'])}); bound "
        "its ratio."
        for name, tail in zip(summary["signals"], summary["tails"], strict=True)
        if tail["heavy"] >= _OFTEN
    ]


def depth_warnings(summary: dict[str, Any]) -> list[str]:
    """That weights of a depth are not those of a regime, where there are several."""
    depths = summary["depths"]
    if depths == 1:
        return []
    return [
        f"each depth was measured alone, with the weight of its own gradient: mtp.trunk.weight "
        f"acts on all {depths} depths at once and is divided by {depths}, and only "
        "mtp.trunk.estimator=exact weighs them apart."
    ]


def _none_aligned(summary: dict[str, Any], found: list[dict[str, Any]]) -> str:
    scores = [_score(signal["c_cross"]) for signal in found]
    best = max(range(len(found)), key=scores.__getitem__)
    return (
        f"none of the {len(found)} signals has an alignment with RL's gradient that is 2 standard "
        f"errors above 0 (closest: '{summary['signals'][best]}', cosine between mini-batches "
        f"{amount(found[best]['cosine_cross'])})"
    )


def _score(c: dict[str, Any]) -> float:
    return c["value"] / c["error"] if c["error"] else 0.0


def _names(summary: dict[str, Any], indices: list[int]) -> str:
    return " and ".join(f"'{summary['signals'][index]}'" for index in indices)


def _choice(action: str, signal: int | None, text: str) -> dict[str, Any]:
    return {"action": action, "signal": signal, "text": text}
