"""The run around a command's work: started, shut down, its errors told as users know them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_occ.commands.configuration import check_packages, check_run_folder
from megatron_occ.config import Config

if TYPE_CHECKING:
    from megatron_occ.run import Run


@contextmanager
def running(config: Config, *, resume: bool = False) -> Iterator[Run]:
    """A run of a checked configuration; its process groups end with the block.

    Raises:
        ValueError: also for what rollout servers can't do.
    """
    # imported late: these bring torch and Megatron-Core
    from megatron_occ.mcore.startup import shutdown
    from megatron_occ.rollout import EngineError
    from megatron_occ.run import Run

    run = Run(config, resume=resume)
    try:
        yield run
    except EngineError as error:
        # the kind that is told without a traceback, and known without torch
        raise ValueError(str(error)) from error
    finally:
        shutdown()


@contextmanager
def training(config: Config, *, resume: bool) -> Iterator[Run]:
    """:func:`running` for a command that writes the run folder; Ctrl-C tells how to go on.

    Raises:
        ConfigError: the run folder is another's, or there is none to resume.
    """
    check_run_folder(Path(config.run_dir), resume)
    check_packages(config)
    with running(config, resume=resume) as run:
        try:
            yield run
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(_how_to_go_on(run)) from interrupt


def _how_to_go_on(run: Run) -> str:
    """What --resume makes of an interrupted run."""
    newest = run.latest("rl") or run.latest("pretrain")
    if newest is not None:
        return f"the same command with --resume goes on from {newest}"
    if run.folder.is_dir():
        return "it has no checkpoint yet: the same command with --resume begins anew"
    return "nothing was written yet"
