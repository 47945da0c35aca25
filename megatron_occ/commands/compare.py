"""``megatron-occ compare``: regimes x seeds from one checkpoint, and their page."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from megatron_occ.compare.live import Live
from megatron_occ.compare.process import RunProcess, run_environment
from megatron_occ.compare.queue import Tally, work_off
from megatron_occ.compare.results import RESULTS_FILE, collect, read_results, write_results
from megatron_occ.compare.runs import (
    RunSpec,
    check_runs,
    start_checkpoint,
    start_run,
    study_runs,
)
from megatron_occ.compare.study import Study, read_study
from megatron_occ.config import ConfigError
from megatron_occ.config.machine import processors
from megatron_occ.config.words import counted
from megatron_occ.rl.stopping import handled

HELP = "train regimes x seeds from one checkpoint and compare them"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``compare``."""
    parser.add_argument(
        "study",
        type=Path,
        help="study file (yaml), or the results.json of one, whose page is then written again",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="folder, seeds or reference of the study, or a configuration key of all runs",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once (default 1)")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads of a run (default: cores / jobs)"
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        "--share", metavar="I/N", help="do the I-th of N parts of the runs, e.g. in a Slurm array"
    )
    part.add_argument(
        "--start-only", action="store_true", help="pretrain for the study, and stop there"
    )
    part.add_argument(
        "--report", action="store_true", help="results and page of what is there; run nothing"
    )
    parser.add_argument(
        "--keep-checkpoints", action="store_true", help="keep the last one of each finished run"
    )
    parser.add_argument("--dry-run", action="store_true", help="check the study; list its runs")


def run(options: argparse.Namespace) -> None:
    """Do what the options say; exits with 1 if a run failed.

    Raises:
        ConfigError: the study, an option or a run in its folder does not fit.
        ValueError: bad results.
    """
    if options.study.suffix == ".json":
        _refuse_beside_results(options)
        show(read_results(options.study), options.study)
        return
    share = _share(options)
    study = read_study(options.study, options.overrides)
    if options.dry_run:
        _print_plan(study, share)
    elif options.report:
        _report(study)
    else:
        _pretrain(study, share)
        if not options.start_only:
            _run_share(study, share, options)


def _pretrain(study: Study, share: tuple[int, int]) -> None:
    """Make the checkpoint that all runs start from, unless it is there or given."""
    start = start_run(study)
    if start is None:
        return
    check_runs([start])
    if start.state == "finished":
        return
    if share != (1, 1):
        raise ConfigError(
            f"{start.folder} is not finished: all shares start from its checkpoint. Run the same "
            "command with --start-only in place of --share once, before the shares"
        )
    steps = study.config(study.reference).pretrain.steps
    tally = _do([start], steps, 1, len(processors()), keep=True)
    if tally.busy or not tally.all_well:
        sys.exit(_failures_text(tally))


def _run_share(study: Study, share: tuple[int, int], options: argparse.Namespace) -> None:
    runs = study_runs(study, start_checkpoint(study))
    check_runs(runs)
    mine = runs[share[0] - 1 :: share[1]]
    unfinished = [run for run in mine if run.state != "finished"]
    if len(unfinished) < len(mine):
        print(f"{len(mine) - len(unfinished)} of {len(mine)} runs are finished already")
    jobs = max(1, min(options.jobs, len(unfinished)))
    threads = options.threads or max(1, len(processors()) // jobs)
    if not options.keep_checkpoints:
        _remove_checkpoints(mine)
    steps = study.config(study.reference).rl.steps
    tally = _do(unfinished, steps, jobs, threads, keep=options.keep_checkpoints)
    if share == (1, 1) and any(run.state == "finished" for run in mine):
        _report(study)
    if not tally.all_well:
        sys.exit(_failures_text(tally))


def show(results: dict, path: Path) -> None:
    """Write the page of ``results`` beside ``path``, and print what it says."""
    # imported late: numpy
    from megatron_occ.compare.analysis import analyse
    from megatron_occ.compare.page import write_page
    from megatron_occ.compare.wording import conclusion, table

    comparison = analyse(results)
    page = write_page(comparison, path.with_suffix(".html"))
    print("\n".join([*table(comparison), "", *conclusion(comparison), "", f"page  {page}"]))


def _report(study: Study) -> None:
    start = start_checkpoint(study)
    results = collect(study, study_runs(study, start), str(start))
    if not results["runs"]:
        raise ConfigError(f"{study.folder} holds no run of this study yet: leave --report out")
    path = study.folder / RESULTS_FILE
    write_results(results, path)
    show(results, path)


def _refuse_beside_results(options: argparse.Namespace) -> None:
    given = [*options.overrides]
    given += [
        f"--{name.replace('_', '-')}"
        for name in ("share", "start_only", "dry_run")
        if getattr(options, name)
    ]
    if given:
        raise ConfigError(
            f"{options.study}: {' '.join(given)} goes with a study file: results alone run nothing"
        )


def _share(options: argparse.Namespace) -> tuple[int, int]:
    for name in ("jobs", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: must be 1 or more")
    if options.share is None:
        return 1, 1
    match = re.fullmatch(r"(\d+)/(\d+)", options.share)
    part, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part <= parts:
        raise ConfigError(f"--share {options.share}: must be I/N with I from 1 to N, e.g. 1/4")
    return part, parts


def _print_plan(study: Study, share: tuple[int, int]) -> None:
    start = start_run(study)
    checkpoint: Path | str = "(after pretraining)"
    if start is None or start.state == "finished":
        checkpoint = start_checkpoint(study)
    runs = study_runs(study, checkpoint)[share[0] - 1 :: share[1]]
    states = [run.state for run in runs]
    rows = {
        "folder": study.folder,
        "start": checkpoint,
        "arms": f"{', '.join(study.arms)}; compared with {study.reference}",
        "seeds": ", ".join(map(str, study.seeds)),
        "RL steps": study.config(study.reference).rl.steps,
        "runs": f"{len(runs)}: {states.count('finished')} finished, "
        f"{states.count('unfinished')} begun, {states.count('missing')} to begin",
    }
    print("\n".join(f"{name:<18} {value}" for name, value in rows.items()))


def _do(runs: Sequence[RunSpec], steps: int, jobs: int, threads: int, *, keep: bool) -> Tally:
    """Do runs, ``jobs`` at once with ``threads`` CPU threads each, showing how far they are.

    Without ``keep`` the checkpoints of a run go when it is finished.
    """

    def start(run: RunSpec, slot: int) -> RunProcess:
        return RunProcess(run, run_environment(slot, threads, os.environ))

    with terminated_as_interrupted(), closing(Live(len(runs), steps)) as live:

        def on_change(tally: Tally, ended: RunSpec | None) -> None:
            live(tally, ended)
            if ended is not None and not keep:
                _remove_checkpoints([ended])

        tally = work_off(runs, jobs, start, on_change)
    for run in tally.busy:
        print(f"{run.title}: another process is doing it, left to that", file=sys.stderr)
    return tally


def _failures_text(tally: Tally) -> str:
    lines = ["megatron-occ: error: not all runs ended well"]
    for failure in tally.failed:
        lines.append(f"{failure.run.title} failed with exit status {failure.code}:")
        lines += [f"    {line}" for line in failure.last_lines]
        lines.append(f"    all of it: {failure.run.log}")
    if tally.not_tried:
        lines.append(f"none succeeded; not started: {counted(len(tally.not_tried), 'run')}")
    lines.append("the same command tries them again; finished runs are kept")
    return "\n".join(lines)


def _remove_checkpoints(runs: Sequence[RunSpec]) -> None:
    for run in runs:
        if run.state == "finished":
            shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, and SIGUSR1 of Slurm's scripts near the time limit, end the runs as Ctrl-C does."""

    def interrupt(_: signal.Signals) -> None:
        raise KeyboardInterrupt("the same command goes on")

    with handled(interrupt):
        yield
