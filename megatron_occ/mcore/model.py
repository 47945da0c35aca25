"""Megatron-Core's GPT with per-token log-probs of the main head and of every MTP depth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor

from megatron_occ.losses.heads import HeadOutputs
from megatron_occ.mcore.logprobs import (
    TokenStatistics,
    VocabShard,
    draft_distance,
    token_statistics,
)


@dataclass(frozen=True)
class HeadRequest:
    """What a forward pass is to return of each head.

    Args:
        targets: [1+K, b, s] token ids in the source frame: position t of depth d predicts
            ``targets[d, :, t]``. [1, b, s] asks for the main head alone.
        passes: MTP passes as (gradient to trunk, gradient to head), see ``Regime.passes``.
        temperature: divides main and MTP logits alike.
        entropy: return the main head's entropies.
        distance: None, ``soft_ce`` or ``tv``: distance of the last pass to the main head.
    """

    targets: Tensor
    passes: tuple[tuple[bool, bool], ...] = ((True, True),)
    temperature: float = 1.0
    entropy: bool = False
    distance: str | None = None


class OCCGPTModel(GPTModel):
    """GPT that answers a :class:`HeadRequest`; every other call is Megatron's own.

    The hidden states come out of Megatron's public ``forward``: for its duration this stage calls
    itself an inner pipeline stage, which is how Megatron returns hidden states, and the arguments
    that the decoder received (rotary embedding, mask) are kept for the MTP block, which then runs
    once for each pass. Megatron's own MTP loss is never entered.
    """

    def __init__(self, *args: Any, valid_vocab_size: int | None = None, **kwargs: Any) -> None:
        """See ``GPTModel``.

        Args:
            valid_vocab_size: ids that exist; rows beyond are padding and take no part in softmax.
        """
        super().__init__(*args, **kwargs)
        assert self.config.pipeline_model_parallel_size == 1, "one stage holds the whole model"
        assert not self.config.sequence_parallel, "hidden states are whole on every rank"
        self.valid_vocab_size = valid_vocab_size or self.vocab_size
        self._block_arguments: dict[str, Any] = {}
        self.decoder.register_forward_pre_hook(self._keep_block_arguments, with_kwargs=True)
        if self.mtp_process:
            for parameter in self.mtp.parameters():
                parameter.is_mtp_head = True

    def forward(self, *args: Any, request: HeadRequest | None = None, **kwargs: Any) -> Any:
        """Megatron's forward, or, with ``request``, the log-probs of all heads.

        Returns:
            With ``request``: :class:`HeadOutputs`; without it what Megatron returns.
        """
        if request is None:
            return super().forward(*args, **kwargs)
        with self._as_inner_stage():
            hidden = super().forward(*args, **kwargs)
        call = dict(
            zip(("input_ids", "position_ids", "attention_mask"), args, strict=False), **kwargs
        )
        return self._head_outputs(hidden, request, call)

    def next_token_logits(self, input_ids: Tensor, position_ids: Tensor, context: Any) -> Tensor:
        """Logits of the token after the last one, over the whole vocabulary, fp32.

        Args:
            input_ids: [b, s] the tokens that the KV cache does not hold yet.
            position_ids: [b, s].
            context: Megatron's static inference context.

        Returns:
            [b, valid_vocab_size].
        """
        with self._as_inner_stage():
            hidden = super().forward(
                input_ids,
                position_ids,
                None,
                inference_context=context,
                runtime_gather_output=True,
            )
        local = hidden[-1] @ self._output_weight().t()
        logits = gather_from_tensor_model_parallel_region(local.unsqueeze(0)).squeeze(0)
        return logits[:, : self.valid_vocab_size].float()

    @contextmanager
    def _as_inner_stage(self) -> Iterator[None]:
        saved = self.post_process, self.mtp_process
        self.post_process = self.mtp_process = False
        try:
            yield
        finally:
            self.post_process, self.mtp_process = saved

    def _keep_block_arguments(self, _module: Any, _args: tuple, kwargs: dict[str, Any]) -> None:
        names = ("rotary_pos_emb", "packed_seq_params", "sequence_len_offset")
        self._block_arguments = {name: kwargs.get(name) for name in names}

    def _output_weight(self) -> Tensor:
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _vocab_shard(self) -> VocabShard:
        group = self.pg_collection.tp
        local = self.vocab_size // group.size()
        start = group.rank() * local
        size = max(0, min(local, self.valid_vocab_size - start))
        return VocabShard(start, size, group if group.size() > 1 else None)

    def _head_outputs(
        self, hidden: Tensor, request: HeadRequest, call: dict[str, Any]
    ) -> HeadOutputs:
        # flat index t * b + i: sequence dimension first, as hidden states are laid out
        targets = request.targets.transpose(1, 2).flatten(1)
        shard, weight, size = self._vocab_shard(), self._output_weight(), call["input_ids"].shape
        has_mtp = targets.size(0) > 1
        main = token_statistics(
            self._flatten(hidden),
            weight,
            targets[0],
            shard,
            request.temperature,
            entropy=request.entropy,
            top_ids=has_mtp,
        )
        outputs = {"logprobs": _unflatten(main.logprobs, size)}
        if main.entropy is not None:
            outputs["entropy"] = _unflatten(main.entropy, size)
        if not has_mtp:
            return HeadOutputs(**outputs)
        passes = []
        for to_trunk, to_head in request.passes:
            states = [self._flatten(h) for h in self._mtp_hidden(hidden, call, to_trunk, to_head)]
            rows = weight if to_trunk else weight.detach()
            # every pass predicts the same: one of them is compared with the main head
            is_last = len(passes) == len(request.passes) - 1
            depths = [
                token_statistics(h, rows, y, shard, request.temperature, top_ids=is_last)
                for h, y in zip(states, targets[1:], strict=True)
            ]
            passes.append(torch.stack([_unflatten(depth.logprobs, size) for depth in depths]))
        outputs["agreement"] = _agreement(main, depths, size)
        if request.distance is not None:
            outputs["distance"] = self._distance(states, hidden, weight, shard, request, size)
        return HeadOutputs(**outputs, passes=tuple(passes))

    def _mtp_hidden(
        self, hidden: Tensor, call: dict[str, Any], to_trunk: bool, to_head: bool
    ) -> tuple[Tensor, ...]:
        """Hidden states [s, b, h] of each depth; gradient goes where the two flags say.

        The cut is at the trunk's boundary alone (hidden state, embedding; the caller detaches the
        output layer): a cut between depths would leave depth 1 untrained by depth 2.
        """
        arguments = dict(
            input_ids=call["input_ids"],
            position_ids=call["position_ids"],
            attention_mask=call["attention_mask"],
            hidden_states=hidden if to_trunk else hidden.detach(),
            embedding=self.embedding if to_trunk else self._detached_embedding,
            **self._block_arguments,
        )
        with nullcontext() if to_trunk or to_head else torch.no_grad():
            if to_head:
                output = self.mtp(**arguments)
            else:
                frozen = {name: p.detach() for name, p in self.mtp.named_parameters()}
                output = torch.func.functional_call(self.mtp, frozen, kwargs=arguments)
        return output.chunk(1 + self.config.mtp_num_layers, dim=0)[1:]

    def _detached_embedding(self, **kwargs: Any) -> Tensor:
        return self.embedding(**kwargs).detach()

    def _flatten(self, hidden: Tensor) -> Tensor:
        """[s, b, h] -> [s * b, h], whole and ready for a vocabulary split over ranks."""
        return copy_to_tensor_model_parallel_region(hidden).flatten(0, 1)

    def _distance(
        self,
        states: list[Tensor],
        hidden: Tensor,
        weight: Tensor,
        shard: VocabShard,
        request: HeadRequest,
        size: torch.Size,
    ) -> Tensor:
        teacher = hidden.detach()
        distances = [
            draft_distance(
                request.distance,
                state,
                weight,
                self._flatten(teacher.roll(-k, dims=0)),
                shard,
                request.temperature,
            )
            for k, state in enumerate(states, start=1)
        ]
        return torch.stack([_unflatten(distance, size) for distance in distances])


def _unflatten(values: Tensor, size: torch.Size) -> Tensor:
    """[s * b] -> [b, s]."""
    batch, sequence = size
    return values.view(sequence, batch).t()


def _agreement(main: TokenStatistics, depths: list[TokenStatistics], size: torch.Size) -> Tensor:
    """1.0 where a depth's top token is the main head's for the same target, [K, b, s]."""
    top = _unflatten(main.top_ids, size)
    pairs = enumerate(depths, start=1)
    return torch.stack([(_unflatten(d.top_ids, size) == _ahead(top, k)).float() for k, d in pairs])


def _ahead(ids: Tensor, steps: int) -> Tensor:
    """ids[b, t + steps] at position t; the last ``steps`` positions wrap, callers mask them."""
    return ids.roll(-steps, dims=1)
