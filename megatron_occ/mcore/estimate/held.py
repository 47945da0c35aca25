"""What a rank holds, and the sizes of its elements: shared by the estimates of its memory."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_occ.config.schema import Config


@dataclass(frozen=True)
class Held:
    """What a rank holds, as counted on its model.

    Args:
        parameters: counts by part.
        kept_in_bf16: those of trunk layers without FP8 products, where the others have them.
        dense_layers: decoder layers with a dense MLP.
        moe_layers: decoder layers with experts.
        has_mtp: the MTP layers are here.
        has_output: the output layer is here.
        vocabulary: rows of the output layer on a tensor-parallel rank.
        stage: pipeline stage.
        replicas: ranks with the same part of the model, data and context parallel.
        expert_replicas: ranks with the same experts.
    """

    parameters: dict[str, int]
    kept_in_bf16: int
    dense_layers: int
    moe_layers: int
    has_mtp: bool
    has_output: bool
    vocabulary: int
    stage: int
    replicas: int
    expert_replicas: int

    @property
    def fp8_matrices(self) -> int:
        """Parameters of layers whose products are in FP8, if any are."""
        outside = sum(self.parameters.get(name, 0) for name in ("embedding", "output layer"))
        return sum(self.parameters.values()) - outside - self.kept_in_bf16


def element_bytes(config: Config) -> int:
    """Bytes of a parameter or activation."""
    return 4 if config.precision == "fp32" else 2


def head_widths(config: Config) -> tuple[int, int, int]:
    """Widths of a query, key and value head."""
    model, mla = config.model, config.model.mla
    if mla.enabled:
        width = mla.qk_head_dim + mla.qk_rope_head_dim
        return width, width, mla.v_head_dim
    width = model.kv_channels or model.hidden_size // model.num_attention_heads
    return width, width, width
