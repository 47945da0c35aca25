"""The page of a study: one file without scripts, from its results."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from megatron_occ.compare import page_plots, page_tables, statistics
from megatron_occ.compare.analysis import MAIN, Comparison, Outcome
from megatron_occ.compare.wording import conclusion, level_text, ranked
from megatron_occ.observe import html_page
from megatron_occ.observe.html_page import grid, section
from megatron_occ.observe.report_tables import config_block, tile
from megatron_occ.observe.text import escape, format_percent

_SHARE = Outcome("", "", percent=True)
# the table of differences has all outcomes
_ALSO_PLOTTED = ("area", "draft/acceptance_length")
_DEFINITIONS = (
    "Final: the mean of the validations in the last quarter of the steps; it decides. Best: the "
    "highest validation, which noise makes too high. Mean: that of the whole curve, by "
    "trapezoids. Entropy, acceptance length and agreement: means over the last quarter; lambda: "
    "over all steps.",
    "Seconds a step: median over steps, without validation and saving, and only as comparable as "
    "the load of the machine was.",
    f"Interval: bootstrap-t of the mean difference over seeds, from {statistics.MIN_SEEDS} seeds "
    "on. p: two-sided, by flipping the signs of whole seeds; n seeds can't give less than 2/2^n. p "
    "of all: the same for the largest t of all arms, so that the best of many arms is not taken "
    "for more than it is.",
)


def write_page(comparison: Comparison, path: Path) -> Path:
    """Write the page; return its path."""
    return html_page.write_page(path, render_page(comparison))


def render_page(comparison: Comparison) -> str:
    """Return the whole page."""
    reference = comparison.reference.name
    shown = {o.name: page_plots.forest_card(comparison, o) for o in comparison.outcomes}
    parts = [
        _head(comparison),
        _says(comparison),
        _tiles(comparison),
        section(
            f"Paired differences to {reference}",
            shown.get(MAIN, ""),
            "Small dots are seeds, the large one their mean, the line its 95% interval. Green: "
            "above 0; orange: below; blue: undecided.",
        ),
        section(
            "Learning curves",
            page_plots.learning_curves(comparison),
            f"Sampled pass@1 on held-out problems: mean and standard error over seeds, {reference} "
            "in grey; legends give the final value. Best final pass@1 first.",
        ),
        section(
            "Results",
            page_tables.level_table(comparison),
            "Mean over seeds ± its standard error. Differences between arms are more certain than "
            "these say: see the next table.",
        ),
        section(
            f"Differences to {reference}, seed by seed",
            page_tables.difference_table(comparison),
            "Mean, 95% interval, p-value alone and allowing for all arms. Shares in points.",
        ),
        section("Other outcomes", grid([shown[name] for name in _ALSO_PLOTTED if name in shown])),
        section("Arm by arm", _arms(comparison)),
        section("What was compared", page_tables.arm_table(comparison)),
        section("How it was compared", _method(comparison)),
        "<footer>Written by megatron_occ from the results of a study.</footer>",
    ]
    css = resources.files("megatron_occ.compare").joinpath("page.css").read_text("utf-8")
    title = f"{comparison.results['name']}: regimes compared"
    return html_page.html_page(title, "".join(parts), css)


def _head(comparison: Comparison) -> str:
    results = comparison.results
    wanted = len(results["arms"]) * len(results["seeds"])
    done = sum(len(arm.finished()) for arm in comparison.arms.values())
    kind, status = ("done", "finished") if done == wanted else ("open", "not finished")
    return (
        f'<header><p class="eyebrow">Regimes compared</p><h1>{escape(results["name"])}</h1>'
        f'<p class="meta"><span class="status {kind}">{status}</span>'
        f"{done} of {wanted} runs finished</p></header>"
    )


def _says(comparison: Comparison) -> str:
    sentences = "".join(f"<p>{escape(text)}</p>" for text in conclusion(comparison))
    return f'<div class="says">{sentences}</div>'


def _tiles(comparison: Comparison) -> str:
    results, reference = comparison.results, comparison.reference
    starts = [
        run["validation"]["pass@1"][0]
        for run in reference.finished()
        if run["validation"].get("step", [None])[0] == 0 and "pass@1" in run["validation"]
    ]
    final = level_text(reference.level(MAIN)[0], _SHARE)
    found = [
        tile("Arms", str(len(results["arms"])), f"compared with {reference.name}"),
        tile("Seeds", str(len(results["seeds"])), "paired: same prompts, same random numbers"),
        tile("RL steps", f"{results['steps']:,}", "of every run"),
        tile("pass@1 before RL", format_percent(statistics.mean(starts)) if starts else "unknown"),
        tile(f"Final pass@1 of {reference.name}", escape(final), "mean over seeds"),
    ]
    return f'<div class="tiles">{"".join(found)}</div>'


def _arms(comparison: Comparison) -> str:
    blocks = []
    for name in ranked(comparison):
        body = page_plots.arm_curves(comparison, name)
        if body:
            summary = f"<summary>{escape(name)}</summary>"
            blocks.append(f'<details>{summary}<div class="body">{body}</div></details>')
    return "".join(blocks)


def _method(comparison: Comparison) -> str:
    results = comparison.results
    common = ", ".join([*results["base"], *results["overrides"]])
    points = [
        f"All arms start from {results['start']}, with {common}.",
        _pairing(comparison),
        *_DEFINITIONS,
        *_remarks(comparison),
    ]
    items = "".join(f"<li>{escape(text)}</li>" for text in points)
    title = f"Configuration of {escape(comparison.reference.name)}"
    config = f"<details><summary>{title}</summary>{config_block(results['config'])}</details>"
    return f'<div class="body"><ul>{items}</ul></div>{config}'


def _pairing(comparison: Comparison) -> str:
    reference = comparison.reference.name
    if not comparison.unpaired:
        return (
            "A seed gives every arm the same prompts and the same random numbers; the first step's "
            f"responses were checked to be those of {reference} in every run."
        )
    return (
        "A seed gives every arm the same random numbers, but the first step's responses were not "
        f"those of {reference} in {', '.join(comparison.unpaired)}: pairing removes less noise "
        "there."
    )


def _remarks(comparison: Comparison) -> list[str]:
    open_runs = [
        f"{arm.name} seed {run['seed']}"
        for arm in comparison.arms.values()
        for run in arm.runs.values()
        if not run["finished"]
    ]
    if not open_runs:
        return []
    return [f"Left out, not finished: {', '.join(open_runs)}."]
