"""Megatron-Core's MTP layer on ready-made token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.utils import make_viewless_tensor
from torch import Tensor


class MTPLayer(MultiTokenPredictionLayer):
    """Megatron's MTP layer on ready-made ids of its depth, [K, b, s], instead of rolled ones.

    Depth k reads the embedding of the token that depth k-1 predicts. These ids are among the
    targets already; rolling the input again would cost a message between context-parallel ranks,
    and in a packed batch a host synchronisation for every sequence.
    """

    def _get_embeddings(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        embedding: Callable[..., Tensor],
        hidden_states: Tensor,
        packed_seq_params: Any = None,
        **newer: Any,
    ) -> tuple[Tensor, ...]:
        if input_ids.dim() == 2:
            return super()._get_embeddings(
                input_ids, position_ids, embedding, hidden_states, packed_seq_params, **newer
            )
        ids = input_ids[self.layer_number - 1]
        embedded = embedding(input_ids=ids, position_ids=position_ids)
        hidden = make_viewless_tensor(inp=hidden_states, requires_grad=True, keep_graph=True)
        # from 0.17 on Megatron hands a padding mask along
        return input_ids, position_ids, *newer.values(), embedded, hidden

    def _checkpointed_forward(self, *given: Any, **arguments: Any) -> Any:
        """Recompute with packed rows.

        Up to 0.16 Megatron hands all arguments to a function that saves tensors alone; what is none
        goes into the function here, as from 0.17 on.
        """
        if not given:
            return super()._checkpointed_forward(**arguments)
        (forward,) = given
        tensors = {n: v for n, v in arguments.items() if v is None or isinstance(v, Tensor)}
        others = {name: value for name, value in arguments.items() if name not in tensors}

        def run(*values: Tensor | None) -> Any:
            return forward(**dict(zip(tensors, values, strict=True)), **others)

        return super()._checkpointed_forward(run, *tensors.values())


def inner_layer(layer: MultiTokenPredictionLayer) -> Any:
    """The transformer layer of an MTP layer: Megatron 0.17 renamed it."""
    return getattr(layer, "transformer_layer", None) or layer.mtp_model_layer
