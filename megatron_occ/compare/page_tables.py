"""The tables of a study's page."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_occ.compare.analysis import Comparison, Outcome
from megatron_occ.compare.wording import amount, interval_text, level_text, p_text, ranked
from megatron_occ.config.keys import spell
from megatron_occ.observe.text import escape, format_number

# outcomes of which the page shows the paired difference, as far as there are any
COMPARED = (
    "final",
    "area",
    "early",
    "best",
    "final@",
    "draft/acceptance_length",
    "agreement/mtp_1",
    "entropy",
)


def level_table(comparison: Comparison) -> str:
    """Each arm's outcomes: mean over seeds, and its standard error."""
    if not ranked(comparison):
        return ""
    titles = [outcome.title for outcome in comparison.outcomes]
    rows = [
        _row(comparison, name, [_level_cell(comparison, name, o) for o in comparison.outcomes])
        for name in ranked(comparison)
    ]
    return _table(["arm"], ["seeds", *titles], rows)


def difference_table(comparison: Comparison) -> str:
    """Each arm's paired differences to the reference."""
    shown = compared(comparison)
    names = [d.arm for d in comparison.differences.get("final", [])]
    if not names:
        return ""
    rows = [
        _row(comparison, name, [_difference_cell(comparison, name, o) for o in shown])
        for name in names
    ]
    return _table(["arm"], ["seeds", *(outcome.title for outcome in shown)], rows)


def compared(comparison: Comparison) -> list[Outcome]:
    """The outcomes whose paired differences are shown."""
    by_rank = {}
    for outcome in comparison.outcomes:
        key = "final@" if outcome.name.startswith("final@") else outcome.name
        if key in COMPARED and comparison.differences[outcome.name]:
            by_rank[COMPARED.index(key)] = outcome
    return [by_rank[rank] for rank in sorted(by_rank)]


def arm_table(comparison: Comparison) -> str:
    """What each arm is: its overrides, and how its configuration differs from the reference's."""
    rows = []
    for name, arm in comparison.results["arms"].items():
        own = _code(arm["overrides"]) if arm["overrides"] else "the base as it is"
        changes = [f"{key}: {spell(a)} → {spell(b)}" for key, (a, b) in arm["differs"].items()]
        is_reference = name == comparison.reference.name
        differs = "" if is_reference else _code(changes) if changes else "nothing"
        cells = f'<td class="text">{own}</td><td class="text">{differs}</td>'
        rows.append(f"{_head_cell(comparison, name)}{cells}</tr>")
    reference = escape(comparison.reference.name)
    head = (
        f'<tr><th>arm</th><td class="text">its overrides</td>'
        f'<td class="text">resolved values that differ from {reference}</td></tr>'
    )
    return _framed(f"<thead>{head}</thead><tbody>{''.join(rows)}</tbody>")


def _level_cell(comparison: Comparison, name: str, outcome: Outcome) -> str:
    value, error = comparison.arms[name].level(outcome.name)
    text = escape(level_text(value, outcome))
    if error > 1e-9 * abs(value):  # not that of rounding, nor of a single seed
        shown = f"{100 * error:.1f}" if outcome.percent else format_number(error, 2)
        text += f" <small>± {escape(shown)}</small>"
    return f"<td>{text}</td>"


def _difference_cell(comparison: Comparison, name: str, outcome: Outcome) -> str:
    found = comparison.difference(outcome.name, name)
    if found is None:
        return "<td>\N{EN DASH}</td>"
    text = escape(amount(found.mean, outcome.percent))
    if found.interval is not None:
        interval = escape(interval_text(found, outcome.percent))
        text += f"<br/><small>{interval}<br/>p {p_text(found.p)}, of all {p_text(found.p_of_all)}"
        text += "</small>"
    return f'<td class="{found.verdict}">{text}</td>'


def _row(comparison: Comparison, name: str, cells: Sequence[str]) -> str:
    seeds = len(comparison.arms[name].finished())
    return f"{_head_cell(comparison, name)}<td>{seeds}</td>{''.join(cells)}</tr>"


def _head_cell(comparison: Comparison, name: str) -> str:
    kind = ' class="reference"' if name == comparison.reference.name else ""
    return f"<tr{kind}><th>{escape(name)}</th>"


def _table(left: list[str], right: list[str], rows: list[str]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in left)
    head += "".join(f"<td>{escape(title)}</td>" for title in right)
    return _framed(f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>")


def _framed(content: str) -> str:
    return f'<div class="wide-table"><table class="arms">{content}</table></div>'


def _code(texts: Sequence[str]) -> str:
    return "<br/>".join(f"<code>{escape(text)}</code>" for text in texts)
