"""How many MTP layers a folder has, and how many there shall be."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_occ.config.schema import Config
from megatron_occ.config.words import counted
from megatron_occ.convert.errors import FolderError
from megatron_occ.convert.source import Source
from megatron_occ.convert.table import Family


@dataclass(frozen=True)
class MTPChoice:
    """What becomes of the MTP layers.

    Args:
        kind: ``keep``, ``drop``, ``init`` (there are none: add fresh ones) or ``expand`` (add
            copies of the last depth).
        depths: K afterwards, with ``init`` and ``expand``.
    """

    kind: str
    depths: int = 0

    @classmethod
    def parse(cls, text: str) -> MTPChoice:
        """From ``keep``, ``drop``, ``init:K`` or ``expand:K``.

        Raises:
            ValueError: anything else.
        """
        kind, _, number = text.partition(":")
        if kind in ("keep", "drop") and not number:
            return cls(kind)
        if kind in ("init", "expand") and number.isdigit() and int(number) > 0:
            return cls(kind, int(number))
        raise ValueError(f"--mtp {text}: is none of keep, drop, init:K, expand:K (K at least 1)")


def source_depths(source: Source, family: Family, config: Config, mtp: MTPChoice) -> int:
    """MTP depths that the folder has tensors of; ``config.json`` has to agree.

    But where none are left and none are wanted: a model that transformers has saved keeps the
    number and loses the tensors.

    Raises:
        FolderError: names entry, number and the first tensor that is missing or too many.
    """
    said, layers, found = config.mtp.num_layers, config.model.num_layers, 0
    while below(source, mtp_prefix(family, layers, found)):
        found += 1
    if said == found or (found == 0 and mtp.kind in ("drop", "init")):
        return found
    prefix = mtp_prefix(family, layers, min(said, found))
    remedy = "Correct the entry, or get the whole checkpoint"
    if found == 0:
        remedy = (
            "transformers leaves them behind when it saves a model. Get the whole checkpoint, or "
            "give --mtp drop (in a run mtp.num_layers=0), or --mtp init:K for fresh ones"
        )
    raise FolderError(
        f"{source.folder / 'config.json'}: {family.depths_key}={said}, but there are tensors of "
        f"{counted(found, 'MTP layer')} ({prefix}* and so on). {remedy}"
    )


def wanted_depths(mtp: MTPChoice, found: int, family: Family) -> int:
    """K afterwards.

    Args:
        mtp: what was asked for.
        found: depths of the folder.
        family: of the folder.

    Raises:
        FolderError: the choice does not fit the depths that are there.
    """
    if mtp.kind == "keep":
        return found
    if mtp.kind == "drop":
        return 0
    if mtp.kind == "init" and found:
        raise FolderError(
            f"--mtp init:{mtp.depths}: {family.architecture} brings {counted(found, 'MTP layer')}. "
            f"Use keep, or expand:{found + mtp.depths} to add copies of the last one"
        )
    if mtp.kind == "expand" and found == 0:
        raise FolderError(
            f"--mtp expand:{mtp.depths}: there is no MTP layer to copy. Use init:{mtp.depths}"
        )
    if mtp.kind == "expand" and mtp.depths <= found:
        raise FolderError(
            f"--mtp expand:{mtp.depths}: it has {counted(found, 'MTP layer')} already. Give a "
            "larger number"
        )
    return mtp.depths


def mtp_prefix(family: Family, layers: int, depth: int) -> str:
    """Beginning of the names of a depth's tensors, ``depth`` from 0."""
    return family.mtp_prefix.format(n=layers + depth, k=depth)


def below(source: Source, prefix: str) -> list[str]:
    """Names of the tensors that begin so."""
    return [name for name in source.entries if name.startswith(prefix)]
