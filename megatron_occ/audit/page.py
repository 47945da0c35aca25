"""The page of an audit: one html file with tables and plots, from the summary alone."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from megatron_occ.audit import page_plots
from megatron_occ.audit.wording import (
    COLUMNS,
    amount,
    counts_line,
    metric_title,
    percent,
    rl_line,
)
from megatron_occ.observe.html_page import html_page, section, write_page
from megatron_occ.observe.text import escape, format_number

_HOW = (
    "c is the inner product of a signal's gradient with RL's on the trunk: within a mini-batch "
    "(same) it holds the noise that both share, because both weight the same responses by the "
    "same advantages; between different ones (cross) it is the alignment alone. A signal can help "
    "only where c cross is clear of 0, and above it; its best weight then sets what it brings "
    "against the noise v² that it adds, and the gain is what the best step is expected to "
    "improve more than the best step along RL's gradient alone; gain at 1 is that of a regime "
    "with a weight of 1 (mtp.preset=policy). Bars are 95% intervals of a "
    "single number: of twenty signals without any effect one is expected to look clear."
)
_FOOT = (
    "Means over pairs of mini-batches have jackknife errors over mini-batches, and intervals by "
    "Student's t; proportions have Wilson intervals, rank correlations percentile bootstrap "
    "intervals over mini-batches. Neighbouring pairs overlap, which the intervals of a proxy "
    "against c cross do not know."
)


def write_audit_page(path: str | Path, summary: dict[str, Any]) -> Path:
    """Write the page of a summary; return its path."""
    return write_page(Path(path), render_audit(summary))


def render_audit(summary: dict[str, Any]) -> str:
    """The whole page."""
    style = resources.files("megatron_occ.audit").joinpath("page.css").read_text("utf-8")
    judged = metric_title(summary["judged_in"])
    parts = [
        _head(summary),
        _says(summary),
        f'<p class="hint">{escape(_HOW)}</p>',
        section("Alignment", page_plots.alignment(summary), f"As cosines, in {judged}."),
        section("Numbers", "".join(_table(summary, m) for m in summary["metrics"])),
        section("Tails", _tail_table(summary), "Over mini-batches; weights of tokens."),
        section(
            "By layer group",
            page_plots.groups(summary),
            f"c cross of each group, as its part of the signal's cosine, in {judged}.",
        ),
        section(
            "Do proxies tell the sign?",
            page_plots.proxies(summary),
            "How often a proxy of the coefficient has the sign of c, in points above a coin's "
            f"50%, in the {metric_title(summary['metrics'][0])}; beside it the rank correlation.",
        ),
        f"<footer>Written by megatron_occ. {escape(_FOOT)}</footer>",
    ]
    return html_page(f"{summary['checkpoint']}: audit of gradients", "".join(parts), style)


def _head(summary: dict[str, Any]) -> str:
    facts = [
        f"{summary['task']}, after {summary['updates']:,} RL updates",
        f"{format_number(summary['parameters'])} trunk parameters",
        counts_line(summary),
        f"seed {summary['seed']}",
    ]
    lines = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    return (
        '<header><p class="eyebrow">Audit of gradients</p>'
        f'<h1>{escape(summary["checkpoint"])}</h1><p class="meta">{lines}</p></header>'
    )


def _says(summary: dict[str, Any]) -> str:
    texts = [summary["recommendation"]["text"], *summary["warnings"]]
    return f'<div class="says">{"".join(f"<p>{escape(text)}</p>" for text in texts)}</div>'


def _table(summary: dict[str, Any], metric: str) -> str:
    """A row for each signal."""
    titles = [title for title, _ in COLUMNS]
    rows = []
    signals = summary["results"][metric]["signals"]
    for name, signal, tail in zip(summary["signals"], signals, summary["tails"], strict=True):
        kinds = {"c cross": _verdict(signal)}
        cells = [_cell(cell(signal), kinds.get(title, "")) for title, cell in COLUMNS]
        cells += [_cell(amount(signal["cosine_expected"])), _cell(percent(tail["median"]))]
        rows.append((name, cells))
    titles += ["cosine of means", "top 0.1%"]
    note = f'<p class="hint">{escape(rl_line(summary, metric))}.</p>'
    return _card(metric_title(metric), titles, rows, note)


def _verdict(signal: dict[str, Any]) -> str:
    if not signal["clear"]:
        return ""
    return "clear" if signal["c_cross"]["value"] > 0 else "against"


def _tail_table(summary: dict[str, Any]) -> str:
    titles = [
        "top 0.1% of tokens, median",
        "99%",
        "over a half",
        "effective tokens",
        "v² median",
        "99%",
        "largest",
    ]
    rows = []
    signals = summary["results"][summary["metrics"][0]]["signals"]
    for name, signal, tail in zip(summary["signals"], signals, summary["tails"], strict=True):
        texts = [percent(tail[key]) for key in ("median", "high", "heavy", "effective")]
        spread = signal["v2_spread"]
        texts += [format_number(spread[key]) for key in ("median", "high", "largest")]
        rows.append((name, [_cell(text) for text in texts]))
    return _card("", titles, rows, "")


def _cell(text: str, kind: str = "") -> str:
    """A cell, an error or interval in a line of its own."""
    for mark in (" ± ", " ("):
        value, found, rest = text.partition(mark)
        if found:
            small = f"<br><small>{escape(found.strip())}{escape(rest)}</small>"
            return f'<td class="{kind}">{escape(value)}{small}</td>'
    return f'<td class="{kind}">{escape(text)}</td>'


def _card(title: str, titles: list[str], rows: list[tuple[str, list[str]]], note: str) -> str:
    head = "".join(f"<td>{escape(text)}</td>" for text in titles)
    lines = "".join(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>" for name, cells in rows)
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return (
        f'<div class="card wide">{heading}{note}<div class="products"><table><thead><tr>'
        f"<th>signal</th>{head}</tr></thead><tbody>{lines}</tbody></table></div></div>"
    )
