"""Bytes of activations: what the backward pass reads of a micro-batch.

The method of Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models"
(arXiv 2205.05198, section 4): every tensor that the backward pass reads counts once. Their layer
needs sbh(34 + 5 a s / h) bytes; here it has no dropout (no masks), attention that keeps no score
matrix (but for ``attention_backend=unfused``), a gated MLP, grouped key/value heads, and possibly
experts. A mixture of experts is taken as balanced.

What is computed again is kept for one module at a time.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from megatron_occ.config.schema import Config
from megatron_occ.mcore.estimate.held import Held, element_bytes, head_widths
from megatron_occ.rl.calibration import regime_from


@dataclass(frozen=True)
class Recompute:
    """What is computed again.

    Args:
        layers: whole layers of each model chunk, the first ones; None: all, MTP layers too.
        modules: of all layers.
    """

    layers: int | None = 0
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kept:
    """Bytes kept for each micro-batch in flight, and once."""

    each: float
    once: float


NOTHING, EVERYTHING = Recompute(), Recompute(layers=None)


def asked(config: Config) -> Recompute:
    """What the configuration asks for."""
    if config.recompute == "full":
        return Recompute(layers=config.recompute_layers)
    return Recompute(modules=tuple(config.recompute_modules))


def activations(config: Config, held: Held, tokens: int, length: int, recompute: Recompute) -> Kept:
    """Activations of a micro-batch on a rank.

    Args:
        config: a configuration that ``validate`` accepts.
        held: what the rank holds.
        tokens: of the micro-batch, over all context-parallel ranks.
        length: of its longest sequence.
        recompute: what is computed again.
    """
    local = tokens / config.parallel.context * element_bytes(config)
    split = config.model.hidden_size / _sequence_ranks(config)
    kinds = {moe: _Layer.of(config, length, moe=moe) for moe in (False, True)}
    counts = {False: held.dense_layers, True: held.moe_layers}
    mtp_layer = kinds[config.model.moe.num_experts is not None]
    copies = config.mtp.num_layers * len(regime_from(config.mtp).passes) * held.has_mtp
    each, once = 0.0, [0.0]
    for moe, whole in _whole_layers(config, counts, recompute).items():
        each += whole * split + (counts[moe] - whole) * kinds[moe].kept(recompute.modules)
        once.append(kinds[moe].kept() * bool(whole))
        once.append(kinds[moe].largest(recompute.modules) * (counts[moe] > whole))
    if recompute.layers is None:
        each += copies * 2 * split
        once.append(mtp_layer.kept() * held.has_mtp)
    else:
        # two norms, their concatenation, the layer, the final norm
        each += copies * (5 * split + mtp_layer.kept(recompute.modules))
        once.append(mtp_layer.largest(recompute.modules) * held.has_mtp)
    return Kept(local * each, local * max(once))


def _whole_layers(config: Config, counts: dict[bool, int], recompute: Recompute) -> dict[bool, int]:
    """Of the rank's dense and MoE layers those that are computed again as a whole."""
    if recompute.layers is None:
        return counts
    # the first layers of each chunk: dense ones are the first of the model
    left = min(recompute.layers * config.parallel.virtual_pipeline, sum(counts.values()))
    dense = min(left, counts[False])
    return {False: dense, True: left - dense}


@dataclass(frozen=True)
class _Layer:
    """Elements that the backward pass of a layer reads, for each token of a context rank.

    Args:
        parts: how many, and the modules that would compute them again instead.
    """

    parts: tuple[tuple[float, tuple[str, ...]], ...]

    def kept(self, modules: Collection[str] = ()) -> float:
        """Elements that are left where modules compute theirs again."""
        return sum(size for size, by in self.parts if not set(by) & set(modules))

    def largest(self, modules: Collection[str]) -> float:
        """Elements of the module, of these, that needs most while it computes."""
        sizes = [sum(size for size, by in self.parts if each in by) for each in modules]
        return max(sizes, default=0.0)

    @classmethod
    def of(cls, config: Config, length: int, *, moe: bool) -> _Layer:
        """Of a dense layer or of one with experts; ``length`` of the longest sequence."""
        split = config.model.hidden_size / _sequence_ranks(config)
        latent = config.model.mla.enabled
        # residual stream before both norms; the query/key/value projection's input, whose norm is
        # a part of it in TransformerEngine's layers
        common = ((2 * split, ()), (split, ("layernorm",) if latent else ()))
        mlp = _experts(config, split) if moe else _dense(config, split)
        return cls((*common, *_attention(config, length), *mlp))


_Parts = tuple[tuple[float, tuple[str, ...]], ...]


def _dense(config: Config, split: float) -> _Parts:
    """The first projection's input with its norm; gate and up, their product."""
    return ((split + 3 * config.model.ffn_hidden_size / config.parallel.tensor, ("mlp",)),)


def _experts(config: Config, split: float) -> _Parts:
    """The normed input; copies of it, gate and up; their product; the shared experts."""
    model, tensor = config.model, config.parallel.tensor
    width = model.moe.ffn_hidden_size or model.ffn_hidden_size
    ranks = config.parallel.expert_tensor or tensor
    # each token is copied to top_k experts, and to the ranks that share one
    copies = model.moe.top_k * ranks / _sequence_ranks(config)
    return (
        (split, ("layernorm",)),
        (copies * (model.hidden_size + 2 * width / ranks), ("moe",)),
        (copies * width / ranks, ("moe", "moe_act")),
        (3 * (model.moe.shared_ffn_hidden_size or 0) / tensor, ("moe", "shared_experts")),
    )


def _attention(config: Config, length: int) -> _Parts:
    """Latents; queries, keys and values; scores; what the output projection reads."""
    query, key, value = head_widths(config)
    model, tensor = config.model, config.parallel.tensor
    heads = model.num_attention_heads
    groups = model.num_query_groups or heads
    latent = 0.0
    if model.mla.enabled:
        latent = (model.mla.q_lora_rank or 0) + model.mla.kv_lora_rank + model.mla.qk_rope_head_dim
    scores = heads * length if config.attention_backend == "unfused" else 0
    return (
        (latent, ()),
        ((heads * query + groups * (key + value)) / tensor, ("mla_up_proj",)),
        (scores / tensor, ("core_attn",)),
        (heads * value / tensor, ()),
    )


def _sequence_ranks(config: Config) -> int:
    return config.parallel.tensor if config.parallel.sequence else 1
