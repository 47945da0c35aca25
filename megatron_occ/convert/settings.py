"""Our configuration from a Hugging Face folder, for ``model.from_hf``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_occ.config.load import flat_values
from megatron_occ.config.words import counted
from megatron_occ.convert.errors import FolderError
from megatron_occ.convert.plan import MTPChoice, read_model
from megatron_occ.convert.source import read_config
from megatron_occ.convert.tokenizer_files import has_tokenizer

# The defaults are for small models from random weights; they would ruin a published one. 1e-6 is
# what DAPO (arXiv 2503.14476) and the OCC paper take for RL.
LEARNING_RATES = {"rl.optimizer.lr": 1e-6, "pretrain.optimizer.lr": 1e-5}


def folder_settings(folder: Path) -> dict[str, Any]:
    """Values of our configuration by dotted key, from ``config.json`` and the files beside it.

    All of section ``model``: what a family does not speak of it does not have. And learning rates
    that suit trained weights, which a configuration may overrule.

    Raises:
        FolderError: a model that can't be converted.
    """
    _, config = read_model(folder, read_config(folder))
    values = {
        key: value
        for key, value in flat_values(config).items()
        if (key.startswith("model.") and key != "model.from_hf") or key == "mtp.num_layers"
    }
    values |= LEARNING_RATES
    if has_tokenizer(folder):
        values |= {"tokenizer.kind": "hf", "tokenizer.path": str(folder)}
    return values


def choice_for(folder: Path, depths: int) -> MTPChoice:
    """What becomes of the MTP layers if there are to be ``depths``.

    Raises:
        FolderError: fewer than there are, but some.
    """
    _, config = read_model(folder, read_config(folder))
    there = config.mtp.num_layers
    if depths == there:
        return MTPChoice("keep")
    if depths == 0:
        return MTPChoice("drop")
    if depths < there:
        raise FolderError(
            f"mtp.num_layers={depths}: {folder} has {counted(there, 'MTP layer')}. Give {there}, "
            "more (copies of the last one), or 0 (none)"
        )
    return MTPChoice("expand" if there else "init", depths)
