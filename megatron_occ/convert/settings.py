"""Our configuration from a Hugging Face folder, for ``model.from_hf``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_occ.config.keys import leaves
from megatron_occ.convert.errors import FolderError
from megatron_occ.convert.families import family_of
from megatron_occ.convert.plan import MTPChoice
from megatron_occ.convert.source import read_json
from megatron_occ.convert.tokenizer_files import has_tokenizer


def folder_settings(folder: Path) -> dict[str, Any]:
    """Values of our configuration by dotted key, from ``config.json`` and the files beside it.

    Raises:
        FolderError: a model that can't be converted.
    """
    file = folder / "config.json"
    content = read_json(file)
    try:
        settings = family_of(content).settings(content)
    except ValueError as error:
        raise FolderError(f"{file}: {error}") from None
    # what the family does not speak of it does not have
    values = {
        key: leaf.default()
        for key, leaf in leaves().items()
        if key.startswith("model.") and key != "model.from_hf"
    }
    values |= {f"model.{key}": value for key, value in settings.items()}
    values["mtp.num_layers"] = folder_depths(folder)
    if has_tokenizer(folder):
        values |= {"tokenizer.kind": "hf", "tokenizer.path": str(folder)}
    return values


def folder_depths(folder: Path) -> int:
    """MTP depths that ``config.json`` states."""
    content = read_json(folder / "config.json")
    key = family_of(content).depths_key
    return (content.get(key) or 0) if key is not None else 0


def choice_for(folder: Path, depths: int) -> MTPChoice:
    """What becomes of the MTP layers if there are to be ``depths``.

    Raises:
        FolderError: fewer than there are, but some.
    """
    there = folder_depths(folder)
    if depths == there:
        return MTPChoice("keep")
    if depths == 0:
        return MTPChoice("drop")
    if depths < there:
        raise FolderError(
            f"mtp.num_layers={depths}: {folder} has {there} MTP layers. Give {there}, more (copies "
            "of the last one), or 0 (none)"
        )
    return MTPChoice("expand" if there else "init", depths)
