"""What an evaluation leaves behind: ``responses.jsonl``, ``results.json``, a page, and a table."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_occ.observe.evaluation_page import PAGE_FILE, RESPONSES_FILE, write_pages
from megatron_occ.observe.evaluation_table import table_text
from megatron_occ.observe.jsonl import JsonlFile, json_safe

RESULTS_FILE = "results.json"
FORMAT = 1
_STEP = re.compile(r"step_0*(\d+)")


class EvaluationFolder:
    """The folder of an evaluation. On ranks other than the main one every method does nothing.

    What was there before is replaced when the evaluation is done; until then its responses are in
    ``responses.jsonl.tmp``.

    Args:
        path: of it; made, with folders above it, if need be.
        is_main: whether this rank writes.
    """

    def __init__(self, path: Path, *, is_main: bool) -> None:
        self.path, self._is_main = path, is_main
        self._temporary = path / f"{RESPONSES_FILE}.tmp"
        self._file = JsonlFile(self._temporary)
        if is_main:
            path.mkdir(parents=True, exist_ok=True)
            self._temporary.write_bytes(b"")

    def write(self, checkpoint: str, name: str, entry: Mapping[str, Any]) -> None:
        """A line for each response to a problem.

        Args:
            checkpoint: its title.
            name: of the set.
            entry: the problem, with ``responses``.
        """
        if not self._is_main:
            return
        problem = {key: value for key, value in entry.items() if key not in _OF_THE_WHOLE}
        for response in entry["responses"]:
            self._file.append({"checkpoint": checkpoint, "set": name, **problem, **response})

    def finish(self, results: dict[str, Any]) -> str:
        """Put everything in its place; return the table and the paths, for the terminal."""
        if not self._is_main:
            return ""
        self._file.close()
        os.replace(self._temporary, self.path / RESPONSES_FILE)
        text = json.dumps(json_safe(results), indent=1, allow_nan=False)
        (self.path / RESULTS_FILE).write_text(text + "\n", encoding="utf-8")
        write_pages(self.path, results)
        names = ("page", PAGE_FILE), ("figures", RESULTS_FILE), ("responses", RESPONSES_FILE)
        paths = [f"{label:<9}  {self.path / name}" for label, name in names]
        return "\n".join([table_text(results), "", *paths])


# tells why there are no votes, which is a note of the set
_OF_THE_WHOLE = ("responses", "votes_problem")


def checkpoint_title(path: Path) -> str:
    """What a checkpoint is called: "RUN rl 40" of ``RUN/checkpoints/rl/step_000040``."""
    step = _STEP.fullmatch(path.name)
    parents = path.absolute().parents
    if step and len(parents) > 3 and parents[1].name == "checkpoints":
        return f"{parents[2].name} {parents[0].name} {step[1]}"
    return f"{parents[0].name} {path.name}" if parents[0].name else path.name


def titles(paths: list[Path]) -> list[str]:
    """Titles of checkpoints; where two are alike the paths themselves."""
    found = [checkpoint_title(path) for path in paths]
    return found if len(set(found)) == len(found) else [str(path) for path in paths]
