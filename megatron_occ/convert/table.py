"""What a family's table consists of, and its expansion over the layers of one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_occ.config.schema_model import ModelConfig
from megatron_occ.convert.entries import Entries
from megatron_occ.convert.slots import Slot
from megatron_occ.convert.transforms import RENAME, Transform


@dataclass(frozen=True)
class Rule:
    """One line of a table: a parameter of Megatron-Core's and the tensors that it is made of.

    A rule for a parameter that a model does not have (a bias, an output layer) does nothing there.

    Args:
        ours: parameter; ``{e}`` is the number of an expert.
        theirs: name or names in the Hugging Face checkpoint, in the transform's order.
        transform: between them.
    """

    ours: str
    theirs: str | tuple[str, ...]
    transform: Transform = RENAME

    @property
    def names(self) -> tuple[str, ...]:
        """``theirs`` as a tuple."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    Prefixes are filled with ``n``, the number of a layer (of an MTP depth: the trunk's layers and
    the depth, as DeepSeek-V3 counts), and ``k``, the number of a depth from 0.

    Args:
        architecture: as in ``config.json``.
        model_type: as in ``config.json``.
        settings: values of our section ``model`` from ``config.json``; refuses what we cannot
            represent with a ValueError.
        describe: content of ``config.json`` from our section, but for what all families share.
        depths_key: entry of ``config.json`` with the number of MTP depths.
        top: rules outside of layers.
        layer: rules below ``layer_prefix``; the block of an MTP layer has them too.
        layer_prefix: of a trunk layer.
        mtp: rules below ``mtp_prefix``.
        mtp_prefix: of an MTP layer.
        duplicates: names that may be there a second time, and what they repeat; they are compared
            on the way in, and written again where ``writes_duplicates``.
        ignored: patterns (regular expressions) of tensors without weights, as rotary tables.
        writes_duplicates: whether checkpoints of this family have the duplicates.
        always_biased: queries, keys and values have a bias, be it of zeros.
        always_untied: the output layer is written, be it a copy of the embedding.
        repeats_tied: an output layer that is tied to the embedding is written too, and stays tied:
            servers of this architecture know no tied one, and would run with one of random numbers.
        mtp_beside: MTP layers are written to a file of their own (``source.MTP_FILE``), and only
            this project reads them: the architecture has none.
    """

    architecture: str
    model_type: str
    settings: Callable[[Mapping[str, Any]], dict[str, Any]]
    describe: Callable[[ModelConfig], dict[str, Any]]
    depths_key: str
    top: tuple[Rule, ...]
    layer: tuple[Rule, ...]
    layer_prefix: str = "model.layers.{n}."
    mtp: tuple[Rule, ...] = ()
    mtp_prefix: str = "model.layers.{n}."
    duplicates: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    writes_duplicates: bool = False
    always_biased: bool = False
    always_untied: bool = False
    repeats_tied: bool = False
    mtp_beside: bool = False

    def read(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Values of our section ``model`` from a ``config.json``, every entry of it accounted for.

        Raises:
            ValueError: what we cannot represent, or do not know.
        """
        entries = Entries(content)
        found = self.settings(entries)
        entries.check(frozenset((self.depths_key, "num_mtp_layers")))
        return found

    def stated_depths(self, content: Mapping[str, Any]) -> int:
        """MTP depths that a ``config.json`` states."""
        # transformers has a name of its own for it, and reads both
        return content.get(self.depths_key) or content.get("num_mtp_layers") or 0

    @property
    def embedding(self) -> str:
        """Name of the embedding."""
        return next(r.names[0] for r in self.top if r.ours.startswith("embedding."))

    def duplicate_names(self, model: ModelConfig, depths: int) -> dict[str, str]:
        """Tensors that repeat another one, by name."""
        found = {}
        for name, source in self.duplicates:
            if model.tie_embeddings and source == "lm_head.weight":
                source = self.embedding
            for k in range(depths) if "{" in name else (0,):
                found[name.format(n=model.num_layers + k, k=k)] = source
        return found


@dataclass(frozen=True)
class Move:
    """A slot and the tensors that it is made of.

    Args:
        slot: our parameter.
        theirs: full names.
        transform: between them.
    """

    slot: Slot
    theirs: tuple[str, ...]
    transform: Transform


def expand(family: Family, model: ModelConfig, slots: Mapping[str, Slot]) -> Iterator[Move]:
    """The mapping of every slot, in the order of the slots.

    Args:
        family: the table.
        model: section ``model``.
        slots: of the model, see ``model_slots``.

    Raises:
        ValueError: a parameter that the family has no place for.
    """
    top = {rule.ours: rule for rule in family.top}
    layer = {rule.ours: rule for rule in family.layer}
    mtp = {rule.ours: rule for rule in family.mtp}
    for slot in slots.values():
        kind, number, rest = _parse(slot.name)
        expert, rest = _expert(rest)
        if kind == "decoder.layers":
            rule, prefix = layer.get(rest), family.layer_prefix.format(n=number)
        elif kind == "mtp.layers":
            block = rest.removeprefix("transformer_layer.")
            rule = layer.get(block) if block != rest else mtp.get(rest)
            prefix = family.mtp_prefix.format(n=model.num_layers + number, k=number)
        else:
            rule, prefix = top.get(rest), ""
        if rule is None:
            raise ValueError(
                f"{family.architecture} has no place for {slot.name}: the model has what that "
                "architecture does not have"
            )
        names = tuple(prefix + name.format(e=expert) for name in rule.names)
        yield Move(slot, names, rule.transform)


def _parse(name: str) -> tuple[str, int, str]:
    """Kind of place, number of the layer, name below it."""
    for kind in ("decoder.layers", "mtp.layers"):
        if name.startswith(f"{kind}."):
            number, _, rest = name.removeprefix(f"{kind}.").partition(".")
            return kind, int(number), rest
    return "", 0, name


def _expert(name: str) -> tuple[int | None, str]:
    """Number of the expert, and the name with ``{e}`` in its place."""
    before, found, after = name.partition("mlp.experts.")
    if not found:
        return None, name
    number, _, rest = after.partition(".")
    return int(number), f"{before}{found}{{e}}.{rest}"
