"""Parameters of the whole model, and those that act on a token, whatever the layout."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from megatron_occ.config.schema import Config
from megatron_occ.config.schema_model import ParallelConfig
from megatron_occ.mcore.estimate.ranks import META, count_by_part, fake_rank
from megatron_occ.mcore.provider import build_chunks


@dataclass(frozen=True)
class ModelParameters:
    """Counts by part, each parameter once: no copies of an embedding, no padded vocabulary.

    Args:
        total: all parameters.
        active: those that act on a token: of the routed experts the ``top_k`` that the router
            picks in a layer, and all of the rest.
    """

    total: dict[str, int]
    active: dict[str, int]


def model_parameters(config: Config, vocab_size: int) -> ModelParameters:
    """Count the parameters of the model.

    Layers of a kind are alike, so that one of each is built, on the meta device, and multiplied.

    Args:
        config: a configuration that ``validate`` accepts.
        vocab_size: ids of the tokenizer.

    Raises:
        ValueError: this process sees a CUDA device.
    """
    small, repeats = _one_of_each_kind(config)
    with fake_rank(small, 1, 0):
        with META:
            chunks = build_chunks(small, vocab_size, META)
        total = count_by_part(chunks, repeats)
    moe = config.model.moe
    # a layer has num_experts alike
    active = {
        part: count * moe.top_k // moe.num_experts if part.endswith("experts") else count
        for part, count in total.items()
    }
    return ModelParameters(total, active)


def _one_of_each_kind(config: Config) -> tuple[Config, dict[str, int]]:
    """The model with a layer of each kind, and how often the real one has these."""
    small, model = copy.deepcopy(config), config.model
    small.parallel = ParallelConfig()
    dense = model.num_layers
    if model.moe.num_experts is not None:
        dense = min(model.moe.first_dense_layers, model.num_layers)
    counts = [count for count in (dense, model.num_layers - dense) if count]
    small.model.num_layers = len(counts)
    small.model.moe.first_dense_layers = min(dense, 1)
    small.mtp.num_layers = min(config.mtp.num_layers, 1)
    repeats = {f"decoder.layers.{index}.": count for index, count in enumerate(counts)}
    return small, repeats | {"mtp.": config.mtp.num_layers}
