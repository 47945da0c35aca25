"""The summary of an audit as text for a terminal."""

from __future__ import annotations

from typing import Any

from megatron_occ.audit.wording import COLUMNS, counts_line, metric_title, percent, rl_line


def audit_text(summary: dict[str, Any]) -> str:
    """Tables in each metric, tails and proxies, the recommendation last; lines of any length."""
    head = [
        f"audit of {summary['checkpoint']} ({summary['task']}, {summary['updates']:,} RL updates)",
        f"  {counts_line(summary)}",
    ]
    parts = [head]
    parts += [_metric_table(summary, metric) for metric in summary["metrics"]]
    parts += [_proxy_table(summary)]
    parts += [[f"warning: {text}" for text in summary["warnings"]]]
    parts += [[summary["recommendation"]["text"]]]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _metric_table(summary: dict[str, Any], metric: str) -> list[str]:
    rows = [[metric_title(metric), *(title for title, _ in COLUMNS), "top 0.1 %"]]
    signals = summary["results"][metric]["signals"]
    for name, signal, tail in zip(summary["signals"], signals, summary["tails"], strict=True):
        rows.append([name, *(cell(signal) for _, cell in COLUMNS), percent(tail["median"])])
    return [*_aligned(rows), f"  {rl_line(summary, metric)}"]


def _proxy_table(summary: dict[str, Any]) -> list[str]:
    """Sign agreement of each proxy, a row for each, two columns a signal."""
    rows = [["Proxy has the sign of c", "signal", "same", "cross", "rank same", "rank cross"]]
    for entry in summary["proxies"]:
        cells = [_agreement(entry["same"]), _agreement(entry["cross"])]
        cells += [_rank(entry["same"]), _rank(entry["cross"])]
        rows.append([entry["proxy"], summary["signals"][entry["signal"]], *cells])
    return _aligned(rows)


def _agreement(found: dict[str, Any] | None) -> str:
    if found is None or found["agreement"]["value"] is None:
        return "-"
    low, value, high = (found["agreement"][key] for key in ("low", "value", "high"))
    return f"{percent(value)} ({100 * low:.0f}-{100 * high:.0f})"


def _rank(found: dict[str, Any] | None) -> str:
    if found is None or found["rank"]["value"] is None:
        return "-"
    low, value, high = (found["rank"][key] for key in ("low", "value", "high"))
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


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
