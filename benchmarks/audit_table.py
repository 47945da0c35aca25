"""Tables and figure of docs/results.md from the summaries of several audits.

python benchmarks/audit_table.py [--plot docs/audits.svg] LABEL=docs/audits/NAME.json ...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_occ.observe.plot import plot_style
from megatron_occ.observe.plot_intervals import IntervalRow, plot_intervals_svg
from megatron_occ.observe.text import format_number

SHOWN = ("policy, dual clip 10", "policy, ratio at most 1", "policy, no ratio", "cross-entropy")

# arm of conf/compare/base/regimes.yaml: the audit's signal, and its weight
REGIMES = {
    **{
        f"policy_{weight}": ("policy, dual clip 10", weight)
        for weight in ("0.1", "0.2", "0.5", "1")
    },
    "policy_1_unbounded": ("policy, no dual clip", "1"),
    "policy_1_truncated": ("policy, ratio at most 1", "1"),
    "policy_1_unit": ("policy, no ratio", "1"),
    "ce_0.1": ("cross-entropy", "0.1"),
    "ce_1": ("cross-entropy", "1"),
}


def main() -> None:
    """Print Markdown; write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plot", type=Path)
    parser.add_argument("audits", nargs="+", metavar="LABEL=FILE")
    options = parser.parse_args()
    audits = labelled(options.audits)
    print("\n".join([*_signals(audits), "", *_gains(audits), "", *_proxies(audits)]))
    if options.plot:
        options.plot.write_text(_figure(audits) + "\n")


def labelled(words: list[str]) -> dict[str, dict[str, Any]]:
    """Summaries of audits by label, from ``LABEL=FILE``."""
    pairs = [word.partition("=") for word in words]
    return {label: json.loads(Path(path).read_text()) for label, _, path in pairs}


def _of(audit: dict[str, Any], metric: str = "euclidean") -> list[tuple[str, dict[str, Any]]]:
    """Name and figures of each signal of depth 1."""
    pairs = zip(audit["signals"], audit["results"][metric]["signals"], strict=True)
    return list(pairs)


def _text(estimate: dict[str, float]) -> str:
    return f"{format_number(estimate['value'])} ± {format_number(estimate['error'])}"


def _signals(audits: dict[str, dict]) -> list[str]:
    lines = [
        "| checkpoint | signal | c same | c cross | v² | best weight | gain (95 %) | top 0.1 % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, audit in audits.items():
        for (name, found), tail in zip(_of(audit), audit["tails"], strict=True):
            mixture = found["mixture"]
            gain = mixture and mixture["gain"]
            shown = f"{gain['low']:.1%} to {gain['high']:.1%}" if gain else "not above 0"
            weight = _text(mixture["weight"]) if mixture else "not measurable"
            lines.append(
                f"| {label} | {name} | {_text(found['c_same'])} | {_text(found['c_cross'])} | "
                f"{format_number(found['v2']['value'])} | {weight} | {shown} | "
                f"{tail['median']:.0%} |"
            )
            label = ""
    return lines


def _gains(audits: dict[str, dict]) -> list[str]:
    """Gain of regimes with fixed weights, in the metric of the optimizer."""
    lines = [f"| regime | {' | '.join(audits)} |", "|---" * (1 + len(audits)) + "|"]
    for name, weight in REGIMES.values():
        found = [dict(_of(audit, "adam"))[name]["gain_at"] for audit in audits.values()]
        cells = [_percent(gains[weight]) if gains else "not measurable" for gains in found]
        lines.append(f"| {name}, weight {weight} | {' | '.join(cells)} |")
    return lines


def _percent(gain: dict[str, float]) -> str:
    value, low, high = (f"{100 * gain[key]:+.0f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _proxies(audits: dict[str, dict]) -> list[str]:
    first = next(iter(audits.values()))["proxies"]
    names = list(dict.fromkeys(each["proxy"] for each in first if each["same"]))
    lines = [f"| checkpoint | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for label, audit in audits.items():
        chosen = audit["signals"].index("policy, dual clip 10")
        cells = []
        for name in names:
            (found,) = (p for p in audit["proxies"] if (p["signal"], p["proxy"]) == (chosen, name))
            same = found["same"] and found["same"]["agreement"]
            cells.append(
                f"{same['value']:.0%} ({same['low']:.0%} to {same['high']:.0%})" if same else "-"
            )
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def _figure(audits: dict[str, dict]) -> str:
    """Cosine of RL's and MTP's gradients between mini-batches, with 95 % intervals."""
    rows = []
    for label, audit in audits.items():
        for name, found in _of(audit):
            if name not in SHOWN:
                continue
            cosine, color = found["cosine_cross"], 1 + SHOWN.index(name)
            interval = (cosine["low"], cosine["high"])
            rows.append(IntervalRow(f"{label}: {name}", cosine["value"], interval, (), color))
    svg = plot_intervals_svg(rows, title="Alignment", x_label="cosine between mini-batches")
    return svg.replace(">", f"><style>{plot_style()}</style>", 1)


if __name__ == "__main__":
    main()
