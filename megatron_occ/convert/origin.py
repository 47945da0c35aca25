"""The Hugging Face folder that a checkpoint's weights once came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_occ.config import ConfigError, load_config
from megatron_occ.config.schema import Config
from megatron_occ.convert.importing import SIDE_FOLDER
from megatron_occ.convert.tokenizer_files import has_tokenizer
from megatron_occ.data.tokenizers import HFTokenizer


def origin_of(checkpoint: Path, tokenizer: dict[str, Any] | None) -> Path | None:
    """What lay beside the weights when they were imported: ``config.json``, tokenizer files.

    It is in the checkpoint if that is a converted one, in the folder of its run if that started
    from ``model.from_hf``, or where ``rl.init_from`` of the run leads.

    Args:
        checkpoint: folder, of a run ``RUN/checkpoints/PHASE/step_N``.
        tokenizer: identity in its ``meta.json``; None: any will do.

    Returns:
        None where nothing is known of such a folder, it is gone, or the checkpoint was trained
        with another tokenizer than that of the folder.
    """
    own = checkpoint / SIDE_FOLDER
    if own.is_dir():
        return own
    found = _nearest(checkpoint)
    return found if found is not None and _has_tokenizer(found, tokenizer) else None


def _nearest(checkpoint: Path) -> Path | None:
    """The folder that the run started from, or the run whose checkpoint it started from."""
    seen: set[Path] = set()
    here: Path | None = checkpoint.resolve()
    while here is not None and here not in seen:
        seen.add(here)
        run = here.parents[2] if len(here.parents) > 2 else here
        for folder in (here / SIDE_FOLDER, run / "from_hf" / SIDE_FOLDER):
            if (folder / "config.json").is_file():
                return folder
        here = _started_from(run)
    return None


def _has_tokenizer(folder: Path, state: dict[str, Any] | None) -> bool:
    if state is None:
        return True
    if state["kind"] == "char":
        # written anew on the way out, where it takes no other's place
        return not has_tokenizer(folder)
    if not has_tokenizer(folder):
        return False
    try:
        return HFTokenizer(folder).state() == state
    except ValueError:
        return False


def _started_from(run: Path) -> Path | None:
    config = _config_of(run)
    if config is None or config.rl.init_from is None:
        return None
    return Path(config.rl.init_from).resolve()


def _config_of(run: Path) -> Config | None:
    """Configuration of a run; None: none is there, or not one of this version."""
    file = run / "config.yaml"
    if not file.is_file():
        return None
    try:
        return load_config([file], [])
    except ConfigError:
        return None
