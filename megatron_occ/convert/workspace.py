"""A folder that appears under its name when it is complete, and can be continued until then."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from megatron_occ.convert.errors import FolderError

_PLAN = "plan.json"


class Workspace:
    """Where a folder is made.

    Args:
        target: the folder's final name.
        plan: what is made, JSON-ready: another one starts over.
        force: replace a folder of that name.

    Attributes:
        folder: to write into.

    Raises:
        FolderError: the target is there.
    """

    def __init__(self, target: Path, plan: Any, *, force: bool) -> None:
        self.target = target
        if target.exists() and not force:
            raise FolderError(f"{target} is there already: name another folder, or give --force")
        self.folder = target.with_name(f"{target.name}.partial")
        digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
        file = self.folder / _PLAN
        # files of an interrupted call with the same plan stay
        if not file.is_file() or file.read_text() != digest:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            file.write_text(digest)

    def publish(self) -> None:
        """Give the folder its name."""
        (self.folder / _PLAN).unlink()
        if self.target.exists():
            old = self.target.with_name(f"{self.target.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            self.target.rename(old)
            self.folder.rename(self.target)
            shutil.rmtree(old)
        else:
            self.folder.rename(self.target)
