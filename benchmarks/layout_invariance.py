"""Every parallel layout against one process: ``python -m benchmarks.layout_invariance``.

The same mini-batch of rollouts goes through three RL updates under each layout. The table shows the
largest relative deviation from the single-process run of losses, gradient norms and lambda, of any
entry of any gradient in the first update, and of any entry of any parameter after the third, both
relative to the largest entry of that tensor, on every rank, replicas included.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from megatron.core import parallel_state

from benchmarks.layout_cases import CASES, Case
from benchmarks.layout_runs import Measured, measure, reference
from megatron_occ.mcore.startup import shutdown
from tests.mcore.distributed import run_ranks

LIMIT = 1e-5
COLUMNS = ("loss", "grad_norm", "coefficient", "gradient", "parameter")
TITLES = ("loss", "grad norm", "lambda", "gradients", "parameters")


def run_references(models: list[tuple[str, ...]], folder: Path) -> list[list[dict[str, float]]]:
    """Single-process runs of the given models, one after the other, in this process.

    Not in a process of :func:`run_ranks`: Megatron's checkpoint writer starts processes itself.
    """
    torch.set_num_threads(1)
    metrics = []
    for index, model in enumerate(models):
        metrics.append(reference(model, folder / str(index)))
        shutdown()
    return metrics


def run_cases(cases: list[Case], folders: list[Path], expected: list[list[dict]]) -> list[Measured]:
    """Layouts of one number of ranks, one after the other; called on every rank."""
    found = []
    for case, folder, metrics in zip(cases, folders, expected, strict=True):
        found.append(measure(case, folder, metrics))
        parallel_state.destroy_model_parallel()
    return found


def compare(cases: list[Case], folder: Path) -> dict[str, Measured]:
    """Deviations of each layout by name, the largest over its ranks."""
    models = sorted({case.model for case in cases})
    expected = run_references(models, folder)
    results = {}
    for ranks in sorted({case.ranks for case in cases}):
        chosen = [case for case in cases if case.ranks == ranks]
        numbers = [models.index(case.model) for case in chosen]
        places = [folder / str(number) for number in numbers]
        wanted = [expected[number] for number in numbers]
        by_rank = run_ranks(run_cases, ranks, chosen, places, wanted, timeout=900)
        for case, measured in zip(chosen, zip(*by_rank, strict=True), strict=True):
            results[case.name] = _worst(measured)
        print(f"{len(results)} of {len(cases)} layouts", file=sys.stderr, flush=True)
    return results


def _worst(measured: tuple[Measured, ...]) -> Measured:
    largest = {name: max(getattr(m, name) for m in measured) for name in COLUMNS}
    return Measured(**largest, worst=max(measured, key=lambda m: m.gradient).worst)


def largest(measured: Measured) -> float:
    """Largest deviation in a row."""
    return max(getattr(measured, name) for name in COLUMNS)


def table(results: dict[str, Measured]) -> str:
    """Text table, a row a layout."""
    width = max(map(len, results))
    lines = [f"{'layout':<{width}}" + "".join(f"{title:>12}" for title in TITLES)]
    for name, measured in results.items():
        cells = "".join(f"{getattr(measured, column):12.1e}" for column in COLUMNS)
        flag = "" if largest(measured) <= LIMIT else f"  above {LIMIT:g}: {measured.worst}"
        lines.append(f"{name:<{width}}{cells}{flag}")
    return "\n".join(lines)


def main() -> None:
    """Print the table; exit with 1 where a deviation is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="layouts whose name contains this")
    parser.add_argument("--ranks", type=int, help="layouts of this many processes")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    cases = [
        case for case in CASES if options.only in case.name and options.ranks in (None, case.ranks)
    ]
    with tempfile.TemporaryDirectory() as folder:
        results = compare(cases, Path(folder))
    print(table(results))
    if options.json:
        figures = {n: {c: getattr(m, c) for c in COLUMNS} for n, m in results.items()}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(any(largest(measured) > LIMIT for measured in results.values()))


if __name__ == "__main__":
    main()
