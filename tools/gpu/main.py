"""The command: sections one after the other, results after each, the table at the end."""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.gpu.bounds import LIMITS, REHEARSAL_LIMIT, SECTIONS, TOGETHER
from tools.gpu.results import SectionResult, table, write_results
from tools.gpu.runner import run_section
from tools.gpu.session import rows_file

ROOT = Path(__file__).resolve().parents[2]
# one command for many machines: nothing is asked of the network, and text comes at once
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
Chosen = dict[str, list[str]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns 1 where a check failed."""
    parser = argparse.ArgumentParser(description="Check this project on one GPU.")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at toy size")
    parser.add_argument(
        "--only",
        metavar="SECTION[:PART],...",
        help=f"of {', '.join(SECTIONS)}; a part as the table names it",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"))
    options = parser.parse_args(arguments)
    try:
        chosen = chosen_sections(options.only)
    except ValueError as error:
        parser.error(str(error))
    if not options.rehearse and not _sees_a_gpu():
        parser.error("there is no CUDA device here: --rehearse runs every section on the CPU")
    results = run_all(chosen, options.out, rehearse=options.rehearse)
    print(f"\n{table(results)}")
    return int(any(result.has_failed for result in results))


def chosen_sections(only: str | None) -> Chosen:
    """Sections in their order, with the parts that are wanted of each; none: all of them.

    Args:
        only: as on the command line.

    Raises:
        ValueError: there is no such section.
    """
    if only is None:
        return {section: [] for section in SECTIONS}
    wanted: Chosen = {}
    for word in only.split(","):
        section, _, part = word.partition(":")
        if section not in SECTIONS:
            raise ValueError(f"--only {section}: there are {', '.join(SECTIONS)}")
        wanted.setdefault(section, []).extend([part] if part else [])
    return {section: wanted[section] for section in SECTIONS if section in wanted}


def run_all(chosen: Chosen, out: Path, *, rehearse: bool) -> list[SectionResult]:
    """Run the sections; ``out/results.json`` has what was found so far.

    Args:
        chosen: from :func:`chosen_sections`.
        out: folder of results, logs and runs.
        rehearse: on the CPU, at toy size.
    """
    out = out.resolve()
    environment = {**ENVIRONMENT, "PYTHONPATH": _python_path()}
    if rehearse:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    results: list[SectionResult] = []
    for group in in_groups(chosen):
        calls = [
            functools.partial(_run, section, chosen[section], out, environment, rehearse=rehearse)
            for section in group
        ]
        with ThreadPoolExecutor(len(group)) as pool:
            results += pool.map(lambda call: call(), calls)
        write_results(out / "results.json", results, {"rehearsal": rehearse})
        for result in results[-len(group) :]:
            print(f"{result.name}: {result.seconds:.0f} s", flush=True)
    return results


def in_groups(sections: Iterable[str]) -> list[list[str]]:
    """Sections in their order, those of ``TOGETHER`` in one group."""
    groups: list[list[str]] = []
    for section in sections:
        if section in TOGETHER and groups and groups[-1][0] in TOGETHER:
            groups[-1].append(section)
        else:
            groups.append([section])
    return groups


def _run(
    section: str, parts: list[str], out: Path, environment: dict[str, str], *, rehearse: bool
) -> SectionResult:
    shutil.rmtree(out / section, ignore_errors=True)
    limit = REHEARSAL_LIMIT if rehearse else LIMITS[section]
    command = [sys.executable, "-m", "tools.gpu.section", section, "--out", str(out)]
    # it ends by itself with the rows that it has, before it is cut
    command += ["--limit", str(0.9 * limit), *["--rehearse"] * rehearse]
    command += [f"--part={part}" for part in parts]
    log = out / "logs" / f"{section}.log"
    return run_section(section, command, limit, log, rows_file(out, section), environment)


def _python_path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def _sees_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
