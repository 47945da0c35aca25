"""What phases start from: data and weights, checked before the run folder is touched."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_occ.convert.importing import import_folder
from megatron_occ.convert.plan import plan_import
from megatron_occ.convert.settings import choice_for
from megatron_occ.convert.source import Source
from megatron_occ.data.from_config import read_stops
from megatron_occ.mcore.checkpoint import check_weights
from megatron_occ.mcore.main_rank import MainRank
from megatron_occ.mcore.versions import installed_version
from megatron_occ.phases.inputs import Inputs, check_lengths, read_inputs
from megatron_occ.run import Run


def checked_inputs(
    run: Run,
    *,
    pretrains: bool = False,
    trains: bool = False,
    validates: bool = False,
    evaluates: bool = False,
) -> Inputs:
    """Read and check what a command needs; called by all ranks.

    Args:
        run: the folder, the tokenizer and the task.
        pretrains: the command pretrains, unless a resumed run is past it.
        trains: it samples training prompts.
        validates: it samples held-out ones, as ``rl.validation`` says.
        evaluates: it samples held-out ones, as ``eval`` says.

    Raises:
        ValueError: bad data (see ``read_inputs`` and ``check_lengths``).
    """
    config = run.config
    inputs = read_inputs(
        config,
        run.task,
        run.tokenizer,
        pretrains=pretrains and config.pretrain.steps > 0 and not run.is_in_rl,
        trains=trains,
        validates=validates,
        evaluates=evaluates,
    )
    # by one rank: a long file takes a while, and several cores
    MainRank().run(lambda: check_lengths(config, inputs, run.tokenizer))
    stops = read_stops(config, run.task, run.tokenizer)
    samples = trains or validates or evaluates
    notes = [*inputs.notes, *([f"responses end at {stops}"] if samples else [])]
    if run.layout.is_main:
        for note in notes:
            print(note, file=sys.stderr, flush=True)
    return inputs


def check_checkpoint(run: Run, checkpoint: Path) -> None:
    """Compare what a checkpoint holds with the run's model; reads no tensor.

    Raises:
        ValueError: it is not complete, or of another model.
    """
    check_weights(checkpoint, run.describe({}))


def check_source(run: Run) -> None:
    """Account for every tensor of ``model.from_hf``, if there is one; called by all ranks.

    Raises:
        ValueError: the folder can't be converted.
    """
    if run.config.model.from_hf is None:
        return
    folder = Path(run.config.model.from_hf)

    def check() -> None:
        plan_import(Source(folder), choice_for(folder, run.config.mtp.num_layers), None)

    MainRank().run(check)


def converted(run: Run) -> Path:
    """Checkpoint of the weights in ``model.from_hf``, in the run's folder; called by all ranks.

    Raises:
        ValueError: the folder can't be converted.
    """
    config, target = run.config, run.folder / "from_hf"
    assert config.model.from_hf is not None, "there is nothing to convert"
    folder = Path(config.model.from_hf)

    def convert() -> None:
        if not target.exists():
            mtp = choice_for(folder, config.mtp.num_layers)
            import_folder(folder, target, mtp=mtp, megatron_core=installed_version())

    MainRank().run(convert)
    return target
