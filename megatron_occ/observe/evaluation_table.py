"""The table of an evaluation: which figures it shows, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from megatron_occ.config.words import counted
from megatron_occ.observe.text import format_number, format_percent

AVERAGE = "average"
_TITLES = {"truncated": "truncated", "length": "mean length (tokens)"}


def shown_figures(results: Mapping[str, Any]) -> list[str]:
    """Names of figures in the order of a table; pass@k at 1 (if it is not avg@k), 2, 4, ... k."""
    samples = results["settings"]["samples"]
    average, majority = f"avg@{samples}", f"maj@{samples}"
    powers = [2**n for n in range(1, samples.bit_length()) if 2**n < samples]
    counts = [*powers, *([samples] if samples > 1 else [])]
    if any(_has_partial_credit(figures, average) for _, figures in _all_figures(results)):
        counts = [1, *counts]
    names = [average, *(f"pass@{k}" for k in counts)]
    if any(majority in figures for _, figures in _all_figures(results)):
        names.append(majority)
    return [*names, "truncated", "length"]


def _all_figures(results: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for row in results["rows"]:
        yield from row["sets"].items()


def _has_partial_credit(figures: Mapping[str, Any], average: str) -> bool:
    # the same zeros and ones, but for the order in which they were added up
    return abs(figures[average]["value"] - figures["pass@1"]["value"]) > 1e-9


def figure_title(name: str) -> str:
    """What a figure is called."""
    return _TITLES.get(name, name)


def figure_text(name: str, figure: Mapping[str, Any] | None) -> tuple[str, str]:
    """Value and standard error; shares in percent, lengths and scores beyond 1 as they are."""
    if figure is None:
        return "\N{EN DASH}", ""
    value, error = figure["value"], figure["error"]
    if name == "length":
        return f"{value:,.0f}", "" if error is None else f"{error:,.0f}"
    if not 0 <= value <= 1:
        return format_number(value), "" if error is None else format_number(error, 2)
    return format_percent(value)[:-1], "" if error is None else format_percent(error)[:-1]


def columns(results: Mapping[str, Any]) -> list[str]:
    """Names of the sets, and of their average where there are several."""
    names = [each["name"] for each in results["sets"]]
    return [*names, AVERAGE] if len(names) > 1 else names


def cell(row: Mapping[str, Any], column: str, name: str) -> Mapping[str, Any] | None:
    """A figure of a checkpoint on a set or on average; None where there is none."""
    figures = row["average"] if column == AVERAGE else row["sets"].get(column, {})
    return figures.get(name)


def table_text(results: Mapping[str, Any]) -> str:
    """The table for a terminal: a line for each figure and checkpoint, a column for each set."""
    heads, several = columns(results), len(results["rows"]) > 1
    labels = [["", ""] if several else [""]]
    cells = [heads]
    for name in shown_figures(results):
        for number, row in enumerate(results["rows"]):
            title = figure_title(name) if number == 0 else ""
            labels.append([title, row["name"]] if several else [title])
            cells.append([_cell_text(row, head, name) for head in heads])
    lines = [
        "  ".join((*left, *right)).rstrip()
        for left, right in zip(_aligned(labels, str.ljust), _aligned(cells, str.rjust), strict=True)
    ]
    return "\n".join([", ".join(settings_facts(results)), "", *lines, *notes_of(results)])


def _cell_text(row: Mapping[str, Any], column: str, name: str) -> str:
    value, error = figure_text(name, cell(row, column, name))
    return f"{value} ± {error}" if error else value


def _aligned(lines: Sequence[Sequence[str]], fill: Callable[[str, int], str]) -> list[list[str]]:
    """The same with all texts of a column as wide as the widest."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [[fill(text, width) for text, width in zip(line, widths, strict=True)] for line in lines]


def settings_facts(results: Mapping[str, Any]) -> list[str]:
    """How responses were drawn."""
    settings = results["settings"]
    count = settings["samples"]
    facts = [f"{counted(count, 'response')} a problem"]
    temperature = settings["temperature"]
    facts.append("greedy" if temperature == 0 else f"temperature {temperature:g}")
    if settings["top_p"] < 1:
        facts.append(f"top_p {settings['top_p']:g}")
    if settings["top_k"] is not None:
        facts.append(f"top_k {settings['top_k']}")
    return [
        *facts,
        f"at most {settings['max_response_length']:,} tokens",
        f"seed {results['seed']}",
    ]


def notes_of(results: Mapping[str, Any]) -> list[str]:
    """What there is to say of single sets, and of drafts."""
    several, notes = len(results["rows"]) > 1, []
    for row in results["rows"]:
        where = f"{row['name']}, " if several else ""
        notes += [
            f"{where}{name}: {note}" for name, texts in row["notes"].items() for note in texts
        ]
        length = row["drafts"].get("draft/acceptance_length")
        if length is not None:
            notes.append(f"{where}drafts: {length:.2f} tokens a trunk pass")
    return notes
