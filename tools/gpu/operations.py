"""What an update must compute, and what a decode cycle must read: counts, from sizes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.plain_model import head_sizes
from megatron_occ.config.schema import Config, ModelConfig

Parts = Mapping[str, int]


def update_operations(
    config: Config, parts: Parts, lengths: Sequence[int], *, trains_head: bool
) -> float:
    """Floating-point operations of forward and backward of one update; a product with a sum is two.

    6 for each parameter of a matrix and token (Kaplan et al., arXiv 2001.08361, section 2.1), of
    routed experts those that a token goes to; and causal attention, L^2 / 2 pairs of a sequence
    with two products of the width of all heads. One pass a depth is counted where the head is
    trained: what a second one costs is seen as lower utilisation.

    Args:
        config: a dense or an MoE model with tied embeddings.
        parts: parameters by part, as ``count_by_part`` names them.
        lengths: tokens of each sequence.
        trains_head: whether MTP depths take part.
    """
    model, depths = config.model, config.mtp.num_layers * trains_head
    active = 1.0
    if model.moe.num_experts is not None:
        active = model.moe.top_k / model.moe.num_experts
    matrices = parts["trunk"] + active * parts.get("trunk experts", 0)
    if trains_head:
        matrices += parts["MTP"] + active * parts.get("MTP experts", 0)
    # the output layer is applied once for each head
    matrices += (1 + depths) * parts["embedding"]
    heads, _, channels = head_sizes(model)
    pairs = sum(length**2 / 2 for length in lengths)
    attention = (model.num_layers + depths) * pairs * 2 * 2 * heads * channels
    return 6.0 * matrices * sum(lengths) + 3.0 * attention


def cache_bytes(model: ModelConfig, width: int = 2) -> int:
    """Bytes that the trunk keeps of a token: keys and values of all layers."""
    _, groups, channels = head_sizes(model)
    return 2 * model.num_layers * groups * channels * width


def cycle_bytes(config: Config, parts: Parts, batch: int, context: float, width: int = 2) -> float:
    """Bytes that a cycle without drafts reads at least: every weight once, the cache of every row.

    Args:
        config: a dense model with tied embeddings.
        parts: parameters by part.
        batch: rows.
        context: mean tokens of a row's cache.
        width: bytes of an element.
    """
    weights = (parts["trunk"] + parts["embedding"]) * width
    return weights + batch * context * cache_bytes(config.model, width)
