"""Which files of prompts a run was started with, so that a resumed one goes on with the same."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from megatron_occ.phases.inputs import Inputs

if TYPE_CHECKING:
    from megatron_occ.run import Run

PROMPTS_FILE = "prompts.json"


def check_same_files(run: Run, inputs: Inputs) -> None:
    """On a resumed run: refuse prompts of other content than those it was started with.

    Raises:
        ValueError: see above, with the file.
    """
    kept = run.folder / PROMPTS_FILE
    if not run.resume or not kept.is_file():
        return
    before = json.loads(kept.read_text())
    for key, files in _fingerprints(inputs).items():
        for path, fingerprint in files.items():
            if before.get(key, {}).get(path, fingerprint) != fingerprint:
                raise ValueError(
                    f"data.{key}: {path} has changed since the run was started: steps done and to "
                    "come would be of other prompts. Put the old file back, or start another run"
                )


def keep_fingerprints(run: Run, inputs: Inputs) -> None:
    """Write down which files a run reads, for :func:`check_same_files`."""
    if run.layout.is_main:
        (run.folder / PROMPTS_FILE).write_text(json.dumps(_fingerprints(inputs), indent=1))


def _fingerprints(inputs: Inputs) -> dict[str, dict[str, str]]:
    groups = {"prompts": inputs.training(), "validation_prompts": inputs.held_out.values()}
    return {
        key: {file.path: file.fingerprint for stream in streams for file in stream.files}
        for key, streams in groups.items()
        if streams
    }
