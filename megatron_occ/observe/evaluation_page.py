"""The page of an evaluation: a table, and every response to read, without scripts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_occ.config.words import counted
from megatron_occ.observe.evaluation_table import (
    AVERAGE,
    cell,
    columns,
    figure_text,
    figure_title,
    notes_of,
    settings_facts,
    shown_figures,
)
from megatron_occ.observe.html_page import html_page, section, write_page
from megatron_occ.observe.jsonl import read_records
from megatron_occ.observe.text import escape

PAGE_FILE, RESPONSES_FILE = "evaluation.html", "responses.jsonl"
# of responses.jsonl: more is shown on pages of its own, which a browser still opens at once
PAGE_BYTES = 16_000_000
_HOW = (
    "In percent but for lengths, ± the standard error over problems. avg@k: mean score of k "
    "responses. pass@k: one of k is right, estimated without bias from all responses. maj@k: the "
    "most frequent answer is right; of several equally frequent ones one is drawn. Average: mean "
    "over sets, unweighted."
)
_TEASER = 110

Line = Mapping[str, Any]


def write_pages(folder: Path, results: Mapping[str, Any]) -> Path:
    """Write the page of an evaluation beside its ``responses.jsonl``; return its path.

    Where the responses are more than a page holds, it links to pages ``responses_N.html``.
    """
    for old in folder.glob("responses_*.html"):
        old.unlink()
    return write_page(folder / PAGE_FILE, render(results, _lists(folder)))


def render(results: Mapping[str, Any], lists: Mapping[tuple[str, str], str]) -> str:
    """The whole page; ``lists`` has the HTML of the problems of each checkpoint and set."""
    notes = "".join(f"<p>{escape(note)}</p>" for note in notes_of(results))
    parts = [
        _head(results),
        section("Results", _table(results), _HOW),
        f'<div class="notes">{notes}</div>' if notes else "",
        *(_set_section(results, entry, lists) for entry in results["sets"]),
        "<footer>Written by megatron_occ.</footer>",
    ]
    return html_page(_title(results), "".join(parts), _style())


def _style() -> str:
    return resources.files("megatron_occ.observe").joinpath("evaluation.css").read_text("utf-8")


def _title(results: Mapping[str, Any]) -> str:
    rows = results["rows"]
    return rows[0]["name"] if len(rows) == 1 else f"{len(rows)} checkpoints"


def _head(results: Mapping[str, Any]) -> str:
    facts = "".join(f"<span>{escape(fact)}</span>" for fact in settings_facts(results))
    return (
        f'<header><p class="eyebrow">Evaluation</p><h1>{escape(_title(results))}</h1>'
        f'<p class="meta">{facts}</p></header>'
    )


def _table(results: Mapping[str, Any]) -> str:
    """A group of rows for each figure, a row for each checkpoint in it, a column for each set."""
    counts = {each["name"]: counted(each["problems"], "problem") for each in results["sets"]}
    heads = columns(results)
    titles = "".join(
        f'<td class="{_kind(head)}">{escape(head)}<small>{escape(counts.get(head, "of sets"))}'
        "</small></td>"
        for head in heads
    )
    groups = []
    for name in shown_figures(results):
        rows = "".join(_row(results, number, name, heads) for number in range(len(results["rows"])))
        groups.append(f"<tbody>{rows}</tbody>")
    several = "<th></th>" if len(results["rows"]) > 1 else ""
    return (
        '<div class="card wide"><div class="scores-frame"><table class="scores"><thead><tr>'
        f"<th></th>{several}{titles}</tr></thead>{''.join(groups)}</table></div></div>"
    )


def _kind(column: str) -> str:
    return "average" if column == AVERAGE else ""


def _row(results: Mapping[str, Any], number: int, name: str, heads: list[str]) -> str:
    row = results["rows"][number]
    first = escape(figure_title(name)) if number == 0 else ""
    label = f"<th>{first}</th>"
    if len(results["rows"]) > 1:
        label += f'<th title="{escape(row["checkpoint"])}">{escape(row["name"])}</th>'
    cells = []
    for head in heads:
        value, error = figure_text(name, cell(row, head, name))
        small = f"<small>± {escape(error)}</small>" if error else ""
        cells.append(f'<td class="{_kind(head)}">{escape(value)}{small}</td>')
    return f"<tr>{label}{''.join(cells)}</tr>"


def _set_section(
    results: Mapping[str, Any], entry: Mapping[str, Any], lists: Mapping[tuple[str, str], str]
) -> str:
    parts = []
    for row in results["rows"]:
        heading = f"<h3>{escape(row['name'])}</h3>" if len(results["rows"]) > 1 else ""
        parts.append(heading + lists.get((row["name"], entry["name"]), ""))
    problems = counted(entry["problems"], "problem")
    source = f"{problems} of {entry['source']}. Open one to read the responses."
    return section(entry["name"], "".join(parts), source)


def _lists(folder: Path) -> dict[tuple[str, str], str]:
    """The problems of each checkpoint and set: themselves, or links to pages that have them."""
    path = folder / RESPONSES_FILE
    fits = path.stat().st_size <= PAGE_BYTES
    found: dict[tuple[str, str], str] = {}
    pages = 0
    by_list = groupby(read_records(path), key=lambda line: (line["checkpoint"], line["set"]))
    for key, lines in by_list:
        problems = _problems(lines)
        if fits:
            found[key] = "".join(html for _, html in problems)
            continue
        links = []
        for numbers, html in _chunks(problems):
            pages += 1
            links.append(_further_page(folder, pages, ": ".join(key), numbers, html))
        found[key] = f'<ul class="pages">{"".join(links)}</ul>'
    return found


def _problems(lines: Iterator[Line]) -> Iterator[tuple[int, str]]:
    """Number and HTML of each problem."""
    for number, responses in groupby(lines, key=lambda line: line["problem"]):
        yield number, _problem(list(responses))


def _chunks(problems: Iterator[tuple[int, str]]) -> Iterator[tuple[list[int], str]]:
    """Numbers and HTML of problems that make a page together."""
    numbers: list[int] = []
    parts: list[str] = []
    size = 0
    for number, html in problems:
        if numbers and size + len(html) > PAGE_BYTES:
            yield numbers, "".join(parts)
            numbers, parts, size = [], [], 0
        numbers.append(number)
        parts.append(html)
        size += len(html)
    if numbers:
        yield numbers, "".join(parts)


def _further_page(folder: Path, page: int, title: str, numbers: list[int], html: str) -> str:
    """Write a page of problems; return the link to it."""
    name, span = f"responses_{page}.html", f"Problems {numbers[0] + 1} to {numbers[-1] + 1}"
    body = (
        f'<header><p class="eyebrow"><a href="{PAGE_FILE}">Evaluation</a></p>'
        f'<h1>{escape(title)}</h1><p class="meta">{escape(span)}</p></header>{html}'
    )
    write_page(folder / name, html_page(f"{title}, {span}", body, _style()))
    return f'<li><a href="{name}">{escape(span)}</a></li>'


def _problem(lines: list[Line]) -> str:
    first, right = lines[0], sum(line["correct"] for line in lines)
    tokens = sum(line["tokens"] for line in lines) / len(lines)
    kind = "right" if right == len(lines) else "some" if right else "wrong"
    teaser = " ".join(first["prompt"].split())
    short = teaser if len(teaser) <= _TEASER else teaser[-_TEASER:]
    return (
        f'<details class="problem {kind}"><summary><b>{first["problem"] + 1}</b>'
        f'<span class="share">{right} of {len(lines)}</span>'
        f'<span class="teaser">{escape("…" if short != teaser else "")}{escape(short)}</span>'
        f'<span class="size">{tokens:,.0f} tokens</span></summary>'
        f'<div class="inside"><h4>Prompt</h4><pre>{escape(first["prompt"])}</pre>'
        f"<h4>Answer <small>{escape(first['place'])}, verifier {escape(first['verifier'])}</small>"
        f"</h4><pre>{escape(first['answer'])}</pre><h4>Responses</h4>"
        f"{''.join(_response(line) for line in lines)}</div></details>"
    )


def _response(line: Line) -> str:
    kind, sign = ("right", "✓") if line["correct"] else ("wrong", "✗")
    facts = [f"score {line['score']:g}", counted(line["tokens"], "token")]
    if line["truncated"]:
        facts.append("cut off at the limit")
    if "read" in line:
        facts.append(f"answer read: {line['read']}" if line["read"] else "no answer read")
    if "verifier_failure" in line:
        facts.append(f"verifier failed: {line['verifier_failure']}")
    words = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    return (
        f'<details class="response {kind}"><summary><b>{sign} {line["sample"] + 1}</b>{words}'
        f"</summary><pre>{escape(line['response'])}</pre></details>"
    )
