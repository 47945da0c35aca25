"""A folder that appears under its name when it is complete, and can be continued until then."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from megatron_occ.convert.errors import FolderError

# in the folder while it is made: the plan, which parts are done, a lock
NOTES = ".conversion"


class Workspace:
    """Where a folder is made.

    Args:
        source: what it is made of.
        target: the folder's final name.
        plan: what is made, JSON-ready: another one starts over.
        force: replace a folder of that name.

    Attributes:
        folder: to write into.

    Raises:
        FolderError: the target is there, lies in the source or the other way round, or another
            process is at work on it; something else has the name of the unfinished folder.
    """

    def __init__(self, source: Path, target: Path, plan: Any, *, force: bool) -> None:
        self.target = target
        here, there = source.resolve(), target.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise FolderError(f"{target}: is not apart from {source}. Name another folder")
        if target.exists() and not force:
            raise FolderError(f"{target} is there already: name another folder, or give --force")
        self.folder = target.with_name(f"{target.name}.partial")
        if self.folder.exists() and not (self.folder / NOTES).is_dir():
            raise FolderError(f"{self.folder}: is in the way, and not from here. Move it")
        (self.folder / NOTES).mkdir(parents=True, exist_ok=True)
        self._lock()
        digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
        file = self.folder / NOTES / "plan"
        # files of an interrupted call with the same plan stay
        if not file.is_file() or file.read_text() != digest:
            self._empty()
            file.write_text(digest)

    def publish(self) -> None:
        """Give the folder its name. Interrupted, the next call finds all parts done."""
        if self.target.exists():
            old = self.target.with_name(f"{self.target.name}.replaced-{os.getpid()}")
            self.target.rename(old)
            self.folder.rename(self.target)
            shutil.rmtree(old)
        else:
            self.folder.rename(self.target)
        shutil.rmtree(self.target / NOTES)

    def _lock(self) -> None:
        # the system lets go of it when the process ends, however it ends
        self._locked = (self.folder / NOTES / "lock").open("w")
        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FolderError(f"{self.folder}: another process is at work on it") from None

    def _empty(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir() and path.name != NOTES:
                shutil.rmtree(path)
            elif path.is_file():
                path.unlink()
        for path in (self.folder / NOTES).iterdir():
            if path.name != "lock":
                path.unlink()
