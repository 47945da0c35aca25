"""A folder that is not of the kind asked for: what it is instead; imports no torch."""

from __future__ import annotations

from pathlib import Path

MODEL_FILE, CHECKPOINT_FILE = "config.json", "meta.json"


def what_it_is(folder: Path, *, usual: str, other: str = "") -> str:
    """Why a folder is not what was asked for, and what to name instead.

    Args:
        folder: without the file that tells the kind asked for.
        usual: advice where nothing is known of it.
        other: advice where it is of the other kind: a Hugging Face folder in place of a checkpoint,
            or a checkpoint in place of a Hugging Face folder.
    """
    if not folder.exists():
        return f"there is no such folder. {usual}"
    if not folder.is_dir():
        return f"it is a file. {usual}"
    if (folder / MODEL_FILE).is_file():
        return f"it is a Hugging Face folder. {other}"
    if (folder / CHECKPOINT_FILE).is_file():
        return f"it is a checkpoint of this project. {other}"
    checkpoints = _checkpoints(folder)
    if checkpoints:
        return f"it is a folder of a run, with checkpoints such as {checkpoints[-1]}"
    return f"it has no {MODEL_FILE} and no {CHECKPOINT_FILE}. {usual}"


def _checkpoints(folder: Path) -> list[Path]:
    """Of a run folder, or of its folder ``checkpoints`` or a phase's; the newest of RL last."""
    found = [path for levels in ("", "*/", "*/*/") for path in folder.glob(f"{levels}step_*")]
    # one that was being written, whose name ends in .tmp, may have the file already
    whole = [path for path in found if path.suffix != ".tmp" and (path / CHECKPOINT_FILE).is_file()]
    return sorted(whole)
