"""Weights on a shared disk: a folder under its final name is complete."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_occ.rollout.engine import EngineError

OURS = re.compile(r"version-\d+(\.partial)?")


def publish(export: Callable[[Path], None], root: Path, version: int) -> Path:
    """Write ``version-N`` below ``root``, under another name until it is complete.

    A folder that an earlier run left under this name is replaced.

    Args:
        export: writes a Hugging Face folder (``config.json`` and safetensors) of trunk and head.

    Returns:
        The folder.

    Raises:
        EngineError: the export failed or left no configuration or no weights.
    """
    # vLLM's workers import this package where nothing that reads a configuration is installed
    from megatron_occ.config.machine import flush

    final, partial = root / f"version-{version}", root / f"version-{version}.partial"
    try:
        for folder in (final, partial):
            if folder.exists():
                shutil.rmtree(folder)
        partial.mkdir(parents=True)
        export(partial)
        _check(partial)
        for path in partial.iterdir():
            flush(path)
        os.replace(partial, final)
        flush(root)
    except OSError as error:
        raise EngineError(f"weights of version {version} could not be written: {error}") from error
    return final


def drop_others(root: Path, keep: Path) -> None:
    """Delete the other versions below ``root``; other files and folders are left alone."""
    for folder in root.iterdir():
        ours = folder.is_dir() and not folder.is_symlink() and OURS.fullmatch(folder.name)
        if ours and folder != keep:
            shutil.rmtree(folder, ignore_errors=True)


def _check(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise EngineError(f"the export wrote no config.json to {folder}")
    weights = [path for path in folder.glob("*.safetensors") if path.stat().st_size]
    if not weights:
        raise EngineError(f"the export wrote no *.safetensors to {folder}")
