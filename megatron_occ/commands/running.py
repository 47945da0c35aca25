"""The run around a command's work: started, shut down, its errors told as users know them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_occ.commands.configuration import check_packages, check_run_folder
from megatron_occ.commands.run_lock import locked
from megatron_occ.config import Config
from megatron_occ.rl.stopping import StopRequested, StopSignal, as_parent

if TYPE_CHECKING:
    from megatron_occ.run import Run

# exit status of a run that stopped as asked, with a checkpoint: "try again later" of sysexits.h
STOPPED = os.EX_TEMPFAIL


@contextmanager
def running(
    config: Config, *, resume: bool = False, stop: StopSignal | None = None
) -> Iterator[Run]:
    """A run of a checked configuration; its process groups end with the block.

    Raises:
        ValueError: also for what rollout servers can't do.
    """
    # imported late: these bring torch and Megatron-Core
    from megatron_occ.mcore.startup import shutdown
    from megatron_occ.rollout import EngineError
    from megatron_occ.run import Run

    run = Run(config, resume=resume, stop=stop or StopSignal())
    try:
        yield run
    except EngineError as error:
        # the kind that is told without a traceback, and known without torch
        raise ValueError(str(error)) from error
    finally:
        run.watchdog.close()
        shutdown()


@contextmanager
def training(config: Config, *, resume: bool) -> Iterator[Run]:
    """:func:`running` for a command that writes the run folder.

    No other process writes there meanwhile. Ctrl-C tells how to go on; SIGTERM and SIGUSR1 end the
    run after the update under way, with a checkpoint and exit status :data:`STOPPED`.

    Raises:
        ConfigError: the run folder is another's, or there is none to resume.
    """
    folder, is_main, stop = Path(config.run_dir), os.environ.get("RANK", "0") == "0", StopSignal()
    with locked(folder), as_parent(), stop.installed(tells=is_main):
        check_run_folder(folder, resume)
        check_packages(config)
        run = None
        try:
            with running(config, resume=resume, stop=stop) as run:
                yield run
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(_how_to_go_on(run)) from interrupt
        except OSError as error:
            raise ValueError(f"{error}: {_how_to_go_on(run)}") from error
        except StopRequested:
            if is_main:
                print(f"megatron-occ: stopped as asked: {_how_to_go_on(run)}", file=sys.stderr)
            sys.exit(STOPPED)


def _how_to_go_on(run: Run | None) -> str:
    """What --resume makes of an interrupted run."""
    newest = None if run is None else run.latest("rl") or run.latest("pretrain")
    if newest is not None:
        return f"the same command with --resume goes on from {newest}"
    if run is not None and (run.folder / "config.yaml").is_file():
        return "it has no checkpoint yet: the same command with --resume begins anew"
    return "nothing was written yet"
