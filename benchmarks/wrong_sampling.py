"""Which correction mends sampling that is made wrong on purpose: studies of ``compare``.

    python -m benchmarks.wrong_sampling KIND FOLDER [--jobs N] [--init CHECKPOINT] [key=value ...]
    python -m benchmarks.wrong_sampling --table FOLDER [FOLDER ...]

The arms of ``conf/compare/corrections.yaml`` run over an engine that samples training responses as
KIND says. Validation is right: its temperature differs a little, by which the engine knows it.

    right   as ever
    hot     at 1.05 times the temperature of training
    bf16    by the same weights in bf16
    stale   by the weights of two steps ago

``--table`` prints Markdown: final pass@1 of each arm with paired differences to the same arm under
right sampling (their mean, and the lowest and highest seed), and what the exact calibration
measured. FOLDERs are named after their kinds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_occ import cli
from megatron_occ.compare.analysis import MAIN, analyse
from megatron_occ.compare.results import read_results
from megatron_occ.compare.runs import RunSpec
from megatron_occ.compare.statistics import standard_error
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.inference.engine import MegatronEngine, speculation_from
from megatron_occ.observe.run_data import load_run
from megatron_occ.phases import sampling
from megatron_occ.rollout import Generation, Request, SamplingSettings

STUDY = Path(__file__).resolve().parent.parent / "conf" / "compare" / "corrections.yaml"
HOT, LAG = 1.05, 2
KIND = "WRONG_SAMPLING"
MEASURED = ("exact/c_same_1", "exact/c_cross_1", "exact/norm_squared_1", "exact/rl_signal")


class WrongEngine:
    """An engine that samples training responses otherwise than it is asked to.

    Args:
        engine: the run's own.
        actor: the policy.
        temperature: of training responses.
    """

    def __init__(self, engine: MegatronEngine, actor: MegatronGPTActor, temperature: float) -> None:
        self.engine, self.actor, self.temperature = engine, actor, temperature

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def generate(self, requests: Sequence[Request], settings: SamplingSettings) -> Generation:
        """Wrong where training asks."""
        if settings.temperature != self.temperature:
            return self.engine.generate(requests, settings)
        return self.wrong(requests, settings)

    def wrong(self, requests: Sequence[Request], settings: SamplingSettings) -> Generation:
        """Here it is right."""
        return self.engine.generate(requests, settings)


class HotEngine(WrongEngine):
    """At another temperature; its log-probs are those of what it samples from."""

    def wrong(self, requests: Sequence[Request], settings: SamplingSettings) -> Generation:
        """See the class."""
        hot = replace(settings, temperature=HOT * settings.temperature)
        return self.engine.generate(requests, hot)


class NarrowEngine(WrongEngine):
    """By a model of its own in bf16, which gets the weights each time."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        config = deepcopy(self.actor.config)
        config.precision = "bf16"
        self.model = MegatronGPTActor(
            config,
            self.actor.chunks[0].valid_vocab_size,
            self.actor.layout,
            optimizer=config.rl.optimizer,
            total_updates=1,
        )
        self.other = MegatronEngine(
            self.model.inference_chunks,
            self.actor.layout,
            slots=config.rl.rollout.batch_size,
            speculation=speculation_from(config),
        )

    def wrong(self, requests: Sequence[Request], settings: SamplingSettings) -> Generation:
        """See the class."""
        for mine, theirs in zip(self.model.chunks, self.actor.chunks, strict=True):
            pairs = zip(mine.parameters(), theirs.parameters(), strict=True)
            for parameter, value in pairs:
                parameter.data.copy_(value.data)
        return self.other.generate(requests, settings)


class StaleEngine(WrongEngine):
    """By the weights that the policy had some steps ago."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.history: list[list[torch.Tensor]] = []

    def wrong(self, requests: Sequence[Request], settings: SamplingSettings) -> Generation:
        """See the class."""
        parameters = [p.data for chunk in self.actor.chunks for p in chunk.parameters()]
        self.history = [*self.history, [p.clone() for p in parameters]][-LAG - 1 :]
        for parameter, old in zip(parameters, self.history[0], strict=True):
            parameter.copy_(old)
        try:
            return self.engine.generate(requests, settings)
        finally:
            for parameter, present in zip(parameters, self.history[-1], strict=True):
                parameter.copy_(present)


ENGINES = {"right": WrongEngine, "hot": HotEngine, "bf16": NarrowEngine, "stale": StaleEngine}


@contextmanager
def wrong_engines(kind: str) -> Any:
    """Runs of this process sample as ``kind`` says."""
    build = sampling.build_engine

    def built(config: Any, actor: MegatronGPTActor, *rest: Any) -> WrongEngine:
        engine = build(config, actor, *rest)
        return ENGINES[kind](engine, actor, config.rl.rollout.temperature)

    with mock.patch.object(sampling, "build_engine", built):
        yield


def main() -> None:
    """A study, its table, or, as a process of a study, one of its runs."""
    if KIND in os.environ:
        with wrong_engines(os.environ[KIND]):
            cli.main(sys.argv[1:])
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--jobs", default="1")
    parser.add_argument("--init", metavar="CHECKPOINT")
    parser.add_argument("words", nargs="*", metavar="KIND FOLDER key=value")
    options = parser.parse_args()
    if options.table:
        print_table(options.table)
        return
    kind, folder, *rest = options.words
    if kind not in ENGINES:
        parser.error(f"KIND={kind}: give one of {', '.join(ENGINES)}")
    words = [f"folder={folder}", *rest, "--jobs", options.jobs, "--threads", "1"]
    words += [f"rl.init_from={options.init}"] if options.init else []
    os.environ[KIND] = kind
    with mock.patch.object(RunSpec, "words", _as_process(RunSpec.words)):
        cli.main(["compare", str(STUDY), *words])


def _as_process(words: Callable[[RunSpec], list[str]]) -> Callable[[RunSpec], list[str]]:
    def changed(run: RunSpec) -> list[str]:
        return [__spec__.name if word == "megatron_occ" else word for word in words(run)]

    return changed


def print_table(folders: Sequence[Path]) -> None:
    """Print Markdown."""
    studies = {folder.name: analyse(read_results(folder / "results.json")) for folder in folders}
    right = studies.get("right")
    heads = ["sampling", "correction", "final pass@1", "- right (of the seeds)", *MEASURED]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for folder in folders:
        study = studies[folder.name]
        for arm in study.arms:
            own, other = (each.arms[arm].values[MAIN] for each in (study, right or study))
            values, cells = list(own.values()), [folder.name, arm]
            cells.append(
                f"{100 * statistics.fmean(values):.1f} ± {100 * standard_error(values):.1f} %"
            )
            gaps = [own[seed] - other[seed] for seed in own if seed in other]
            low, high = 100 * min(gaps), 100 * max(gaps)
            cells.append(f"{100 * statistics.fmean(gaps):+.1f} ({low:+.1f} to {high:+.1f})")
            cells += [_measured(folder, arm, name) for name in MEASURED]
            print(f"| {' | '.join(cells)} |")


def _measured(folder: Path, arm: str, name: str) -> str:
    """Mean over steps and seeds, and the standard error of the seeds' means."""
    means = []
    for run in sorted((folder / "runs" / arm).glob("seed_*")):
        values = [value for _, value in load_run(run).points("rl", name)]
        means += [statistics.fmean(values)] if values else []
    return f"{statistics.fmean(means):.2g} ± {standard_error(means):.1g}" if means else ""


if __name__ == "__main__":
    main()
