"""The summary of an audit as text for a terminal."""

from __future__ import annotations

from typing import Any

from megatron_occ.audit.wording import COLUMNS, MISSING, counts_line, metric_title, percent, rl_line


def audit_text(summary: dict[str, Any]) -> str:
    """Tables in each metric and of proxies, warnings, the recommendation; lines of any length."""
    head = [
        f"audit of {summary['checkpoint']} ({summary['task']}, {summary['updates']:,} RL updates)",
        f"  {counts_line(summary)}",
    ]
    parts = [head]
    parts += [_metric_table(summary, metric) for metric in summary["metrics"]]
    parts += [_proxy_table(summary, target) for target in ("same", "cross")]
    parts += [[f"warning: {text}" for text in summary["warnings"]]]
    parts += [[summary["recommendation"]["text"]]]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _metric_table(summary: dict[str, Any], metric: str) -> list[str]:
    rows = [[metric_title(metric), *(title for title, _ in COLUMNS), "top 0.1%"]]
    signals = summary["results"][metric]["signals"]
    for name, signal, tail in zip(summary["signals"], signals, summary["tails"], strict=True):
        rows.append([name, *(cell(signal) for _, cell in COLUMNS), percent(tail["median"])])
    return [*_aligned(rows), f"  {rl_line(summary, metric)}"]


def _proxy_table(summary: dict[str, Any], target: str) -> list[str]:
    """Sign agreement of the proxies in percent, with its interval: a row for each signal."""
    names = [e["proxy"] for e in summary["proxies"] if e["signal"] == 0 and e[target] is not None]
    rows = [[f"Proxy has the sign of c {target}", *names]]
    for index, signal in enumerate(summary["signals"]):
        found = {e["proxy"]: e[target] for e in summary["proxies"] if e["signal"] == index}
        rows.append([signal, *(_agreement(found[name]["agreement"]) for name in names)])
    return _aligned(rows)


def _agreement(found: dict[str, Any]) -> str:
    if found["value"] is None:
        return MISSING
    return f"{percent(found['value'])} ({100 * found['low']:.0f}-{100 * found['high']:.0f})"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Rows as lines, columns under each other: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
