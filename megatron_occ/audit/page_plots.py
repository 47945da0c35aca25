"""The plots of an audit's page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_occ.observe.html_page import grid
from megatron_occ.observe.plot import COLORS
from megatron_occ.observe.plot_intervals import IntervalRow, plot_intervals_svg
from megatron_occ.observe.text import escape

_HALF = 480  # width of a plot of two beside each other
_COIN = 0.5


def alignment(summary: dict[str, Any]) -> str:
    """c between mini-batches and within one, over the root mean squares of both gradients."""
    signals = summary["results"][summary["judged_in"]]["signals"]
    titles = {
        "cosine_cross": "Between different mini-batches (c cross): alignment",
        "cosine_same": "Within a mini-batch (c same): alignment and shared noise",
    }
    cards = []
    for key, title in titles.items():
        rows = [
            row
            for index, (name, signal) in enumerate(zip(summary["signals"], signals, strict=True))
            for row in _row(name, signal[key], _color(index))
        ]
        cards.append(_card(title, rows, x_label="cosine"))
    return grid([card for card in cards if card])


def groups(summary: dict[str, Any]) -> str:
    """A card for each signal: c cross of each group as a part of the signal's cosine."""
    results = summary["results"][summary["judged_in"]]
    cards = []
    for index, signal in enumerate(results["signals"]):
        size = (results["rl"]["same"]["value"] * signal["v2"]["value"]) ** 0.5
        if not size:
            continue
        rows = [
            row
            for group, c in zip(summary["groups"], signal["groups"]["c_cross"], strict=True)
            for row in _row(group, {k: x and x / size for k, x in c.items()}, _color(index))
        ]
        cards.append(_card(summary["signals"][index], rows, x_label="cosine"))
    return grid(cards)


def proxies(summary: dict[str, Any]) -> str:
    """Two cards for each signal: proxies against c within the mini-batch, and between them."""
    against = {"same": "sign of c same", "cross": "sign of c cross"}
    cards = []
    for index, name in enumerate(summary["signals"]):
        entries = [entry for entry in summary["proxies"] if entry["signal"] == index]
        for target, title in against.items():
            rows = [row for e in entries for row in _proxy_row(e, target, _color(index))]
            if rows:
                heads = ("n", "rank corr.")
                cards.append(_card(f"{name}: {title}", rows, "points above 50%", heads, True))
    return grid(cards)


def _proxy_row(entry: dict[str, Any], target: str, color: int) -> list[IntervalRow]:
    found = entry[target]
    if found is None or found["agreement"]["value"] is None:
        return []
    low, value, high = (found["agreement"][key] - _COIN for key in ("low", "value", "high"))
    rank = found["rank"]["value"]
    cells = (str(found["samples"]), "" if rank is None else f"{rank:+.2f}")
    return [IntervalRow(entry["proxy"], value, (low, high), (), color, cells)]


def _row(label: str, estimate: dict[str, Any], color: int) -> list[IntervalRow]:
    """One row; none for an estimate that is not there."""
    if estimate["value"] is None or estimate["low"] is None:
        return []
    return [IntervalRow(label, estimate["value"], (estimate["low"], estimate["high"]), (), color)]


def _card(
    title: str,
    rows: Sequence[IntervalRow],
    x_label: str,
    heads: Sequence[str] = (),
    percent: bool = False,
) -> str:
    if not rows:
        return ""
    plot = plot_intervals_svg(
        rows, title=title, heads=heads, x_label=x_label, width=_HALF, percent=percent
    )
    return f'<figure class="card"><h3>{escape(title)}</h3>{plot}</figure>'


def _color(index: int) -> int:
    return index % COLORS + 1
