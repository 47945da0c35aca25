"""Evaluation of checkpoints, and of the policy at the end of RL: figures, page and responses."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_occ.config.evaluation import EvalSettings, eval_settings, set_title
from megatron_occ.data.prompt_stream import PromptStream
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import load_weights
from megatron_occ.observe.evaluation import FORMAT, EvaluationFolder, titles
from megatron_occ.phases.inputs import Inputs
from megatron_occ.phases.sampling import first_of, sampler_for, sampling
from megatron_occ.phases.start import check_checkpoint
from megatron_occ.rl.assessment import assess
from megatron_occ.rl.drafts import draft_metrics
from megatron_occ.rl.evaluation import set_seed
from megatron_occ.rl.pass_rates import Figure, mean_over_sets
from megatron_occ.rl.sampler import Sampler
from megatron_occ.rollout import DraftStatistics
from megatron_occ.run import Run

Sets = Mapping[str, PromptStream]


def evaluate_checkpoints(
    run: Run, inputs: Inputs, checkpoints: Sequence[Path], folder: Path
) -> str:
    """Evaluate the weights of checkpoints on all sets; called by all ranks.

    Args:
        run: its section ``eval`` says how.
        inputs: held-out problems.
        checkpoints: of the run's model, a row of the table each.
        folder: takes table, page and responses.

    Returns:
        The table and the paths, for the terminal; "" but on the main rank.

    Raises:
        ValueError: a checkpoint is damaged or of another model, a prompt does not fit, or the
            verifier of every response to a set failed.
    """
    config = run.config
    for checkpoint in checkpoints:
        check_checkpoint(run, checkpoint)
    actor = MegatronGPTActor(
        config,
        run.tokenizer.vocab_size,
        run.layout,
        optimizer=config.rl.optimizer,
        total_updates=1,
        draws=False,
    )
    settings = eval_settings(config)
    output, rows = None, []
    for checkpoint, title in zip(checkpoints, titles(list(checkpoints)), strict=True):
        load_weights(checkpoint, actor, run.describe({}))
        output = output or EvaluationFolder(folder, is_main=run.layout.is_main)
        # an engine for each: servers tell weights apart by the number of updates behind them
        with sampling(run, actor, first_of(inputs.held_out)) as sampler:
            chosen = sampler_for(settings, run, sampler)
            row = _row(run, chosen, inputs.held_out, settings, output, title)
        rows.append({"name": title, "checkpoint": str(checkpoint), **row})
    assert output is not None, "the command asks for a checkpoint"
    return output.finish(_results(run, inputs.held_out, settings, rows))


def evaluate_policy(run: Run, sampler: Sampler, held_out: Sets, step: int) -> str:
    """Evaluate the policy of a sampler at the end of RL; called by all ranks.

    Args:
        run: its folder takes table, page and responses.
        sampler: of RL.
        held_out: held-out problems.
        step: of RL.

    Returns:
        As :func:`evaluate_checkpoints`.
    """
    settings = eval_settings(run.config)
    checkpoint = run.checkpoints("rl") / f"step_{step:06d}"
    (title,) = titles([checkpoint])
    output = EvaluationFolder(default_folder(run.folder, [checkpoint]), is_main=run.layout.is_main)
    row = _row(run, sampler_for(settings, run, sampler), held_out, settings, output, title)
    rows = [{"name": title, "checkpoint": str(checkpoint), **row}]
    return output.finish(_results(run, held_out, settings, rows))


def default_folder(run_dir: Path, checkpoints: Sequence[Path]) -> Path:
    """Where an evaluation goes: ``eval/PHASE_STEP`` in the run's folder, by first and last."""
    names = [f"{path.absolute().parent.name}_{path.name}" for path in checkpoints]
    ends = names if len(names) == 1 else [names[0], names[-1]]
    return run_dir / "eval" / "_to_".join(ends)


def _row(
    run: Run,
    sampler: Sampler,
    held_out: Sets,
    settings: EvalSettings,
    output: EvaluationFolder,
    title: str,
) -> dict[str, Any]:
    """What a checkpoint's line of the table says."""
    figures: dict[str, dict[str, Figure]] = {}
    notes: dict[str, list[str]] = {}
    drafts = DraftStatistics()
    for name, stream in held_out.items():
        called = set_title(run.config, name)
        _say(run, f"{title}: {called}")
        found = assess(
            sampler,
            stream,
            settings,
            set_seed(run.config.seed, name),
            lambda entry, called=called: output.write(title, called, entry),
        )
        figures[called] = found.figures
        drafts.add(found.drafts)
        if found.notes:
            notes[called] = found.notes
    of_drafts = draft_metrics(drafts, run.layout)
    return {
        "sets": {name: _plain(each) for name, each in figures.items()},
        "average": _plain(_average(list(figures.values()))),
        # without drafts there is nothing to tell
        "drafts": of_drafts if len(of_drafts) > 1 else {},
        "notes": notes,
    }


def _average(sets: list[dict[str, Figure]]) -> dict[str, Figure]:
    """Means over sets of the figures that all of them have."""
    common = [name for name in sets[0] if all(name in figures for figures in sets)]
    return {name: mean_over_sets([figures[name] for figures in sets]) for name in common}


def _plain(figures: dict[str, Figure]) -> dict[str, dict[str, float | None]]:
    return {name: figure._asdict() for name, figure in figures.items()}


def _results(
    run: Run, held_out: Sets, settings: EvalSettings, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Content of ``results.json``."""
    kept = ("samples", "temperature", "top_p", "top_k", "max_response_length")
    return {
        "format": FORMAT,
        "settings": {name: getattr(settings, name) for name in kept},
        "seed": run.config.seed,
        "sets": [_set(run, name, stream, settings) for name, stream in held_out.items()],
        "rows": rows,
    }


def _set(run: Run, name: str, stream: PromptStream, settings: EvalSettings) -> dict[str, Any]:
    size = stream.size
    count = min(size or settings.problems, settings.problems or size)
    source = stream.files[0].path if stream.files else f"the task {run.config.data.task.name}"
    return {"name": set_title(run.config, name), "problems": count, "source": source}


def _say(run: Run, text: str) -> None:
    if run.layout.is_main:
        print(text, file=sys.stderr, flush=True)
