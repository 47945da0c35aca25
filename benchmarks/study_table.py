"""Tables of docs/results.md from the results of a study, beside what audits expected of each arm.

python benchmarks/study_table.py FOLDER/results.json [LABEL=docs/audits/NAME.json ...]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from audit_table import REGIMES, labelled

from megatron_occ.compare.analysis import MAIN, Comparison, Difference, analyse
from megatron_occ.compare.results import read_results
from megatron_occ.observe.text import format_number

LENGTH = "draft/acceptance_length"


def main() -> None:
    """Print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("audits", nargs="*", metavar="LABEL=FILE")
    options = parser.parse_args()
    audits = labelled(options.audits)
    found = analyse(read_results(options.results))
    heads = ["arm", "final pass@1", "- detach (95 %)", "p of all", "first third, - detach"]
    heads += ["acceptance length", "entropy"]
    heads += [f"expected, {label}" for label in audits]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    order = [each.arm for each in found.differences[MAIN]]
    for arm in [found.reference.name, *order]:
        cells = [arm, *_measured(found, arm), *(_expected(audit, arm) for audit in audits.values())]
        print(f"| {' | '.join(cells)} |")


def _measured(found: Comparison, arm: str) -> list[str]:
    mean, error = found.arms[arm].level(MAIN)
    cells = [f"{100 * mean:.1f} ± {100 * error:.1f} %" if error == error else f"{100 * mean:.1f} %"]
    difference = found.difference(MAIN, arm)
    p_of_all = "" if difference is None else f"{difference.p_of_all:.3f}"
    cells += [_difference(difference), p_of_all, _difference(found.difference("early", arm))]
    for outcome in (LENGTH, "entropy"):
        cells.append(format_number(found.arms[arm].level(outcome)[0]))
    return cells


def _difference(found: Difference | None) -> str:
    if found is None:
        return ""
    text = f"{100 * found.mean:+.1f}"
    if not found.interval:
        return text
    low, high = found.interval
    return f"{text} ({100 * low:+.1f} to {100 * high:+.1f})"


def _expected(audit: dict, arm: str) -> str:
    """Gain of the arm's best step over RL alone, in the optimizer's metric."""
    if arm not in REGIMES:
        return ""
    name, weight = REGIMES[arm]
    signals = audit["results"][audit["judged_in"]]["signals"]
    gains = dict(zip(audit["signals"], signals, strict=True))[name]["gain_at"]
    return f"{100 * gains[weight]['value']:+.0f} %" if gains else "not measurable"


if __name__ == "__main__":
    main()
